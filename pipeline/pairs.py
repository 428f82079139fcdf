"""Stage `pairs`: events + documents -> pairs/, an Apache Beam batch job.

Three straight lines of Beam transforms, each ending in one dict of counts:

    files   -> split by document -> GroupByKey -> make documents   (only without a documents file)
    files   -> split by user     -> GroupByKey -> cut sessions
    buckets -> draw pairs

The later two need a fact about all that came before: which documents exist, when the held-out spans
begin and how popular each document is.
"""

import argparse
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import polars as pl
from apache_beam.io.filesystem import BeamIOError
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import create_runner

from pipeline import documents as documents_
from pipeline import events as events_
from pipeline.artifacts import Draft, Pairs, sha256, writing
from pipeline.config import DocumentsConfig, EventsConfig, PairsConfig, as_dict
from pipeline.errors import ConfigError, InputError, PipelineError
from pipeline.sessions import (
    CutBucket,
    Split,
    SumCounts,
    failure,
    open_file,
    raise_failure,
    read_parquet,
    stable_hashes,
    with_rows,
    write_parquet,
)

DEFAULT_RUNNER = "FnApiRunner"  # DirectRunner first fetches a binary from the network
SPANS = ("pairs", "dev", "test")  # by time; "pairs" are for training
PAIR_COLUMNS = [
    "anchor", "positive", "negative", "anchor_id", "positive_id", "negative_id", "session_id", "user_id",
]  # fmt: skip


def inputs_of(events: EventsConfig, documents: DocumentsConfig) -> list[dict[str, str]]:
    """The given files as {path, digest}, for the manifest and for telling whether anything changed.

    Raises:
        InputError: a path or glob matches no file, or a folder.
    """
    return [
        {"path": path, "digest": _digest(path)}
        for section, config in (("events", events), ("documents", documents))
        for path in _match(config.paths, f"{section}.paths")
    ]


def settings_of(pairs: PairsConfig, events: EventsConfig, documents: DocumentsConfig) -> dict[str, Any]:
    """What decides the result, for the manifest: not where files lie, only what is in them."""
    sections = {"pairs": as_dict(pairs), "events": as_dict(events), "documents": as_dict(documents)}
    for section, place in (("pairs", "temp_location"), ("events", "paths"), ("documents", "paths")):
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
        ConfigError: an option that Beam does not know.
    """
    options = parse_options(beam_options)
    inputs = inputs_of(events, documents)
    settings = settings_of(config, events, documents)
    with writing(Pairs, out, config=settings, inputs=inputs) as draft:
        buckets = str(draft.folder / "buckets")
        if config.temp_location:  # a folder of this run's own: others may share the place
            buckets = f"{config.temp_location.rstrip('/')}/{draft.folder.name.lstrip('.')}"
        _make_folder(buckets)
        job = Job(config, events, documents, draft, buckets, options)
        job.write_documents()
        if events.paths:
            job.write_sessions()
            job.write_pairs()
        else:
            job.say("no event log: documents alone")
            draft.facts |= {"dev_start": None, "test_start": None, "events": {}, "rejects": {}}
            draft.facts |= {"session_lengths": {}}
        draft.facts |= {"description": events.description, "gap_duration": config.gap_duration}
        FileSystems.delete([buckets])
    return Pairs.open(out)


@dataclass
class Job:
    """One run of the stage: its settings, and the folder it fills."""

    config: PairsConfig
    events: EventsConfig
    documents: DocumentsConfig
    draft: Draft
    buckets: str
    options: "Options"  # below

    @property
    def out(self) -> Path:
        return self.draft.folder

    @property
    def documents_file(self) -> str:
        return str(self.out / "documents-00000.parquet")

    def say(self, line: str) -> None:
        print(f"pairs: {line}", file=sys.stderr, flush=True)

    def write_documents(self) -> None:
        table = self._read_documents() if self.documents.paths else self._make_documents()
        write_parquet(table, self.documents_file)
        self.draft.rows["documents"] = len(table)
        self.say(f"{len(table):,} documents")

    def _read_documents(self) -> pl.DataFrame:
        config, tables = self.documents, []
        text = [config.text] if isinstance(config.text, str) else list(config.text)
        for path in _match(config.paths, "documents.paths"):
            with open_file(path) as file:
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
        made = f"{self.buckets}/made"
        _make_folder(made)
        self._split_and_group("document_id", None, MakeDocuments(self.documents.min_readers, made))
        parts = [read_parquet(path) for path in _match([f"{made}/documents-*"], None)]
        table = pl.concat(parts) if parts else pl.DataFrame()
        if table.is_empty():
            raise InputError(
                f"{', '.join(self.events.paths)}: no document has highlighted text from "
                f"documents.min_readers = {self.documents.min_readers} readers; give a "
                "documents file, or check events.text"
            )
        return table.sort("document_id")

    def write_sessions(self) -> None:
        """Events to sessions-*.parquet and rejects-*.parquet; conservation is checked."""
        counts = self._split_and_group(
            "user_id", self.documents_file, CutBucket(self.config.gap_duration, str(self.out))
        )
        read, rejected = counts.get("read", 0), counts.get("rejected", 0)
        in_sessions, duplicates = counts.get("in_sessions", 0), counts.get("duplicates", 0)
        reasons = _by_prefix(counts, "rejected:")
        self._write_rejects()
        if not read:
            raise InputError(f"{', '.join(self.events.paths)}: no events in it")
        # What too few readers highlighted is left out on purpose, not for a fault of the log.
        if rejected - reasons.get("too_few_readers", 0) > self.events.max_rejected_share * read:
            raise InputError(
                f"{rejected:,} of {read:,} events were rejected "
                f"({', '.join(f'{reason} {n:,}' for reason, n in reasons.items())}), more than "
                f"events.max_rejected_share = {self.events.max_rejected_share}; "
                f"see {self.out}/rejects-00000.parquet: {self._first_reject()}"
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
                sorted(_by_prefix(counts, "length:").items(), key=lambda item: int(item[0]))
            ),
        }
        self.say(
            f"{read:,} events: {in_sessions:,} in {counts['sessions']:,} sessions, "
            f"{duplicates:,} duplicates, {rejected:,} rejected"
        )

    def write_pairs(self) -> None:
        """Sessions to pairs-*, dev-* and test-*.parquet."""
        sessions = pl.scan_parquet(str(self.out / "sessions-*.parquet"))
        dev_start, test_start = held_out_spans(sessions, self.config.holdout_share)
        popularity = f"{self.buckets}/popularity.parquet"
        write_parquet(document_popularity(sessions, before=dev_start or test_start), popularity)
        draw = DrawPairs(
            out=str(self.out),
            documents=self.documents_file,
            popularity=popularity,
            dev_start=dev_start,
            test_start=test_start,
            seed=self.config.seed,
            max_draws=self.config.max_draws,
        )
        names = [str(path) for path in sorted(self.out.glob("sessions-*.parquet"))]
        counts = self._run("draw pairs", names, [beam.Map(draw)])
        for span in SPANS:
            self.draft.rows[span] = counts.get(span, 0)
        no_negative = counts.get("no_negative", 0)
        self.draft.rows["rejects"] += no_negative
        if no_negative:
            self.draft.facts["rejects"]["no_negative"] = no_negative
        self.draft.facts |= {
            "dev_start": dev_start and dev_start.isoformat(),
            "test_start": test_start and test_start.isoformat(),
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

    def _split_and_group(self, by: str, known: str | None, per_bucket: Callable) -> dict[str, Any]:
        columns = events_.Columns(
            self.events.user_id, self.events.document_id, self.events.timestamp, self.events.text
        )
        reason = "unknown_document" if self.documents.paths else "too_few_readers"
        split = Split(columns, self.events.format, by, self.config.n_buckets, self.buckets, known, reason)
        files = list(enumerate(_match(self.events.paths, "events.paths")))
        self.say(f"reading {len(files)} log file{'s' * (len(files) != 1)}, split by {by}")
        return self._run(
            f"split by {by}",
            files,
            [
                "split" >> beam.FlatMap(split),
                "group" >> beam.GroupByKey(),
                "cut" >> beam.Map(per_bucket),
            ],
        )

    def _run(self, name: str, elements: list, transforms: list) -> dict[str, Any]:
        """Run one straight line and return its summed counts; a worker's failure is raised here."""
        counts_file = f"{self.buckets}/counts-{name.replace(' ', '-')}.parquet"
        with beam.Pipeline(runner=self.options.runner, options=self.options.beam) as pipeline:
            collection = pipeline | name >> beam.Create(elements, reshuffle=False)
            for transform in transforms:
                collection = collection | transform
            _ = (
                collection
                | "sum" >> beam.CombineGlobally(SumCounts())
                | "write counts" >> beam.Map(write_counts, counts_file)
            )
        counts = read_counts(counts_file)
        raise_failure(counts)
        return counts

    def _write_rejects(self) -> None:
        """The workers' rejects in one place, by file and line."""
        parts = [read_parquet(path) for path in _match([f"{self.buckets}/rejects-*"], None)]
        if parts:
            rejects = pl.concat(parts).sort("file", "line")
            write_parquet(rejects, str(self.out / "rejects-00000.parquet"))

    def _first_reject(self) -> str:
        first = read_parquet(str(self.out / "rejects-00000.parquet")).row(0, named=True)
        return f"first {first['file']} line {first['line']}, {first['reason']}, {first['detail'][:120]}"


# --- Held-out spans and negatives: plain functions ---------------------------------------------------


def held_out_spans(sessions: pl.LazyFrame, share: float) -> tuple[datetime | None, datetime | None]:
    """When the dev span and the test span begin, by the start of sessions that give pairs.

    Returns:
        (dev_start, test_start): the last `share` of those sessions start at test_start or later, the
        `share` before them at dev_start or later; None for a span that would hold none.
    """
    starts = (
        sessions.filter(pl.col("document_ids").list.n_unique() > 1).select("start").collect()["start"].sort()
    )
    n_held_out = int(len(starts) * share)
    if not n_held_out:
        return None, None
    return starts[-2 * n_held_out], starts[-n_held_out]


def document_popularity(sessions: pl.LazyFrame, before: datetime | None) -> pl.DataFrame:
    """Who reads what, in the training span: later reading must not choose the negatives.

    Returns:
        document_id (sorted), n_events, and reader: the only user who read it, or null for several.
    """
    if before is not None:
        sessions = sessions.filter(pl.col("start") < before)
    return (
        sessions.select("user_id", document_id="document_ids")
        .explode("document_id")
        .group_by("document_id")
        .agg(
            n_events=pl.len(),
            reader=pl.when(pl.col("user_id").n_unique() == 1).then(pl.col("user_id").first()),
        )
        .sort("document_id")
        .collect()
    )


def neighbours(sessions: pl.DataFrame) -> pl.DataFrame:
    """Documents next to each other in a session: (anchor_id, positive_id), each once a session."""
    return (
        sessions.select(
            "session_id",
            "user_id",
            anchor_id=pl.col("document_ids").list.head(pl.col("document_ids").list.len() - 1),
            positive_id=pl.col("document_ids").list.slice(1),
        )
        .filter(pl.col("anchor_id").list.len() > 0)
        .explode("anchor_id", "positive_id")
        .filter(pl.col("anchor_id") != pl.col("positive_id"))
        .unique(["session_id", "anchor_id", "positive_id"], keep="first", maintain_order=True)
    )


def draw_negatives(
    pairs: pl.DataFrame, sessions: pl.DataFrame, popularity: pl.DataFrame, seed: int, max_draws: int
) -> pl.Series:
    """For each pair a document of another user's session that the anchor's session does not hold.

    Draw t of a pair is decided by a hash of (seed, session, anchor, positive, t) alone, so the order
    and the bundling of the input change nothing. Documents are drawn as often as they are read.

    Args:
        pairs: session_id, user_id, anchor_id, positive_id.
        sessions: session_id, document_ids: at least those of `pairs`.
        popularity: as `document_popularity`.

    Returns:
        negative_id, null where `max_draws` draws found none.
    """
    n = len(pairs)
    chosen = np.full(n, -1, np.int64)
    if n and len(popularity):
        cumulative = popularity["n_events"].cum_sum().to_numpy().astype(np.uint64)
        row_of = dict(zip(popularity["document_id"], range(len(popularity)), strict=True))
        held = _held_rows(sessions, row_of, len(popularity))
        session_row = dict(zip(sessions["session_id"], range(len(sessions)), strict=True))
        session = np.fromiter((session_row[s] for s in pairs["session_id"]), np.int64, n)
        sole = popularity["reader"]
        key = _mix(
            np.uint64(seed),
            np.fromiter((int(s, 16) for s in pairs["session_id"]), np.uint64, n),
            _hashes_of(pairs["anchor_id"]),
            _hashes_of(pairs["positive_id"]),
        )
        open_ = np.arange(n)
        for draw in range(max_draws):
            at = _mix(key[open_], np.uint64(draw)) % cumulative[-1]
            row = np.searchsorted(cumulative, at, side="right").astype(np.int64)
            own = (sole.gather(row) == pairs["user_id"].gather(open_)).fill_null(False).to_numpy()
            eligible = ~own & ~np.isin(session[open_] * len(popularity) + row, held)
            chosen[open_[eligible]] = row[eligible]
            open_ = open_[~eligible]
            if not len(open_):
                break
    at = pl.Series(chosen)
    return popularity["document_id"].gather(at.set(at < 0, None)).alias("negative_id")


def _held_rows(sessions: pl.DataFrame, row_of: dict[str, int], n_documents: int) -> np.ndarray:
    """session row * n_documents + document row, for every document that a session holds."""
    exploded = sessions.select(
        session=pl.int_range(pl.len(), dtype=pl.Int64), document_id="document_ids"
    ).explode("document_id")
    rows = exploded["document_id"].replace_strict(row_of, default=None, return_dtype=pl.Int64)
    keys = (exploded["session"] * n_documents + rows).drop_nulls()
    return np.unique(keys.to_numpy())


def _hashes_of(values: pl.Series) -> np.ndarray:
    distinct = values.unique()
    of = dict(zip(distinct, stable_hashes(distinct), strict=True))
    return np.fromiter((of[value] for value in values), np.uint64, len(values))


def _mix(*parts: Any) -> np.ndarray:
    """One 64-bit hash of several, by the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        mixed = np.zeros(1, np.uint64)
        for part in parts:
            mixed = (mixed ^ part) + np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


# --- What workers run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class MakeDocuments:
    """Makes one bucket's documents from its highlights and writes documents-BBBBB.parquet."""

    min_readers: int
    out: str

    def __call__(self, keyed: tuple[int, Iterable[Any]]) -> dict[str, Any]:
        return with_rows(keyed, self._make)

    def _make(self, bucket: int, rows: pl.DataFrame) -> dict[str, Any]:
        made, left_out = documents_.make(rows, self.min_readers)
        write_parquet(made, f"{self.out}/documents-{bucket:05d}.parquet")
        return {"documents": len(made), "left_out": len(left_out)}


@dataclass(frozen=True)
class DrawPairs:
    """Makes one bucket's pairs and writes them by span."""

    out: str
    documents: str
    popularity: str
    dev_start: datetime | None
    test_start: datetime | None
    seed: int
    max_draws: int

    def __call__(self, sessions_file: str) -> dict[str, Any]:
        try:
            return self._draw(sessions_file)
        except (PipelineError, OSError) as error:
            return failure(error)

    def _draw(self, sessions_file: str) -> dict[str, Any]:
        bucket = re.findall(r"\d+", Path(sessions_file).name)[0]
        sessions = read_parquet(sessions_file)
        pairs = neighbours(sessions)
        negatives = draw_negatives(pairs, sessions, _cached(self.popularity), self.seed, self.max_draws)
        pairs = pairs.with_columns(negatives).join(
            sessions.select("session_id", "start"), on="session_id", how="left", maintain_order="left"
        )
        lost = pairs.filter(pl.col("negative_id").is_null()).drop("negative_id")
        counts = {"no_negative": len(lost)}
        if len(lost):
            rejects = events_.rejects_of(lost.with_columns(reason=pl.lit("no_negative")), None)
            write_parquet(rejects, f"{self.out}/rejects-pairs-{bucket}.parquet")
        found = self._with_texts(pairs.filter(pl.col("negative_id").is_not_null()))
        for span, rows in zip(SPANS, self._by_span(found), strict=True):
            if len(rows):
                write_parquet(rows.select(PAIR_COLUMNS), f"{self.out}/{span}-{bucket}.parquet")
            counts[span] = len(rows)
        return counts

    def _with_texts(self, pairs: pl.DataFrame) -> pl.DataFrame:
        texts = _cached(self.documents).select("document_id", "text")
        for name in ("anchor", "positive", "negative"):
            of = texts.rename({"document_id": f"{name}_id", "text": name})
            pairs = pairs.join(of, on=f"{name}_id", how="left", maintain_order="left")
        return pairs

    def _by_span(self, pairs: pl.DataFrame) -> Iterator[pl.DataFrame]:
        start = pl.col("start")
        is_test = start >= self.test_start if self.test_start else pl.lit(False)
        is_dev = (start >= self.dev_start if self.dev_start else pl.lit(False)) & ~is_test
        yield pairs.filter(~is_dev & ~is_test)
        yield pairs.filter(is_dev)
        yield pairs.filter(is_test)


@lru_cache(maxsize=4)
def _cached(path: str) -> pl.DataFrame:
    """A table that every bucket of this worker needs."""
    return read_parquet(path)


def write_counts(counts: dict[str, Any], path: str) -> None:
    failed = counts.pop("failure", None)
    rows = {"name": list(counts), "count": list(counts.values())}
    table = pl.DataFrame(rows, {"name": pl.String, "count": pl.Int64})
    if failed:
        table = pl.concat([table, pl.DataFrame({"name": [f"failure:{failed[1]}"], "count": [failed[0]]})])
    write_parquet(table, path)


def read_counts(path: str) -> dict[str, Any]:
    counts: dict[str, Any] = dict(read_parquet(path).iter_rows())
    for name in [name for name in counts if name.startswith("failure:")]:
        counts["failure"] = [counts.pop(name), name.removeprefix("failure:")]
    return counts


def _by_prefix(counts: Mapping[str, Any], prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): n for name, n in sorted(counts.items()) if name.startswith(prefix)}


# --- Options and paths ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Beam's own options, checked."""

    beam: PipelineOptions
    runner: str


def parse_options(flags: Sequence[str]) -> Options:
    """Beam's options out of a command line.

    Raises:
        ConfigError: Beam knows no such option or runner.
    """
    # What goes wrong reaches the driver as a count or an exception; Beam would print it first.
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    known: Any = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for owner in PipelineOptions.__subclasses__():
        owner._add_argparse_args(known)
    try:
        given, unknown = known.parse_known_args(list(flags))
    except SystemExit:
        raise ConfigError(f"{' '.join(flags)}: Beam cannot read these options") from None
    if unknown:
        raise ConfigError(f"{' '.join(unknown)}: neither an option of this command nor one of Beam's")
    runner = given.runner or DEFAULT_RUNNER
    try:
        create_runner(runner)
    except (ValueError, ImportError, AttributeError) as error:
        raise ConfigError(f"--runner {runner}: {' '.join(str(error).split())}") from None
    return Options(PipelineOptions(list(flags), runner=runner), runner)


def _match(patterns: Iterable[str], setting: str | None) -> list[str]:
    """All files of the globs, sorted; each must match, unless `setting` is None."""
    found: list[str] = []
    for pattern in patterns:
        try:
            (match,) = FileSystems.match([pattern])
        except (BeamIOError, ValueError) as error:
            raise InputError(f"{setting}: {pattern}: {' '.join(str(error).split())[:300]}") from None
        paths = sorted(metadata.path for metadata in match.metadata_list)
        if not paths and setting is not None:
            raise InputError(f"{setting}: {pattern}: no such file")
        folders = [path for path in paths if "://" not in path and Path(path).is_dir()]
        if folders:
            raise InputError(
                f"{setting}: {folders[0]} is a folder; give its files, as in {folders[0]}/*.jsonl.gz"
            )
        found += paths
    return found


@lru_cache(maxsize=4096)
def _digest(path: str) -> str:
    """Content of a local file; elsewhere what the file system says of its content."""
    if "://" not in path:
        return sha256(Path(path))
    (match,) = FileSystems.match([path])
    (metadata,) = match.metadata_list
    return f"{FileSystems.checksum(path)}-{metadata.size_in_bytes}-{metadata.last_updated_in_seconds}"


def _make_folder(path: str) -> None:
    if not FileSystems.exists(path):
        FileSystems.mkdirs(path)
