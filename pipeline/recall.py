"""How much the index loses against exact search over the same vectors, and whether that keeps its contract.

The contract is recall@k of every kind of queries on test queries, k being index.k, and the latency and the
memory that the index was told to keep to. It is proved by at least LEAST_QUERIES test queries, or by an index
that searches float32 rows exactly. One exact search serves all of it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.accuracy import BANDS, OTHER, bands, languages
from pipeline.artifacts import Index
from pipeline.bootstrap import bootstrap, estimate, number
from pipeline.config import EvaluateConfig
from pipeline.errors import ArtifactError
from pipeline.exact import exact_scores, exact_search, first_others, recall_at_k

if TYPE_CHECKING:
    import pandas as pd

K = 10  # of recall@10, which every index is measured by beside its own k
KINDS = {  # of the queries that the index was asked, as a sentence calls them
    "document": "documents asked as queries",
    "typed": "typed queries",
    "logged": "logged queries",
}
SETTINGS = ("num_leaves_to_search", "num_reordering_candidates")  # that a request may choose
SAID_OF_AN_INDEX = (
    "reason", "builds", "stored_recall", "batched_qps", "load_seconds", "bytes", "n_entries",
    "not_reproducible",
)  # fmt: skip
LEAST_QUERIES = 10  # test queries of one kind; the recall of fewer hangs on which few they are
BLOCK_ANSWERS = 1024  # rows of found.parquet at once: a thousand answers each are 8 MB of row numbers


@dataclass(frozen=True)
class Groups:
    """What queries are grouped by.

    Attributes:
        language_by: "language" (of the document that a query stands for) or "script" (of its text).
        languages: a name for each query, object (n_queries,) of str.
        readings: int (n_queries,), training readings of each query's document.
    """

    language_by: str
    languages: np.ndarray
    readings: np.ndarray


# Rows of queries.npy, and the document that each of them stands for -> their groups.
Grouping = Callable[[np.ndarray, np.ndarray], Groups]


def index_figures(
    config: EvaluateConfig,
    index: Index,
    queries: "pd.DataFrame",
    matrix: np.ndarray,
    vectors: np.ndarray,
    grouping: Grouping | None = None,
) -> dict[str, Any]:
    """Recall of the index's stored answers against exact search, its contract, and what it was built with.

    recall_at_10, interval and n_queries are those of documents asked as queries; with "_typed" and "_logged"
    behind them, of the other kinds. `contract`, `frontier`, `by_language` and `by_popularity` are at index.k.

    Args:
        matrix: float32 (n_documents, dim), the indexed vectors, memory-mapped.
        vectors: float32 (n_queries, dim), row by row those of `queries`.
        grouping: how queries are grouped; None: they are not.
    """
    settings = index.facts["settings"]
    asked = read_asked(index, queries)
    rng = np.random.default_rng(config.seed)
    chosen = [sample(asked[asked["shipped"]], kind, config.n_queries, rng) for kind in KINDS]
    needed = np.unique(np.concatenate(chosen)).astype(np.int64)
    measured = asked[asked["query"].isin(needed)]
    exact = nearest(matrix, vectors, queries, needed, max(K, settings["k"]))
    measured = with_recalls(index.path / "found.parquet", measured, matrix, vectors, exact, settings["k"])
    shipped = measured[measured["shipped"]]
    figures = {
        **recall_at_10(shipped, config),
        "target_recall": index.manifest["config"]["target_recall"],
        "layer": index.facts["layer"],
        "settings": settings,
        "n_documents": len(matrix),
        "max_score_error": float(shipped["error"].max()) if len(shipped) else None,
        "contract": contract(index, by_kind(shipped, config)),
        "frontier": frontier(index.facts.get("frontier") or [], measured, config),
        **grouped(shipped, exact, config, grouping),
        **{name: index.facts.get(name) for name in SAID_OF_AN_INDEX},
    }
    figures["contract"]["met"] = not shortfalls(figures, index.manifest["config"])
    return figures


# --- the contract -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shortfall:
    """A figure that is not what the contract says; `got` None: nobody measured it."""

    figure: str
    got: str | None
    wanted: str
    advice: str

    def __str__(self) -> str:
        got = "was not measured" if self.got is None else f"is {self.got}"
        return f"{self.figure} {got}, wanted {self.wanted}; {self.advice}"


def contract(index: Index, kinds: list[dict[str, Any]]) -> dict[str, Any]:
    """What the index is held to, and what it reaches for the kind of queries that it serves worst.

    Args:
        kinds: figures of `by_kind`.
    """
    config, facts = index.manifest["config"], index.facts
    requests = config.get("requests") or "single"
    latency = judged_latency(facts, requests)
    worst = min(kinds, key=lambda kind: kind["recall_at_k"], default={})
    return {
        "k": facts["settings"]["k"],
        "target_recall": config["target_recall"],
        "recall_at_k": worst.get("recall_at_k"),
        "kind": worst.get("name"),
        "interval": worst.get("interval"),
        "n_queries": worst.get("n_queries", 0),
        "proved": is_proved(facts, kinds),
        "kinds": kinds,
        "requests": requests,
        "target_latency_ms": config.get("target_latency_ms"),
        "latency_ms": None if latency is None else number(latency),
        "memory_mib": config.get("memory_mib"),
        "served_mib": facts.get("memory_mib"),
    }


def is_proved(facts: Mapping[str, Any], kinds: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the recall that was measured says anything of other queries.

    Exact search over float32 rows finds all there is, whoever asks. Else one kind of queries at least must be
    LEAST_QUERIES strong; a smaller one beside it is judged too, and proves nothing.

    Args:
        facts: those of the index.
        kinds: figures of `by_kind`.
    """
    is_truth = facts["layer"] == "exact" and facts["settings"].get("quantize_reordering") in (None, "float32")
    return is_truth or _most_queries(kinds) >= LEAST_QUERIES


def _most_queries(kinds: Sequence[Mapping[str, Any]]) -> int:
    return max((kind["n_queries"] for kind in kinds), default=0)


def judged_latency(facts: Mapping[str, Any], requests: str) -> float | None:
    """Milliseconds that index.target_latency_ms is held against; None where they were not measured.

    Args:
        facts: those of the index.
        requests: "single": the p95 of single queries; "batched": the time of a batch, a query.
    """
    if requests == "batched":
        rate = facts.get("batched_qps")
        return 1000 / rate if rate else None
    return (facts.get("latency_ms") or {}).get("p95")


def shortfalls(index: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[Shortfall]:
    """Where an index is below its contract, or was not measured where the contract names a figure.

    recall@10 counts beside recall@k, but not where fewer than ten answers are what is asked for.

    Args:
        index: the figures of `index_figures`.
        wanted: k, target_recall, target_latency_ms and memory_mib, as in the config.
    """
    reached = index.get("contract") or {}
    k, target = wanted.get("k", K), wanted["target_recall"]
    recalls = []
    if k >= K:
        names = {kind: f"recall_at_10{suffix(kind)}" for kind in KINDS}
        recalls += [(kind, f"index.{name}", index.get(name)) for kind, name in names.items()]
    if k != K:
        kinds = {kind["name"]: kind["recall_at_k"] for kind in reached.get("kinds") or []}
        recalls += [(kind, f"recall@{k} of {words}", kinds.get(kind)) for kind, words in KINDS.items()]
    return [
        *_of_recall(recalls, target),
        *_of_proof(reached),
        *_at_most(
            "index.contract.latency_ms",
            reached.get("latency_ms"),
            "index.target_latency_ms",
            wanted.get("target_latency_ms"),
            "allow more index.memory_mib, lower index.target_recall, or serve it on a faster machine",
        ),
        *_at_most(
            "index.contract.served_mib",
            reached.get("served_mib"),
            "index.memory_mib",
            wanted.get("memory_mib"),
            "set index.quantize_reordering to int8 or index.spill to null, or widen dimensions_per_block",
        ),
    ]


def _of_recall(recalls: Sequence[tuple[str, str, float | None]], target: float) -> Iterator[Shortfall]:
    """Of recalls as (kind, name of the figure, value)."""
    wanted = f"index.target_recall = {target}"
    for kind, name, recall in recalls:
        if recall is not None and recall < target:
            yield Shortfall(
                name,
                f"{recall:.4f}",
                wanted,
                "search more leaves or rescore more candidates (auto tunes both), or store rows as float32",
            )
        elif recall is None and kind == "document":  # the other kinds need not be there
            yield Shortfall(name, None, wanted, "there are no held-out queries: run stages encode and index")


def _of_proof(contract: Mapping[str, Any]) -> Iterator[Shortfall]:
    """Too few test queries; where there are none, that recall was not measured says it."""
    if contract.get("proved") is not False:
        return
    n_queries = _most_queries(contract["kinds"])
    if n_queries:
        yield Shortfall(
            "the number of test queries",
            f"{n_queries}",
            f"at least {LEAST_QUERIES} of one kind to prove index.target_recall",
            "hold out more (a longer log, a larger pairs.holdout_share, no lower evaluate.n_queries), or "
            "raise index.exact_below above the number of documents: exact search needs no proof",
        )


def _at_most(
    name: str, got: float | None, setting: str, wanted: float | None, advice: str
) -> Iterator[Shortfall]:
    if wanted is None:
        return
    limit = f"at most {setting} = {wanted:g}"
    if got is None:
        yield Shortfall(name, None, limit, "run stage index --force")
    elif got > wanted:
        yield Shortfall(name, f"{got:.4g}" if got < 1000 else f"{got:.0f}", limit, advice)


def suffix(kind: str) -> str:
    """What stands behind a figure's name for the other kinds of queries than documents."""
    return "" if kind == "document" else f"_{kind}"


# --- means over queries -----------------------------------------------------------------------------------


def recall_at_10(shipped: "pd.DataFrame", config: EvaluateConfig) -> dict[str, Any]:
    """recall_at_10, interval and n_queries of each kind of queries, null and 0 where there are none."""
    figures: dict[str, Any] = {}
    for kind in KINDS:
        of = mean_recall(shipped.loc[shipped["kind"] == kind, "recall_at_10"].to_numpy(), config, "10")
        figures |= {f"{name}{suffix(kind)}": value for name, value in of.items()}
    return figures


def by_kind(rows: "pd.DataFrame", config: EvaluateConfig) -> list[dict[str, Any]]:
    """Recall@k of each kind of queries that was asked: [{name, recall_at_k, interval, n_queries}]."""
    return by_group(rows["kind"].to_numpy(), rows["recall_at_k"].to_numpy(), config, [*KINDS])


def by_group(
    names: Sequence[str] | np.ndarray, recalls: np.ndarray, config: EvaluateConfig, order: Sequence[str]
) -> list[dict[str, Any]]:
    """Recall@k of each group that has queries, in this order."""
    names = np.asarray(names, object)
    return [
        {"name": name, **mean_recall(recalls[names == name], config)}
        for name in order
        if (names == name).any()
    ]


def grouped(
    shipped: "pd.DataFrame", exact: "Nearest", config: EvaluateConfig, grouping: Grouping | None
) -> dict[str, Any]:
    """Recall@k by language and by popularity of the document that a query stands for; all kinds together."""
    if grouping is None or shipped.empty:
        return {"language_by": None, "by_language": [], "by_popularity": []}
    asked = shipped["query"].to_numpy()
    of = grouping(asked, exact.stands_for[exact.places(asked)])
    recalls, names = shipped["recall_at_k"].to_numpy(), languages(of.languages.tolist())
    counted = Counter(names.tolist())
    by_frequency = sorted(counted, key=lambda name: (name == OTHER, -counted[name], name))
    popularity = np.array(BANDS, object)[bands(of.readings)]
    return {
        "language_by": of.language_by,
        "by_language": by_group(names, recalls, config, by_frequency),
        "by_popularity": by_group(popularity, recalls, config, BANDS),
    }


def frontier(
    points: Sequence[Mapping[str, Any]], measured: "pd.DataFrame", config: EvaluateConfig
) -> list[dict[str, Any]]:
    """The settings that tuning kept, each with the recall of the kind of test queries it serves worst.

    Args:
        points: facts.frontier of the index.
        measured: its answers with their recall; those at other settings than the shipped ones too.
    """
    found = []
    for point in points:
        here = measured["shipped"] == point["shipped"]
        if not point["shipped"]:
            for name in SETTINGS:
                here &= measured[name] == (point[name] or 0)
        nobody = {"name": None, "recall_at_k": None, "interval": None, "n_queries": 0}
        worst = min(by_kind(measured[here], config), key=lambda kind: kind["recall_at_k"], default=nobody)
        speed = {name: point.get(name) for name in ("single_qps", "batched_qps")}
        settings = {name: point[name] for name in SETTINGS}
        kind = {"kind": worst["name"], **{key: worst[key] for key in worst if key != "name"}}
        found.append({**settings, **kind, **speed, "shipped": point["shipped"]})
    return found


def mean_recall(recalls: np.ndarray, config: EvaluateConfig, at: str = "k") -> dict[str, Any]:
    """Mean over queries and its 95 % interval by a bootstrap over them; null without queries."""
    if not len(recalls):
        return {f"recall_at_{at}": None, "interval": None, "n_queries": 0}
    mean, low, high = bootstrap(recalls[:, None], np.arange(len(recalls)), config.n_draws, config.seed)
    interval = {end: value for end, value in estimate(mean[0], low[0], high[0]).items() if end != "mean"}
    return {f"recall_at_{at}": number(mean[0]), "interval": interval, "n_queries": len(recalls)}


# --- the stored answers -----------------------------------------------------------------------------------


def read_asked(index: Index, queries: "pd.DataFrame") -> "pd.DataFrame":
    """What found.parquet answers, without the answers: test queries only, and the kind of each.

    Columns: query, num_leaves_to_search, num_reordering_candidates, shipped, kind; the index is the row in
    the file.
    """
    path = index.path / "found.parquet"
    asked = pq.read_table(path, columns=["query", *SETTINGS, "shipped"]).to_pandas()
    _fits(path, "query", asked["query"].max(), len(queries))
    asked["kind"] = queries["kind"].to_numpy()[asked["query"]]
    asked[list(SETTINGS)] = asked[list(SETTINGS)].fillna(0)
    return asked[queries["span"].to_numpy()[asked["query"]] == "test"]


def _fits(path: Path, what: str, row: float, n: int) -> None:
    if row >= n:
        raise ArtifactError(f"{path} names {what} {row}, but the embeddings have {n}: run stage index again")


def sample(asked: "pd.DataFrame", kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """At most n of the queries of this kind that were answered, int64, sorted; a seeded draw."""
    queries = np.sort(asked.loc[asked["kind"] == kind, "query"].unique()).astype(np.int64)
    return queries if len(queries) <= n else np.sort(rng.choice(queries, n, replace=False))


def with_recalls(
    path: Path,
    measured: "pd.DataFrame",
    matrix: np.ndarray,
    vectors: np.ndarray,
    exact: "Nearest",
    k: int,
) -> "pd.DataFrame":
    """`measured` with recall_at_k, recall_at_10 and error: how far the stored scores are from exact ones.

    The answers are read a block at a time: of many queries at many settings they are large.

    Args:
        path: found.parquet.
        measured: rows of `read_asked`.
    """
    wanted = np.zeros(pq.read_metadata(path).num_rows, bool)
    wanted[measured.index] = True
    parts, start = [np.zeros((0, 3))], 0
    columns = ["query", "document_rows", "scores"]
    for batch in pq.ParquetFile(path).iter_batches(BLOCK_ANSWERS, columns=columns):
        _fits(path, "document", pc.max(batch["document_rows"].flatten()).as_py() or 0, len(matrix))
        here = batch.filter(pa.array(wanted[start : start + len(batch)]))
        start += len(batch)
        query, rows = here["query"].to_numpy().astype(np.int64), padded(here["document_rows"], -1)
        scores = padded(here["scores"], np.nan)
        parts.append(recalls(matrix, vectors, exact, query, rows, scores, k))
    added = np.concatenate(parts)
    names = ("recall_at_k", "recall_at_10", "error")
    return measured.assign(**{name: added[:, column] for column, name in enumerate(names)})


def padded(lists: Any, fill: float) -> np.ndarray:
    """Lists of unequal length as the rows of one array, `fill` behind the shorter ones."""
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
    values = lists.flatten().to_numpy(zero_copy_only=False)
    whole = np.full((len(lengths), lengths.max(initial=0)), fill, values.dtype)
    whole[np.arange(whole.shape[1]) < lengths[:, None]] = values
    return whole


def recalls(
    matrix: np.ndarray,
    vectors: np.ndarray,
    exact: "Nearest",
    query: np.ndarray,
    rows: np.ndarray,
    scores: np.ndarray,
    k: int,
) -> np.ndarray:
    """recall@k, recall@10 and the largest error of a score, float64 (n, 3).

    Args:
        query: rows of queries.npy, int64 (n,).
        rows, scores: their answers, best first, (n, m); -1 for none.
    """
    place = exact.places(query)
    own = exact.own[place]
    products = exact_scores(matrix, np.asarray(vectors[query]), rows)
    found = []
    for first in (k, K):
        wanted = np.minimum(first, len(matrix) - (own >= 0))
        kept = first_others(rows, own, first)
        found.append(recall_at_k(kept, products, exact.worst(place, wanted), wanted))
    counted = first_others(rows, own, max(k, K)) >= 0
    error = np.where(counted, np.abs(products - scores), 0).max(axis=1, initial=0)
    return np.stack([*found, error], axis=1)


# --- the truth --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nearest:
    """The truth for some queries, each one's own document left out.

    Attributes:
        queries: rows of queries.npy, int64 (n,), ascending.
        scores: exact, best first, float32 (n, m); -inf where there are no more documents.
        own: the row that is left out, int64 (n,), -1 for none.
        stands_for: the document that a query stands for: the one asked, or the nearest; int64 (n,).
    """

    queries: np.ndarray
    scores: np.ndarray
    own: np.ndarray
    stands_for: np.ndarray

    def places(self, queries: np.ndarray) -> np.ndarray:
        """Where these queries stand here."""
        return np.searchsorted(self.queries, queries)

    def worst(self, places: np.ndarray, k: np.ndarray) -> np.ndarray:
        """The score of each query's k-th best document, int k (n,); whatever where k is 0."""
        return self.scores[places, np.maximum(k, 1) - 1]


def nearest(
    matrix: np.ndarray, vectors: np.ndarray, queries: "pd.DataFrame", needed: np.ndarray, k: int
) -> Nearest:
    """Exact search for the needed queries, their own documents left out."""
    own = own_rows(queries)[needed]
    rows, scores = exact_search(matrix, np.asarray(vectors[needed]), k, own)
    best = rows[np.arange(len(rows)), scores.argmax(axis=1)] if len(needed) else own
    return Nearest(needed, -np.sort(-scores, axis=1), own, np.where(own >= 0, own, best))


def own_rows(queries: "pd.DataFrame") -> np.ndarray:
    """The row that a query must not find, int64 (n_queries,): its own document, or -1 for what was typed."""
    return np.where(queries["kind"] == "document", queries["document_row"], -1).astype(np.int64)
