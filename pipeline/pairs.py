"""Stage `pairs`: events + documents -> pairs/, an Apache Beam batch job.

Straight lines of Beam transforms, each ending in one dict of counts:

    pieces  -> split by document -> GroupByKey -> make documents       (only without a documents file)
    pieces  -> split by user     -> GroupByKey -> cut sessions
    buckets -> survey            -> GroupByKey -> merge what was read together
    anchors -> find candidates                                         (only for hard negatives)
    buckets -> draw pairs

Each needs a fact about all that came before: which documents exist, when the held-out spans begin, how
popular a document is and with which others it was ever read. Pairs of logged queries, of generated ones and
of titles are made behind them, in the driver (`queries`).
"""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args
from uuid import uuid4

import apache_beam as beam
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import documents as documents_
from pipeline import events as events_
from pipeline import progress, storage
from pipeline import queries as queries_
from pipeline.artifacts import Draft, Embeddings, Pairs, writing
from pipeline.config import (
    DocumentsConfig,
    EventsConfig,
    PairsConfig,
    QueriesConfig,
    Strategy,
    SyntheticConfig,
    as_dict,
)
from pipeline.counts import SumCounts, by_prefix, raise_failure, read_counts, write_counts
from pipeline.errors import ConfigError, InputError, PipelineError
from pipeline.hashing import stable_hash
from pipeline.negatives import Popularity
from pipeline.pairing import (
    SPANS,
    DrawPairs,
    FindCandidates,
    MergeRange,
    MetFiles,
    Survey,
    add_popularity,
    giving_pairs,
    write_bm25,
)
from pipeline.runners import Options, engine_faults_in_a_line, parse_options
from pipeline.sessions import CutBucket, Sessions, Split, n_buckets_for, only, pieces, with_rows

# rejects that are no fault of the log
ON_PURPOSE = ("too_few_readers", "too_many_events", documents_.EXCLUDED)
ANCHORS = 2_000  # whose candidates are one element
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NO_QUERIES, NO_SYNTHETIC = QueriesConfig(), SyntheticConfig()


def inputs_of(
    pairs: PairsConfig,
    events: EventsConfig,
    documents: DocumentsConfig,
    queries: QueriesConfig = NO_QUERIES,
    synthetic: SyntheticConfig = NO_SYNTHETIC,
) -> list[dict[str, str]]:
    """The given files as {path, digest}, for the manifest and for telling whether anything changed.

    Raises:
        InputError: a path or glob matches no file, or a folder.
        ArtifactError: pairs.mined_from holds no complete embeddings.
    """
    paths = {
        "events": events.paths,
        "documents": documents.paths,
        "queries": queries.paths,
        "synthetic": synthetic.paths,
    }
    given = [
        {"path": path, "digest": _digest(path)}
        for section, patterns in paths.items()
        for path in storage.match(patterns, f"{section}.paths")
    ]
    given += [{"path": path, "digest": _digest(path)} for path in _files_of_ids(documents)]
    if pairs.negatives.get("mined"):
        earlier = _earlier(pairs)
        given.append({"path": str(earlier.path), "digest": earlier.digest})
    return given


def settings_of(
    pairs: PairsConfig,
    events: EventsConfig,
    documents: DocumentsConfig,
    queries: QueriesConfig = NO_QUERIES,
    synthetic: SyntheticConfig = NO_SYNTHETIC,
) -> dict[str, Any]:
    """What decides the result, for the manifest: not where files lie, only what is in them."""
    given = {"events": events, "documents": documents, "queries": queries, "synthetic": synthetic}
    sections = {"pairs": as_dict(pairs)} | {name: as_dict(config) for name, config in given.items()}
    for section, place in [
        ("pairs", "temp_location"),
        ("pairs", "mined_from"),
        *((n, "paths") for n in given),
    ]:
        sections[section].pop(place)
    sections["documents"]["exclude"].pop("document_ids_from")
    return sections


def run(
    config: PairsConfig,
    events: EventsConfig,
    documents: DocumentsConfig,
    out: Path,
    beam_options: Sequence[str] = (),
    queries: QueriesConfig = NO_QUERIES,
    synthetic: SyntheticConfig = NO_SYNTHETIC,
) -> Pairs:
    """Run the job.

    Args:
        beam_options: as on Beam's command line, such as ["--runner", "FlinkRunner"].

    Raises:
        InputError: a file cannot be used, too many rows are rejected, or nothing gives a pair.
        ConfigError: an option that Beam does not know, or pairs.mined_from is the run's own work folder.
    """
    out = Path(out).absolute()  # workers have current folders of their own
    options = parse_options(beam_options)
    if config.mined_from and Path(config.mined_from).resolve() == out.parent.resolve():
        raise ConfigError(
            f"pairs.mined_from is {config.mined_from}, the work folder of this run: each run would "
            "change what the next is made of; name another --work, and mine from this one"
        )
    given = (config, events, documents, queries, synthetic)
    inputs, settings = inputs_of(*given), settings_of(*given)
    with writing(Pairs, out, config=settings, inputs=inputs) as draft, scratch_folder(config, out) as folder:
        job = Job(config, events, documents, draft, folder, options, queries, synthetic)
        job.write_documents()
        job.read_queries()  # hours before they are needed: what is wrong with them is said now
        if events.paths:
            job.write_sessions()
            job.remove_events()
            job.write_pairs()
        else:
            draft.facts |= {"dev_start": None, "test_start": None, "events": {}, "rejects": {}}
            draft.facts |= {"session_lengths": {}, "negatives": {}, "co_read": {}}
        draft.facts |= {"queries": {}, "synthetic": {}, "bm25_top": {}}
        if job.has_queries:
            job.write_queries()
        elif not events.paths:
            job.say("no event log and no queries: documents alone")
        job.check_pairs()
        job.check_files()
        draft.facts |= {"description": events.description, "gap_duration": config.gap_duration}
        if inputs_of(*given) != inputs:
            raise PipelineError(
                "a log, a documents file or pairs.mined_from changed during the run: run it again"
            )
    return Pairs.open(out)


@contextmanager
def scratch_folder(config: PairsConfig, out: Path) -> Iterator[str]:
    """A folder of this run's own for bucket files, gone at the end however that comes.

    Its name is new in every run: a worker that lives on must not take an earlier run's tables for this one's.
    What a killed run of the same `out` left there is removed.
    """
    base = config.temp_location.rstrip("/") if config.temp_location else str(out.parent)
    place = f".{out.name}.buckets-{hashlib.sha256(str(out).encode()).hexdigest()[:8]}-"
    storage.remove_folders(base, place)
    folder = f"{base}/{place}{uuid4().hex[:8]}"
    storage.make_folder(f"{folder}/results")
    try:
        yield folder
    finally:
        storage.remove_folder(folder)


@dataclass
class Job:
    """One run of the stage: its settings, and the folder it fills."""

    config: PairsConfig
    events: EventsConfig
    documents: DocumentsConfig
    draft: Draft
    folder: str  # bucket files and all else that is gone at the end
    options: Options
    queries: QueriesConfig = NO_QUERIES
    synthetic: SyntheticConfig = NO_SYNTHETIC
    given: dict[str, queries_.Given] = field(default_factory=dict)  # of queries and synthetic, as read

    @property
    def out(self) -> Path:
        return self.draft.folder

    @property
    def results(self) -> str:
        """Where workers leave the tables: all of them see it, but the work folder the driver alone."""
        return f"{self.folder}/results"

    @property
    def documents_file(self) -> str:
        return f"{self.folder}/documents.arrow"

    @property
    def excluded_file(self) -> str:
        return f"{self.folder}/excluded.arrow"

    def say(self, line: str) -> None:
        print(f"pairs: {line}", file=sys.stderr, flush=True)

    # --- Documents -----------------------------------------------------------------------------------

    def write_documents(self) -> None:
        table = self._exclude(self._read_documents() if self.documents.paths else self._make_documents())
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

    def _exclude(self, table: pl.DataFrame) -> pl.DataFrame:
        """The documents without those of `documents.exclude`, which are counted by reason."""
        listed = []
        for path in _files_of_ids(self.documents):
            with storage.open_file(path) as file:
                listed += documents_.read_ids(file, path)
        kept, out = documents_.exclude(table, self.documents.exclude, listed)
        storage.write_arrow(out.select("document_id").to_arrow(), self.excluded_file)
        self.draft.facts["excluded"] = counted = documents_.counts_of(out)
        if counted:
            by_reason = ", ".join(f"{reason} {n:,}" for reason, n in counted.items())
            self.say(f"{len(out):,} of {len(table):,} documents excluded: {by_reason}")
        wanted = pl.Series([*self.documents.exclude.document_ids, *listed], dtype=pl.String).unique()
        nobodys = wanted.filter(~wanted.is_in(table["document_id"].implode())).sort()
        if len(nobodys):
            self.say(f"{len(nobodys):,} excluded ids are of no document, such as {nobodys[0]!r}")
        return kept

    def _make_documents(self) -> pl.DataFrame:
        """Documents from the highlights, where no documents file is given."""
        made = f"{self.folder}/made"
        storage.make_folder(made)
        self._split_and_group("documents", None, MakeDocuments(self.documents.min_readers, made))
        storage.remove(self.folder, "*-passages-*")
        parts = [storage.read_parquet(path) for path in storage.names(made, "documents-*")]
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
            out=self.results,
        )
        counts = self._split_and_group("sessions", self.documents_file, cut)
        read, rejected = counts.get("read", 0), counts.get("rejected", 0)
        in_sessions, duplicates = counts.get("in_sessions", 0), counts.get("duplicates", 0)
        reasons = by_prefix(counts, "rejected:")
        for path in storage.names(self.folder, "rejects-*"):
            storage.fetch(path, self.out)
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
            storage.remove(self.folder, f"*-{kind}-*")

    def check_files(self) -> None:
        """Hold the tables against the counts: what was counted must also be there.

        Raises:
            PipelineError: a table has other rows than were counted.
        """
        for name in [name for name in ("sessions", *SPANS) if name in self.draft.rows]:
            found = sum(pq.read_metadata(path).num_rows for path in self.out.glob(f"{name}-*.parquet"))
            if found != self.draft.rows[name]:
                raise PipelineError(
                    f"{self.draft.rows[name]} {name} were counted, but {found} are in the files: "
                    "nothing is kept"
                )

    def _first_reject(self) -> str:
        rejects = pl.scan_parquet(str(self.out / "rejects-*.parquet"), glob=True)
        faults = rejects.filter(~pl.col("reason").is_in(ON_PURPOSE)).head(1).collect()
        row: dict[str, Any] = (rejects.head(1).collect() if faults.is_empty() else faults).row(0, named=True)
        where = f"{row['file']} line {row['line']}, " if row["file"] else ""
        return f"first {where}{row['reason']}, {row['detail'][:120]}"

    # --- Pairs ---------------------------------------------------------------------------------------

    def write_pairs(self) -> None:
        """Sessions to pairs-*, dev-* and test-*.parquet."""
        files = storage.names(self.folder, "*-sessions.arrow")
        dev_start, test_start = held_out_spans(files, self.config.holdout_share)
        before = dev_start or test_start
        n_documents, n_ranges = self.draft.rows["documents"], max(16, len(files) // 8)
        shares = shares_of(self.config)
        hard: tuple[str, ...] = tuple(name for name in ("bm25", "mined") if name in shares)
        seed = self.config.seed

        survey = Survey(self.folder, n_documents, n_ranges, before, seed, tuple(shares.items()), hard)
        self._survey(files, survey)
        met = MetFiles(self.folder, n_documents, n_ranges)
        refused = {name: self._find_candidates(name, met) for name in hard}
        draw = DrawPairs(
            out=self.results,
            folder=self.folder,
            met=met,
            shares=tuple(shares.items()),
            spans=(dev_start, test_start),
            seed=seed,
            max_draws=self.config.max_draws,
            popularity_exponent=self.config.popularity_exponent,
            max_positive_ratio=self.config.max_positive_ratio,
            n_candidates=self.config.n_candidates,
            mined_from=self._mined_from if "mined" in shares else None,
        )
        total = self.draft.rows["sessions"]
        counts = self._run("pairs", files, total, "session", [("draw", beam.Map(draw))])
        for path in storage.names(self.results, "*.parquet"):
            storage.fetch(path, self.out)
        self._note_pairs(counts, refused)
        self.draft.facts |= {"dev_start": _iso(dev_start), "test_start": _iso(test_start)}

    def _survey(self, files: list[str], survey: Survey) -> None:
        """Popularity, and which documents were read together."""
        lines = [
            ("survey", beam.FlatMap(survey)),
            ("group", beam.GroupByKey()),
            ("merge", beam.Map(MergeRange(self.folder))),
        ]
        counts = self._run("survey", files, self.draft.rows["sessions"], "session", lines)
        storage.remove(self.folder, "keys-*")  # not by who merged them: a step may be tried again
        self.draft.facts["co_read"] = {
            "pairs": counts.get("co_read", 0),
            "long_sessions": counts.get("long", 0),
        }
        parts = [storage.read_arrow(path) for path in storage.names(self.folder, "popularity-*")]
        popularity = add_popularity(parts, survey.n_documents)
        storage.write_array(popularity.n_events, f"{self.folder}/n_events.npy")
        storage.write_array(popularity.only_reader, f"{self.folder}/only_reader.npy")

    def _find_candidates(self, name: str, met: MetFiles) -> int:
        """The hard documents of every anchor that asks for one; returns how many the filter refused."""
        parts = [storage.read_array(path) for path in storage.names(self.folder, f"anchors-{name}-*")]
        anchors = np.unique(np.concatenate([np.empty(0, np.int32), *parts]))
        blocks = [anchors[start : start + ANCHORS] for start in range(0, len(anchors), ANCHORS)]
        texts = only(storage.read_arrow(self.documents_file)["text"])
        if name == "bm25":
            self.say(f"indexing {len(texts):,} documents by BM25")
            write_bm25(texts, self.folder)
        else:
            ids = only(storage.read_arrow(self.documents_file)["document_id"])
            rows = rows_in(_earlier(self.config), ids)
            if not (rows >= 0).any():
                raise InputError(
                    f"pairs.mined_from: {self.config.mined_from} has none of these documents; name the work "
                    "folder of a run over the same documents"
                )
            storage.write_array(rows, f"{self.folder}/mined-rows.npy")
        mined_from = self._mined_from if name == "mined" else None
        find = FindCandidates(name, self.folder, met, self.config.n_candidates, mined_from)
        if not blocks:
            return 0
        lines = [("find", beam.Map(find))]
        counts = self._run(f"candidates {name}", list(enumerate(blocks)), len(anchors), "anchor", lines)
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
        wanted = {str(name) for name, share in self.config.negatives.items() if share}
        self.draft.facts["negatives"] = {
            name: {"given": n, "refused": filtered.get(name, 0) + refused.get(name, 0)}
            for name, n in given.items()
            if n or name in wanted
        }
        if not counts.get("pairs") and not self.has_queries:
            why = f" ({no_negative:,} had no eligible negative)" if no_negative else ""
            raise InputError(
                f"{self.draft.rows['sessions']:,} sessions gave no pair to train on{why}: wanted at least "
                "one session of two different documents, and other readers; check events.user_id, "
                "events.timestamp and pairs.gap_duration"
            )
        self.say(
            f"{counts.get('pairs', 0):,} pairs to train on, {counts.get('dev', 0):,} for dev, "
            f"{counts.get('test', 0):,} for test, {no_negative:,} without a negative"
        )
        for name, found in self.draft.facts["negatives"].items():
            refused_draws = f"{found['refused']:,} refused (read with the anchor, or the pair's own text)"
            self.say(f"negatives by {name}: {found['given']:,}; {refused_draws}")

    # --- Queries and titles --------------------------------------------------------------------------

    @property
    def has_queries(self) -> bool:
        """Whether pairs come from elsewhere than sessions."""
        return bool(self.queries.paths or self.synthetic.paths or self.config.bm25_top)

    def read_queries(self) -> None:
        """
        Raises:
            InputError: a file of queries that cannot be used.
        """
        if not (self.queries.paths or self.synthetic.paths):
            return
        documents = self._documents()
        for name, config in (("queries", self.queries), ("synthetic", self.synthetic)):
            if config.paths:
                self.given[name] = queries_.read(config, name, documents)

    def _documents(self) -> queries_.Documents:
        titles = pq.read_table(self.out / "documents-00000.parquet", columns=["title"])["title"]
        excluded = only(storage.read_arrow(self.excluded_file)["document_id"])
        return queries_.Documents.of(storage.read_arrow(self.documents_file), titles, excluded)

    def write_queries(self) -> None:
        """Pairs of logged queries, generated ones and titles, beside those of the sessions."""
        spans: queries_.Spans = (None, None)
        popularity = None
        if self.events.paths:
            spans = (_micros(self.draft.facts["dev_start"]), _micros(self.draft.facts["test_start"]))
            counted = (
                storage.read_array(f"{self.folder}/{name}.npy") for name in ("n_events", "only_reader")
            )
            popularity = Popularity(*counted)
        shares = shares_of(self.config)
        maker = queries_.Maker(self.config, shares, self._documents(), spans, popularity, self.out)
        most = {name: getattr(self, name).max_rejected_share for name in self.given}
        maker.make(self.given, most)
        self._note_queries(maker)

    def _note_queries(self, maker: queries_.Maker) -> None:
        rows, facts = self.draft.rows, self.draft.facts
        for name in (*SPANS, "rejects"):
            rows[name] = rows.get(name, 0) + maker.rows[name]
        for reason, n in maker.rejects.items():
            facts["rejects"][reason] = facts["rejects"].get(reason, 0) + n
        for name, n in by_prefix(maker.drawn, "negatives:").items():
            found = facts["negatives"].get(name, {"given": 0, "refused": 0})
            refused = found["refused"] + maker.drawn[f"refused:{name}"]
            if n or name in facts["negatives"]:
                facts["negatives"][name] = {"given": found["given"] + n, "refused": refused}
        dev_start, test_start = maker.spans
        facts |= {"dev_start": _iso(dev_start), "test_start": _iso(test_start)}
        for source, counts in maker.facts.items():
            facts[source] = counts
            if counts:
                self.say(f"{source}: " + ", ".join(f"{n:,} {name}" for name, n in counts.items()))

    def check_pairs(self) -> None:
        """Refuse sources that teach nothing; documents alone are fine.

        Raises:
            InputError: there is no pair to train on.
        """
        rows = self.draft.rows
        if self.has_queries and not rows["pairs"]:
            raise InputError(
                f"no pair to train on: {rows['dev']:,} are for dev, {rows['test']:,} for test, and "
                f"{rows['rejects']:,} rows were rejected; {self._way_to_pairs()}"
            )

    def _way_to_pairs(self) -> str:
        """What to do where no source gave a pair."""
        rows, facts = self.draft.rows, self.draft.facts
        if rows["documents"] == 1:
            return "there is one document, and a pair needs another for its negative: give more documents"
        if rows["dev"] or rows["test"]:
            start = facts["dev_start"] or facts["test_start"]
            when = f" (from {start} on)" if start else ""
            return f"all there is was held out{when}: give earlier logs, or lower pairs.holdout_share"
        if facts["rejects"].get("no_negative"):
            return (
                "every document drawn led or held an answer: give more documents, or take answers out that "
                "most documents hold"
            )
        if self.config.bm25_top:
            return (
                "pairs.bm25_top found no title that shares a word with another document: give queries, "
                "or documents in one language"
            )
        return "give more queries, or set pairs.bm25_top"

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
            marks=progress.marks_of(self.folder, name),
            documents=documents,
            excluded=self.excluded_file if documents else None,
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

    def _run(
        self, name: str, elements: list, total: int, unit: str, transforms: list[tuple[str, beam.PTransform]]
    ) -> dict[str, Any]:
        """Run one straight line and return its summed counts; a worker's failure is raised here."""
        counts_file = f"{self.folder}/counts-{name.replace(' ', '-')}.parquet"
        with (
            progress.shown(f"pairs: {name}", total, unit, progress.marks_of(self.folder, name)),
            engine_faults_in_a_line(self.options.runner),
            beam.Pipeline(runner=self.options.runner, options=self.options.beam) as pipeline,
        ):
            collection = pipeline | f"{name}: elements" >> beam.Create(elements)
            for label, transform in transforms:
                collection = collection | label >> transform
            # Every element gives counts, so there is a sum. A default for none would have Dask run the whole
            # line from inside one task, and all of it again when that task's worker dies.
            _ = (
                collection
                | "sum" >> beam.CombineGlobally(SumCounts()).without_defaults()
                | "write counts" >> beam.Map(write_counts, counts_file)
            )
        counts = read_counts(counts_file)
        raise_failure(counts)
        return counts


# --- Plain functions ---------------------------------------------------------------------------------


def shares_of(config: PairsConfig) -> dict[str, float]:
    """The strategies' shares in one order, whatever the config's: it decides which pair asks which strategy.

    Any document is the last resort: without one, the pairs of the most read documents would be lost.
    """
    given = {"random": 0.0, **config.negatives}
    return {name: given[name] for name in get_args(Strategy) if given.get(name) or name == "random"}


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


def rows_in(earlier: Embeddings, document_ids: pa.Array) -> np.ndarray:
    """Where each document's vector is in an earlier run's matrix, int64 (n,); -1 for one it did not have.

    Of a document in several passages it is the first one's: hard negatives are near by what they begin with.
    """
    theirs = pl.read_parquet(earlier.path / "documents.parquet", columns=["document_id"])
    theirs = theirs.with_columns(row=pl.int_range(pl.len(), dtype=pl.Int64))
    theirs = theirs.unique("document_id", keep="first", maintain_order=True)
    ours = pl.DataFrame({"document_id": pl.Series(document_ids)})
    return (
        ours.join(theirs, on="document_id", how="left", maintain_order="left")["row"].fill_null(-1).to_numpy()
    )


def _files_of_ids(documents: DocumentsConfig) -> list[str]:
    return storage.match(documents.exclude.document_ids_from, "documents.exclude.document_ids_from")


def _earlier(config: PairsConfig) -> Embeddings:
    return Embeddings.open(Path(str(config.mined_from)) / "embeddings")


def _micros(moment: str | None) -> int | None:
    """The other way round."""
    return None if moment is None else (datetime.fromisoformat(moment) - EPOCH) // timedelta(microseconds=1)


def _iso(microseconds: int | None) -> str | None:
    return None if microseconds is None else (EPOCH + timedelta(microseconds=microseconds)).isoformat()


def _digest(path: str) -> str:
    """Of a file's content; asked several times in a run, and read once."""
    if not storage.is_local(path):
        return storage.digest(path)
    status = Path(path).stat()
    return _digest_of(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest_of(path: str, size: int, mtime_ns: int) -> str:
    return storage.digest(path)


@dataclass(frozen=True)
class MakeDocuments:
    """Makes one bucket's documents from its highlights and writes documents-BBBBB.parquet."""

    min_readers: int
    out: str

    def __call__(self, group: tuple[int, Iterable[Any]]) -> dict[str, Any]:
        return with_rows(group, self._make)

    def _make(self, bucket: int, paths: list[str]) -> dict[str, Any]:
        rows = pl.concat([pl.DataFrame(storage.read_arrow(path)) for path in paths])
        made, left_out = documents_.make(rows, self.min_readers)
        storage.write_parquet(made, f"{self.out}/documents-{bucket:05d}.parquet")
        return {"documents": len(made), "left_out": len(left_out)}
