"""What all importers share: the three tables, whose file is whose, and the command `import`."""

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline import importers
from pipeline.__main__ import main
from pipeline.artifacts import locked
from pipeline.errors import BusyError, ConfigError, InputError
from pipeline.importers import tables
from pipeline.importers.tables import Document, Event, Progress, Reject, Skipped

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
FILES = ("events.parquet", "documents.parquet", "rejects.parquet")


def event(user="ann", document="a", timestamp=NOON, text=None):
    return Event(user, document, timestamp, text)


def write(out, *items, share=0.01, path=Path("log")):
    return tables.write([(path, iter(items))], out, share)


def rows(out, table):
    return pq.read_table(out / f"{table}.parquet").to_pylist()


def titles(out):
    return {row["document_id"]: row["title"] for row in rows(out, "documents")}


def test_every_item_lands_in_its_table(tmp_path):
    counts = write(
        tmp_path,
        Document("a", "Alder", "Alder, a tree", "https://a"), event(text="by the water"), event("bob"),
        Skipped(3, "bookmark"), Progress(10), Reject(4, "bad_timestamp", "yesterday"),
        share=0.5,
    )  # fmt: skip
    assert rows(tmp_path, "events") == [
        {"user_id": "ann", "document_id": "a", "timestamp": NOON, "text": "by the water"},
        {"user_id": "bob", "document_id": "a", "timestamp": NOON, "text": None},
    ]
    assert rows(tmp_path, "documents") == [
        {"document_id": "a", "title": "Alder", "text": "Alder, a tree", "url": "https://a"}
    ]
    assert rows(tmp_path, "rejects") == [
        {"file": "log", "line": 4, "reason": "bad_timestamp", "detail": "yesterday"}
    ]
    assert str(counts) == (
        "2 events of 2 readers, 1 documents, 1 skipped (bookmark 1), 1 rejected (bad_timestamp 1)"
    )


def test_times_become_utc(tmp_path):
    write(tmp_path, event(timestamp=datetime(2026, 11, 21, 21, tzinfo=timezone(timedelta(hours=9)))))
    assert rows(tmp_path, "events")[0]["timestamp"] == NOON


@pytest.mark.parametrize("bad", [event(timestamp=datetime(2026, 1, 1)), event(user=""), event(document="")])
def test_an_event_that_lacks_what_it_needs_is_the_importers_fault(tmp_path, bad):
    with pytest.raises(ValueError, match="needs a user_id, a document_id and a time with a zone"):
        write(tmp_path / "out", bad)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        ("Alder", "Birch", "Alder"),
        ("https://a", "Alder", "Alder"),
        ("", "Alder", "Alder"),
        ("Alder", "https://a", "Alder"),
        ("https://a", "", "https://a"),
    ],
)
def test_the_first_title_that_is_more_than_the_url_is_kept(tmp_path, first, second, kept):
    write(
        tmp_path,
        Document("https://a", first, first, "https://a"),
        Document("https://a", second, second),
        event(document="https://a"),
    )
    assert titles(tmp_path) == {"https://a": kept}


def test_a_document_is_never_without_a_text(tmp_path):
    write(tmp_path, Document("a", " ", "\n", "https://a"), event(document="b"))
    found = [(row["document_id"], row["title"], row["text"]) for row in rows(tmp_path, "documents")]
    assert found == [("a", "https://a", "https://a"), ("b", "b", "b")]


def test_more_rows_than_a_batch_are_all_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BATCH", 2)
    counts = write(tmp_path, *[event(f"reader {i % 3}", f"document {i}") for i in range(5)])
    assert [row["document_id"] for row in rows(tmp_path, "events")] == [f"document {i}" for i in range(5)]
    assert (counts.events, counts.readers, counts.documents) == (5, 3, 5)


def test_half_a_surrogate_pair_does_not_stop_an_import(tmp_path):
    write(tmp_path, event(text="\ud83d!"), event(text="\ud83d\ude00"), event())
    assert [row["text"] for row in rows(tmp_path, "events")] == ["�!", "😀", None]


def test_a_rejects_detail_is_cut(tmp_path):
    write(tmp_path, event(), Reject(1, "long", "x" * 501), share=1)
    assert rows(tmp_path, "rejects")[0]["detail"] == "x" * 500


def test_too_many_rejects_are_refused_with_the_first_by_its_place(tmp_path):
    bad = [Reject(7, "bad_timestamp", "?"), Reject(None, "no_page", "?")]
    with pytest.raises(InputError, match=r"^log:7: bad_timestamp; 2 of 4 records .* more than 49 %"):
        write(tmp_path / "out", event(), Skipped(1, "note"), *bad, share=0.49)
    assert not (tmp_path / "out").exists()
    write(tmp_path / "out", event(), Skipped(1, "note"), *bad, share=0.5)


def test_what_holds_no_event_is_refused_and_says_what_it_holds(tmp_path):
    with pytest.raises(InputError, match=r"log: no event in it: .*2 skipped \(bookmark 2\)"):
        write(tmp_path / "out", Skipped(1, "bookmark"), Skipped(2, "bookmark"))


def test_an_import_that_fails_leaves_what_was_there(tmp_path):
    def broken():
        yield event("bob")
        raise InputError("log: cut off")

    out = tmp_path / "new" / "out"
    write(out, event())
    before = {name: (out / name).read_bytes() for name in FILES}
    with pytest.raises(InputError, match="cut off"):
        tables.write([(Path("log"), broken())], out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_import_that_fails_leaves_no_folder_behind(tmp_path):
    with pytest.raises(InputError):
        write(tmp_path / "new" / "out", Reject(1, "bad", ""))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_import_left_is_cleared_away(tmp_path):
    (tmp_path / ".import.partial").mkdir()
    (tmp_path / ".import.partial" / "events.parquet").write_bytes(b"PAR1 half")
    write(tmp_path, event())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)


def test_two_imports_do_not_write_into_one_folder(tmp_path):
    with locked(tmp_path, ".import.lock"), pytest.raises(BusyError, match="another run"):
        write(tmp_path, event())


def make(folder, *names):
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    return paths


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["ann.csv", "x/bob.csv"], ["ann", "bob"]),
        (["ann/places.sqlite", "bob/places.sqlite"], ["ann/places", "bob/places"]),
        (["ann/places.sqlite", "bob/places.sqlite", "cat.sqlite"], ["ann/places", "bob/places", "cat"]),
        (["ann/x/places.sqlite", "bob/x/places.sqlite"], ["ann/x/places", "bob/x/places"]),
    ],
)
def test_a_reader_is_called_as_the_file_and_files_of_one_name_by_their_folders(tmp_path, names, ids):
    assert importers.user_ids(make(tmp_path, *names)) == ids


def test_files_that_differ_in_their_ending_alone_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"ann\.csv and .*ann\.txt are both of reader ann; rename one"):
        importers.user_ids(make(tmp_path, "ann.csv", "ann.txt"))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("Berlin", "Europe/Berlin"), ("Europe/Berlni", "Europe/Berlin"), ("new york", "America/New_York"),
        ("../etc/passwd", "IANA"), ("Mars/Olympus", "Asia/Seoul"), ("Europe", "IANA"),
        ("", "IANA"),
    ],
)  # fmt: skip
def test_a_zone_that_does_not_exist_is_one_line_with_the_likeliest(name, advice):
    with pytest.raises(InputError, match=rf"--timezone {name}: no such time zone; .*{advice}") as caught:
        importers.zone_of(name)
    assert "\n" not in str(caught.value)


def test_a_zone_is_found_by_its_iana_name():
    assert datetime(2026, 7, 1, tzinfo=importers.zone_of("Europe/Berlin")).utcoffset() == timedelta(hours=2)


LOG = '192.0.2.1 - - [21/Nov/2026:12:00:00 +0000] "GET /birds HTTP/1.1" 200 5\n'


def test_the_command_writes_the_tables_and_one_closing_line(tmp_path, capsys):
    log, out = tmp_path / "access.log", tmp_path / "out"
    log.write_text(LOG + LOG.replace("GET", "POST") + LOG.replace("birds", "bees"))
    assert main(["import", "serverlog", str(log), "--out", str(out)]) == 0
    assert capsys.readouterr().out == (
        f"import: 2 events of 1 readers, 2 documents, 1 skipped (not_get 1), 0 rejected: {out}\n"
    )
    assert titles(out) == {"/bees": "/bees", "/birds": "/birds"}


def test_what_the_command_writes_is_ready_for_the_pairs_stage(tmp_path):
    from pipeline import documents as documents_
    from pipeline import events as events_

    (tmp_path / "log").write_text(LOG)
    assert main(["import", "serverlog", str(tmp_path / "log"), "--out", str(tmp_path)]) == 0
    columns = events_.Columns("user_id", "document_id", "timestamp", "text")
    with (tmp_path / "events.parquet").open("rb") as file:
        ((events, rejects),) = events_.read(file, "events", "parquet", columns)
    assert events.select("user_id", "document_id", "timestamp").rows() == [("192.0.2.1", "/birds", NOON)]
    assert rejects.is_empty()
    with (tmp_path / "documents.parquet").open("rb") as file:
        found = documents_.read(
            file, "", "parquet", document_id="document_id", text=["text"], separator="", title="title"
        )
    assert found.select("document_id", "text", "title").rows() == [("/birds", "birds", "/birds")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serverlog", "missing.log"], "missing.log: is not there; give the files to import"),
        (["serverlog", "."], ".: is a folder; give the files to import"),
        (["serverlog", "log", "./log"], "log and log are one file: give it once"),
        (["serverlog", "log", "--user", "ann"], "--user ann: serverlog names its readers itself"),
        (["firefox", "log", "--user", " "], "--user is empty"),
        (["firefox", "log", "--max_rejected_share", "1.5"], "--max_rejected_share is 1.5; wanted a share"),
        (["firefox", "log", "--timezone", "Berlin"], "--timezone Berlin: no such time zone"),
        (["wikispeedia", "log", "log"], "wikispeedia takes one folder, not 2"),
        (["firefox", "log", "--timezome", "UTC"], "--timezome UTC: not an option of `import`"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("log").write_text(LOG)
    assert main(["import", *arguments, "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1
    assert not Path("out").exists()


def test_a_share_of_rejects_can_be_allowed(tmp_path):
    (tmp_path / "log").write_text(LOG + "garbage\n")
    arguments = ["import", "serverlog", str(tmp_path / "log"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert main([*arguments, "--max_rejected_share", "0.5"]) == 0
    (reject,) = rows(tmp_path / "out", "rejects")
    assert (reject["line"], reject["reason"], reject["detail"]) == (2, "not_common_or_combined", "garbage")


def test_the_command_takes_one_folder_of_wikispeedia(tmp_path, capsys):
    for name, text in {
        "articles": "Asia\n", "categories": "", "paths_finished": "ann\t1000\t90\tAsia;Moon\tNULL\n"
    }.items():  # fmt: skip
        (tmp_path / f"{name}.tsv").write_text(text)
    assert main(["import", "wikispeedia", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == (
        f"import: 2 clicks of 1 readers in 1 games, 2 articles, 0 lines rejected: {tmp_path / 'out'}\n"
    )


@pytest.mark.parametrize("kind", importers.READERS)
def test_every_kind_has_its_module_and_says_a_foreign_file_is_none_of_its(tmp_path, kind):
    (tmp_path / "foreign").write_bytes(b"\x00\x01\x02 nothing that anyone exports\n")
    with pytest.raises(InputError, match="foreign"):
        importers.run(kind, [tmp_path / "foreign"], tmp_path / "out")


def test_the_help_names_every_kind():
    assert all(f"\n  {kind} " in importers.HELP for kind in importers.KINDS)


def test_a_setting_that_makes_no_sense_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError):
        importers.run("serverlog", [tmp_path], tmp_path, user_id="ann")
