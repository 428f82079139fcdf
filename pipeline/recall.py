"""How much the index loses against exact search over the same vectors: recall@10 of its stored answers."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.artifacts import Index
from pipeline.bootstrap import bootstrap, estimate, number
from pipeline.config import EvaluateConfig
from pipeline.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    import pandas as pd

K = 10  # of recall@10
KINDS = ("document", "typed", "logged")  # of the queries that the index was asked
BLOCK_BYTES = 8 << 20  # of scores at once; sorting them takes about ten times that
TIE = 1e-6  # two float32 sums of 384 products of the same vectors differ by about 1e-7


def index_figures(
    config: EvaluateConfig,
    index: Index,
    queries: "pd.DataFrame",
    matrix: np.ndarray,
    vectors: np.ndarray,
) -> dict[str, Any]:
    """Recall@10 of the index's stored answers against exact search, and what it was built with.

    recall_at_10, interval and n_queries are those of documents asked as queries; with "_typed" and "_logged"
    behind them, of the other kinds.

    Args:
        matrix: float32 (n_documents, dim), the indexed vectors, memory-mapped.
        vectors: float32 (n_queries, dim), row by row those of `queries`.
    """
    settings = index.facts["settings"]
    if settings["k"] < K:
        raise ConfigError(f"index.k is {settings['k']}, but recall@{K} needs {K} answers; set index.k to {K}")
    found = read_found(index, queries, len(matrix))
    rng = np.random.default_rng(config.seed)
    shipped = found[found["shipped"]]
    chosen = {kind: sample(shipped, kind, config.n_queries, rng) for kind in KINDS}
    chosen["sweep"] = sample(found[~found["shipped"]], "document", config.n_queries, rng)
    needed = np.unique(np.concatenate(list(chosen.values()))).astype(np.int64)
    worst = tenth_best(matrix, np.asarray(vectors[needed]), queries, needed)
    measured = found[found["query"].isin(needed)].copy()
    measured["recall"], measured["error"] = recalls(matrix, vectors, queries, measured, worst)

    def over(rows: "pd.DataFrame", kind: str) -> dict[str, Any]:
        return mean_recall(rows[rows["query"].isin(chosen[kind])], config)

    answers = measured[measured["shipped"]]
    by_kind = {
        f"{name}{'' if kind == 'document' else f'_{kind}'}": value
        for kind in KINDS
        for name, value in over(answers, kind).items()
    }
    return {
        **by_kind,
        "target_recall": index.manifest["config"].get("target_recall"),
        "layer": index.facts["layer"],
        "settings": settings,
        "n_documents": len(matrix),
        "max_score_error": float(answers["error"].max()) if len(answers) else None,
        "sweep": [
            {"num_leaves_to_search": leaves, **over(rows, "sweep")} for leaves, rows in sweep_of(measured)
        ],
    }


def sweep_of(found: "pd.DataFrame") -> list[tuple[int, "pd.DataFrame"]]:
    """The answers at other settings than the shipped ones, by leaves searched."""
    sweep = found[~found["shipped"]]
    return [
        (int(leaves), sweep[sweep["num_leaves_to_search"] == leaves])
        for leaves in sorted(sweep["num_leaves_to_search"].unique())
    ]


def read_found(index: Index, queries: "pd.DataFrame", n_documents: int) -> "pd.DataFrame":
    """found.parquet with the kind of each query beside it, test queries only."""
    found = pq.read_table(index.path / "found.parquet").to_pandas()
    highest = {
        "query": (found["query"].max(), len(queries)),
        "document": (max((rows.max(initial=-1) for rows in found["document_rows"]), default=-1), n_documents),
    }
    for what, (row, n) in highest.items():
        if row >= n:
            raise ArtifactError(
                f"{index.path / 'found.parquet'} names {what} {row}, but the embeddings have {n}: "
                "run stage index again"
            )
    found["kind"] = queries["kind"].to_numpy()[found["query"]]
    return found[queries["span"].to_numpy()[found["query"]] == "test"]


def sample(found: "pd.DataFrame", kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """At most n of the queries of this kind that were answered, int64, sorted; a seeded draw."""
    queries = np.sort(found.loc[found["kind"] == kind, "query"].unique()).astype(np.int64)
    return queries if len(queries) <= n else np.sort(rng.choice(queries, n, replace=False))


def tenth_best(
    matrix: np.ndarray, vectors: np.ndarray, queries: "pd.DataFrame", needed: np.ndarray
) -> dict[int, float]:
    """{query: exact score of its tenth-best document, its own row left out}."""
    rows, scores = exact_search(matrix, vectors, K + 1)
    own = own_rows(queries)[needed]
    scores[rows == own[:, None]] = -np.inf
    ordered = -np.sort(-scores, axis=1)
    n_answers = np.isfinite(ordered).sum(axis=1).clip(max=K)  # fewer than ten in a tiny collection
    return {
        int(q): float(s[n - 1]) if n else np.inf for q, s, n in zip(needed, ordered, n_answers, strict=True)
    }


def own_rows(queries: "pd.DataFrame") -> np.ndarray:
    """The row that a query must not find, int64 (n_queries,): its own document, or -1 for what was typed."""
    return np.where(queries["kind"] == "document", queries["document_row"], -1).astype(np.int64)


def exact_search(matrix: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k highest dot products of each query, in no order, a block of documents at a time.

    Args:
        matrix: float32 (n_documents, dim), may be memory-mapped.
        queries: float32 (n_queries, dim).

    Returns:
        rows int64 and scores float32, both (n_queries, min(k, n_documents)).
    """
    k = min(k, len(matrix))
    rows = np.full((len(queries), k), -1, np.int64)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    size = max(k, BLOCK_BYTES // (4 * max(len(queries), 1)))
    for start in range(0, len(matrix), size):
        block = queries @ np.asarray(matrix[start : start + size]).T
        # After the first blocks few queries find anything better: only those are sorted again.
        better = np.flatnonzero(block.max(axis=1, initial=-np.inf) > scores.min(axis=1))
        both = np.concatenate([scores[better], block[better]], axis=1)
        numbers = np.arange(start, start + block.shape[1])[None, :].repeat(len(better), axis=0)
        both_rows = np.concatenate([rows[better], numbers], axis=1)
        best = np.argpartition(-both, k - 1, axis=1)[:, :k]
        scores[better] = np.take_along_axis(both, best, axis=1)
        rows[better] = np.take_along_axis(both_rows, best, axis=1)
    return rows, scores


def recalls(
    matrix: np.ndarray,
    vectors: np.ndarray,
    queries: "pd.DataFrame",
    found: "pd.DataFrame",
    worst: Mapping[int, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Recall@10 of each row of `found`, and how far its scores are from the exact ones at most."""
    own = own_rows(queries)
    recall, error = np.zeros(len(found)), np.zeros(len(found))
    columns = zip(found["query"], found["document_rows"], found["scores"], strict=True)
    for i, (query, rows, scores) in enumerate(columns):
        kept = np.flatnonzero((rows != own[query]) & (rows >= 0))[:K]
        exact = matrix[rows[kept]] @ vectors[query]
        wanted = min(K, len(matrix) - (own[query] >= 0))
        recall[i] = recall_at_k(rows[kept], exact, worst[query], wanted)
        error[i] = np.abs(exact - scores[kept]).max(initial=0.0)
    return recall, error


def recall_at_k(rows: np.ndarray, scores: np.ndarray, worst: float, k: int) -> float:
    """Share of the exact top k that was returned; a document as near as the k-th counts as one of them.

    By ids alone an index would be blamed for returning the other of two documents with the same text.

    Args:
        rows: the documents returned; one returned twice counts once.
        scores: their exact scores.
        worst: the exact score of the k-th best document.

    Returns:
        0.0 to 1.0, no unit; 1.0 where there is nothing to find.

    Source: ann-benchmarks ann_benchmarks/plotting/metrics.py, `knn` (a threshold on the distance).
    """
    right = np.unique(rows[scores >= worst - TIE])
    return min(len(right), k) / k if k else 1.0


def mean_recall(rows: "pd.DataFrame", config: EvaluateConfig) -> dict[str, Any]:
    """Mean over queries and its 95 % interval by a bootstrap over them; null without queries."""
    if not len(rows):
        return {"recall_at_10": None, "interval": None, "n_queries": 0}
    recall = rows["recall"].to_numpy()
    mean, low, high = bootstrap(recall[:, None], np.arange(len(recall)), config.n_draws, config.seed)
    interval = {end: value for end, value in estimate(mean[0], low[0], high[0]).items() if end != "mean"}
    return {"recall_at_10": number(mean[0]), "interval": interval, "n_queries": len(rows)}
