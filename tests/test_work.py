"""The work folder: one run at a time, memory measured, and the closing table."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import work as work_
from pipeline.errors import BusyError

ROOT = Path(__file__).parents[1]


def test_a_second_run_in_one_folder_is_refused_until_the_first_ends(tmp_path):
    with work_.locked(tmp_path), pytest.raises(BusyError, match="another run is at work in it"):
        work_.locked(tmp_path).__enter__()
    with work_.locked(tmp_path):
        pass


def test_a_run_that_was_killed_holds_nothing(tmp_path):
    script = (
        "import pathlib, sys, time\n"
        "from pipeline import work\n"
        "with work.locked(pathlib.Path(sys.argv[1])):\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(BusyError):
        work_.locked(tmp_path).__enter__()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    with work_.locked(tmp_path):
        pass


def test_a_stages_time_and_memory_are_measured(tmp_path):
    script = "import time; held = b'x' * 200_000_000; time.sleep(0.5)"
    with work_.locked(tmp_path) as lock:
        status, took = work_.run_process([sys.executable, "-c", script], "pairs", lock)
    assert status == 0
    assert 200_000_000 < took["peak_rss_anon"] < 260_000_000
    assert took["seconds"] >= 0.5


def test_memory_of_child_processes_counts_too():
    script = (
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', \"held = b'x' * 100_000_000; import time; time.sleep(0.5)\"])"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    peak = work_.Peak(process.pid)
    process.wait()
    peak.stop()
    assert peak.rss_anon > 100_000_000


def test_a_stage_ended_by_a_signal_is_a_fault_that_is_said(tmp_path, capfd):
    with work_.locked(tmp_path) as lock:
        status, _ = work_.run_process(
            [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], "encode", lock
        )
    assert status == 2
    assert (
        "stage encode was ended by SIGKILL (out of memory?); run the same command again"
        in capfd.readouterr().err
    )


def test_what_a_stage_took_is_kept_beside_what_the_others_took(tmp_path):
    work_.note(tmp_path, "pairs", {"seconds": 1.0, "peak_rss_anon": 1, "peak_rss": 2})
    work_.note(tmp_path, "train", {"seconds": 2.0, "peak_rss_anon": 3, "peak_rss": 4})
    assert {stage: took["seconds"] for stage, took in work_.read_run(tmp_path).items()} == {
        "pairs": 1,
        "train": 2,
    }


def test_an_interrupted_run_says_how_to_go_on(tmp_path, log):
    file = tmp_path / "c.yaml"
    file.write_text(
        f"documents: {{paths: [{log / 'documents.jsonl'}]}}\nevents: {{paths: [{log / 'events.jsonl'}]}}\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "all", "--config", str(file), "--work", str(tmp_path / "work")],
        stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list((tmp_path / "work").glob(".pairs.partial-*")):  # inside the first stage
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; run the same command again to go on" in said
    assert "Traceback" not in said
