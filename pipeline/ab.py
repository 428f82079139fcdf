"""Two versions side by side: what the users of each did with what they were shown, from the gateway's log.

A search counts for the version that answered it; its opens are those of its results by the same user. The
gateway splits users (`--compare VERSION:SHARE`), so the bootstrap draws users, each version's by themselves.
"""

import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.artifacts import write_json
from pipeline.bootstrap import number
from pipeline.config import EvaluateConfig
from pipeline.errors import InputError

LOGS = "searches-*.jsonl*"  # of a folder; compressed ones too
COLUMNS: dict[str, Any] = {
    "kind": pl.String,  # "search", or "open"
    "timestamp": pl.String,
    "user_id": pl.String,
    "query": pl.String,
    "version": pl.Int64,
    "live": pl.Int64,  # live, compared, share: the split that the user was in; null without one
    "compared": pl.Int64,
    "share": pl.Float64,
    "drawn": pl.Int64,  # the version that the user was to be served by; null in older logs
    "document_ids": pl.List(pl.String),  # of a search: what was shown, best first
    "document_id": pl.String,  # of an open
}
SPLIT = ["live", "compared", "share"]
MAX_BAD_SHARE = 0.01  # more lines than this that cannot be used: the log is not what we think
TYPING = 3_000_000  # microseconds; who asks again before they are over has read nothing
MIN_USERS = 30  # of each version; an interval from fewer is too narrow to be believed
DRAWS_AT_ONCE = 500
# A difference of so many standard errors is told from none by a 95 % interval in four of five repetitions.
STANDARD_ERRORS = 2.8
MISMATCH = 0.001  # p of the users' split: less often than this chance alone gives one so uneven
NEVER = 100  # times as many users: more is not worth waiting for
MEASURES = {
    "click_through": "click-through: opened of what was shown",
    "mrr": "MRR of the first open",
    "abandoned": "abandoned searches: nothing opened",
}
JUDGED_BY = "mrr"  # it falls with abandoned searches, and with good documents that stand low


def run(config: EvaluateConfig, logs: Sequence[Path], out: Path | None = None) -> dict[str, Any]:
    """Measure, print a table for each comparison, and write JSON where it is wanted.

    Args:
        config: n_draws and seed of the bootstrap.
        logs: files, or folders of them.
        out: of the JSON.

    Returns:
        comparisons: as `compared` gives them, in the order of their first search; and left_out: {why: how
        many} of what was not counted.

    Raises:
        InputError: no log, one that cannot be used, or one without any comparison.
    """
    files = files_of(logs)
    rows, left_out = read(files)
    searches = judged(rows, left_out)
    if not len(searches):
        raise InputError(
            f"{_listed(files)}: no search of a comparison among {len(rows):,} lines; "
            "start the gateway with --compare VERSION:SHARE, and let people search"
        )
    parts = searches.sort("timestamp").partition_by(SPLIT, maintain_order=True)
    comparisons = [compared(part, config) for part in parts]
    counted = {why: n for why, n in left_out.items() if n}
    figures: dict[str, Any] = {"comparisons": comparisons, "left_out": counted}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, figures)
    print("\n\n".join(table(comparison) for comparison in comparisons))
    for why, n in counted.items():
        print(f"evaluate: not counted: {n:,} {why}", file=sys.stderr)
    return figures


# --- Reading -------------------------------------------------------------------------------------------


def files_of(logs: Sequence[Path]) -> list[Path]:
    """The logs, a folder's searches-*.jsonl in its place, each once.

    Raises:
        InputError: one is not there, or a folder without any.
    """
    found: dict[Path, None] = {}
    for log in logs:
        files = sorted(log.glob(LOGS)) if log.is_dir() else [log]
        if not files:
            raise InputError(f"{log}: a folder without {LOGS}; wanted the gateway's feedback folder")
        if not files[0].is_file():
            raise InputError(f"{log}: no such file; wanted the gateway's searches-DAY.jsonl, or its folder")
        found |= dict.fromkeys(file.resolve() for file in files)
    return list(found)


def read(files: Sequence[Path]) -> tuple[pl.DataFrame, dict[str, int]]:
    """The usable lines of all files: COLUMNS, timestamp in microseconds; and how many were not usable.

    Raises:
        InputError: a file cannot be read, or more than MAX_BAD_SHARE of the lines are unusable.
    """
    parts, bad, n_lines = [], [], 0
    for file in files:
        rows = _lines_of(file)
        moments = pl.col("timestamp").str.to_datetime("%+", strict=False, time_zone="UTC", time_unit="us")
        rows = rows.with_columns(moments.dt.timestamp("us").alias("timestamp"))
        needed = pl.all_horizontal(
            pl.col(name).is_not_null() for name in ("timestamp", "user_id", "query", "version")
        )
        is_search = (pl.col("kind") == "search") & pl.col("document_ids").is_not_null()
        is_open = (pl.col("kind") == "open") & pl.col("document_id").is_not_null()
        good = rows.select((needed & (is_search | is_open)).fill_null(False)).to_series()
        bad += [f"{file}: line {line}" for line in rows.filter(~good)["line"].head(1)]
        parts.append(rows.filter(good).drop("line"))
        n_lines += len(rows)
    rows = pl.concat(parts)
    n_bad = n_lines - len(rows)
    if n_bad > MAX_BAD_SHARE * n_lines:
        raise InputError(
            f"{bad[0]}: no line of the gateway's searches log, as {n_bad:,} of {n_lines:,} are not; wanted "
            f"JSON with {', '.join(COLUMNS)}: give its searches-DAY.jsonl"
        )
    return rows, {"unusable lines": n_bad}


def _lines_of(file: Path) -> pl.DataFrame:
    """COLUMNS and line, from 1, of each line that is not blank; all null where it is no JSON of these."""
    try:
        with pa.input_stream(str(file), compression="detect") as opened:  # by the ending: .gz, .zst, .bz2
            text = opened.read()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    lines = [(number, line) for number, line in enumerate(text.split(b"\n"), 1) if line.strip()]
    numbers = pl.Series("line", [number for number, _ in lines], dtype=pl.Int64)
    try:
        rows = pl.read_ndjson(io.BytesIO(text), schema=COLUMNS) if lines else pl.DataFrame(schema=COLUMNS)
        if len(rows) == len(lines):
            return rows.with_columns(numbers)
    except (pl.exceptions.PolarsError, OSError):
        pass  # some line: look at each
    return pl.DataFrame([_line(line) for _, line in lines], schema=COLUMNS).with_columns(numbers)


def _line(line: bytes) -> dict[str, Any]:
    """COLUMNS of a line; all None where it is no JSON object, or one is of another kind."""
    nothing = dict.fromkeys(COLUMNS)
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            return nothing
        return {name: _value(row.get(name), kind) for name, kind in COLUMNS.items()}
    except (ValueError, RecursionError):
        return nothing


def _value(value: Any, kind: Any) -> Any:
    """A value that a column of this kind can hold; ValueError where it cannot."""
    if value is None:
        return None
    if kind == pl.List(pl.String) and isinstance(value, list):
        return [_value(each, pl.String) for each in value]
    if kind == pl.String and isinstance(value, str):
        value.encode()  # half a character: a ValueError too
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63
    if kind == pl.Float64 and is_number:
        return float(value)
    if kind == pl.Int64 and is_number and value == int(value):
        return int(value)
    raise ValueError(f"{value!r} is no {kind}")


def _listed(files: Sequence[Path]) -> str:
    return f"{files[0]}" if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


# --- Measuring -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One version's searches, as sums by user.

    Attributes:
        sums: float (n_users, measures + 1): of each of MEASURES over a user's searches, and their number.
    """

    sums: np.ndarray

    def __len__(self) -> int:
        return len(self.sums)

    @property
    def n_searches(self) -> int:
        return int(self.sums[:, -1].sum())

    def means(self) -> np.ndarray:
        """Of each measure over the searches, (measures,); nan without any."""
        return self.sums[:, :-1].sum(axis=0) / (self.n_searches or np.nan)

    def drawn(self, n_draws: int, rng: np.random.Generator) -> np.ndarray:
        """The means of so many draws of as many users with replacement, (n_draws, measures).

        Many users have the same sums: how often each kind of them comes is one multinomial draw, so a million
        users cost no more than their kinds.
        """
        kinds, times = np.unique(self.sums.round(9), axis=0, return_counts=True)
        parts = []
        for start in range(0, n_draws, DRAWS_AT_ONCE):
            n = min(DRAWS_AT_ONCE, n_draws - start)
            sums = rng.multinomial(len(self), times / len(self), size=n) @ kinds
            parts.append(sums[:, :-1] / sums[:, -1:])
        return np.concatenate(parts)


def compared(searches: pl.DataFrame, config: EvaluateConfig) -> dict[str, Any]:
    """One comparison's figures.

    Args:
        searches: as `judged` gives them, of one split.

    Returns:
        live, compared (versions), share; first and last (ISO 8601, of the searches); arms: {"live": ...,
        "compared": ...}, each users, searches, and an estimate of each of MEASURES (mean, low, high);
        difference: compared minus live, the same. low and high are null where one has fewer than MIN_USERS
        users, and an estimate where one has none. mismatch: {p, expected} of an uneven split, or null;
        verdict: {better: a version or null, more_users: a number or null, said}.
    """
    live, other, share = searches.select(SPLIT).row(0)
    arms = {
        name: _arm(searches.filter(pl.col("version") == version))
        for name, version in (("live", live), ("compared", other))
    }
    first, last = (_iso(moment) for moment in (searches["timestamp"].min(), searches["timestamp"].max()))
    found: dict[str, Any] = {"live": live, "compared": other, "share": share, "first": first, "last": last}
    enough = min(map(len, arms.values())) >= MIN_USERS
    rng = np.random.default_rng(config.seed)
    draws = {name: arm.drawn(config.n_draws, rng) for name, arm in arms.items()} if enough else {}
    found["arms"] = {
        name: {"users": len(arm), "searches": arm.n_searches} | _estimates(arm.means(), draws.get(name))
        for name, arm in arms.items()
    }
    apart = draws["compared"] - draws["live"] if enough else None
    found["difference"] = _estimates(arms["compared"].means() - arms["live"].means(), apart)
    found["mismatch"] = mismatch(len(arms["live"]), len(arms["compared"]), share)
    found["verdict"] = verdict(found, None if apart is None else apart.std(axis=0, ddof=1))
    return found


def judged(rows: pl.DataFrame, left_out: dict[str, int]) -> pl.DataFrame:
    """Each search of a comparison that was read, with MEASURES: version, SPLIT, user_id, timestamp.

    What a user replaced within TYPING without opening anything was typed on, not read. Users who were served
    by both versions of a comparison belong to neither. A search that another version answered than the one
    drawn for its user, as while that one was not there, says nothing about chance, so it is left out.

    Args:
        rows: as `read` gives them.
        left_out: gets the counts of what is not counted.
    """
    searches = rows.filter(pl.col("kind") == "search").sort("user_id", "timestamp", maintain_order=True)
    searches = searches.with_row_index("search")
    opens = _opened(searches, rows.filter(pl.col("kind") == "open"), left_out)
    by_search = (
        opens.sort("search", "opened_at", "rank")
        .group_by("search", maintain_order=True)
        .agg(n_opened=pl.col("document_id").n_unique(), rank=pl.col("rank").first())
    )
    searches = searches.join(by_search, on="search", how="left", maintain_order="left")
    gap = pl.col("timestamp").shift(-1).over("user_id") - pl.col("timestamp")
    n_shown = pl.max_horizontal(pl.col("document_ids").list.len(), 1)
    searches = searches.select(
        "version",
        "drawn",
        *SPLIT,
        "user_id",
        "timestamp",
        click_through=pl.col("n_opened").fill_null(0) / n_shown,
        mrr=(1 / pl.col("rank")).fill_null(0.0),
        abandoned=pl.col("rank").is_null().cast(pl.Float64),
        was_typing=((gap <= TYPING) & pl.col("rank").is_null()).fill_null(False),
    )
    is_split = pl.col("version").is_in(pl.concat_list("live", "compared"))
    is_split &= pl.col("share").is_between(0, 1, closed="none")
    of_split = searches.filter(is_split.fill_null(False))
    _count(left_out, "searches without a comparison", len(searches) - len(of_split))
    n_split = len(of_split)
    as_drawn = pl.col("drawn").is_null() | (pl.col("drawn") == pl.col("version"))
    of_split = of_split.filter(as_drawn).drop("drawn")
    _count(left_out, "searches that were served by another version than drawn", n_split - len(of_split))
    users = of_split.group_by(*SPLIT, "user_id").agg(n=pl.col("version").n_unique())
    in_both = users.filter(pl.col("n") > 1)
    _count(left_out, "users who were served by both versions", len(in_both))
    apart = of_split.join(in_both, on=[*SPLIT, "user_id"], how="anti", maintain_order="left")
    read = apart.filter(~pl.col("was_typing")).drop("was_typing")
    _count(left_out, "searches that were typed over", len(apart) - len(read))
    return read


def _opened(searches: pl.DataFrame, opens: pl.DataFrame, left_out: dict[str, int]) -> pl.DataFrame:
    """search, document_id, opened_at and rank, from 1, of each open of what a search showed: the last one of
    the same user, version and query before it.
    """
    same = ["user_id", "version", "query"]
    asked = searches.select("search", "timestamp", *same).sort("timestamp")
    opens = opens.select("document_id", "timestamp", *same, opened_at="timestamp").sort("timestamp")
    found = opens.join_asof(
        asked, on="timestamp", by=same, strategy="backward", check_sortedness=False
    ).drop_nulls("search")
    shown = searches.select("search", "document_ids").join(found, on="search", how="semi")
    places = shown.explode("document_ids").select(
        "search",
        document_id="document_ids",
        rank=pl.int_range(1, pl.len() + 1).over("search"),
    )
    best = places.group_by("search", "document_id").agg(pl.col("rank").min())  # two passages of one document
    among = found.join(best, on=["search", "document_id"], how="inner")
    # a search and its open may lie on both sides of a reload, so the split that an open names says nothing
    _count(left_out, "opens of what no search of the user had shown", len(opens) - len(among))
    return among.select("search", "document_id", "opened_at", "rank")


def _arm(searches: pl.DataFrame) -> Arm:
    sums = searches.group_by("user_id").agg(*(pl.col(name).sum() for name in MEASURES), n=pl.len())
    return Arm(sums.sort("user_id").drop("user_id").to_numpy().astype(np.float64))


def _estimates(means: np.ndarray, draws: np.ndarray | None) -> dict[str, Any]:
    """{measure: {mean, low, high}}: 95 % percentile intervals of the draws, null without draws; null where
    there is no mean.
    """
    none = np.full_like(means, np.nan)
    low, high = (none, none) if draws is None else np.percentile(draws, [2.5, 97.5], axis=0)
    figures = zip(MEASURES, means, low, high, strict=True)
    return {
        name: None if np.isnan(mean) else {"mean": number(mean), "low": _known(low), "high": _known(high)}
        for name, mean, low, high in figures
    }


def _known(value: float) -> float | None:
    return None if np.isnan(value) else number(value)


def mismatch(n_live: int, n_compared: int, share: float) -> dict[str, float] | None:
    """Whether the users are split otherwise than was wanted: a faulty split makes every figure doubtful.

    Returns:
        p, of a chi-square test, and expected: users of the compared version; None where chance explains it.
    """
    from scipy.stats import chisquare

    n = n_live + n_compared
    p = float(chisquare([n_live, n_compared], [n * (1 - share), n * share]).pvalue) if n else 1.0
    return {"p": p, "expected": round(n * share, 1)} if p < MISMATCH else None


def verdict(found: Mapping[str, Any], errors: np.ndarray | None) -> dict[str, Any]:
    """Which version is better by JUDGED_BY, or how many more users it would take to tell.

    Args:
        found: as `compared` makes it so far.
        errors: standard errors of the differences, (measures,); None: too few users.
    """
    n_live, n_compared = (found["arms"][name]["users"] for name in ("live", "compared"))
    if errors is None:
        few = f"too few users: {n_live:,} of {found['live']} and {n_compared:,} of {found['compared']}"
        return {"better": None, "more_users": None, "said": f"{few}, wanted at least {MIN_USERS} of each"}
    at, error = found["difference"][JUDGED_BY], errors[list(MEASURES).index(JUDGED_BY)]
    by = f"by {MEASURES[JUDGED_BY]}: {_signed(at)}"
    if at["low"] > 0 or at["high"] < 0:
        better = found["compared"] if at["low"] > 0 else found["live"]
        return {"better": better, "more_users": None, "said": f"version {better} is better, {by}"}
    n = n_live + n_compared
    times = (STANDARD_ERRORS * error / abs(at["mean"])) ** 2 if at["mean"] else np.inf
    if times > NEVER:
        return {"better": None, "more_users": None, "said": f"it cannot be told which is better, {by}; "
                f"not even {NEVER} times as many users would tell a difference so small"}  # fmt: skip
    more = max(1, int(np.ceil(n * (times - 1))))
    said = f"it cannot be told which is better, {by}; about {_two_figures(more):,} more users would tell a "
    return {"better": None, "more_users": more, "said": f"{said}difference of this size"}


def _two_figures(n: int) -> int:
    unit = 10 ** max(0, len(str(n)) - 2)
    return -(-n // unit) * unit


def _count(left_out: dict[str, int], why: str, n: int) -> None:
    left_out[why] = left_out.get(why, 0) + n


def _iso(micros: Any) -> str:
    return str(np.datetime_as_string(np.datetime64(int(micros), "us"), unit="s", timezone="UTC"))


# --- The table -----------------------------------------------------------------------------------------


def table(found: Mapping[str, Any]) -> str:
    """What the versions' users did, the difference, and what it says."""
    from tabulate import tabulate

    return "\n".join(
        [
            f"{found['first']} to {found['last']}, {found['share']:.1%} of the users compared",
            tabulate(
                list(_lines(found)),
                [
                    "",
                    f"{found['live']} (live)",
                    f"{found['compared']} (compared)",
                    "compared minus live (95 %)",
                ],
                disable_numparse=True,
                colalign=("left", "right", "right", "right"),
            ),
            *_said_of_mismatch(found),
            found["verdict"]["said"],
        ]
    )


def _lines(found: Mapping[str, Any]) -> Iterator[list[str]]:
    arms = [found["arms"][name] for name in ("live", "compared")]
    for name in ("users", "searches"):
        yield [name, *(f"{arm[name]:,}" for arm in arms), ""]
    for name, title in MEASURES.items():
        yield [title, *(_cell(arm[name]) for arm in arms), _signed(found["difference"][name])]


def _said_of_mismatch(found: Mapping[str, Any]) -> Iterator[str]:
    if found["mismatch"]:
        n = found["arms"]["compared"]["users"]
        yield (
            f"warning: {n:,} users were compared, wanted about {found['mismatch']['expected']:,.0f} "
            f"(p = {found['mismatch']['p']:.1g}): the split or the log is faulty, and the figures with it; "
            "look for errors of one version, or a changed key"
        )


def _cell(at: Mapping[str, float] | None, form: str = "{:.4f}") -> str:
    if at is None:
        return ""
    if at["low"] is None:
        return form.format(at["mean"])
    mean, low, high = (form.format(at[part]) for part in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def _signed(at: Mapping[str, float] | None) -> str:
    return _cell(at, "{:+.4f}")
