"""Which documents were read in one session, and by how many readers: assets.extra/related.parquet.

Only counts leave the sessions, and only of pairs that enough readers had: from fewer, a count could tell what
one of them read. Memory stays bounded: the reads lie in a few arrays (16 bytes and a hash each), and the
pairs of one range of documents at a time are made from them, counted, cut to the best and written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import Pairs

if TYPE_CHECKING:
    import polars as pl

# Places between two documents of one session that still count as read together. A session of up to 64
# documents counts whole, as in `co_reading`; of a longer one only neighbours, or its pairs would grow with
# the square of its length.
REACH = 63
PAIRS_AT_ONCE = 4_000_000  # both directions; 16 bytes each, and some times that while they are counted
ROW_GROUP = 65_536  # rows whose statistics a reader sees before it reads them
SCHEMA = pa.schema(
    {
        "document_id": pa.string(),
        "related_document_id": pa.string(),
        "n_readers": pa.int32(),
        "n_sessions": pa.int32(),
    }
)


@dataclass(frozen=True)
class Reads:
    """What was read in sessions of two documents and more, one element a document and session.

    Attributes:
        document: int32 (n,), places in the sorted document ids.
        reader: uint64 (n,), hashes of the users.
        before, after: int32 (n,), documents of the same session that stand before and behind this one.
    """

    document: np.ndarray
    reader: np.ndarray
    before: np.ndarray
    after: np.ndarray

    @classmethod
    def of(cls, document: np.ndarray, reader: np.ndarray, session: np.ndarray) -> Reads:
        """Args: session: int (n,), equal numbers stand together; no document stands twice in one."""
        starts = np.flatnonzero(np.diff(session, prepend=session[:1] - 1))
        lengths = np.diff(np.append(starts, len(session)))
        before = (np.arange(len(session)) - np.repeat(starts, lengths)).astype(np.int32)
        after = np.repeat(lengths, lengths).astype(np.int32) - before - 1
        shared = before + after > 0
        return cls(*(column[shared] for column in (document, reader, before, after)))

    @classmethod
    def joined(cls, parts: Sequence[Reads]) -> Reads:
        columns = ("document", "reader", "before", "after")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in columns))


def write(
    pairs: Pairs, document_ids: pa.ChunkedArray, path: Path, *, min_readers: int = 3, per_document: int = 20
) -> dict[str, int]:
    """Write the table, sorted by document_id, then best first: by n_readers, n_sessions, related_document_id.

    Args:
        pairs: its sessions are read.
        document_ids: of the index's rows; a document of several passages may stand there several times.
        min_readers: pairs that fewer different users read in one session are left out.
        per_document: related documents kept of each.

    Returns:
        rows, and documents that have any.
    """
    import polars as pl

    ids = pl.DataFrame({"document_id": pl.Series(document_ids, dtype=pl.String).unique().sort()})
    reads = read(pairs, ids)
    n_rows = n_documents = 0
    order = [pq.SortingColumn(0)]
    with pq.ParquetWriter(path, SCHEMA, compression="zstd", sorting_columns=order) as file:
        for first, last in ranges(reads, len(ids)):
            best = counted(*pairs_of(reads, first, last), min_readers=min_readers, per_document=per_document)
            if len(best):
                file.write_table(_named(best, ids["document_id"]), row_group_size=ROW_GROUP)
            n_rows += len(best)
            n_documents += best["document"].n_unique()
    return {"rows": n_rows, "documents": n_documents}


def read(pairs: Pairs, ids: pl.DataFrame) -> Reads:
    """All sessions' reads of the documents that are in the index; a document counts once a session.

    Args:
        ids: document_id, sorted.
    """
    places = ids.with_row_index("document")
    parts = [_read_part(part, places) for part in pairs.tables("sessions")]
    none = np.empty(0, np.int32)
    return Reads.joined([Reads(none, none.astype(np.uint64), none, none), *parts])


def _read_part(part: Path, places: pl.DataFrame) -> Reads:
    import polars as pl

    from pipeline.hashing import stable_hash

    rows = (
        pl.read_parquet(part, columns=["user_id", "document_ids"])
        .filter(pl.col("document_ids").list.len() > 1)
        .select(reader=stable_hash("user_id"), document_id=pl.col("document_ids").cast(pl.List(pl.String)))
        .with_row_index("session")
        .explode("document_id")
        .join(places, on="document_id", how="inner", maintain_order="left")
        .unique(["session", "document"], keep="first", maintain_order=True)
    )
    document = rows["document"].cast(pl.Int32).to_numpy()
    return Reads.of(document, rows["reader"].to_numpy(), rows["session"].cast(pl.Int64).to_numpy())


def ranges(reads: Reads, n_documents: int) -> Iterator[tuple[int, int]]:
    """(first, behind the last) place of documents whose pairs are made at once: at most PAIRS_AT_ONCE pairs,
    unless one document alone has more.
    """
    partners = np.minimum(reads.before, REACH) + np.minimum(reads.after, REACH)
    until = np.cumsum(np.bincount(reads.document, partners, n_documents))
    first = done = 0
    while first < n_documents:
        last = max(first + 1, int(np.searchsorted(until, done + PAIRS_AT_ONCE, "right")))
        yield first, last
        first, done = last, until[last - 1]


def pairs_of(reads: Reads, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What was read beside each of a range of documents, a row a session.

    Returns:
        document and other, int32; reader, uint64: each (n,).
    """
    here = np.flatnonzero((reads.document >= first) & (reads.document < last))
    document, other, reader = [], [], []
    for side, beside in ((1, reads.after), (-1, reads.before)):
        left = here
        for distance in range(1, REACH + 1):
            left = left[beside[left] >= distance]
            if not len(left):
                break
            document.append(reads.document[left])
            other.append(reads.document[left + side * distance])
            reader.append(reads.reader[left])
    none = np.empty(0, np.int32)
    return (
        np.concatenate([none, *document]),
        np.concatenate([none, *other]),
        np.concatenate([none.astype(np.uint64), *reader]),
    )


def counted(
    document: np.ndarray, other: np.ndarray, reader: np.ndarray, *, min_readers: int, per_document: int
) -> pl.DataFrame:
    """document, other, n_readers and n_sessions of what is kept, in the order of the file.

    Args:
        document, other, reader: as `pairs_of` gives them, (n,).
    """
    import polars as pl

    pair = ["document", "other"]
    rows = pl.DataFrame({"document": document, "other": other, "reader": reader})
    return (
        rows.group_by(*pair, "reader")
        .agg(times=pl.len())
        .group_by(pair)
        .agg(n_readers=pl.len(), n_sessions=pl.col("times").sum())
        .filter(pl.col("n_readers") >= min_readers)
        .sort("document", "n_readers", "n_sessions", "other", descending=[False, True, True, False])
        .filter(pl.int_range(pl.len()).over("document") < per_document)
    )


def _named(best: pl.DataFrame, ids: pl.Series) -> pa.Table:
    return pa.table(
        {
            "document_id": ids.gather(best["document"]).to_arrow(),
            "related_document_id": ids.gather(best["other"]).to_arrow(),
            "n_readers": best["n_readers"].to_arrow(),
            "n_sessions": best["n_sessions"].to_arrow(),
        }
    ).cast(SCHEMA)
