"""What the serving tests share: a small published index, a stand-in searcher, servers on free ports."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from serving.client import Client
from serving.coalescing import Searches
from serving.errors import ServingError
from serving.flags import Flags
from serving.handles import LoadError
from serving.http_limits import Limits
from serving.monitoring import Monitoring
from serving.protocol import RequestError, Signature, Tensor, TensorInfo
from serving.server import IndexApp, make_server
from serving.versions import Models
from serving.wanted import ModelConfig

K = 3
ROOT = Path(__file__).parent.parent

# Runs in its own process: TensorFlow stays out of pytest's.
EXPORT = """
import sys
import numpy as np, tensorflow as tf
from tensorflow_recommenders.layers.factorized_top_k import ScaNN
rows, k, out = np.load(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
layer = ScaNN(k=k, num_leaves=1, num_leaves_to_search=1, num_reordering_candidates=len(rows))
layer.index(tf.constant(rows))
layer(tf.constant(rows[0]))
tf.saved_model.save(layer, out, options=tf.saved_model.SaveOptions(namespace_whitelist=["Scann"]))
"""

EXPORT_TUNED = """
import sys
import numpy as np
from pipeline.scann_layer import TunedScaNN
given = np.load(sys.argv[1])
for name in sys.argv[3:]:
    rows, ids = given[name + ".rows"], given[name + ".ids"]
    leaves = None if name == "exact" else 4
    layer = TunedScaNN(
        k=int(sys.argv[2]), num_leaves=leaves, num_leaves_to_search=4, num_reordering_candidates=len(rows)
    )
    layer.index(rows, ids).save(str(given[name + ".folder"]))
    layer.release()
"""


def unit_rows(n: int, dim: int, seed: int = 7) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def export(rows: np.ndarray, folder: Path, k: int = K) -> None:
    """A real SavedModel of the tfrs ScaNN layer that searches every row."""
    environment = os.environ | {"TF_USE_LEGACY_KERAS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    with tempfile.NamedTemporaryFile(suffix=".npy") as matrix:
        np.save(matrix, rows)
        matrix.flush()
        command = [sys.executable, "-c", EXPORT, matrix.name, str(k), str(folder)]
        subprocess.run(command, check=True, env=environment, capture_output=True)


def export_tuned(folder: Path, k: int = K, **indexes: tuple[np.ndarray, Sequence[str]]) -> None:
    """Real SavedModels of TunedScaNN, FOLDER/NAME each, of rows and their ids; `exact` has no tree.

    By default every row is rescored.
    """
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    given = {}
    for name, (rows, ids) in indexes.items():
        given |= {f"{name}.rows": rows, f"{name}.ids": np.array(ids), f"{name}.folder": str(folder / name)}
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        np.savez(file, **given)
        file.flush()
        command = [sys.executable, "-c", EXPORT_TUNED, file.name, str(k), *indexes]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class RowsSearcher:
    """Stands in for a SavedModel: exact search in NumPy, with ScaNN's refusal of a wrong width."""

    def __init__(self, rows: np.ndarray, k: int = K) -> None:
        self.rows, self.k = rows, k
        inputs = {"input_1": TensorInfo("serving_default_input_1:0", "DT_FLOAT", (-1,))}
        outputs = {
            "output_1": TensorInfo("StatefulPartitionedCall:0", "DT_FLOAT", None),
            "output_2": TensorInfo("StatefulPartitionedCall:1", "DT_INT32", None),
        }
        self.signatures = {"serving_default": Signature(inputs, outputs, "tensorflow/serving/predict")}

    def close(self) -> None: ...

    def run(self, signature_name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        query = inputs["input_1"]
        if query.shape != self.rows.shape[1:]:
            raise RequestError("INVALID_ARGUMENT", "Query doesn't match dataset dimsensionality")
        with np.errstate(invalid="ignore"):  # NaN and infinities are numbers too
            scores = self.rows @ np.asarray(query.values, np.float32)
        best = np.argsort(-scores, kind="stable")[: self.k]
        return {
            "output_1": Tensor("DT_FLOAT", best.shape, scores[best].tolist()),
            "output_2": Tensor("DT_INT32", best.shape, best.tolist()),
        }


def open_rows(folder: Path) -> RowsSearcher:
    """Opens a "version" that is one rows.npy."""
    if not (folder / "rows.npy").exists():
        raise LoadError("NOT_FOUND", f"Could not find rows.npy in {folder}")
    return RowsSearcher(np.load(folder / "rows.npy"))


def publish_rows(base: Path, version: int, rows: np.ndarray) -> None:
    (base / str(version)).mkdir(parents=True)
    np.save(base / str(version) / "rows.npy", rows)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def rows_models(base: Path) -> Models:
    """The versions of model `index` under a folder, loaded; one that fails is tried once."""
    models = Models([ModelConfig("index", base)], open_rows, max_num_load_retries=0)
    models.poll()
    return models


@contextmanager
def rows_server(base: Path, limits: Limits | None = None, **flags: Any) -> Iterator[tuple[str, Models]]:
    """The real application on a real socket, in this process, over `open_rows` versions.

    Args:
        limits: of connections; None: those of the flags.
        flags: of the server, by name.
    """
    models, monitoring = rows_models(base), Monitoring()
    monitoring.watch_versions(models.states)
    searches = Searches(monitoring)
    with app_server(IndexApp(models, searches, monitoring, Flags(**flags)), limits) as url:
        yield url, models
    searches.close()
    models.close()


@contextmanager
def app_server(app: IndexApp, limits: Limits | None = None) -> Iterator[str]:
    """An application on a real socket, in this process."""
    app.limits = limits or app.limits
    listener = socket.create_server(("127.0.0.1", 0))
    server = make_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


# The server's own process but for what a version is: no framework is loaded, so that it starts at once.
SERVE_ROWS = """
import sys
from serving import searcher, server
from serving.flags import parse
from serving_parts import open_rows
searcher.Searcher.open = open_rows
server.warm_up = lambda servable, folder, **_: None
server.serve(parse(sys.argv[1:]))
"""


@contextmanager
def server_process(base: Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """`python -m serving` as a user starts it: model `index`, REST alone, a failed load is tried once."""
    with _process(["-m", "serving"], base, *flags) as started:
        yield started


@contextmanager
def rows_process(
    base: Path, *flags: str, port: int | None = None, is_awaited: bool = True
) -> Iterator[tuple[str, subprocess.Popen]]:
    """The same over `open_rows` versions; ready, where that is awaited."""
    with _process(["-c", SERVE_ROWS], base, *flags, port=port) as (url, process):
        if is_awaited:
            with Client(url, "index") as client:
                client.wait_until_ready(deadline=60, poll_seconds=0.02)
        yield url, process


@contextmanager
def _process(
    program: Sequence[str], base: Path, *flags: str, port: int | None = None
) -> Iterator[tuple[str, subprocess.Popen]]:
    port = port or free_port()
    own = {
        "rest_api_port": port, "port": 0, "model_name": "index", "model_base_path": base,
        "max_num_load_retries": 0,
    }  # fmt: skip
    given = {flag.removeprefix("--").partition("=")[0] for flag in flags}
    command = [sys.executable, *program, *flags]
    command += [f"--{name}={value}" for name, value in own.items() if name not in given]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield f"http://127.0.0.1:{port}", process
    except ServingError as error:
        if process.poll() is None:
            raise
        said = process.stderr.read() if process.stderr else ""
        raise AssertionError(f"the server ended with {process.returncode}: {said}") from error
    finally:
        process.kill()
        process.communicate()


@contextmanager
def raw_connection(url: str, seconds: float = 10) -> Iterator[tuple[socket.socket, BinaryIO]]:
    """A bare socket to a server, and a reader of it: clients hide how a server behaves."""
    host, _, port = url.removeprefix("http://").partition(":")
    with (
        socket.create_connection((host, int(port)), seconds) as connection,
        connection.makefile("rb") as file,
    ):
        yield connection, file


class Answer(NamedTuple):
    """`first` is the status line; `headers` by lower-case name."""

    first: str
    headers: dict[str, str]
    body: bytes

    @property
    def status(self) -> int:
        return int(self.first.split(" ")[1])


def read_answer(file: BinaryIO, *, to_end: bool = False) -> Answer:
    """The next answer of a connection.

    Args:
        to_end: the body ends with the connection, as where no length is told.
    """
    lines: list[str] = []
    while not lines or lines[-1]:
        line = file.readline()
        assert line.endswith(b"\r\n"), f"the connection ended after {lines} {line!r}"
        lines.append(line[:-2].decode("latin-1"))
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:-1])}
    body = file.read() if to_end else file.read(int(headers.get("content-length", 0)))
    return Answer(lines[0], headers, body)


def wait_for_version(url: str, version: int, state: str, seconds: float = 60) -> None:
    """Until a row says so; fails when it never does."""
    end = time.monotonic() + seconds
    with Client(url, "index") as client:
        while time.monotonic() < end:
            if (str(version), state) in [(row["version"], row["state"]) for row in client.status()]:
                return
            time.sleep(0.05)
    raise AssertionError(f"version {version} did not become {state} in {seconds} s")


def curl(*arguments: str) -> tuple[int, str, str]:
    """curl as a user runs it: status, content type, body."""
    command = ["curl", "-sS", "--path-as-is", "-w", "\n%{http_code} %{content_type}", *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    body, _, last = output.rpartition("\n")
    status, _, content_type = last.partition(" ")
    return int(status), content_type, body


def predict_body(vector: Sequence[float] | np.ndarray, key: str = "inputs") -> str:
    return json.dumps({key: np.asarray(vector, dtype=float).tolist()})
