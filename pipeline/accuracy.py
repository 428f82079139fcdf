"""How often what a reader opened next, or what answered a query, is among the first n that a system finds."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.bootstrap import bootstrap, estimate, number
from pipeline.config import EvaluateConfig
from pipeline.folding import holds, normal

if TYPE_CHECKING:
    import pandas as pd

CUTOFFS = (1, 5, 20, 100)
MEASURES = {  # what a positive at rank 1, 2, ... counts; behind the last rank it counts nothing
    **{f"accuracy_at_{k}": np.ones(k) for k in CUTOFFS},
    "mrr_at_10": 1 / np.arange(1, 11),  # reciprocal rank
    "ndcg_at_10": 1 / np.log2(np.arange(2, 12)),  # one positive a pair, so the best there can be is 1
}
BANDS = ("head", "middle", "tail", "never")  # of documents, by how many training pairs lead to them
LENGTHS = ("short", "middle", "long")  # of queries, by characters
MAX_LANGUAGES = 12
OTHER = "other"  # the rarest languages together
MEASURED = ("tuned", "untuned", "bm25")  # in every run that has held-out pairs
LEXICAL = "bm25"
DIFFERENCES = (  # at 20: how far the first is ahead of the second, where both are compared
    ("tuned", "untuned"),
    ("tuned", "published"),
    ("tuned", "bm25"),
    ("rrf", "tuned"),
    ("weighted", "tuned"),
)
BLOCK_BYTES = 32 << 20  # of one system's scores at once: 160 queries against a pool of 50,000

NEVER = 1 << 40  # documents before one that is not found at all: more than any k

Scores = Callable[[np.ndarray], np.ndarray]  # query rows (b,) -> float32 (b, n_pool), higher is nearer
# Query rows (b,) and the column of each one's own document (b,), -1 for none -> the systems one by one:
# (name, float (b, n_pool)), -inf where a document is not found or is the query's own.
Systems = Callable[[np.ndarray, np.ndarray], Iterator[tuple[str, np.ndarray]]]


def absent(has_log: bool) -> dict[str, Any]:
    """The retrieval figures of a run without held-out sessions or queries: null, and why."""
    reason = (
        "no session of the test span has two documents"
        if has_log
        else "there is no event log, so there are no sessions to hold out"
    )
    differences = {f"tuned_minus_{name}_at_20": None for name in ("untuned", "bm25")}
    further = dict.fromkeys(("asked", "hybrid", "logged", "answers"))
    return {"n_pairs": 0, "reason": reason, **dict.fromkeys(MEASURED), **differences, **further}


@dataclass(frozen=True)
class Pool:
    """The documents that every compared system searches.

    Attributes:
        rows: the first row of each in documents.parquet, int32 (n_pool,), ascending.
        n_rows: how many rows each has: its passages, or 1; int32 (n_pool,).
    """

    rows: np.ndarray
    n_rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def all_rows(self) -> np.ndarray:
        """Every row of every document, one document after the other, int64 (n_pool_rows,)."""
        within = np.arange(self.n_rows.sum()) - np.repeat(self.starts, self.n_rows)
        return np.repeat(self.rows.astype(np.int64), self.n_rows) + within

    @property
    def starts(self) -> np.ndarray:
        """Where each document begins among `all_rows`, int64 (n_pool,)."""
        return np.cumsum(self.n_rows, dtype=np.int64) - self.n_rows


def dot_scores(
    queries: np.ndarray,
    documents: np.ndarray,
    starts: np.ndarray | None = None,
    rows: np.ndarray | None = None,
) -> Scores:
    """Scores by dot product; of a document in several rows, the best one's.

    Rows are gone through a block at a time: of long documents there are far more than of documents, and
    neither they nor their scores need be held at once.

    Args:
        queries: float32 (n_queries, dim).
        documents: float32 (n, dim), memory-mapped or not.
        starts: where each document begins among its rows, int64 (n_pool,); None: each has one row.
        rows: which of `documents` are meant, one document's after the other's, int64 (n_rows,); None: all.
    """
    n_rows = len(documents if rows is None else rows)
    starts = np.arange(n_rows) if starts is None else starts

    def scored(asked: np.ndarray) -> np.ndarray:
        vectors = np.asarray(queries[asked])
        best = np.full((len(asked), len(starts)), -np.inf, np.result_type(queries, documents))
        size = max(1, BLOCK_BYTES // (4 * max(vectors.shape)))
        for begin in range(0, n_rows, size):
            end = min(begin + size, n_rows)
            of_rows = vectors @ documents[slice(begin, end) if rows is None else rows[begin:end]].T
            # The block's first document may go on from the block before.
            first, last = np.searchsorted(starts, [begin, end - 1], "right")
            here, starts_here = best[:, first - 1 : last], starts[first - 1 : last]
            if len(starts_here) < end - begin:
                of_rows = np.maximum.reduceat(of_rows, np.maximum(starts_here - begin, 0), axis=1)
            np.maximum(here, of_rows, out=here)
        return best

    return scored


def compared(scores: Mapping[str, Scores]) -> Systems:
    """Systems that answer under one rule: the query's own document is left out for every one of them.

    Of BM25 a match is asked: a document with score 0 shares no word and is not found, however long the
    list. Models find every document.
    """

    def scored(queries: np.ndarray, own: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        has_own = np.flatnonzero(own >= 0)
        for name, score in scores.items():
            block = score(queries)
            if name == LEXICAL:
                block[block == 0] = -np.inf
            block[has_own, own[has_own]] = -np.inf
            yield name, block

    return scored


@dataclass(frozen=True)
class Placed:
    """Where a system puts each pair's positive: documents scored higher, others scored the same."""

    higher: np.ndarray
    tied: np.ndarray

    @classmethod
    def nowhere(cls, n_pairs: int) -> "Placed":
        return cls(np.full(n_pairs, NEVER, np.int64), np.zeros(n_pairs, np.int64))

    def expected(self, gains: np.ndarray) -> np.ndarray:
        """What each positive's rank counts, on average over all orders of the ties; float (n_pairs,).

        A system that scores many documents alike gains nothing from their order in the file, and loses
        nothing by it.

        Args:
            gains: of the ranks 1, 2, ...; ones for the chance to be among the first len(gains).
        """
        total = np.concatenate([[0.0], np.cumsum(gains)])
        first, last = np.minimum(self.higher, len(gains)), np.minimum(self.higher + self.tied + 1, len(gains))
        return (total[last] - total[first]) / (self.tied + 1)


def place(systems: Systems, held_out: "pd.DataFrame", n_pool: int) -> dict[str, Placed]:
    """Rank every pair's positive over the pool by every system, a block of queries at a time.

    Args:
        held_out: columns query, own and positive, as in `evaluate.read_askable`.
    """
    placed: dict[str, Placed] = {}
    pairs_of = held_out.groupby("query").indices
    own, positive = held_out["own"].to_numpy(), held_out["positive"].to_numpy()
    queries = np.fromiter(pairs_of, np.int64)
    own_of = np.array([own[rows[0]] for rows in pairs_of.values()], np.int64)
    for block in blocks(len(queries), n_pool):
        for name, scores in systems(queries[block], own_of[block]):
            at = placed.setdefault(name, Placed.nowhere(len(held_out)))
            for query, line in zip(queries[block], scores, strict=True):
                for pair in pairs_of[query]:
                    reached = line[positive[pair]]
                    if reached > -np.inf:
                        at.higher[pair] = np.count_nonzero(line > reached)
                        at.tied[pair] = np.count_nonzero(line == reached) - 1
    return placed


def blocks(n_queries: int, n_pool: int) -> Iterator[slice]:
    """Queries so few at a time that a system's scores of them take BLOCK_BYTES."""
    size = max(1, BLOCK_BYTES // (4 * n_pool))
    return (slice(start, start + size) for start in range(0, n_queries, size))


def retrieval_figures(
    config: EvaluateConfig, held_out: "pd.DataFrame", placed: Mapping[str, Placed]
) -> dict[str, Any]:
    """Accuracies with intervals over all pairs, over those never seen in training, and by group.

    Args:
        held_out: also columns user_id, session_id, seen, readings, language and length.
    """

    def over(only: np.ndarray) -> dict[str, Any] | None:
        return accuracies(config, held_out, placed, only)

    band, limits = bands(held_out["readings"].to_numpy()), thirds(held_out["length"].to_numpy())
    third = np.searchsorted(limits, held_out["length"])
    language = languages(held_out["language"].tolist())
    return {
        "reason": None,
        **(accuracies(config, held_out, placed) or {}),
        "unseen": over(~held_out["seen"].to_numpy()),
        "by_popularity": {name: over(band == i) for i, name in enumerate(BANDS)},
        "by_language": {name: over(language == name) for name in dict.fromkeys(language.tolist())},
        "by_query_length": {name: over(third == i) for i, name in enumerate(LENGTHS)},
        "query_lengths": limits,
    }


def bands(readings: np.ndarray) -> np.ndarray:
    """Places in BANDS: thirds of the pairs by how popular their positive is, and those it is new to.

    Args:
        readings: int (n_pairs,), training pairs that lead to each pair's positive; 0 is the band "never".

    Returns:
        int (n_pairs,); pairs with equally popular positives are in one band.
    """
    read = np.sort(readings[readings > 0])[::-1]
    if not len(read):
        return np.full(len(readings), BANDS.index("never"))
    head, middle = read[(len(read) - 1) // 3], read[(len(read) - 1) * 2 // 3]
    return np.select([readings == 0, readings >= head, readings >= middle], [3, 0, 1], default=2)


def thirds(lengths: np.ndarray) -> list[int]:
    """The longest length of the first and of the second third of the pairs; equal lengths stay together."""
    ordered = np.sort(lengths)
    return [int(ordered[(len(ordered) - 1) // 3]), int(ordered[(len(ordered) - 1) * 2 // 3])]


def languages(names: Sequence[str]) -> np.ndarray:
    """Each pair's language, at most MAX_LANGUAGES different ones: the rarest become "other".

    Returns:
        object (n_pairs,) of str.
    """
    counted = sorted(Counter(names).items(), key=lambda item: (-item[1], item[0]))
    fits = len(counted) <= MAX_LANGUAGES
    kept = {name for name, _ in (counted if fits else counted[: MAX_LANGUAGES - 1])}
    return np.array([name if name in kept else OTHER for name in names], object)


def script_of(text: str) -> str:
    """The script that most of a text's letters are of, by Unicode's name; "Common" without letters.

    Japanese is written in three scripts: Han beside Kana counts as "Japanese", Han alone as "Han".
    """
    from fontTools import unicodedata as scripts  # the standard library does not know scripts

    counted = Counter(scripts.script(letter) for letter in text)
    kana = counted.pop("Hira", 0) + counted.pop("Kana", 0)
    if kana:
        counted["Japanese"] = kana + counted.pop("Hani", 0)
    for code in ("Zyyy", "Zinh", "Zzzz"):  # digits and signs, marks of any script, unknown
        counted.pop(code, 0)
    if not counted:
        return "Common"
    code, _ = min(counted.items(), key=lambda item: (-item[1], item[0]))
    return code if code == "Japanese" else scripts.script_name(code)


def accuracies(
    config: EvaluateConfig,
    held_out: "pd.DataFrame",
    placed: Mapping[str, Placed],
    only: np.ndarray | slice = slice(None),
) -> dict[str, Any] | None:
    """MEASURES of every system: share of pairs with the positive among the first 1, 5, ..., and mean gains.

    DIFFERENCES are at 20. Intervals are 95 %, by one bootstrap over readers for all figures, so that
    differences are paired: a reader's pairs come and go together, because they are not independent.

    Args:
        only: which of the pairs, bool (n_pairs,).

    Returns:
        None where there is no pair.
    """
    hits = {
        name: np.stack([at.expected(gains) for gains in MEASURES.values()], axis=1)[only]
        for name, at in placed.items()
    }
    held_out = held_out[only]
    if held_out.empty:
        return None
    names = list(hits)
    at_20 = list(MEASURES).index("accuracy_at_20")
    differences = [(one, other) for one, other in DIFFERENCES if one in hits and other in hits]
    ahead = [hits[one][:, [at_20]] - hits[other][:, [at_20]] for one, other in differences]
    values = np.concatenate([*hits.values(), *ahead], axis=1)
    readers = np.unique(held_out["user_id"].to_numpy(str), return_inverse=True)[1]
    mean, low, high = bootstrap(values, readers, config.n_draws, config.seed)
    figures: dict[str, Any] = {
        "n_pairs": len(held_out),
        "n_readers": int(readers.max()) + 1,
        "n_sessions": int(held_out["session_id"].nunique()),
        "n_queries": int(held_out["query"].nunique()),
    }
    figures |= {name: {} for name in names} | {"intervals": {}}
    for column, (name, measure) in enumerate((name, measure) for name in names for measure in MEASURES):
        figures[name][measure] = number(mean[column])
        key = f"{name}_{measure.removeprefix('accuracy_')}"
        figures["intervals"][key] = estimate(mean[column], low[column], high[column])
    for column, (one, other) in enumerate(differences, start=len(names) * len(MEASURES)):
        difference = estimate(mean[column], low[column], high[column], lowest=-1.0)
        figures[f"{one}_minus_{other}_at_20"] = difference
    return figures


def answer_figures(
    systems: Systems, answers: Mapping[int, Sequence[str]], texts: Sequence[str]
) -> dict[str, Any] | None:
    """Share of the queries of which one of the first k documents contains an answer, by system.

    Args:
        answers: {query row: what counts as an answer}.
        texts: of the pool.

    Returns:
        None where no query has an answer.
    """
    wanted = {row: {normal(answer) for answer in given} - {""} for row, given in answers.items()}
    queries = np.array([row for row, given in wanted.items() if given], np.int64)
    if not len(queries):
        return None
    hits: dict[str, np.ndarray] = {}
    for block in blocks(len(queries), len(texts)):
        for name, scores in systems(queries[block], np.full(len(queries[block]), -1)):
            total = hits.setdefault(name, np.zeros(len(CUTOFFS)))
            for query, line in zip(queries[block], scores, strict=True):
                first = contenders(line, max(CUTOFFS))
                right = [any(holds(normal(texts[c]), given) for given in wanted[query]) for c in first]
                total += chances(line[first], np.array(right, bool))
    means = {
        name: {f"accuracy_at_{k}": number(share) for k, share in zip(CUTOFFS, of / len(queries), strict=True)}
        for name, of in hits.items()
    }
    return {"n_queries": len(queries), **means}


def contenders(line: np.ndarray, n: int) -> np.ndarray:
    """Columns of the n best scores and of all that tie with the last of them; what is not found left out."""
    found = np.flatnonzero(line > -np.inf)
    if len(found) <= n:
        return found
    scores = line[found]  # few of the pool for BM25: partitioning masses of -inf takes longest of all
    return found[scores >= np.partition(scores, -n)[-n]]


def chances(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Chance of at least one right document among the first k, for CUTOFFS, over all orders of the ties."""
    from scipy.stats import hypergeom

    if not right.any():
        return np.zeros(len(CUTOFFS))
    best = scores[right].max()
    higher, tied = np.count_nonzero(scores > best), np.count_nonzero(scores == best)
    drawn = np.clip(np.array(CUTOFFS) - higher, 0, tied)
    return hypergeom.sf(0, tied, np.count_nonzero(right & (scores == best)), drawn)
