"""Exact search over float32 rows, a block at a time, and the recall of other answers against it: NumPy alone.

Recall goes by scores: of documents that are as near as the k-th any will do. By row numbers an index would be
blamed for returning the other of two documents with the same text.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

BLOCK_BYTES = 8 << 20  # of scores, or of gathered rows, at once
BLOCK_QUERIES = 256  # of exact search at once: enough for a fast product, few enough for long blocks
TIE = 1e-6  # two float32 sums of 384 products of the same unit vectors differ by about 1e-7

Watch = Callable[[range], Iterable[int]]  # gives the numbers again, and shows how far they are, as tqdm does


def exact_search(
    rows: np.ndarray, queries: np.ndarray, k: int, own: np.ndarray | None = None, watch: Watch = iter
) -> tuple[np.ndarray, np.ndarray]:
    """The k highest dot products of each query, in no order.

    Behind the first blocks few rows are among a query's best so far, so only those are sorted in.

    Args:
        rows: float32 (n_rows, dim), may be memory-mapped.
        queries: float32 (n_queries, dim).
        k: lowered to the number of rows where there are fewer.
        own: int (n_queries,), a row that each query must not find, -1 for none; None: no query has one.
        watch: sees where each block of rows begins.

    Returns:
        Row numbers int64 and scores float32, (n_queries, k) each; -1 and -inf where a query has no more rows
        beside its own.
    """
    k = min(k, len(rows))
    found = np.full((len(queries), k), -1, np.int64)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    size = max(k, BLOCK_BYTES // (4 * min(BLOCK_QUERIES, max(len(queries), 1))), 1)
    for start in watch(range(0, len(rows), size)):
        block = np.asarray(rows[start : start + size]).T
        for first in range(0, len(queries), BLOCK_QUERIES):
            some = slice(first, first + BLOCK_QUERIES)
            products = queries[some] @ block
            if own is not None:
                _leave_out(products, own[some] - start)
            _sort_in(products, start, found[some], scores[some])
    return found, scores


def _leave_out(products: np.ndarray, own: np.ndarray) -> None:
    """Make the column that is a query's own, where it lies in this block, nobody's best."""
    here = np.flatnonzero((own >= 0) & (own < products.shape[1]))
    products[here, own[here]] = -np.inf


def _sort_in(products: np.ndarray, start: int, found: np.ndarray, scores: np.ndarray) -> None:
    """Take over into found and scores, (n, k), what is better in products (n, m) of rows from start on."""
    k = scores.shape[1]
    better = products > scores.min(axis=1, keepdims=True)
    at, column = np.nonzero(better)
    if not len(at):
        return
    n_better = np.bincount(at, minlength=len(products))
    place = k + np.arange(len(at)) - np.repeat(np.cumsum(n_better) - n_better, n_better)
    both = np.full((len(products), k + n_better.max()), -np.inf, np.float32)
    both_found = np.full(both.shape, -1, np.int64)
    both[:, :k], both_found[:, :k] = scores, found
    both[at, place], both_found[at, place] = products[at, column], start + column
    best = np.argpartition(-both, k - 1, axis=1)[:, :k]
    scores[:] = np.take_along_axis(both, best, axis=1)
    found[:] = np.take_along_axis(both_found, best, axis=1)


def kth_scores(
    rows: np.ndarray, queries: np.ndarray, k: int, own: np.ndarray | None = None, watch: Watch = iter
) -> np.ndarray:
    """The k-th best score of every query, as `exact_search` finds it.

    Returns:
        float32 (n_queries,); -inf where a query has fewer than k rows beside its own.
    """
    return exact_search(rows, queries, k, own, watch)[1].min(axis=1)


def exact_scores(rows: np.ndarray, queries: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Scores of what was found by the float32 rows, whatever they were found by.

    Args:
        found: row numbers int (n_queries, k), -1 where there is none.

    Returns:
        float32 (n_queries, k), -inf where there is none.
    """
    scores = np.full(found.shape, -np.inf, np.float32)
    size = max(1, BLOCK_BYTES // (4 * max(1, found.shape[1] * rows.shape[1])))
    for start in range(0, len(found), size):
        part = found[start : start + size]
        gathered = np.asarray(rows[np.maximum(part, 0)])
        products = np.matmul(gathered, queries[start : start + size, :, None])[..., 0]
        scores[start : start + size] = np.where(part >= 0, products, -np.inf)
    return scores


def first_others(found: np.ndarray, own: np.ndarray, k: Any) -> np.ndarray:
    """What was found, -1 in the place of a query's own row and of all behind the first k others.

    Args:
        found: row numbers int (n_queries, n), best first, -1 for none.
        own: int (n_queries,), -1 for none.
        k: int, or int (n_queries, 1).
    """
    others = (found >= 0) & (found != own[:, None])
    return np.where(others & (np.cumsum(others, axis=1) <= k), found, -1)


def recall_at_k(found: np.ndarray, scores: np.ndarray, kth: Any, k: Any) -> np.ndarray:
    """Share of the exact top k that was found; a row as near as the k-th counts as one of them.

    Args:
        found: row numbers int (..., n), -1 for none; one that is given twice counts once.
        scores: their exact scores, (..., n).
        kth: the exact score of the k-th best row, (...).
        k: how many there are to find, int (...).

    Returns:
        0.0 to 1.0, no unit, (...); 1.0 where there is nothing to find.

    Source: ann-benchmarks ann_benchmarks/plotting/metrics.py, `knn` (a threshold on the distance).
    """
    right = np.where(scores >= np.asarray(kth)[..., None] - TIE, found, -1)
    n_right = (np.diff(np.sort(right, axis=-1), axis=-1, prepend=-1) > 0).sum(axis=-1)
    return np.where(np.equal(k, 0), 1.0, np.minimum(n_right, k) / np.maximum(k, 1))
