"""Stage `pairs`: events + documents -> pairs/, an Apache Beam batch job.

Straight lines of Beam transforms, each ending in one dict of counts:

    pieces  -> split by document -> GroupByKey -> make documents       (only without a documents file)
    pieces  -> split by user     -> GroupByKey -> cut sessions
    buckets -> survey            -> GroupByKey -> merge what was read together
    anchors -> find candidates                                         (only for hard negatives)
    buckets -> draw pairs

Each needs a fact about all that came before: which documents exist, when the held-out spans begin, how
popular a document is and with which others it was ever read.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import apache_beam as beam
import numpy as np
import polars as pl
import pyarrow as pa
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import create_runner

from pipeline import co_reading, hard_negatives, negatives, progress, storage
from pipeline import documents as documents_
from pipeline import events as events_
from pipeline.artifacts import Draft, Embeddings, Pairs, writing
from pipeline.bm25 import Bm25
from pipeline.co_reading import CoReading
from pipeline.config import DocumentsConfig, EventsConfig, PairsConfig, Strategy, as_dict
from pipeline.counts import SumCounts, by_prefix, failure, raise_failure, read_counts, write_counts
from pipeline.errors import ConfigError, InputError, PipelineError
from pipeline.hashing import mix, stable_hash
from pipeline.negatives import NONE, AskedPairs, Popularity
from pipeline.sessions import (
    COUNTS,
    CutBucket,
    Sessions,
    Split,
    as_dictionary,
    n_buckets_for,
    only,
    pieces,
    with_rows,
)

DEFAULT_RUNNER = "FnApiRunner"  # DirectRunner first fetches a binary from the network
DASK_RUNNER = "apache_beam.runners.dask.dask_runner.DaskRunner"
MAX_THREADS = 8  # of the default runner; each holds a bucket or a piece of a log in memory
SPANS = ("pairs", "dev", "test")  # by time; "pairs" are for training
PAIR_COLUMNS = [
    "anchor", "positive", "negative", "anchor_id", "positive_id", "negative_id", "session_id", "user_id",
]  # fmt: skip
ON_PURPOSE = ("too_few_readers", "too_many_events")  # rejects that are no fault of the log
ANCHORS = 2_000  # whose candidates are one element
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def inputs_of(pairs: PairsConfig, events: EventsConfig, documents: DocumentsConfig) -> list[dict[str, str]]:
    """The given files as {path, digest}, for the manifest and for telling whether anything changed.

    Raises:
        InputError: a path or glob matches no file, or a folder.
        ArtifactError: pairs.mined_from holds no complete embeddings.
    """
    given = [
        {"path": path, "digest": _digest(path)}
        for section, config in (("events", events), ("documents", documents))
        for path in storage.match(config.paths, f"{section}.paths")
    ]
    if pairs.negatives.get("mined"):
        earlier = _earlier(pairs)
        given.append({"path": str(earlier.path), "digest": earlier.digest})
    return given


def settings_of(pairs: PairsConfig, events: EventsConfig, documents: DocumentsConfig) -> dict[str, Any]:
    """What decides the result, for the manifest: not where files lie, only what is in them."""
    sections = {"pairs": as_dict(pairs), "events": as_dict(events), "documents": as_dict(documents)}
    places = (
        ("pairs", "temp_location"),
        ("pairs", "mined_from"),
        ("events", "paths"),
        ("documents", "paths"),
    )
    for section, place in places:
        sections[section].pop(place)
    return sections


def run(
    config: PairsConfig,
    events: EventsConfig,
    documents: DocumentsConfig,
    out: Path,
    beam_options: Sequence[str] = (),
) -> Pairs:
    """Run the job.

    Args:
        beam_options: as on Beam's command line, such as ["--runner", "FlinkRunner"].

    Raises:
        InputError: a file cannot be used, too many rows are rejected, or no session has two documents.
        ConfigError: an option that Beam does not know, or pairs.mined_from is the run's own work folder.
    """
    options = parse_options(beam_options)
    if config.mined_from and Path(config.mined_from).resolve() == out.parent.resolve():
        raise ConfigError(
            f"pairs.mined_from is {config.mined_from}, the work folder of this run: each run would "
            "change what the next is made of; name another --work, and mine from this one"
        )
    inputs = inputs_of(config, events, documents)
    settings = settings_of(config, events, documents)
    with writing(Pairs, out, config=settings, inputs=inputs) as draft:
        folder = str(draft.folder / "buckets")
        if config.temp_location:  # a folder of this run's own: others may share the place
            folder = f"{config.temp_location.rstrip('/')}/{draft.folder.name.lstrip('.')}"
        storage.remove_folder(folder)  # of a killed run: a bucket must not find another cut's files
        storage.make_folder(folder)
        job = Job(config, events, documents, draft, folder, options)
        job.write_documents()
        if events.paths:
            job.write_sessions()
            job.remove_events()
            job.write_pairs()
        else:
            job.say("no event log: documents alone")
            draft.facts |= {"dev_start": None, "test_start": None, "events": {}, "rejects": {}}
            draft.facts |= {"session_lengths": {}, "negatives": {}, "co_read": {}}
        draft.facts |= {"description": events.description, "gap_duration": config.gap_duration}
        storage.remove_folder(folder)
    return Pairs.open(out)


@dataclass
class Job:
    """One run of the stage: its settings, and the folder it fills."""

    config: PairsConfig
    events: EventsConfig
    documents: DocumentsConfig
    draft: Draft
    folder: str  # bucket files and all else that is gone at the end
    options: "Options"  # below

    @property
    def out(self) -> Path:
        return self.draft.folder

    @property
    def documents_file(self) -> str:
        return f"{self.folder}/documents.arrow"

    def say(self, line: str) -> None:
        print(f"pairs: {line}", file=sys.stderr, flush=True)

    # --- Documents -----------------------------------------------------------------------------------

    def write_documents(self) -> None:
        table = self._read_documents() if self.documents.paths else self._make_documents()
        storage.write_parquet(table, str(self.out / "documents-00000.parquet"))
        for_workers = table.with_row_index("row").select(
            "document_id",
            "text",
            hash=stable_hash("document_id"),
            same_text=pl.col("row").first().over("text"),  # the first row with it
        )
        types = pa.schema(
            {
                "document_id": pa.string(),
                "text": pa.large_string(),
                "hash": pa.uint64(),
                "same_text": pa.int32(),
            }
        )
        storage.write_arrow(for_workers.to_arrow().cast(types), self.documents_file, compression=None)
        self.draft.rows["documents"] = len(table)
        self.say(f"{len(table):,} documents")

    def _read_documents(self) -> pl.DataFrame:
        config, tables = self.documents, []
        text = [config.text] if isinstance(config.text, str) else list(config.text)
        for path in storage.match(config.paths, "documents.paths"):
            with storage.open_file(path) as file:
                table = documents_.read(
                    file,
                    path,
                    events_.format_of(path, config.format),
                    document_id=config.document_id,
                    text=text,
                    separator=config.separator,
                    title=config.title,
                )
            tables.append((path, table))
        return documents_.unique(tables)

    def _make_documents(self) -> pl.DataFrame:
        """Documents from the highlights, where no documents file is given."""
        made = f"{self.folder}/made"
        storage.make_folder(made)
        self._split_and_group("documents", None, MakeDocuments(self.documents.min_readers, made))
        parts = [storage.read_parquet(path) for path in storage.names(f"{made}/documents-*")]
        storage.remove_folder(made)
        table = pl.concat(parts) if parts else pl.DataFrame()
        if table.is_empty():
            raise InputError(
                f"{', '.join(self.events.paths)}: no document has highlighted text from "
                f"documents.min_readers = {self.documents.min_readers} readers; give a "
                "documents file, or check events.text"
            )
        return table.sort("document_id")

    # --- Sessions ------------------------------------------------------------------------------------

    def write_sessions(self) -> None:
        """Events to sessions-*.parquet and rejects-*.parquet; conservation is checked."""
        cut = CutBucket(
            gap_duration=self.config.gap_duration,
            max_events_per_user=self.config.max_events_per_user,
            documents=self.documents_file,
            folder=self.folder,
            out=str(self.out),
        )
        counts = self._split_and_group("sessions", self.documents_file, cut)
        read, rejected = counts.get("read", 0), counts.get("rejected", 0)
        in_sessions, duplicates = counts.get("in_sessions", 0), counts.get("duplicates", 0)
        reasons = by_prefix(counts, "rejected:")
        self._write_rejects()
        if not read:
            raise InputError(f"{', '.join(self.events.paths)}: no events in it")
        faults = rejected - sum(reasons.get(reason, 0) for reason in ON_PURPOSE)
        if faults > self.events.max_rejected_share * read:
            raise InputError(
                f"{faults:,} of {read:,} events were rejected "
                f"({', '.join(f'{reason} {n:,}' for reason, n in reasons.items())}), more than "
                f"events.max_rejected_share = {self.events.max_rejected_share}: {self._first_reject()}"
            )
        if read != in_sessions + duplicates + rejected:
            raise PipelineError(
                f"{read} events were read, but {in_sessions} are in sessions, {duplicates} are duplicates "
                f"and {rejected} rejected: the counts do not add up, so nothing is kept"
            )
        if not in_sessions:
            raise InputError(f"{', '.join(self.events.paths)}: no event can be used: {self._first_reject()}")
        self.draft.rows |= {"events": read, "sessions": counts["sessions"], "rejects": rejected}
        self.draft.facts |= {
            "events": {
                "read": read,
                "in_sessions": in_sessions,
                "duplicates": duplicates,
                "rejected": rejected,
            },
            "rejects": reasons,
            "session_lengths": dict(
                sorted(by_prefix(counts, "length:").items(), key=lambda item: int(item[0]))
            ),
        }
        self.say(
            f"{read:,} events: {in_sessions:,} in {counts['sessions']:,} sessions, "
            f"{duplicates:,} duplicates, {rejected:,} rejected"
        )

    def remove_events(self) -> None:
        """Make room: once the sessions are cut, nobody reads the events again."""
        for kind in ("events", "crowded"):
            storage.remove(f"{self.folder}/*-{kind}-*")

    def _write_rejects(self) -> None:
        """The workers' rejects in one place, by file and line."""
        parts = [storage.read_parquet(path) for path in storage.names(f"{self.folder}/rejects-*")]
        if parts:
            rejects = pl.concat(parts).sort("file", "line", "detail", nulls_last=True)
            storage.write_parquet(rejects, str(self.out / "rejects-00000.parquet"))

    def _first_reject(self) -> str:
        rejects = storage.read_parquet(str(self.out / "rejects-00000.parquet"))
        faults = rejects.filter(~pl.col("reason").is_in(ON_PURPOSE))
        row: dict[str, Any] = (rejects if faults.is_empty() else faults).row(0, named=True)
        where = f"{row['file']} line {row['line']}, " if row["file"] else ""
        return f"first {where}{row['reason']}, {row['detail'][:120]}"

    # --- Pairs ---------------------------------------------------------------------------------------

    def write_pairs(self) -> None:
        """Sessions to pairs-*, dev-* and test-*.parquet."""
        files = storage.names(f"{self.folder}/*-sessions.arrow")
        dev_start, test_start = held_out_spans(files, self.config.holdout_share)
        before = dev_start or test_start
        n_documents, n_ranges = self.draft.rows["documents"], max(16, len(files) // 8)
        # In one order, whatever the config's: the order decides which pair asks which strategy.
        given = self.config.negatives
        shares = {str(name): given[name] for name in get_args(Strategy) if given.get(name)}
        hard: tuple[str, ...] = tuple(name for name in ("bm25", "mined") if name in shares)
        seed = self.config.seed

        self._survey(Survey(self.folder, n_documents, n_ranges, before, seed, tuple(shares.items()), hard))
        met = MetFiles(self.folder, n_documents, n_ranges)
        refused = {name: self._find_candidates(name, met) for name in hard}
        draw = DrawPairs(
            out=str(self.out),
            folder=self.folder,
            met=met,
            shares=tuple(shares.items()),
            spans=(dev_start, test_start),
            seed=seed,
            max_draws=self.config.max_draws,
            popularity_exponent=self.config.popularity_exponent,
            max_positive_ratio=self.config.max_positive_ratio,
            mined_from=self._mined_from if "mined" in shares else None,
        )
        total = self.draft.rows["sessions"]
        counts = self._run("pairs", files, total, "session", [("draw", beam.Map(draw))])
        self._note_pairs(counts, refused)
        self.draft.facts |= {"dev_start": _iso(dev_start), "test_start": _iso(test_start)}

    def _survey(self, survey: "Survey") -> None:
        """Popularity, and which documents were read together."""
        files = storage.names(f"{self.folder}/*-sessions.arrow")
        lines = [
            ("survey", beam.FlatMap(survey)),
            ("group", beam.GroupByKey()),
            ("merge", beam.Map(MergeRange(self.folder))),
        ]
        counts = self._run("survey", files, self.draft.rows["sessions"], "session", lines)
        storage.remove(f"{self.folder}/keys-*")  # not by who merged them: a step may be tried again
        self.draft.facts["co_read"] = {
            "pairs": counts.get("co_read", 0),
            "long_sessions": counts.get("long", 0),
        }
        parts = [storage.read_arrow(path) for path in storage.names(f"{self.folder}/popularity-*")]
        popularity = add_popularity(parts, survey.n_documents)
        storage.write_array(popularity.n_events, f"{self.folder}/n_events.npy")
        storage.write_array(popularity.only_reader, f"{self.folder}/only_reader.npy")

    def _find_candidates(self, name: str, met: "MetFiles") -> int:
        """The hard documents of every anchor that asks for one; returns how many the filter refused."""
        parts = [storage.read_array(path) for path in storage.names(f"{self.folder}/anchors-{name}-*")]
        anchors = np.unique(np.concatenate([np.empty(0, np.int32), *parts]))
        blocks = [anchors[start : start + ANCHORS] for start in range(0, len(anchors), ANCHORS)]
        texts = only(storage.read_arrow(self.documents_file)["text"])
        if name == "bm25":
            self.say(f"indexing {len(texts):,} documents by BM25")
            write_bm25(texts, self.folder)
        else:
            ids = only(storage.read_arrow(self.documents_file)["document_id"])
            storage.write_array(rows_in(_earlier(self.config), ids), f"{self.folder}/mined-rows.npy")
        mined_from = self._mined_from if name == "mined" else None
        find = FindCandidates(name, self.folder, met, self.config.n_candidates, mined_from)
        total = len(anchors)
        counts = self._run(
            f"candidates {name}", list(enumerate(blocks)), total, "anchor", [("find", beam.Map(find))]
        )
        return counts.get("refused", 0)

    @property
    def _mined_from(self) -> str:
        return str(_earlier(self.config).path)

    def _note_pairs(self, counts: dict[str, Any], refused: dict[str, int]) -> None:
        for span in SPANS:
            self.draft.rows[span] = counts.get(span, 0)
        no_negative = counts.get("no_negative", 0)
        self.draft.rows["rejects"] += no_negative
        if no_negative:
            self.draft.facts["rejects"]["no_negative"] = no_negative
        given, filtered = by_prefix(counts, "negatives:"), by_prefix(counts, "refused:")
        self.draft.facts["negatives"] = {
            name: {"given": given.get(name, 0), "refused": filtered.get(name, 0) + refused.get(name, 0)}
            for name, share in self.config.negatives.items()
            if share
        }
        if not counts.get("pairs"):
            why = f" ({no_negative:,} had no eligible negative)" if no_negative else ""
            raise InputError(
                f"{self.draft.rows['sessions']:,} sessions gave no pair to train on{why}: wanted at least "
                "one session of two different documents, and other readers; check events.user_id, "
                "events.timestamp and pairs.gap_duration"
            )
        self.say(
            f"{counts['pairs']:,} pairs to train on, {counts.get('dev', 0):,} for dev, "
            f"{counts.get('test', 0):,} for test, {no_negative:,} without a negative"
        )
        for name, found in self.draft.facts["negatives"].items():
            refused_draws = f"{found['refused']:,} refused, read with the anchor"
            self.say(f"negatives by {name}: {found['given']:,}; {refused_draws}")

    # --- Lines ---------------------------------------------------------------------------------------

    def _split_and_group(self, name: str, documents: str | None, per_bucket: Callable) -> dict[str, Any]:
        columns = events_.Columns(
            self.events.user_id, self.events.document_id, self.events.timestamp, self.events.text
        )
        found = pieces(storage.match(self.events.paths, "events.paths"), self.events.format)
        n_buckets = n_buckets_for(found) if self.config.n_buckets == "auto" else self.config.n_buckets
        split = Split(
            columns=columns,
            format=self.events.format,
            n_buckets=n_buckets,
            folder=self.folder,
            marks=self._marks(name),
            documents=documents,
            unknown_reason="unknown_document" if self.documents.paths else "too_few_readers",
            max_events_per_user=self.config.max_events_per_user,
        )
        n_files = len({piece.path for piece in found})
        self.say(f"reading {n_files:,} log file{'s' * (n_files != 1)} for {name}, {n_buckets:,} buckets")
        transforms = [
            ("split", beam.FlatMap(split)),
            ("group", beam.GroupByKey()),
            ("make" if documents is None else "cut", beam.Map(per_bucket)),
        ]
        return self._run(name, found, sum(piece.n_bytes for piece in found), "B", transforms)

    def _marks(self, name: str) -> str:
        return f"{self.folder}/marks-{name.replace(' ', '-')}"

    def _run(
        self, name: str, elements: list, total: int, unit: str, transforms: list[tuple[str, beam.PTransform]]
    ) -> dict[str, Any]:
        """Run one straight line and return its summed counts; a worker's failure is raised here."""
        counts_file = f"{self.folder}/counts-{name.replace(' ', '-')}.parquet"
        with (
            progress.shown(f"pairs: {name}", total, unit, self._marks(name)),
            beam.Pipeline(runner=self.options.runner, options=self.options.beam) as pipeline,
        ):
            collection = pipeline | f"{name}: elements" >> beam.Create(elements)
            for label, transform in transforms:
                collection = collection | label >> transform
            _ = (
                collection
                | "sum" >> beam.CombineGlobally(SumCounts())
                | "write counts" >> beam.Map(write_counts, counts_file)
            )
        counts = read_counts(counts_file)
        raise_failure(counts)
        return counts


# --- Plain functions ---------------------------------------------------------------------------------


def held_out_spans(files: Iterable[str], share: float) -> tuple[int | None, int | None]:
    """When the dev span and the test span begin, by the start of sessions that give pairs.

    Args:
        files: sessions as `CutBucket` leaves them.

    Returns:
        (dev_start, test_start), microseconds since 1970: the last `share` of those sessions start at
        test_start or later, the `share` before them at dev_start or later; None for a span that would hold
        none.
    """
    parts = [np.empty(0, np.int64)]
    for path in files:
        sessions = Sessions.from_arrow(storage.read_arrow(path))
        parts.append(sessions.start[giving_pairs(sessions)])
    starts = np.sort(np.concatenate(parts))
    n_held_out = int(len(starts) * share)
    if not n_held_out:
        return None, None
    return int(starts[-2 * n_held_out]), int(starts[-n_held_out])


def giving_pairs(sessions: Sessions) -> np.ndarray:
    """Rows of the sessions with at least two different documents, ascending."""
    session, _, _ = next_to_each_other(sessions)
    return session[np.flatnonzero(np.diff(session, prepend=-1))]


def next_to_each_other(sessions: Sessions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every two different documents that follow each other in a session, in reading order.

    Returns:
        (session, anchor, positive), int32 each: rows of `sessions` and of the documents table.
    """
    session = np.repeat(np.arange(len(sessions), dtype=np.int32), sessions.lengths)
    documents = sessions.documents
    at = np.flatnonzero((session[1:] == session[:-1]) & (documents[1:] != documents[:-1]))
    return session[at], documents[at], documents[at + 1]


def ask(sessions: Sessions, hashes: np.ndarray, seed: int) -> tuple[np.ndarray, AskedPairs]:
    """The pairs of sessions, each (session, anchor, positive) once, and the row of each one's session.

    Args:
        hashes: uint64 (n_documents,), `stable_hash` of the document_ids.
    """
    session, anchor, positive = next_to_each_other(sessions)
    key = mix(np.uint64(seed), sessions.session[session], hashes[anchor], hashes[positive])
    first = np.flatnonzero(pl.Series(key).is_first_distinct().to_numpy())
    session = session[first]
    return session, AskedPairs(key[first], sessions.user[session], anchor[first], positive[first])


def add_popularity(parts: Iterable[pa.Table], n_documents: int) -> Popularity:
    """The buckets' popularity in one; a user is in one bucket only."""
    n_events, readers = np.zeros(n_documents, np.int64), np.zeros(n_documents, np.int64)
    only_reader = np.zeros(n_documents, np.uint64)
    for part in parts:
        document = part["document"].to_numpy()
        n_events[document] += part["n_events"].to_numpy()
        readers[document] += np.where(part["only_reader"].to_numpy(), 1, 2)
        only_reader[document] = part["only_reader"].to_numpy()
    only_reader[readers != 1] = 0
    return Popularity(n_events, only_reader)


def write_bm25(texts: pa.Array, folder: str) -> None:
    """The BM25 index of the documents, and the documents as queries, as arrays that workers map."""
    index = Bm25.of(texts.to_pylist())
    for name, table in (("scores", index.scores), ("counts", index.counts(texts.to_pylist()))):
        for part in ("data", "indices", "indptr"):
            storage.write_array(getattr(table, part), f"{folder}/bm25-{name}-{part}.npy")
        storage.write_array(np.array(table.shape), f"{folder}/bm25-{name}-shape.npy")


def rows_in(earlier: Embeddings, document_ids: pa.Array) -> np.ndarray:
    """Where each document's vector is in an earlier run's matrix, int64 (n,); -1 for one it did not have."""
    theirs = pl.read_parquet(earlier.path / "documents.parquet", columns=["document_id"])
    theirs = theirs.with_columns(row=pl.int_range(pl.len(), dtype=pl.Int64))
    ours = pl.DataFrame({"document_id": pl.Series(document_ids)})
    return (
        ours.join(theirs, on="document_id", how="left", maintain_order="left")["row"].fill_null(-1).to_numpy()
    )


def _earlier(config: PairsConfig) -> Embeddings:
    return Embeddings.open(Path(str(config.mined_from)) / "embeddings")


def _iso(microseconds: int | None) -> str | None:
    return None if microseconds is None else (EPOCH + timedelta(microseconds=microseconds)).isoformat()


# --- What workers run --------------------------------------------------------------------------------


@dataclass(frozen=True)
class MakeDocuments:
    """Makes one bucket's documents from its highlights and writes documents-BBBBB.parquet."""

    min_readers: int
    out: str

    def __call__(self, keyed: tuple[int, Iterable[Any]]) -> dict[str, Any]:
        return with_rows(keyed, self._make)

    def _make(self, bucket: int, paths: list[str]) -> dict[str, Any]:
        rows = pl.concat([pl.DataFrame(storage.read_arrow(path)) for path in paths])
        made, left_out = documents_.make(rows, self.min_readers)
        storage.write_parquet(made, f"{self.out}/documents-{bucket:05d}.parquet")
        return {"documents": len(made), "left_out": len(left_out)}


def _number_of(sessions_file: str) -> str:
    """The bucket in a file's name."""
    return Path(sessions_file).name.split("-")[0]


@dataclass(frozen=True)
class Survey:
    """Counts in one bucket how popular each document is, and writes which were read together, by ranges.

    Attributes:
        before: microseconds; only sessions that start earlier count for popularity (later reading must not
            choose the negatives). What was read together counts whenever it was.
        hard: strategies for whose pairs the anchors are noted.
    """

    folder: str
    n_documents: int
    n_ranges: int
    before: int | None
    seed: int
    shares: tuple[tuple[str, float], ...]
    hard: tuple[str, ...]

    def __call__(self, sessions_file: str) -> list[tuple[int, Any]]:
        """Sessions file -> (range, keys file) and (COUNTS, counts)."""
        try:
            return list(self._survey(sessions_file))
        except (PipelineError, OSError) as error:
            return [(COUNTS, failure(error))]

    def _survey(self, sessions_file: str) -> Iterator[tuple[int, Any]]:
        bucket = _number_of(sessions_file)
        sessions = Sessions.from_arrow(storage.read_arrow(sessions_file))
        storage.write_arrow(self._popularity(sessions), f"{self.folder}/popularity-{bucket}.arrow")
        keys, long = co_reading.expand(sessions.session, sessions.offsets, sessions.documents)
        limits = co_reading.bounds(self.n_ranges, self.n_documents)
        for number, part in enumerate(co_reading.by_range(keys, limits)):
            if len(part):
                path = f"{self.folder}/keys-{number:05d}-{bucket}.npy"
                storage.write_array(part, path)
                yield number, path
        if len(long):
            storage.write_array(long, f"{self.folder}/long-{bucket}.npy")
        if self.hard:
            self._note_anchors(sessions, bucket)
        progress.mark(f"{self.folder}/marks-survey", bucket, len(sessions), {})
        yield COUNTS, {"long": len(np.unique(long["session"]))}

    def _popularity(self, sessions: Sessions) -> pa.Table:
        """document, n_events, and only_reader: the hash of the only user, or 0 for several."""
        early = np.full(len(sessions), True) if self.before is None else sessions.start < self.before
        documents = sessions.documents[np.repeat(early, sessions.lengths)]
        users = np.repeat(sessions.user[early], sessions.lengths[early])
        n_events = np.bincount(documents, minlength=self.n_documents)
        reader = np.zeros(self.n_documents, np.uint64)
        reader[documents] = users  # one of them
        reader[documents[reader[documents] != users]] = 0  # and there is another
        read = np.flatnonzero(n_events)
        return pa.table(
            {"document": read.astype(np.int32), "n_events": n_events[read], "only_reader": reader[read]}
        )

    def _note_anchors(self, sessions: Sessions, bucket: str) -> None:
        hashes = only(storage.read_arrow(f"{self.folder}/documents.arrow")["hash"]).to_numpy()
        _, pairs = ask(sessions, hashes, self.seed)
        shares = dict(self.shares)
        own = negatives.assign(pairs.key, shares)
        for name in self.hard:
            anchors = np.unique(pairs.anchor[own == list(shares).index(name)])
            storage.write_array(anchors, f"{self.folder}/anchors-{name}-{bucket}.npy")


@dataclass(frozen=True)
class MergeRange:
    """Merges all buckets' keys of one range into met-RRRRR.npy."""

    folder: str

    def __call__(self, keyed: tuple[int, Iterable[Any]]) -> dict[str, Any]:
        return with_rows(keyed, self._merge)

    def _merge(self, number: int, paths: list[str]) -> dict[str, Any]:
        keys = co_reading.merge(storage.read_array(path) for path in paths)
        storage.write_array(keys, f"{self.folder}/met-{number:05d}.npy")
        return {"co_read": len(keys)}


@dataclass(frozen=True)
class MetFiles:
    """Where the keys of documents that were read together are."""

    folder: str
    n_documents: int
    n_ranges: int

    def open(self) -> CoReading:
        ranges = []
        for number in range(self.n_ranges):
            path = f"{self.folder}/met-{number:05d}.npy"
            ranges.append(storage.read_array(path) if storage.names(path) else np.empty(0, np.uint64))
        long = [storage.read_array(path) for path in storage.names(f"{self.folder}/long-*")]
        limits = co_reading.bounds(self.n_ranges, self.n_documents)
        long_sessions = np.concatenate([np.empty(0, co_reading.LONG), *long])
        return CoReading.of(ranges, limits, long_sessions, self.n_documents)


@dataclass(frozen=True)
class FindCandidates:
    """Finds the hard documents of a block of anchors and writes candidates-NAME-BBBBB.arrow."""

    name: str  # "bm25" or "mined"
    folder: str
    met: MetFiles
    n_candidates: int
    mined_from: str | None

    def __call__(self, numbered: tuple[int, np.ndarray]) -> dict[str, Any]:
        number, anchors = numbered
        try:
            return self._find(number, anchors)
        except (PipelineError, OSError) as error:
            return failure(error)

    def _find(self, number: int, anchors: np.ndarray) -> dict[str, Any]:
        scores = (
            bm25_scores(self.folder) if self.name == "bm25" else embedded(self.folder, self.mined_from).scores
        )
        met = self.met.open()
        found = hard_negatives.best(anchors, scores, self.met.n_documents, self.n_candidates, met)
        table = pa.table({"anchor": found.anchor, "document": found.document, "score": found.score})
        storage.write_arrow(table, f"{self.folder}/candidates-{self.name}-{number:05d}.arrow")
        progress.mark(f"{self.folder}/marks-candidates-{self.name}", f"{number:05d}", len(anchors), {})
        return {"refused": found.n_refused}


def bm25_scores(folder: str) -> hard_negatives.Scores:
    """BM25 of documents against all documents, from the arrays of `write_bm25`."""
    from scipy import sparse

    def table(name: str) -> Any:
        parts = (
            storage.read_array(f"{folder}/bm25-{name}-{part}.npy") for part in ("data", "indices", "indptr")
        )
        shape = tuple(storage.read_array(f"{folder}/bm25-{name}-shape.npy"))
        return sparse.csr_array(tuple(parts), shape=shape)

    scores, counts = table("scores"), table("counts")
    return lambda anchors: (counts[anchors] @ scores).toarray()


def embedded(folder: str, mined_from: str | None) -> hard_negatives.EarlierEmbeddings:
    matrix = np.load(Path(str(mined_from)) / "embeddings.npy", mmap_mode="r")
    return hard_negatives.EarlierEmbeddings(matrix, storage.read_array(f"{folder}/mined-rows.npy"))


@dataclass(frozen=True)
class DrawPairs:
    """Makes one bucket's pairs and writes them by span."""

    out: str
    folder: str
    met: MetFiles
    shares: tuple[tuple[str, float], ...]
    spans: tuple[int | None, int | None]  # dev_start, test_start: microseconds
    seed: int
    max_draws: int
    popularity_exponent: float
    max_positive_ratio: float
    mined_from: str | None

    def __call__(self, sessions_file: str) -> dict[str, Any]:
        try:
            return self._draw(sessions_file)
        except (PipelineError, OSError) as error:
            return failure(error)

    def _draw(self, sessions_file: str) -> dict[str, Any]:
        bucket = _number_of(sessions_file)
        sessions = Sessions.from_arrow(storage.read_arrow(sessions_file))
        documents = storage.read_arrow(f"{self.folder}/documents.arrow")
        session, pairs = ask(sessions, only(documents["hash"]).to_numpy(), self.seed)
        draws, met = strategies(self)
        same_text = only(documents["same_text"]).to_numpy()
        negative, counts = negatives.choose(pairs, dict(self.shares), draws, met, self.max_draws, same_text)
        lost = np.flatnonzero(negative == NONE)
        counts["no_negative"] = len(lost)
        table = self._table(sessions, session, pairs, negative, documents)
        if len(lost):
            ids = ["session_id", "user_id", "anchor_id", "positive_id"]
            missing = pl.DataFrame(table(lost).select(ids)).with_columns(pl.all().cast(pl.String))
            rejects = events_.rejects_of(missing.with_columns(reason=pl.lit("no_negative")), None)
            storage.write_parquet(rejects, f"{self.out}/rejects-pairs-{bucket}.parquet")
        for name, rows in zip(SPANS, self._by_span(sessions.start[session], negative), strict=True):
            if len(rows):
                storage.write_dictionaries(table(rows), f"{self.out}/{name}-{bucket}.parquet")
            counts[name] = len(rows)
        progress.mark(f"{self.folder}/marks-pairs", bucket, len(sessions), {"pairs": len(pairs)})
        return counts

    def _table(
        self,
        sessions: Sessions,
        session: np.ndarray,
        pairs: AskedPairs,
        negative: np.ndarray,
        documents: pa.Table,
    ) -> Callable[[np.ndarray], pa.Table]:
        """PAIR_COLUMNS at some rows of the pairs; a missing negative stands as the anchor."""
        texts, ids = only(documents["text"]), only(documents["document_id"])
        same_text = only(documents["same_text"]).to_numpy()
        found = np.where(negative == NONE, pairs.anchor, negative)
        of_user = sessions.first_of_user[session]

        def table(rows: np.ndarray) -> pa.Table:
            columns: dict[str, pa.Array] = {}
            for name, of in (("anchor", pairs.anchor), ("positive", pairs.positive), ("negative", found)):
                columns[name] = as_dictionary(same_text[of[rows]], texts)
                columns[f"{name}_id"] = as_dictionary(of[rows], ids)
            columns["session_id"] = as_dictionary(session[rows], sessions.session_id)
            columns["user_id"] = as_dictionary(of_user[rows], sessions.user_id)
            return pa.table({name: columns[name] for name in PAIR_COLUMNS})

        return table

    def _by_span(self, start: np.ndarray, negative: np.ndarray) -> Iterator[np.ndarray]:
        """Rows of the pairs with a negative: for training, dev and test."""
        dev_start, test_start = self.spans
        is_test = start >= test_start if test_start is not None else np.zeros(len(start), bool)
        is_dev = (start >= dev_start if dev_start is not None else np.zeros(len(start), bool)) & ~is_test
        for of_span in (~is_dev & ~is_test, is_dev, is_test):
            yield np.flatnonzero(of_span & (negative != NONE))


@lru_cache(maxsize=1)
def strategies(draw: DrawPairs) -> tuple[dict[str, negatives.Draw], CoReading]:
    """What every bucket of this worker draws from."""
    n_documents = draw.met.n_documents
    draws: dict[str, negatives.Draw] = {}
    for name, _ in draw.shares:
        if name == "random":
            draws[name] = negatives.draw_random(n_documents)
        elif name == "cross_user":
            n_events = storage.read_array(f"{draw.folder}/n_events.npy")
            only_reader = storage.read_array(f"{draw.folder}/only_reader.npy")
            draws[name] = negatives.draw_cross_user(
                Popularity(n_events, only_reader), draw.popularity_exponent
            )
        elif name == "bm25":
            draws[name] = negatives.draw_bm25(candidates(draw.folder, name, n_documents))
        else:
            score = embedded(draw.folder, draw.mined_from).score
            mined = candidates(draw.folder, name, n_documents)
            draws[name] = negatives.draw_mined(mined, score, draw.max_positive_ratio)
    return draws, draw.met.open()


def candidates(folder: str, strategy: str, n_documents: int) -> negatives.Candidates:
    parts = []
    for path in storage.names(f"{folder}/candidates-{strategy}-*"):
        table = storage.read_arrow(path)
        anchor, document, score = (only(table[name]).to_numpy() for name in table.column_names)
        parts.append(hard_negatives.Found(anchor, document, score, n_refused=0))
    return hard_negatives.by_anchor(parts, n_documents)


# --- Options and paths ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Beam's own options, checked."""

    beam: PipelineOptions
    runner: str


def parse_options(flags: Sequence[str]) -> Options:
    """Beam's options out of a command line.

    Raises:
        ConfigError: Beam knows no such option or runner, or what the runner needs is not installed.
    """
    # What goes wrong reaches the driver as a count or an exception; Beam would print it first.
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    flags = list(flags)
    only_runner = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_runner.add_argument("--runner", default=DEFAULT_RUNNER)
    known: Any = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    try:
        # First of all: the Dask runner brings its options when it is imported.
        runner = _load_runner(only_runner.parse_known_args(flags)[0].runner)
        for owner in PipelineOptions.__subclasses__():
            owner._add_argparse_args(known)
        given, unknown = known.parse_known_args(flags)
    except SystemExit:
        raise ConfigError(f"{' '.join(flags)}: Beam cannot read these options") from None
    if unknown:
        raise ConfigError(f"{' '.join(unknown)}: neither an option of this command nor one of Beam's")
    if runner == DASK_RUNNER and not (given.npartitions or given.partition_size):
        # Beam's 128 elements a task would leave a short list to one worker, and one element a task would make
        # a shuffle of very many tasks out of a long list.
        flags.append("--dask_npartitions=256")
    threads = {}
    if runner == DEFAULT_RUNNER and not any(flag.startswith("--direct_") for flag in flags):
        # Beam's default is one worker. Threads do: columns are worked on outside Python's lock.
        threads = {"direct_num_workers": _n_cores(), "direct_running_mode": "multi_threading"}
    return Options(PipelineOptions(flags, runner=runner, **threads), runner)


def _load_runner(name: str) -> str:
    """Import a runner; returns the name by which Beam finds it.

    Raises:
        ConfigError: there is none, or what it needs is not installed.
    """
    if name.lower() in ("dask", "daskrunner"):  # the one runner that Beam knows by its path alone
        name = DASK_RUNNER
    if name == DASK_RUNNER and find_spec("distributed") is None:
        raise ConfigError("--runner dask: distributed is not installed: pip install 'apache-beam[dask]'")
    try:
        create_runner(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise ConfigError(f"--runner {name}: {' '.join(str(error).split())}") from None
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # its level counts from its import on
    return name


def _n_cores() -> int:
    return min(len(os.sched_getaffinity(0)), MAX_THREADS)


@lru_cache(maxsize=4096)
def _digest(path: str) -> str:
    """Asked twice in a run: once to tell whether anything changed, once for the manifest."""
    return storage.digest(path)
