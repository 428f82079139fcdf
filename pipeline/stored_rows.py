"""How the rows of an index are stored, scored where they are stored, and checked when they are given.

Importing this imports TensorFlow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.config import Storage

BLOCK_ROWS = 1 << 14  # read at once: 25 MB of 384 floats

MOST_SHOWN = 60  # letters of an identifier
MOST_OFF = 1e-3  # of a unit row's length; half precision leaves it 2 * 10^-4 off at most


class StoredRows(tf.Module):
    """The one copy of the rows that is served, and dot products with them.

    int8: a row's largest number becomes 127, and its scores are multiplied by the row's own scale. The scale
    is not largest / 127 but what makes the stored row's product with the row itself right: of the rounding
    error, the part along the row is what would move a good answer's score most.

    Attributes:
        numbers: the variable (n_rows, dim) of the storage's type.
        scales: float32 (n_rows,) for int8, else None.
    """

    def __init__(self, rows: np.ndarray, storage: Storage) -> None:
        super().__init__()
        dtype = tf.dtypes.as_dtype(storage)
        self.numbers = tf.Variable(lambda: tf.zeros(rows.shape, dtype), trainable=False, name="rows")
        scales = np.empty(len(rows), np.float32)
        for start, block in blocks(rows):
            if dtype == tf.int8:
                block, scales[start : start + len(block)] = as_int8(block)
            self._fill(start, tf.cast(block, dtype))
        self.scales = tf.Variable(scales, trainable=False) if dtype == tf.int8 else None

    def _fill(self, start: int, block: Any) -> None:
        """In place: `numbers[a:b].assign` reads the variable first, and so would copy all of it."""
        stop = start + len(block)
        tf.raw_ops.ResourceStridedSliceAssign(
            ref=self.numbers.handle, begin=[start], end=[stop], strides=[1], value=block
        )

    def score_one(self, query: Any, rows: Any) -> Any:
        """Scores (n,) of one query (dim,) with the rows int32 (n,)."""
        scores = tf.linalg.matvec(self._gathered(rows), query)
        return scores if self.scales is None else scores * tf.gather(self.scales, rows)

    def score_own(self, queries: Any, rows: Any) -> Any:
        """Scores (n_queries, n) of each query with its own rows int32 (n_queries, n)."""
        scores = tf.linalg.matvec(self._gathered(rows), queries)
        return scores if self.scales is None else scores * tf.gather(self.scales, rows)

    def score_all(self, queries: Any, rows: Any) -> Any:
        """Scores (n_queries, n) of every query with the same rows int32 (n,)."""
        scores = tf.matmul(queries, self._gathered(rows), transpose_b=True)
        return scores if self.scales is None else scores * tf.gather(self.scales, rows)

    def score_span(self, queries: Any, start: Any, stop: Any) -> Any:
        """Scores (n_queries, stop - start) of every query with neighbouring rows."""
        numbers = tf.cast(self.numbers[start:stop], tf.float32)
        scores = tf.matmul(queries, numbers, transpose_b=True)
        return scores if self.scales is None else scores * self.scales[start:stop]

    def _gathered(self, rows: Any) -> Any:
        return tf.cast(tf.gather(self.numbers, rows), tf.float32)


def as_int8(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows as int8 of the same shape, and the scale of each row, float32 (n_rows,)."""
    codes = np.rint(rows * (127 / np.abs(rows).max(axis=1, keepdims=True)))
    scales = np.einsum("ij,ij->i", rows, rows) / np.einsum("ij,ij->i", rows, codes)
    return codes.astype(np.int8), scales.astype(np.float32)


def blocks(rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) of BLOCK_ROWS rows at a time: of a memory map no more than that is in memory."""
    for start in range(0, len(rows), BLOCK_ROWS):
        yield start, np.asarray(rows[start : start + BLOCK_ROWS])


# What is given


def as_rows(candidates: Any) -> np.ndarray:
    """float32 (n_rows, dim), without a copy where there need be none.

    Raises:
        ValueError: it is no matrix with a row.
    """
    rows = (
        candidates.numpy() if isinstance(candidates, (tf.Tensor, tf.Variable)) else np.asanyarray(candidates)
    )
    if rows.ndim != 2 or not rows.size or rows.dtype.kind != "f":
        raise ValueError(
            f"candidates are {rows.dtype} {rows.shape}, wanted float32 (n_rows, dim) with at least one row"
        )
    return rows if rows.dtype == np.float32 else rows.astype(np.float32)


def as_ids(identifiers: Any, n_rows: int) -> np.ndarray:
    """bytes (n_rows,); the passages of a document share one.

    Raises:
        ValueError: there are more or fewer, or one is empty, which stands for no document in answers.
    """
    if isinstance(identifiers, (tf.Tensor, tf.Variable)):
        identifiers = identifiers.numpy()
    ids = np.array([i if isinstance(i, bytes) else str(i).encode() for i in identifiers], object)
    if len(ids) != n_rows:
        raise ValueError(f"there are {len(ids)} identifiers, wanted one for each of {n_rows} rows")
    empty = next((row for row, name in enumerate(ids) if not name), None)
    if empty is not None:
        raise ValueError(f"the identifier of row {empty} is empty, which in answers stands for no document")
    return ids


def check_rows(rows: np.ndarray, ids: np.ndarray | None) -> None:
    """Refuse rows that ScaNN cannot take (a NaN ends the process) or that are no unit vectors.

    By a dot product the longer of two rows wins, whatever their directions.

    Raises:
        ValueError: the first such rows, by their ids where there are ids, and how many.
    """
    bad: list[int] = []
    n_bad = 0
    for start, block in blocks(rows):
        with np.errstate(over="ignore", invalid="ignore"):
            lengths = np.sqrt(np.einsum("ij,ij->i", block, block))
            wrong = start + np.flatnonzero(~(np.abs(lengths - 1) <= MOST_OFF))  # NaN is not
        bad, n_bad = [*bad, *wrong[: 3 - len(bad)].tolist()], n_bad + len(wrong)
    if bad:
        names = ", ".join(f"{row}" if ids is None else f"{row} ({_shown(ids[row])})" for row in bad)
        more = f" and {n_bad - len(bad):,} more" if n_bad > len(bad) else ""
        with np.errstate(over="ignore", invalid="ignore"):
            length = np.sqrt(np.einsum("i,i", rows[bad[0]], rows[bad[0]]))
        raise ValueError(
            f"rows {names}{more} are no unit vectors: the first has length {length:.4g}, wanted 1"
        )


def _shown(name: bytes) -> str:
    """An identifier as a message shows it: on one line, no byte of it lost for being no UTF-8."""
    text = " ".join(name.decode(errors="replace").split())
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return shown if len(shown) <= MOST_SHOWN else f"{shown[: MOST_SHOWN - 1]}…"
