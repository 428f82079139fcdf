"""A work folder: one run at a time in it, each stage a process whose time and memory are measured."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipeline import artifacts, processes
from pipeline.artifacts import write_json

RUN = "run.json"  # {stage: {seconds, peak_rss_anon, peak_rss}} of the last time each stage ran
LOCK = ".lock"
HELD = "PIPELINE_WORK_LOCK"  # the inherited lock's file descriptor
SAMPLE_EVERY = 0.1  # seconds between two looks at a stage's memory
GIBIBYTE = 1024**3


@contextmanager
def locked(work: Path) -> Iterator[int]:
    """Hold the work folder; a stage started by `all` holds its parent's lock, and torchrun's first process
    holds it for the others.

    Raises:
        BusyError: another run holds it.
    """
    inherited = os.environ.get(HELD)
    if not processes.is_first():
        yield -1
        return
    if inherited:
        yield int(inherited)
        return
    with artifacts.locked(work, LOCK) as descriptor:
        yield descriptor


def run_process(command: Sequence[str], stage: str, lock: int) -> tuple[int, dict[str, float]]:
    """Run one stage as its own process.

    Returns:
        Its exit code (2 where a signal ended it, which is said), and what it took: seconds,
        peak_rss_anon and peak_rss in bytes.

    Raises:
        KeyboardInterrupt: the stage was interrupted.
    """
    started = time.monotonic()
    process = subprocess.Popen(command, env={**os.environ, HELD: str(lock)}, pass_fds=[lock])
    peak = Peak(process.pid)
    status = process.wait()
    peak.stop()
    if status in (-signal.SIGINT, 128 + signal.SIGINT):
        raise KeyboardInterrupt  # Ctrl-C goes to both; whichever hears it first
    if status < 0:
        cause = " (out of memory?)" if status == -signal.SIGKILL else ""
        print(
            f"error: stage {stage} was ended by {signal.Signals(-status).name}{cause}; "
            "run the same command again to go on",
            file=sys.stderr,
        )
        status = 2
    seconds = round(time.monotonic() - started, 1)
    return status, {"seconds": seconds, "peak_rss_anon": peak.rss_anon, "peak_rss": peak.rss}


def note(work: Path, stage: str, took: dict[str, float]) -> None:
    """Keep what a stage took for the closing table of this run and of later ones that skip it."""
    write_json(work / RUN, read_run(work) | {stage: took})


class Peak:
    """The largest memory of a process and its children together, sampled.

    Attributes:
        rss_anon: bytes that are the processes' own; a memory-mapped file does not count.
        rss: bytes with mapped files.
    """

    def __init__(self, pid: int) -> None:
        self.rss_anon = self.rss = 0
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_EVERY):
            try:
                root = psutil.Process(self._pid)
                infos = [p.memory_info() for p in (root, *root.children(recursive=True))]
            except psutil.Error:
                continue
            self.rss = max(self.rss, sum(info.rss for info in infos))
            # Linux: `shared` is RssFile + RssShmem, so the rest is RssAnon.
            self.rss_anon = max(self.rss_anon, sum(info.rss - getattr(info, "shared", 0) for info in infos))


def read_run(work: Path) -> dict[str, dict[str, float]]:
    try:
        return json.loads((work / RUN).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


@dataclass(frozen=True)
class Row:
    """One stage in the closing table."""

    stage: str
    rows_in: str
    rows_out: str


def table(work: Path, folder: str | None, model_name: str) -> str:
    """The closing table: stage, rows in and out, seconds, peak memory; and below it the figures."""
    from tabulate import tabulate

    from pipeline import publish
    from pipeline.artifacts import Embeddings, Index, Model, Pairs, Report

    pairs, model = Pairs.open(work / "pairs"), Model.open(work / "model")
    embeddings, index = Embeddings.open(work / "embeddings"), Index.open(work / "index")
    report = Report.open(work / "report")
    version = publish.newest(Path(folder or work) / "models" / model_name)
    n_documents = _count(embeddings.rows["documents"], "document")
    rows = [
        Row(
            "pairs", _count(pairs.rows.get("events", 0), "event"), _count(pairs.rows.get("pairs", 0), "pair")
        ),
        Row("train", _count(model.rows.get("pairs", 0), "pair"), "1 model"),
        Row("encode", n_documents, _count(embeddings.rows["rows"], "row")),
        Row("index", _count(embeddings.rows["rows"], "row"), index.facts["layer"]),
        Row("evaluate", _count(report.rows["queries"], "query", "queries"), "report.html"),
        Row("publish", "1 index", f"version {version.name}" if version else "none"),
    ]
    took = read_run(work)
    lines = [
        [row.stage, row.rows_in, row.rows_out, _seconds(took.get(row.stage)), _memory(took.get(row.stage))]
        for row in rows
    ]
    headers = ["stage", "rows in", "rows out", "seconds", "peak memory"]
    stages = tabulate(
        lines, headers, disable_numparse=True, colalign=("left", "right", "right", "right", "right")
    )
    return f"\n{stages}\n\n{figures(report.figures())}"


def figures(report: dict[str, Any]) -> str:
    """The quality figures as a small table, under what is said of the readers."""
    from tabulate import tabulate

    from pipeline.report import summary

    heading = f"{report['description']}\n" if report.get("description") else ""
    return heading + tabulate(summary(report), disable_numparse=True)


def _count(n: int, one: str, many: str | None = None) -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def _seconds(took: dict[str, float] | None) -> str:
    return f"{took['seconds']:.1f}" if took else "-"


def _memory(took: dict[str, float] | None) -> str:
    return f"{took['peak_rss_anon'] / GIBIBYTE:.2f} GiB" if took else "-"
