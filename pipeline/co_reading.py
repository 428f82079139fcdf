"""Which two documents were ever read in one session: keys on disk, built by ranges, asked by millions.

A key is both documents' rows in one number, the smaller first. It is exact: nothing is sampled or hashed.
A session's pairs grow with the square of its length, so sessions of more than MAX_EXPANDED events are kept
as lists instead, and a question about two documents that both stand in such lists looks for one in common.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

MAX_EXPANDED = 64  # events of a session whose pairs are written out: at most 2,016
BLOCK = 4_000_000  # sessions that are looked through at once
SHIFT = np.uint64(32)
LONG = np.dtype([("document", np.int32), ("session", np.uint64)])


def pair_keys(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One uint64 for each two documents, whichever comes first; a and b are rows, int (n,)."""
    low, high = np.minimum(a, b).astype(np.uint64), np.maximum(a, b).astype(np.uint64)
    return (low << SHIFT) | high


def distinct(keys: np.ndarray) -> np.ndarray:
    """The keys sorted, each once. `np.unique` is many times slower here."""
    ordered = pl.Series(keys).sort().to_numpy()
    return ordered[np.flatnonzero(np.diff(ordered, prepend=~ordered[:1]))] if len(ordered) else ordered


def expand(session: np.ndarray, offsets: np.ndarray, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The keys of all documents that share one of these sessions.

    Args:
        session: uint64 (n,), names of the sessions.
        offsets: int (n + 1,): session i reads documents[offsets[i]:offsets[i + 1]].
        documents: int32 (n_events,), rows of the documents table.

    Returns:
        keys, distinct and sorted; and the events of long sessions, LONG.
    """
    lengths = np.diff(offsets)
    is_long = np.repeat(lengths > MAX_EXPANDED, lengths)
    at = np.flatnonzero(is_long)
    long = np.empty(len(at), LONG)
    long["document"], long["session"] = documents[at], np.repeat(session, lengths)[at]

    after = np.repeat(offsets[1:], lengths) - np.arange(len(documents)) - 1  # events behind it in its session
    here = np.flatnonzero(~is_long & (after > 0))
    parts = []
    lag = 1
    while len(here):
        a, b = documents[here], documents[here + lag]
        differ = a != b
        parts.append(pair_keys(a[differ], b[differ]))
        lag += 1
        here = here[after[here] >= lag]
    return distinct(np.concatenate(parts) if parts else np.empty(0, np.uint64)), long


def bounds(n_ranges: int, n_documents: int) -> np.ndarray:
    """First keys of the ranges 1, 2, ...: uint64 (n_ranges - 1,), ranges of about equally many keys.

    A key begins with the smaller of two rows, so the first rows begin twice as many pairs as the average.
    """
    share = 1 - np.sqrt(1 - np.arange(1, n_ranges) / n_ranges)
    return np.floor(share * n_documents).astype(np.uint64) << SHIFT


def by_range(keys: np.ndarray, limits: np.ndarray) -> list[np.ndarray]:
    """Sorted keys, cut at `bounds`."""
    return np.split(keys, np.searchsorted(keys, limits))


def merge(parts: Iterable[np.ndarray]) -> np.ndarray:
    """The keys of one range out of all buckets."""
    return distinct(np.concatenate([np.empty(0, np.uint64), *parts]))


@dataclass(frozen=True)
class CoReading:
    """Answers whether two documents were ever read in one session.

    Attributes:
        ranges: sorted keys, uint64, one array a range; may be memory-mapped.
        limits: `bounds` of the ranges.
        long_first: int64 (n_documents + 1,): where a document's entries in `long_sessions` begin.
        long_sessions: int64, numbers of the long sessions that hold a document, sorted for each.
        long_keys: uint64, the same as (document, session) keys, sorted.
    """

    ranges: Sequence[np.ndarray]
    limits: np.ndarray
    long_first: np.ndarray
    long_sessions: np.ndarray
    long_keys: np.ndarray

    @classmethod
    def of(
        cls, ranges: Sequence[np.ndarray], limits: np.ndarray, long: np.ndarray, n_documents: int
    ) -> "CoReading":
        _, number = np.unique(long["session"], return_inverse=True)
        keys = distinct((long["document"].astype(np.uint64) << SHIFT) | number.astype(np.uint64))
        starts = np.arange(n_documents + 1, dtype=np.uint64) << SHIFT
        sessions = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
        return cls(ranges, limits, np.searchsorted(keys, starts), sessions, keys)

    def __len__(self) -> int:
        """Pairs of documents in the ranges."""
        return sum(len(keys) for keys in self.ranges)

    def holds(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Whether the documents a[i] and b[i] share a session, bool (n,); a, b: rows, int (n,)."""
        keys = pair_keys(a, b)
        order = np.argsort(keys)
        keys = keys[order]  # asked in order, a large table is read from front to back
        answers = [
            isin_sorted(asked, held)
            for asked, held in zip(by_range(keys, self.limits), self.ranges, strict=True)
        ]
        found = np.empty(len(a), bool)
        found[order] = np.concatenate(answers)
        if len(self.long_keys):
            rest = np.flatnonzero(~found)
            n_of = np.diff(self.long_first)
            ends = np.cumsum(np.minimum(n_of[a[rest]], n_of[b[rest]]))
            for block in np.split(
                rest, np.searchsorted(ends, np.arange(BLOCK, ends[-1] if len(ends) else 0, BLOCK))
            ):
                found[block] = self._share_a_long_session(a[block], b[block])
        return found

    def _share_a_long_session(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        n_of = np.diff(self.long_first)
        swap = n_of[a] > n_of[b]
        few, many = np.where(swap, b, a), np.where(swap, a, b)
        times = n_of[few]
        asked = np.repeat(np.arange(len(a)), times)
        entry = (
            np.arange(len(asked)) - np.repeat(np.cumsum(times) - times, times) + self.long_first[few][asked]
        )
        keys = (many[asked].astype(np.uint64) << SHIFT) | self.long_sessions[entry].astype(np.uint64)
        found = np.zeros(len(a), bool)
        found[asked[isin_sorted(keys, self.long_keys)]] = True
        return found


def isin_sorted(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Whether each value stands in a sorted table, bool (n,)."""
    if not len(table):
        return np.zeros(len(values), bool)
    at = np.searchsorted(table, values)
    return table[np.minimum(at, len(table) - 1)] == values
