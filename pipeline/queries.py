"""Pairs whose anchor is a query: logged, generated, or a title that stands for one.

    queries    what was asked and the document that answered: for training, dev and test
    synthetic  a query that was generated for a document: for training alone
    bm25_top   a title or a training query, and what BM25 ranks first for it: for training alone

All of it is made in the driver and in memory: whoever asks once then reads many documents, so logged queries
are far fewer than events. Their negatives are drawn by the strategies of `negatives`, but for `mined`: no
encoder is here that could score a query, so those pairs ask the next strategy.
"""

import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import cast

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pipeline import events, hard_negatives, negatives, storage
from pipeline.bm25 import Bm25
from pipeline.co_reading import distinct, isin_sorted
from pipeline.config import PairsConfig, QueriesConfig, SyntheticConfig
from pipeline.documents import EXCLUDED
from pipeline.errors import InputError, PipelineError
from pipeline.folding import holds, normal
from pipeline.hashing import mix, stable_hash
from pipeline.negatives import NONE, UNIT, AskedPairs, Popularity
from pipeline.pairing import ANSWERS, PAIR_COLUMNS, SPANS
from pipeline.sessions import as_dictionary, only

MAX_QUERY = 10_000  # characters; longer is a document that somebody pasted
TOP = 100  # bm25_top: the best documents of a text, which are never its negatives
# Texts that BM25 is asked for, by hash where there are more: each costs a full search. Those of bm25_top, and
# of each source the queries whose pairs want a negative by bm25.
MAX_TEXTS = 100_000
SHIFT = np.uint64(32)
PRINTED = r"[^\p{C}\p{Z}]"  # a character that shows: no space, no control, no zero width
NO_TEXT = r"^\s*(?:[\[{]|true\s*$|false\s*$)"  # how a JSON value that is no text comes out of a log
SENTENCE_END = re.compile(r"(?<=[。！？])|(?<=[.!?।])\s+|\n")

Spans = tuple[int | None, int | None]  # dev_start, test_start: microseconds since 1970


@dataclass(frozen=True)
class Documents:
    """The documents table in columns (n,): what queries lead to.

    Attributes:
        hashes: uint64, `stable_hash` of the ids.
        same_text: int32, the first row with the same text.
        excluded: str, the document_ids that are kept out on purpose.
    """

    ids: pa.Array
    texts: pa.Array
    titles: pa.Array
    hashes: np.ndarray
    same_text: np.ndarray
    excluded: pa.Array = field(default_factory=lambda: pa.array([], pa.string()))

    @classmethod
    def of(cls, table: pa.Table, titles: pa.ChunkedArray, excluded: pa.Array) -> "Documents":
        """Args: table: as the stage hands it to its workers."""
        ids, texts, hashes, same_text = (
            only(table[name]) for name in ("document_id", "text", "hash", "same_text")
        )
        return cls(ids, texts, titles.combine_chunks(), hashes.to_numpy(), same_text.to_numpy(), excluded)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Given:
    """What a section's files hold: the rows that can be used, and the others.

    Attributes:
        rows: file, line, query, normal (as `normal` gives it), user_id, document (row of the table),
            timestamp (microseconds, or null), answers list (or null).
        rejects: the columns of events.REJECTS.
    """

    section: str
    rows: pl.DataFrame
    rejects: pl.DataFrame

    @property
    def n_read(self) -> int:
        return len(self.rows) + len(self.rejects)


# --- Reading -----------------------------------------------------------------------------------------


def read(config: QueriesConfig | SyntheticConfig, section: str, documents: Documents) -> Given:
    """Read all files of a section.

    Raises:
        InputError: a file cannot be read or lacks a column, there is no row, or too many are rejected.
    """
    wanted, filled = columns_of(config, section)
    parts, rejects = [], [pl.DataFrame(schema=events.REJECTS)]
    paths = storage.match(config.paths, f"{section}.paths")
    with tqdm(desc=f"pairs: {section}", unit="row", unit_scale=True, file=sys.stderr, leave=False) as bar:
        for path in paths:
            kind = events.format_of(path, config.format)
            if kind == "parquet":
                check_type(path, config.query)
            with storage.open_file(path) as file, storage.open_file(path) as again:
                lines = enumerate(io.BufferedReader(cast(io.RawIOBase, again)), 1)
                for rows, bad in events.read_rows(file, path, kind, wanted, filled):
                    no_text = no_texts(rows, lines, config.query) if kind == "jsonl" else set()
                    good, unusable = usable(rows, path, documents, no_text)
                    parts.append(good)
                    rejects += [bad, unusable]
                    bar.update(len(rows) + len(bad))
    if not sum(map(len, [*parts, *rejects])):
        raise InputError(f"{', '.join(paths)}: no rows in it; wanted queries, or take {section}.paths out")
    given = Given(section, pl.concat(parts), pl.concat(rejects))
    check_rejects(given, config.max_rejected_share)
    return given


def check_type(path: str, name: str) -> None:
    """
    Raises:
        InputError: a Parquet column of queries that holds no texts.
    """
    with storage.open_file(path) as file:
        schema = pq.read_schema(file)
    kind = schema.field(name).type if name in schema.names else pa.string()
    if pa.types.is_nested(kind) or pa.types.is_boolean(kind):
        raise InputError(f"{path}: column {name!r} holds {kind}, wanted texts; name another as queries.query")


def no_texts(rows: pl.DataFrame, lines: Iterator[tuple[int, bytes]], name: str) -> set[int]:
    """Lines of a JSON Lines file whose query is a list, an object or a truth value: they were read as text.

    Args:
        rows: line, query; only what looks like one is read again.
        lines: (number, line) of the file, from the first of these rows or before it.
        name: what the file calls its queries.
    """
    suspects = rows.filter(pl.col("query").str.contains(NO_TEXT))["line"].sort().to_list()
    found = set()
    for suspect in suspects:
        line = next(line for number, line in lines if number == suspect)
        try:
            value = json.loads(line.removeprefix(b"\xef\xbb\xbf")).get(name)
        except (ValueError, RecursionError):
            value = []
        if isinstance(value, list | dict | bool):
            found.add(suspect)
    return found


def columns_of(config: QueriesConfig | SyntheticConfig, section: str) -> tuple[events.Wanted, list[str]]:
    """The columns to read, and those of them that every row needs: all that are named, but for answers."""
    names = ("query", "document_id", "user_id", "timestamp", "answers")
    named = {name: theirs for name in names if (theirs := getattr(config, name, None))}
    return events.Wanted(section, named, {}, lists=("answers",)), [n for n in named if n != "answers"]


def usable(
    rows: pl.DataFrame, path: str, documents: Documents, no_text: Collection[int] = ()
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The rows that lead somewhere, as in `Given`, and the others as rejects.

    Args:
        rows: line and what `columns_of` names, checked.
        no_text: lines whose query is none.
    """
    known = pl.DataFrame({"document_id": pl.Series(documents.ids)}).with_row_index("document")
    if "answers" not in rows.columns:
        rows = rows.with_columns(answers=pl.lit(None, pl.List(pl.String)))
    lists, is_bad = answers_of(rows["answers"], path)
    rows = rows.with_columns(pl.col("query").str.strip_chars(), answers=lists, is_bad=is_bad)
    rows = rows.join(known, on="document_id", how="left", maintain_order="left")
    reason = (
        pl.when(pl.col("line").is_in(list(no_text)) | ~pl.col("query").str.contains(PRINTED))
        .then(pl.lit("query_is_no_text"))
        .when(pl.col("query").str.len_chars() > MAX_QUERY)
        .then(pl.lit("query_too_long"))
        .when(pl.col("document_id").is_in(pl.Series(documents.excluded, dtype=pl.String).implode()))
        .then(pl.lit(EXCLUDED))
        .when(pl.col("document").is_null())
        .then(pl.lit("unknown_document"))
        .when("is_bad")
        .then(pl.lit("bad_answers"))
    )
    rows = rows.with_columns(reason=reason).drop("is_bad")
    bad = rows.filter(pl.col("reason").is_not_null()).drop("document")
    good = rows.filter(pl.col("reason").is_null())
    asked = good.with_columns(
        file=pl.lit(path),
        normal=pl.col("query").map_elements(normal, return_dtype=pl.String),
        document=pl.col("document").cast(pl.Int32),
        timestamp=pl.col("timestamp").to_physical()
        if "timestamp" in good.columns
        else pl.lit(None, pl.Int64),
    )
    text_hash = stable_hash("normal").cast(pl.String)  # stands for the reader where nobody is named
    asked = asked.with_columns(user_id="user_id" if "user_id" in asked.columns else text_hash)
    columns = ["file", "line", "query", "normal", "user_id", "document", "timestamp", "answers"]
    return asked.select(columns), events.rejects_of(bad, path)


def answers_of(given: pl.Series, path: str) -> tuple[pl.Series, pl.Series]:
    """Lists of texts, null where a row has none; and which rows hold something else, bool.

    Text is one answer, unless it is a JSON list: of CSV, and of lists in JSON Lines.

    Raises:
        InputError: a Parquet column that holds neither texts nor lists.
    """
    if isinstance(given.dtype, pl.List) and not given.dtype.inner.is_nested():
        lists = given.cast(pl.List(pl.String)).list.drop_nulls()
        return lists.set(lists.list.len() == 0, None), pl.Series([False] * len(given), dtype=pl.Boolean)
    if given.dtype.is_nested():
        raise InputError(f"{path}: column 'answers' holds {given.dtype}, wanted lists of texts")
    found = [_answers(text) for text in given.cast(pl.String)]
    lists = pl.Series([answers or None for answers in found], dtype=pl.List(pl.String))
    return lists, pl.Series([answers is None for answers in found], dtype=pl.Boolean)


def _answers(text: str | None) -> list[str] | None:
    """The answers in a field; None where it holds something else."""
    text = (text or "").strip()
    if not text.startswith(("[", "{")):
        return [text] if text else []
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, list) or any(
        isinstance(value, list | dict | bool | NoneType) for value in values
    ):
        return None
    return [str(value).strip() for value in values if str(value).strip()]


def check_rejects(given: Given, max_rejected_share: float) -> None:
    """Refuse files of which too much cannot be used; what leads to excluded documents is no fault of theirs.

    Raises:
        InputError: names how many, why, and the first of them.
    """
    rejects = given.rejects.filter(pl.col("reason") != EXCLUDED)
    n_bad = len(rejects)
    if n_bad <= max_rejected_share * given.n_read:
        return
    counts = rejects["reason"].value_counts().sort("count", "reason", descending=[True, False])
    reasons = ", ".join(f"{reason} {n:,}" for reason, n in counts.iter_rows())
    first = rejects.row(0, named=True)
    raise InputError(
        f"{n_bad:,} of {given.n_read:,} rows were rejected ({reasons}), more than "
        f"{given.section}.max_rejected_share = {max_rejected_share}: first {first['file']} line "
        f"{first['line']}, {first['reason']}, {first['detail'][:120]}"
    )


# --- Spans -------------------------------------------------------------------------------------------


def are_spread(times: pl.Series, share: float) -> bool:
    """Whether the queries' own times can tell dev and test from the rest.

    One time for all, or dates of which each has many queries, would hold out all of them, or more than twice
    the share, or none for dev.
    """
    dev_start, test_start = spans_of(times, share, (None, None))
    if dev_start is None or test_start is None:
        return True  # too few to hold any out
    n_test = int((times >= test_start).sum())
    n_held_out = int((times >= dev_start).sum())
    return n_test < n_held_out < len(times) and n_held_out <= 4 * int(len(times) * share)


def spans_of(times: pl.Series, share: float, of_sessions: Spans) -> Spans:
    """When dev and test begin: as for sessions, or by the queries' own times where there are none.

    Args:
        times: microseconds, or null.
    """
    if of_sessions != (None, None):
        return of_sessions
    times = times.drop_nulls().sort()
    n_held_out = int(len(times) * share)
    if not n_held_out:
        return None, None
    return int(times[-2 * n_held_out]), int(times[-n_held_out])


def with_span(rows: pl.DataFrame, config: PairsConfig, spans: Spans, held_out: bool) -> pl.DataFrame:
    """Rows with `span`, a place in SPANS: by their time, or by a hash of the query where they have none.

    A query is then in one span only, however often it was asked.
    """
    if not held_out:
        return rows.with_columns(span=pl.lit(0, pl.Int8))
    hashes = mix(np.uint64(config.seed), rows.select(stable_hash("normal")).to_series().to_numpy())
    limit = np.uint64(config.holdout_share * float(UNIT))
    at = pl.Series(hashes >> np.uint64(11), dtype=pl.UInt64)
    by_hash = pl.when(at < limit).then(2).when(at < 2 * limit).then(1).otherwise(0)
    dev_start, test_start = spans
    by_time = pl.lit(0)
    for number, start in ((1, dev_start), (2, test_start)):
        if start is not None:
            by_time = pl.when(pl.col("timestamp") >= start).then(number).otherwise(by_time)
    span = pl.when(pl.col("timestamp").is_null()).then(by_hash).otherwise(by_time)
    return rows.with_columns(span=span.cast(pl.Int8))


def once(rows: pl.DataFrame) -> pl.DataFrame:
    """Each (user, query, document) once a span, with all answers; in an order that files do not decide."""
    key = ["span", "user_id", "normal", "document"]
    return (
        rows.sort(*key, "timestamp", "query", "file", "line")
        .group_by(key, maintain_order=True)
        .agg(
            pl.col("query").first(),
            pl.col("file").first(),
            pl.col("line").first(),
            answers=pl.col("answers").explode().drop_nulls().unique().sort(),
        )
    )


# --- Negatives ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Led:
    """Which documents are no negatives of a query: those it led to, and those with one of its answers.

    Attributes:
        numbers: {query, as `normal` gives it: its number}, numbered in this order.
        keys: uint64, sorted: (number of the query, first row with the document's text).
        answers: {number of a query: its answers, as `normal` gives them}.
    """

    numbers: Mapping[str, int]
    keys: np.ndarray
    answers: Mapping[int, tuple[str, ...]]
    documents: Documents

    @classmethod
    def of(cls, rows: pl.DataFrame, documents: Documents) -> "Led":
        """What the queries of all rows led to, whoever asked and whenever.

        Args:
            rows: normal, document, answers.
        """
        numbers = {text: number for number, text in enumerate(rows["normal"].unique().sort())}
        number = _numbers(rows, numbers)
        keys = distinct(_keys(number, documents.same_text[rows["document"].to_numpy()]))
        answers: dict[int, set[str]] = {}
        for query, texts in zip(number.tolist(), rows["answers"].to_list(), strict=True):
            if texts:
                answers.setdefault(query, set()).update(filter(None, map(normal, texts)))
        return cls(
            numbers, keys, {query: tuple(sorted(found)) for query, found in answers.items()}, documents
        )

    def to(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Whether each query led to each document, or to one with the same text, bool (n,)."""
        return isin_sorted(_keys(queries, self.documents.same_text[documents]), self.keys)

    def holds(self, queries: np.ndarray, documents: np.ndarray, /) -> np.ndarray:
        """Whether each document is right for each query, bool (n,); int (n,) both."""
        found = self.to(queries, documents)
        for at in np.flatnonzero(~found) if self.answers else ():
            wanted = self.answers.get(int(queries[at]))
            if wanted:
                text = normal(self.documents.texts[int(documents[at])].as_py())
                found[at] = any(holds(text, answer) for answer in wanted)
        return found

    def asked(self, rows: pl.DataFrame, seed: int) -> AskedPairs:
        """Pairs in want of a negative: the anchor is the query's number, the key a hash of seed and pair.

        The user is part of it: who asks for the same gets another negative.
        """
        document = rows["document"].to_numpy()
        hashes = [rows.select(stable_hash(name)).to_series().to_numpy() for name in ("normal", "user_id")]
        key = mix(np.uint64(seed), *hashes, self.documents.hashes[document])
        return AskedPairs(key, hashes[1], _numbers(rows, self.numbers), document)


def _keys(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    return (queries.astype(np.uint64) << SHIFT) | documents.astype(np.uint64)


def _numbers(rows: pl.DataFrame, numbers: Mapping[str, int]) -> np.ndarray:
    return np.fromiter((numbers[text] for text in rows["normal"]), np.int32, len(rows))


def popularity_of(rows: pl.DataFrame, n_documents: int, of_sessions: Popularity | None) -> Popularity:
    """How often these rows opened each document, on top of what was read in sessions."""
    users = rows.select(stable_hash("user_id")).to_series().to_numpy()
    found = Popularity.of(rows["document"].to_numpy(), users, n_documents)
    if of_sessions is None:
        return found
    theirs, ours = of_sessions.only_reader, found.only_reader
    both = np.where(theirs == ours, ours, np.uint64(0))
    only_reader = np.where(found.n_events == 0, theirs, np.where(of_sessions.n_events == 0, ours, both))
    return Popularity(found.n_events + of_sessions.n_events, only_reader)


# --- Pairs -------------------------------------------------------------------------------------------


@dataclass
class Maker:
    """Makes the pairs of these sources and writes them beside those of the sessions.

    Attributes:
        shares: of the strategies, in the order in which they are asked.
        spans: when dev and test begin; (None, None) at first where there are no sessions.
        popularity: of what was read in sessions before the held-out spans, or None.
        rows, rejects, drawn, facts: what was made: rows by table, rejects by reason, draws as
            `negatives.choose` counts them, and counts by source.
    """

    config: PairsConfig
    shares: Mapping[str, float]
    documents: Documents
    spans: Spans
    popularity: Popularity | None
    out: Path

    def __post_init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.rejects: Counter[str] = Counter()
        self.drawn: Counter[str] = Counter()
        self.facts: dict[str, dict[str, int]] = {"queries": {}, "synthetic": {}, "bm25_top": {}}

    def make(self, given: Mapping[str, Given], max_rejected_shares: Mapping[str, float]) -> None:
        """Write pairs-*, dev-*, test-* and rejects-*.parquet of all that is configured.

        Args:
            given, max_rejected_shares: by section, "queries" and "synthetic".

        Raises:
            InputError: too many pairs find no negative.
        """
        pairs = {name: self._in_spans(one) for name, one in given.items()}
        logged = pairs["queries"].filter(span=0) if "queries" in pairs else None
        led_to = [one.rows.select("normal", "document", "answers") for one in given.values()]
        popularity = self.popularity
        if logged is not None:
            popularity = popularity_of(logged, len(self.documents), self.popularity)
        if given:
            led = Led.of(pl.concat(led_to), self.documents)
            for name, rows in pairs.items():
                self._make(given[name], rows, led, popularity, max_rejected_shares[name])
        if self.config.bm25_top:
            self._make_top(logged, led_to)

    def _in_spans(self, given: Given) -> pl.DataFrame:
        is_log = given.section == "queries"
        rows, share = given.rows, self.config.holdout_share
        if is_log and self.spans == (None, None) and not are_spread(rows["timestamp"], share):
            n_times = rows["timestamp"].n_unique()
            _say(
                f"queries: {len(rows):,} of them have {n_times:,} different times, too few to cut "
                "pairs.holdout_share off by time: held out by a hash of the query's text"
            )
            rows = rows.with_columns(timestamp=pl.lit(None, pl.Int64))
        elif is_log:
            self.spans = spans_of(rows["timestamp"], share, self.spans)
        return once(with_span(rows, self.config, self.spans, held_out=is_log))

    def _make(
        self,
        given: Given,
        rows: pl.DataFrame,
        led: Led,
        popularity: Popularity | None,
        max_rejected_share: float,
    ) -> None:
        """The pairs of one section, and the counts of its rows."""
        name = given.section
        pairs = led.asked(rows, self.config.seed)
        draws = self._draws(name, pairs, led, popularity)
        negative = self._negatives(pairs, draws, led.holds)
        # Judged is every query: where its answers are everywhere, by a negative that it did not lead to.
        unjudged = np.flatnonzero((negative == NONE) & (rows["span"].to_numpy() > 0))
        negative[unjudged] = self._negatives(pairs[unjudged], draws, led.to)
        has_one = negative != NONE
        for number, span in enumerate(SPANS):
            at = np.flatnonzero(has_one & (rows["span"].to_numpy() == number))
            self._write(span, name, rows[at], negative[at])
        lost = rows.filter(pl.Series(~has_one)).with_columns(reason=pl.lit("no_negative"))
        without = events.rejects_of(lost.select("line", "reason", "query", "user_id"), None)
        rejects = pl.concat([given.rejects, without.with_columns(lost["file"])])
        self._check_lost(given, rejects, len(rows), max_rejected_share)
        self._say_lost(name, len(lost), len(rows))
        if len(rejects):
            storage.write_parquet(rejects, str(self.out / f"rejects-{name}.parquet"))
            self.rejects.update(rejects["reason"].to_list())
        self.rows["rejects"] += len(rejects)
        counts = {
            "read": given.n_read,
            "pairs": int(has_one.sum()),
            "duplicates": len(given.rows) - len(rows),
            "rejected": len(rejects),
        }
        self.facts[name] = counts
        if counts["read"] != counts["pairs"] + counts["duplicates"] + counts["rejected"]:
            raise PipelineError(f"{name}: the counts {counts} do not add up, so nothing is kept")

    def _say_lost(self, name: str, n_lost: int, n_rows: int) -> None:
        if n_lost:
            _say(
                f"{name}: {n_lost:,} of {n_rows:,} pairs found no negative: {self._why_none()}; they are in "
                f"rejects-{name}.parquet"
            )

    def _check_lost(
        self, given: Given, rejects: pl.DataFrame, n_rows: int, max_rejected_share: float
    ) -> None:
        """
        Raises:
            InputError: pairs without a negative make the rejects more than the share.
        """
        n_lost, name = len(rejects) - len(given.rejects), given.section
        if not n_lost or len(rejects) <= max_rejected_share * given.n_read:
            return
        first = rejects.row(len(given.rejects), named=True)
        raise InputError(
            f"{name}: {n_lost:,} of {n_rows:,} pairs found no negative: {self._why_none()}; more than "
            f"{name}.max_rejected_share = {max_rejected_share}: first {first['file']} line {first['line']}, "
            f"{first['detail'][:120]}; give more documents, leave such rows out, or raise the share"
        )

    def _why_none(self) -> str:
        if len(self.documents) == 1:
            return "there is one document"
        return f"in pairs.max_draws = {self.config.max_draws} draws all documents led or held an answer"

    def _draws(
        self, name: str, pairs: AskedPairs, led: Led, popularity: Popularity | None
    ) -> dict[str, negatives.Draw]:
        """What these pairs' strategies draw from."""

        def none(asked: AskedPairs, hashes: np.ndarray) -> np.ndarray:
            return np.full(len(asked), NONE, np.int32)

        draws: dict[str, negatives.Draw] = {"mined": none, "cross_user": none}
        draws["random"] = negatives.draw_random(len(self.documents))
        if popularity is not None:
            exponent = self.config.popularity_exponent
            draws["cross_user"] = negatives.draw_cross_user(popularity, exponent)
        if "bm25" in self.shares:
            draws["bm25"] = negatives.draw_bm25(self._candidates(name, pairs, led))
        return draws

    def _negatives(
        self,
        pairs: AskedPairs,
        draws: Mapping[str, negatives.Draw],
        is_right: Callable[[np.ndarray, np.ndarray], np.ndarray],
    ) -> np.ndarray:
        """A document row for each pair, or NONE.

        Args:
            is_right: (numbers of queries, document rows) -> bool: what must be no negative.
        """
        negative, counts = negatives.choose_unless(
            pairs,
            self.shares,
            draws,
            lambda asked, found: is_right(asked.anchor, found),
            self.config.max_draws,
        )
        self.drawn.update(counts)
        return negative

    def _candidates(self, name: str, pairs: AskedPairs, led: Led) -> negatives.Candidates:
        """The best BM25 documents of the queries whose pairs ask for one, of MAX_TEXTS at most."""
        own = negatives.assign(pairs.key, self.shares) == list(self.shares).index("bm25")
        queries, n_documents = np.unique(pairs.anchor[own]), len(self.documents)
        texts = list(led.numbers)
        if len(queries) > MAX_TEXTS:
            _say(
                f"{name}: negatives by bm25 for {MAX_TEXTS:,} of {len(queries):,} queries, as many as one "
                "process can search for; pairs of the others ask the next strategy"
            )
            asked = pl.DataFrame({"number": queries, "text": [texts[number] for number in queries]})
            queries = asked.sort(stable_hash("text"))["number"].head(MAX_TEXTS).sort().to_numpy()
        with _bar(f"candidates of {name}", len(queries)) as bar:
            scores = _bm25_scores(self._bm25, texts, bar)
            found = hard_negatives.best_of_queries(
                queries, scores, n_documents, self.config.n_candidates, led
            )
        self.drawn["refused:bm25"] += found.n_refused
        return hard_negatives.by_anchor([found], len(led.numbers))

    @cached_property
    def _bm25(self) -> Bm25:
        return Bm25.of(tqdm(self.documents.texts.to_pylist(), "pairs: BM25", leave=False))

    def _make_top(self, logged: pl.DataFrame | None, led_to: Sequence[pl.DataFrame]) -> None:
        """Weak positives: of each title and each logged training query its best BM25 documents.

        A document is no positive of its own title, nor of a query that led to it: that is a pair already.
        Negatives are drawn from all beyond the best TOP, or the better half of few documents.
        """
        own = titles_of(self.documents)
        texts = own.select("query", "normal")
        if logged is not None:
            texts = pl.concat([texts, logged.select("query", "normal")])
        texts = texts.sort("normal", "query").unique("normal", keep="first", maintain_order=True)
        texts = texts.sort(stable_hash("normal")).head(MAX_TEXTS)
        rows = pl.concat([own.select("normal", "document", "answers"), *led_to])
        led = Led.of(rows, self.documents)
        parts = list(self._top_of(texts, led))
        query, positive, negative = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        has_one = negative != NONE
        made = texts[query[has_one]].with_columns(
            document=pl.Series(positive[has_one]),
            user_id=pl.lit(None, pl.String),
            answers=pl.lit(None, pl.List(pl.String)),
        )
        self._write("pairs", "bm25_top", made, negative[has_one])
        self.facts["bm25_top"] = {
            "texts": len(texts),
            "pairs": len(made),
            "without_negative": len(query) - len(made),
        }

    def _top_of(self, texts: pl.DataFrame, led: Led) -> Iterator[tuple[np.ndarray, ...]]:
        """(row of `texts`, positive, negative or NONE) of a block of texts after another."""
        n_documents, n_wanted = len(self.documents), self.config.bm25_top
        n_top = min(TOP, n_documents // 2)
        depth = min(n_documents, max(n_top, hard_negatives.DEPTH * n_wanted))
        numbers = _numbers(texts, led.numbers)
        hashes = texts.select(stable_hash("normal")).to_series().to_numpy()
        draws = {"random": negatives.draw_random(n_documents)}
        index = self._bm25
        with _bar("bm25_top", len(texts)) as bar:
            scores = _bm25_scores(index, texts["normal"].to_list(), bar)
            rows = np.arange(len(texts), dtype=np.int32)
            for block, document, score in hard_negatives.ranked(rows, scores, n_documents, depth):
                row = np.repeat(block, depth).reshape(document.shape)
                good = (score > 0) & ~led.to(numbers[row.ravel()], document.ravel()).reshape(row.shape)
                taken = good & (np.cumsum(good, axis=1) <= n_wanted)
                near = taken | ((score > 0) & (np.arange(depth) < n_top))
                nearest = distinct(_keys(row[near], self.documents.same_text[document[near]]))
                query, positive = row[taken], document[taken]
                key = mix(np.uint64(self.config.seed), hashes[query], self.documents.hashes[positive])
                asked = AskedPairs(key, np.zeros(len(key), np.uint64), query, positive)

                def refuse(pairs: AskedPairs, found: np.ndarray, nearest: np.ndarray = nearest) -> np.ndarray:
                    is_near = isin_sorted(_keys(pairs.anchor, self.documents.same_text[found]), nearest)
                    return is_near | led.holds(numbers[pairs.anchor], found)

                negative, _ = negatives.choose_unless(
                    asked, {"random": 1.0}, draws, refuse, self.config.max_draws
                )
                yield query, positive, negative

    def _write(self, span: str, source: str, rows: pl.DataFrame, negative: np.ndarray) -> None:
        """Write pairs of one span and source: `rows` have query, document, user_id and answers."""
        self.rows[span] += len(rows)
        if not len(rows):
            return
        texts, ids, same_text = self.documents.texts, self.documents.ids, self.documents.same_text
        queries = rows["query"].unique(maintain_order=True)
        number = {text: at for at, text in enumerate(queries)}
        at = np.fromiter((number[text] for text in rows["query"]), np.int32, len(rows))
        columns: dict[str, pa.Array] = {"anchor": as_dictionary(at, pa.array(queries, pa.string()))}
        columns["anchor_id"] = columns["session_id"] = pa.nulls(len(rows), pa.string())
        for name, document in (("positive", rows["document"].to_numpy()), ("negative", negative)):
            columns[name] = as_dictionary(same_text[document], texts)
            columns[f"{name}_id"] = as_dictionary(document, ids)
        columns["user_id"] = pa.array(rows["user_id"], pa.string())
        columns["source"] = as_dictionary(np.zeros(len(rows), np.int32), pa.array([source]))
        table = pa.table({name: columns[name] for name in PAIR_COLUMNS})
        if span != "pairs":
            answers = [texts or None for texts in rows["answers"].to_list()]
            table = table.append_column("answers", pa.array(answers, ANSWERS))
        storage.write_dictionaries(table, str(self.out / f"{span}-{source}.parquet"))


def _bm25_scores(index: Bm25, texts: Sequence[str], bar: tqdm) -> hard_negatives.Scores:
    """Of numbered texts against all documents, moving the bar on."""

    def scores(block: np.ndarray) -> np.ndarray:
        bar.update(len(block))
        return (index.counts([texts[number] for number in block]) @ index.scores).toarray()

    return scores


def titles_of(documents: Documents) -> pl.DataFrame:
    """What stands for a query to each document: query, normal, document, answers (null)."""
    texts = zip(documents.titles.to_pylist(), documents.texts.to_pylist(), strict=True)
    rows = pl.DataFrame({"query": [stand_in(title, text) for title, text in texts]})
    return rows.select(
        "query",
        normal=pl.col("query").map_elements(normal, return_dtype=pl.String),
        document=pl.int_range(pl.len(), dtype=pl.Int32),
        answers=pl.lit(None, pl.List(pl.String)),
    )


def stand_in(title: str, text: str) -> str:
    """The title, unless the text begins with it; then its first sentence, or half of an only one."""
    shown = normal(title.rstrip("…"))
    if shown and not normal(text).startswith(shown):
        return title.strip()
    first, *rest = (part.strip() for part in SENTENCE_END.split(text.strip(), maxsplit=1))
    if first and any(rest):
        return first
    words = text.split()
    return " ".join(words[: (len(words) + 1) // 2]) if len(words) > 1 else text[: (len(text) + 1) // 2]


def _bar(title: str, total: int) -> tqdm:
    return tqdm(total=total, desc=f"pairs: {title}", unit="query", file=sys.stderr, leave=False)


def _say(line: str) -> None:
    print(f"pairs: {line}", file=sys.stderr, flush=True)
