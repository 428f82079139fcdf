"""How an index is tuned to a recall contract: plain Python and NumPy over functions that ask an index.

Builds are tried on samples of the documents, and most of them dropped after the first (`halve`). On one index
`explore` finds, for each number of candidates, the fewest leaves whose recall's lower 95 % bound meets the
target; the cheapest of these is a matter of time, which `seconds_each` measures in turns.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from pipeline.exact import exact_scores, first_others, kth_scores, recall_at_k

CANDIDATES = (30, 50, 100, 200, 400, 800, 1600, 3200, 6400, 12_800)  # entries to rescore, beside k itself
KEPT = 3  # of so many builds one stays for the next round
MIN_SAMPLE = 5000  # rows; fewer make too few leaves to tell builds apart
GAIN = 0.005  # twice the leaves find less than this more: recall levels off
ALL_FOUND = 0.999  # better settings than this are of no use to a reader of the frontier
TURNS = 7  # of a timing
PENALTY_RATIO = 3.0  # how much dearer an error along a row is than one across it


@dataclasses.dataclass(frozen=True)
class Search:
    """What a request may choose: leaves to search, entries to rescore."""

    num_leaves_to_search: int
    num_reordering_candidates: int


@dataclasses.dataclass(frozen=True)
class Build:
    """What an index is built with; leaves as for all documents, also where it is a sample's."""

    num_leaves: int
    spill: float | None = None
    anisotropic_quantization_threshold: float | None = None
    quantize_reordering: str = "float32"


@dataclasses.dataclass(frozen=True)
class Queries:
    """Held-out queries of one span and kind.

    Attributes:
        rows: int32 (n,), rows of queries.npy.
        vectors: float32 (n, dim), unit length.
        own: int32 (n,), the document row to leave out of every answer, -1 for none.
    """

    rows: np.ndarray
    vectors: np.ndarray
    own: np.ndarray

    def part(self, at: slice | np.ndarray) -> "Queries":
        return Queries(self.rows[at], self.vectors[at], self.own[at])


@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers to n queries, best first: rows int32 (n, k), -1 where there is none; scores float32 (n, k)."""

    rows: np.ndarray
    scores: np.ndarray


Ask = Callable[[np.ndarray, int, Search], Answers]  # queries float32 (n, dim), k


@dataclasses.dataclass(frozen=True)
class Record:
    """Recall on dev queries at one setting: of the kind of queries that is served worst."""

    search: Search
    kind: str
    recall: float
    low: float  # lower end of the 95 % interval


@dataclasses.dataclass(frozen=True)
class Explored:
    """What was tried on one index.

    Attributes:
        tried: in the order of leaves, then candidates.
        met: for each number of candidates the fewest leaves that meet the target, fewest candidates first;
            empty where nothing does.
    """

    tried: tuple[Record, ...]
    met: tuple[Record, ...]

    def best(self) -> Record:
        """The highest lower bound; of equal ones the fewest leaves and candidates."""
        return max(self.tried, key=lambda record: (record.low, *_negative(record.search)))


@dataclasses.dataclass(frozen=True)
class Trial:
    """A build, tried on a sample.

    Attributes:
        recall: at its cheapest setting that meets the target, or at its best.
        queries_per_second: at that setting; None where nothing meets the target.
        memory_mib: estimated for all documents.
        fits: it is within index.memory_mib.
        kept: it was tried again on a larger sample, or was chosen.
    """

    build: Build
    n_rows: int
    recall: float
    queries_per_second: float | None
    memory_mib: float
    fits: bool = True
    kept: bool = False


class Judge:
    """Measures recall on queries of several kinds against exact search over float32 rows.

    A kind with so few queries that not even answers without a miss would prove the target is left out.

    Attributes:
        too_few: {kind: queries} of the kinds left out.
    """

    def __init__(
        self, rows: np.ndarray, by_kind: Mapping[str, Queries], k: int, target: float, progress: bool = False
    ) -> None:
        """
        Args:
            rows: float32 (n_rows, dim), may be memory-mapped.
            k: lowered to the rows that a query can find.
        """
        self.rows, self.target, self.k = rows, target, max(1, min(k, len(rows) - 1))
        counts = {kind: len(queries.rows) for kind, queries in by_kind.items()}
        self.too_few = {kind: n for kind, n in counts.items() if not can_prove(n, target)}
        self.by_kind = {kind: q for kind, q in by_kind.items() if kind not in self.too_few}
        watch = _shown if progress else iter
        self.kth = {
            kind: kth_scores(rows, queries.vectors, self.k, queries.own, watch)
            for kind, queries in self.by_kind.items()
        }

    def record(self, ask: Ask, search: Search) -> Record:
        """Recall@k at this setting, of the kind with the lowest bound."""
        records = []
        for kind, queries in self.by_kind.items():
            n_own = int((queries.own >= 0).any())  # the own document is asked for and left out
            answers = ask(queries.vectors, self.k + n_own, search)
            shares = self.recalls(kind, answers.rows)
            records.append(Record(search, kind, float(shares.mean()), lower_bound(shares)))
        return min(records, key=lambda record: record.low)

    def recalls(self, kind: str, found: np.ndarray) -> np.ndarray:
        """Share of the exact top k that was found, float64 (n,), a query each.

        Args:
            found: rows int (n, at least k), best first, -1 for none: of the first n queries of the kind.
                Their scores are computed again from the float32 rows.
        """
        queries = self.by_kind[kind].part(slice(len(found)))
        found = first_others(found, queries.own, self.k)
        scores = exact_scores(self.rows, queries.vectors, found)
        return recall_at_k(found, scores, self.kth[kind][: len(found)], self.k)

    def vectors(self, n: int) -> np.ndarray:
        """Queries to time with, all kinds in turn: float32 (at most n, dim)."""
        each = math.ceil(n / max(1, len(self.by_kind)))
        parts = [queries.vectors[:each] for queries in self.by_kind.values()]
        return np.concatenate(parts)[:n]


def _shown(starts: range) -> Iterable[int]:
    """The starts of the blocks, with a bar where there are more than a moment's worth of them."""
    return tqdm(starts, desc="index: exact answers", unit="block", disable=len(starts) < 3, leave=False)


def lower_bound(shares: np.ndarray) -> float:
    """Lower end of the 95 % interval of a mean of shares (Student's t).

    One miss is added, so that a handful of queries without a miss proves nothing: it takes about 60 of
    them for a bound of 0.95, as the rule of three has it.
    """
    from scipy import stats

    shares = np.append(shares, 0.0)
    error = stats.sem(shares) if len(shares) > 1 else 0.0
    if not error:  # nothing but misses
        return float(shares.mean())
    return float(max(0.0, stats.t.interval(0.95, len(shares) - 1, shares.mean(), error)[0]))


def can_prove(n_queries: int, target: float) -> bool:
    """Whether so many queries, all answered without a miss, would prove a recall."""
    return lower_bound(np.ones(n_queries)) >= target


def fewest(value: Callable[[int], float], target: float, most: int, first: int = 1) -> int | None:
    """The smallest of 1 to `most` whose value reaches the target, in about 2 log2(most) tries.

    None where none does.
    More leaves find more, so that what one number meets, the next meets too. Where twice the leaves hardly
    find more and the target is still far, all leaves would not do either: then the search ends there.

    Args:
        first: where to begin; any number does, one near the answer soonest.
    """
    low, high, before = 0, min(first, most), 0.0
    while (now := value(high)) < target:
        levels_off = now >= 0.5 and now - before < GAIN and now + 2 * (now - before) < target
        if high == most or levels_off:
            return None
        low, high, before = high, min(2 * high, most), now
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if value(middle) >= target else (middle, high)
    return high


def explore(
    measure: Callable[[Search], Record],
    target: float,
    *,
    leaves: Sequence[int],
    candidates: Sequence[int],
    upwards: bool = False,
) -> Explored:
    """Find the fewest leaves that meet the target, for more and more candidates, until more do not help.

    Args:
        measure: recall at a setting.
        leaves: one number, where it is given; else the least and the most.
        candidates: ascending.
        upwards: go on to settings beyond the target, for the frontier's sake.
    """
    tried: dict[Search, Record] = {}
    met: list[Record] = []

    def at(n_leaves: int, n_candidates: int) -> Record:
        search = Search(n_leaves, n_candidates)
        if search not in tried:
            tried[search] = measure(search)
        return tried[search]

    def fewest_leaves(n_candidates: int, near: int) -> int | None:
        if len(leaves) == 1:
            return leaves[0] if at(leaves[0], n_candidates).low >= target else None
        most = met[-1].search.num_leaves_to_search if met else leaves[-1]
        return fewest(lambda n: at(n, n_candidates).low, target, most, max(1, near // 2))

    ceiling, near = -1.0, 1
    for n_candidates in candidates:
        found = fewest_leaves(n_candidates, near)
        if found is not None:
            if met and found == met[-1].search.num_leaves_to_search:
                break  # no fewer leaves: more candidates only cost
            met.append(at(found, n_candidates))
            near = found
            if found == leaves[0]:
                break
        elif not met:
            before = ceiling
            ceiling = max(r.low for s, r in tried.items() if s.num_reordering_candidates == n_candidates)
            near = max(s.num_leaves_to_search for s in tried) // 4
            if ceiling - before < GAIN / 10:
                break  # more candidates find no more either
    last = max(search.num_reordering_candidates for search in tried)
    if not met and at(leaves[-1], last).low >= target:  # it had only seemed to level off
        met.append(at(leaves[-1], last))
    if met and upwards:
        _go_on(at, met, leaves, candidates)
    by_setting = sorted(tried.values(), key=lambda record: dataclasses.astuple(record.search))
    return Explored(tuple(by_setting), tuple(met))


def _go_on(
    at: Callable[[int, int], Record], met: Sequence[Record], leaves: Sequence[int], candidates: Sequence[int]
) -> None:
    """Try twice the leaves again and again, with the most candidates that mattered and with the next more."""
    last = met[-1].search.num_reordering_candidates
    for n_candidates in [n for n in candidates if n >= last][:2]:
        n_leaves, before = met[-1].search.num_leaves_to_search, 0.0
        while (now := at(n_leaves, n_candidates).recall) < ALL_FOUND and now - before > GAIN / 10:
            if n_leaves == leaves[-1]:
                break
            n_leaves, before = min(2 * n_leaves, leaves[-1]), now


def candidates_to_try(k: int, most: int) -> list[int]:
    """Ascending numbers of entries to rescore, from k on."""
    return [k, *(n for n in CANDIDATES if k < n <= most)]


def undominated(records: Sequence[Record]) -> list[Record]:
    """Those that none beats with as few leaves and candidates: only these are worth timing."""

    def beats(one: Record, other: Record) -> bool:
        a, b = one.search, other.search
        as_cheap = a.num_leaves_to_search <= b.num_leaves_to_search and (
            a.num_reordering_candidates <= b.num_reordering_candidates
        )
        return as_cheap and a != b and one.recall >= other.recall

    return [record for record in records if not any(beats(other, record) for other in records)]


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which (recall, queries a second) no other is above in one and not below in the other: indexes."""

    def is_better(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a != b and a[0] >= b[0] and a[1] >= b[1]

    return [i for i, point in enumerate(points) if not any(is_better(other, point) for other in points)]


def spread(numbers: Sequence[float], n: int) -> list[int]:
    """Indexes of at most n of ascending numbers: both ends, and those nearest to even steps between."""
    if len(numbers) <= n:
        return list(range(len(numbers)))
    steps = np.linspace(numbers[0], numbers[-1], n)
    return sorted({int(np.abs(np.asarray(numbers) - step).argmin()) for step in steps})


def seconds_each(
    calls: Sequence[Callable[[], int]],
    turns: int = TURNS,
    clock: Callable[[], float] = time.perf_counter,
    progress: str | None = None,
) -> list[float]:
    """Median seconds a query of several ways to ask, which take turns: a slow minute slows all of them alike.

    Args:
        calls: each asks, and says how many queries that were. A first turn of each is not counted.
        progress: title of a bar; None for none.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in tqdm(range(turns + 1), desc=progress, unit="turn", disable=progress is None, leave=False):
        for call, measured in zip(calls, seconds, strict=True):
            started = clock()
            n_queries = call()
            if turn:
                measured.append((clock() - started) / n_queries)
    return [float(np.median(measured)) for measured in seconds]


def halve(
    builds: Sequence[Build],
    sizes: Sequence[int],
    try_on: Callable[[Sequence[Build], int], Sequence[Trial]],
) -> tuple[Build, list[Trial]]:
    """Try all builds on a small sample, a third of them on the next, and so on: the winner, and every trial.

    Args:
        sizes: rows of the samples, ascending; the winner is the best of the last.
        try_on: builds and rows of a sample -> a trial each.
    """
    trials: list[Trial] = []
    for round_, size in enumerate(sizes):
        tried = sorted(try_on(builds, size), key=_worth, reverse=True)
        is_last = round_ == len(sizes) - 1
        n_kept = 1 if is_last else math.ceil(len(tried) / KEPT)
        trials += [dataclasses.replace(t, kept=i < n_kept) for i, t in enumerate(tried)]
        builds = [trial.build for trial in tried[:n_kept]]
    return builds[0], trials


def _worth(trial: Trial) -> tuple[bool, float, bool, float]:
    """Within the memory first; of these the fastest that meets the target; else the nearest to it."""
    memory = 0.0 if trial.fits else -trial.memory_mib
    if trial.queries_per_second is None:
        return trial.fits, memory, False, trial.recall
    return trial.fits, memory, True, trial.queries_per_second


def sample_sizes(n_rows: int, n_builds: int) -> list[int]:
    """Rows of the sample of each round: many builds are first tried on a third of the rows.

    Args:
        n_rows: of the last, largest sample.
    """
    first = n_rows // KEPT
    return [first, n_rows] if n_builds > KEPT and first >= MIN_SAMPLE else [n_rows]


def threshold_for(dim: int) -> float:
    """The anisotropic threshold for unit rows of this width.

    ScaNN weighs an error along a row (dim - 1) T^2 / (1 - T^2) times as much as one across it, so that one
    threshold means more the wider the rows are. The ratio is kept: 3, which is 0.088 for 384 dimensions.

    Source: Guo et al., Accelerating Large-Scale Inference with Anisotropic Vector Quantization, theorem 3.4;
    scann/utils/noise_shaping_utils.h, `ComputeParallelCostMultiplier`.
    """
    return round(math.sqrt(PENALTY_RATIO / (dim - 1 + PENALTY_RATIO)), 4)


def _negative(search: Search) -> tuple[int, int]:
    return -search.num_leaves_to_search, -search.num_reordering_candidates
