"""What is exported, in the serving image's own versions, TensorFlow 2.11 with scann 1.2.9: tests/twin/.

The same program, twin/answer.py, asks here and there; by the SavedModel loader that TensorFlow Serving uses.
"""

import importlib.util
import os
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # TensorFlow is imported by the tests, not here
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

from pipeline.artifacts import Embeddings, writing
from pipeline.config import IndexConfig

TWIN = os.environ.get("TWIN")
PROGRAMS = Path(__file__).parent / "twin"
CORPUS = Path(__file__).parent.parent / "work" / "bench" / "corpus"
N_DOCUMENTS, DIM, N_LEAVES = 2000, 384, 40
STORAGES = ["float32", "float16", "bfloat16", "int8"]
NO_SCORE = np.finfo(np.float32).min

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not TWIN, reason="TWIN names no twin of the serving image; `make test-twin` makes one"
    ),
]


def clustered_rows(n, seed=0):
    """float32 (n, DIM), unit length, 20 clusters that every seed shares: a tree finds its way in these.

    Among directions drawn alike nearly all neighbours are ties, which the two versions break differently.
    """
    centres = np.random.default_rng(99).normal(size=(20, DIM))
    noise = np.random.default_rng(seed).normal(size=(n, DIM)) * 0.6
    rows = centres[np.arange(n) % 20] + noise
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


ROWS, QUERIES = clustered_rows(N_DOCUMENTS), clustered_rows(300, seed=3)
IDS = [f"id-{row}" for row in range(N_DOCUMENTS)]


def brute_force(rows, queries, k=10):
    """Rows of the k best dot products, best first."""
    return np.argsort(-(queries @ rows.T), axis=1, kind="stable")[:, :k]


def recall(found, truth):
    return np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, truth, strict=True)])


# Asking


def asked(leaves, candidates, queries=QUERIES, k=10):
    """The inputs of `search`, those of `exact` among them."""
    numbers = {"k": k, "num_leaves_to_search": leaves, "num_reordering_candidates": candidates}
    return {"queries": queries} | {name: np.int32(value) for name, value in numbers.items()}


class Asker:
    """Asks a SavedModel here and in the twin, each time several signatures by one process."""

    def __init__(self, work):
        self.work = work

    def here(self, model, signatures, **inputs):
        """{"SIGNATURE.OUTPUT": array}"""
        spec = importlib.util.spec_from_file_location("twin_answer", PROGRAMS / "answer.py")
        program = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(program)
        np.savez(self.work / "in.npz", **inputs)
        program.main(str(model), ",".join(signatures), str(self.work / "in.npz"), str(self.work / "here.npz"))
        return self._read("here.npz", signatures)

    def twin(self, model, signatures, repeats=1, **inputs):
        """As `here`; what was printed is kept in `said`."""
        done = self.run_twin(model, signatures, repeats, **inputs)
        assert done.returncode == 0, done.stderr
        assert "TensorFlow 2.11" in done.stdout
        self.said = done.stdout
        return self._read("twin.npz", signatures)

    def run_twin(self, model, signatures, repeats=1, **inputs):
        np.savez(self.work / "in.npz", **inputs)
        files = [self.work / "in.npz", self.work / "twin.npz"]
        command = [PROGRAMS / "ask", TWIN, model, ",".join(signatures), *files, str(repeats)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def _read(self, name, signatures):
        prefix = f"{signatures[0]}." if len(signatures) == 1 else ""
        with np.load(self.work / name) as outputs:
            return {prefix + output: outputs[output] for output in outputs.files}


@pytest.fixture
def asker(tmp_path):
    return Asker(tmp_path)


# The layer


@pytest.fixture(scope="module")
def trees():
    """{spill: a tree over ROWS}, each trained once."""
    from pipeline.scann_assets import build

    return {spill: build(ROWS, num_leaves=N_LEAVES, spill=spill) for spill in (None, 1.5)}


def saved(folder, rows=ROWS, assets=None, ids=None, **settings):
    from pipeline.scann_layer import TunedScaNN

    layer = TunedScaNN(**{"num_leaves": N_LEAVES, "num_leaves_to_search": N_LEAVES} | settings)
    layer.index(rows, ids or [f"id-{row}" for row in range(len(rows))], assets)
    layer.save(folder)
    layer.release()
    return folder


ALLOWED, EXCLUDED = IDS[:600], IDS[:600:7]
FILTER = {
    "allowed_document_ids": np.array(ALLOWED),
    "excluded_document_ids": np.array(EXCLUDED),
    "minimum_score": np.float32(0.5),
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("spill", [None, 1.5])
def test_every_signature_answers_in_the_twin_as_here(asker, trees, tmp_path, storage, spill):
    folder = saved(
        tmp_path / "saved", assets=trees[spill], num_leaves_to_search=4, num_reordering_candidates=400,
        spill=spill, quantize_reordering=storage, exact_below_allowed=100,
    )  # fmt: skip
    signatures = ["search", "exact", "search_filtered", "serving_default", "serving_default_batch"]
    inputs = asked(4, 400) | FILTER | {"input_1": QUERIES[:20]}
    twin, here = (ask(folder, signatures, **inputs) for ask in (asker.twin, asker.here))
    truth = brute_force(ROWS, QUERIES)
    for signature in signatures[:3]:
        check_same(twin, here, signature, truth)
    check_filtered(twin["search_filtered.document_ids"], twin["search_filtered.scores"])
    # Asked one by one: another way to pick leaves than for a batch, so not always the rows of `search`.
    both = [(found["serving_default.output_2"], found["serving_default.output_1"]) for found in (twin, here)]
    check_shared(*both)
    check_shared(
        *((a["serving_default_batch.rows"], a["serving_default_batch.scores"]) for a in (twin, here))
    )


def check_same(twin, here, signature, truth):
    both = [(found[f"{signature}.document_ids"], found[f"{signature}.scores"]) for found in (twin, here)]
    check_shared(*both)
    best = np.array([[f"id-{row}" for row in found] for found in truth])
    recalls = [recall(ids, best) for ids, _ in both]
    assert recalls[0] == pytest.approx(recalls[1], abs=0.002)


def check_shared(twin, here):
    """Nearly all that one finds both find, and with the same score; each is (ids or rows, scores).

    scann's two versions add up in another order, so of the candidates at the edge of those that are rescored
    one may hold one more.
    """
    (found, scores), (found_here, scores_here) = twin, here
    shared = [np.intersect1d(a, b, return_indices=True) for a, b in zip(found, found_here, strict=True)]
    for query, (_, there, here) in enumerate(shared):
        np.testing.assert_allclose(scores[query, there], scores_here[query, here], atol=1e-6)
    n_found = sum(len(np.unique(row)) for row in found)  # "" stands for several that were not found
    assert sum(len(common) for common, _, _ in shared) >= 0.99 * n_found


def check_filtered(ids, scores):
    found = set(ids.ravel()) - {""}
    assert found
    assert found <= set(ALLOWED) - set(EXCLUDED)
    assert (scores[ids != ""] >= 0.5).all()
    assert (scores[ids == ""] == NO_SCORE).all()


@pytest.mark.parametrize("num_leaves", [1, N_LEAVES])
def test_all_leaves_with_every_row_rescored_are_exact_in_the_twin(asker, trees, tmp_path, num_leaves):
    assets = trees[1.5] if num_leaves == N_LEAVES else None
    folder = saved(
        tmp_path / "saved", assets=assets, num_leaves=num_leaves, num_leaves_to_search=num_leaves,
        num_reordering_candidates=N_DOCUMENTS,
    )  # fmt: skip
    inputs = asked(num_leaves, N_DOCUMENTS) | {"input_1": QUERIES[:20]}
    found = asker.twin(folder, ["search", "serving_default"], **inputs)
    check_exact(found, ["search"])


def test_without_a_tree_every_signature_is_exact_in_the_twin(asker, tmp_path):
    folder = saved(tmp_path / "saved", num_leaves=None)
    found = asker.twin(
        folder, ["search", "exact", "serving_default"], **asked(1, 10) | {"input_1": QUERIES[:20]}
    )
    check_exact(found, ["search", "exact"])


def test_documents_in_several_passages_are_found_once_in_the_twin(asker, tmp_path):
    """Four rows each, of four clusters: a document's best row decides, and its others are other clusters'."""
    documents = [f"document-{row // 4}" for row in range(N_DOCUMENTS)]
    folder = saved(tmp_path / "saved", ids=documents, num_leaves_to_search=N_LEAVES)
    inputs = asked(N_LEAVES, N_DOCUMENTS, QUERIES[:50]) | {
        "allowed_document_ids": np.array(documents[:1200:4]),
        "excluded_document_ids": np.array(documents[:400:4]),
        "minimum_score": np.float32(-1),
    }
    found = asker.twin(folder, ["search", "exact", "search_filtered"], **inputs)
    best = (QUERIES[:50] @ ROWS.T).reshape(50, -1, 4).max(axis=2)  # of each document
    for signature, first, end in (("search", 0, 500), ("exact", 0, 500), ("search_filtered", 100, 300)):
        order = first + np.argsort(-best[:, first:end], axis=1)[:, :10]
        ids = [[f"document-{document}" for document in row] for row in order]
        assert found[f"{signature}.document_ids"].tolist() == ids
        scores = np.take_along_axis(best, order, axis=1)
        np.testing.assert_allclose(found[f"{signature}.scores"], scores, atol=1e-6)


def check_exact(found, signatures):
    best = brute_force(ROWS, QUERIES)
    for signature in signatures:
        assert found[f"{signature}.document_ids"].tolist() == [[IDS[row] for row in rows] for rows in best]
    np.testing.assert_array_equal(found["serving_default.output_2"], best[:20])
    scores = np.take_along_axis(QUERIES[:20] @ ROWS.T, best[:20], axis=1)
    np.testing.assert_allclose(found["serving_default.output_1"], scores, atol=1e-6)


def test_a_request_for_too_much_is_refused_in_the_twin_and_the_settings_are_the_requests(
    asker, trees, tmp_path
):
    folder = saved(tmp_path / "saved", assets=trees[1.5])
    refused = asker.run_twin(folder, ["search"], **asked(4, 100, k=1001))
    assert refused.returncode == 1
    assert "k, wanted 1 to 1000, got:] [1001]" in refused.stderr
    best = [[IDS[row] for row in rows] for rows in brute_force(ROWS, QUERIES)]
    few, many = (
        asker.twin(folder, ["search"], repeats=3, **asked(leaves, candidates))["search.document_ids"]
        for leaves, candidates in ((1, 10), (N_LEAVES, 500))
    )
    assert recall(few, best) < recall(many, best)
    said = [line.split()[0] for line in asker.said.splitlines()]
    assert said.count("seconds") == 3
    assert said.count("rss_anon_kib") == said.count("rss_anon_kib_before_loading") == 1


@pytest.mark.skipif(not CORPUS.exists(), reason="benchmarks/corpus.py makes these vectors")
@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_recall_over_real_vectors_is_the_same_in_the_twin(asker, real_tree, tmp_path, storage):
    rows, queries, truth, assets = real_tree
    folder = saved(tmp_path / "saved", rows, assets, num_leaves=141, quantize_reordering=storage)
    recalls = []
    for ask in (asker.twin, asker.here):
        ids = ask(folder, ["search"], **asked(7, 50, queries))["search.document_ids"]
        recalls.append(recall(ids, truth))
    assert recalls[0] == pytest.approx(recalls[1], abs=0.002)
    assert recalls[0] > 0.9  # seven of 141 leaves: a tree of these rows, not chance


@pytest.fixture(scope="module")
def real_tree():
    """20,000 rows drawn of the corpus, 1,000 held-out queries, their ten nearest ids, and a tree."""
    from pipeline.scann_assets import build

    every = np.load(CORPUS / "rows.npy", mmap_mode="r")
    rows = every[np.sort(np.random.default_rng(7).choice(len(every), 20_000, replace=False))]
    queries = np.load(CORPUS / "queries.npy", mmap_mode="r")[:1000]
    truth = np.array([[f"id-{row}" for row in found] for found in brute_force(rows, queries)])
    return rows, queries, truth, build(rows, num_leaves=141, training_iterations=6)


# The stage


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    out = tmp_path_factory.mktemp("twin") / "embeddings"
    empty = {
        "kind": pa.array([], pa.string()),
        "span": pa.array([], pa.string()),
        "document_row": pa.array([], pa.int32()),
    }
    with writing(Embeddings, out, config={}, inputs=[]) as draft:
        np.save(draft.folder / "embeddings.npy", ROWS)
        np.save(draft.folder / "queries.npy", np.empty((0, DIM), np.float32))
        pq.write_table(pa.table({"document_id": IDS, "text": IDS}), draft.folder / "documents.parquet")
        pq.write_table(pa.table(empty), draft.folder / "queries.parquet")
    return Embeddings.open(out)


FIXED = {  # what is given is not tuned
    "exact_below": 0, "num_leaves": N_LEAVES, "num_leaves_to_search": 6, "num_reordering_candidates": 100,
}  # fmt: skip
OWN = {"anisotropic_quantization_threshold": None, "spill": 1.5, "quantize_reordering": "float32"}


@pytest.mark.parametrize(
    ("settings", "layer"),
    [
        (FIXED | OWN, "tuned"),
        (FIXED | {"layer": "tfrs"}, "tfrs"),
        ({"exact_below": N_DOCUMENTS + 1}, "exact"),
    ],
    ids=["tuned", "tfrs", "exact"],
)
def test_what_stage_index_makes_answers_in_the_twin_as_here(asker, embeddings, tmp_path, settings, layer):
    from pipeline import index

    built = index.run(IndexConfig(**settings), embeddings, tmp_path / "index")
    assert built.facts["layer"] == layer
    answers = [ask(built.path, ["serving_default"], input_1=QUERIES) for ask in (asker.twin, asker.here)]
    both = [(found["serving_default.output_2"], found["serving_default.output_1"]) for found in answers]
    check_shared(*both)
    if layer == "exact":
        np.testing.assert_array_equal(both[0][0], brute_force(ROWS, QUERIES))
