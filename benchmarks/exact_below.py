"""From how many rows on a tree is faster than exact search: queries/s of both, as served, one table.

    python benchmarks/exact_below.py                                1,000 rows to all of the corpus
    python benchmarks/exact_below.py --sizes 1500000 --matrix work/bench/corpus/rows-1500000.npy

The rows are the first so many of benchmarks/corpus.py's, whose order is a hash's. Both systems are
TunedScaNN's SavedModels, loaded by a session as TensorFlow Serving loads them: one without a tree, one with
sqrt(rows) leaves and spilling. Both answer `search` with document ids, one query at a time and in batches.
The tree searches with the fastest setting whose recall's lower 95 % bound on the first half of the held-out
queries meets the target; the recall in the table is of the second half. The two are timed in turns, so that
the machine's noise hits both alike. Exact search has a recall of 1, needs no training, and is what
`index.exact_below` chooses below so many documents.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for when it is run as a file
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # tfrs 0.7.7 knows no Keras 3
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")  # ScaNN searches on the CPU

from benchmarks import machine as machine_
from pipeline import tuning
from pipeline.exact import exact_scores, kth_scores, recall_at_k
from pipeline.tuning import Record, Search

CORPUS = Path("work/bench/corpus")
SIZES = (1_000, 3_000, 10_000, 30_000, 100_000)
K = 10
MOST_CANDIDATES = 1000
MODES = ("single", "batched")
SEARCH_INPUTS = ("queries", "k", "num_leaves_to_search", "num_reordering_candidates")
FILTER_INPUTS = (*SEARCH_INPUTS, "allowed_document_ids", "excluded_document_ids", "minimum_score")
NO_MINIMUM = np.float32(-3.4e38)
HEADERS = (
    "rows", "exact, one query", "tree, one query", "exact, batches", "tree, batches",
    "leaves searched", "candidates", "recall@10", "built in",
)  # fmt: skip
ADVICE = (
    "ScaNN's docs/algorithms.md advises exact search below 20,000 rows, codes without a tree below 100,000 "
    "and a tree from there on."
)
EXAMPLES = """examples:
  python benchmarks/exact_below.py --markdown work/bench/exact_below.md
  python benchmarks/exact_below.py --sizes 10000 30000 --threads 2
  python benchmarks/exact_below.py --sizes 1500000 --matrix work/bench/corpus/rows-1500000.npy

exit codes: 0 done, 2 bad arguments
"""


@dataclass(frozen=True)
class Row:
    """One size: queries a second by (system, mode), and the tree's setting and recall in each mode."""

    n_rows: int
    num_leaves: int
    seconds: float  # to train and save the tree
    rates: Mapping[tuple[str, str], float]
    settings: Mapping[str, Search]
    recalls: Mapping[str, float]  # on test queries


class Asked:
    """A SavedModel of TunedScaNN, loaded by a session as TensorFlow Serving does, and its signatures."""

    def __init__(self, folder: Path, threads: int) -> None:
        import tensorflow as tf
        from scann.scann_ops.py import scann_ops  # noqa: F401  # its ops are registered by this

        config = tf.compat.v1.ConfigProto(
            intra_op_parallelism_threads=threads, inter_op_parallelism_threads=threads
        )
        with tf.Graph().as_default() as graph:
            self._session = tf.compat.v1.Session(graph=graph, config=config)
            loaded = tf.compat.v1.saved_model.load(self._session, [tf.saved_model.SERVING], str(folder))
            self._search = self._call(graph, loaded.signature_def["search"], SEARCH_INPUTS)
            self._exact = self._call(graph, loaded.signature_def["exact"], SEARCH_INPUTS[:2])
            if "search_filtered" in loaded.signature_def:  # it has ids to name
                self._filtered = self._call(graph, loaded.signature_def["search_filtered"], FILTER_INPUTS)

    def _call(self, graph: Any, signature: Any, inputs: Sequence[str]) -> Callable:
        ids = graph.get_tensor_by_name(signature.outputs["document_ids"].name)
        fed = [graph.get_tensor_by_name(signature.inputs[name].name) for name in inputs]
        return self._session.make_callable(ids, feed_list=fed)

    def ask(self, queries: np.ndarray, search: Search) -> np.ndarray:
        """Document ids as served, bytes (n_queries, K)."""
        settings = np.array([K, *astuple(search)], np.int32)
        return self._search(queries, *settings)

    def rows(self, queries: np.ndarray, search: Search | None = None) -> np.ndarray:
        """Row numbers, int64 (n_queries, K), -1 where fewer were found; without settings by `exact`."""
        parts = [
            self._exact(block, np.int32(K)) if search is None else self.ask(block, search)
            for block in in_batches(queries, 500)
        ]
        return _rows_in(np.concatenate(parts))

    def filtered(
        self, query: np.ndarray, search: Search, allowed: np.ndarray, excluded: np.ndarray
    ) -> np.ndarray:
        """As `rows`, for one query (1, dim) and a filter's document ids, bytes (n,)."""
        settings = np.array([K, *astuple(search)], np.int32)
        return _rows_in(self._filtered(query, *settings, allowed, excluded, NO_MINIMUM))

    def close(self) -> None:
        self._session.close()


def _rows_in(ids: np.ndarray) -> np.ndarray:
    """The row numbers that ids are here, int64 of their shape, -1 for none."""
    return np.array([[int(i or -1) for i in of_query] for of_query in ids], np.int64)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the return value is the exit code."""
    options = _parser().parse_args(arguments)
    file = options.matrix or options.corpus / "rows.npy"
    for needed in (file, options.corpus / "queries.npy"):
        if not needed.exists():
            _parser().error(f"{needed} is not there: run benchmarks/corpus.py {options.corpus}")
    matrix = np.load(file, mmap_mode="r")
    queries = np.load(options.corpus / "queries.npy")
    sizes = sorted(options.sizes or {*(s for s in SIZES if s < len(matrix)), len(matrix)})
    if sizes[0] < 100 or sizes[-1] > len(matrix):
        _parser().error(f"--sizes {sizes[0]} to {sizes[-1]}, but {file} has {len(matrix):,}: 100 to that")
    machine = machine_.describe("tensorflow", "scann")
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
    done: list[Row] = []
    for size in sizes:
        done.append(measure(matrix[:size], queries[: options.n_queries], options))
        print(f"\n{table(done, 'simple')}\n", flush=True)
        if options.markdown:
            options.markdown.write_text(
                f"{table(done, 'pipe')}\n\n{notes(done, options)}\n\n{machine}\n", encoding="utf-8"
            )
    print(f"{notes(done, options)}\n\n{machine}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--corpus", type=Path, default=CORPUS, metavar="DIR", help=f"benchmarks/corpus.py's, default {CORPUS}"
    )
    add("--matrix", type=Path, metavar="FILE", help="rows to take instead of the corpus's rows.npy")
    add("--sizes", type=_positive, nargs="+", metavar="N", help="numbers of rows, default "
        f"{', '.join(map(str, SIZES))} and all")  # fmt: skip
    add("--target", type=float, default=0.95, metavar="RECALL", help="of the tree, default 0.95")
    add("--n_queries", type=_positive, default=2000, metavar="N", help="held-out ones, default 2000")
    add("--batch", type=_positive, default=256, metavar="N", help="queries in a batch, default 256")
    add("--threads", type=_positive, default=1, metavar="N", help="of the session, default 1")
    add("--seconds", type=float, default=1.0, metavar="S", help="a system and round, default 1")
    add("--rounds", type=_positive, default=5, metavar="N", help="the median counts, default 5")
    add("--cpu", action="store_true", help="count CPU seconds: for a machine that has other work")
    add("--markdown", type=Path, metavar="FILE", help="write the table there too, after every size")
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number}, wanted 1 or more")
    return number


# --- Measuring -----------------------------------------------------------------------------------------


def measure(matrix: np.ndarray, queries: np.ndarray, options: argparse.Namespace) -> Row:
    """Both systems over the rows.

    Args:
        matrix: float32 (n_rows, dim), unit length.
        queries: float32 (n_queries, dim): the first half chooses the tree's setting.
    """
    num_leaves = round(math.sqrt(len(matrix)))
    dev, test = np.array_split(queries, 2)
    worst_dev, worst_test = worst_scores(matrix, dev), worst_scores(matrix, test)
    with tempfile.TemporaryDirectory() as folder:
        say(f"{len(matrix):,} rows: building")
        started = time.monotonic()
        export(matrix, Path(folder, "tree"), num_leaves)
        seconds = time.monotonic() - started
        export(matrix, Path(folder, "exact"), None)
        tree, exact = (Asked(Path(folder, name), options.threads) for name in ("tree", "exact"))

        def measured(search: Search) -> Record:
            shares = recalls_of(matrix, dev, tree.rows(dev, search), worst_dev)
            return Record(search, "typed", float(shares.mean()), tuning.lower_bound(shares))

        good = cheapest(measured, num_leaves, options.target)
        rates, settings, found = {}, {}, {}
        for mode, size in (("single", 1), ("batched", options.batch)):
            asks = {search: asker(tree, search) for search in good}
            tried = timed(asks, test, size, options)
            settings[mode] = max(tried, key=lambda search: tried[search])
            pair = {"exact": asker(exact, settings[mode]), "tree": asker(tree, settings[mode])}
            for system, rate in timed(pair, test, size, options).items():
                rates[system, mode] = rate
            answers = tree.rows(test, settings[mode])
            found[mode] = float(recalls_of(matrix, test, answers, worst_test).mean())
        tree.close()
        exact.close()
    return Row(len(matrix), num_leaves, seconds, rates, settings, found)


def export(
    matrix: np.ndarray, folder: Path, num_leaves: int | None, ids: np.ndarray | None = None, **settings: Any
) -> None:
    """Train and save TunedScaNN over the rows; None for exact search alone."""
    from pipeline.scann_layer import TunedScaNN

    layer = TunedScaNN(num_leaves=num_leaves, **settings).index(matrix, ids)
    layer.save(folder)
    layer.release()


def asker(asked: Asked, search: Search) -> Callable[[np.ndarray], Any]:
    return lambda queries: asked.ask(queries, search)


def cheapest(measured: Callable[[Search], Record], num_leaves: int, target: float) -> list[Search]:
    """For each number of candidates the fewest leaves that meet the target, as stage index finds them.

    Where none do, what comes nearest.
    """
    candidates = tuning.candidates_to_try(K, MOST_CANDIDATES)
    explored = tuning.explore(measured, target, leaves=(1, num_leaves), candidates=candidates)
    return [record.search for record in explored.met or (explored.best(),)]


def worst_scores(matrix: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Each query's exact K-th best score, float32 (n_queries,)."""
    return kth_scores(matrix, queries, K)


def recalls_of(matrix: np.ndarray, queries: np.ndarray, found: np.ndarray, worst: np.ndarray) -> np.ndarray:
    """Each query's share of the exact top K that was found; who is as near as the K-th counts as one of them.

    Args:
        matrix: float32 (n_rows, dim): the rows that exact search is over.
        found: rows int64 (n_queries, K), each once, -1 for none.
        worst: of `worst_scores`.
    """
    return recall_at_k(found, exact_scores(matrix, queries, found), worst, K)


def timed(
    asks: Mapping[Any, Callable[[np.ndarray], Any]],
    queries: np.ndarray,
    size: int,
    options: argparse.Namespace,
) -> dict[Any, float]:
    """Queries a second of each, in batches of `size`: the median of rounds, in turns.

    Args:
        options: seconds (that each is asked for in a round, and at least one batch), rounds, cpu.
    """
    clock, _ = clock_of(options)
    batches = [batch for batch in in_batches(queries, size) if len(batch) == min(size, len(queries))]
    calls = [partial(for_a_while, ask, batches, options.seconds, clock) for ask in asks.values()]
    each = tuning.seconds_each(calls, options.rounds, clock)
    return {name: 1 / value for name, value in zip(asks, each, strict=True)}


def clock_of(options: argparse.Namespace) -> tuple[Callable[[], float], str]:
    """What counts seconds, and its name."""
    return (time.process_time, "CPU seconds") if options.cpu else (time.perf_counter, "seconds by the clock")


def for_a_while(
    ask: Callable[[np.ndarray], Any],
    batches: Sequence[np.ndarray],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Ask batch after batch until so many seconds have passed; how many queries that were."""
    n_queries, number, started = 0, 0, clock()
    while not n_queries or clock() - started < seconds:
        batch = batches[number % len(batches)]
        ask(batch)
        n_queries, number = n_queries + len(batch), number + 1
    return n_queries


def in_batches(queries: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (queries[start : start + size] for start in range(0, len(queries), size))


def crossover(rows: Sequence[Row], mode: str) -> int | None:
    """The number of rows from which on the tree is faster, between two measured sizes by log-log lines.

    The smallest size where it is faster at all of them; None where it is slower at the largest.
    """
    ratios = [math.log(row.rates["tree", mode] / row.rates["exact", mode]) for row in rows]
    if ratios[-1] <= 0:
        return None
    first = next(i for i in range(len(rows)) if all(ratio > 0 for ratio in ratios[i:]))
    if first == 0:
        return rows[0].n_rows
    share = -ratios[first - 1] / (ratios[first] - ratios[first - 1])
    before, after = math.log(rows[first - 1].n_rows), math.log(rows[first].n_rows)
    return round(math.exp(before + share * (after - before)))


# --- Saying --------------------------------------------------------------------------------------------


def table(rows: Sequence[Row], form: str) -> str:
    """One line a size; `form` is one of tabulate's."""
    from tabulate import tabulate

    return tabulate(
        [_line(row) for row in rows], HEADERS, form, disable_numparse=True, colalign=["right"] * len(HEADERS)
    )


def _line(row: Row) -> list[str]:
    def of_modes(show: Callable[[str], str]) -> str:
        return " / ".join(dict.fromkeys(show(mode) for mode in MODES))

    return [
        f"{row.n_rows:,}",
        *(
            f"{row.rates[system, mode]:,.0f}/s"
            for mode in ("single", "batched")
            for system in ("exact", "tree")
        ),
        of_modes(lambda mode: f"{row.settings[mode].num_leaves_to_search:,}") + f" of {row.num_leaves:,}",
        of_modes(lambda mode: str(row.settings[mode].num_reordering_candidates)),
        of_modes(lambda mode: f"{row.recalls[mode]:.4f}"),
        f"{row.seconds:,.0f} s",
    ]


def notes(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """What was measured, and where the lines cross."""
    crossings = [
        f"{said} {'beyond' if number is None else 'from'} {number or rows[-1].n_rows:,} rows on"
        for mode, said in (("single", "one query at a time"), ("batched", f"in batches of {options.batch}"))
        for number in [crossover(rows, mode)]
    ]
    return (
        f"Queries a second on {options.threads} thread(s), {clock_of(options)[1]}, median of "
        f"{options.rounds} rounds in turns. The "
        f"tree becomes faster: {'; '.join(crossings)}. It searches for recall@{K} of {options.target} (lower "
        f"bound, first half of {options.n_queries:,} held-out queries); the recall shown is of the second "
        f"half. Where one query and batches want other settings, both are shown. {ADVICE}"
    )


def say(line: str) -> None:
    print(f"exact_below: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
