"""New versions under load: no request fails, none is answered by half a version, the old one's memory goes.

Real versions, a real server process, clients by REST and, by the official package, gRPC. The versions take
turns between two indexes that answer every query differently, so an answer tells which of them gave it.
"""

import http.client
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from serving_parts import ROOT, K, export_tuned, free_port, server_process, unit_rows, wait_for_version

from serving.client import Client

DIM, N = 16, 60
LOAD_SECONDS = 200  # TensorFlow's import takes most of it on a busy machine
N_AFTER = 50  # answers of each client after a reload, before the next one
QUERIES = unit_rows(5, DIM, seed=9)
FIRST = 7  # version

# Runs in its own process: the official client's package imports TensorFlow. Ends with its standard input.
GRPC_CLIENT = """
import json, sys, threading
import grpc, numpy as np, tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

port, queries = sys.argv[1], np.array(json.loads(sys.argv[2]), np.float32)
said = {"answers": 0, "failures": [], "versions": [], "rows": {}}
channel = grpc.insecure_channel(f"127.0.0.1:{port}")
stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
print("ready", flush=True)
while not ended.is_set():
    number = said["answers"] % len(queries)
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "index"
    request.inputs["input_1"].CopyFrom(tf.make_tensor_proto(queries[number]))
    try:
        answer = stub.Predict(request, timeout=30)
    except grpc.RpcError as error:
        said["failures"].append(f"{error.code()}: {error.details()}")
        continue
    version = answer.model_spec.version.value
    if version not in said["versions"][-1:]:
        said["versions"].append(version)
    rows = tf.make_ndarray(answer.outputs["output_2"]).tolist()
    if rows not in said["rows"].setdefault(f"{version}/{number}", []):
        said["rows"][f"{version}/{number}"].append(rows)
    said["answers"] += 1
print(json.dumps(said))
"""


def best(rows: np.ndarray, query: np.ndarray) -> list[int]:
    return np.argsort(-(rows @ query), kind="stable")[:K].tolist()


def indexes(n: int, dim: int) -> dict[str, tuple[np.ndarray, list[str]]]:
    """The same rows, from first to last and from last to first, under ids that name the index."""
    rows = unit_rows(n, dim)
    return {
        name: (some, [f"{name}{row}" for row in range(n)]) for name, some in (("a", rows), ("b", rows[::-1]))
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export_tuned(folder, **indexes(N, DIM))
    return folder


def name_of(version: int) -> str:
    return "ab"[(version - FIRST) % 2]


def publish(exported: Path, base: Path, version: int) -> None:
    """Under another name first: the folder has its number when it is whole."""
    base.mkdir(exist_ok=True)
    shutil.copytree(exported / name_of(version), base / f".{version}.partial")
    (base / f".{version}.partial").rename(base / str(version))


class RestClient(threading.Thread):
    """Asks over one connection until told to end; `serving_default` and `search` in turn.

    Attributes:
        n_answers: right ones, those of one index or the other.
        failures: what went wrong otherwise, in words.
        seen: names of the indexes that answered, repeats left out.
    """

    def __init__(self, url: str, number: int) -> None:
        super().__init__(daemon=True)
        self.n_answers, self.failures, self.seen = 0, list[str](), list[str]()
        self.ended = threading.Event()
        self._address, self._number = urlsplit(url).netloc, number
        self._expected = {
            name: [best(rows, q) for q in QUERIES] for name, (rows, _) in indexes(N, DIM).items()
        }

    def run(self) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=60)
        at = self._number
        while not self.ended.is_set():
            at += 1
            try:
                name = self._ask(connection, at % len(QUERIES), by_search=at % 2 == 0)
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                connection.close()  # the next request connects again
                continue
            self.n_answers += 1
            if self.seen[-1:] != [name]:
                self.seen.append(name)
        connection.close()

    def _ask(self, connection: http.client.HTTPConnection, number: int, by_search: bool) -> str:
        """Which index answered.

        Raises:
            ValueError: the answer is no index's.
        """
        query: Any = QUERIES[number].tolist()
        document: dict[str, Any] = {"inputs": query}
        if by_search:
            settings = {"k": K, "num_leaves_to_search": 4, "num_reordering_candidates": N}
            document = {"signature_name": "search", "inputs": {"queries": [query], **settings}}
        connection.request("POST", "/v1/models/index:predict", json.dumps(document))
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise ValueError(f"{response.status} {body!r}")
        outputs = json.loads(body)["outputs"]
        for name, expected in self._expected.items():
            wanted = [[f"{name}{row}" for row in expected[number]]] if by_search else expected[number]
            if outputs["document_ids" if by_search else "output_2"] == wanted:
                return name
        raise ValueError(f"neither index answers so: {outputs}")


@contextmanager
def grpc_client(port: int) -> Iterator[dict[str, Any]]:
    """A child that asks by gRPC meanwhile; what it saw is in the dictionary afterwards."""
    command = [sys.executable, "-c", GRPC_CLIENT, str(port), json.dumps(QUERIES.tolist())]
    child = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    said: dict[str, Any] = {}
    try:
        assert child.stdout
        assert child.stdout.readline() == "ready\n", child.stderr and child.stderr.read()
        yield said
        out, errors = child.communicate(timeout=60)
        assert child.returncode == 0, errors
        said |= json.loads(out)
    finally:
        child.kill()
        child.communicate()


@contextmanager
def rest_clients(url: str, n: int) -> Iterator[list[RestClient]]:
    clients = [RestClient(url, number) for number in range(n)]
    for client in clients:
        client.start()
    try:
        yield clients
    finally:
        for client in clients:
            client.ended.set()
        for client in clients:
            client.join()


def wait_for_answers(clients: list[RestClient], seconds: float = LOAD_SECONDS) -> None:
    """Until each client has N_AFTER more than now."""
    wanted = [client.n_answers + N_AFTER for client in clients]
    end = time.monotonic() + seconds
    while any(client.n_answers < n for client, n in zip(clients, wanted, strict=True)):
        assert time.monotonic() < end, [client.failures[-1:] for client in clients]
        time.sleep(0.01)


def rss_anon(pid: int) -> int:
    """Bytes of a process that no file backs."""
    line = next(s for s in Path(f"/proc/{pid}/status").read_text().splitlines() if s.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def reload_under_load(exported: Path, base: Path, n_reloads: int, n_clients: int) -> None:
    """One version after another while clients ask by REST and gRPC; checks all that they saw."""
    publish(exported, base, FIRST)
    last, port = FIRST + n_reloads, free_port()
    with ExitStack() as stack:
        url, _ = stack.enter_context(server_process(base, f"--port={port}"))
        with Client(url, "index") as client:
            client.wait_until_ready(deadline=LOAD_SECONDS)
        by_grpc = stack.enter_context(grpc_client(port))
        clients = stack.enter_context(rest_clients(url, n_clients))
        wait_for_answers(clients)
        for version in range(FIRST + 1, last + 1):
            publish(exported, base, version)
            wait_for_version(url, version, "AVAILABLE", LOAD_SECONDS)
            wait_for_version(url, version - 1, "END", LOAD_SECONDS)
            wait_for_answers(clients)
    assert [client.failures for client in clients] == [[]] * n_clients
    # In order, none twice: no client came back to an old version.
    order = [name_of(version) for version in range(FIRST, last + 1)]
    assert [client.seen for client in clients] == [order] * n_clients
    check_grpc(by_grpc, last)


def check_grpc(said: dict[str, Any], last: int) -> None:
    assert said["failures"] == []
    assert said["answers"] > 0
    assert said["versions"] == sorted(said["versions"])
    assert (said["versions"][0], said["versions"][-1]) == (FIRST, last)
    rows = {name: some for name, (some, _) in indexes(N, DIM).items()}
    for key, answers in said["rows"].items():
        version, number = map(int, key.split("/"))
        assert answers == [best(rows[name_of(version)], QUERIES[number])]


@pytest.mark.slow
def test_three_reloads_under_load_fail_no_request_by_rest_or_grpc(exported, tmp_path):
    reload_under_load(exported, tmp_path / "index", n_reloads=3, n_clients=4)


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_twenty_reloads_under_load_fail_no_request_by_rest_or_grpc(exported, tmp_path):
    reload_under_load(exported, tmp_path / "index", n_reloads=20, n_clients=8)


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_twenty_reloads_under_full_load_fail_no_request_and_keep_no_version_in_memory(tmp_path):
    n, dim, n_reloads = 5000, 384, 20
    exported, base = tmp_path / "exported", tmp_path / "index"
    export_tuned(exported, **indexes(n, dim))
    bodies = tmp_path / "bodies.jsonl"
    bodies.write_text("".join(json.dumps({"inputs": q.tolist()}) + "\n" for q in unit_rows(200, dim, seed=9)))
    publish(exported, base, FIRST)
    with server_process(base) as (url, process):
        with Client(url, "index") as client:
            client.wait_until_ready(deadline=LOAD_SECONDS)
        with wrk(url, bodies, n_clients=64) as counted:
            held = []
            for version in range(FIRST + 1, FIRST + 1 + n_reloads):
                publish(exported, base, version)
                wait_for_version(url, version, "AVAILABLE", LOAD_SECONDS)
                wait_for_version(url, version - 1, "END", LOAD_SECONDS)
                time.sleep(0.5)
                held.append(rss_anon(process.pid))
    assert counted["errors"] == 0
    assert counted["requests"] > 1000
    # A version that stayed would leave its rows at least. A third of them is what is kept by chance: memory
    # that the allocator does not give back, and what TensorFlow keeps of every graph that it has run.
    assert held[-1] - held[4] < (n_reloads - 5) * n * dim * 4 / 3


@contextmanager
def wrk(url: str, bodies: Path, n_clients: int) -> Iterator[dict[str, Any]]:
    """wrk meanwhile, until Ctrl-C; what it counted is in the dictionary afterwards."""
    from benchmarks.serving import read_wrk

    script = str(ROOT / "benchmarks" / "serving.lua")
    command = ["wrk", "-t1", f"-c{n_clients}", "-d3600s", "--timeout", "30s", "-s", script,
               f"{url}/v1/models/index:predict", "--", str(bodies)]  # fmt: skip
    load = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    counted: dict[str, Any] = {}
    try:
        yield counted
    finally:
        load.send_signal(signal.SIGINT)
        out = load.communicate()[0]
    counted |= read_wrk(out.strip().splitlines()[-1])
