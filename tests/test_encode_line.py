"""Shards encoded by Beam workers: the bytes of one process, found again after a kill, nothing left behind."""

import errno
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from test_encode import TINY, make_model, make_pairs
from test_storage import ObjectStore

from pipeline import __main__ as cli
from pipeline import encode as stage
from pipeline import encode_line, progress, runners, storage, work
from pipeline import shards as shards_
from pipeline.config import EncodeConfig
from pipeline.encode_line import EncodeShard, engine
from pipeline.errors import ConfigError, InputError, PipelineError
from pipeline.shards import Job, Shards

ROOT = Path(__file__).parents[1]
SIZES = [5, 5, 3]
WORDS = ("wave", "tide", "harbour", "ship", "sail", "oven", "dough")
TEXTS = [f"{word} notes {n}" for n, word in enumerate(WORDS * 2)][:13]


@pytest.fixture
def job(tiny_model) -> Job:
    return Job(str(tiny_model), dim=32, title="documents", n_texts=len(TEXTS))


@pytest.fixture(scope="session")
def encoded(tmp_path_factory, tiny_model) -> dict[str, bytes]:
    """The shards' files as this process makes them."""
    made = shards_in(tmp_path_factory.mktemp("in_process"))
    job = Job(str(tiny_model), dim=32, title="documents", n_texts=len(TEXTS))
    shards_.in_process(job, windows(made), made)
    return files(made)


def shards_in(folder: Path) -> Shards:
    return Shards(folder / "partial" / "shards-embeddings-0123456789abcdef", SIZES, 32)


def windows(made: Shards):
    return shards_.windows(TEXTS, SIZES, made.missing())


def files(made: Shards) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in made.folder.iterdir()}


def encode(folder: Path, job: Job, temp_location: str | None = None, flags: tuple[str, ...] = ()) -> Shards:
    """A run of the line: its driver's shards."""
    made = shards_in(folder)
    config = EncodeConfig(temp_location=temp_location)
    engine(runners.parse_options(flags), config, folder / "embeddings")(job, windows(made), made)
    return made


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- The same bytes ------------------------------------------------------------------------------------


def test_threads_make_the_shards_of_one_process(tmp_path, job, encoded):
    flags = ("--direct_num_workers", "3", "--direct_running_mode", "multi_threading")
    made = encode(tmp_path, job, flags=flags)
    assert files(made) == encoded
    assert made.missing() == []
    assert left_in(tmp_path / "partial") == [made.folder.name]


@pytest.mark.slow
def test_two_processes_make_the_shards_of_one_and_say_nothing_of_themselves(tmp_path, job, encoded, capfd):
    made = shards_in(tmp_path)
    engine(runners.on_processes(2), EncodeConfig(), tmp_path / "embeddings")(job, windows(made), made)
    assert files(made) == encoded
    said = [line.strip() for line in capfd.readouterr().err.splitlines()]
    assert [line for line in said if line and not line.startswith("encode: ")] == []


@pytest.mark.parametrize("place", ["disk", "memory://bucket/tmp"])
def test_what_is_shared_goes_through_temp_location_and_is_gone_at_the_end(tmp_path, job, encoded, place):
    shared = str(tmp_path / "shared") if place == "disk" else place
    storage.make_folder(shared)
    seen: list[str] = []
    made = shards_in(tmp_path)
    line = engine(runners.parse_options([]), EncodeConfig(temp_location=shared), tmp_path / "embeddings")
    names = ".embeddings.shards-*/texts-*"
    line(job, looking(windows(made), lambda: seen.extend(storage.names(shared, names))), made)
    assert files(made) == encoded
    assert len(seen) == 1 + 2  # after the first window and after the second
    assert storage.names(shared, ".*/*") == storage.names(shared, ".*") == []
    assert left_in(tmp_path / "partial") == [made.folder.name]
    ObjectStore.files.clear()


def looking(windows, look: Callable[[], None]):
    """The windows; looks before the second and each later one."""
    for number, texts in windows:
        if number:
            look()
        yield number, texts


def test_a_shard_that_is_there_is_not_encoded_again_by_a_second_attempt(tmp_path, job, encoded, monkeypatch):
    # as when a runner loses a worker, and gives all of its elements to another
    folder = str(tmp_path)
    encode_line._send_texts(folder, enumerate([TEXTS[:5]]), {0})
    first = EncodeShard(job, job.model, folder, progress.marks_of(folder, "documents"), 1)
    assert first(0) == {"shards": 1}
    monkeypatch.setattr(shards_, "encode_shard", never)
    assert first(0) == {"shards": 1}
    assert [path.name for path in tmp_path.glob("*.npy")] == [min(encoded)]


def never(*_: object) -> None:
    raise AssertionError("was encoded again")


# --- Kills ---------------------------------------------------------------------------------------------


@pytest.fixture
def killed(tmp_path, job, monkeypatch) -> str:
    """A shared folder in which workers finished all shards for a driver that died before it fetched them."""
    shared = str(tmp_path / "shared")
    storage.make_folder(shared)
    with dying(monkeypatch):
        encode(tmp_path, job, shared)
    assert len(storage.names(shared, ".embeddings.shards-*/*.npy")) == len(SIZES)
    return shared


@contextmanager
def dying(monkeypatch) -> Iterator[None]:
    """A driver that dies when its workers are done."""
    with monkeypatch.context() as patch:
        patch.setattr(encode_line, "raise_failure", died)
        patch.setattr(encode_line, "_collect", lambda folder, made: None)
        with pytest.raises(KeyboardInterrupt):
            yield


def died(*_: object) -> None:
    raise KeyboardInterrupt


def test_shards_that_workers_finished_for_a_killed_driver_are_found_again(
    tmp_path, job, encoded, killed, monkeypatch
):
    monkeypatch.setattr(shards_, "encode_shard", never)
    assert files(encode(tmp_path, job, killed)) == encoded
    assert storage.names(killed, ".*") == []


def test_a_damaged_shard_is_said_and_encoded_again(tmp_path, job, encoded, killed, capsys):
    damaged = Path(storage.names(killed, ".embeddings.shards-*/00001-*.npy")[0])
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert files(encode(tmp_path, job, killed)) == encoded
    said = capsys.readouterr().err
    assert f"encode: {damaged}: damaged, it is encoded again" in said
    assert "encode: 5 documents in 1 shard\n" in said


def test_shards_of_other_texts_are_removed_and_not_taken(tmp_path, job, encoded, killed):
    # as when the version before was removed: more texts must be encoded for the same artefact
    made = Shards(tmp_path / "partial" / "shards-embeddings-fedcba9876543210", [3], 32)
    config = EncodeConfig(temp_location=killed)
    line = engine(runners.parse_options([]), config, tmp_path / "embeddings")
    line(job, shards_.windows(TEXTS[10:], [3], [0]), made)
    assert [path.read_bytes() for path in made.folder.iterdir()] == [encoded[max(encoded)]]
    assert storage.names(killed, ".*") == []


def test_a_run_that_needs_no_workers_takes_what_they_left_and_removes_it(tmp_path, encoded, killed):
    made = shards_in(tmp_path)
    encode_line.fetch(tmp_path / "partial", made)
    assert (files(made), made.missing()) == (encoded, [])
    assert storage.names(killed, ".*") == []
    encode_line.fetch(tmp_path / "partial", made)  # there is nothing any more
    assert left_in(tmp_path / "partial") == [made.folder.name]


def test_where_no_shards_are_needed_what_workers_left_is_removed(tmp_path, killed):
    encode_line.fetch(tmp_path / "partial", None)
    assert storage.names(killed, ".*") == []


@pytest.mark.slow
def test_the_stage_goes_on_without_workers_with_what_they_left(tmp_path, tiny_model, monkeypatch):
    model, out = make_model(tmp_path / "model", tiny_model), tmp_path / "embeddings"
    pairs = make_pairs(tmp_path / "pairs", {f"d{n:02}": text for n, text in enumerate(TEXTS)})
    whole = stage.run(TINY, model, pairs, tmp_path / "whole")
    settings = replace(TINY, temp_location=str(tmp_path / "shared"))
    line = engine(runners.parse_options([]), settings, out)
    with dying(monkeypatch):
        stage.run(settings, model, pairs, out, engine=line)
    assert len(left_in(tmp_path / "shared")) == 1
    monkeypatch.setattr(shards_, "in_process", never)
    made = stage.run(TINY, model, pairs, out)
    assert made.manifest["files"] == whole.manifest["files"]
    assert left_in(tmp_path / "shared") == []
    assert list(out.glob("shards-*")) == []


def test_a_driver_with_other_settings_of_the_place_finds_what_was_left(
    tmp_path, job, encoded, killed, monkeypatch
):
    monkeypatch.setattr(shards_, "encode_shard", never)
    assert files(encode(tmp_path, job, temp_location=None)) == encoded
    assert storage.names(killed, ".*") == []


KILLED_DRIVER = """
import sys
from pathlib import Path
from pipeline import runners
from pipeline.config import EncodeConfig
from pipeline.encode_line import engine
from pipeline.shards import Job, Shards, windows
model, folder = sys.argv[1], Path(sys.argv[2])
texts, sizes = [f"wave {n}" for n in range(4000)], [2] * 2000
made = Shards(folder / "partial" / "shards-embeddings-0", sizes, 32)
line = engine(runners.on_processes(2), EncodeConfig(), folder / "embeddings")
line(Job(model, dim=32, title="documents"), windows(texts, sizes, made.missing()), made)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="by Linux's prctl")
def test_worker_processes_of_a_killed_driver_end_and_say_nothing(tmp_path, job):
    command = [sys.executable, "-W", "ignore", "-c", KILLED_DRIVER, job.model, str(tmp_path)]
    with (tmp_path / "said").open("wb") as said:
        driver = subprocess.Popen(command, cwd=ROOT, stderr=said)
    try:
        wait_for(lambda: any((tmp_path / "partial").glob("shards-line-*/0*-*.npy")))
        workers = children(driver.pid)
    finally:
        driver.kill()
        driver.wait()
    assert len(workers) >= 2
    wait_for(lambda: not any(is_running(pid) for pid in workers))
    assert "Traceback" not in (tmp_path / "said").read_text()
    assert "failed" not in (tmp_path / "said").read_text()


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    """Processes that a process has started, and those that they have; one that ends meanwhile is none."""
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def is_running(pid: int) -> bool:
    """Whether a process is there, and not only what a container that reaps none keeps of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_another_artefact_of_the_same_path_neither_takes_nor_removes_them(tmp_path, job, killed, monkeypatch):
    # as on a machine beside this one, or in this work folder with settings that no row's key holds
    left = storage.names(killed, ".embeddings.shards-*/*.npy")
    assert len(left) == len(SIZES)
    shutil.move(tmp_path / "partial", tmp_path / "of the other")
    begun = []
    real = shards_.encode_shard
    monkeypatch.setattr(shards_, "encode_shard", lambda *given: begun.append(given) or real(*given))
    encode(tmp_path, job, killed)
    assert len(begun) == len(SIZES)
    assert storage.names(killed, ".embeddings.shards-*/*.npy") == left


# --- Failures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["a file", "a folder in a file", "no file system"])
def test_a_temp_location_that_cannot_be_written_is_said_before_any_work(tmp_path, place):
    (tmp_path / "file").touch()
    given = {
        "a file": tmp_path / "file",
        "a folder in a file": tmp_path / "file" / "folder",
        "no file system": "nfs://server/folder",
    }[place]
    with pytest.raises(ConfigError) as raised:
        engine(runners.parse_options([]), EncodeConfig(temp_location=str(given)), tmp_path / "embeddings")
    assert str(raised.value).startswith(f"encode.temp_location: {given}: ")
    assert str(raised.value).endswith("; wanted a folder that this machine and all workers can write")
    assert "\n" not in str(raised.value)


def test_trying_to_write_a_temp_location_leaves_nothing(tmp_path):
    shared = tmp_path / "made" / "shared"
    engine(runners.parse_options([]), EncodeConfig(temp_location=str(shared)), tmp_path / "embeddings")
    assert left_in(shared) == []


def test_a_model_that_a_worker_cannot_load_is_one_line_that_names_it(tmp_path, job):
    broken = shutil.copytree(job.model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError) as raised:
        encode(tmp_path, replace(job, model=str(broken)))
    assert str(broken) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "encode-" not in str(raised.value)  # the worker's own copy is gone by now


def test_a_failure_keeps_what_was_finished_and_begins_nothing_more(tmp_path, job, encoded, monkeypatch):
    begun = []

    def second_fails(job: Job, texts: list[str], encoder: object):
        begun.append(texts)
        if len(begun) == 2:
            raise InputError("this text is none")
        return real(job, texts, encoder)

    real = shards_.encode_shard
    monkeypatch.setattr(shards_, "encode_shard", second_fails)
    one = ("--direct_num_workers", "1", "--direct_running_mode", "multi_threading")
    with pytest.raises(InputError, match=r"^this text is none$"):
        encode(tmp_path, job, flags=one)
    assert len(begun) == 2
    made = shards_in(tmp_path)
    assert len(made.missing()) == 2
    assert files(encode(tmp_path, job, flags=one)) == encoded
    assert len(begun) == 4


def test_of_a_line_that_breaks_shards_alone_are_left(tmp_path, job, encoded, monkeypatch):
    # a mark of progress would count in the next run's bar
    with monkeypatch.context() as patch:
        patch.setattr(encode_line, "write_counts", breaks)
        with pytest.raises(RuntimeError, match="the runner is gone"):
            encode(tmp_path, job)
    (folder,) = (tmp_path / "partial").glob("shards-line-*")
    assert left_in(folder) == sorted(encoded)
    assert files(encode(tmp_path, job)) == encoded


def breaks(*_: object) -> None:
    raise RuntimeError("the runner is gone")


def test_a_worker_whose_disk_is_full_is_one_line(tmp_path, job, encoded, monkeypatch):
    def full(path: str):
        if path.endswith(".npy"):
            raise OSError(errno.ENOSPC, "No space left on device", path)
        return created(path)

    created = storage.created
    with monkeypatch.context() as patch:
        patch.setattr(storage, "created", full)
        with pytest.raises(InputError, match=r"0000\d-\w+\.npy: the disk is full"):
            encode(tmp_path, job)
    assert files(encode(tmp_path, job)) == encoded


def test_shards_that_vanish_are_said(tmp_path, job, monkeypatch):
    monkeypatch.setattr(encode_line, "_collect", lambda folder, made: None)
    with pytest.raises(PipelineError, match=r"of 3 shards 3 are not there or damaged, first number 0"):
        encode(tmp_path, job)


# --- Cores ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "n"),
    [("3,2", 3), (" 2 ", 2), ("1", 1), ("99", 8), ("", 8), ("many", 8), ("0", 8), ("-2", 8)],
)
def test_the_first_number_of_omp_num_threads_bounds_the_cores(monkeypatch, said, n):
    # OpenMP: a list of positive integers, one for each level of nested parallel regions
    monkeypatch.setattr(runners.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert runners.n_cores() == n


@pytest.mark.parametrize(
    ("cores", "wanted", "device", "n"),
    [
        (15, "auto", "cpu", 1),
        (16, "auto", "cpu", 2),
        (32, "auto", "cpu", 4),
        (32, "auto", "cuda", 1),  # one process reaches all of a machine's GPUs
        (2, 3, "cpu", 3),
        (32, 1, "cpu", 1),
    ],
)
def test_one_process_encodes_for_eight_cores(monkeypatch, cores, wanted, device, n):
    monkeypatch.setattr(runners, "n_cores", lambda: cores)
    assert runners.n_processes(wanted, lambda: device) == n


@pytest.mark.parametrize(
    ("flags", "cores"),
    [
        (("--direct_num_workers", "3", "--direct_running_mode", "multi_processing"), 2),
        (("--direct_num_workers", "0", "--direct_running_mode", "multi_processing"), 1),  # Beam: one a core
        (("--direct_num_workers", "3", "--direct_running_mode", "multi_threading"), 7),  # they take turns
        ((), 7),
    ],
)
def test_a_worker_computes_with_its_share_of_the_cores(monkeypatch, flags, cores):
    monkeypatch.setattr(runners, "n_cores", lambda: 7)
    assert runners.parse_options(flags).cores_a_worker == cores


def test_pytorch_computes_with_that_many_threads(tmp_path, job, monkeypatch):
    folder, seen = str(tmp_path), []
    encode_line._send_texts(folder, enumerate([TEXTS[:5]]), {0})
    monkeypatch.setattr(shards_, "encode_shard", lambda *_: seen.append(torch.get_num_threads()))
    monkeypatch.setattr(shards_, "npy", lambda _: b"rows")
    before = torch.get_num_threads()
    try:
        EncodeShard(job, job.model, folder, f"{folder}/marks", before + 1)(0)
    finally:
        torch.set_num_threads(before)
    assert seen == [before + 1]


# --- The command ---------------------------------------------------------------------------------------


def test_one_process_without_a_runner_needs_no_beam():
    code = (
        "import sys; from pipeline import __main__ as cli, config, encode; "
        "assert cli._engine(config.EncodeConfig(processes=1), 'out', None) is None; "
        "assert 'apache_beam' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_processes_are_wanted_by_setting(tmp_path):
    line = cli._engine(EncodeConfig(processes=2), tmp_path, None)
    assert line.options.beam.get_all_options()["direct_num_workers"] == 2


def test_all_hands_beams_options_to_the_stages_that_run_on_it(tmp_path, monkeypatch):
    given = {}

    def note(command: list[str], stage: str, lock: int) -> tuple[int, dict]:
        given[stage] = "--runner" in command
        return 0, {}

    monkeypatch.setattr(work, "run_process", note)
    monkeypatch.setattr(work, "table", lambda *_: "")
    config = tmp_path / "config.yaml"
    config.write_text("documents: {paths: [documents.jsonl]}\n", encoding="utf-8")
    assert cli.main(["all", "--config", str(config), "--work", str(tmp_path / "w"), "--runner", "dask"]) == 0
    assert [stage for stage, has in given.items() if has] == ["pairs", "encode"]


def test_another_stage_takes_no_option_of_beam(tmp_path, capsys):
    arguments = ["train", "--config", "none.yaml", "--work", str(tmp_path), "--runner", "dask"]
    assert cli.main(arguments) == ConfigError.exit_code
    assert "--runner dask: not an option of `train`" in capsys.readouterr().err
