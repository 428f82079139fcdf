"""How often the document that a reader opened next is among the first n that a system finds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.bootstrap import bootstrap, estimate, number
from pipeline.config import EvaluateConfig

if TYPE_CHECKING:
    import pandas as pd

CUTOFFS = (1, 5, 20, 100)
MEASURES = {  # what a positive at rank 1, 2, ... counts; behind the last rank it counts nothing
    **{f"accuracy_at_{k}": np.ones(k) for k in CUTOFFS},
    "mrr_at_10": 1 / np.arange(1, 11),  # reciprocal rank
    "ndcg_at_10": 1 / np.log2(np.arange(2, 12)),  # one positive a pair, so the best there can be is 1
}
BANDS = ("head", "middle", "tail", "never")  # of documents, by how many training pairs lead to them
SYSTEMS = ("tuned", "untuned", "bm25")
BLOCK_BYTES = 64 << 20  # of scores at once: 320 queries against a pool of 50,000

NEVER = 1 << 40  # documents before one that is not found at all: more than any k

Scores = Callable[[np.ndarray], np.ndarray]  # query rows (b,) -> float32 (b, n_pool), higher is nearer


def absent(has_log: bool) -> dict[str, Any]:
    """The retrieval figures of a run without held-out sessions: null, and why."""
    reason = (
        "no session of the test span has two documents"
        if has_log
        else "there is no event log, so there are no sessions to hold out"
    )
    differences = {f"tuned_minus_{name}_at_20": None for name in ("untuned", "bm25")}
    return {"n_pairs": 0, "reason": reason, **dict.fromkeys(SYSTEMS), **differences}


def dot_scores(queries: np.ndarray, documents: np.ndarray) -> Scores:
    """Scores by dot product: float32 (n_queries, dim) against float32 (n_pool, dim)."""
    return lambda rows: np.asarray(queries[rows]) @ documents.T


@dataclass(frozen=True)
class Placed:
    """Where a system puts each pair's positive: documents scored higher, others scored the same."""

    higher: np.ndarray
    tied: np.ndarray

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


def place(score: Scores, held_out: "pd.DataFrame", n_pool: int, needs_a_match: bool = False) -> Placed:
    """Rank every positive over the pool, the anchor's own document left out; a block of queries at a time.

    Args:
        needs_a_match: a positive with score 0 is not found at all (BM25: no word in common), whatever
            the length of the list.
    """
    higher = np.full(len(held_out), NEVER, np.int64)
    tied = np.zeros(len(held_out), np.int64)
    pairs_of = held_out.groupby("query").indices
    own, positive = held_out["own"].to_numpy(), held_out["positive"].to_numpy()
    queries = np.fromiter(pairs_of, np.int64)
    size = max(1, BLOCK_BYTES // (4 * n_pool))
    for start in range(0, len(queries), size):
        block = queries[start : start + size]
        for query, scores in zip(block, score(block), strict=True):
            rows = pairs_of[query]
            if own[rows[0]] >= 0:
                scores[own[rows[0]]] = -np.inf
            reached = scores[positive[rows]]
            if needs_a_match:
                rows, reached = rows[reached > 0], reached[reached > 0]
            ordered = np.sort(scores)
            first_same = np.searchsorted(ordered, reached, "left")
            first_higher = np.searchsorted(ordered, reached, "right")
            higher[rows] = n_pool - first_higher
            tied[rows] = first_higher - first_same - 1
    return Placed(higher, tied)


def place_all(systems: Mapping[str, Scores], held_out: "pd.DataFrame", n_pool: int) -> dict[str, Placed]:
    """`place` for every system; of BM25 a match is asked, the models' dot products are all answers."""
    return {
        name: place(score, held_out, n_pool, needs_a_match=name == "bm25") for name, score in systems.items()
    }


def retrieval_figures(
    config: EvaluateConfig, held_out: "pd.DataFrame", placed: Mapping[str, Placed]
) -> dict[str, Any]:
    """Accuracies with intervals over all test pairs, over those never seen in training, and by popularity."""
    unseen = ~held_out["seen"].to_numpy()
    band = bands(held_out["readings"].to_numpy())
    figures = {"reason": None} | (accuracies(config, held_out, placed) or {})
    return figures | {
        "unseen": accuracies(config, held_out, placed, unseen),
        "by_popularity": {
            name: accuracies(config, held_out, placed, band == number) for number, name in enumerate(BANDS)
        },
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


def accuracies(
    config: EvaluateConfig,
    held_out: "pd.DataFrame",
    placed: Mapping[str, Placed],
    only: np.ndarray | slice = slice(None),
) -> dict[str, Any] | None:
    """MEASURES of every system: share of pairs with the positive among the first 1, 5, ..., and mean gains.

    The tuned system's lead is at 20. Intervals are 95 %, by one bootstrap over readers for all figures, so
    that differences are paired: a reader's pairs come and go together, because they are not independent.

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
    others = [name for name in names if name != "tuned"]
    differences = [hits["tuned"][:, at_20] - hits[name][:, at_20] for name in others]
    values = np.concatenate([*hits.values(), np.stack(differences, axis=1)], axis=1)
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
    for column, name in enumerate(others, start=len(names) * len(MEASURES)):
        difference = estimate(mean[column], low[column], high[column], lowest=-1.0)
        figures[f"tuned_minus_{name}_at_20"] = difference
    return figures
