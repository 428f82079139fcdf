"""Memory and speed of the co-reading filter, which knows every two documents that share a session.

    python benchmarks/co_reading.py --pairs 1000000 10000000 100000000

Makes that many keys of random documents, by ranges as the stage does, and asks four million questions of
them: of the stage's filter (sorted keys in mapped files) and, as a peer, of polars' `is_in` (a hash table in
memory). Each runs as its own process, so that its memory is its own.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline import co_reading
from pipeline.work import Peak

N_DOCUMENTS = 1_500_000
N_RANGES = 16
N_QUESTIONS = 4_000_000
MEBIBYTE = 1024**2


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="example:\n  python benchmarks/co_reading.py --pairs 100000000 --repeats 3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pairs", type=int, nargs="+", default=[1_000_000, 10_000_000, 100_000_000])
    parser.add_argument("--repeats", type=int, default=3, help="the median counts; default 3")
    options = parser.parse_args()
    rows = []
    for n_pairs in options.pairs:
        folder = Path(tempfile.mkdtemp(prefix="co-reading-"))
        try:
            held = make(n_pairs, folder)
            for name in ("filter", "polars is_in"):
                found = [_in_process(name, folder) for _ in range(options.repeats)]
                on_disk = sum(path.stat().st_size for path in folder.iterdir())
                seconds, anonymous, answers = zip(*found, strict=True)
                rows.append(
                    [
                        name,
                        f"{held:,}",
                        f"{on_disk / MEBIBYTE:,.0f}",
                        f"{max(anonymous) / MEBIBYTE:,.0f}",
                        f"{N_QUESTIONS / median(seconds):,.0f}",
                        f"{answers[0]:,}",
                    ]
                )
        finally:
            shutil.rmtree(folder)
    headers = ["", "pairs held", "on disk, MiB", "RssAnon more, MiB", "questions/s", "answered yes"]
    print(tabulate(rows, headers, colalign=("left", *["right"] * 5)))
    print(f"\n{_cpu()}, {os.cpu_count()} cores; {N_QUESTIONS:,} questions, half of them about pairs held")
    return 0


def make(n_pairs: int, folder: Path) -> int:
    """Write keys range by range; returns how many there are."""
    limits = co_reading.bounds(N_RANGES, N_DOCUMENTS)
    edges = [0, *(int(limit >> co_reading.SHIFT) for limit in limits), N_DOCUMENTS]
    random = np.random.default_rng(7)
    held = 0
    for number, (first, end) in enumerate(pairwise(edges)):
        n = n_pairs // N_RANGES
        low = random.integers(first, end, n)
        keys = co_reading.merge([co_reading.pair_keys(low, random.integers(low, N_DOCUMENTS))])
        np.save(folder / f"met-{number:05d}.npy", keys)
        held += len(keys)
    return held


def ask(name: str, folder: Path) -> tuple[float, int, int]:
    """(seconds, bytes of RssAnon above what the process began with, questions answered yes)."""
    ranges = [np.load(path, mmap_mode="r") for path in sorted(folder.iterdir())]
    a, b = questions(ranges)
    before = Peak(os.getpid())
    time.sleep(0.5)
    before.stop()
    peak = Peak(os.getpid())
    began = time.monotonic()
    if name == "filter":
        limits = co_reading.bounds(N_RANGES, N_DOCUMENTS)
        met = co_reading.CoReading.of(ranges, limits, np.empty(0, co_reading.LONG), N_DOCUMENTS)
        # asked in portions, as the stage asks for a bucket at a time
        answers = sum(
            int(met.holds(x, y).sum()) for x, y in zip(*(np.array_split(c, 16) for c in (a, b)), strict=True)
        )
    else:
        import polars as pl

        held = pl.Series(np.concatenate(ranges))
        answers = int(pl.Series(co_reading.pair_keys(a, b)).is_in(held.implode()).sum())
    seconds = time.monotonic() - began
    time.sleep(0.2)
    peak.stop()
    return seconds, peak.rss_anon - before.rss_anon, answers


def questions(ranges: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs to ask about: half of them held."""
    random = np.random.default_rng(8)
    each = N_QUESTIONS // 2 // len(ranges)
    some = np.concatenate([keys[random.integers(len(keys), size=each)] for keys in ranges])
    a, b = (some >> co_reading.SHIFT).astype(np.int32), (some & np.uint64(0xFFFFFFFF)).astype(np.int32)
    others = random.integers(N_DOCUMENTS, size=(2, N_QUESTIONS - len(some)), dtype=np.int32)
    order = random.permutation(N_QUESTIONS)
    return np.concatenate([a, others[0]])[order], np.concatenate([b, others[1]])[order]


def _in_process(name: str, folder: Path) -> tuple[float, int, int]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(ask, (name, folder))


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown CPU")


if __name__ == "__main__":
    sys.exit(main())
