"""Benchmark of the local server under load, beside FastAPI with tfrs's layer and the graph without a server.

    python benchmarks/corpus.py work/bench/corpus                real vectors, once
    python benchmarks/serving.py                                 173,000 rows: builds once, then 15 minutes
    python benchmarks/serving.py --made 20000 --rounds 1 --seconds 2      to try it

wrk holds 1, 8, 64 and 512 keep-alive connections from this machine; each sends one vector, waits for the
answer and sends another one of 2,000 real queries (a closed loop). gRPC's load is Python's own asyncio client
in several processes, which cost about as much as the server does: a lower bound. Every server is one process
and has been asked before it is timed: its answers must reach the recall that its index was set to.

Two versions over the same rows, each with the fastest settings of one recall@10: this project's index,
and tfrs's layer tuned by hand. The server is asked with both and FastAPI with tfrs's, so that what the server
gains and what the index gains are seen apart. Of the ways in which FastAPI is written (serving_peer.py) the
fastest is taken. All servers are up at once, those that are not asked are idle, and they take turns: the
median round counts.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for when it is run as a file

from benchmarks import machine as machine_
from benchmarks import serving_tables
from benchmarks.index_systems import exact_search
from benchmarks.serving_models import K, recall_of
from pipeline.errors import InputError, PipelineError
from serving.client import numbers
from serving.errors import ServingError

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).parent
LIBRARIES = ("uvicorn", "fastapi", "grpcio", "tensorflow", "scann", "numpy")
N_QUERIES = 2000
N_CHECKED = 200  # queries whose answers are judged before anything is timed
RECALL_SLACK = 0.03  # of 2,000 answers from 200 queries; more would be another index than the one built
START_SECONDS = 180.0  # of a server, to be ready
STOP_SECONDS = 30.0
WARM_SECONDS = 1.0  # before each measurement, the same load
DIM = 384  # of --made
VARIANTS = tuple(
    f"{called}-{handler}" for called in ("layer", "signature") for handler in ("threads", "loop")
)
EXAMPLES = """examples:
  python benchmarks/serving.py --json work/bench/serving.json --markdown serving.md --plot serving.png
  python benchmarks/serving.py --systems tuned fastapi --clients 1 64 --rounds 3
  python benchmarks/serving.py --systems tuned --flag=--coalesce=false
  python benchmarks/serving.py --rows-from work/bench/corpus-1500000 --recall 0.98

exit codes: 0 done, 1 a server failed, 2 bad arguments or input
"""

Entry = dict[str, Any]


@dataclass(frozen=True)
class System:
    """What is measured: which version, behind what."""

    title: str
    version: str  # which of serving_models.py's builds
    kind: str  # "server", "fastapi", "grpc"


SYSTEMS = {
    "tuned": System("this server, this index", "tuned", "server"),
    "tfrs": System("this server, tfrs's layer", "tfrs", "server"),
    "fastapi": System("FastAPI, tfrs's layer", "tfrs", "fastapi"),
    "tuned-grpc": System("this server by gRPC, this index", "tuned", "grpc"),
    "tfrs-grpc": System("this server by gRPC, tfrs's layer", "tfrs", "grpc"),
}


class FailedError(PipelineError):
    """A process of the benchmark did not do its work."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the return value is the exit code."""
    options = parsed(arguments)
    try:
        results = benchmark(options)
    except (PipelineError, ServingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    print(serving_tables.report(results, "simple"))
    for file, write in ((options.markdown, _write_markdown), (options.plot, serving_tables.draw)):
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            write(results, file)
    return 0


def _write_markdown(results: Entry, file: Path) -> None:
    file.write_text(serving_tables.report(results, "pipe") + "\n", encoding="utf-8")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--rows-from", type=Path, default=Path("work/bench/corpus"), metavar="DIR",
        help="rows.npy and queries.npy, float32, unit length; default work/bench/corpus")  # fmt: skip
    add(
        "--made",
        type=int,
        metavar="N",
        help=f"instead of them: N drawn rows of {DIM} numbers, around centres",
    )
    add("--n-rows", type=int, metavar="N", help="the first of them; default: all")
    add("--recall", type=float, default=0.95, metavar="R", help="recall@10 of both versions, default 0.95")
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="NAME",
        help=f"default all: {', '.join(SYSTEMS)}")  # fmt: skip
    add("--clients", type=int, nargs="+", default=[1, 8, 64, 512], metavar="N", help="connections; default"
        " 1 8 64 512")  # fmt: skip
    add("--seconds", type=float, default=5, metavar="S", help="of a measurement, default 5")
    add("--rounds", type=int, default=5, metavar="N", help="over systems and clients in turn, default 5")
    add("--fastapi", choices=VARIANTS, metavar="WAY", help=f"of {', '.join(VARIANTS)}; default: all are tried"
        " and the fastest is taken")  # fmt: skip
    add("--flag", action="append", default=[], metavar="FLAG", help="for this project's server, such as"
        " --flag=--coalesce=false; may be repeated")  # fmt: skip
    add("--no-bare", action="store_true", help="leave out the graph without a server")
    add("--work", type=Path, default=Path("work/bench/serving"), metavar="DIR", help="for what is built")
    add("--json", type=Path, metavar="FILE", help="every round's figures")
    add("--markdown", type=Path, metavar="FILE", help="write the table there too")
    add("--plot", type=Path, metavar="FILE", help="PNG or SVG, by its ending")
    options = parser.parse_args(arguments)
    for name in ("made", "n_rows", "rounds", *["clients"] * len(options.clients)):
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < 1:
                parser.error(f"--{name.replace('_', '-')} is {value}, wanted 1 or more")
    if not 0 < options.recall <= 1:
        parser.error(f"--recall is {options.recall}, wanted more than 0, 1 at most")
    if options.seconds <= 0:
        parser.error(f"--seconds is {options.seconds}, wanted more than 0")
    return options


def benchmark(options: argparse.Namespace) -> Entry:
    """Build what is not built, start all servers, measure in turn."""
    machine = machine_.describe(*LIBRARIES)
    needs = {SYSTEMS[name].kind for name in options.systems}
    if needs & {"server", "fastapi"} and not shutil.which("wrk"):
        raise InputError("wrk is not on the PATH: apt-get install wrk")
    data = Data(options)
    versions = {version: data.version(version) for version in _versions(options.systems)}
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data.write_bodies(place)
        ways, way = variants(options, data, versions, place)
        servers = {n: stack.enter_context(served(n, versions, way, options)) for n in options.systems}
        recalls = {name: check(server, data, versions) for name, server in servers.items()}
        bare = {} if options.no_bare else {
            v: stack.enter_context(bare_graph(folder, data)) for v, folder in versions.items()
        }  # fmt: skip
        results = {
            "run": about(options, data) | {"way": way, "ways": ways},
            "machine": machine,
            "versions": {v: json.loads((f / "built.json").read_text()) for v, f in versions.items()},
            "titles": {name: SYSTEMS[name].title for name in options.systems},
            "recalls": recalls,
            "rounds": [],
            "bare": [],
        }
        for number in range(options.rounds):
            say(f"round {number + 1} of {options.rounds}")
            results["rounds"] += one_round(options, servers, data, place)
            results["bare"].append({v: ask(options.seconds) for v, ask in bare.items()})
            results["rss_anon"] = {name: rss_anon(server.pid) for name, server in servers.items()}
            save(results, options.json)
    return results


def about(options: argparse.Namespace, data: Data) -> Entry:
    """What the run is, beside what it measures."""
    return {
        "rows": len(data.rows),
        "dim": data.rows.shape[1],
        "vectors": data.name,
        "queries": len(data.queries),
        "recall": options.recall,
        "clients": options.clients,
        "seconds": options.seconds,
        "rounds": options.rounds,
        "flags": options.flag,
        "cores": len(os.sched_getaffinity(0)),
    }


def _versions(systems: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(SYSTEMS[name].version for name in systems))


def save(results: Entry, file: Path | None) -> None:
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".partial-{file.name}")
        partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        partial.replace(file)


# --- Rows, queries and versions ------------------------------------------------------------------------


class Data:
    """Rows (a memory map) and queries, and the versions built of them, which are kept in --work.

    Raises:
        InputError: a file is missing, or the two do not fit.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        folder = (
            make_rows(options.work / f"made-{options.made}", options.made)
            if options.made
            else options.rows_from
        )
        self.rows_file, queries_file = folder / "rows.npy", folder / "queries.npy"
        for file in (self.rows_file, queries_file):
            if not file.exists():
                raise InputError(
                    f"{file} is not there: python benchmarks/corpus.py {folder} makes it; or --made 20000"
                )
        self.rows = np.load(self.rows_file, mmap_mode="r")[: options.n_rows]
        self.queries = np.load(queries_file)[:N_QUERIES]
        if self.rows.dtype != np.float32 or self.rows.shape[1:] != self.queries.shape[1:]:
            raise InputError(
                f"{folder} has {self.rows.dtype} rows {self.rows.shape} and queries {self.queries.shape}, "
                "wanted float32 rows as wide as the queries"
            )
        self.name, self.recall = folder.name, options.recall
        self.work = options.work / f"{folder.name}-{len(self.rows)}-{options.recall:g}"
        self.work.mkdir(parents=True, exist_ok=True)
        self.queries_file = self.work / "queries.npy"
        np.save(self.queries_file, self.queries)
        self.kth = exact_search(self.rows, self.queries[:N_CHECKED], K)[0][:, -1]

    def version(self, name: str) -> Path:
        """The base path of a version that has been built."""
        folder = self.work / name
        if not (folder / "built.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            say(f"building {name} over {len(self.rows):,} rows")
            plan = json.dumps({"n_rows": len(self.rows), "recall": self.recall})
            models("build", name, self.rows_file, self.queries_file, folder, plan)
        return folder

    def write_bodies(self, place: Path) -> None:
        """A file of request bodies for each kind of server: the same numbers, nine digits each."""
        keys = {"server": "inputs", "fastapi": "vector"}
        for kind, key in keys.items():
            lines = (json.dumps({key: numbers(query)}) + "\n" for query in self.queries)
            (place / f"{kind}.jsonl").write_text("".join(lines), encoding="utf-8")


def make_rows(folder: Path, n_rows: int) -> Path:
    """Drawn rows around 400 centres, and queries around the same ones: recall is not that of real texts."""
    if not (folder / "queries.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(7)
        centres = rng.normal(size=(400, DIM))
        for name, n in (("rows", n_rows), ("queries", N_QUERIES)):
            near = centres[rng.integers(len(centres), size=n)] + 0.7 * rng.normal(size=(n, DIM))
            unit = near / np.linalg.norm(near, axis=1, keepdims=True)
            np.save(folder / f"{name}.npy", unit.astype(np.float32))
    return folder


def models(*arguments: Any) -> None:
    """Run a task of serving_models.py.

    Raises:
        FailedError: with the last line that it said.
    """
    command = [sys.executable, str(HERE / "serving_models.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise FailedError(f"{' '.join(command[1:4])} failed: {_last_line(done.stderr)}")


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "TF_USE_LEGACY_KERAS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "CUDA_VISIBLE_DEVICES": "-1",
    }


def _last_line(text: str) -> str:
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["it said nothing"])[-1]


# --- Servers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """One that answers."""

    system: System
    pid: int
    port: int  # REST
    grpc_port: int = 0
    path: str = "/v1/models/index:predict"
    bodies: str = "server.jsonl"
    key: str = "inputs"


@contextlib.contextmanager
def served(name: str, versions: dict[str, Path], way: str, options: argparse.Namespace) -> Iterator[Server]:
    """A server in a process of its own, ready; ended afterwards."""
    system = SYSTEMS[name]
    base, port = versions[system.version], free_port()
    if system.kind == "fastapi":
        command = [str(HERE / "serving_peer.py"), str(base / "1"), str(port), *way.split("-")]
        with running(command, lambda: _answers(port, "/openapi.json")) as pid:
            yield Server(system, pid, port, 0, "/search", "fastapi.jsonl", "vector")
        return
    grpc_port = free_port() if system.kind == "grpc" else 0
    command = ["-m", "serving", f"--rest_api_port={port}", f"--port={grpc_port}", "--model_name=index",
               f"--model_base_path={base.absolute()}", *options.flag]  # fmt: skip
    with running(command, lambda: _answers(port, "/v1/models/index/metadata")) as pid:
        yield Server(system, pid, port, grpc_port)


@contextlib.contextmanager
def running(command: list[str], is_ready: Callable[[], bool]) -> Iterator[int]:
    """A Python process that became ready; its id.

    Raises:
        FailedError: it ended, or was not ready in time.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment(), stderr=errors, stdout=2
        )
        try:
            end = time.monotonic() + START_SECONDS
            while not is_ready():
                if process.poll() is not None or time.monotonic() > end:
                    errors.seek(0)
                    raise FailedError(f"{' '.join(command[:2])} did not start: {_last_line(errors.read())}")
                time.sleep(0.1)
            yield process.pid
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def check(server: Server, data: Data, versions: dict[str, Path]) -> float:
    """Recall@10 of a server's own answers by REST.

    Raises:
        FailedError: it is not what the version was built with: another index, or wrong answers.
    """
    found = np.full((N_CHECKED, K), -1)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    for number, query in enumerate(data.queries[:N_CHECKED]):
        body = json.dumps({server.key: numbers(query)})
        connection.request("POST", server.path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
        if response.status != 200:
            raise FailedError(f"{server.system.title} answers {response.status}: {answer}")
        rows = answer["rows"] if server.key == "vector" else answer["outputs"]["output_2"]
        found[number, : len(rows)] = rows
    connection.close()
    recall = recall_of(data.rows, data.queries[: len(found)], data.kth, found)
    built = json.loads((versions[server.system.version] / "built.json").read_text())["recall"]
    if abs(recall - built) > RECALL_SLACK:
        raise FailedError(
            f"{server.system.title} answers with recall@10 {recall:.3f}, its version has {built:.3f}"
        )
    return recall


def variants(
    options: argparse.Namespace, data: Data, versions: dict[str, Path], place: Path
) -> tuple[dict[str, float], str]:
    """Requests/s of each way to write the peer, at 64 clients, and the fastest way."""
    if options.fastapi or not any(SYSTEMS[name].kind == "fastapi" for name in options.systems):
        return {}, options.fastapi or ""
    ways = {}
    for way in VARIANTS:
        with served("fastapi", versions, way, options) as server:
            by_wrk(server, 64, WARM_SECONDS, place)
            ways[way] = by_wrk(server, 64, options.seconds, place)["rate"]
            say(f"FastAPI, {way}: {ways[way]:,.0f} requests/s at 64 clients")
    return ways, max(ways, key=lambda way: ways[way])


@contextlib.contextmanager
def bare_graph(folder: Path, data: Data) -> Iterator[Callable[[float], Entry]]:
    """Measures the graph of a version in a process of its own, for some seconds a kind of call."""
    command = [
        sys.executable,
        str(HERE / "serving_models.py"),
        "bare",
        str(folder / "1"),
        str(data.queries_file),
    ]
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            command,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdin
        assert process.stdout

        def said() -> Entry:
            line = process.stdout.readline()
            if not line:
                errors.seek(0)
                raise FailedError(f"serving_models.py bare failed: {_last_line(errors.read())}")
            return json.loads(line)

        def ask(seconds: float) -> Entry:
            asked = {"seconds": seconds, "threads": len(os.sched_getaffinity(0))}
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            return said()

        try:
            said()
            yield ask
        finally:
            process.stdin.close()
            process.wait()


# --- Load ----------------------------------------------------------------------------------------------


def one_round(
    options: argparse.Namespace, servers: dict[str, Server], data: Data, place: Path
) -> list[Entry]:
    """One measurement of each system at each number of clients."""
    measured = []
    for clients in options.clients:
        for name, server in servers.items():
            load = by_grpc if server.system.kind == "grpc" else by_wrk
            load(server, clients, WARM_SECONDS, place, data)
            before = cpu_seconds(server.pid)
            figures = load(server, clients, options.seconds, place, data)
            figures["cpu_us"] = (cpu_seconds(server.pid) - before) / max(figures["requests"], 1) * 1e6
            measured.append({"system": name, "clients": clients, **figures})
            say(
                f"{server.system.title}, {clients} clients: {figures['rate']:,.0f} requests/s, "
                f"p50 {figures['p50']:.2f} ms, p99 {figures['p99']:.2f} ms, {figures['errors']} errors"
            )
    return measured


def by_wrk(server: Server, clients: int, seconds: float, place: Path, data: Data | None = None) -> Entry:
    """Requests/s, percentiles in ms, and errors: broken connections, answers late or other than 2xx."""
    url = f"http://127.0.0.1:{server.port}{server.path}"
    command = ["wrk", "-t1", f"-c{clients}", f"-d{max(1, round(seconds))}s", "--timeout", "30s",
               "-s", str(HERE / "serving.lua"), url, "--", str(place / server.bodies)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    line = _last_line(done.stdout)
    if done.returncode or not line.startswith("{"):
        raise FailedError(f"wrk failed: {_last_line(done.stderr or done.stdout)}")
    return read_wrk(line)


def read_wrk(line: str) -> Entry:
    """What serving.lua said, as a measurement."""
    said = json.loads(line)
    errors = sum(said[kind] for kind in ("connect", "read", "write", "timeout", "status"))
    percentiles = {name: said[name] for name in ("p50", "p99", "p999")}
    rate = said["requests"] / said["seconds"]
    return {"rate": rate, "requests": said["requests"], **percentiles, "errors": errors}


def by_grpc(server: Server, clients: int, seconds: float, place: Path, data: Data) -> Entry:
    """As by_wrk, from as many processes of serving_grpc.py as there are cores."""
    messages = place / "messages.npy"
    if not messages.exists():
        models("messages", data.queries_file, messages)
    n_processes = min(clients, len(os.sched_getaffinity(0)))
    start = time.monotonic() + 1.0 + clients / 100  # interpreters to start, connections to open
    processes = []
    for number in range(n_processes):
        share = clients // n_processes + (number < clients % n_processes)
        plan = {"clients": share, "first": number * clients, "start": start, "end": start + seconds}
        command = [sys.executable, str(HERE / "serving_grpc.py"), str(server.grpc_port), str(messages),
                   str(place / f"took-{number}.npy"), json.dumps(plan)]  # fmt: skip
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    said = [process.communicate() for process in processes]
    if any(process.returncode for process in processes):
        raise FailedError(f"serving_grpc.py failed: {_last_line(said[0][1])}")
    took = np.concatenate([np.load(place / f"took-{number}.npy") for number in range(n_processes)])
    p50, p99, p999 = np.percentile(took, (50, 99, 99.9)) if len(took) else (0.0, 0.0, 0.0)
    errors = sum(json.loads(out)["failed"] for out, _ in said)
    return {"rate": len(took) / seconds, "requests": len(took), "p50": float(p50), "p99": float(p99),
            "p999": float(p999), "errors": errors}  # fmt: skip


def cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def rss_anon(pid: int) -> int:
    """Bytes that no file backs."""
    info = psutil.Process(pid).memory_info()
    return info.rss - info.shared


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
