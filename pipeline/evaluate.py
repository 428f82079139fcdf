"""Stage `evaluate`: pairs + model + embeddings + index -> report/; only compares, with NumPy and BM25.

Two questions, kept apart. How much does the index lose against exact search over the same vectors
(recall@10)? And how often is the document that a reader opened next among the first n found: by the
tuned model, by the model before tuning, and by BM25, over one pool of documents, with the anchor's own
document left out for all three?
"""

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.accuracy import Scores, absent, accuracies, dot_scores, place_all, retrieval_figures
from pipeline.artifacts import Embeddings, Index, Model, Pairs, Report, belong_together, write_json, writing
from pipeline.bm25 import bm25_scores
from pipeline.config import EvaluateConfig, as_dict
from pipeline.errors import ArtifactError
from pipeline.recall import index_figures
from pipeline.report import render
from pipeline.showcase import document_map, examples

if TYPE_CHECKING:
    import pandas as pd


def run(
    config: EvaluateConfig, pairs: Pairs, model: Model, embeddings: Embeddings, index: Index, out: Path
) -> Report:
    """Measure, and write report.json and report.html.

    Raises:
        ArtifactError: the artefacts do not belong together.
        ConfigError: the index was built to answer fewer than ten documents.
    """
    inputs = [pairs, model, embeddings, index]
    belong_together(index, embeddings)
    belong_together(embeddings, model, pairs)
    with writing(Report, out, config=as_dict(config), inputs=inputs) as draft:
        figures = measure(config, pairs, model, embeddings, index)
        write_json(draft.folder / "report.json", figures)
        _say("drawing the page")
        (draft.folder / "report.html").write_text(render(figures), encoding="utf-8")
        draft.rows = {"queries": figures["index"]["n_queries"], "pairs": figures["retrieval"]["n_pairs"]}
    return Report.open(out)


def measure(
    config: EvaluateConfig, pairs: Pairs, model: Model, embeddings: Embeddings, index: Index
) -> dict[str, Any]:
    """Every figure of report.json, JSON-ready; report.html is drawn from this alone."""
    queries = read_queries(embeddings)
    _say("the index's answers against exact search")
    figures: dict[str, Any] = {
        "description": pairs.facts.get("description") or "",
        "index": index_figures(config, index, queries, embeddings.matrix(), load(embeddings, "queries.npy")),
        "retrieval": absent(has_log=bool(pairs.facts["events"])),
        "latency_ms": index.facts.get("latency_ms"),
        "examples": [],
        "map": None,
        "model": model_figures(model),
        "session_lengths": pairs.facts.get("session_lengths") or {},
        "counts": counts(pairs),
        "lineage": lineage(pairs, model, embeddings, index),
    }
    if pairs.rows.get("test"):
        pool = read_pool(embeddings)
        _say(f"{pairs.rows['test']:,} held-out pairs over {len(pool):,} documents: tuned, untuned, BM25")
        systems = scorers(embeddings, queries, pool)
        held_out = read_held_out(pairs, queries, pool)
        if held_out.empty:
            raise ArtifactError(
                f"no test pair of {pairs.path} has its anchor among the queries of {embeddings.path} and its "
                "positive in the pool: run stage encode again"
            )
        placed = place_all(systems, held_out, len(pool))
        typed = read_held_out(pairs, queries, pool, kind="typed")
        figures["retrieval"] = retrieval_figures(config, held_out, placed) | {
            "n_pool": len(pool),
            "n_pairs_left_out": pairs.rows["test"] - len(held_out),
            "typed": accuracies(config, typed, place_all(systems, typed, len(pool))),
        }
        figures["examples"] = examples(config, held_out, placed, systems, queries, pool)
        untuned = load(embeddings, "untuned/documents.npy")
        figures["map"] = document_map(config, held_out, pool, untuned, embeddings.matrix())
    return figures


def read_queries(embeddings: Embeddings) -> "pd.DataFrame":
    """queries.parquet; row i is row i of queries.npy."""
    queries = pq.read_table(embeddings.path / "queries.parquet").to_pandas()
    for name in ("queries.npy", "untuned/queries.npy"):
        if (embeddings.path / name).exists() and len(load(embeddings, name)) != len(queries):
            raise ArtifactError(
                f"{embeddings.path / name} has {len(load(embeddings, name))} rows for {len(queries)} "
                "queries: run stage encode again"
            )
    return queries


def read_pool(embeddings: Embeddings) -> "pd.DataFrame":
    """The documents that all systems are compared over: document_row and every column of documents."""
    import pyarrow.dataset as dataset

    rows = pq.read_table(embeddings.path / "pool.parquet").column("document_row")
    documents = dataset.dataset(embeddings.path / "documents.parquet")
    pool = documents.take(rows.combine_chunks()).to_pandas()  # in the pool's order, one fragment at a time
    pool.insert(0, "document_row", rows.to_numpy())
    path = embeddings.path / "untuned" / "documents.npy"
    if not path.exists() or len(load(embeddings, "untuned/documents.npy")) != len(pool):
        raise ArtifactError(f"{path} does not hold one row for each of {len(pool)}: run stage encode again")
    return pool


def read_held_out(
    pairs: Pairs, queries: "pd.DataFrame", pool: "pd.DataFrame", kind: str = "document"
) -> "pd.DataFrame":
    """The test pairs that can be asked, by queries of this kind, and found.

    Columns: anchor_id, positive_id, user_id, session_id; query (row of queries.npy); own and positive
    (columns of the pool, own -1 where the anchor is not in it); seen (the pair was there in training);
    readings (training pairs that lead to the positive, from any anchor).
    """
    names = ["anchor_id", "positive_id", "user_id", "session_id"]
    held_out = pairs.read("test", names).to_pandas()
    askable = queries[(queries["kind"] == kind) & (queries["span"] == "test")]
    asked = {id_: row for row, id_ in askable["document_id"].items()}
    columns = {id_: column for column, id_ in enumerate(pool["document_id"])}
    held_out["query"] = held_out["anchor_id"].map(asked)
    held_out["positive"] = held_out["positive_id"].map(columns)
    held_out["own"] = held_out["anchor_id"].map(columns).fillna(-1).astype(np.int64)
    complete = held_out.dropna(subset=["query", "positive"]).reset_index(drop=True)
    complete["seen"] = seen_in_training(pairs, complete)
    complete["readings"] = readings_in_training(pairs, complete)
    return complete.astype({"query": np.int64, "positive": np.int64})


def seen_in_training(pairs: Pairs, held_out: "pd.DataFrame") -> np.ndarray:
    """Whether each (anchor, positive) is a training pair, bool (n,); (b, a) is another pair than (a, b)."""
    import pandas as pd

    names = ["anchor_id", "positive_id"]
    anchors = pa.array(held_out["anchor_id"].unique(), pa.string())
    parts = [pd.DataFrame({name: pd.Series(dtype="str") for name in names})]
    for part in pairs.tables("pairs"):  # one part in memory at a time, and of it only these anchors
        table = pq.read_table(part, columns=names, filters=pc.field("anchor_id").isin(anchors))
        parts.append(table.to_pandas().drop_duplicates())
    trained = pd.MultiIndex.from_frame(pd.concat(parts))
    return pd.MultiIndex.from_frame(held_out[names]).isin(trained)


def readings_in_training(pairs: Pairs, held_out: "pd.DataFrame") -> np.ndarray:
    """How many training pairs lead to each pair's positive, int64 (n,)."""
    import pandas as pd

    total = pd.Series(0, held_out["positive_id"].unique(), dtype=np.int64)
    for part in pairs.tables("pairs"):
        found = pq.read_table(part, columns=["positive_id"])["positive_id"].to_pandas().value_counts()
        total = total.add(found.reindex(total.index, fill_value=0))
    return total.reindex(held_out["positive_id"]).to_numpy(np.int64)


def scorers(embeddings: Embeddings, queries: "pd.DataFrame", pool: "pd.DataFrame") -> dict[str, Scores]:
    """The compared systems, each as a function from query rows to scores over the same pool."""
    tuned = np.asarray(embeddings.matrix()[pool["document_row"].to_numpy()])
    untuned = load(embeddings, "untuned/documents.npy")
    return {
        "tuned": dot_scores(load(embeddings, "queries.npy"), tuned),
        "untuned": dot_scores(load(embeddings, "untuned/queries.npy"), untuned),
        "bm25": bm25_scores(queries["text"].tolist(), pool["text"].tolist()),
    }


def model_figures(model: Model) -> dict[str, Any]:
    """What was tuned, how, and the lines of training.jsonl."""
    facts = {name: model.facts.get(name) for name in ("base_model", "trained", "dim", "main_similarity")}
    before_and_after = {name: model.facts.get(name) for name in ("similarity_before", "similarity_after")}
    path = model.path / "training.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    training = [json.loads(line) for line in lines if line.strip()]
    return facts | before_and_after | {"training": training}


def counts(pairs: Pairs) -> dict[str, Any]:
    """What became of the rows of the log."""
    return {
        "events": pairs.facts.get("events") or {},
        "rejects": pairs.facts.get("rejects") or {},
        "rows": pairs.rows,
        "negatives": pairs.facts.get("negatives") or {},
        "gap_duration": pairs.facts.get("gap_duration"),
        "test_start": pairs.facts.get("test_start"),
    }


def lineage(*inputs: Pairs | Model | Embeddings | Index) -> dict[str, Any]:
    """Digests of what was compared, and the library versions of every stage."""
    libraries: dict[str, str] = {}
    for artifact in inputs:
        libraries |= artifact.manifest["libraries"]
    libraries["bm25s"] = metadata.version("bm25s")
    return {
        "digests": {artifact.kind: artifact.digest for artifact in inputs},
        "libraries": dict(sorted(libraries.items())),
    }


def load(embeddings: Embeddings, name: str) -> np.ndarray:
    """One of the artefact's arrays, memory-mapped read-only."""
    return np.load(embeddings.path / name, mmap_mode="r")


def _say(line: str) -> None:
    print(f"evaluate: {line}", file=sys.stderr, flush=True)
