"""Beam transforms: events -> sessions. Rows stay in bucket files; only file names and counts pass.

    files | Split(...)          one file's events into one bucket file per hash of a column
          | GroupByKey()        all files of a bucket
          | Map(CutBucket(...)) its users' sessions, in one Parquet file

A step that is tried again writes the same bytes under the same name, so retries change nothing.
"""

import errno
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import apache_beam as beam
import numpy as np
import polars as pl
import pyarrow as pa
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from pipeline import events
from pipeline.errors import InputError, PipelineError, from_os_error

COUNTS = -1  # the key under which counts travel beside the buckets
CODECS = {"gz": "gzip", "zst": "zstd", "bz2": "bz2"}
ORDER = ["user_id", "timestamp", "document_id", "text"]


@dataclass(frozen=True)
class Split:
    """Reads one log file and writes its events into bucket files.

    Attributes:
        columns: the log's names.
        format: "auto", "jsonl", "csv" or "parquet".
        by: the column whose hash chooses the bucket: "user_id" or "document_id".
        n_buckets: how many.
        folder: where the bucket files go; any Beam file system that the workers share.
        known: Parquet file with the document_ids that exist, or None while there are none yet; events
            of other documents are rejected.
        unknown_reason: why they are.
    """

    columns: events.Columns
    format: str
    by: str
    n_buckets: int
    folder: str
    known: str | None = None
    unknown_reason: str = "unknown_document"

    def __call__(self, numbered: tuple[int, str]) -> list[tuple[int, Any]]:
        """(file number, path) -> (bucket, bucket file) and (COUNTS, counts)."""
        number, path = numbered
        try:
            return list(self._split(number, path))
        except (PipelineError, OSError) as error:
            return [(COUNTS, failure(error))]

    def _split(self, number: int, path: str) -> Iterator[tuple[int, Any]]:
        known = read_parquet(self.known, ["document_id"])["document_id"] if self.known else None
        counts: dict[str, Any] = {"read": 0, "rejected": 0}
        with open_file(path) as file:
            blocks = events.read(file, path, events.format_of(path, self.format), self.columns)
            for block, (rows, bad) in enumerate(blocks):
                counts["read"] += len(rows) + len(bad)
                if known is not None:
                    is_known = rows["document_id"].is_in(known.implode())
                    unknown = rows.filter(~is_known).with_columns(reason=pl.lit(self.unknown_reason))
                    bad = pl.concat([bad, events.rejects_of(unknown, path)])
                    rows = rows.filter(is_known)
                place = f"{number:06d}-{block:06d}"
                for bucket, part in by_bucket(rows.drop("line"), self.by, self.n_buckets):
                    name = f"{self.folder}/{self.by}-{bucket:05d}-{place}.parquet"
                    write_parquet(part, name)
                    yield bucket, name
                if len(bad):
                    write_parquet(bad, f"{self.folder}/rejects-{place}.parquet")
                    counts["rejected"] += len(bad)
                    for reason, count in bad["reason"].value_counts().iter_rows():
                        counts[f"rejected:{reason}"] = counts.get(f"rejected:{reason}", 0) + count
        yield COUNTS, counts


@dataclass(frozen=True)
class CutBucket:
    """Cuts one bucket's sessions and writes sessions-BBBBB.parquet into `out`."""

    gap_duration: int
    out: str

    def __call__(self, keyed: tuple[int, Iterable[Any]]) -> dict[str, Any]:
        return with_rows(keyed, self._cut)

    def _cut(self, bucket: int, rows: pl.DataFrame) -> dict[str, Any]:
        sessions, n_duplicates = cut(rows, self.gap_duration)
        write_parquet(sessions, f"{self.out}/sessions-{bucket:05d}.parquet")
        lengths = sessions["document_ids"].list.len()
        counts = {
            "in_sessions": int(lengths.sum() or 0),
            "duplicates": n_duplicates,
            "sessions": len(sessions),
        }
        return counts | {f"length:{length}": n for length, n in lengths.value_counts().iter_rows()}


def with_rows(
    keyed: tuple[int, Iterable[Any]], handle: Callable[[int, pl.DataFrame], dict[str, Any]]
) -> dict[str, Any]:
    """What `handle` counts in a bucket's rows; the sum, where the key is COUNTS; or the failure."""
    bucket, values = keyed
    if bucket == COUNTS:
        return add_counts(values)
    try:
        return handle(bucket, pl.concat([read_parquet(name) for name in sorted(values)]))
    except (PipelineError, OSError) as error:
        return failure(error)


def cut(rows: pl.DataFrame, gap_duration: int) -> tuple[pl.DataFrame, int]:
    """Cut whole users' events into sessions.

    Args:
        rows: user_id, document_id, timestamp, text; any order.
        gap_duration: seconds; a gap of exactly this starts a new session, as in Beam's `Sessions`.

    Returns:
        Sessions (session_id, user_id, start, end, document_ids), by user and start; and how many rows
        were duplicates: the same user, document, timestamp and text.
    """
    distinct = rows.unique(subset=ORDER).sort(ORDER, nulls_last=False)
    gap = pl.col("timestamp").diff().dt.total_microseconds()
    starts = (gap >= gap_duration * 1_000_000) | (pl.col("user_id") != pl.col("user_id").shift(1))
    sessions = (
        distinct.with_columns(_session=starts.fill_null(True).cum_sum())
        .group_by("_session", maintain_order=True)
        .agg(
            user_id=pl.col("user_id").first(),
            start=pl.col("timestamp").first(),
            end=pl.col("timestamp").last(),
            document_ids=pl.col("document_id"),
        )
    )
    micros = sessions["start"].dt.epoch("us")
    ids = [stable_hash(f"{user}\0{start}") for user, start in zip(sessions["user_id"], micros, strict=True)]
    session_id = pl.Series("session_id", [f"{value:016x}" for value in ids], pl.String)
    sessions = sessions.select(session_id, "user_id", "start", "end", "document_ids")
    return sessions, len(rows) - len(distinct)


def by_bucket(rows: pl.DataFrame, by: str, n_buckets: int) -> Iterator[tuple[int, pl.DataFrame]]:
    """(bucket, its rows), the bucket chosen by a hash that no library version changes."""
    if rows.is_empty():
        return
    values = rows[by].unique()
    buckets = pl.Series("bucket", [stable_hash(value) % n_buckets for value in values], pl.Int32)
    keyed = rows.join(pl.DataFrame({by: values, "_bucket": buckets}), on=by)
    for (bucket,), part in keyed.partition_by("_bucket", as_dict=True, include_key=False).items():
        yield int(bucket), part


def stable_hash(value: str) -> int:
    """64 bits of BLAKE2b: the same on every machine and in every release."""
    return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little")


def stable_hashes(values: Iterable[str]) -> np.ndarray:
    """`stable_hash` of each value, uint64 (n,)."""
    return np.fromiter((stable_hash(value) for value in values), np.uint64)


# --- Counts and failures travel as data: a runner's own exceptions lose the type and the message ----


def add_counts(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum counts by name; the first failure stays a failure."""
    total: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, value) if name == "failure" else total.get(name, 0) + value
    return total


def failure(error: PipelineError | OSError) -> dict[str, Any]:
    """What a worker could not do, in one line, and whether the input is to blame."""
    readable = error if isinstance(error, PipelineError) else from_os_error(error)
    if readable is None:
        readable = PipelineError(f"{type(error).__name__}: {error}")
    return {"failure": [readable.exit_code, str(readable)]}


def raise_failure(counts: Mapping[str, Any]) -> None:
    """Raise in the driver what `failure` recorded in a worker."""
    if "failure" in counts:
        exit_code, message = counts["failure"]
        raise InputError(message) if exit_code == 2 else PipelineError(message)


class SumCounts(beam.CombineFn):
    """`add_counts` as a Beam combiner."""

    def create_accumulator(self) -> dict[str, Any]:
        return {}

    def add_input(self, accumulator: dict[str, Any], counts: dict[str, Any]) -> dict[str, Any]:
        return add_counts([accumulator, counts])

    def merge_accumulators(self, accumulators: Iterable[dict[str, Any]]) -> dict[str, Any]:
        return add_counts(accumulators)

    def extract_output(self, accumulator: dict[str, Any]) -> dict[str, Any]:
        return accumulator


# --- Files on any Beam file system ------------------------------------------------------------------


@contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """Open a given file, decompressed by its ending.

    Beam's own decompression takes a file that was cut short for a whole one; Arrow's raises OSError.
    """
    codec = CODECS.get(path.rpartition(".")[2].lower())
    with FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED) as raw:
        if codec is None:
            yield raw
            return
        with pa.CompressedInputStream(pa.PythonFile(raw, "r"), codec) as decompressed:
            yield decompressed


def read_parquet(path: str, columns: list[str] | None = None) -> pl.DataFrame:
    with FileSystems.open(path) as file:
        return pl.read_parquet(file, columns=columns)


def write_parquet(rows: pl.DataFrame, path: str) -> None:
    """Write under another name and rename, so that nobody reads half a file."""
    temporary = f"{path}.part"
    try:
        with FileSystems.create(temporary, mime_type="application/octet-stream") as file:
            _write(rows, file)
    except OSError:
        FileSystems.delete([temporary])  # its room may be what is needed to say so
        raise
    if FileSystems.exists(path):
        FileSystems.delete([path])
    FileSystems.rename([temporary], [path])


def _write(rows: pl.DataFrame, file: BinaryIO) -> None:
    try:
        rows.write_parquet(file, compression="zstd")
    except pl.exceptions.PolarsError as error:
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device") from error
        raise
