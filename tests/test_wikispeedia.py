"""Wikispeedia's files as SNAP publishes them: hand-made ones, and the real ones where they are at hand."""

import csv
import gzip
import os
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.importers import wikispeedia

ROOT = Path(__file__).parents[1]
ARTICLES = "# FORMAT:   article\n\n%C3%89ire\nAsia\nMoon\nNever_read\n"
CATEGORIES = (
    "# FORMAT:   article   category\n\n"
    "%C3%89ire\tsubject.Countries\n"
    "%C3%89ire\tsubject.Geography.European_Geography.European_Countries\n"
    "Moon\tsubject.Science\n"
)
FINISHED = (
    "# FORMAT:   hashedIpAddress   timestamp   durationInSec   path   rating\n\n"
    "ann\t1000\t90\tAsia;Moon;%C3%89ire\tNULL\n"
)
UNFINISHED = (
    "# FORMAT:   hashedIpAddress   timestamp   durationInSec   path   target   type\n\n"
    "bob\t2000\t1800\tMoon\tAsia\ttimeout\n"
)


def publish(folder, **files):
    """Write the published files into `folder`; keywords replace one (None: it is missing)."""
    texts = {
        "articles": ARTICLES, "categories": CATEGORIES,
        "paths_finished": FINISHED, "paths_unfinished": UNFINISHED,
    }  # fmt: skip
    for name, text in (texts | files).items():
        if text is not None:
            (folder / f"{name}.tsv").write_text(text, encoding="utf-8")
    return folder


def rows(folder, table):
    return pq.read_table(folder / f"{table}.parquet").to_pylist()


def events(folder):
    return [(r["user_id"], int(r["timestamp"].timestamp()), r["document_id"]) for r in rows(folder, "events")]


def test_a_game_is_spread_evenly_from_its_start(tmp_path):
    wikispeedia.read(publish(tmp_path), tmp_path / "out")
    # ann's game of 90 s ended at 1000; bob's of 1800 s at 2000
    assert events(tmp_path / "out") == [
        ("ann", 910, "Asia"),
        ("ann", 940, "Moon"),
        ("ann", 970, "%C3%89ire"),
        ("bob", 200, "Moon"),
    ]


def test_times_are_in_utc(tmp_path):
    wikispeedia.read(publish(tmp_path), tmp_path / "out")
    assert rows(tmp_path / "out", "events")[0]["timestamp"] == datetime(1970, 1, 1, 0, 15, 10, tzinfo=UTC)


def test_parts_of_a_second_are_rounded_down():
    assert wikispeedia.spread(end=110, duration=10, n_clicks=3) == [100, 103, 106]


@pytest.mark.parametrize(
    ("steps", "articles"),
    [
        ("A;B;<;C", "ABAC"),
        ("A;B;C;<;<;D", "ABCBAD"),  # two back clicks go back by two
        ("A;B;<;C;<;D", "ABACAD"),  # the article left by a back click is no longer on the trail
    ],
)
def test_a_back_click_visits_the_article_gone_back_to(steps, articles):
    assert wikispeedia.visited(steps) == list(articles)


def test_titles_and_categories_are_made_readable(tmp_path):
    wikispeedia.read(publish(tmp_path), tmp_path / "out")
    documents = {r["document_id"]: (r["title"], r["categories"]) for r in rows(tmp_path / "out", "documents")}
    assert documents["%C3%89ire"] == (
        "Éire",
        "Countries; Geography > European Geography > European Countries",
    )
    assert documents["Asia"] == ("Asia", "")


def test_an_article_that_nobody_read_is_a_document_too(tmp_path):
    counts = wikispeedia.read(publish(tmp_path), tmp_path / "out")
    assert "Never_read" in {r["document_id"] for r in rows(tmp_path / "out", "documents")}
    assert (counts["documents"], counts["articles_read"]) == (4, 3)


def test_an_article_that_was_read_but_is_not_listed_is_a_document_too(tmp_path):
    wikispeedia.read(publish(tmp_path, articles="Asia\n"), tmp_path / "out")
    assert "Moon" in {r["document_id"] for r in rows(tmp_path / "out", "documents")}


@pytest.mark.parametrize(("missing", "readers"), [("paths_finished", {"bob"}), ("paths_unfinished", {"ann"})])
def test_either_paths_file_may_be_missing(tmp_path, missing, readers):
    wikispeedia.read(publish(tmp_path, **{missing: None}), tmp_path / "out")
    assert {user for user, _, _ in events(tmp_path / "out")} == readers


def test_compressed_files_give_the_same(tmp_path):
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    for folder in (plain, packed):
        folder.mkdir()
        publish(folder)
    for file in list(packed.iterdir()):
        Path(f"{file}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    wikispeedia.read(plain, plain / "out")
    wikispeedia.read(packed, packed / "out")
    assert events(packed / "out") == events(plain / "out")
    assert rows(packed / "out", "documents") == rows(plain / "out", "documents")


def test_without_any_paths_file_the_folder_is_refused(tmp_path):
    publish(tmp_path, paths_finished=None, paths_unfinished=None)
    with pytest.raises(InputError, match=r"neither paths_finished\.tsv nor paths_unfinished\.tsv"):
        wikispeedia.read(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("name", ["articles", "categories"])
def test_a_missing_list_is_named(tmp_path, name):
    publish(tmp_path, **{name: None})
    with pytest.raises(InputError, match=rf"has no {name}\.tsv"):
        wikispeedia.read(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("ann\t1000\t90\tAsia", "not_5_fields"),
        ("\t1000\t90\tAsia\tNULL", "empty_field"),
        ("ann\tnoon\t90\tAsia\tNULL", "bad_game"),
        ("ann\t10\t90\tAsia\tNULL", "bad_game"),  # it would have begun before 1970
        ("ann\t1000\t90\t<;Asia\tNULL", "bad_game"),
        ("ann\t1000\t90\tAsia;;Moon\tNULL", "bad_game"),
    ],
)
def test_a_bad_line_is_kept_by_file_line_and_reason(tmp_path, line, reason):
    publish(tmp_path, paths_finished=FINISHED + line + "\n")
    counts = wikispeedia.read(tmp_path, tmp_path / "out", max_rejected_share=0.5)
    (reject,) = rows(tmp_path / "out", "rejects")
    assert reject["file"].endswith("paths_finished.tsv")
    assert (reject["line"], reject["reason"]) == (4, reason)  # after a comment, a blank line and a game
    assert line in reject["detail"]
    assert (counts["rejects"], counts["events"]) == (1, 4)


def test_too_many_bad_lines_are_refused_with_the_first(tmp_path):
    publish(tmp_path, paths_finished="ann,1000,90,Asia,NULL\n")
    with pytest.raises(InputError, match=r"paths_finished\.tsv:1: not_5_fields; 1 of 9 lines"):
        wikispeedia.read(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cut_off_download_is_refused_and_leaves_what_was_there(tmp_path):
    wikispeedia.read(publish(tmp_path), tmp_path / "out")
    before = events(tmp_path / "out")
    (tmp_path / "categories.tsv").unlink()
    (tmp_path / "categories.tsv.gz").write_bytes(gzip.compress(CATEGORIES.encode())[:-12])
    with pytest.raises(InputError, match=r"categories\.tsv\.gz: cannot be decompressed"):
        wikispeedia.read(tmp_path, tmp_path / "out")
    assert events(tmp_path / "out") == before


@pytest.fixture(scope="module")
def published():
    """The folder with the real files."""
    given = os.environ.get("WIKISPEEDIA")
    folders = [Path(given)] if given else [ROOT / "data/wikispeedia", ROOT / "../shared/data/wikispeedia"]
    for folder in folders:
        if any(folder.glob("paths_unfinished.tsv*")):
            return folder
    pytest.skip("no Wikispeedia files: put SNAP's into data/wikispeedia, or set WIKISPEEDIA to their folder")


def prepared(folder, name):
    if not (folder / name).exists():
        pytest.skip(f"no {name} beside the published files to compare with")
    with gzip.open(folder / name, "rt", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def imported(published, tmp_path_factory):
    """The unfinished games alone: those that the prepared files were made from."""
    folder = tmp_path_factory.mktemp("wikispeedia")
    for name in ("articles.tsv", "categories.tsv", "paths_unfinished.tsv"):
        found = next(published.glob(f"{name}*"))
        (folder / found.name).symlink_to(found.resolve())
    return wikispeedia.read(folder, folder / "out"), folder / "out"


def test_the_real_files_have_the_known_counts(imported):
    counts, _ = imported
    assert counts == {
        "events": 129_295, "readers": 11_485, "games": 24_875,
        "articles_read": 4_061, "documents": 4_604, "rejects": 0,
    }  # fmt: skip


def test_the_real_clicks_are_those_of_the_prepared_file(published, imported):
    # That file spreads the clicks also over the idle half hour of a timeout, so the times are others.
    wanted = prepared(published, "events.csv.gz")
    assert Counter((user, document) for user, _, document in events(imported[1])) == Counter(
        (row["user_id"], row["document_id"]) for row in wanted
    )


def test_the_real_titles_and_categories_are_those_of_the_prepared_file(published, imported):
    wanted = prepared(published, "documents.csv.gz")
    documents = {r["document_id"]: r for r in rows(imported[1], "documents")}
    assert [documents[row["document_id"]] for row in wanted] == wanted
    assert len(wanted) == imported[0]["articles_read"]


@pytest.mark.parametrize(
    ("end", "duration", "type_of_end", "expected"),
    [
        (10_000, 1_830, "timeout", (8_200, 30)),  # thirty seconds of play, then nobody clicked
        (10_000, 1_800, "timeout", (8_200, 0)),
        (10_000, 1_700, "timeout", (10_000, 1_700)),  # too short to hold the half hour
        (10_000, 1_830, "restart", (10_000, 1_830)),
    ],
)
def test_the_idle_half_hour_that_ended_a_game_is_no_play(end, duration, type_of_end, expected):
    assert wikispeedia.played(end, duration, type_of_end) == expected
