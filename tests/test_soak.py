"""What a server holds does not grow with the requests it has answered: memory, open files, threads.

A thousand other connections are open all the while. `make soak` runs the full form: a million requests.
"""

import http.client
import json
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from serving_parts import ROOT, export_tuned, raw_connection, read_answer, server_process, unit_rows

from serving.client import Client

DIM, N = 384, 500
LOAD_SECONDS = 200  # TensorFlow's import takes most of it on a busy machine
N_IDLE = 1000
PREDICT = "/v1/models/index:predict"
MEBIBYTE = 2**20

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Held:
    """What a process holds.

    Attributes:
        rss_anon: bytes that no file backs.
    """

    rss_anon: int
    files: int
    threads: int

    @classmethod
    def by(cls, pid: int) -> "Held":
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("RssAnon:"))
        files, threads = (len([*Path(f"/proc/{pid}/{name}").iterdir()]) for name in ("fd", "task"))
        return cls(int(line.split()[1]) * 1024, files, threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model of one real version."""
    folder = tmp_path_factory.mktemp("models") / "index"
    export_tuned(folder, **{"1": (unit_rows(N, DIM), [f"d{row}" for row in range(N)])})
    return folder


@contextmanager
def serving(base: Path, *flags: str) -> Iterator[tuple[str, int]]:
    """A ready server's address and process id."""
    with server_process(base, *flags) as (url, process), Client(url, "index") as client:
        client.wait_until_ready(deadline=LOAD_SECONDS)
        client.close()
        yield url, process.pid


class Idle:
    """Connections that are open and ask for the status now and then, before the server's 50 s are over.

    Attributes:
        failures: what went wrong, in words.
    """

    def __init__(self, url: str, n: int) -> None:
        self.failures: list[str] = []
        self._ended = threading.Event()
        self._connections = [http.client.HTTPConnection(urlsplit(url).netloc, timeout=60) for _ in range(n)]
        self._ask_all()
        self._thread = threading.Thread(target=self._stay, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ask all of them once more, and let them go."""
        self._ended.set()
        self._thread.join()
        self._ask_all()
        for connection in self._connections:
            connection.close()

    def _stay(self) -> None:
        while not self._ended.wait(15):
            self._ask_all()

    def _ask_all(self) -> None:
        for number, connection in enumerate(self._connections):
            try:
                new = connection.sock is None
                connection.request("GET", "/v1/models/index")
                response = connection.getresponse()
                response.read()
                if response.status != 200 or connection.sock is None:
                    self.failures.append(f"{number}: {response.status}, new: {new}")
            except OSError as error:
                self.failures.append(f"{number}: {type(error).__name__}: {error}")
                connection.close()


@contextmanager
def idle_connections(url: str, n: int) -> Iterator[Idle]:
    idle = Idle(url, n)
    try:
        yield idle
    finally:
        idle.close()


def ask(url: str, requests: Sequence[bytes], wanted: Sequence[int], n: int) -> list[str]:
    """Ask n times over one connection; what was not answered as wanted, in words.

    Args:
        requests: sent in turn.
        wanted: the status of each.
    """
    failures = []
    with raw_connection(url, seconds=60) as (connection, file):
        for number in range(n):
            connection.sendall(requests[number % len(requests)])
            answer = read_answer(file)
            if answer.status != wanted[number % len(requests)]:
                failures.append(f"{answer.first} {answer.body!r}")
    return failures


def by_several(function: Callable[[int], list[str]], n: int) -> list[str]:
    """The results of n calls side by side, one after another."""
    found: list[list[str]] = [[] for _ in range(n)]

    def call(number: int) -> None:
        found[number] = function(number)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [line for lines in found for line in lines]


def vectors(n: int) -> list[str]:
    return [json.dumps({"inputs": [float(f"{x:.9g}") for x in row]}) for row in unit_rows(n, DIM, seed=9)]


def refused() -> list[str]:
    """Bodies of the kinds that are answered 400: what fails must not stay either."""
    short, searched = [0.5] * (DIM - 1), {"k": 0, "num_leaves_to_search": 4, "num_reordering_candidates": 9}
    return [
        json.dumps({"inputs": short}),
        json.dumps({"inputs": [[0.5] * DIM]}),
        json.dumps({"inputs": short})[:-1],
        json.dumps({"instances": ["a", "b"]}),
        json.dumps({"signature_name": "nope", "inputs": short}),
        json.dumps({"signature_name": "search", "inputs": {"queries": [[0.5] * DIM], **searched}}),
    ]


def mixed() -> tuple[list[bytes], list[int]]:
    """Requests of a hundred vectors, of two kinds by `search`, and six bad ones; and the status of each."""
    settings = {"k": 3, "num_leaves_to_search": 4, "num_reordering_candidates": 20}
    several = {"signature_name": "search", "inputs": {"queries": unit_rows(3, DIM).tolist(), **settings}}
    bodies = [(body, 200) for body in [*vectors(100), *[json.dumps(several)] * 10]]
    bodies += [(body, 400) for body in refused()]
    random.Random(7).shuffle(bodies)
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
    requests = [f"{head}{len(body)}\r\n\r\n{body}".encode() for body, _ in bodies]
    return requests, [status for _, status in bodies]


def settled(pid: int, files: int, seconds: float = 10) -> Held:
    """What is held once no more than so many files are open, or after so many seconds."""
    end = time.monotonic() + seconds
    while (held := Held.by(pid)).files > files and time.monotonic() < end:
        time.sleep(0.05)
    return held


def test_twenty_thousand_requests_leave_memory_files_and_threads_as_they_were(base):
    n_clients, n_warm, n_asked = 4, 3000, 20_000
    requests, wanted = mixed()
    with serving(base) as (url, pid):
        before = settled(pid, 0, seconds=0.5)
        with idle_connections(url, N_IDLE) as idle:
            failures = by_several(lambda _: ask(url, requests, wanted, n_warm // n_clients), n_clients)
            warm = settled(pid, before.files + N_IDLE)
            failures += by_several(lambda _: ask(url, requests, wanted, n_asked // n_clients), n_clients)
            after = settled(pid, warm.files)
        last = settled(pid, before.files)
    assert failures == idle.failures == []
    assert (after.files, after.threads) == (warm.files, warm.threads)
    assert N_IDLE < warm.files <= before.files + N_IDLE
    assert last.files <= before.files
    # The least that a forgotten request leaves is its future and what that holds: half a kilobyte.
    assert after.rss_anon - warm.rss_anon < n_asked * 512


@pytest.mark.soak
@pytest.mark.timeout(5400)
def test_a_million_requests_leave_memory_files_and_threads_as_they_were(base, tmp_path):
    n_asked, n_warm, n_clients = 1_000_000, 100_000, 64
    good, (requests, wanted) = tmp_path / "bodies.jsonl", mixed()
    good.write_text("".join(body + "\n" for body in vectors(1000)))
    with serving(base) as (url, pid):
        before = settled(pid, 0, seconds=0.5)
        with idle_connections(url, N_IDLE) as idle:
            failures: list[str] = []
            marks: list[Held] = []
            done = 0
            while done < n_warm + n_asked:
                n, n_errors = by_wrk(url, good, n_clients, seconds=10)
                failures += ["wrk"] * n_errors
                failures += by_several(lambda _: ask(url, requests, wanted, 500), 4)
                done += n + 2000
                marks.append(settled(pid, before.files + N_IDLE))
                if done <= n_warm:
                    marks.clear()
        last = settled(pid, before.files)
    assert failures == idle.failures == []
    assert len({mark.threads for mark in marks}) == 1, marks
    files = [mark.files for mark in marks]
    assert max(files) - min(files) <= 1, files  # a connection of the load's may just be closing
    assert last.files <= before.files
    # Less than two pointers a request: nothing that belongs to a request stays.
    figures = [mark.rss_anon for mark in marks]
    assert np.mean(figures[-3:]) - np.mean(figures[:3]) < n_asked * 16, [f // MEBIBYTE for f in figures]


def by_wrk(url: str, bodies: Path, n_clients: int, seconds: int) -> tuple[int, int]:
    """Requests answered, and errors."""
    from benchmarks.serving import read_wrk

    command = ["wrk", "-t1", f"-c{n_clients}", f"-d{seconds}s", "--timeout", "30s",
               "-s", str(ROOT / "benchmarks" / "serving.lua"), url + PREDICT, "--", str(bodies)]  # fmt: skip
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    counted = read_wrk(out.strip().splitlines()[-1])
    return counted["requests"], counted["errors"]
