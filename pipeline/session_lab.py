"""Session lab: what each `gap_duration` does to a log, as tables and a picture.

    python -m pipeline sessions --config FILE --gaps 300,900,1800,3600,7200 --out DIR

Two questions. What does a gap give: sessions, pairs, and whether the documents of a pair meet again? And what
is a reader's next document like after so much time: still near the last one, or as good as a random one?

The log is read by the code of stage `pairs`, with its rejects, into bucket files of whole users. These are
gone through twice, a bucket at a time: once to count and to draw pairs, once to see which of them meet again.
"""

import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
from tqdm import tqdm

from pipeline import pairing, pairs, runners, storage
from pipeline.artifacts import Draft
from pipeline.bm25 import Bm25
from pipeline.bootstrap import bootstrap
from pipeline.co_reading import distinct
from pipeline.config import Config
from pipeline.errors import ConfigError, InputError, PipelineError
from pipeline.hashing import mix
from pipeline.report import COLOURS, MARKERS
from pipeline.sessions import CODED, MICROSECONDS, Sessions, cut, only, set_aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from scipy.sparse import csr_array

SAMPLE = 4_000  # pairs of a gap, or steps of a band, that are looked at closely; the counts are of all
POOL = 50_000  # documents that BM25 learns its word weights from
DRAWS = 2_000  # of the bootstrap over readers
YEAR = 31_536_000  # seconds
BLOCK = 2_000_000  # sessions of documents that are compared at once
REDRAWS = 20  # of a random document that is the anchor itself
PER_DECADE, DECADES = 6, 9  # bars of the histogram: from 1 s to 10^9 s (32 years)
EDGES = np.logspace(0, DECADES, PER_DECADE * DECADES + 1)  # seconds
MEASURES = (
    "similarity",  # BM25 of anchor and positive, see `Similarity`
    "random",  # the same of the anchor and a random document
    "again",  # whether anchor and positive are also in another session
    "other_reader",  # ... in one of another reader: of one reader alone it may be a habit
    "by_chance",  # whether the anchor and the random document are in a session of another reader
)
LOOK_AT = (
    "Look at the lower table: where BM25 is down at the last row's level, readers have begun anew, "
    "and a longer gap joins what is apart."
)
PAIR = {"key": "uint64", "user": "uint64", "session": "uint64", "anchor": "int32", "positive": "int32"}
ENDS = ("anchor", "positive", "partner")  # partner: a random document in the positive's place


# --- Command ---------------------------------------------------------------------------------------------


def run(config: Config, gaps: Sequence[int], out: Path | None) -> str:
    """Look at one log, and write what was seen.

    Args:
        gaps: seconds; the config's own gap_duration is looked at too.
        out: gets sessions.csv, steps.csv and sessions.png; None for the tables alone.

    Returns:
        The tables as text.

    Raises:
        InputError: there is no log, or the stage `pairs` would refuse it.
    """
    if not config.events.paths:
        raise InputError("events.paths is empty: without a log there are no sessions; name the log's files")
    if out:
        out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".session-lab-", dir=out) as folder:
        lab = look(config, sorted({*gaps, config.pairs.gap_duration}), Path(folder))
    if out:
        lab.gaps.to_csv(out / "sessions.csv")
        lab.steps.to_csv(out / "steps.csv")
        draw(lab).savefig(out / "sessions.png", dpi=144)
    return tables(lab)


def parse_gaps(text: str) -> list[int]:
    """ "300,900" as seconds.

    Raises:
        ConfigError: an entry is not a whole number from 1 to a year's seconds.
    """
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not (part.isascii() and part.isdigit() and 1 <= int(part) <= YEAR):
            raise ConfigError(
                f"--gaps {text}: {part!r} is not a whole number of seconds from 1 to a year; "
                "wanted such as --gaps 300,900,1800"
            )
    return [int(part) for part in parts]


@dataclass(frozen=True)
class Lab:
    """What was seen.

    Attributes:
        gaps: a row a gap_duration: sessions, documents_mean, documents_median, one_document, pairs; of the
            pairs the MEASURES with _low and _high.
        steps: a row a band of time between two documents (`from`, `to`; seconds): steps, share; of the steps
            the MEASURES but `again`.
        same, other: int64 (bars,): how often the time between a reader's neighbouring events lies between
            EDGES, where both are of one document and where they are not.
        gap_duration: the config's.
        description: of the readers.
    """

    gaps: pd.DataFrame
    steps: pd.DataFrame
    same: np.ndarray
    other: np.ndarray
    gap_duration: int
    description: str


def look(config: Config, gaps: Sequence[int], folder: Path) -> Lab:
    """Read the log into `folder` and look at what each gap does.

    Args:
        gaps: seconds, ascending.
        folder: empty; for the bucket files.
    """
    log = read_log(config, folder)
    of_gaps = [OfGap(gap) for gap in gaps]
    of_steps = Steps(np.array(gaps, np.int64))
    for rows in log.shown("cutting"):
        of_steps.add(rows, log.hashes)
        for of_gap in of_gaps:
            of_gap.add(cut(rows, of_gap.gap)[0], log.hashes)
    for of_gap in of_gaps:
        if of_gap.gap == config.pairs.gap_duration and of_gap.n_sessions != log.n_sessions:
            raise PipelineError(
                f"{of_gap.n_sessions} sessions were seen, but the stage cuts the log into {log.n_sessions}: "
                "the tables would be of another log"
            )
    judge(log, of_gaps, of_steps)
    return Lab(
        gaps=pd.DataFrame([of_gap.figures() for of_gap in of_gaps]).set_index("gap_duration"),
        steps=of_steps.figures(),
        same=of_steps.same,
        other=of_steps.other,
        gap_duration=config.pairs.gap_duration,
        description=config.events.description,
    )


# --- The log ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Log:
    """A log in bucket files.

    Attributes:
        folder: of the bucket files.
        documents_file: document_id, text, hash.
        max_events_per_user: a day.
        n_sessions: what the stage cuts it into.
    """

    folder: str
    documents_file: str
    max_events_per_user: int
    n_sessions: int

    @cached_property
    def documents(self) -> pa.Table:
        return storage.read_arrow(self.documents_file)

    @property
    def hashes(self) -> np.ndarray:
        return only(self.documents["hash"]).to_numpy()

    @cached_property
    def buckets(self) -> list[str]:
        """The numbers of the buckets that hold events, as the files' names begin."""
        return sorted({Path(path).name.split("-")[0] for path in storage.names(self.folder, "*-events-*")})

    def rows(self, bucket: str) -> pl.DataFrame:
        """A bucket's events as `CODED`, without the users whom the stage sets aside."""
        rows = self._read(f"{bucket}-events-*", pl.DataFrame(schema=CODED))
        crowded = self._read(f"{bucket}-crowded-*", pl.DataFrame(schema={"user_id": pl.String}))
        rows = rows.join(crowded, on="user_id", how="anti", maintain_order="left")
        return set_aside(rows, self.max_events_per_user)[0]

    def _read(self, pattern: str, empty: pl.DataFrame) -> pl.DataFrame:
        tables = [pl.DataFrame(storage.read_arrow(p)) for p in storage.names(self.folder, pattern)]
        return pl.concat([empty, *(table.select(empty.columns) for table in tables)])

    def shown(self, title: str) -> Iterator[pl.DataFrame]:
        """Every bucket's events, with a bar."""
        bar = tqdm(self.buckets, f"sessions: {title}", unit=" buckets", file=sys.stderr, leave=False)
        return (self.rows(bucket) for bucket in bar)


def read_log(config: Config, folder: Path) -> Log:
    """Write the log into bucket files, by the stage's reader and its rules for rejects."""
    buckets = folder / "buckets"
    buckets.mkdir()
    given = (config.pairs, config.events, config.documents)
    job = pairs.Job(*given, Draft(folder), str(buckets), runners.parse_options([]))
    job.write_documents()
    job.write_sessions()
    per_user, n_sessions = config.pairs.max_events_per_user, job.draft.rows["sessions"]
    return Log(str(buckets), job.documents_file, per_user, n_sessions)


# --- Counting and drawing --------------------------------------------------------------------------------


@dataclass
class Drawn:
    """Pairs one after the other: how many there were, and the SAMPLE of them with the lowest keys.

    The key is a hash, so the sample is the same however the log is cut into files and buckets.

    Attributes:
        pairs: key and user (uint64), session (uint64; 0 for none), anchor and positive (rows of documents).
    """

    n: int = 0
    pairs: pd.DataFrame = field(default_factory=lambda: as_pairs(*[[]] * len(PAIR)))

    def add(self, found: pd.DataFrame) -> None:
        self.n += len(found)
        self.pairs = pd.concat([self.pairs, found]).nsmallest(SAMPLE, "key").reset_index(drop=True)


def as_pairs(*columns: Any) -> pd.DataFrame:
    """The columns of PAIR, each (n,), as a table."""
    return pd.DataFrame(
        {name: np.asarray(values, kind) for (name, kind), values in zip(PAIR.items(), columns, strict=True)}
    )


@dataclass
class OfGap:
    """What one gap does to the log, bucket by bucket.

    Attributes:
        gap: seconds.
        lengths: int64: how many sessions have 0, 1, 2, ... different documents.
    """

    gap: int
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(2, np.int64))
    drawn: Drawn = field(default_factory=Drawn)

    def add(self, sessions: Sessions, hashes: np.ndarray) -> None:
        """Count the sessions of whole users, and draw of their pairs.

        Args:
            hashes: uint64 (n_documents,), `stable_hash` of the document_ids.
        """
        self.lengths = summed(self.lengths, np.bincount(n_documents(sessions)))
        # one seed for every gap: a pair that two gaps give alike is in both samples or in none
        session, asked = pairing.ask(sessions, hashes, seed=0)
        own = sessions.session[session]
        self.drawn.add(as_pairs(asked.key, asked.user, own, asked.anchor, asked.positive))

    @property
    def n_sessions(self) -> int:
        return int(self.lengths.sum())

    def figures(self) -> dict[str, Any]:
        n = self.n_sessions
        return {
            "gap_duration": self.gap,
            "sessions": n,
            "documents_mean": float(self.lengths @ np.arange(len(self.lengths)) / n),
            "documents_median": median(self.lengths),
            "one_document": float(self.lengths[1] / n),
            "pairs": self.drawn.n,
            **measured(self.drawn.pairs, MEASURES),
        }


def n_documents(sessions: Sessions) -> np.ndarray:
    """How many different documents each session has, int64 (n,)."""
    session = np.repeat(np.arange(len(sessions), dtype=np.uint64), sessions.lengths)
    keys = distinct((session << np.uint64(32)) | sessions.documents.astype(np.uint64))
    return np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=len(sessions))


def summed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b, the shorter one filled up with zeros."""
    total = np.zeros(max(len(a), len(b)), np.int64)
    total[: len(a)] += a
    total[: len(b)] += b
    return total


def median(times: np.ndarray) -> float:
    """Of numbers of which there are times[0] zeros, times[1] ones, ...: the mean of the middle two."""
    below, n = np.cumsum(times), int(times.sum())
    return float(np.searchsorted(below, [(n - 1) // 2, n // 2], side="right").mean())


class Steps:
    """What a reader reads next, by the time until then, wherever a session may end.

    Attributes:
        gaps: int64, seconds, ascending; band i is from gaps[i - 1] to below gaps[i], as a gap of exactly
            gap_duration ends a session.
        drawn: one a band: the steps from a document to a different one.
        same, other: see `Lab`.
    """

    def __init__(self, gaps: np.ndarray) -> None:
        self.gaps = gaps
        self.drawn = [Drawn() for _ in range(len(gaps) + 1)]
        self.same = np.zeros(len(EDGES) - 1, np.int64)
        self.other = np.zeros(len(EDGES) - 1, np.int64)

    def add(self, rows: pl.DataFrame, hashes: np.ndarray) -> None:
        """Count the times between whole users' events, and draw of the steps.

        Args:
            rows: CODED; all events of their users.
        """
        columns = ("user", "timestamp", "document", "text")
        ordered = rows.select(columns).unique().sort(columns)
        user, timestamp, document = (ordered[name].to_numpy() for name in columns[:3])
        at = np.flatnonzero(user[1:] == user[:-1])
        time, differs = timestamp[at + 1] - timestamp[at], document[at] != document[at + 1]
        seconds = np.clip(time / MICROSECONDS, EDGES[0], EDGES[-1])  # equal times stand in the first bar
        self.same += np.histogram(seconds[~differs], EDGES)[0]
        self.other += np.histogram(seconds[differs], EDGES)[0]

        at, time = at[differs], time[differs]
        anchor, positive = document[at], document[at + 1]
        key = mix(user[at], timestamp[at].view(np.uint64), hashes[anchor], hashes[positive])
        found = as_pairs(key, user[at], np.zeros(len(at)), anchor, positive)
        band = np.searchsorted(self.gaps * MICROSECONDS, time, side="right")
        for number, drawn in enumerate(self.drawn):
            drawn.add(found[band == number])

    def figures(self) -> pd.DataFrame:
        n = max(1, sum(drawn.n for drawn in self.drawn))
        names = [name for name in MEASURES if name != "again"]
        return pd.DataFrame(
            {"from": low, "to": high, "steps": drawn.n, "share": drawn.n / n, **measured(drawn.pairs, names)}
            for low, high, drawn in zip([0, *self.gaps], [*self.gaps, np.inf], self.drawn, strict=True)
        ).set_index(["from", "to"])


# --- Judging ---------------------------------------------------------------------------------------------


def judge(log: Log, of_gaps: list[OfGap], of_steps: Steps) -> None:
    """Give every drawn pair a random partner and the MEASURES, as columns of float."""
    drawn = [of_gap.drawn.pairs for of_gap in of_gaps] + [band.pairs for band in of_steps.drawn]
    for part in drawn:
        part["partner"] = partners(part["anchor"].to_numpy(), part["positive"].to_numpy())
    similar = Similarity(only(log.documents["text"]), [part[list(ENDS)].to_numpy() for part in drawn])
    for part in drawn:
        part["similarity"] = similar(part["anchor"].to_numpy(), part["positive"].to_numpy())
        part["random"] = similar(part["anchor"].to_numpy(), part["partner"].to_numpy())
        part[["again", "other_reader", "by_chance"]] = 0.0
    for rows in log.shown("looking for documents that meet again"):
        found = [cut(rows, of_gap.gap)[0] for of_gap in of_gaps]
        # the steps have one yardstick: what even the shortest gap leaves in one session
        for part, sessions in zip(drawn, [*found, *found[:1] * len(of_steps.drawn)], strict=True):
            note_meetings(part, sessions, len(log.hashes))


def partners(anchor: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """For each anchor the positive of any pair: a document drawn as often as readers come to it.

    Never the anchor itself; where only that was drawn, it is the anchor's own positive.
    """
    if not len(anchor):
        return positive
    rng = np.random.default_rng(0)
    found = positive[rng.integers(len(positive), size=len(anchor))]
    for _ in range(REDRAWS):
        again = np.flatnonzero(found == anchor)
        found[again] = positive[rng.integers(len(positive), size=len(again))]
    return np.where(found == anchor, positive, found)


class Similarity:
    """BM25 score of a document for another as the query, over the query's score for itself.

    1.0 is the document itself, 0.0 no word in common; 0.0 too where a query has no words. With more than POOL
    documents the weights of words are those of POOL of them and of all that are asked for.
    """

    def __init__(self, texts: pa.Array, asked: Iterable[np.ndarray]) -> None:
        """
        Args:
            asked: rows of `texts`, of any shape, that calls will be about.
        """
        pool = np.random.default_rng(0).permutation(len(texts))[:POOL]
        self.rows = np.unique(np.concatenate([pool, *(rows.ravel() for rows in asked)]))
        known = texts.take(pa.array(self.rows)).to_pylist()
        index, self.counts = Bm25.with_counts(known)
        self.scores: csr_array = index.scores.T.tocsr()

    def __call__(self, query: np.ndarray, document: np.ndarray) -> np.ndarray:
        """float (n,), for rows query[i] and document[i]."""
        asked, found = np.searchsorted(self.rows, query), np.searchsorted(self.rows, document)
        own, of_document = (self.counts[asked].multiply(self.scores[of]).sum(axis=1) for of in (asked, found))
        return np.divide(of_document, own, out=np.zeros(len(query)), where=own > 0)


def note_meetings(drawn: pd.DataFrame, sessions: Sessions, n_documents: int) -> None:
    """Set `again`, `other_reader` and `by_chance` to 1 where these sessions show it.

    again: anchor and positive are in a session other than the pair's own. other_reader: in one of another
    reader. by_chance: anchor and partner are in one of another reader.

    Args:
        drawn: PAIR and partner.
    """
    number = np.full(n_documents, -1)
    wanted = np.unique(drawn[list(ENDS)].to_numpy())
    number[wanted] = np.arange(len(wanted))
    held = holding(sessions, number, len(wanted))
    anchor, positive, partner = (number[drawn[end]] for end in ENDS)
    own_session, own_user = drawn["session"].to_numpy(), drawn["user"].to_numpy()

    pair, session = both(held, anchor, positive)
    _set(drawn, "again", pair[sessions.session[session] != own_session[pair]])
    _set(drawn, "other_reader", pair[sessions.user[session] != own_user[pair]])
    pair, session = both(held, anchor, partner)
    _set(drawn, "by_chance", pair[sessions.user[session] != own_user[pair]])


def _set(drawn: pd.DataFrame, column: str, rows: np.ndarray) -> None:
    values = drawn[column].to_numpy(copy=True)
    values[rows] = 1.0
    drawn[column] = values


def holding(sessions: Sessions, number: np.ndarray, n: int) -> "csr_array":
    """Which sessions hold which documents: sparse bool (n, n_sessions).

    Args:
        number: int (n_documents,): a document's line; -1 for one that nobody asks for.
    """
    from scipy import sparse

    line = number[sessions.documents]
    session = np.repeat(np.arange(len(sessions)), sessions.lengths)[line >= 0]
    line = line[line >= 0]
    return sparse.coo_array((np.ones(len(line), bool), (line, session)), (n, len(sessions))).tocsr()


def both(held: "csr_array", a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every (pair, session) in which the session holds the lines a[pair] and b[pair], int (n,) each."""
    times = np.diff(held.indptr)
    asked = np.flatnonzero((times[a] > 0) & (times[b] > 0))
    entries = np.cumsum(times[a[asked]] + times[b[asked]], dtype=np.int64)
    pairs, sessions = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for block in np.split(asked, np.flatnonzero(np.diff(entries // BLOCK)) + 1):
        found = held[a[block]].multiply(held[b[block]]).tocoo()
        pairs.append(block[found.coords[0]])
        sessions.append(found.coords[1])
    return np.concatenate(pairs), np.concatenate(sessions)


def measured(drawn: pd.DataFrame, names: Sequence[str]) -> dict[str, float]:
    """Means over the drawn pairs with intervals over their readers; nan where nothing was drawn."""
    if drawn.empty:
        return {f"{name}{end}": np.nan for name in names for end in ("", "_low", "_high")}
    _, reader = np.unique(drawn["user"], return_inverse=True)
    found = bootstrap(drawn[list(names)].to_numpy(float), reader, DRAWS, seed=0)
    return {
        f"{name}{end}": float(values[column])
        for column, name in enumerate(names)
        for end, values in zip(("", "_low", "_high"), found, strict=True)
    }


# --- Tables ----------------------------------------------------------------------------------------------


def tables(lab: Lab) -> str:
    """Both tables, and what to look at."""
    from tabulate import tabulate

    of_gaps = [
        "gap", "sessions", "documents:\nmean", "\nmedian", "one\ndocument", "pairs", "meet\nagain",
        "by another\nreader", "random\npair", "BM25 (95 %)", "random\npair",
    ]  # fmt: skip
    of_steps = [
        "next document", "steps", "share", "another reader\nreads both", "random\npair", "BM25 (95 %)",
        "random\npair",
    ]  # fmt: skip
    gaps = tabulate(
        [_gap_line(int(row["gap_duration"]), row, lab) for _, row in lab.gaps.reset_index().iterrows()],
        of_gaps,
        disable_numparse=True,
        colalign=("right",) * len(of_gaps),
    )
    steps = tabulate(
        [_step_line(row) for _, row in lab.steps.reset_index().iterrows()],
        of_steps,
        disable_numparse=True,
        colalign=("left", *("right",) * (len(of_steps) - 1)),
    )
    said = f"{lab.description}\n" if lab.description else ""
    note = f"* pairs.gap_duration of this config; shares of pairs and BM25: at most {SAMPLE:,} pairs a row"
    return f"{said}{gaps}\n{note}\n\n{steps}\n\n{LOOK_AT}"


def _gap_line(gap: int, row: pd.Series, lab: Lab) -> list[str]:
    return [
        spell(gap) + ("*" if gap == lab.gap_duration else " "),
        f"{row['sessions']:,.0f}",
        f"{row['documents_mean']:.2f}",
        f"{row['documents_median']:g}",
        percent(row["one_document"]),
        f"{row['pairs']:,.0f}",
        *(percent(row[name]) for name in ("again", "other_reader", "by_chance")),
        *_similarity(row),
    ]


def _step_line(row: pd.Series) -> list[str]:
    return [
        band_name(row["from"], row["to"]),
        f"{row['steps']:,.0f}",
        percent(row["share"]),
        *(percent(row[name]) for name in ("other_reader", "by_chance")),
        *_similarity(row),
    ]


def _similarity(row: pd.Series) -> list[str]:
    """BM25 of the pairs with its interval, and of random ones."""
    mean, low, high = (row[f"similarity{end}"] for end in ("", "_low", "_high"))
    if np.isnan(mean):
        return ["-", "-"]
    bounds = " (one reader)" if np.isnan(low) else f" ({low:.3f} to {high:.3f})"
    return [f"{mean:.3f}{bounds}", f"{row['random']:.3f}"]


def percent(share: float) -> str:
    return "-" if np.isnan(share) else f"{100 * share:.1f} %"


def spell(seconds: float) -> str:
    """ "30 min": in the largest unit that leaves no rest."""
    for unit, name in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds and not seconds % unit:
            return f"{seconds // unit:g} {name}"
    return f"{seconds:g} s"


def band_name(low: float, high: float) -> str:
    if np.isinf(high):
        return f"{spell(low)} or more"
    return f"{spell(low)} to {spell(high)}" if low else f"under {spell(high)}"


# --- Picture ---------------------------------------------------------------------------------------------

TICKS = {
    1: "1 s", 10: "10 s", 60: "1 min", 600: "10 min", 3600: "1 h", 36_000: "10 h", 7 * 86_400: "1 week",
    60 * 86_400: "2 months", 730 * 86_400: "2 years",
}  # fmt: skip
GREY = 7  # of COLOURS and MARKERS


def draw(lab: Lab) -> "Figure":
    """How long readers pause and what they read then, over one axis of time; below, what each gap gives."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
        "axes.titlesize": 10, "axes.titlelocation": "left", "text.parse_math": False,
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(8, 9), layout="constrained")
        plots = figure.subplot_mosaic([["pauses"] * 2, ["steps"] * 2, ["sessions", "meetings"]])
        if lab.description:
            figure.suptitle(lab.description, fontsize=9, wrap=True)
        last = _draw_pauses(plots["pauses"], lab)
        _draw_steps(plots["steps"], lab, last)
        for name in ("pauses", "steps"):
            _draw_time(plots[name], lab, last)
        _draw_sessions(plots["sessions"], lab)
        _draw_meetings(plots["meetings"], lab)
        for axes in plots.values():
            axes.grid(axis="y", alpha=0.3, lw=0.6)
            axes.set_axisbelow(True)
            axes.set_ylim(bottom=0)
    return figure


def _draw_pauses(axes: "Axes", lab: Lab) -> float:
    """Returns where the axis of time ends: behind the last bar, and behind every gap."""
    used = np.flatnonzero(lab.same + lab.other)
    n = int(used[-1]) + 1 if len(used) else 1
    left, widths = EDGES[:n], np.diff(EDGES[: n + 1])
    axes.bar(left, lab.other[:n], widths, align="edge", color=COLOURS[0], label="to another document")
    if lab.same.sum() > 0.005 * lab.other.sum():  # a colour that nobody can find in the bars puzzles
        same = lab.same[:n]
        axes.bar(left, same, widths, lab.other[:n], align="edge", color=COLOURS[5], label="to the same one")
    axes.set_ylabel("events")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_title("How long until a reader's next event")
    axes.legend(loc="upper right")
    axes.set_ylim(top=1.08 * (lab.same + lab.other).max())
    for gap in lab.gaps.index:
        axes.annotate(
            spell(gap), (gap, 1), xycoords=("data", "axes fraction"), rotation=90, fontsize=7,
            ha="right", va="top", xytext=(-1, -1), textcoords="offset points",
        )  # fmt: skip
    return max(EDGES[n], 4.0 * lab.gaps.index.max())


def _draw_steps(axes: "Axes", lab: Lab, last: float) -> None:
    steps = lab.steps[lab.steps["steps"] > 0].reset_index()
    low, high = np.maximum(steps["from"], EDGES[0]), np.minimum(steps["to"], last)
    axes.hlines(steps["similarity"], low, high, color=COLOURS[0], lw=2.5)
    _dots(axes, np.sqrt(low * high), steps, "similarity", 0, "the next document", ls="none")
    axes.hlines(steps["random"], low, high, color=COLOURS[GREY], lw=2.5, label="a random one")
    axes.set_ylabel("BM25, share of own score")
    axes.set_xlabel(f"time between two events; solid line: the config's gap, {spell(lab.gap_duration)}")
    axes.set_title("How near the next document is to the last, by the time between them")
    axes.legend(loc="upper right")


def _draw_time(axes: "Axes", lab: Lab, last: float) -> None:
    """The axis of time, and an upright line a gap."""
    for gap in lab.gaps.index:
        own = gap == lab.gap_duration
        axes.axvline(gap, color="black", ls="-" if own else ":", lw=1.3 if own else 0.8, zorder=0.5)
    axes.set_xscale("log")
    axes.set_xlim(EDGES[0], last)
    ticks = {at: name for at, name in TICKS.items() if at <= last}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xticks([], minor=True)


def _draw_sessions(axes: "Axes", lab: Lab) -> None:
    axes.bar(np.arange(len(lab.gaps)), 100 * lab.gaps["one_document"], color=COLOURS[1], width=0.7)
    axes.set_ylim(top=100)
    axes.set_title("Sessions of one document, %")
    _draw_gap_names(axes, lab)


def _draw_meetings(axes: "Axes", lab: Lab) -> None:
    at, shares = np.arange(len(lab.gaps)), 100 * lab.gaps
    _dots(axes, at - 0.1, shares, "again", 0, "in another session")
    _dots(axes, at + 0.1, shares, "other_reader", 2, "in one of another reader")
    _dots(axes, at, shares, "by_chance", GREY, "random pairs, in one of another reader")
    axes.set_title("Pairs whose documents meet again, %")
    axes.set_ylim(top=145)  # room for the legend
    axes.set_yticks(range(0, 101, 25))
    axes.legend(loc="upper left", fontsize=8)
    _draw_gap_names(axes, lab)


def _draw_gap_names(axes: "Axes", lab: Lab) -> None:
    axes.set_xticks(np.arange(len(lab.gaps)), [spell(gap) for gap in lab.gaps.index])
    for gap, label in zip(lab.gaps.index, axes.get_xticklabels(), strict=True):
        label.set_fontweight("bold" if gap == lab.gap_duration else "normal")
    axes.set_xlabel("gap")


def _dots(axes: "Axes", x: Any, rows: pd.DataFrame, name: str, look: int, label: str, ls: str = "-") -> None:
    axes.errorbar(
        x, rows[name], _reach(rows, name), fmt=MARKERS[look], ls=ls, color=COLOURS[look], ms=5, lw=1,
        capsize=3, label=label,
    )  # fmt: skip


def _reach(rows: pd.DataFrame, name: str) -> np.ndarray:
    """How far the interval goes below and above the mean, float (2, n); 0 where there is none."""
    ends = [rows[name] - rows[f"{name}_low"], rows[f"{name}_high"] - rows[name]]
    return np.nan_to_num(np.abs(np.array(ends, float)))
