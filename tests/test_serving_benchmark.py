"""benchmarks/serving.py: what it computes, what it refuses, and the whole script run on little."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import serving_tables
from benchmarks.serving import EXAMPLES, main, make_rows, parsed, read_wrk
from benchmarks.serving_models import fewest, recall_of
from benchmarks.serving_tables import compared, medians
from serving import flags as serving_flags

ROOT = Path(__file__).parents[1]
SAID = {"requests": 500, "seconds": 2.0, "p50": 1.5, "p99": 3.0, "p999": 4.0, "max": 9.0}
ERRORS = {"connect": 1, "read": 2, "write": 4, "timeout": 8, "status": 16}


def one(system: str, clients: int, rate: float, p99: float = 1.0, errors: int = 0) -> dict:
    return {"system": system, "clients": clients, "rate": rate, "p50": 0.5, "p99": p99, "p999": 2.0,
            "errors": errors, "cpu_us": 100.0}  # fmt: skip


def test_every_kind_of_error_that_wrk_counts_is_an_error():
    assert read_wrk(json.dumps(SAID | ERRORS))["errors"] == 31


def test_the_rate_is_what_was_answered_in_the_time_that_wrk_measured():
    assert read_wrk(json.dumps(SAID | ERRORS))["rate"] == 250


def test_the_median_round_counts_and_every_error_does():
    rounds = [one("tuned", 8, rate, errors=1) for rate in (100, 900, 300)]
    found = medians([*rounds, one("tuned", 64, 5)])
    assert (found["tuned", 8]["rate"], found["tuned", 8]["errors"]) == (300, 3)
    assert found["tuned", 64]["rate"] == 5


def test_goals_are_five_times_the_requests_of_many_and_no_slower_answers_of_one():
    results = {
        "titles": {"tfrs": "ours", "fastapi": "theirs"},
        "rounds": [
            one("tfrs", 1, 10, p99=1.1), one("fastapi", 1, 10, p99=1.0),
            one("tfrs", 64, 500), one("fastapi", 64, 100),
        ],
    }  # fmt: skip
    assert list(compared(results)) == [
        "ours: 5.0 times FastAPI's requests/s at 64 clients (goal 5: reached).",
        "ours: p99 at 1 client 1.10 ms, FastAPI's 1.00 ms (goal no more: missed).",
    ]


def test_a_system_that_was_left_out_is_compared_with_nothing():
    results = {"titles": {"tfrs": "ours"}, "rounds": [one("tfrs", 64, 500)]}
    assert list(compared(results)) == []


@pytest.mark.parametrize(("wanted", "leaves"), [(0.1, 1), (0.5, 5), (0.55, 6), (1.0, 10), (2.0, 10)])
def test_the_fewest_leaves_that_reach_the_recall_are_taken_or_all(wanted, leaves):
    assert fewest(lambda n: n / 10, wanted, 10) == (leaves, leaves / 10)


def test_a_row_that_scores_as_much_as_the_tenth_counts_and_a_missing_or_repeated_one_does_not():
    rows = np.diag(np.arange(12, 0, -1)).astype(np.float32)  # row r scores 12 - r
    rows[11] = rows[9]  # as near as the tenth
    query = np.ones((2, 12), np.float32)
    found = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8, 11], [0, 0, 1, 1, 2, 2, 3, 10, -1, -1]])
    kth = np.array([3, 3], np.float32)  # row 9's score
    assert recall_of(rows, query[:1], kth[:1], found[:1]) == 1.0
    assert recall_of(rows, query, kth, found) == pytest.approx((1.0 + 0.4) / 2)


def test_made_rows_are_the_same_every_time_and_of_unit_length(tmp_path):
    first, second = (np.load(make_rows(tmp_path / name, 100) / "rows.npy") for name in ("a", "b"))
    assert first.shape == (100, 384)
    assert np.array_equal(first, second)
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--clients", "8", "0"], "--clients is 0, wanted 1 or more"),
        (["--n-rows", "0"], "--n-rows is 0, wanted 1 or more"),
        (["--recall", "1.5"], "--recall is 1.5, wanted more than 0, 1 at most"),
        (["--seconds", "0"], "--seconds is 0.0, wanted more than 0"),
    ],
)
def test_impossible_arguments_are_refused_by_name(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parsed(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_examples_pass_flags_that_the_server_knows(tmp_path):
    flags = re.findall(r"--flag=(\S+)", EXAMPLES)
    assert flags
    serving_flags.parse([f"--model_base_path={tmp_path}", *flags])


def test_missing_rows_say_what_makes_them(tmp_path, capsys):
    folder = tmp_path / "none"
    assert main(["--rows-from", str(folder), "--work", str(tmp_path), "--systems", "tuned-grpc"]) == 2
    said = f"{folder}/rows.npy is not there: python benchmarks/corpus.py {folder} makes it; or --made 20000"
    assert capsys.readouterr().err == f"error: {said}\n"


def test_wrk_is_asked_for_before_anything_is_built(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--made", "2000", "--work", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: wrk is not on the PATH: apt-get install wrk\n"
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_a_row_for_each_system_at_each_number_of_clients():
    titles = {"tfrs": "ours", "fastapi": "theirs"}
    rounds = [one(name, clients, 1234.0, errors=2) for clients in (1, 64) for name in titles]
    lines = serving_tables.table({"titles": titles, "rounds": rounds}, "pipe").splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    figures = ["1,234", "0.50", "1.00", "2.00", "2", "100"]
    assert cells == [[clients, title, *figures] for clients in ("1", "64") for title in ("ours", "theirs")]


@pytest.mark.slow
@pytest.mark.benchmark
@pytest.mark.timeout(900)
@pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not on the PATH")
def test_the_script_measures_every_system_and_writes_all_that_was_asked_for(tmp_path):
    command = [
        sys.executable, "benchmarks/serving.py", "--made", "3000", "--clients", "1", "8", "--seconds", "1",
        "--rounds", "1", "--work", str(tmp_path), "--json", str(tmp_path / "all.json"),
        "--markdown", str(tmp_path / "all.md"), "--plot", str(tmp_path / "all.png"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "all.json").read_text())
    assert [(r["system"], r["clients"]) for r in results["rounds"]] == [
        (name, clients) for clients in (1, 8) for name in results["titles"]
    ]
    assert all(r["rate"] > 0 and r["errors"] == 0 for r in results["rounds"])
    assert all(recall >= 0.9 for recall in results["recalls"].values())
    assert "FastAPI's requests/s" not in (tmp_path / "all.md").read_text()  # 64 clients were not asked for
    assert "p99 at 1 client" in (tmp_path / "all.md").read_text()
    assert (tmp_path / "all.png").stat().st_size > 10_000
