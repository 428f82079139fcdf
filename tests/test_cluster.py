"""Stages pairs and encode on a Dask cluster of processes, one of them killed at its work: make test-cluster.

The scheduler and the workers run in a folder of their own, as on machines of their own: nothing may depend on
the driver's current folder.
"""

import glob
import gzip
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import yaml

import pipeline
from pipeline import encode_line
from pipeline.artifacts import Pairs
from pipeline.config import EncodeConfig
from pipeline.encode_line import engine
from pipeline.runners import parse_options
from pipeline.shards import Job, Shards, in_process, windows

ROOT = Path(__file__).parents[1]
INPUT = ROOT / "work" / "demo" / "input"  # where `make demo` has it too
STAGE = str(Path(pipeline.__file__).parent)  # not by this file: --preload runs a copy of it
N_LOGS = 12  # several for each of two workers
STARTUP = 90  # seconds; a worker takes two, on a busy machine more

pytestmark = pytest.mark.cluster


# --- A worker that dies ---------------------------------------------------------------------------------


def dask_setup(worker: Any) -> None:
    """What `dask worker --preload` of this file calls: such a worker kills itself in the middle of a task.

    It does so in the stage's own code, where results of other tasks lie in its memory (or need not:
    $DIE_EMPTY_HANDED) and a file $DIE_IN/**/$DIE_AFTER is there, which says how far the job is.
    """
    can_be_empty = "DIE_EMPTY_HANDED" in os.environ
    reached = f"{os.environ['DIE_IN']}/**/{os.environ['DIE_AFTER']}"

    def die_at_work(frame: FrameType, event: str, _: Any) -> None:
        in_stage = event == "call" and frame.f_code.co_filename.startswith(STAGE)
        if not in_stage or not (worker.data or can_be_empty):
            return
        if glob.glob(reached, recursive=True, include_hidden=True):  # noqa: PTH207
            os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(die_at_work)  # of the threads to come, which run the tasks


# --- The demo, and a cluster ----------------------------------------------------------------------------


def run(*arguments: object) -> subprocess.CompletedProcess:
    """`python -m pipeline ...`, as its user types it."""
    command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)


def run_pairs(work: Path, config: Path, *options: str) -> subprocess.CompletedProcess:
    return run("pairs", "--config", config, "--work", os.path.relpath(work, ROOT), *options)


@pytest.fixture(scope="session")
def logs(tmp_path_factory) -> Path:
    """The demo's config for its log in N_LOGS files: rows alternate, so that each file has all readers."""
    if not (INPUT / "events.jsonl.gz").exists():
        made = run("sample", "--out", INPUT)
        assert made.returncode == 0, made.stderr
    folder = tmp_path_factory.mktemp("logs")
    lines = gzip.decompress((INPUT / "events.jsonl.gz").read_bytes()).splitlines(keepends=True)
    for n in range(N_LOGS):
        (folder / f"events-{n:02d}.jsonl").write_bytes(b"".join(lines[n::N_LOGS]))
    config = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text(encoding="utf-8"))
    config["events"]["paths"] = [str(folder / "events-*.jsonl")]
    config["documents"]["paths"] = [str(INPUT / "documents.parquet")]
    (folder / "demo.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder / "demo.yaml"


@pytest.fixture(scope="session")
def demo(tmp_path_factory, logs) -> Pairs:
    """What the demo's stage makes on the default runner, from its log in one file."""
    work = tmp_path_factory.mktemp("demo")
    path = f'events.paths=["{INPUT / "events.jsonl.gz"}"]'
    done = run_pairs(work, logs, "--set", path)
    assert done.returncode == 0, done.stderr
    return Pairs.open(work / "pairs")


def wait_for(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + STARTUP
    while not true():
        assert time.monotonic() < deadline, f"no {what} within {STARTUP} s"
        time.sleep(0.05)


@contextmanager
def process(folder: Path, name: str, *arguments: object, **env: object) -> Iterator[subprocess.Popen]:
    """`python -m dask ...` in a folder of its own, its output in folder/NAME.log; killed at the end."""
    place = folder / name
    place.mkdir()
    command = [sys.executable, "-m", "dask", *map(str, arguments)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **{key: str(value) for key, value in env.items()}}
    with (folder / f"{name}.log").open("wb") as log:
        started = subprocess.Popen(command, cwd=place, env=environment, stdout=log, stderr=log)
    try:
        yield started
    finally:
        started.kill()
        started.wait()


@contextmanager
def cluster(folder: Path, **doom: object) -> Iterator[tuple[str, subprocess.Popen, subprocess.Popen]]:
    """(address, one worker, another); `doom` sets the first one's DIE_IN and DIE_AFTER."""
    from distributed import Client
    from distributed.utils import json_load_robust

    place = folder / "scheduler.json"
    listen = ("--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0")
    # Without a nanny, which would start a killed worker again: this one stays dead.
    worker = ("worker", "--scheduler-file", place, "--no-nanny", "--nthreads", 1, *listen, "--name")
    preload = ("--preload", __file__) if doom else ()
    with process(folder, "scheduler", "scheduler", "--port", 0, "--scheduler-file", place, *listen):
        address = json_load_robust(str(place), timeout=STARTUP)["address"]
        with (
            process(folder, "one", *worker, "one", *preload, **doom) as one,
            process(folder, "other", *worker, "other") as other,
        ):
            with Client(address, timeout=STARTUP) as client:
                client.wait_for_workers(2, timeout=STARTUP)
            yield address, one, other


# --- What holds on a cluster ----------------------------------------------------------------------------


@pytest.mark.parametrize("reached", ["*", "sessions-*.parquet", "met-*.npy", "pairs-*.parquet"])
def test_a_worker_killed_at_its_work_changes_no_byte(tmp_path, logs, demo, reached):
    # killed while it splits logs, cuts sessions, merges what was read together, draws pairs
    work = tmp_path / "work"
    with cluster(tmp_path, DIE_IN=work, DIE_AFTER=reached) as (address, one, other):
        done = run_pairs(work, logs, "--runner", "dask", "--dask_client_address", address)
        assert done.returncode == 0, done.stderr
        assert one.wait(timeout=STARTUP) == -signal.SIGKILL
        assert other.poll() is None
    made = Pairs.open(work / "pairs")
    assert made.manifest["files"] == demo.manifest["files"]
    assert (made.rows, made.facts) == (demo.rows, demo.facts)


def test_a_worker_killed_while_it_encodes_changes_no_byte(tmp_path, tiny_model):
    from distributed import default_client

    texts = [f"notes {n} of wave and tide" for n in range(120)]
    sizes = [5] * 24  # shards enough for both workers to be at work when the first is killed
    job = Job(str(tiny_model), dim=32, title="documents", n_texts=len(texts))
    here, there = (Shards(tmp_path / place / "shards-embeddings-0", sizes, 32) for place in ("here", "there"))
    in_process(job, windows(texts, sizes, here.missing()), here)
    shared = tmp_path / "shared"
    shared.mkdir()
    # Without results, because the other worker may have encoded all the rest when this one has its model.
    doom = {"DIE_IN": shared, "DIE_AFTER": "000*-*.npy", "DIE_EMPTY_HANDED": 1}
    with cluster(tmp_path, **doom) as (address, one, other):
        options = parse_options(["--runner", "dask", "--dask_client_address", address])
        line = engine(options, EncodeConfig(temp_location=str(shared)), tmp_path / "embeddings")
        line(job, windows(texts, sizes, there.missing()), there)
        default_client().close()  # Beam's, which would go on looking for its scheduler
        assert one.wait(timeout=STARTUP) == -signal.SIGKILL
        assert other.poll() is None
    # a file's name holds the hash of its bytes
    assert [path.name for path in sorted(there.folder.iterdir())] == [
        path.name for path in sorted(here.folder.iterdir())
    ]
    assert list(shared.iterdir()) == []


def test_a_worker_encodes_with_the_threads_that_dask_gave_it(tmp_path):
    from distributed import Client

    with cluster(tmp_path) as (address, _, _), Client(address, timeout=STARTUP) as client:
        assert client.submit(encode_line._of_dask_worker).result(timeout=STARTUP) == 1  # --nthreads
    assert encode_line._of_dask_worker() is None


def test_a_log_that_cannot_be_used_is_one_line_on_a_cluster_too(tmp_path, logs):
    with cluster(tmp_path) as (address, _, _):
        options = ("--runner", "dask", "--dask_client_address", address)
        done = run_pairs(tmp_path / "work", logs, "--set", "events.user_id=reader", *options)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "no column 'reader'; it has: user_id, document_id" in last
    assert not (tmp_path / "work" / "pairs").exists()


def test_a_task_that_the_cluster_gives_up_is_one_line(tmp_path, logs, monkeypatch):
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES", "0")  # 3 dead workers by default
    work = tmp_path / "work"
    with cluster(tmp_path, DIE_IN=work, DIE_AFTER="*") as (address, one, _):
        done = run_pairs(work, logs, "--runner", "dask", "--dask_client_address", address)
        assert one.wait(timeout=STARTUP) == -signal.SIGKILL
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: --runner dask: ")
    assert "Traceback" not in done.stderr
    assert not (work / "pairs").exists()


def test_a_scheduler_that_does_not_answer_is_one_line(tmp_path, logs):
    # port 1 is reserved (tcpmux) and nobody listens there
    options = ("--dask_client_address", "tcp://127.0.0.1:1", "--dask_connection_timeout", "1")
    done = run_pairs(tmp_path / "work", logs, "--runner", "dask", *options)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: --runner dask: ")
    assert "tcp://127.0.0.1:1" in last
    assert "Traceback" not in done.stderr


def test_make_cluster_runs_until_ctrl_c_and_leaves_no_process(tmp_path):
    from distributed import Client

    log = tmp_path / "log"
    command = ["make", "cluster", "CLUSTER=127.0.0.1:18787"]
    with log.open("wb") as output:
        made = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
    try:
        wait_for(lambda: "Starting worker compute stream" in log.read_text(), "worker")
        with Client("tcp://127.0.0.1:18787", timeout=STARTUP) as client:
            client.wait_for_workers(2, timeout=STARTUP)
            pids = set(client.run(os.getpid).values()) | {client.run_on_scheduler(os.getpid)}
            hosts = {address.rpartition(":")[0] for address in client.scheduler_info()["workers"]}
        assert len(pids) == 3
        assert hosts == {"tcp://127.0.0.1"}  # a stranger who reaches a worker can run code in it
        os.killpg(made.pid, signal.SIGINT)  # what Ctrl-C does: to every process of the terminal's group
        made.wait(timeout=STARTUP)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "end of every process")
    finally:
        if made.poll() is None:
            os.killpg(made.pid, signal.SIGKILL)
