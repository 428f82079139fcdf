"""What people did: logs that the pipeline reads as they are, in whole lines; users hashed, and split."""

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import stat
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline import config, events
from pipeline.errors import InputError
from serving import feedback as feedback_
from serving.feedback import Feedback, Split, append, parse_compare, user_key
from tests.conftest import write_jsonl

KEY = b"k" * 32
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


def lines_of(folder: Path, name: str) -> list[dict]:
    return [
        json.loads(line)
        for file in sorted(folder.glob(f"{name}-*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]


@pytest.fixture
def at_noon(monkeypatch):
    monkeypatch.setattr(feedback_, "_now", lambda: NOON)


# --- The logs ------------------------------------------------------------------------------------------


def test_an_opened_result_is_an_event_a_logged_query_and_an_open_of_its_version(tmp_path, at_noon):
    made = Feedback.open(tmp_path / "made", user_key=KEY)
    made.searched("reader@example", "merge tables", ["b", "a"], 7)
    made.opened("reader@example", "a", "merge tables", 2, 7)
    made.close()
    user = hashlib.blake2b(b"reader@example", key=KEY, person=b"user", digest_size=16).hexdigest()
    at = "2026-11-22T12:00:00.000+00:00"
    assert lines_of(made.folder, "events") == [{"user_id": user, "document_id": "a", "timestamp": at}]
    assert lines_of(made.folder, "queries") == [
        {"query": "merge tables", "document_id": "a", "user_id": user, "timestamp": at}
    ]
    shown, opened = lines_of(made.folder, "searches")
    assert (shown["kind"], shown["document_ids"], shown["version"]) == ("search", ["b", "a"], 7)
    assert (opened["kind"], opened["document_id"], opened["rank"]) == ("open", "a", 2)
    assert sorted(file.name for file in made.folder.iterdir()) == [
        f"{name}-2026-11-22.jsonl" for name in ("events", "queries", "searches")
    ]


def test_no_file_holds_a_users_own_id(tmp_path):
    made = Feedback.open(tmp_path, user_key=KEY)
    made.searched("reader@example", "q", ["a"], 7)
    made.opened("reader@example", "a", "q", 1, 7)
    made.close()
    written = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"reader" not in written
    # nor its plain hash, which anybody with a list of addresses could look up
    assert hashlib.blake2b(b"reader@example", digest_size=16).hexdigest().encode() not in written


def test_without_a_user_nothing_is_written(tmp_path):
    made = Feedback.open(tmp_path, user_key=KEY)
    for nobody in (None, ""):
        made.searched(nobody, "q", ["a"], 7)
        made.opened(nobody, "a", "q", 1, 7)
    made.close()
    assert list(tmp_path.iterdir()) == []


def test_what_was_opened_without_a_query_is_an_event_alone(tmp_path):
    made = Feedback.open(tmp_path, user_key=KEY)
    made.opened("u", "a", None, None, 7)
    made.opened("u", "b", "  ", None, 7)
    made.close()
    assert [line["document_id"] for line in lines_of(tmp_path, "events")] == ["a", "b"]
    assert not lines_of(tmp_path, "queries") + lines_of(tmp_path, "searches")


def test_a_query_is_bounded_and_an_id_is_never_cut_into_another_documents(tmp_path):
    made = Feedback.open(tmp_path, user_key=KEY)
    made.searched("u", "q" * 5_000, [str(n) for n in range(500)], 7)
    made.opened("u", "a", "q" * 5_000, 1, 7)
    made.opened("u", "d" * 1_001, "q", 1, 7)
    made.close()
    search, opened = lines_of(tmp_path, "searches")
    assert (len(search["query"]), len(search["document_ids"])) == (2_000, 100)
    assert [event["document_id"] for event in lines_of(tmp_path, "events")] == ["a"]
    assert search["query"] == opened["query"]  # by which an open finds its search


def test_half_a_character_and_a_line_break_leave_lines_that_can_be_read(tmp_path):
    made = Feedback.open(tmp_path, user_key=KEY)
    made.opened("u\ud800", "a", "half \ud83d\nof 한글 😀", 1, 7)
    made.close()
    assert [line["query"] for line in lines_of(tmp_path, "queries")] == ["half ?\nof 한글 😀"]


def test_a_new_day_is_a_new_file(tmp_path, monkeypatch):
    made = Feedback.open(tmp_path, user_key=KEY)
    for second in (59, 60):
        moment = datetime.fromtimestamp(NOON.timestamp() + 12 * 3600 - 60 + second, UTC)
        monkeypatch.setattr(feedback_, "_now", lambda moment=moment: moment)
        made.opened("u", "a", None, None, 7)
    made.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "events-2026-11-22.jsonl",
        "events-2026-11-23.jsonl",
    ]


def test_the_pipelines_own_reader_takes_every_event_and_sets_none_aside(tmp_path, at_noon):
    made = Feedback.open(tmp_path, user_key=KEY)
    for user in ("one", "two"):
        made.opened(user, "a", "what a", 1, 7)
        made.opened(user, "b", None, None, 7)
    made.close()
    path = tmp_path / "events-2026-11-22.jsonl"
    columns = events.Columns("user_id", "document_id", "timestamp")
    with path.open("rb") as file:
        ((rows, rejects),) = events.read(file, str(path), "jsonl", columns)
    assert len(rejects) == 0
    assert rows["document_id"].to_list() == ["a", "b", "a", "b"]
    assert rows["timestamp"].to_list() == [NOON] * 4
    assert rows["user_id"].n_unique() == 2


@pytest.mark.slow
def test_the_stage_pairs_trains_the_next_run_on_the_log_as_it_is(tmp_path, monkeypatch):
    from pipeline import pairs

    made = Feedback.open(tmp_path / "feedback", user_key=KEY)
    for user in range(8):
        for step in range(3):
            moment = datetime.fromtimestamp(NOON.timestamp() + user * 7200 + step * 60, UTC)
            monkeypatch.setattr(feedback_, "_now", lambda moment=moment: moment)
            made.opened(f"user {user}", f"d{(user + step) % 5}", f"what is {user}", 1, 7)
    made.close()
    documents = [{"document_id": f"d{n}", "text": f"document number {n}"} for n in range(5)]
    write_jsonl(tmp_path / "documents.jsonl", documents)
    named = {"user_id": "user_id", "timestamp": "timestamp"}
    given = config.from_dict(
        {
            "events": {"paths": [str(made.folder / "events-*.jsonl")]},
            "queries": {"paths": [str(made.folder / "queries-*.jsonl")]} | named,
            "documents": {"paths": [str(tmp_path / "documents.jsonl")]},
            "pairs": {"holdout_share": 0.0, "negatives": {"random": 1.0}},
        }
    )
    result = pairs.run(given.pairs, given.events, given.documents, tmp_path / "pairs", queries=given.queries)
    assert (result.facts["events"]["read"], result.facts["events"]["rejected"]) == (24, 0)
    assert (result.facts["queries"]["read"], result.facts["queries"]["rejected"]) == (24, 0)
    assert result.rows["sessions"] == 8  # two hours apart, each of three documents


# --- Lines -----------------------------------------------------------------------------------------------


def _append_many(path: str, name: str) -> None:
    for number in range(500):
        append(Path(path), json.dumps({"by": name, "number": number, "pad": name * 300}).encode() + b"\n")


@pytest.mark.slow
def test_lines_of_two_processes_stay_whole(tmp_path):
    path = tmp_path / "searches-2026-11-22.jsonl"
    start = multiprocessing.get_context("spawn").Process
    writers = [start(target=_append_many, args=(str(path), name)) for name in ("a", "b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for name in ("a", "b"):
        assert [row["number"] for row in rows if row["by"] == name] == list(range(500))


def test_half_a_line_that_a_killed_process_left_stays_by_itself(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"whole": 1}\n{"hal')
    append(path, b'{"next": 1}\n')
    assert path.read_bytes() == b'{"whole": 1}\n{"hal\n{"next": 1}\n'


def test_what_a_full_disk_took_of_a_line_is_cut_off_again(tmp_path, monkeypatch):
    path = tmp_path / "events.jsonl"
    append(path, b"first\n")
    write = os.write

    def nearly_full(descriptor: int, data: bytes) -> int:
        """Stands in for a disk with room for three bytes."""
        if len(data) <= 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:3])

    monkeypatch.setattr(os, "write", nearly_full)
    with pytest.raises(OSError, match="No space left"):
        append(path, b"second\n")
    assert path.read_bytes() == b"first\n"


def test_a_full_disk_costs_the_line_and_is_said_once_a_minute(tmp_path, monkeypatch, caplog):
    made = Feedback.open(tmp_path, user_key=KEY)

    def full(path: Path, line: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    now = [1000.0]
    monkeypatch.setattr(feedback_, "append", full)
    monkeypatch.setattr(feedback_.time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.ERROR, "serving"):
        for n_lost, second in enumerate((0, 1, 59, 61), 1):
            now[0] = 1000.0 + second
            made.searched("u", "q", ["a"], 7)
            while made.lost < n_lost:
                time.sleep(0.001)
        made.close()  # the last line of the log may still be on its way
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "No space left on device); lines of feedback lost: 1 (since the start: 1)" in said[0]
    assert "lines of feedback lost: 3 (since the start: 4)" in said[1]


@pytest.fixture
def slow_disk(monkeypatch):
    """Stands in for a disk that takes nothing until the event is set; ten lines may wait for it."""
    may_go, write = threading.Event(), feedback_.append

    def slow(path: Path, line: bytes) -> None:
        assert may_go.wait(10)
        write(path, line)

    monkeypatch.setattr(feedback_, "append", slow)
    monkeypatch.setattr(feedback_, "MAX_WAITING", 10)
    yield may_go
    may_go.set()


def test_a_disk_that_hangs_holds_up_no_search_and_costs_what_finds_no_room(tmp_path, slow_disk, caplog):
    made = Feedback.open(tmp_path, user_key=KEY)
    for number in range(12):
        made.searched("u", f"q{number}", ["a"], 7)  # returns although nothing is written
    assert made.lost == 2
    assert "(10 lines wait already); lines of feedback lost: 1" in caplog.text
    slow_disk.set()
    made.close()
    assert [line["query"] for line in lines_of(tmp_path, "searches")] == [f"q{n}" for n in range(10)]
    made.searched("u", "after", ["a"], 7)
    assert made.lost == 3


def test_a_folder_that_is_gone_costs_lines_and_no_search(tmp_path):
    made = Feedback.open(tmp_path / "made", user_key=KEY)
    (tmp_path / "made").rmdir()
    made.opened("u", "a", "q", 1, 7)
    made.close()
    assert made.lost == 3


def test_a_folder_that_cannot_be_made_is_said_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        Feedback.open(tmp_path / "file" / "below", user_key=KEY)


# --- The key -----------------------------------------------------------------------------------------------


def test_a_key_is_made_once_for_its_owner_alone_and_kept(tmp_path):
    path = tmp_path / "keys" / "users.key"
    key = user_key(path)
    assert len(key) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert user_key(path) == key
    assert [file.name for file in path.parent.iterdir()] == ["users.key"]


def test_a_key_that_is_short_or_no_file_is_refused(tmp_path):
    (tmp_path / "short").write_text("secret\n")
    with pytest.raises(InputError, match="short: holds 6 bytes, wanted a secret of at least 16"):
        user_key(tmp_path / "short")
    with pytest.raises(InputError, match="directory"):
        user_key(tmp_path)


def test_another_key_gives_other_users_and_none_one_for_this_process(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "serving"):
        by = [Feedback.open(tmp_path, user_key=key).hashed("u") for key in (KEY, KEY, b"o" * 100, None, None)]
    assert by[0] == by[1]
    assert len(set(by)) == 4
    assert "give --user_key_file" in caplog.text


# --- Two versions ---------------------------------------------------------------------------------------


def test_a_user_stays_with_a_version_and_the_share_is_kept():
    split = Split(7, 8, 0.25, KEY)
    served = [split.version_for(f"user {n}") for n in range(10_000)]
    assert served == [split.version_for(f"user {n}") for n in range(10_000)]
    # 10,000 draws of 0.25: standard deviation 43
    assert served.count(8) == pytest.approx(2_500, abs=4 * 43)
    assert served.count(7) == 10_000 - served.count(8)


def test_a_larger_share_moves_users_to_the_other_version_only():
    users = [f"user {n}" for n in range(2_000)]
    few, many = (Split(7, 8, share, KEY) for share in (0.1, 0.3))
    compared = {user for user in users if few.version_for(user) == 8}
    assert compared < {user for user in users if many.version_for(user) == 8}


def test_the_next_comparison_draws_its_users_anew():
    users = [f"user {n}" for n in range(4_000)]
    one, next_one = (Split(7, version, 0.5, KEY) for version in (8, 9))
    both = sum(one.version_for(user) == 8 and next_one.version_for(user) == 9 for user in users)
    # half of a half; standard deviation 27
    assert both == pytest.approx(1_000, abs=4 * 27)


def test_users_without_an_id_are_served_by_the_live_version():
    split = Split(7, 8, 0.999999, KEY)
    assert [split.version_for(nobody) for nobody in (None, "")] == [7, 7]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8", "--compare 8: wanted VERSION:SHARE, such as 20261122074922:0.1"),
        ("8:", "--compare 8:: wanted VERSION:SHARE"),
        ("new:0.1", "--compare new:0.1: wanted VERSION:SHARE"),
        ("８:0.1", "wanted VERSION:SHARE"),
        ("8:ten", "wanted VERSION:SHARE"),
        ("8:0", "the share is 0, wanted more than 0 and less than 1"),
        ("8:1", "the share is 1, wanted more than 0"),
        ("8:nan", "the share is nan, wanted more than 0"),
        ("8:-0.1", "the share is -0.1, wanted more than 0"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_said(text, message):
    with pytest.raises(InputError, match=message):
        parse_compare(text)


def test_every_line_says_the_comparison_that_went_on(tmp_path):
    made = Feedback.open(tmp_path, user_key=KEY)
    made.searched("u", "q", ["a"], 7)
    made.split = Split(7, 8, 0.25, KEY)
    made.searched("u", "q", ["a"], 8)
    made.close()
    before, during = lines_of(tmp_path, "searches")
    names = ("live", "compared", "share", "drawn")
    assert [before[name] for name in names] == [None, None, None, None]
    assert [during[name] for name in names] == [7, 8, 0.25, made.split.version_for("u")]


def test_a_line_says_the_version_that_was_drawn_whichever_answered(tmp_path):
    made = Feedback.open(tmp_path, user_key=KEY)
    made.split = Split(7, 8, 0.999999, KEY)  # nearly every user
    made.searched("u", "q", ["a"], 7)  # as while version 8 is not there
    made.close()
    [line] = lines_of(tmp_path, "searches")
    assert (line["version"], line["drawn"]) == (7, 8)
