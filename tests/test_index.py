"""Stage `index`: what is built, tuned and exported, against NumPy's brute force."""

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import builds, chatter, checks, index, index_settings, layers, saved_index
from pipeline.artifacts import Embeddings, Index, writing
from pipeline.config import IndexConfig, as_dict
from pipeline.errors import ArtifactError, ConfigError, PipelineError
from pipeline.tuning import Build, Queries, Record, Search

slow = pytest.mark.slow
DIM = 8
DT_FLOAT, DT_INT32 = 1, 3  # tensorflow/core/framework/types.proto
TREE: dict[str, Any] = {"exact_below": 0}  # ScaNN, however few the documents


def unit_rows(n, dim=DIM, seed=0):
    """float32 (n, dim), directions drawn alike."""
    rows = np.random.default_rng(seed).normal(size=(n, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clustered_rows(n, seed=0):
    """float32 (n, DIM), 20 clusters: a tree finds these, where directions drawn alike have no leaves."""
    noise = np.random.default_rng(seed).normal(size=(n, DIM))
    rows = unit_rows(20, seed=seed)[np.arange(n) % 20] + 0.2 * noise
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def make_embeddings(folder, rows, queries=(), n_documents=None):
    """A real `embeddings/`; queries are (vector, kind, span, document_row)."""
    vectors = np.array([q[0] for q in queries] or np.empty((0, rows.shape[1])), np.float32)
    ids = [f"id-{row}" for row in range(len(rows) if n_documents is None else n_documents)]
    with writing(Embeddings, folder / "embeddings", config={}, inputs=[]) as draft:
        np.save(draft.folder / "embeddings.npy", rows)
        np.save(draft.folder / "queries.npy", vectors)
        pq.write_table(pa.table({"document_id": ids, "text": ids}), draft.folder / "documents.parquet")
        columns = {
            "kind": pa.array([q[1] for q in queries], pa.string()),
            "span": pa.array([q[2] for q in queries], pa.string()),
            "document_row": pa.array([q[3] for q in queries], pa.int32()),
        }
        pq.write_table(pa.table(columns), draft.folder / "queries.parquet")
        draft.rows.update(documents=len(rows), queries=len(queries), pool=0)
    return Embeddings.open(folder / "embeddings")


def held_out(rows, n, noise=0.1, seed=5):
    """n "document" and n "typed" queries in each of dev and test."""
    rng = np.random.default_rng(seed)
    queries = []
    for span in ("dev", "test"):
        for row in rng.choice(len(rows), n, replace=False):
            typed = rows[row] + noise * rng.normal(size=rows.shape[1])
            queries.append((rows[row], "document", span, row))
            queries.append((typed / np.linalg.norm(typed), "typed", span, row))
    return queries


def brute_force(rows, vectors, k):
    """Rows of the k best dot products, best first: (n, k)."""
    return np.argsort(-(vectors @ rows.T), axis=1, kind="stable")[:, :k]


def serving_default(folder):
    import tensorflow as tf

    saved = tf.saved_model.load(str(folder))

    def ask(vector):
        outputs = saved.signatures["serving_default"](input_1=tf.constant(vector))
        return outputs["output_1"].numpy(), outputs["output_2"].numpy()

    return ask


# Plain functions, in milliseconds


def test_auto_leaves_are_the_root_of_the_rows():
    settings, _ = index_settings.choose_settings(IndexConfig(k=20), 1_500_000, 384)
    assert (settings.num_leaves, settings.num_reordering_candidates) == (1225, 200)


def test_ten_results_rescore_a_hundred_candidates():
    assert index_settings.choose_settings(IndexConfig(k=3), 20_000, 384)[0].num_reordering_candidates == 100


@pytest.mark.parametrize(
    ("config", "candidates"), [({"k": 2000}, 10_000), ({"max_num_reordering_candidates": 50}, 50)]
)
def test_no_more_candidates_are_shipped_than_a_request_may_ask_for(config, candidates):
    settings, _ = index_settings.choose_settings(IndexConfig(**config), 20_000, 384)
    assert settings.num_reordering_candidates == candidates


def test_the_export_is_tried_with_test_queries_first_and_then_documents(tmp_path):
    rows = unit_rows(30)
    embeddings = make_embeddings(tmp_path, rows, held_out(rows, 1))
    probes = index.read_probes(embeddings, embeddings.matrix())
    assert len(probes) == 2 + 30
    np.testing.assert_array_equal(probes[:2], index.read_test_queries(embeddings).vectors)
    np.testing.assert_array_equal(probes[2:], rows)


@pytest.mark.parametrize(("n", "leaves"), [(4_999, None), (5_000, 71)])
def test_fewer_documents_than_exact_below_are_searched_exactly(n, leaves):
    settings, reason = index_settings.choose_settings(IndexConfig(), n, 384)
    assert settings.num_leaves == leaves
    assert ("exact" in reason) == (leaves is None)


@pytest.mark.parametrize("layer", ["tuned", "tfrs"])
@pytest.mark.parametrize("n", [1, 15])
def test_what_scann_cannot_train_on_is_searched_exactly_and_says_why(n, layer):
    settings, reason = index_settings.choose_settings(IndexConfig(**TREE, layer=layer), n, 384)
    assert settings.num_leaves is None
    assert "at least 16" in reason


def test_more_leaves_than_documents_are_refused():
    with pytest.raises(
        ConfigError, match=r"index\.num_leaves is 21, but there are 20 documents; choose 1 to 20"
    ):
        index_settings.choose_settings(IndexConfig(**TREE, num_leaves=21), 20, 384)


def test_more_leaves_to_search_than_auto_makes_are_refused():
    with pytest.raises(ConfigError, match=r"num_leaves_to_search is 11, but 100 documents make 10 leaves"):
        index_settings.choose_settings(IndexConfig(**TREE, num_leaves_to_search=11), 100, 384)


def test_tfrss_layer_has_no_settings_but_its_own():
    settings, _ = index_settings.choose_settings(IndexConfig(layer="tfrs"), 40_000, 384)
    assert settings.num_leaves == 200
    assert (settings.spill, settings.spherical, settings.quantize_reordering) == (None, None, None)


def test_few_documents_are_tried_with_and_without_spilling_many_in_every_way():
    few = index_settings.builds_to_try(IndexConfig(), 10_000, 384)
    assert few == [Build(100, 1.5, 0.0882), Build(100, None, 0.0882)]
    many = index_settings.builds_to_try(IndexConfig(), 90_000, 384)
    assert {b.num_leaves for b in many} == {150, 300, 600}
    assert {(b.spill, b.anisotropic_quantization_threshold) for b in many} == {
        (1.5, 0.0882), (1.5, None), (None, 0.0882), (None, None),
    }  # fmt: skip
    assert len(many) == 12


def test_what_the_config_gives_is_not_tried_otherwise():
    config = IndexConfig(
        num_leaves=50, spill=None, anisotropic_quantization_threshold=0.2, quantize_reordering="int8"
    )
    assert index_settings.builds_to_try(config, 90_000, 384) == [Build(50, None, 0.2, "int8")]


# With 100 bytes an entry and 4, 2 or 1 a number, of 1,000,000 rows of 384, in MiB: a million entries 95.4;
# float32 1464.8, float16 and bfloat16 732.4, int8 366.2.


@pytest.mark.parametrize(
    ("memory_mib", "expected"),
    [
        (None, {(1.5, "float32"), (None, "float32")}),
        (1700, {(1.5, "float32"), (None, "float32")}),
        (1600, {(1.5, "float16"), (1.5, "bfloat16"), (1.5, "int8"), (None, "float32")}),
        (500, {(None, "int8")}),
        (100, {(None, "int8")}),  # nothing is so small: the smallest is built, and refused later
    ],
)
def test_rows_are_stored_as_float32_unless_the_memory_wants_less(monkeypatch, memory_mib, expected):
    size = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
    monkeypatch.setattr(
        index_settings,
        "served_bytes",
        lambda rows, entries, dim, storage, *_: rows * dim * size[storage] + 100 * entries,
    )
    config = IndexConfig(memory_mib=memory_mib, num_leaves=1000, anisotropic_quantization_threshold=None)
    tried = index_settings.builds_to_try(config, 1_000_000, 384)
    assert {(b.spill, b.quantize_reordering) for b in tried} == expected


def test_an_estimate_above_the_memory_is_said_with_what_to_do():
    assert index_settings.memory_warning(IndexConfig(memory_mib=300), 300.0) is None
    assert index_settings.memory_warning(IndexConfig(), 4000.0) is None
    line = index_settings.memory_warning(IndexConfig(memory_mib=300), 392.4)
    assert line.startswith("about 392 MiB when served, above index.memory_mib = 300: publish will probably")


# Bytes that stand for a MiB: 10 of rows, whatever they are, and 1 an entry of 100 rows.
@pytest.mark.parametrize(
    ("config", "mib"), [({**TREE, "spill": 1.5}, 210), ({**TREE, "spill": None}, 110), ({}, 10)]
)
def test_what_will_not_fit_is_told_before_anything_is_trained(tmp_path, monkeypatch, capfd, config, mib):
    class TrainingError(Exception):
        """Stands for the minutes that training takes."""

    def refuse(*_, **__):
        raise TrainingError

    monkeypatch.setattr(index, "tensorflow", lambda: None)
    monkeypatch.setattr(index, "train", refuse)
    monkeypatch.setattr(index, "tuned_layer", refuse)
    monkeypatch.setattr(index_settings, "served_bytes", lambda rows, entries, *_: (entries + 10) << 20)
    rows = unit_rows(100)
    embeddings = make_embeddings(tmp_path, rows)
    for memory_mib, is_told in ((mib, False), (mib - 1, True)):
        fixed = IndexConfig(**config, num_leaves=5, quantize_reordering="float32", memory_mib=memory_mib)
        settings, _ = index_settings.choose_settings(fixed, *rows.shape)
        with pytest.raises(TrainingError):
            index.make(fixed, settings, embeddings, rows, {}, tmp_path)
        assert (f"about {mib} MiB when served" in capfd.readouterr().err) == is_told


def typed_queries(n, dim=DIM):
    return Queries(np.arange(n, dtype=np.int32), unit_rows(n, dim), np.full(n, -1, np.int32))


@pytest.mark.parametrize(("target", "n"), [(0.95, 500), (0.995, 1000)])
def test_builds_are_tried_with_as_many_queries_as_the_target_takes(target, n):
    config = IndexConfig(**TREE, target_recall=target)
    rows = unit_rows(100)
    settings, _ = index_settings.choose_settings(config, *rows.shape)
    bench = builds.Bench(config, settings, rows, {"typed": typed_queries(1000)}, Path())
    assert len(bench.dev["typed"].rows) == n


def test_builds_that_no_query_can_tell_apart_are_not_tried_and_that_is_said(monkeypatch, capfd):
    monkeypatch.setattr(builds, "MIN_TRIAL_ROWS", 100)
    config, rows = IndexConfig(**TREE, target_recall=0.999), unit_rows(100)
    settings, _ = index_settings.choose_settings(config, *rows.shape)
    assert builds.try_builds(config, settings, rows, {"typed": typed_queries(500)}, Path()) == (
        settings,
        [],
        None,
    )
    assert "too few to prove index.target_recall = 0.999" in capfd.readouterr().err


class ExactLayer:
    """Finds everything, and as TensorFlow's layers do it refers to itself."""

    def __init__(self):
        self.itself = self

    def index(self, rows, ids, assets=None):
        self.rows = rows

    def ask(self, queries, k, num_leaves_to_search=None, num_reordering_candidates=None):
        found = brute_force(self.rows, queries, k)
        return np.take_along_axis(queries @ self.rows.T, found, axis=1), found

    def release(self):
        pass


def test_no_layer_of_a_trial_is_left_when_the_winner_is_built(monkeypatch):
    layers = []

    def layer_of(*_):
        layer = ExactLayer()
        layers.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(builds, "tuned_layer", layer_of)
    monkeypatch.setattr(builds, "train", lambda config, settings, rows, _: SimpleNamespace(owners=rows[:, 0]))
    monkeypatch.setattr(builds, "MIN_TRIAL_ROWS", 100)
    config, rows = IndexConfig(**TREE), unit_rows(200)
    settings, _ = index_settings.choose_settings(config, *rows.shape)
    gc.disable()
    try:
        _, trials, _ = builds.try_builds(config, settings, rows, {"typed": typed_queries(100)}, Path())
    finally:
        gc.enable()
    assert len(trials) == len(layers) == 2
    assert [layer() for layer in layers] == [None, None]


def test_a_tree_is_trained_once_and_ways_to_store_rows_are_tried_on_it(monkeypatch):
    trained, indexed = [], []

    class Layer(ExactLayer):
        def index(self, rows, ids, assets=None):
            super().index(rows, ids)
            indexed.append((rows, assets))

    def train(config, settings, rows, _):
        trained.append((settings.spill, len(rows)))
        return SimpleNamespace(owners=rows[:, 0])

    monkeypatch.setattr(builds, "tuned_layer", lambda *_: Layer())
    monkeypatch.setattr(builds, "train", train)
    rows = unit_rows(300)
    config = IndexConfig(**TREE)
    settings, _ = index_settings.choose_settings(config, *rows.shape)
    bench = builds.Bench(config, settings, rows, {"typed": typed_queries(100)}, Path())
    # as halving orders them, the trees mixed
    tried = [Build(17, 1.5, None, "int8"), Build(17, None), Build(17, 1.5), Build(17, None, None, "int8")]
    trials = bench.try_on(tried, 200)
    assert trained == [(1.5, 200), (None, 200)]
    assert [trial.build for trial in trials] == [tried[0], tried[2], tried[1], tried[3]]
    assert all(given is indexed[0][0] for given, _ in indexed)  # one sample, whatever is tried on it
    assert [assets is indexed[0][1] for _, assets in indexed] == [True, True, False, False]
    assert indexed[2][1] is indexed[3][1]
    assert bench.of_all == {}  # of a sample nothing is kept


def test_what_tuned_scann_saves_is_timed_once_and_not_before_it_is_saved(monkeypatch):
    monkeypatch.setattr(index.tuning, "seconds_each", lambda *given, **named: pytest.fail("timed"))
    tried = [Record(Search(n, 10), "typed", n / 40, n / 50) for n in range(1, 41)]
    points = index.frontier_of(IndexConfig(), None, None, tried, tried[20])
    assert [points[0].search, points[-1].search] == [Search(1, 10), Search(40, 10)]
    assert Search(21, 10) in [point.search for point in points]
    assert len(points) in (index.N_FRONTIER, index.N_FRONTIER + 1)
    assert {(point.single_qps, point.batched_qps) for point in points} == {(None, None)}


class StoredRows:
    """Answers every query with row 0 and then its worst rows, and keeps what was asked."""

    def __init__(self, rows):
        self.rows, self.asked = rows, []

    def served(self):
        return self

    def exact(self, vectors, k):
        self.asked.append(len(vectors))
        own_first = brute_force(self.rows, vectors, len(self.rows))
        found = np.concatenate([own_first[:, :1], own_first[:, :0:-1]], axis=1)[:, :k]
        return None, SimpleNamespace(numpy=lambda: found)


def test_what_storing_loses_is_not_hidden_by_a_querys_own_row():
    rows = unit_rows(20)
    config = IndexConfig(k=3, quantize_reordering="int8")
    settings, _ = index_settings.choose_settings(config, *rows.shape)
    layer = StoredRows(rows)
    assert index.stored_recall(config, settings, layer, rows, {}, None) == 0.0
    queries = Queries(np.arange(7, dtype=np.int32), rows[:7], np.full(7, -1, np.int32))
    # Dev queries, where there are any: each finds the best of its three, and that is no own row.
    assert index.stored_recall(config, settings, layer, rows, {"typed": queries}, None) == 0.333333
    assert layer.asked == [20, 7]


def test_a_sample_has_as_many_rows_a_leaf_and_knows_its_own_documents():
    rows = unit_rows(1000)
    config = IndexConfig(**TREE, num_leaves=100)
    settings, _ = index_settings.choose_settings(config, *rows.shape)
    bench = builds.Bench(config, settings, rows, {}, Path())
    drawn, own_of = bench.sample(250)
    assert bench.scaled(Build(100), 250).num_leaves == 25
    own = own_of(np.arange(-1, 1000))
    assert own[0] == -1
    there = np.flatnonzero(own[1:] >= 0)
    assert len(there) == 250
    np.testing.assert_array_equal(drawn[own[1:][there]], rows[there])


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (np.nan, "holds NaN or infinity"),
        (np.inf, "holds NaN or infinity"),
        (0.0, "has length 0"),
        (2.0, "has length"),
    ],
)
def test_a_row_that_is_no_unit_vector_is_named_with_its_document(tmp_path, value, what):
    rows = np.eye(DIM, dtype=np.float32)
    rows[3, 3] = value
    embeddings = make_embeddings(tmp_path, rows)
    with pytest.raises(ArtifactError, match=rf"row 3 \(document_id id-3\) {what}.*wanted unit length"):
        index.run(IndexConfig(), embeddings, tmp_path / "index")
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("n_rows", [1, 3])
def test_bad_rows_are_found_in_any_block(monkeypatch, n_rows):
    rows = unit_rows(10)
    rows[7] = 0
    monkeypatch.setattr(checks, "BLOCK_BYTES", n_rows * DIM * 4)
    assert checks.first_bad_row(rows) == (7, "has length 0")


def test_a_query_of_another_width_is_refused(tmp_path):
    embeddings = make_embeddings(tmp_path, unit_rows(4), [(unit_rows(1, DIM + 1)[0], "typed", "dev", 0)])
    message = (
        r"queries\.npy holds 1 float32 vector of 9 numbers, wanted 1, one for each row of .*, of 8 numbers"
    )
    with pytest.raises(ArtifactError, match=message):
        index.run(IndexConfig(), embeddings, tmp_path / "index")


def test_a_query_that_is_no_unit_vector_is_refused(tmp_path):
    embeddings = make_embeddings(tmp_path, unit_rows(4), [(np.zeros(DIM), "typed", "dev", 0)])
    with pytest.raises(ArtifactError, match=r"queries\.npy row 0 has length 0"):
        index.run(IndexConfig(), embeddings, tmp_path / "index")


def test_vectors_without_documents_are_refused(tmp_path):
    embeddings = make_embeddings(tmp_path, unit_rows(4), n_documents=3)
    with pytest.raises(ArtifactError, match=r"3 rows in documents\.parquet but 4 in embeddings\.npy"):
        index.run(IndexConfig(), embeddings, tmp_path / "index")


def test_no_documents_at_all_are_refused(tmp_path):
    embeddings = make_embeddings(tmp_path, np.empty((0, DIM), np.float32))
    with pytest.raises(ArtifactError, match=r"holds 0 float32 vectors of 8 numbers, wanted .* one document"):
        index.run(IndexConfig(), embeddings, tmp_path / "index")


def test_numbers_that_are_no_list_of_vectors_are_refused(tmp_path):
    embeddings = make_embeddings(tmp_path, np.ones((2, 3, DIM), np.float32))
    with pytest.raises(ArtifactError, match="holds 2 x 3 x 8 float32 numbers and no list of vectors, wanted"):
        index.run(IndexConfig(), embeddings, tmp_path / "index")


def test_held_out_queries_are_read_by_span_and_kind(tmp_path):
    rows = unit_rows(30)
    embeddings = make_embeddings(tmp_path, rows, held_out(rows, 6))
    by_kind = index.read_queries(embeddings, "test", limit=4, seed=0)
    asked = pq.read_table(embeddings.path / "queries.parquet").to_pylist()
    assert list(by_kind) == ["document", "typed"]
    for kind, queries in by_kind.items():
        assert len(queries.rows) == 4
        assert {(asked[row]["kind"], asked[row]["span"]) for row in queries.rows} == {(kind, "test")}
    document = by_kind["document"]
    np.testing.assert_array_equal(document.vectors, rows[document.own])
    assert set(by_kind["typed"].own) == {-1}


def test_logged_queries_are_tuned_on_and_answered_too(tmp_path):
    rows = unit_rows(30)
    logged = [(rows[row], "logged", span, -1) for row, span in ((3, "dev"), (4, "test"), (5, "test"))]
    embeddings = make_embeddings(tmp_path, rows, [*held_out(rows, 2), *logged])  # behind 8 of the others
    dev = index.read_queries(embeddings, "dev", limit=9, seed=0)
    assert (dev["logged"].rows.tolist(), dev["logged"].own.tolist()) == ([8], [-1])
    test = index.read_test_queries(embeddings)
    assert {9, 10} < set(test.rows.tolist())
    assert len(test.rows) == 6


def test_known_log_lines_are_dropped_and_others_pass(capfd):
    script = "import os; os.write(2, b'I0000 00:00 x\\nF0000 00:00 died\\nE0000 00:00 wrong\\n')"
    with chatter.without_chatter():
        subprocess.run([sys.executable, "-c", script], check=True)
    assert capfd.readouterr().err.splitlines() == ["F0000 00:00 died", "E0000 00:00 wrong"]


# The real layers


def exported(tmp_path, rows, queries=(), **config):
    embeddings = make_embeddings(tmp_path, rows, queries)
    return index.run(IndexConfig(**config), embeddings, tmp_path / "index")


LAYERS = ["tuned", "tfrs"]


@slow
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("n", [17, 300])
def test_one_leaf_with_all_rescored_equals_brute_force(tmp_path, n, layer):
    rows, vectors = unit_rows(n), unit_rows(20, seed=1)
    expected = brute_force(rows, vectors, 10)
    exported(tmp_path, rows, num_leaves=1, num_reordering_candidates=n, layer=layer, **TREE)
    ask = serving_default(tmp_path / "index")
    for vector, best in zip(vectors, expected, strict=True):
        scores, found = ask(vector)
        assert found.tolist() == best.tolist()
        np.testing.assert_allclose(scores, rows[best] @ vector, atol=1e-6)


TUNED_SIGNATURES = {"serving_default_batch", "search", "exact", "search_filtered"}
SHAPES = {"exact": {"exact_below": 100}, "tuned": TREE, "tfrs": {**TREE, "layer": "tfrs"}}


@pytest.fixture(scope="module", params=SHAPES)
def small(request, tmp_path_factory):
    """Fifty documents: five vectors, ten times each; the three kinds of layer."""
    folder = tmp_path_factory.mktemp(request.param)
    rows = np.repeat(unit_rows(5), 10, axis=0)
    return rows, exported(folder, rows, k=10, **SHAPES[request.param])


@slow
def test_every_layer_shows_one_signature(small):
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    _, built = small
    saved = SavedModel.FromString((built.path / "saved_model.pb").read_bytes())
    (graph,) = saved.meta_graphs
    signature = graph.signature_def["serving_default"]
    assert list(graph.meta_info_def.tags) == ["serve"]
    assert signature.method_name == "tensorflow/serving/predict"
    assert shown(signature.inputs) == {"input_1": (DT_FLOAT, [-1])}
    assert shown(signature.outputs) == {"output_1": (DT_FLOAT, "unknown"), "output_2": (DT_INT32, "unknown")}
    others = set(graph.signature_def) - {"serving_default", "__saved_model_init_op"}
    assert others == (set() if built.facts["layer"] == "tfrs" else TUNED_SIGNATURES)


@slow
def test_an_index_carries_its_warm_up_requests(small):
    _, built = small
    assert "assets.extra/tf_serving_warmup_requests" in built.manifest["files"]
    # 8 single queries; batches of one and of 64 of two signatures, one filtered, one exact
    assert built.rows["warmup_requests"] == (8 if built.facts["layer"] == "tfrs" else 14)


def shown(tensors):
    """{name: (type, sizes or "unknown" rank)}"""
    return {
        name: (t.dtype, "unknown" if t.tensor_shape.unknown_rank else [d.size for d in t.tensor_shape.dim])
        for name, t in tensors.items()
    }


@slow
@pytest.mark.parametrize("width", [DIM - 1, DIM + 1])
def test_a_query_of_another_width_is_an_error_and_no_answer(small, width):
    import tensorflow as tf

    with pytest.raises(tf.errors.InvalidArgumentError):
        serving_default(small[1].path)(unit_rows(1, width)[0])


@slow
def test_equal_documents_are_all_found(small):
    rows, built = small
    _, found = serving_default(built.path)(rows[20])
    assert sorted(found.tolist()) == list(range(20, 30))


@slow
def test_without_queries_all_leaves_are_searched_and_nothing_is_found(small):
    _, built = small
    settings = built.facts["settings"]
    assert settings["num_leaves"] == settings["num_leaves_to_search"]
    assert (built.facts["tuning"], built.facts["builds"]) == ([], [])
    assert [point["recall"] for point in built.facts["frontier"]] == (
        [None] if settings["num_leaves"] else []
    )
    assert pq.read_table(built.path / "found.parquet").num_rows == 0


@slow
def test_speed_and_memory_are_those_of_a_process_that_loads_it(small):
    facts = small[1].facts
    assert 0 < facts["latency_ms"]["p50"] <= facts["latency_ms"]["p95"] <= facts["latency_ms"]["p99"]
    assert facts["memory_mib"] > 0
    assert facts["load_seconds"] > 0
    if facts["layer"] == "tfrs":  # it has no signature for several queries
        assert facts["batched_qps"] is None
    else:
        assert facts["batched_qps"] > 0


@slow
def test_fewer_rows_than_k_give_all_rows(tmp_path):
    rows = unit_rows(20)
    exported(tmp_path, rows, k=30, **TREE)
    _, found = serving_default(tmp_path / "index")(rows[0])
    assert found.tolist() == brute_force(rows, rows[:1], 20)[0].tolist()


@slow
def test_the_same_seed_trains_the_same_tree_and_codes_and_another_seed_others(tmp_path):
    rows = clustered_rows(600)
    config = IndexConfig(**TREE)
    settings, _ = index_settings.choose_settings(config, *rows.shape)

    def trained(seed):
        assets = layers.train(IndexConfig(**TREE, seed=seed), settings, rows, tmp_path)
        return assets.partitioner, assets.codebook, assets.tokens.tolist(), assets.codes.tolist()

    assert trained(7) == trained(7)
    assert trained(7) != trained(8)


@pytest.fixture(scope="module", params=LAYERS)
def tuned(request, tmp_path_factory):
    """A tuned tree over 2,000 documents, all of them rescored, and its embeddings."""
    folder = tmp_path_factory.mktemp("tuned")
    rows = clustered_rows(2000)
    embeddings = make_embeddings(folder, rows, held_out(rows, 150))
    spill = {"spill": None} if request.param == "tuned" else {}  # tfrs's layer knows no other way
    config = IndexConfig(
        **TREE, **spill, layer=request.param, target_recall=0.9, num_reordering_candidates=2000
    )
    return embeddings, index.run(config, embeddings, folder / "index")


@slow
def test_the_fewest_leaves_that_surely_meet_the_target_are_shipped(tuned):
    _, built = tuned
    tuning = {record["num_leaves_to_search"]: record for record in built.facts["tuning"]}
    shipped = built.facts["settings"]["num_leaves_to_search"]
    assert 1 < shipped < built.facts["settings"]["num_leaves"] == 45
    assert tuning[shipped]["low"] >= 0.9 > tuning[shipped - 1]["low"]
    assert all(record["low"] < record["recall"] for record in tuning.values())


@slow
def test_found_holds_k_and_one_answers_to_every_test_query(tuned):
    embeddings, built = tuned
    found = pq.read_table(built.path / "found.parquet").to_pylist()
    matrix, vectors = embeddings.matrix(), np.load(embeddings.path / "queries.npy")
    spans = pq.read_table(embeddings.path / "queries.parquet")["span"].to_pylist()
    test = {row for row, span in enumerate(spans) if span == "test"}
    settings = {(f["num_leaves_to_search"], f["num_reordering_candidates"], f["shipped"]) for f in found}
    assert len(found) == built.rows["found"] == len(settings) * len(test)
    assert {f["query"] for f in found} == test
    for f in found:
        query, rows = vectors[f["query"]], f["document_rows"]
        np.testing.assert_allclose(f["scores"], matrix[rows] @ query, atol=1e-6)
        assert f["scores"] == sorted(f["scores"], reverse=True)
        assert len(rows) == len(set(rows)) <= 11


@slow
def test_the_frontier_is_found_beside_what_is_shipped(tuned):
    _, built = tuned
    found = pq.read_table(built.path / "found.parquet").to_pylist()
    asked = {(f["num_leaves_to_search"], f["num_reordering_candidates"], f["shipped"]) for f in found}
    points = built.facts["frontier"]
    settings = built.facts["settings"]
    (shipped,) = [p for p in points if p["shipped"]]
    assert shipped["num_leaves_to_search"] == settings["num_leaves_to_search"]
    assert {
        (p["num_leaves_to_search"], p["num_reordering_candidates"], p["shipped"]) for p in points
    } <= asked
    assert [p["recall"] for p in points] == sorted(p["recall"] for p in points)
    assert all(p["single_qps"] > 0 for p in points)


@slow
def test_the_saved_index_answers_as_found_does_where_it_is_shipped(tuned):
    embeddings, built = tuned
    vectors = np.load(embeddings.path / "queries.npy")
    ask = serving_default(built.path)
    same = []
    for f in pq.read_table(built.path / "found.parquet").to_pylist()[-50:]:  # the shipped ones are last
        assert f["shipped"]
        same += np.isin(ask(vectors[f["query"]])[1], f["document_rows"]).tolist()
    # Asked in a batch ScaNN picks leaves by other arithmetic than asked singly: near ties may fall otherwise.
    assert np.mean(same) >= 0.97


@slow
def test_the_document_of_a_row_number_lies_beside_the_saved_model(tuned):
    embeddings, built = tuned
    documents = pq.read_table(built.path / "assets.extra" / "documents.parquet")
    assert documents.equals(pq.read_table(embeddings.path / "documents.parquet"))


@slow
def test_the_manifest_says_what_was_built(tuned):
    _, built = tuned
    facts = built.facts
    assert (facts["layer"], facts["dim"]) == (built.manifest["config"]["layer"], DIM)
    assert facts["stored_recall"] is None
    files = json.loads((built.path / "manifest.json").read_text())["files"]
    assert facts["bytes"] == sum((built.path / name).stat().st_size for name in files)


@slow
def test_int8_rows_and_what_they_lose_are_told(tmp_path):
    rows = clustered_rows(300)
    built = exported(
        tmp_path, rows, held_out(rows, 100), target_recall=0.9, quantize_reordering="int8", **TREE
    )
    assert built.facts["settings"]["quantize_reordering"] == "int8"
    assert 0.5 < built.facts["stored_recall"] < 1


@slow
def test_builds_are_tried_and_the_winner_is_not_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(builds, "MIN_TRIAL_ROWS", 400)
    trained = []
    train = builds.train
    monkeypatch.setattr(builds, "train", lambda *given: trained.append(1) or train(*given))
    monkeypatch.setattr(index, "train", builds.train)
    rows = clustered_rows(500)
    built = exported(tmp_path, rows, held_out(rows, 100), target_recall=0.8, **TREE)
    trials = built.facts["builds"]
    assert [(t["n_rows"], t["num_leaves"]) for t in trials] == [(500, 22), (500, 22)]
    assert {t["spill"] for t in trials} == {None, 1.5}
    (kept,) = [t for t in trials if t["kept"]]
    assert built.facts["settings"]["spill"] == kept["spill"]
    assert all(t["queries_per_second"] is None or t["recall"] > 0.8 for t in trials)
    assert len(trained) == 2


@slow
def test_what_a_killed_attempt_left_is_no_part_of_the_index(tmp_path):
    embeddings, config = make_embeddings(tmp_path, unit_rows(20)), IndexConfig()

    def attempt():
        out = tmp_path / "index"
        with writing(Index, out, config=as_dict(config), inputs=[embeddings]) as draft:
            (draft.folder / "variables_temp").mkdir()
            (draft.folder / "variables_temp" / "part-00000").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt()
    built = index.run(config, embeddings, tmp_path / "index")
    assert not (built.path / "variables_temp").exists()


@slow
def test_too_few_queries_to_prove_the_target_search_all_leaves(tmp_path, capfd):
    rows = unit_rows(100)
    built = exported(tmp_path, rows, held_out(rows, 5), target_recall=0.99, **TREE)
    assert built.facts["settings"]["num_leaves_to_search"] == 10
    assert "5 typed queries are too few to tune on" in capfd.readouterr().err


@slow
def test_a_target_that_is_not_met_ships_the_best_and_says_so(tmp_path, capfd):
    rows = unit_rows(200)
    config = {"num_leaves_to_search": 1, "num_reordering_candidates": 10, "target_recall": 0.95}
    built = exported(tmp_path, rows, held_out(rows, 80), **config, **TREE)
    (record,) = built.facts["tuning"]  # what the config gives is measured, not explored
    assert record["low"] < 0.95
    assert built.facts["settings"]["num_leaves_to_search"] == 1
    assert "publish will refuse it" in capfd.readouterr().err


@slow
@pytest.mark.parametrize("n", [1, 30])
def test_few_documents_are_found_exactly(tmp_path, n):
    rows = unit_rows(n)
    built = exported(tmp_path, rows, held_out(rows, 1), k=4)
    found = pq.read_table(built.path / "found.parquet").to_pylist()
    vectors = np.load(tmp_path / "embeddings" / "queries.npy")
    assert built.facts["layer"] == "exact"
    assert (built.facts["settings"]["num_leaves"], built.facts["frontier"]) == (None, [])
    assert len(found) == 2
    for f in found:
        assert (f["num_leaves_to_search"], f["num_reordering_candidates"], f["shipped"]) == (0, 0, True)
        assert f["document_rows"] == brute_force(rows, vectors[[f["query"]]], 11)[0].tolist()


# The process that loads what was saved


def measured(folder, probes, expected):
    return saved_index.measure(
        folder, probes, expected, k=4, shipped=Search(1, 4), frontier=[], max_queries=10
    )


@slow
def test_a_process_that_dies_is_one_line(tmp_path):
    with pytest.raises(PipelineError, match=r"ended with exit code 1: .*run stage index --force") as error:
        measured(tmp_path, unit_rows(2), [])
    assert "\n" not in str(error.value)


@slow
def test_another_answer_than_before_saving_is_an_error(small):
    rows, built = small
    with pytest.raises(PipelineError, match=r"scores probe 0 .* before saving it was \[9\.0\]"):
        measured(built.path, rows[:1], [np.array([9], np.float32)])
