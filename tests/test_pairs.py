"""Stage `pairs`: the real Beam job on small logs, and the drawing of negatives by itself."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import config, pairs
from pipeline.artifacts import Pairs
from pipeline.errors import ConfigError, InputError

START = datetime(2026, 11, 21, tzinfo=UTC)


def sessions_of(*rows: tuple[str, str, list[str]]) -> pl.DataFrame:
    """(session_id as a hexadecimal number, user_id, document_ids)"""
    full = [(s, u, START, START, d) for s, u, d in rows]
    schema = {
        "session_id": pl.String,
        "user_id": pl.String,
        "start": pl.Datetime("us", "UTC"),
        "end": pl.Datetime("us", "UTC"),
        "document_ids": pl.List(pl.String),
    }
    return pl.DataFrame(full, schema, orient="row")


def draw(sessions: pl.DataFrame, seed: int = 7, max_draws: int = 20) -> pl.DataFrame:
    found = pairs.neighbours(sessions)
    popularity = pairs.document_popularity(sessions.lazy(), None)
    return found.with_columns(pairs.draw_negatives(found, sessions, popularity, seed, max_draws))


def run(tmp_path: Path, name: str = "pairs", options: tuple[str, ...] = (), **sections: dict) -> Pairs:
    given = config.from_dict(sections)
    return pairs.run(given.pairs, given.events, given.documents, tmp_path / name, options)


# --- Plain functions ------------------------------------------------------------------------------------


def test_neighbours_are_pairs_in_reading_order():
    found = pairs.neighbours(sessions_of(("1", "u", ["a", "b", "c"])))
    assert found.select("anchor_id", "positive_id").rows() == [("a", "b"), ("b", "c")]


def test_a_document_with_itself_is_no_pair_and_a_pair_counts_once_a_session():
    found = pairs.neighbours(sessions_of(("1", "u", ["a", "a", "b", "a", "b"]), ("2", "u", ["a", "b"])))
    assert found.select("session_id", "anchor_id", "positive_id").rows() == [
        ("1", "a", "b"),
        ("1", "b", "a"),
        ("2", "a", "b"),
    ]


def test_a_session_of_one_document_gives_no_pair():
    assert pairs.neighbours(sessions_of(("1", "u", ["a"]), ("2", "u", ["a", "a"]))).is_empty()


SESSIONS = st.lists(
    st.tuples(st.sampled_from("uvwx"), st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6)),
    min_size=1,
    max_size=12,
).map(lambda found: sessions_of(*((f"{n:x}", user, ids) for n, (user, ids) in enumerate(found))))


@given(SESSIONS)
def test_a_negative_is_read_by_another_user_and_not_in_the_anchors_session(sessions):
    held = dict(zip(sessions["session_id"], sessions["document_ids"].to_list(), strict=True))
    readers: dict[str, set[str]] = {}
    for user, ids in sessions.select("user_id", "document_ids").iter_rows():
        for document_id in ids:
            readers.setdefault(document_id, set()).add(user)
    for row in draw(sessions).iter_rows(named=True):
        eligible = {
            d
            for d, users in readers.items()
            if users != {row["user_id"]} and d not in held[row["session_id"]]
        }
        if row["negative_id"] is None:
            # twenty draws among at most eight documents miss the only eligible one now and then
            assert len(eligible) < 4
        else:
            assert row["negative_id"] in eligible


@given(SESSIONS, st.randoms(use_true_random=False))
def test_the_order_of_the_sessions_changes_no_negative(sessions, random):
    order = list(range(len(sessions)))
    random.shuffle(order)
    one, other = draw(sessions), draw(sessions[order])
    by = ["session_id", "anchor_id", "positive_id"]
    assert one.sort(by).rows() == other.sort(by).rows()


def test_another_seed_draws_others():
    sessions = sessions_of(*((f"{n:x}", f"u{n}", [f"d{n}", f"d{n + 1}", f"d{n + 2}"]) for n in range(40)))
    assert draw(sessions, seed=1).rows() == draw(sessions, seed=1).rows()
    assert draw(sessions, seed=1).rows() != draw(sessions, seed=2).rows()


def test_negatives_are_drawn_as_often_as_documents_are_read():
    popular = [(f"{n:x}", f"u{n}", ["hit"]) for n in range(300)] + [
        (f"{n:x}", f"u{n}", ["rare"]) for n in range(300, 400)
    ]
    asking = [(f"{n:x}", f"u{n}", [f"a{n}", f"b{n}"]) for n in range(400, 2400)]
    drawn = draw(sessions_of(*popular, *asking))["negative_id"].value_counts()
    counts = dict(drawn.iter_rows())
    # 300 readings against 100, drawn about 136 and 45 times: three standard deviations apart
    assert counts["hit"] > 1.8 * counts["rare"]


def test_a_reader_alone_has_no_negative():
    assert draw(sessions_of(("1", "u", ["a", "b"]), ("2", "u", ["c"])))["negative_id"].to_list() == [None]


def test_spans_are_cut_by_time_and_by_sessions_that_give_pairs():
    sessions = sessions_of(*((f"{n:x}", "u", ["a", "b"] if n % 2 else ["a"]) for n in range(40)))
    starts = [START + timedelta(hours=n) for n in range(40)]
    sessions = sessions.with_columns(start=pl.Series(starts, dtype=pl.Datetime("us", "UTC")))
    # 20 sessions with pairs, at the odd hours: the last two are test, the two before them dev
    dev_start, test_start = pairs.held_out_spans(sessions.lazy(), 0.1)
    assert (dev_start, test_start) == (START + timedelta(hours=33), START + timedelta(hours=37))


def test_too_few_sessions_leave_nothing_held_out():
    assert pairs.held_out_spans(sessions_of(("1", "u", ["a", "b"])).lazy(), 0.1) == (None, None)


# --- The Beam job ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory, log) -> Pairs:
    sections = {
        "events": {"paths": [str(log / "events.jsonl")], "text": "text"},
        "documents": {"paths": [str(log / "documents.jsonl")]},
    }
    return run(tmp_path_factory.mktemp("small"), **sections)


@pytest.mark.slow
def test_the_job_writes_every_table_and_the_counts_add_up(small):
    # 60 readers, 3 sessions each, 5 documents a session: 4 pairs a session
    assert small.rows["events"] == 900
    assert small.facts["events"] == {"read": 900, "in_sessions": 900, "duplicates": 0, "rejected": 0}
    assert small.rows["sessions"] == 180
    assert small.facts["session_lengths"] == {"5": 180}
    # the last tenth of 180 sessions is test, the tenth before it dev
    assert (small.rows["pairs"], small.rows["dev"], small.rows["test"]) == (144 * 4, 18 * 4, 18 * 4)
    assert small.read("pairs").column_names == pairs.PAIR_COLUMNS
    assert small.read("documents").column_names == ["document_id", "text", "title", "pages"]


@pytest.mark.slow
def test_held_out_sessions_are_later_than_those_trained_on(small):
    sessions = small.read("sessions", ["session_id", "start"]).to_pylist()
    start = {row["session_id"]: row["start"] for row in sessions}
    latest = {span: max(start[s] for s in small.read(span)["session_id"].to_pylist()) for span in pairs.SPANS}
    earliest = {
        span: min(start[s] for s in small.read(span)["session_id"].to_pylist()) for span in pairs.SPANS
    }
    assert latest["pairs"] < earliest["dev"] <= latest["dev"] < earliest["test"]


@pytest.mark.slow
def test_files_cut_and_ordered_anyhow_give_the_same_bytes(tmp_path, log, small):
    lines = (log / "events.jsonl").read_text().splitlines()[::-1]
    for n in range(3):
        (tmp_path / f"part{n}.jsonl").write_text("\n".join(lines[n::3]))
    again = run(
        tmp_path,
        events={"paths": [str(tmp_path / "part*.jsonl")], "text": "text"},
        documents={"paths": [str(log / "documents.jsonl")]},
    )
    assert again.manifest["files"] == small.manifest["files"]


@pytest.mark.slow
def test_a_beam_option_passes_through(tmp_path, log, small):
    again = run(
        tmp_path,
        options=(
            "--runner",
            "FnApiRunner",
            "--direct_num_workers",
            "2",
            "--direct_running_mode",
            "multi_threading",
        ),
        events={"paths": [str(log / "events.jsonl")], "text": "text"},
        documents={"paths": [str(log / "documents.jsonl")]},
    )
    assert again.manifest["files"] == small.manifest["files"]


@pytest.mark.slow
def test_rejects_name_file_line_and_reason(tmp_path, log):
    good = (log / "events.jsonl").read_text()
    bad = '{broken\n{"user_id": "u", "document_id": "gone", "timestamp": 1750000000}\n'
    (tmp_path / "log.jsonl").write_text(good + bad)
    made = run(
        tmp_path,
        events={"paths": [str(tmp_path / "log.jsonl")]},
        documents={"paths": [str(log / "documents.jsonl")]},
    )
    assert made.facts["rejects"] == {"not_json": 1, "unknown_document": 1}
    rows = made.read("rejects", ["file", "line", "reason"]).to_pylist()
    assert rows == [
        {"file": str(tmp_path / "log.jsonl"), "line": 901, "reason": "not_json"},
        {"file": str(tmp_path / "log.jsonl"), "line": 902, "reason": "unknown_document"},
    ]


@pytest.mark.slow
def test_too_many_rejects_stop_the_run_and_keep_nothing(tmp_path, log):
    (tmp_path / "log.jsonl").write_text((log / "events.jsonl").read_text() + "{broken\n" * 100)
    with pytest.raises(InputError, match=r"100 of 1,000 events were rejected \(not_json 100\)"):
        run(
            tmp_path,
            events={"paths": [str(tmp_path / "log.jsonl")]},
            documents={"paths": [str(log / "documents.jsonl")]},
        )
    assert not (tmp_path / "pairs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "no events in it"),
        ([("u", "sea.1", 1), ("v", "sea.2", 1)], "gave no pair to train on"),
        ([("u", "sea.1", 1), ("u", "sea.2", 2)], "1 had no eligible negative"),
    ],
)
def test_a_log_that_teaches_nothing_is_refused(tmp_path, log, lines, message):
    rows = [{"user_id": u, "document_id": d, "timestamp": t} for u, d, t in lines]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=message):
        run(
            tmp_path,
            events={"paths": [str(tmp_path / "log.jsonl")]},
            documents={"paths": [str(log / "documents.jsonl")]},
        )


@pytest.mark.slow
def test_documents_are_made_from_highlights_where_no_file_is_given(tmp_path, log):
    lonely = {"user_id": "one", "document_id": "secret", "timestamp": 1750000000, "text": "mine alone"}
    (tmp_path / "log.jsonl").write_text((log / "events.jsonl").read_text() + json.dumps(lonely) + "\n")
    made = run(tmp_path, events={"paths": [str(tmp_path / "log.jsonl")], "text": "text"})
    assert made.rows["documents"] == 40
    assert made.facts["rejects"] == {"too_few_readers": 1}
    texts = dict(zip(*(made.read("documents")[c].to_pylist() for c in ("document_id", "text")), strict=True))
    assert texts["sea.3"] == "a passage of sea number 3"
    assert "mine alone" not in "".join(texts.values())


@pytest.mark.slow
def test_without_events_the_documents_stand_alone(tmp_path, log):
    made = run(tmp_path, documents={"paths": [str(log / "documents.jsonl")]})
    assert made.rows == {"documents": 40}
    assert (made.facts["dev_start"], made.facts["test_start"]) == (None, None)


@pytest.mark.slow
def test_a_missing_column_in_a_log_stops_the_run_with_its_name(tmp_path, log):
    with pytest.raises(InputError, match="no column 'reader'; it has: user_id, document_id"):
        run(
            tmp_path,
            events={"paths": [str(log / "events.jsonl")], "user_id": "reader"},
            documents={"paths": [str(log / "documents.jsonl")]},
        )


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["gz", "zst", "bz2"])
def test_a_compressed_log_is_read_and_one_cut_short_is_refused(tmp_path, log, small, ending):
    codec = {"gz": "gzip", "zst": "zstd", "bz2": "bz2"}[ending]
    path = tmp_path / f"log.jsonl.{ending}"
    with pa.CompressedOutputStream(str(path), codec) as file:
        file.write((log / "events.jsonl").read_bytes())
    given = {
        "events": {"paths": [str(path)], "text": "text"},
        "documents": {"paths": [str(log / "documents.jsonl")]},
    }
    assert run(tmp_path, **given).rows == small.rows
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=rf"log\.jsonl\.{ending}: cannot be read as jsonl: "):
        run(tmp_path, "again", **given)


def test_a_glob_that_matches_nothing_is_named(tmp_path):
    with pytest.raises(InputError, match=r"events\.paths: .*nope.*: no such file"):
        run(tmp_path, events={"paths": [str(tmp_path / "nope*.csv")]}, documents={"paths": ["also-not"]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--runer", "FlinkRunner"),
            "--runer FlinkRunner: neither an option of this command nor one of Beam's",
        ),
        (("--runner", "NoRunner"), "--runner NoRunner: "),
    ],
)
def test_an_option_that_beam_does_not_know_is_refused(tmp_path, log, options, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, options=options, documents={"paths": [str(log / "documents.jsonl")]})
