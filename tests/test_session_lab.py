"""Session lab: counts and measures of a log small enough to check by hand."""

import math

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from pipeline import pairs, session_lab
from pipeline.__main__ import main
from pipeline.config import from_dict
from pipeline.errors import ConfigError, InputError
from pipeline.session_lab import Similarity, Steps, as_pairs, median, note_meetings, parse_gaps, partners
from pipeline.sessions import CODED, Sessions
from tests.conftest import write_jsonl

A, B, C, D = range(4)
TEXTS = {"a": "red fish", "b": "red bird", "c": "blue bird", "d": "green"}
# u reads a, b, and c after a quarter of an hour; hours later a and b again. v reads a, b; d later. w reads c.
LOG = [
    ("u", "a", 0), ("u", "b", 100), ("u", "c", 1000), ("u", "a", 10_000), ("u", "b", 10_050),
    ("v", "a", 0), ("v", "b", 10), ("v", "d", 5000),
    ("w", "c", 0),
]  # fmt: skip


def config_of(folder, *logs, **of_pairs):
    """Each log a file in `folder`."""
    documents = [{"document_id": name, "text": text} for name, text in TEXTS.items()]
    write_jsonl(folder / "documents.jsonl", documents)
    paths = []
    for n, rows in enumerate(logs):
        events = [{"user_id": u, "document_id": d, "timestamp": 1_750_000_000 + s} for u, d, s in rows]
        paths.append(str(write_jsonl(folder / f"events-{n}.jsonl", events)))
    return from_dict(
        {
            "events": {"paths": paths, "description": "three readers"},
            "documents": {"paths": [str(folder / "documents.jsonl")]},
            "pairs": of_pairs,
        }
    )


def look(folder, config, gaps):
    (folder / "lab").mkdir()
    return session_lab.look(config, gaps, folder / "lab")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    return look(folder, config_of(folder, LOG), [300, 1800])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gap", "figures"),
    [
        # u: ab, c, ab; v: ab, d; w: c. Three pairs, all of them a and b, in u's sessions and in v's.
        (300, {"sessions": 6, "documents_mean": 9 / 6, "documents_median": 1.5, "one_document": 3 / 6,
               "pairs": 3, "again": 1.0, "other_reader": 1.0}),
        # u: abc, ab; v: ab, d; w: c. The fourth pair, b and c, meets nowhere else.
        (1800, {"sessions": 5, "documents_mean": 9 / 5, "documents_median": 2, "one_document": 2 / 5,
                "pairs": 4, "again": 3 / 4, "other_reader": 3 / 4}),
    ],
)  # fmt: skip
def test_a_gap_is_described_by_its_sessions_and_pairs(lab, gap, figures):
    assert lab.gaps.loc[gap, list(figures)].to_dict() == pytest.approx(figures)


@pytest.mark.slow
def test_steps_are_counted_by_the_time_they_took_whatever_the_gap(lab):
    steps = lab.steps.reset_index()
    assert steps["from"].to_list() == [0, 300, 1800]
    assert steps["to"].to_list() == [300, 1800, math.inf]
    assert steps["steps"].to_list() == [3, 1, 2]  # 100, 50 and 10 s; 900 s; 9000 and 4990 s
    assert steps["share"].to_list() == pytest.approx([3 / 6, 1 / 6, 2 / 6])
    assert steps["other_reader"].to_list() == [1, 0, 0]  # only a and b are read by two readers in one session
    assert (lab.other.sum(), lab.same.sum()) == (6, 0)


@pytest.mark.slow
def test_how_the_log_is_cut_into_files_changes_nothing(lab, tmp_path):
    other = look(tmp_path, config_of(tmp_path, LOG[5:], LOG[2:5], LOG[:2]), [300, 1800])
    pd.testing.assert_frame_equal(other.gaps, lab.gaps)
    pd.testing.assert_frame_equal(other.steps, lab.steps)


@pytest.mark.slow
def test_a_reader_with_too_many_events_a_day_is_left_out_as_in_the_stage(tmp_path):
    crawler = [("x", name, 60 * n) for n, name in enumerate("abcdab")]  # over the limit only with both files
    config = config_of(tmp_path, LOG + crawler[:3], crawler[3:], max_events_per_user=5)
    gaps = look(tmp_path, config, [1800]).gaps
    assert gaps.loc[1800, ["sessions", "pairs"]].to_list() == [5, 4]


@pytest.mark.slow
def test_the_pairs_of_the_configs_gap_are_those_of_the_stage(log, tmp_path):
    config = from_dict(
        {
            "events": {"paths": [str(log / "events.jsonl")]},
            "documents": {"paths": [str(log / "documents.jsonl")]},
        }
    )
    made = pairs.run(config.pairs, config.events, config.documents, tmp_path / "pairs").manifest
    rows = made["rows"]
    gaps = look(tmp_path, config, [1800]).gaps
    assert gaps.loc[1800, "sessions"] == rows["sessions"]
    of_all_spans = rows["pairs"] + rows["dev"] + rows["test"]
    assert gaps.loc[1800, "pairs"] == of_all_spans + made["facts"]["rejects"].get("no_negative", 0)


@pytest.mark.slow
def test_the_command_prints_the_tables_and_writes_them_with_the_picture(tmp_path, capsys):
    config_of(tmp_path, LOG)
    (tmp_path / "c.yaml").write_text(
        "{events: {paths: [events-0.jsonl], description: three readers}, "
        "documents: {paths: [documents.jsonl]}}"
    )
    out = tmp_path / "made" / "here"
    assert main(["sessions", "--config", str(tmp_path / "c.yaml"), "--gaps", "300", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("three readers\n")
    assert said.splitlines()[-1] == session_lab.LOOK_AT
    marked = [line.split()[:2] for line in said.splitlines() if "min*" in line]
    assert marked == [["30", "min*"]]  # not asked for, but it is the config's
    assert sorted(path.name for path in out.iterdir()) == ["sessions.csv", "sessions.png", "steps.csv"]
    assert pd.read_csv(out / "sessions.csv")["sessions"].to_list() == [6, 5]
    assert pd.read_csv(out / "steps.csv")["steps"].to_list() == [3, 1, 2]
    assert (out / "sessions.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_log_of_one_reader_without_pairs_is_shown_too(tmp_path):
    config = config_of(tmp_path, [("u", "a", 0), ("u", "b", 9000)])
    lab = look(tmp_path, config, [1800])
    lines = session_lab.tables(lab).splitlines()
    (of_gap,) = [line for line in lines if line.lstrip().startswith("30 min*")]
    assert of_gap.split() == ["30", "min*", "2", "1.00", "1", "100.0", "%", "0", *"-----"]
    (of_step,) = [line for line in lines if line.startswith("30 min or more")]
    assert "(one reader)" in of_step  # who says how it would be for another?
    assert session_lab.draw(lab).axes


def test_without_a_log_there_is_nothing_to_look_at(tmp_path):
    config = from_dict({"documents": {"paths": ["documents.jsonl"]}})
    with pytest.raises(InputError, match=r"events\.paths is empty"):
        session_lab.run(config, [300], None)


def test_gaps_are_whole_seconds_above_zero():
    assert parse_gaps("300, 900") == [300, 900]


@pytest.mark.parametrize("text", ["300,", "0", "-5", "5m", "1.5", "³", "9" * 20])
def test_what_is_no_gap_is_refused_by_name(text):
    with pytest.raises(ConfigError, match="not a whole number of seconds from 1 to a year"):
        parse_gaps(text)


def coded(*rows):
    """(user, document, seconds[, text hash]) rows as bucket files hold them."""
    full = [(u, str(u), d, int(s * 1_000_000), *(text or [0])) for u, d, s, *text in rows]
    return pl.DataFrame(full, CODED, orient="row")


HASHES = np.arange(4, dtype=np.uint64)


@pytest.mark.parametrize(("seconds", "band"), [(299.999999, 0), (300, 1), (899, 1), (900, 2)])
def test_a_step_of_exactly_a_gap_belongs_behind_it(seconds, band):
    steps = Steps(np.array([300, 900]))
    steps.add(coded((1, A, 0), (1, B, seconds)), HASHES)
    assert [drawn.n for drawn in steps.drawn] == [int(number == band) for number in range(3)]


def test_steps_never_go_from_one_reader_to_another_and_duplicates_are_no_steps():
    steps = Steps(np.array([300]))
    steps.add(coded((1, A, 0), (1, A, 0), (2, B, 1), (2, B, 61), (2, C, 61, 5)), HASHES)
    assert (steps.same.sum(), steps.other.sum()) == (1, 1)  # b to b after 60 s; b to c at once
    assert steps.other[0] == 1  # no time at all stands in the first bar, though the axis is logarithmic


def test_the_median_is_between_the_middle_two():
    assert median(np.array([0, 3, 1, 0, 1])) == 1  # 1 1 1 2 4
    assert median(np.array([0, 2, 1, 0, 1])) == 1.5  # 1 1 2 4


def sessions_of(*rows):
    """(session, user, documents) rows."""
    session, user, documents = zip(*rows, strict=True)
    return Sessions(
        session=np.array(session, np.uint64),
        user=np.array(user, np.uint64),
        user_id=pa.array([str(u) for u in user]),
        start=np.zeros(len(rows), np.int64),
        end=np.zeros(len(rows), np.int64),
        offsets=np.cumsum([0, *(len(d) for d in documents)]).astype(np.int32),
        documents=np.concatenate(documents).astype(np.int32),
    )


def noted(sessions, anchor, positive, partner):
    """What is noted of a pair of session 1, of user 7."""
    drawn = as_pairs([0], [7], [1], [anchor], [positive]).assign(partner=partner)
    drawn[["again", "other_reader", "by_chance"]] = 0.0
    note_meetings(drawn, sessions, n_documents=4)
    return drawn.loc[0, ["again", "other_reader", "by_chance"]].to_list()


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([], [0, 0, 0]),  # the own session is not another
        ([(2, 7, [B, C, A])], [1, 0, 0]),  # the same reader again, the other way round, with one between
        ([(2, 8, [A, B])], [1, 1, 0]),
        ([(2, 7, [A, D]), (3, 8, [D, C])], [0, 0, 0]),  # a and d: but of the reader himself
        ([(2, 8, [A, D, D])], [0, 0, 1]),
        ([(2, 8, [A]), (3, 8, [B])], [0, 0, 0]),  # one reader, two sessions
    ],
)
def test_documents_meet_again_in_another_session(others, expected):
    assert noted(sessions_of((1, 7, [A, B]), *others), A, B, partner=D) == expected


def test_meetings_are_the_same_when_they_are_looked_up_in_blocks(monkeypatch):
    rows = [(n, n % 3, [n % 4, (n + 1) % 4]) for n in range(20)]
    sessions = sessions_of(*rows)
    drawn = as_pairs(
        range(20), [n % 3 for n in range(20)], range(20), *zip(*(d for _, _, d in rows), strict=True)
    )
    drawn["partner"] = (drawn["positive"] + 1) % 4
    drawn[["again", "other_reader", "by_chance"]] = 0.0
    at_once, in_blocks = drawn.copy(), drawn.copy()
    note_meetings(at_once, sessions, n_documents=4)
    monkeypatch.setattr(session_lab, "BLOCK", 15)  # each pair has 20 entries: a block each
    note_meetings(in_blocks, sessions, n_documents=4)
    pd.testing.assert_frame_equal(in_blocks, at_once)
    assert at_once["again"].sum() == 20  # each two neighbours are in five sessions
    assert at_once["by_chance"].sum() == 0  # two apart in the circle of four never meet


def test_the_sample_is_the_pairs_with_the_lowest_keys(monkeypatch):
    monkeypatch.setattr(session_lab, "SAMPLE", 2)
    large = 2**64 - 1  # would lose its last digits as a float
    drawn = session_lab.Drawn()
    for keys in ([large, 5], [large - 1, 9, 3]):
        drawn.add(as_pairs(keys, *[[0] * len(keys)] * 4))
    assert (drawn.n, drawn.pairs["key"].to_list()) == (5, [3, 5])
    drawn = session_lab.Drawn()
    drawn.add(as_pairs([large, large - 1], *[[0, 0]] * 4))
    assert drawn.pairs["key"].to_list() == [large - 1, large]


def test_a_random_partner_is_never_the_anchor():
    anchor, positive = np.array([A, B, C] * 50), np.array([B, C, B] * 50)
    found = partners(anchor, positive)
    assert set(found) == {B, C}
    assert (found != anchor).all()


def test_where_nothing_else_is_left_the_partner_is_the_positive():
    assert partners(np.array([A] * 30), np.array([B] * 30)).tolist() == [B] * 30


def test_similarity_is_a_share_of_the_querys_own_score():
    similar = Similarity(pa.array(["p q", "p r", "s t", "..."]), [])
    asked, found = np.array([0, 0, 0, 3]), np.array([0, 1, 2, 0])
    # Lucene's idf, ln(1 + (N - n + 0.5) / (n + 0.5)), N = 4: p is in two texts, q in one; lengths alike, so
    # that term frequency and length cancel out. The text without words is like nothing.
    p, q = math.log(1 + 2.5 / 2.5), math.log(1 + 3.5 / 1.5)
    assert similar(asked, found) == pytest.approx([1, p / (p + q), 0, 0], abs=1e-6)


def test_of_many_documents_only_a_pool_and_those_that_are_asked_for_are_indexed(monkeypatch):
    monkeypatch.setattr(session_lab, "POOL", 1)
    texts = pa.array(["other"] * 50 + ["p q", "p r"])
    similar = Similarity(texts, [np.array([50]), np.array([[51]])])
    assert {50, 51} <= set(similar.rows)
    assert len(similar.rows) <= 3
    assert similar(np.array([50]), np.array([50])) == pytest.approx([1])


@pytest.mark.parametrize(
    ("seconds", "words"), [(45, "45 s"), (90, "90 s"), (300, "5 min"), (5400, "90 min"), (86_400, "1 d")]
)
def test_times_are_said_in_the_largest_unit_without_a_rest(seconds, words):
    assert session_lab.spell(seconds) == words
