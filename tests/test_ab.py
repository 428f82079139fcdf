"""Two versions side by side: figures counted by hand, intervals, and when nothing can be told."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import stats

from pipeline import ab
from pipeline.__main__ import main
from pipeline.config import EvaluateConfig
from pipeline.errors import InputError
from serving.feedback import Feedback, Split
from tests.conftest import write_jsonl

CONFIG = EvaluateConfig(n_draws=400)
LIVE, OTHER = 7, 8
START = 1_795_348_800  # 2026-11-22T12:00:00 UTC


def line(
    kind: str, user: str, at: float, query: str, version: int, share: float = 0.5, **more: object
) -> dict:
    moment = str(np.datetime64(int((START + at) * 1000), "ms")) + "+00:00"
    said = {"kind": kind, "timestamp": moment, "user_id": user, "query": query, "version": version}
    return said | {"live": LIVE, "compared": OTHER, "share": share, **more}


def search(user: str, at: float, query: str = "q", version: int = LIVE, shown: str = "abcd", **more) -> dict:
    return line("search", user, at, query, version, document_ids=list(shown), **more)


def opened(user: str, at: float, document: str, query: str = "q", version: int = LIVE, **more) -> dict:
    return line("open", user, at, query, version, document_id=document, **more)


def judged(tmp_path: Path, *lines: dict) -> tuple[list[tuple], dict[str, int]]:
    """(user, click-through, reciprocal rank, abandoned) of each search that counts, and what was left out."""
    rows, left_out = ab.read([write_jsonl(tmp_path / "searches.jsonl", list(lines))])
    found = ab.judged(rows, left_out).select("user_id", *ab.MEASURES).rows()
    return found, {why: n for why, n in left_out.items() if n}


def users_of(version: int, n: int, opening: int, at: float = 0) -> list[dict]:
    """n users with a search each, the first of them opening what stood first."""
    rows = [search(f"{version}-{user}", at, version=version) for user in range(n)]
    return rows + [opened(f"{version}-{user}", at + 9, "a", version=version) for user in range(opening)]


def run(tmp_path: Path, *lines: dict) -> dict:
    return ab.run(CONFIG, [write_jsonl(tmp_path / "searches-1.jsonl", list(lines))], tmp_path / "ab.json")


# --- What a search was worth -----------------------------------------------------------------------------


def test_an_open_counts_for_the_users_last_search_of_that_query(tmp_path):
    found, left_out = judged(
        tmp_path,
        search("u", 0),
        search("u", 60),
        opened("u", 70, "b"),  # of the second: one of four shown, at rank 2
        search("v", 0),
        opened("v", 10, "d"),  # first rank 4, then rank 1: two of four
        opened("v", 20, "a"),
    )
    assert found == [("u", 0.0, 0.0, 1.0), ("u", 0.25, 0.5, 0.0), ("v", 0.5, 0.25, 0.0)]
    assert left_out == {}


@pytest.mark.parametrize(
    "open_line",
    [
        opened("u", 10, "z"),  # not shown
        opened("u", 10, "a", query="other"),
        opened("u", 10, "a", version=OTHER),
        opened("v", 10, "a"),
        opened("u", -1, "a"),  # before the search
    ],
)
def test_an_open_of_what_the_user_was_not_shown_counts_for_nothing(tmp_path, open_line):
    found, left_out = judged(tmp_path, search("u", 0), open_line)
    assert found == [("u", 0.0, 0.0, 1.0)]
    assert left_out == {"opens of what no search of the user had shown": 1}


def test_the_same_document_opened_twice_is_opened_once(tmp_path):
    found, _ = judged(tmp_path, search("u", 0), opened("u", 5, "a"), opened("u", 6, "a"))
    assert found == [("u", 0.25, 1.0, 0.0)]


def test_a_document_that_was_shown_twice_was_found_at_its_better_place(tmp_path):
    assert judged(tmp_path, search("u", 0, shown="baca"), opened("u", 5, "a"))[0] == [("u", 0.25, 0.5, 0.0)]


def test_an_open_after_a_reload_still_belongs_to_its_search(tmp_path):
    reloaded = {"live": 9}  # what the gateway served when the document was opened
    found, _ = judged(tmp_path, search("u", 0), opened("u", 5, "a") | reloaded)
    assert found == [("u", 0.25, 1.0, 0.0)]


def test_a_search_without_results_is_abandoned(tmp_path):
    assert judged(tmp_path, search("u", 0, shown=""))[0] == [("u", 0.0, 0.0, 1.0)]


def test_what_was_typed_over_within_three_seconds_is_no_search_unless_something_was_opened(tmp_path):
    found, left_out = judged(
        tmp_path,
        search("u", 0.0, "ㅎ"),
        search("u", 0.4, "한"),
        search("u", 0.8, "한글"),
        search("u", 4.0, "한글 글꼴"),  # 3.2 seconds later
        opened("u", 5.0, "a", "한글 글꼴"),
        search("u", 5.5, "한글"),  # typed over what was opened
    )
    assert [row[2] for row in found] == [0.0, 1.0, 0.0]
    assert left_out == {"searches that were typed over": 2}


def test_users_who_saw_both_versions_belong_to_neither(tmp_path):
    found, left_out = judged(
        tmp_path, search("u", 0), search("u", 60, version=OTHER), search("v", 0), search("v", 60)
    )
    assert [row[0] for row in found] == ["v", "v"]
    assert left_out["users who were served by both versions"] == 1


def test_a_search_that_another_version_answered_than_the_drawn_one_is_left_out(tmp_path):
    found, left_out = judged(
        tmp_path,
        search("u", 0, drawn=OTHER),  # while the compared version was not there
        search("u", 60, version=OTHER, drawn=OTHER),
        opened("u", 70, "a", version=OTHER),
        search("v", 0, drawn=LIVE),
    )
    assert found == [("u", 0.25, 1.0, 0.0), ("v", 0.0, 0.0, 1.0)]
    assert left_out == {"searches that were served by another version than drawn": 1}


# --- Intervals -------------------------------------------------------------------------------------------


def test_draws_of_kinds_of_users_are_as_wide_as_scipys_draws_of_users():
    rng = np.random.default_rng(3)
    sums = np.stack([rng.integers(0, 3, 80), rng.integers(3, 6, 80)], axis=1).astype(float)
    drawn = ab.Arm(sums).drawn(4_000, np.random.default_rng(1))[:, 0]
    scipys = stats.bootstrap(
        tuple(sums.T), lambda opens, n, axis: opens.sum(axis) / n.sum(axis), paired=True, vectorized=True,
        n_resamples=4_000, method="percentile", rng=np.random.default_rng(2),
    )  # fmt: skip
    low, high = np.percentile(drawn, [2.5, 97.5])
    width = scipys.confidence_interval.high - scipys.confidence_interval.low
    assert high - low == pytest.approx(width, rel=0.1)
    assert drawn.mean() == pytest.approx(sums[:, 0].sum() / sums[:, 1].sum(), abs=width / 20)


# --- Verdicts --------------------------------------------------------------------------------------------


def test_a_version_whose_users_open_twice_as_often_is_better(tmp_path, capsys):
    figures = run(tmp_path, *users_of(LIVE, 200, 60), *users_of(OTHER, 200, 120))
    (found,) = figures["comparisons"]
    assert (found["live"], found["compared"], found["share"]) == (LIVE, OTHER, 0.5)
    assert found["first"] == "2026-11-22T12:00:00Z"
    for name, rate in (("live", 0.3), ("compared", 0.6)):
        arm = found["arms"][name]
        assert (arm["users"], arm["searches"]) == (200, 200)
        assert (arm["click_through"]["mean"], arm["mrr"]["mean"]) == (rate / 4, rate)
        assert arm["abandoned"]["mean"] == pytest.approx(1 - rate)
    at = found["difference"]["mrr"]
    assert at["mean"] == pytest.approx(0.3)
    # standard error sqrt(0.3 * 0.7 / 200 + 0.6 * 0.4 / 200) = 0.0474, 3.92 of them between the ends
    assert at["high"] - at["low"] == pytest.approx(3.92 * 0.0474, rel=0.15)
    assert found["verdict"]["better"] == OTHER
    assert json.loads((tmp_path / "ab.json").read_text()) == figures
    said = capsys.readouterr().out
    assert "7 (live)" in said
    assert "version 8 is better, by MRR of the first open: +0.3000 (" in said


def test_a_version_that_is_worse_is_said_to_be_worse(tmp_path):
    figures = run(tmp_path, *users_of(LIVE, 100, 80), *users_of(OTHER, 100, 20))
    assert figures["comparisons"][0]["verdict"]["better"] == LIVE


def test_a_small_difference_is_not_told_and_how_many_users_it_would_take(tmp_path, capsys):
    figures = run(tmp_path, *users_of(LIVE, 100, 50), *users_of(OTHER, 100, 55))
    verdict = figures["comparisons"][0]["verdict"]
    assert verdict["better"] is None
    # 0.05 must be 2.8 standard errors; with 200 users one is sqrt(0.25 / 100 + 0.2475 / 100) = 0.0705,
    # so it takes 200 * (2.8 * 0.0705 / 0.05)^2 = 3,120 users
    assert verdict["more_users"] == pytest.approx(3_120 - 200, rel=0.15)
    assert "it cannot be told which is better" in capsys.readouterr().out


def test_versions_that_do_the_same_are_not_told_apart_by_any_number(tmp_path):
    figures = run(tmp_path, *users_of(LIVE, 50, 20), *users_of(OTHER, 50, 20))
    verdict = figures["comparisons"][0]["verdict"]
    assert (verdict["better"], verdict["more_users"]) == (None, None)
    assert "not even 100 times as many users" in verdict["said"]


def test_fewer_than_thirty_users_of_a_version_get_no_verdict(tmp_path, capsys):
    figures = run(tmp_path, *users_of(LIVE, 29, 0), *users_of(OTHER, 31, 31))
    (found,) = figures["comparisons"]
    assert found["verdict"]["said"] == "too few users: 29 of 7 and 31 of 8, wanted at least 30 of each"
    assert found["difference"]["mrr"] == {"mean": 1.0, "low": None, "high": None}
    assert "is better" not in capsys.readouterr().out


def test_a_version_that_nobody_was_served_by_is_shown_empty(tmp_path):
    (found,) = run(tmp_path, *users_of(LIVE, 40, 20))["comparisons"]
    assert (found["arms"]["compared"]["users"], found["difference"]["mrr"]) == (0, None)


@pytest.mark.parametrize(("n", "is_faulty"), [(50, False), (20, True)])
def test_a_split_that_chance_does_not_explain_is_warned_of(n, is_faulty, tmp_path, capsys):
    # of 100 + n users half are wanted: 150 by 75, standard deviation 6; 120 by 60, standard deviation 5.5
    figures = run(tmp_path, *users_of(LIVE, 100 if is_faulty else 60, 9), *users_of(OTHER, n, 9))
    assert (figures["comparisons"][0]["mismatch"] is not None) == is_faulty
    assert ("warning: 20 users were compared, wanted about 60" in capsys.readouterr().out) == is_faulty


def test_users_are_expected_where_the_share_wants_them():
    assert ab.mismatch(900, 100, 0.1) is None
    found = ab.mismatch(100, 900, 0.1)
    assert found is not None
    assert found["expected"] == 100
    assert found["p"] < 1e-9


def test_the_same_log_gives_the_same_figures(tmp_path):
    lines = [*users_of(LIVE, 60, 20), *users_of(OTHER, 60, 30)]
    assert run(tmp_path, *lines) == run(tmp_path, *lines)


def test_each_comparison_of_a_log_is_by_itself(tmp_path):
    later = [row | {"live": 9, "version": 9 if row["version"] == LIVE else OTHER}
             for row in [*users_of(LIVE, 40, 9, at=9_000), *users_of(OTHER, 40, 9, at=9_000)]]  # fmt: skip
    figures = run(tmp_path, *later, *users_of(LIVE, 40, 9), *users_of(OTHER, 40, 9))
    assert [(found["live"], found["compared"]) for found in figures["comparisons"]] == [(7, 8), (9, 8)]


# --- Logs --------------------------------------------------------------------------------------------------


def test_the_gateways_own_log_is_what_is_read(tmp_path, capsys):
    feedback = Feedback.open(tmp_path, user_key=b"k" * 32)
    feedback.searched("before", "q", ["a"], LIVE)
    feedback.split = Split(LIVE, OTHER, 0.5, b"k" * 32)
    served = {f"user {n}": feedback.split.version_for(f"user {n}") for n in range(100)}
    for user, version in served.items():
        feedback.searched(user, "한글 q", ["a", "b"], version)
        if version == OTHER:
            feedback.opened(user, "b", "한글 q", 2, version)
    feedback.close()
    assert main(["evaluate", "--ab", str(tmp_path), "--json", str(tmp_path / "out" / "ab.json")]) == 0
    figures = json.loads((tmp_path / "out" / "ab.json").read_text())
    (found,) = figures["comparisons"]
    n_compared = sum(version == OTHER for version in served.values())
    assert found["arms"]["compared"]["users"] == n_compared
    assert found["arms"]["compared"]["mrr"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert found["verdict"]["better"] == OTHER
    assert figures["left_out"] == {"searches without a comparison": 1}
    assert "not counted: 1 searches without a comparison" in capsys.readouterr().err


def test_a_log_with_a_torn_line_is_looked_at_line_by_line_in_one_frame(tmp_path, monkeypatch):
    half = json.dumps(search("u", 0) | {"query": "\ud83d"})
    file = write_jsonl(tmp_path / "log.jsonl", [search("u", at) for at in range(300)])
    with file.open("a") as log:
        log.write('{"kind": "sear\n' + half + "\n")
    frames, made = [], pl.DataFrame

    def counted(*given, **named):
        frames.append(given)
        return made(*given, **named)

    monkeypatch.setattr(ab.pl, "DataFrame", counted)
    rows, left_out = ab.read([file])
    assert (len(rows), left_out) == (300, {"unusable lines": 2})
    assert len(frames) == 1


def test_a_torn_line_is_counted_and_a_file_of_something_else_refused(tmp_path):
    lines = [*users_of(LIVE, 60, 20), *users_of(OTHER, 60, 30)]
    file = write_jsonl(tmp_path / "searches-1.jsonl", lines)
    with file.open("a") as log:
        log.write('{"kind": "sear\n\n')
    figures = ab.run(CONFIG, [tmp_path], None)
    assert figures["left_out"] == {"unusable lines": 1}
    write_jsonl(file, [{"user_id": "u", "document_id": "d", "timestamp": 1}])
    with pytest.raises(InputError, match=r"searches-1\.jsonl: line 1: no line of the gateway's searches log"):
        ab.run(CONFIG, [file])


@pytest.mark.parametrize(
    "bad",
    [
        '"text"', "[1]", "{", '{"kind": "search"}',
        json.dumps(search("u", 0) | {"version": "new"}),
        json.dumps(search("u", 0) | {"version": 10**30}),
        json.dumps(search("u", 0) | {"share": 10**400}),
        json.dumps(search("u", 0) | {"timestamp": "yesterday"}),
        json.dumps(search("u", 0) | {"document_ids": "a"}),
        json.dumps(search("u", 0) | {"kind": "seen"}),
    ],
)  # fmt: skip
def test_a_line_of_another_form_is_named(tmp_path, bad):
    file = tmp_path / "log.jsonl"
    file.write_text(json.dumps(search("u", 0)) + "\n" + bad + "\n")
    with pytest.raises(InputError, match="line 2: no line of the gateway's"):
        ab.read([file])


def test_compressed_logs_and_folders_are_read_and_each_file_once(tmp_path):
    import gzip

    lines = [*users_of(LIVE, 30, 9), *users_of(OTHER, 30, 9)]
    file = write_jsonl(tmp_path / "plain", lines)
    (tmp_path / "searches-2026-11-22.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
    packed = tmp_path / "searches-2026-11-22.jsonl.gz"
    figures = ab.run(CONFIG, [tmp_path, packed], None)
    assert figures["comparisons"][0]["arms"]["live"]["users"] == 30


def test_logs_that_hold_no_comparison_are_said(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: a folder without searches-"):
        ab.run(CONFIG, [tmp_path / "empty"])
    with pytest.raises(InputError, match="none: no such file"):
        ab.run(CONFIG, [tmp_path / "none"])
    alone = write_jsonl(tmp_path / "alone.jsonl", [search("u", 0) | dict.fromkeys(ab.SPLIT)])
    with pytest.raises(InputError, match="no search of a comparison among 1 lines; start the gateway with"):
        ab.run(CONFIG, [alone])


def test_evaluate_without_a_log_still_asks_for_config_and_work(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["evaluate"])
    assert ended.value.code == 2
    assert "the following arguments are required: --config, --work" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", "--config", "c.yaml", "--work", "w", "--json", "out.json"])
    assert "--json goes with --ab" in capsys.readouterr().err


def test_many_users_cost_no_more_than_their_kinds():
    sums = np.tile([[0.0, 1.0], [1.0, 2.0]], (100_000, 1))
    drawn = ab.Arm(sums).drawn(400, np.random.default_rng(7))[:, 0]
    # half of the users have 0 of 1, half 1 of 2: 100,000 of 300,000
    assert drawn.mean() == pytest.approx(1 / 3, abs=0.001)


def test_the_columns_are_those_that_feedback_writes(tmp_path):
    feedback = Feedback.open(tmp_path, user_key=b"k" * 32)
    feedback.searched("u", "q", ["a"], LIVE)
    feedback.opened("u", "a", "q", 1, LIVE)
    feedback.close()
    written = {
        name for file in tmp_path.glob("searches-*") for row in file.open() for name in json.loads(row)
    }
    assert written - {"rank"} == set(ab.COLUMNS)  # the rank is taken from what was shown
    assert isinstance(ab.read([next(tmp_path.glob("searches-*"))])[0], pl.DataFrame)
