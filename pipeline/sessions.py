"""Beam transforms: events -> sessions. Rows stay in bucket files; only file names and counts pass.

    pieces | FlatMap(Split(...)) one piece's events into bucket files, by a hash of the user
           | GroupByKey()        all files of a bucket
           | Map(CutBucket(...)) its users' sessions, in one Parquet file

A piece is a log file, or some row groups of a Parquet file. A step that is tried again writes the same bytes
under the same names, so retries change nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import events, storage
from pipeline.counts import COUNTS, add_counts, counted, keyed
from pipeline.documents import EXCLUDED
from pipeline.hashing import mix, stable_hash
from pipeline.progress import mark, marks_of

CHUNK_ROWS = 1_000_000  # events that a split holds in memory before it writes them into their buckets,
CHUNK_BYTES = 256 << 20  # or fewer, where their passages are long
PIECE_BYTES = 64 << 20  # of a Parquet log that are one element
ROW_BYTES, PLAIN_ROW_BYTES = 20, 150  # of an event in a compressed log and in one that is not: a guess
BUCKET_ROWS = 500_000  # events that `n_buckets: auto` wants in a bucket
MIN_BUCKETS, MAX_BUCKETS = 8, 4096
MICROSECONDS = 1_000_000
DAY = 86_400 * MICROSECONDS

CODED: dict[str, Any] = {  # an event in a bucket file
    "user": pl.UInt64,  # hash of user_id
    "user_id": pl.String,
    "document": pl.Int32,  # row of the documents table
    "timestamp": pl.Int64,  # microseconds since 1970, UTC
    "text": pl.UInt64,  # hash of the passage: all that telling a duplicate needs
}
CROWDED: dict[str, Any] = {  # a day of a user with too many events
    "user_id": pl.String,
    "day": pl.Int64,
    "events": pl.UInt32,
}


class Piece(NamedTuple):
    """What one element of the first step reads: a log file, or some row groups of one."""

    number: int
    path: str
    n_bytes: int
    rows: events.RowGroups | None = None


def pieces(paths: Iterable[str], format: str) -> list[Piece]:
    """Log files; a large Parquet file in pieces, because a reader can begin in the middle of it.

    Raises:
        InputError: a name says no format.
    """
    found: list[Piece] = []
    for path in paths:
        n_bytes = storage.size(path)
        cuts: list[tuple[int, events.RowGroups | None]] = [(n_bytes, None)]
        if events.format_of(path, format) == "parquet" and n_bytes > PIECE_BYTES:
            cuts = list(_row_groups(path, n_bytes)) or cuts
        for part, rows in cuts:
            found.append(Piece(len(found), path, part, rows))
    return found


def _row_groups(path: str, n_bytes: int) -> Iterator[tuple[int, events.RowGroups]]:
    """(bytes, row groups) of a Parquet file's pieces."""
    try:
        with storage.open_raw(path) as file:
            metadata = pq.read_metadata(file)
    except (pa.ArrowInvalid, OSError):
        return  # the worker that reads it says what is wrong
    groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
    share = n_bytes / max(1, sum(group.total_byte_size for group in groups))
    first, first_row, row, held = 0, 1, 1, 0.0
    for n, group in enumerate(groups):
        held += group.total_byte_size * share
        row += group.num_rows
        if held >= PIECE_BYTES or n == len(groups) - 1:
            yield int(held), events.RowGroups(tuple(range(first, n + 1)), first_row)
            first, first_row, held = n + 1, row, 0.0


def n_buckets_for(found: Iterable[Piece]) -> int:
    """How many buckets `auto` means: a power of two, so that the guess may be somewhat wrong."""
    rows = 0.0
    for piece in found:
        is_plain = piece.path.lower().endswith((".jsonl", ".ndjson", ".json", ".csv"))
        rows += piece.n_bytes / (PLAIN_ROW_BYTES if is_plain else ROW_BYTES)
    n_buckets = MIN_BUCKETS
    while n_buckets * BUCKET_ROWS < rows and n_buckets < MAX_BUCKETS:
        n_buckets *= 2
    return n_buckets


# --- Split -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Reads one piece of a log and writes its events into bucket files.

    Attributes:
        columns: the log's names.
        format: "auto", "jsonl", "csv" or "parquet".
        n_buckets: how many.
        folder: where the bucket files go; any Beam file system that the workers share.
        marks: where progress is said.
        documents: Arrow file with the document_ids that exist; events of others are rejected. None while
            there are none yet: then events are bucketed by their document and keep their texts.
        excluded: Arrow file with the document_ids that are kept out on purpose; None for none.
        unknown_reason: why events of other documents are rejected.
        max_events_per_user: a day; of a user with more in this piece only counts are written.
    """

    columns: events.Columns
    format: str
    n_buckets: int
    folder: str
    marks: str
    documents: str | None = None
    excluded: str | None = None
    unknown_reason: str = "unknown_document"
    max_events_per_user: int = 10_000

    def __call__(self, piece: Piece) -> list[tuple[int, Any]]:
        """Piece -> (bucket, bucket file) and (COUNTS, counts)."""
        return keyed(self._split(piece))

    def _split(self, piece: Piece) -> Iterator[tuple[int, Any]]:
        documents = read_document_ids(self.documents) if self.documents else None
        done = 0
        yield COUNTS, {"read": 0}  # an empty file has counts too
        for number, (rows, bad, position) in enumerate(self._chunks(piece)):
            counts = {"read": len(rows) + len(bad), "rejected": 0}
            place = f"{piece.number:06d}-{number:06d}"
            if documents is None:
                yield from self._write(rows.drop("line"), "passages", "document_id", place)
            else:
                rows, unknown = known(rows, documents)
                if len(unknown):
                    unknown = unknown.with_columns(reason=self._why_unknown())
                    bad = pl.concat([bad, events.rejects_of(unknown, piece.path)])
                rows, crowded = set_aside(coded(rows), self.max_events_per_user)
                yield from self._write(rows, "events", "user_id", place)
                yield from self._write(crowded, "crowded", "user_id", place)
            if len(bad):
                storage.write_parquet(bad, f"{self.folder}/rejects-{place}.parquet")
                counts["rejected"] = len(bad)
                counts |= {f"rejected:{reason}": n for reason, n in bad["reason"].value_counts().rows()}
            mark(self.marks, place, position - done, counts)
            done = position
            yield COUNTS, counts

    def _why_unknown(self) -> pl.Expr:
        if self.excluded is None:
            return pl.lit(self.unknown_reason)
        is_excluded = pl.col("document_id").is_in(read_document_ids(self.excluded)["document_id"].implode())
        return pl.when(is_excluded).then(pl.lit(EXCLUDED)).otherwise(pl.lit(self.unknown_reason))

    def _chunks(self, piece: Piece) -> Iterator[tuple[pl.DataFrame, pl.DataFrame, int]]:
        """(events, rejects, bytes read so far): blocks joined until they are worth a file a bucket."""
        format = events.format_of(piece.path, self.format)
        held: list[tuple[pl.DataFrame, pl.DataFrame]] = []
        n_rows, n_bytes = 0, 0.0
        with storage.open_raw(piece.path) as raw, storage.decompressed(raw, piece.path) as file:
            for rows, bad in events.read(file, piece.path, format, self.columns, rows_of=piece.rows):
                held.append((rows, bad))
                n_rows += len(rows) + len(bad)
                n_bytes += rows.estimated_size()
                if n_rows >= CHUNK_ROWS or n_bytes >= CHUNK_BYTES:
                    # a Parquet file is not read from front to back; its pieces are small: they count whole
                    yield *_joined(held), 0 if format == "parquet" else raw.tell()
                    held, n_rows, n_bytes = [], 0, 0.0
        if held:
            yield *_joined(held), piece.n_bytes

    def _write(self, rows: pl.DataFrame, name: str, by: str, place: str) -> Iterator[tuple[int, str]]:
        for bucket, part in by_bucket(rows, by, self.n_buckets):
            path = f"{self.folder}/{bucket:05d}-{name}-{place}.arrow"
            storage.write_arrow(part.to_arrow(), path)
            yield bucket, path


def _joined(held: list[tuple[pl.DataFrame, pl.DataFrame]]) -> tuple[pl.DataFrame, pl.DataFrame]:
    rows, bad = zip(*held, strict=True)
    return pl.concat(rows), pl.concat(bad)


def by_bucket(rows: pl.DataFrame, by: str, n_buckets: int) -> Iterator[tuple[int, pl.DataFrame]]:
    """(bucket, its rows), the bucket chosen by `stable_hash`."""
    if rows.is_empty():
        return
    keyed = rows.with_columns(_bucket=(stable_hash(by) % n_buckets).cast(pl.Int32))
    for (bucket,), part in keyed.partition_by("_bucket", as_dict=True, include_key=False).items():
        yield int(bucket), part


@lru_cache(maxsize=2)
def read_document_ids(path: str) -> pl.DataFrame:
    """document_id, and document: its row."""
    table = pl.DataFrame(storage.read_arrow(path).select(["document_id"]))
    return table.with_columns(document=pl.int_range(pl.len(), dtype=pl.Int32))


def known(rows: pl.DataFrame, documents: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The events of documents that exist, with their rows, and the others."""
    joined = rows.join(documents, on="document_id", how="left", maintain_order="left")
    is_known = joined["document"].is_not_null()
    if is_known.all():
        return joined, rows.clear()
    return joined.filter(is_known), rows.filter(~is_known)


def coded(rows: pl.DataFrame) -> pl.DataFrame:
    """Events in the form of CODED.

    Args:
        rows: user_id, document (row), timestamp, text.
    """
    return rows.select(
        user=stable_hash("user_id"),
        user_id=pl.col("user_id"),
        document=pl.col("document"),
        timestamp=pl.col("timestamp").to_physical(),
        # No passage is not an empty passage; a real hash of 0 is as unlikely as any other.
        text=stable_hash("text").fill_null(0),
    )


def events_a_day(rows: pl.DataFrame) -> pl.DataFrame:
    """user_id, day (UTC, since 1970) and events, of rows as CODED."""
    return rows.group_by("user_id", day=pl.col("timestamp").floordiv(DAY)).agg(events=pl.len())


def set_aside(rows: pl.DataFrame, max_events: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Take out users with more than `max_events` on a day (UTC): nobody reads that much.

    Args:
        rows: CODED.

    Returns:
        The other users' rows, and CROWDED: of each taken user the events of every day.
    """
    # The cheap question first: users who share these 16 bits are counted together.
    shared = np.bincount((rows["user"].to_numpy() >> np.uint64(48)).astype(np.int64))
    if shared.max(initial=0) <= max_events:
        return rows, pl.DataFrame(schema=CROWDED)
    many = rows.group_by("user").len().filter(pl.col("len") > max_events)
    if many.is_empty():
        return rows, pl.DataFrame(schema=CROWDED)
    days = events_a_day(rows.join(many, on="user", how="semi"))
    crowded = days.filter((pl.col("events").max().over("user_id")) > max_events).sort("user_id", "day")
    return rows.join(crowded, on="user_id", how="anti", maintain_order="left"), crowded


# --- Cut ---------------------------------------------------------------------------------------------


def with_rows(
    group: tuple[int, Iterable[Any]], handle: Callable[[int, list[str]], dict[str, Any]]
) -> dict[str, Any]:
    """What `handle` counts in a group's files; the sum, where the key is COUNTS; or the failure."""
    number, values = group
    return add_counts(values) if number == COUNTS else counted(handle, number, sorted(values))


@dataclass(frozen=True)
class CutBucket:
    """Cuts one bucket's sessions and writes sessions-BBBBB.parquet into `out`.

    What later steps need of them goes beside the bucket files as BBBBB-sessions.arrow.
    """

    gap_duration: int
    max_events_per_user: int
    documents: str
    folder: str
    out: str

    def __call__(self, group: tuple[int, Iterable[Any]]) -> dict[str, Any]:
        return with_rows(group, self._cut)

    def _cut(self, bucket: int, paths: list[str]) -> dict[str, Any]:
        rows, crowded = (_read_all(paths, name, schema) for name, schema in READ.items())
        rows, crowded = self._set_aside(rows, crowded)
        counts = {"rejected": 0}
        if len(crowded):
            rejects = rejects_of_crowded(crowded)
            storage.write_parquet(rejects, f"{self.folder}/rejects-users-{bucket:05d}.parquet")
            n_events = int(crowded["events"].sum())
            counts = {"rejected": n_events, "rejected:too_many_events": n_events}
        sessions, n_duplicates = cut(rows, self.gap_duration)
        document_ids = only(storage.read_arrow(self.documents)["document_id"])
        storage.write_dictionaries(sessions.table(document_ids), f"{self.out}/sessions-{bucket:05d}.parquet")
        storage.write_arrow(sessions.to_arrow(), f"{self.folder}/{bucket:05d}-sessions.arrow")
        lengths, times = np.unique(sessions.lengths, return_counts=True)
        counts |= {
            "in_sessions": len(sessions.documents),
            "duplicates": n_duplicates,
            "sessions": len(sessions),
        }
        mark(marks_of(self.folder, "sessions"), f"{bucket:05d}", 0, {"sessions": len(sessions)})
        return counts | {f"length:{length}": int(n) for length, n in zip(lengths, times, strict=True)}

    def _set_aside(self, rows: pl.DataFrame, crowded: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Also the users who are over the limit only with all pieces together, and all of a user's rows."""
        if len(crowded):
            rest = rows.join(crowded, on="user_id", how="semi")
            rows = rows.join(crowded, on="user_id", how="anti", maintain_order="left")
            crowded = pl.concat([crowded, events_a_day(rest).cast(crowded.schema)])
        rows, more = set_aside(rows, self.max_events_per_user)
        crowded = pl.concat([crowded, more.cast(crowded.schema)])
        return rows, crowded.group_by("user_id", "day").agg(pl.col("events").sum()).sort("user_id", "day")


READ = {"-events-": CODED, "-crowded-": CROWDED}


def _read_all(paths: list[str], name: str, schema: Mapping[str, Any]) -> pl.DataFrame:
    tables = [pl.DataFrame(storage.read_arrow(path)) for path in paths if name in path]
    return pl.concat([pl.DataFrame(schema=schema), *tables])


def rejects_of_crowded(crowded: pl.DataFrame) -> pl.DataFrame:
    """One reject a user: how many events, and how many on the fullest day."""
    users = crowded.group_by("user_id").agg(
        events=pl.col("events").sum(), most_in_a_day=pl.col("events").max()
    )
    return events.rejects_of(users.sort("user_id").with_columns(reason=pl.lit("too_many_events")), None)


@dataclass(frozen=True)
class Sessions:
    """Sessions by user (hash) and start, as columns.

    Attributes:
        session: uint64 (n,): hash of user and start, the same in every run.
        user: uint64 (n,): hash of user_id.
        user_id: pa.StringArray (n,).
        start, end: int64 (n,), microseconds since 1970.
        offsets: int32 (n + 1,): session i has the events offsets[i] to offsets[i + 1].
        documents: int32 (n_events,): rows of the documents table, in reading order.
    """

    session: np.ndarray
    user: np.ndarray
    user_id: pa.Array
    start: np.ndarray
    end: np.ndarray
    offsets: np.ndarray
    documents: np.ndarray

    def __len__(self) -> int:
        return len(self.session)

    @property
    def lengths(self) -> np.ndarray:
        """Events of each session, int32 (n,)."""
        return np.diff(self.offsets)

    @property
    def first_of_user(self) -> np.ndarray:
        """Row of the first session of each session's user, int64 (n,)."""
        user_id = pl.Series(self.user_id)
        begins = (user_id != user_id.shift(1)).fill_null(True).to_numpy()
        return np.maximum.accumulate(np.where(begins, np.arange(len(self)), 0))

    @property
    def session_id(self) -> pa.Array:
        """`session` as 16 hexadecimal digits."""
        digits = self.session.astype(">u8").tobytes().hex().encode()
        ends = np.arange(0, len(digits) + 1, 16, dtype=np.int32)
        return pa.StringArray.from_buffers(len(self), pa.py_buffer(ends), pa.py_buffer(digits))

    def table(self, document_ids: pa.Array) -> pa.Table:
        """The rows of sessions-*.parquet."""
        moment = pa.timestamp("us", tz="UTC")
        return pa.table(
            {
                "session_id": self.session_id,
                "user_id": self.user_id,
                "start": pa.array(self.start).cast(moment),
                "end": pa.array(self.end).cast(moment),
                "document_ids": pa.ListArray.from_arrays(
                    pa.array(self.offsets), as_dictionary(self.documents, document_ids)
                ),
            }
        )

    def to_arrow(self) -> pa.Table:
        documents = pa.ListArray.from_arrays(pa.array(self.offsets), pa.array(self.documents))
        names = ("session", "user", "start", "end")
        return (
            pa.table({name: getattr(self, name) for name in names})
            .append_column("user_id", self.user_id)
            .append_column("documents", documents)
        )

    @classmethod
    def from_arrow(cls, table: pa.Table) -> "Sessions":
        table = table.combine_chunks()
        documents = only(table["documents"])
        return cls(
            **{name: only(table[name]).to_numpy() for name in ("session", "user", "start", "end")},
            user_id=only(table["user_id"]),
            offsets=documents.offsets.to_numpy(),
            documents=documents.values.to_numpy(),
        )


def only(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def as_dictionary(rows: np.ndarray, values: pa.Array) -> pa.DictionaryArray:
    """`values` at `rows`, each value that occurs stored once.

    Of equal values always the same row must be asked for: Arrow writes a dictionary with repetitions into a
    page that is longer than its content, and the rest is whatever the memory held.
    """
    used = np.zeros(len(values), bool)
    used[rows] = True
    code = np.cumsum(used, dtype=np.int32) - 1
    return pa.DictionaryArray.from_arrays(pa.array(code[rows]), values.take(pa.array(np.flatnonzero(used))))


def cut(rows: pl.DataFrame, gap_duration: int) -> tuple[Sessions, int]:
    """Cut whole users' events into sessions.

    Args:
        rows: CODED, any order.
        gap_duration: seconds; a gap of exactly this starts a new session, as in Beam's `Sessions`.

    Returns:
        The sessions, and how many rows were duplicates: the same user, document, timestamp and text.
    """
    order, new_user = _by_user_and_time(rows)
    timestamp, document = order["timestamp"].to_numpy(), order["document"].to_numpy()
    duplicate = ~(new_user | _differs(timestamp) | _differs(document) | _differs(order["text"].to_numpy()))
    # of rows in order only the first of equal ones is kept, and its neighbours stay as far away
    long_after = np.diff(timestamp, prepend=timestamp[:1]) >= gap_duration * MICROSECONDS
    kept = np.flatnonzero(~duplicate)
    begins = np.flatnonzero((new_user | long_after)[kept])
    first = kept[begins]
    last = kept[np.append(begins[1:], len(kept))[: len(begins)] - 1]
    user, start = order["user"].to_numpy()[first], timestamp[first]
    sessions = Sessions(
        session=mix(user, start.view(np.uint64)),
        user=user,
        user_id=rows["user_id"].gather(order["row"].gather(first)).to_arrow().cast(pa.string()),
        start=start,
        end=timestamp[last],
        offsets=np.append(begins, len(kept)).astype(np.int32),
        documents=document[kept],
    )
    return sessions, int(duplicate.sum())


def _by_user_and_time(rows: pl.DataFrame) -> tuple[pl.DataFrame, np.ndarray]:
    """The rows in order, with `row`, the place each had; and where another user begins."""
    # numbers sort many times faster than ids
    keys = ["user", "timestamp", "document", "text"]
    numbers = rows.select(*keys, row=pl.int_range(pl.len(), dtype=pl.UInt32), other=pl.col("user_id").hash())
    order = numbers.sort(*keys)
    new_user = _differs(order["user"].to_numpy())
    if (~new_user & _differs(order["other"].to_numpy())).any():  # two users with one hash
        order = numbers.with_columns(rows["user_id"]).sort("user", "user_id", *keys[1:])
        another = order.select(pl.col("user_id") != pl.col("user_id").shift(1)).to_series()
        new_user = another.fill_null(True).to_numpy()
    return order, new_user


def _differs(values: np.ndarray) -> np.ndarray:
    """Whether a value differs from the one before it, bool (n,); the first does."""
    differs = np.ones(len(values), bool)
    differs[1:] = values[1:] != values[:-1]
    return differs
