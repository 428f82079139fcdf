"""Stage `pairs`: the real Beam job on small logs, and the drawing of negatives by itself."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import config, pairing, pairs, storage
from pipeline.artifacts import Embeddings, Pairs, writing
from pipeline.errors import ConfigError, InputError
from pipeline.hashing import stable_hash
from pipeline.sessions import Sessions, as_dictionary


def sessions_of(*rows: tuple[str, list[int]], hours: list[int] | None = None) -> Sessions:
    """(user_id, documents) of each session, an hour after the one before."""
    hours = hours or list(range(len(rows)))
    start = np.array(hours) * 3_600_000_000
    users = pl.DataFrame({"user_id": [user for user, _ in rows]})
    return Sessions(
        session=np.arange(len(rows), dtype=np.uint64),
        user=users.select(stable_hash("user_id")).to_series().to_numpy(),
        user_id=users["user_id"].to_arrow(),
        start=start,
        end=start,
        offsets=np.cumsum([0] + [len(documents) for _, documents in rows]).astype(np.int32),
        documents=np.array([d for _, documents in rows for d in documents], np.int32),
    )


def asked(sessions: Sessions) -> list[tuple[int, int, int]]:
    session, found = pairing.ask(sessions, np.arange(100, dtype=np.uint64), seed=7)
    return list(zip(session.tolist(), found.anchor.tolist(), found.positive.tolist(), strict=True))


def run(tmp_path: Path, name: str = "pairs", options: tuple[str, ...] = (), **sections: dict) -> Pairs:
    given = config.from_dict(sections)
    return pairs.run(given.pairs, given.events, given.documents, tmp_path / name, options)


# --- Plain functions ------------------------------------------------------------------------------------


def test_neighbours_are_pairs_in_reading_order():
    assert asked(sessions_of(("u", [1, 2, 3]))) == [(0, 1, 2), (0, 2, 3)]


def test_a_document_with_itself_is_no_pair_and_a_pair_counts_once_a_session():
    assert asked(sessions_of(("u", [1, 1, 2, 1, 2]), ("u", [1, 2]))) == [(0, 1, 2), (0, 2, 1), (1, 1, 2)]


def test_a_session_of_one_document_gives_no_pair():
    sessions = sessions_of(("u", [1]), ("u", [1, 1]), ("u", [1, 2, 1]))
    assert asked(sessions) == [(2, 1, 2), (2, 2, 1)]
    assert pairing.giving_pairs(sessions).tolist() == [2]


def held_out(tmp_path: Path, sessions: Sessions, share: float) -> tuple[int | None, int | None]:
    storage.write_arrow(sessions.to_arrow(), str(tmp_path / "00000-sessions.arrow"))
    return pairs.held_out_spans([str(tmp_path / "00000-sessions.arrow")], share)


def test_spans_are_cut_by_time_and_by_sessions_that_give_pairs(tmp_path):
    sessions = sessions_of(*(("u", [1, 2] if n % 2 else [1]) for n in range(40)))
    # 20 sessions with pairs, at the odd hours: the last two are test, the two before them dev
    assert held_out(tmp_path, sessions, 0.1) == (33 * 3_600_000_000, 37 * 3_600_000_000)


def test_too_few_sessions_leave_nothing_held_out(tmp_path):
    assert held_out(tmp_path, sessions_of(("u", [1, 2])), 0.1) == (None, None)


def test_a_text_that_stands_often_is_stored_once_and_read_back_as_text(tmp_path):
    path = str(tmp_path / "texts.parquet")
    texts = pa.array(["one", "two", "never"])
    storage.write_dictionaries(pa.table({"text": as_dictionary(np.array([1, 0, 1]), texts)}), path)
    assert pq.read_table(path).to_pydict() == {"text": ["two", "one", "two"]}
    assert pq.read_schema(path).field("text").type == pa.string()


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
    assert small.read("pairs").column_names == pairing.PAIR_COLUMNS
    assert small.read("documents").column_names == ["document_id", "text", "title", "pages"]


@pytest.mark.slow
def test_excluded_documents_are_in_nothing_and_their_events_are_no_fault_of_the_log(tmp_path, log, capsys):
    (tmp_path / "ids.txt").write_text("sea.1\nnobody\n")
    rules = {
        "document_ids": ["sea.0"],
        "document_ids_from": [str(tmp_path / "ids.txt")],
        "columns": {"pages": {"above": 8}},
    }
    made = run(
        tmp_path,
        events={"paths": [str(log / "events.jsonl")]},
        documents={"paths": [str(log / "documents.jsonl")], "exclude": rules},
    )
    # of 40 documents two by id, and the tenth of each of four topics
    assert made.rows["documents"] == 34
    assert made.facts["excluded"] == {"columns.pages": 4, "document_ids": 2}
    out = {"sea.0", "sea.1", *(f"{topic}.9" for topic in ("sea", "bread", "stars", "music"))}
    events = [json.loads(line) for line in (log / "events.jsonl").read_text().splitlines()]
    n_out = sum(event["document_id"] in out for event in events)
    assert made.facts["rejects"] == {"excluded_document": n_out}  # far more than one in a hundred
    assert made.facts["events"]["in_sessions"] == 900 - n_out
    assert not out & set(made.read("documents")["document_id"].to_pylist())
    for span in ("pairs", "dev", "test"):
        for name in ("anchor_id", "positive_id", "negative_id"):
            assert not out & set(made.read(span)[name].to_pylist())
    said = capsys.readouterr().err
    assert "pairs: 6 of 40 documents excluded: columns.pages 4, document_ids 2" in said
    assert "pairs: 1 excluded ids are of no document, such as 'nobody'" in said


def test_queries_that_led_to_excluded_documents_are_no_fault_of_theirs(tmp_path):
    (tmp_path / "d.csv").write_text("document_id,text\na,red fox\nb,blue hen\nc,old owl\n")
    (tmp_path / "q.csv").write_text("query,document_id\nfox,a\nhen,b\nbird,c\n")
    given = config.from_dict(
        {
            "documents": {"paths": [str(tmp_path / "d.csv")], "exclude": {"document_ids": ["c"]}},
            "queries": {"paths": [str(tmp_path / "q.csv")]},
            "pairs": {"holdout_share": 0},
        }
    )
    made = pairs.run(given.pairs, given.events, given.documents, tmp_path / "pairs", queries=given.queries)
    assert made.facts["rejects"] == {"excluded_document": 1}  # a third of them, where one in a hundred may be
    assert made.facts["queries"]["pairs"] == 2


def test_where_ids_to_exclude_lie_decides_nothing_and_what_they_are_does(tmp_path):
    def given(name: str, ids: str) -> tuple[dict, list[str]]:
        (tmp_path / name).write_text(ids)
        exclude = {"document_ids_from": [str(tmp_path / name)]}
        (tmp_path / "d.csv").write_text("document_id,text\na,x\n")
        sections = config.from_dict({"documents": {"paths": [str(tmp_path / "d.csv")], "exclude": exclude}})
        three = sections.pairs, sections.events, sections.documents
        return pairs.settings_of(*three), [file["digest"] for file in pairs.inputs_of(*three)]

    assert given("one.txt", "a") == given("two.txt", "a")
    assert given("one.txt", "a")[1] != given("two.txt", "b")[1]


@pytest.mark.slow
def test_a_pairs_texts_are_its_documents_also_where_two_documents_have_one_text(tmp_path, log, small):
    lines = [json.loads(line) for line in (log / "documents.jsonl").read_text().splitlines()]
    lines[7]["text"] = lines[3]["text"]
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, lines)))
    twins = run(
        tmp_path,
        events={"paths": [str(log / "events.jsonl")]},
        documents={"paths": [str(tmp_path / "documents.jsonl")]},
    )
    for made in (small, twins):
        text = dict(
            zip(*(made.read("documents")[c].to_pylist() for c in ("document_id", "text")), strict=True)
        )
        for row in made.read("pairs").to_pylist():
            for name in ("anchor", "positive", "negative"):
                assert row[name] == text[row[f"{name}_id"]]


@pytest.mark.slow
def test_held_out_sessions_are_later_than_those_trained_on(small):
    sessions = small.read("sessions", ["session_id", "start"]).to_pylist()
    start = {row["session_id"]: row["start"] for row in sessions}
    latest = {
        span: max(start[s] for s in small.read(span)["session_id"].to_pylist()) for span in pairing.SPANS
    }
    earliest = {
        span: min(start[s] for s in small.read(span)["session_id"].to_pylist()) for span in pairing.SPANS
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
def test_a_crawler_is_set_aside_with_its_count_and_stops_nothing(tmp_path, log):
    crawler = [
        {"user_id": "crawler", "document_id": f"sea.{n % 10}", "timestamp": 1_750_000_000 + n}
        for n in range(40)
    ]
    lines = [json.dumps(row) for row in crawler] + (log / "events.jsonl").read_text().splitlines()
    for part in range(3):  # thirteen or fourteen of its events a file: too many only with all of them
        (tmp_path / f"log{part}.jsonl").write_text("\n".join(lines[part::3]))
    made = run(
        tmp_path,
        events={"paths": [str(tmp_path / "log*.jsonl")]},
        documents={"paths": [str(log / "documents.jsonl")]},
        pairs={"max_events_per_user": 30},
    )
    assert made.facts["events"] == {"read": 940, "in_sessions": 900, "duplicates": 0, "rejected": 40}
    assert made.facts["rejects"] == {"too_many_events": 40}
    (row,) = made.read("rejects").to_pylist()
    assert (row["file"], row["line"], row["reason"]) == (None, None, "too_many_events")
    assert json.loads(row["detail"]) == {"user_id": "crawler", "events": "40", "most_in_a_day": "40"}


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
        ([("u", f"sea.{n}", n) for n in range(40)], "39 had no eligible negative"),
    ],
)
def test_a_log_that_teaches_nothing_is_refused(tmp_path, log, lines, message):
    rows = [{"user_id": u, "document_id": d, "timestamp": t} for u, d, t in lines]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = [{"document_id": f"sea.{n}", "text": f"text {n}"} for n in range(40)]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    with pytest.raises(InputError, match=message):
        run(
            tmp_path,
            events={"paths": [str(tmp_path / "log.jsonl")]},
            documents={"paths": [str(tmp_path / "documents.jsonl")]},
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


@pytest.mark.slow
def test_folders_and_files_may_have_brackets_in_their_names(tmp_path, log, small):
    folder = tmp_path / "logs [1]"
    folder.mkdir()
    (folder / "events[2026].jsonl").write_bytes((log / "events.jsonl").read_bytes())
    given = {
        "events": {"paths": [str(tmp_path / "logs*" / "*.jsonl")], "text": "text"},
        "documents": {"paths": [str(log / "documents.jsonl")]},
    }
    assert run(folder, **given).manifest["files"] == small.manifest["files"]


@pytest.mark.slow
def test_a_run_leaves_nothing_in_the_shared_place_and_takes_nothing_of_anothers(tmp_path, log):
    shared = tmp_path / "shared"
    (shared / "of another run").mkdir(parents=True)
    given = {
        "events": {"paths": [str(log / "events.jsonl")]},
        "documents": {"paths": [str(log / "documents.jsonl")]},
        "pairs": {"temp_location": str(shared)},
    }
    assert run(tmp_path, **given).rows["sessions"] == 180
    (tmp_path / "bad.jsonl").write_text("{broken\n" * 9)
    with pytest.raises(InputError, match="not_json 9"):
        run(tmp_path, "bad", **given | {"events": {"paths": [str(tmp_path / "bad.jsonl")]}})
    assert [path.name for path in shared.iterdir()] == ["of another run"]


@pytest.mark.slow
def test_a_second_run_in_one_process_reads_documents_that_changed(tmp_path, log):
    rows = (log / "documents.jsonl").read_text()
    documents = tmp_path / "documents.jsonl"
    given = {"events": {"paths": [str(log / "events.jsonl")]}, "documents": {"paths": [str(documents)]}}
    documents.write_text(rows)
    before = run(tmp_path, **given).read("sessions").to_pylist()
    documents.write_text('{"document_id": "aaa", "text": "before all others"}\n' + rows)
    assert run(tmp_path, **given).read("sessions").to_pylist() == before


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


def test_an_earlier_vector_of_a_document_in_passages_is_its_first(tmp_path):
    with writing(Embeddings, tmp_path / "embeddings", config={}, inputs=[]) as draft:
        rows = pa.table({"document_id": ["a", "b", "b", "c"]})
        pq.write_table(rows, draft.folder / "documents.parquet")
    earlier = Embeddings.open(tmp_path / "embeddings")
    assert pairs.rows_in(earlier, pa.array(["b", "new", "c"])).tolist() == [1, -1, 3]
