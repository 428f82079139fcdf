"""A saved index, loaded by a fresh process as TensorFlow Serving loads it: its answers, speed and memory.

`measure` starts the process, which is this file: python -m pipeline.saved_index PROBES OUT PARENT.
"""

import ctypes
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import PipelineError
from pipeline.exact import TIE
from pipeline.tuning import Search, seconds_each

MAX_BATCH = 1024  # queries
MOST_SECONDS = 30.0  # that single queries are timed for
N_TURN = 64  # single queries in a turn of a comparison
MIB = 1 << 20
ERROR = re.compile(r"[\w.]*(Error|Exception): ")  # a traceback's last line begins so
PR_SET_PDEATHSIG = 1  # of Linux's prctl


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a fresh process saw.

    Attributes:
        latency_ms: {"p50", "p95", "p99"} of single queries through `serving_default`.
        batched_qps: queries a second in batches through `search`; None where there is no such signature.
        memory_mib: anonymous memory (RssAnon) that loading and asking added.
        load_seconds: from the call to the first answer.
        single_qps, batched_qps_of: of each setting asked for, through `search`; empty without it.
    """

    latency_ms: dict[str, float]
    batched_qps: float | None
    memory_mib: float
    load_seconds: float
    single_qps: list[float]
    batched_qps_of: list[float]


def measure(
    folder: Path,
    probes: np.ndarray,
    expected: Sequence[np.ndarray],
    *,
    k: int,
    shipped: Search,
    frontier: Sequence[Search],
    max_queries: int,
) -> Measured:
    """Load the SavedModel in a process of its own and ask it.

    Args:
        probes: float32 (n, dim), single queries.
        expected: the scores of the answers to the first of them before saving, float32 (at most k,) each.
        shipped: what batches are asked with.
        frontier: further settings to time.
        max_queries: of a request.

    Raises:
        PipelineError: it answers otherwise than before saving, or the process died.
    """
    with tempfile.TemporaryDirectory() as scratch:
        given, out = Path(scratch) / "probes.npz", Path(scratch) / "measured.json"
        np.savez(
            given,
            folder=str(folder),
            probes=probes,
            expected=np.concatenate([*expected, np.empty(0, np.float32)]),
            lengths=[len(scores) for scores in expected],
            k=k,
            searches=np.array([dataclasses.astuple(s) for s in (shipped, *frontier)], np.int32),
            max_queries=max_queries,
        )
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.saved_index", given, out, str(os.getpid())],
            env=_environment(),
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode or not out.exists():
            raise PipelineError(_last_words(done.returncode, done.stderr))
        answer = json.loads(out.read_text(encoding="utf-8"))
    if "differs" in answer:
        raise PipelineError(answer["differs"])
    return Measured(**answer)


def _environment() -> dict[str, str]:
    here = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    quiet = {"TF_USE_LEGACY_KERAS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    return os.environ | quiet | {"PYTHONPATH": path}


def _last_words(code: int, stderr: str) -> str:
    """One line on how the process ended: what a graph refused, or the exception, or the last line."""
    how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = [line for line in lines if "assertion failed" in line]
    telling = telling or [line for line in lines if ERROR.match(line)][-1:] or lines[-1:]
    said = f": {telling[0][:300]}" if telling else ""
    more = ", with more memory" if hint else ""
    return f"the process that loaded the saved index ended {how}{hint}{said}; run stage index --force{more}"


# What the fresh process does


def main(given: str, out: str, parent: str) -> None:
    end_with(int(parent))
    with np.load(given) as file:
        task = {name: file[name] for name in file.files}
    Path(out).write_text(json.dumps(examine(task)), encoding="utf-8")


def end_with(parent: int) -> None:
    """Be killed when the process that started this one ends, however it ends: nobody reads the answer."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        sys.exit(f"process {parent}, which asked, has ended")


def examine(task: dict[str, Any]) -> dict[str, Any]:
    """Load, compare, time. Returns the fields of `Measured`, or {"differs": one line}."""
    folder, probes = Path(str(task["folder"])), task["probes"]
    tf = _ready()
    before = rss_anon()
    started = time.perf_counter()
    signatures = _load(tf, folder)
    one = signatures["serving_default"]
    one(probes[0])
    load_seconds = time.perf_counter() - started
    differs = _difference(folder, one, probes, task["expected"], task["lengths"])
    if differs:
        return {"differs": differs}
    latency_ms = _latency(one, probes)
    shipped, *frontier = (Search(*(int(n) for n in row)) for row in task["searches"])
    asks = _asks(signatures.get("search"), int(task["k"]))
    batch = probes[: min(MAX_BATCH, int(task["max_queries"]))]
    batched = seconds_each([asks(shipped, batch)])[0] if asks else None
    memory = rss_anon() - before
    singly = seconds_each([asks(s, probes[:N_TURN], at_once=1) for s in frontier]) if asks else []
    together = seconds_each([asks(s, batch) for s in frontier]) if asks else []
    return {
        "latency_ms": latency_ms,
        "batched_qps": round(1 / batched, 1) if batched else None,
        "memory_mib": round(memory / MIB, 1),
        "load_seconds": round(load_seconds, 2),
        "single_qps": [round(1 / seconds, 1) for seconds in singly],
        "batched_qps_of": [round(1 / seconds, 1) for seconds in together],
    }


def rss_anon() -> int:
    """Bytes of anonymous memory of this process: what a memory map of a file does not count to."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    return 0


def _ready() -> Any:
    """TensorFlow with ScaNN's ops, one session made, so that what follows is the index's own."""
    import tensorflow as tf
    from scann.scann_ops.py import scann_ops  # noqa: F401 - registers the ops

    with tf.Graph().as_default() as graph, tf.compat.v1.Session(graph=graph) as session:
        session.run(tf.constant(0))
    return tf


def _load(tf: Any, folder: Path) -> dict[str, Callable[..., list[np.ndarray]]]:
    """{signature: a call that takes its inputs in the order of their names, and gives its outputs so}."""
    from tensorflow.core.protobuf import config_pb2

    with tf.Graph().as_default() as graph:
        session = tf.compat.v1.Session(graph=graph)
        loaded = tf.compat.v1.saved_model.load(session, [tf.saved_model.SERVING], str(folder))
    calls = {}
    for name, signature in loaded.signature_def.items():
        options = config_pb2.CallableOptions()
        options.feed.extend(signature.inputs[key].name for key in sorted(signature.inputs))
        options.fetch.extend(signature.outputs[key].name for key in sorted(signature.outputs))
        if signature.inputs:
            calls[name] = session._make_callable_from_options(options)
    return calls


def _difference(
    folder: Path, one: Callable, probes: np.ndarray, expected: np.ndarray, lengths: np.ndarray
) -> str | None:
    """Which probe the saved index answers otherwise than before saving, in a line."""
    ends = np.cumsum(lengths)
    for row, (probe, end, n) in enumerate(zip(probes, ends, lengths, strict=False)):
        before, after = expected[end - n : end], one(probe)[0]
        if after.shape != before.shape or not np.allclose(after, before, atol=TIE):
            return (
                f"{folder}: the saved index scores probe {row} {after.tolist()}, before saving it was "
                f"{before.tolist()}: run stage index --force"
            )
    return None


def _latency(one: Callable, probes: np.ndarray) -> dict[str, float]:
    """Milliseconds of single queries; fewer than all probes where they take too long."""
    times: list[float] = []
    for probe in probes:
        started = time.perf_counter()
        one(probe)
        times.append(1000 * (time.perf_counter() - started))
        if sum(times) > 1000 * MOST_SECONDS:
            break
    return {f"p{p}": round(float(np.percentile(times, p)), 3) for p in (50, 95, 99)}


def _asks(search: Callable | None, k: int) -> Callable[..., Callable[[], int]] | None:
    """How `search` is asked with a setting: (setting, queries, at_once) -> a call that counts its queries."""
    if search is None:
        return None

    def ask(setting: Search, queries: np.ndarray, at_once: int | None = None) -> Callable[[], int]:
        size = at_once or len(queries)
        inputs = {"k": np.int32(k)}
        inputs |= {name: np.int32(value) for name, value in dataclasses.asdict(setting).items()}

        def call() -> int:
            for start in range(0, len(queries), size):
                named = inputs | {"queries": queries[start : start + size]}
                search(*[named[name] for name in sorted(named)])
            return len(queries)

        return call

    return ask


if __name__ == "__main__":
    main(*sys.argv[1:])
