"""What the document vectors must be before an index is built of them, and how they changed since last time.

Everything runs over blocks of the memory maps: the rows never stand in memory together.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.artifacts import Embeddings
from pipeline.errors import ArtifactError
from pipeline.exact import TIE, exact_scores, exact_search, kth_scores
from pipeline.hashing import of_texts

MATRIX = "embeddings.npy"
KEYS = f"keys/{MATRIX}"
BLOCK_BYTES = 16 << 20  # of rows that are looked at together
BLOCK_KEYS = 1 << 16
BLOCK_TEXTS = 1 << 8  # each may be a megabyte
LENGTH_ERROR = 1e-3  # a row whose length is farther from 1 is no unit vector
MIN_JUDGED = 10  # different texts: fewer may be alike without being the model's fault
K = 10  # nearest neighbours that are compared
DRIFT_DOCUMENTS = 20_000  # among which neighbours are looked for
DRIFT_QUERIES = 1000  # whose neighbours are compared
FEW_KEPT = 0.5  # fewer neighbours kept than this by another model: said
SAME_KEPT = 0.999  # fewer kept by the same model, whose rows are the same: said
# What a model gives is refused before it becomes a row: a bad one is a damaged row of the version before.
AGAIN = "run stage encode --force, which copies nothing"

Ids = Callable[[int], str]


@dataclass(frozen=True)
class Findings:
    """What the rows were found to be.

    Attributes:
        n_rows: all of them.
        n_distinct: of different keys, so of different texts.
        mean_cosine: over all pairs of rows with different keys; None where there is no such pair.
    """

    n_rows: int
    n_distinct: int
    mean_cosine: float | None


def check(
    matrix: np.ndarray, keys: np.ndarray, dim: int, max_mean_cosine: float, ids: Ids, n_unknown: int = 0
) -> Findings:
    """Refuse rows that no search can be built on.

    Args:
        matrix: float32 (n, dim), memory-mapped.
        keys: uint8 (n, 16), rows as keys/embeddings.npy: equal texts have equal ones.
        dim: the width that is wanted.
        max_mean_cosine: rows whose pairs are nearer to each other than this, on average, are refused, unless
            there are fewer than MIN_JUDGED texts.
        ids: row -> document_id, for messages.
        n_unknown: rows of whose texts the model knows no token.

    Raises:
        ArtifactError: another shape or type, a row that is not of unit length, equal keys with different
            rows, or rows that are all alike.
    """
    if matrix.shape != (len(keys), dim) or matrix.dtype != np.float32:
        raise ArtifactError(
            f"{MATRIX} holds {matrix.dtype} {matrix.shape}, wanted float32 {(len(keys), dim)}, a row a "
            f"key, encode.dim wide: {AGAIN}"
        )
    bad = first_bad_row(matrix)
    if bad is not None:
        raise ArtifactError(
            f"{MATRIX} row {bad[0]} (document_id {ids(bad[0])}) {bad[1]}, wanted unit length: {AGAIN}"
        )
    again, before = equal_rows(keys)
    check_equal(matrix, again, before, ids)
    is_first = np.ones(len(keys), bool)
    is_first[again] = False
    cosine = check_spread(matrix, is_first, max_mean_cosine, MATRIX, n_unknown)
    return Findings(len(keys), int(is_first.sum()), None if cosine is None else round(cosine, 6))


def check_spread(
    matrix: np.ndarray, is_chosen: np.ndarray, max_mean_cosine: float, what: str, n_unknown: int = 0
) -> float | None:
    """Refuse rows that are all alike; returns the mean cosine.

    Args:
        matrix, is_chosen: as `mean_cosine` takes them.
        what: the rows, for the message.
        n_unknown: as `check`; where half of the rows are such, this is what is wrong.

    Raises:
        ArtifactError: as `check`.
    """
    cosine = mean_cosine(matrix, is_chosen)
    if cosine is not None and cosine > max_mean_cosine and is_chosen.sum() >= MIN_JUDGED:
        said = (
            f"{what}: two documents' vectors have a cosine of {cosine:.3f} on average, wanted at most "
            f"encode.max_mean_cosine = {max_mean_cosine:g}"
        )
        if 2 * n_unknown >= len(matrix):
            raise ArtifactError(
                f"the model knows no token of {n_unknown:,} of {len(matrix):,} texts; {said}: look at "
                "documents.paths, or set a train.model that knows the texts' script"
            )
        raise ArtifactError(
            f"{said}: to this model all texts are nearly the same, so it finds nothing; train with another "
            "train.model or a lower train.learning_rate, or raise the limit where the documents really are "
            "nearly the same"
        )
    return cosine


def first_bad_row(matrix: np.ndarray) -> tuple[int, str] | None:
    """The first row that is not of unit length (to 0.001), and what is wrong with it; else None."""
    first, n_bad = None, 0
    for start, block in blocks(matrix):
        with np.errstate(over="ignore", invalid="ignore"):
            lengths = np.sqrt(np.einsum("ij,ij->i", block, block))
        bad = np.flatnonzero(~(np.abs(lengths - 1) < LENGTH_ERROR))  # a NaN is near nothing
        if len(bad) and first is None:
            first = start + int(bad[0])
        n_bad += len(bad)
    if first is None:
        return None
    row = np.asarray(matrix[first], np.float64)
    what = f"has length {np.linalg.norm(row):.4g}" if np.isfinite(row).all() else "holds NaN or infinity"
    return first, what + (f" (the first of {n_bad:,} bad rows)" if n_bad > 1 else "")


def blocks(matrix: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) in order, BLOCK_BYTES at a time."""
    n_rows = max(1, BLOCK_BYTES // max(1, matrix.itemsize * matrix.shape[1]))
    for start in range(0, len(matrix), n_rows):
        yield start, matrix[start : start + n_rows]


def equal_rows(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose key an earlier row has, and the first such row of each: two int64 (n_again,).

    Args:
        keys: uint8 (n, 16).
    """
    first, second = halves(keys).T
    order = np.argsort(first, kind="stable")  # of equal keys the first row comes first
    again = _as_before(first, order)
    if not _as_before(second, order)[again].all():  # two keys share their first half
        order = np.lexsort((second, first))
        again = _as_before(first, order) & _as_before(second, order)
    places = np.flatnonzero(again)
    begins = np.ones(len(places), bool)  # which of them come behind a row that is no repetition
    begins[1:] = np.diff(places) > 1
    before = np.maximum.accumulate(np.where(begins, places - 1, 0))
    return order[places], order[before]


def halves(keys: np.ndarray) -> np.ndarray:
    """Keys as two numbers each, uint64 (n, 2)."""
    return np.ascontiguousarray(keys).view(np.uint64)


def _as_before(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Whether each value is the one before it in this order: bool (n,)."""
    ordered = values[order]
    return np.concatenate([np.zeros(min(1, len(ordered)), bool), ordered[1:] == ordered[:-1]])


def check_equal(matrix: np.ndarray, again: np.ndarray, before: np.ndarray, ids: Ids) -> None:
    """Refuse rows that differ although their keys say that text, model and settings are the same.

    Args:
        again, before: as `equal_rows`.

    Raises:
        ArtifactError: both rows are named.
    """
    n_rows = max(1, BLOCK_BYTES // (matrix.itemsize * matrix.shape[1]))
    found, n_unequal = None, 0
    for start in range(0, len(again), n_rows):
        of_block = slice(start, start + n_rows)
        unequal = np.flatnonzero((matrix[again[of_block]] != matrix[before[of_block]]).any(axis=1))
        if len(unequal):
            found = found or (int(before[start + unequal[0]]), int(again[start + unequal[0]]))
            n_unequal += len(unequal)
    if found:
        one, other = found
        raise ArtifactError(
            f"{MATRIX} rows {one} (document_id {ids(one)}) and {other} (document_id {ids(other)}) have the "
            f"same text but different vectors ({n_unequal:,} such rows), wanted equal ones: {AGAIN}"
        )


def mean_cosine(matrix: np.ndarray, is_chosen: np.ndarray) -> float | None:
    """What two of the chosen rows, drawn at random, have for a cosine on average; None of fewer than two.

    No pair has to be drawn: all pairs' products add up to the squared length of the rows' sum, less that of
    every row with itself.

    Args:
        matrix: float32 (n, dim), unit length.
        is_chosen: bool (n,).
    """
    total, with_themselves = np.zeros(matrix.shape[1]), 0.0
    for start, block in blocks(matrix):
        chosen = is_chosen[start : start + len(block)].astype(np.float32)
        total += chosen @ block
        with_themselves += float(chosen @ np.einsum("ij,ij->i", block, block))
    n = int(is_chosen.sum())
    return float(total @ total - with_themselves) / (n * (n - 1)) if n > 1 else None


def drift(
    matrix: np.ndarray, keys: np.ndarray, documents: Path, earlier: Embeddings | None, seed: int = 7
) -> dict[str, Any] | None:
    """How many of the documents' ten nearest neighbours are those that they had in the version before.

    Asked over texts that both versions hold, each once: at most DRIFT_DOCUMENTS of them, drawn at random, and
    of those the neighbours of DRIFT_QUERIES. Says it in a line where few are kept.

    Args:
        matrix: float32 (n, dim), unit length.
        keys: uint8 (n, 16), as `check` takes them.
        documents: documents.parquet, its rows those of the matrix.
        earlier: the version before.

    Returns:
        neighbours_kept (a share), n_documents, n_queries, same_encoder (whether model and settings are those
        of the version before); None without a version before, or with fewer than eleven such texts.
    """
    if earlier is None:
        return None
    keys_before = np.load(earlier.path / KEYS, mmap_mode="r")
    rows, rows_before = in_both(first_halves(keys), first_halves(keys_before))
    same_encoder = len(rows) > 0
    if not same_encoder:  # by another encoder every key is another: only the texts can tell
        files = (documents, earlier.path / "documents.parquet")
        rows, rows_before = in_both(*(hashes(file, "text") for file in files))
    if len(rows) <= K:
        return None
    drawn = np.random.default_rng(seed)
    chosen = np.sort(drawn.choice(len(rows), min(DRIFT_DOCUMENTS, len(rows)), replace=False))
    asked = np.sort(drawn.choice(len(chosen), min(DRIFT_QUERIES, len(chosen)), replace=False))
    nearest = neighbours_of(asked, matrix[rows[chosen]])
    kept = share_kept(nearest, asked, earlier.matrix()[rows_before[chosen]])
    _say_drift(kept, len(chosen), same_encoder)
    return {
        "neighbours_kept": round(kept, 6),
        "n_documents": len(chosen),
        "n_queries": len(asked),
        "same_encoder": same_encoder,
    }


def neighbours_of(asked: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """The ten nearest other rows of some of them, in no order: int64 (n_asked, 10).

    Args:
        asked: int (n_asked,), rows of the vectors.
        vectors: float32 (n, dim), unit length, more than ten.
    """
    return exact_search(vectors, vectors[asked], K, asked)[0]


def share_kept(nearest: np.ndarray, asked: np.ndarray, before: np.ndarray) -> float:
    """Share of the neighbours that were among the ten nearest before, ties with the tenth included.

    Args:
        nearest: int (n_asked, 10), as `neighbours_of` finds them now.
        before: float32 (n, dim), the same documents' vectors then.
    """
    queries = before[asked]
    tenth = kth_scores(before, queries, K, asked)
    return float((exact_scores(before, queries, nearest) >= tenth[:, None] - TIE).mean())


def in_both(now: Iterable[np.ndarray], before: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Where the values stand that both hold, each once: rows of `now`, ascending, and rows of `before`.

    Args:
        now, before: uint64 (n,), in parts.

    Returns:
        Two int64 (n_both,).
    """
    values = np.concatenate([np.zeros(0, np.uint64), *before])
    order = np.argsort(values, kind="stable")
    values = values[order]
    is_found = np.zeros(len(values), bool)
    rows, rows_before, start = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for part in now if len(values) else ():
        at = np.minimum(np.searchsorted(values, part), len(values) - 1)  # of equal ones the first
        hits = np.flatnonzero((values[at] == part) & ~is_found[at])
        hits = hits[np.sort(np.unique(at[hits], return_index=True)[1])]
        is_found[at[hits]] = True
        rows.append(start + hits)
        rows_before.append(order[at[hits]])
        start += len(part)
    return np.concatenate(rows), np.concatenate(rows_before)


def first_halves(keys: np.ndarray) -> Iterator[np.ndarray]:
    """The first eight bytes of every key, uint64 in parts."""
    for start in range(0, len(keys), BLOCK_KEYS):
        yield halves(keys[start : start + BLOCK_KEYS])[:, 0]


def hashes(documents: Path, column: str) -> Iterator[np.ndarray]:
    """A hash of every row's string in a column, uint64 in parts."""
    with pq.ParquetFile(documents, buffer_size=1 << 20) as parquet:
        for batch in parquet.iter_batches(BLOCK_TEXTS, columns=[column]):
            yield of_texts(batch[column].to_pylist())


def _say_drift(kept: float, n_documents: int, same_encoder: bool) -> None:
    """A line where fewer neighbours are kept than a reader would expect."""
    of_what = f"{100 * kept:.1f} % of the ten nearest neighbours among {n_documents:,} unchanged documents"
    if same_encoder and kept < SAME_KEPT:
        _say(
            f"only {of_what} are those of the version before, made by the same model with the same settings: "
            f"one of the two is damaged; {AGAIN}"
        )
    elif not same_encoder and kept < FEW_KEPT:
        _say(
            f"only {of_what} are those of the version before: the new model or its settings changed much; "
            "compare the figures of both reports"
        )


def _say(line: str) -> None:
    print(f"encode: {line}", file=sys.stderr, flush=True)
