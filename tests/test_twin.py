"""The exported index in the serving image's own versions, TensorFlow 2.11 with scann 1.2.9: tests/twin/."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import index
from pipeline.artifacts import Embeddings, writing
from pipeline.config import IndexConfig

TWIN = os.environ.get("TWIN")
ASK = Path(__file__).parent / "twin" / "ask"
N_DOCUMENTS, DIM = 2000, 384

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not TWIN, reason="TWIN names no twin of the serving image; `make test-twin` makes one"
    ),
]


def unit_rows(n, seed):
    rows = np.random.default_rng(seed).normal(size=(n, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    out = tmp_path_factory.mktemp("twin") / "embeddings"
    ids = [f"id-{row}" for row in range(N_DOCUMENTS)]
    empty = {
        "kind": pa.array([], pa.string()),
        "span": pa.array([], pa.string()),
        "document_row": pa.array([], pa.int32()),
    }
    with writing(Embeddings, out, config={}, inputs=[]) as draft:
        np.save(draft.folder / "embeddings.npy", unit_rows(N_DOCUMENTS, seed=0))
        np.save(draft.folder / "queries.npy", np.empty((0, DIM), np.float32))
        pq.write_table(pa.table({"document_id": ids, "text": ids}), draft.folder / "documents.parquet")
        pq.write_table(pa.table(empty), draft.folder / "queries.parquet")
    return Embeddings.open(out)


def ask_twin(folder, queries, work):
    """(scores, rows) of shape (n, k) each, from the twin's `serving_default`, a query at a time."""
    np.savez(work / "in.npz", input_1=queries)
    command = [ASK, TWIN, folder, "serving_default", work / "in.npz", work / "out.npz"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "TensorFlow 2.11" in done.stdout
    with np.load(work / "out.npz") as outputs:
        return outputs["output_1"], outputs["output_2"]


def ask_here(folder, queries):
    import tensorflow as tf

    saved = tf.saved_model.load(str(folder))
    answers = [saved.signatures["serving_default"](input_1=tf.constant(query)) for query in queries]
    return tuple(np.stack([a[name].numpy() for a in answers]) for name in ("output_1", "output_2"))


def test_a_tree_answers_in_the_twin_as_here(embeddings, tmp_path):
    config = IndexConfig(exact_below=0, num_leaves=40, num_leaves_to_search=6)
    built = index.run(config, embeddings, tmp_path / "index")
    assert built.facts["layer"] == "scann"
    queries = unit_rows(50, seed=1)
    (scores, rows), (scores_here, rows_here) = (
        ask_twin(built.path, queries, tmp_path),
        ask_here(built.path, queries),
    )
    # The two scann versions add up in another order, so that a candidate at the edge of the hundred that
    # are rescored may differ: what both found has the same score, and nearly all is found by both.
    shared = [np.intersect1d(a, b, return_indices=True) for a, b in zip(rows, rows_here, strict=True)]
    for query, (_, there, here) in enumerate(shared):
        np.testing.assert_allclose(scores[query, there], scores_here[query, here], atol=1e-6)
    assert sum(len(common) for common, _, _ in shared) >= 0.99 * rows.size


def test_brute_force_answers_in_the_twin_as_here(embeddings, tmp_path):
    built = index.run(IndexConfig(exact_below=N_DOCUMENTS + 1), embeddings, tmp_path / "index")
    assert built.facts["layer"] == "brute_force"
    queries = unit_rows(50, seed=1)
    (scores, rows), (scores_here, rows_here) = (
        ask_twin(built.path, queries, tmp_path),
        ask_here(built.path, queries),
    )
    np.testing.assert_array_equal(rows, rows_here)
    np.testing.assert_allclose(scores, scores_here, atol=1e-6)


def test_one_leaf_with_all_rescored_is_exact_in_the_twin(embeddings, tmp_path):
    config = IndexConfig(exact_below=0, num_leaves=1, num_reordering_candidates=N_DOCUMENTS)
    built = index.run(config, embeddings, tmp_path / "index")
    queries = unit_rows(20, seed=2)
    _, rows = ask_twin(built.path, queries, tmp_path)
    best = np.argsort(-(queries @ embeddings.matrix().T), axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(rows, best)
