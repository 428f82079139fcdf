"""What was read in one session: counted by hand, bounded, and part of a version that servers verify."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import publish, related
from pipeline.artifacts import Embeddings, Index, Model, Pairs, Report, sha256, writing
from pipeline.config import PublishConfig
from pipeline.errors import ArtifactError
from serving.handles import LoadError
from serving.verification import verify_manifest
from tests.test_publish import CONFIG, figures

TWO = {"min_readers": 1, "per_document": 20}


def make_pairs(path: Path, *parts: list[tuple[str, list[str]]]) -> Pairs:
    """Sessions as (user_id, document_ids), a table for each part."""
    with writing(Pairs, path, config={}, inputs=[]) as draft:
        for number, part in enumerate(parts):
            columns = {
                "session_id": [f"{number}-{place}" for place in range(len(part))],
                "user_id": [user for user, _ in part],
                "document_ids": pa.array([ids for _, ids in part], pa.list_(pa.string())),
            }
            pq.write_table(pa.table(columns), draft.folder / f"sessions-{number:05d}.parquet")
    return Pairs.open(path)


def found(
    tmp_path: Path, *parts: list[tuple[str, list[str]]], ids: str = "abcde", **bounds: int
) -> list[tuple[str, str, int, int]]:
    pairs = make_pairs(tmp_path / "pairs", *parts)
    related.write(pairs, pa.chunked_array([list(ids)]), tmp_path / "related.parquet", **(TWO | bounds))
    return [tuple(row.values()) for row in pq.read_table(tmp_path / "related.parquet").to_pylist()]


# --- Counting --------------------------------------------------------------------------------------------


def test_readers_are_counted_once_and_sessions_each_in_both_directions(tmp_path):
    sessions = [("one", ["a", "b"]), ("one", ["b", "a"]), ("two", ["a", "b", "c"])]
    assert found(tmp_path, sessions) == [
        ("a", "b", 2, 3),
        ("a", "c", 1, 1),
        ("b", "a", 2, 3),
        ("b", "c", 1, 1),
        ("c", "a", 1, 1),
        ("c", "b", 1, 1),
    ]


def test_a_reader_whose_sessions_lie_in_two_parts_is_one_reader(tmp_path):
    parts = [("one", ["a", "b"])], [("one", ["a", "b"]), ("two", ["b", "a"])]
    assert found(tmp_path, *parts)[0] == ("a", "b", 2, 3)


def test_a_document_read_twice_in_a_session_counts_once_and_never_with_itself(tmp_path):
    assert found(tmp_path, [("one", ["a", "b", "a", "a"])]) == [("a", "b", 1, 1), ("b", "a", 1, 1)]


def test_pairs_of_fewer_readers_are_left_out_however_often_they_read_them(tmp_path):
    often = [("one", ["a", "b"])] * 9 + [("two", ["a", "b"])]
    enough = [(user, ["c", "d"]) for user in ("one", "two", "three")]
    assert found(tmp_path, often + enough, min_readers=3) == [("c", "d", 3, 3), ("d", "c", 3, 3)]


def test_the_best_come_first_by_readers_then_sessions_then_id_and_the_others_go(tmp_path):
    sessions = [
        *[("one", ["a", "e"])] * 2,  # one reader, two sessions
        ("one", ["a", "d"]),
        ("two", ["a", "d"]),  # two readers
        ("one", ["a", "c"]),
        ("one", ["a", "b"]),  # as c: by id
    ]
    best = [row[1] for row in found(tmp_path, sessions) if row[0] == "a"]
    assert best == ["d", "e", "b", "c"]
    assert [row[1] for row in found(tmp_path, sessions, per_document=2) if row[0] == "a"] == ["d", "e"]


def test_documents_that_the_index_does_not_have_are_nobodys_relation(tmp_path):
    assert found(tmp_path, [("one", ["a", "gone", "b"]), ("one", ["a", "gone"])], ids="ab") == [
        ("a", "b", 1, 1),
        ("b", "a", 1, 1),
    ]


def test_a_document_of_several_passages_is_one_document(tmp_path):
    assert found(tmp_path, [("one", ["a", "b"])], ids="aaabb") == [("a", "b", 1, 1), ("b", "a", 1, 1)]


def test_of_a_longer_session_neighbours_count_and_a_session_of_64_counts_whole(tmp_path):
    ids = [f"d{n:03d}" for n in range(70)]
    reads = related.read(make_pairs(tmp_path / "pairs", [("one", ids)]), pl.DataFrame({"document_id": ids}))
    document, other, _ = related.pairs_of(reads, 0, 70)
    # the first meets the 63 behind it; those in the middle all within 63 places on both sides
    assert sorted(other[document == 0].tolist()) == list(range(1, 64))
    assert sorted(other[document == 35].tolist()) == [n for n in range(70) if n != 35]
    # 70 * 69 ordered pairs, less those 64 to 69 places apart: 6 + 5 + 4 + 3 + 2 + 1 in each direction
    assert len(document) == 70 * 69 - 2 * 21
    whole = related.read(
        make_pairs(tmp_path / "whole", [("one", ids[:64])]), pl.DataFrame({"document_id": ids})
    )
    assert len(related.pairs_of(whole, 0, 70)[0]) == 64 * 63


def test_random_sessions_give_the_counts_of_a_plain_loop_in_one_range_or_many(tmp_path, monkeypatch):
    rng = np.random.default_rng(7)
    ids = [f"d{n}" for n in range(30)]
    sessions = [
        (f"u{rng.integers(20)}", [ids[n] for n in rng.integers(30, size=rng.integers(1, 9))])
        for _ in range(200)
    ]
    readers: dict[tuple[str, str], list[str]] = {}
    for user, read in sessions:
        for a in set(read):
            for b in set(read) - {a}:
                readers.setdefault((a, b), []).append(user)
    expected = {pair: (len(set(users)), len(users)) for pair, users in readers.items() if len(set(users)) > 1}
    bounds = {"min_readers": 2, "per_document": 99}
    whole = found(tmp_path / "whole", sessions[:120], sessions[120:], ids=ids, **bounds)
    assert {row[:2]: row[2:] for row in whole} == expected
    assert [row[0] for row in whole] == sorted(row[0] for row in whole)
    monkeypatch.setattr(related, "PAIRS_AT_ONCE", 200)
    assert found(tmp_path / "ranges", sessions, ids=ids, **bounds) == whole


def test_ranges_cover_every_document_once_and_hold_what_fits(monkeypatch):
    monkeypatch.setattr(related, "PAIRS_AT_ONCE", 4)
    # two sessions, [0, 1, 2] and [0, 3]: documents 0 to 3 have 3, 2, 2 and 1 ordered pairs, 4 and 5 none
    session = np.array([0, 0, 0, 1, 1])
    reads = related.Reads.of(np.array([0, 1, 2, 0, 3], np.int32), np.zeros(5, np.uint64), session)
    assert list(related.ranges(reads, 6)) == [(0, 1), (1, 3), (3, 6)]


def test_no_sessions_give_an_empty_table_of_the_same_columns(tmp_path):
    assert found(tmp_path) == []
    assert found(tmp_path, [("one", ["a"])]) == []
    assert pq.read_schema(tmp_path / "related.parquet").equals(related.SCHEMA)


def test_the_file_has_the_same_bytes_whatever_the_order_of_the_sessions(tmp_path):
    sessions = [(f"u{n % 5}", [f"d{n % 7}", f"d{(n * 3) % 11}", f"d{n % 4}"]) for n in range(60)]
    ids = [f"d{n}" for n in range(11)]
    found(tmp_path / "one", sessions, ids=ids)
    found(tmp_path / "two", sessions[::-1][:20], sessions[::-1][20:], ids=ids[::-1])
    assert sha256(tmp_path / "one" / "related.parquet") == sha256(tmp_path / "two" / "related.parquet")


def test_one_documents_rows_are_found_by_the_statistics_of_the_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(related, "ROW_GROUP", 6)
    found(tmp_path, [("one", ["a", "b", "c", "d"])])  # twelve rows, three of each
    file = pq.ParquetFile(tmp_path / "related.parquet").metadata
    ends = [
        (file.row_group(n).column(0).statistics.min, file.row_group(n).column(0).statistics.max)
        for n in range(2)
    ]
    assert ends == [("a", "b"), ("c", "d")]
    assert file.row_group(0).sorting_columns[0].column_index == 0


# --- In a version ------------------------------------------------------------------------------------------

ROWS = np.eye(3, 2, dtype=np.float32)


def made(work: Path, users: int = 3) -> tuple[Model, Index, Report, publish.Beside]:
    """What a publication reads: three documents of two numbers, a and b read by so many users."""
    pairs = make_pairs(work / "pairs", [(f"u{n}", ["a", "b"]) for n in range(users)])
    facts = {"base_model": "tiny", "trained": True, "dim": 2, "prompts": {"query": "", "document": ""}}
    with writing(Model, work / "model", config={}, inputs=[]) as draft:
        (draft.folder / "model.safetensors").write_text("w")
        draft.facts |= facts
    model = Model.open(work / "model")
    documents = pa.table({"document_id": ["a", "b", "c"]})
    with writing(Embeddings, work / "embeddings", config={}, inputs=[model, pairs]) as draft:
        np.save(draft.folder / "embeddings.npy", ROWS)
    embeddings = Embeddings.open(work / "embeddings")
    config = {"k": 10, "target_recall": 0.95, "target_latency_ms": None, "memory_mib": None}
    with writing(Index, work / "index", config=config, inputs=[embeddings]) as draft:
        (draft.folder / "saved_model.pb").write_text("graph")
        (draft.folder / "assets.extra").mkdir(exist_ok=True)
        pq.write_table(documents, draft.folder / "assets.extra" / "documents.parquet")
        draft.facts |= {"dim": 2, "layer": "tuned", "settings": {"k": 10}}
    index = Index.open(work / "index")
    with writing(Report, work / "report", config={}, inputs=[pairs, model, embeddings, index]) as draft:
        (draft.folder / "report.json").write_text(json.dumps(figures()))
    return model, index, Report.open(work / "report"), publish.Beside(embeddings, pairs)


def published(work: Path, config: PublishConfig = CONFIG, users: int = 3) -> Path:
    model, index, report, beside = made(work, users)
    return publish.run(config, model, index, report, work, beside)


def test_a_version_holds_its_rows_and_what_was_read_together(tmp_path):
    extra = published(tmp_path) / "assets.extra"
    rows = np.load(extra / "rows.npy", mmap_mode="r")
    assert (rows.dtype, rows.tolist()) == (np.float32, ROWS.tolist())
    assert pq.read_table(extra / "related.parquet").to_pylist() == [
        {"document_id": one, "related_document_id": other, "n_readers": 3, "n_sessions": 3}
        for one, other in ("ab", "ba")
    ]
    manifest = json.loads((extra / "manifest.json").read_text())
    assert manifest["related"] == {"rows": 2, "documents": 2, "min_readers": 3, "per_document": 20}
    for name in ("rows.npy", "related.parquet"):
        assert manifest["files"][f"assets.extra/{name}"] == sha256(extra / name)


def test_two_readers_are_too_few_for_a_version(tmp_path):
    assert len(pq.read_table(published(tmp_path, users=2) / "assets.extra" / "related.parquet")) == 0


@pytest.mark.parametrize(("rows_below", "has_rows"), [(0, False), (2, False), (3, True)])
def test_settings_say_how_many_rows_readers_and_relations_a_version_gets(tmp_path, rows_below, has_rows):
    settings = {"rows_below": rows_below, "min_related_readers": 1, "related_per_document": 5}
    config = PublishConfig(keep_versions=2, **settings)
    extra = published(tmp_path, config, users=1) / "assets.extra"
    assert (extra / "rows.npy").exists() == has_rows  # three rows
    assert len(pq.read_table(extra / "related.parquet")) == 2
    manifest = json.loads((extra / "manifest.json").read_text())
    assert manifest["related"] == {"rows": 2, "documents": 2, "min_readers": 1, "per_document": 5}


@pytest.mark.parametrize("name", ["rows.npy", "related.parquet"])
def test_a_server_loads_such_a_version_and_refuses_it_when_they_were_changed(tmp_path, name):
    version = published(tmp_path)
    verify_manifest(version)
    with (version / "assets.extra" / name).open("ab") as file:
        file.write(b"more")
    with pytest.raises(LoadError, match=f"{name} has sha256"):
        verify_manifest(version)


def test_more_sessions_are_a_new_version_and_the_same_ones_are_not(tmp_path):
    first = published(tmp_path)
    assert published(tmp_path) == first
    assert published(tmp_path, users=4) != first


def test_sessions_that_the_report_did_not_see_are_refused(tmp_path):
    model, index, report, beside = made(tmp_path)
    other = make_pairs(tmp_path / "other", [("u", ["a", "b"])])
    with pytest.raises(ArtifactError, match="other: run stage evaluate again"):
        publish.run(CONFIG, model, index, report, tmp_path, publish.Beside(beside.embeddings, other))
