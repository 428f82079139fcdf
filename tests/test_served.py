"""What is saved: its signatures, filters, and the requests it refuses."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from scann_parts import (
    DIM,
    STORAGES,
    Saved,
    brute_force,
    built,
    clustered_rows,
    everything,
    opening,
    recall,
    tf,
    unit_rows,
)
from tensorflow.core.protobuf import config_pb2

from pipeline import served
from pipeline.scann_layer import Limits, TunedScaNN

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return opening(tmp_path_factory)


LIMITS = Limits(queries=8, k=5, num_reordering_candidates=50, filter_ids=3)
FAIR = {"queries": unit_rows(2), "k": 5, "num_leaves_to_search": 3, "num_reordering_candidates": 50}


@pytest.mark.parametrize(
    ("signature", "asked", "refusal"),
    [
        ("search", {"k": 6}, r"k, wanted 1 to 5, got:\] \[6\]"),
        ("search", {"k": 0}, r"k, wanted 1 to 5, got:\] \[0\]"),
        (
            "search",
            {"num_leaves_to_search": 0},
            r"leaves_to_search, wanted 1 to 2147483647, got:\] \[0\]",
        ),
        ("search", {"num_reordering_candidates": 51}, r"candidates, wanted 1 to 50, got:\] \[51\]"),
        ("search", {"queries": unit_rows(2)[:0]}, r"number of queries, wanted 1 to 8, got:\] \[0\]"),
        ("search", {"queries": unit_rows(9)}, r"number of queries, wanted 1 to 8, got:\] \[9\]"),
        (
            "search",
            {"queries": np.full((2, DIM), np.nan, np.float32)},
            r"must be finite .1 if so., wanted 1, .*\[0\]",
        ),
        (
            "exact",
            {"queries": np.full((1, DIM), np.inf, np.float32)},
            r"must be finite .1 if so., wanted 1, .*\[0\]",
        ),
        (
            "serving_default_batch",
            {"queries": unit_rows(9)},
            r"number of queries, wanted 1 to 8, got:\] \[9\]",
        ),
        ("serving_default_batch", {"queries": unit_rows(2)[:0]}, r"of queries, wanted 1 to 8, got:\] \[0\]"),
        ("serving_default_batch", {"queries": np.full((2, DIM), np.nan, np.float32)}, r"must be finite"),
        ("exact", {"k": 6}, r"k, wanted 1 to 5, got:\] \[6\]"),
        ("exact", {"queries": unit_rows(9)}, r"number of queries, wanted 1 to 8, got:\] \[9\]"),
    ],
)
@pytest.mark.parametrize("num_leaves", [None, 4])
def test_a_request_for_too_much_is_refused_by_the_graph(opened, num_leaves, signature, asked, refusal):
    saved = opened(unit_rows, 60, num_leaves=num_leaves, num_leaves_to_search=2, limits=LIMITS)
    names = {"search": list(FAIR), "exact": ["queries", "k"], "serving_default_batch": ["queries"]}[signature]
    fair = {name: FAIR[name] for name in names}
    saved(signature, **fair)
    with pytest.raises(tf.errors.InvalidArgumentError, match=refusal):
        saved(signature, **(fair | asked))


@pytest.mark.parametrize("num_leaves", [None, 4])
@pytest.mark.parametrize("width", [1, DIM - 1, DIM + 1])
def test_a_query_of_another_width_is_an_error_and_no_answer(opened, num_leaves, width):
    saved = opened(unit_rows, 60, num_leaves=num_leaves, num_leaves_to_search=2, limits=LIMITS)
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=rf"width of a query, wanted {DIM}, got:\] \[{width}\]"
    ):
        saved("serving_default", input_1=unit_rows(1, width)[0])


@pytest.mark.parametrize("num_leaves", [None, 4])
def test_one_number_that_is_none_makes_a_query_an_error_and_no_answer(opened, num_leaves):
    saved = opened(unit_rows, 60, num_leaves=num_leaves, num_leaves_to_search=2, limits=LIMITS)
    query = unit_rows(1)[0]
    query[3] = np.nan
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"must be finite .1 if so., wanted 1, got:\] \[0\]"
    ):
        saved("serving_default", input_1=query)


@pytest.mark.parametrize("name", ["queries", "k", "num_reordering_candidates", "filter_ids"])
def test_a_limit_that_allows_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"limit {name} is 0, wanted at least 1"):
        Limits(**{name: 0})


# What is saved


def shown(saved):
    """{signature: ({input: (type, sizes or None)}, the same of outputs)}"""

    def tensors(infos):
        return {
            name: (
                tf.dtypes.as_dtype(info.dtype).name,
                None if info.tensor_shape.unknown_rank else [d.size for d in info.tensor_shape.dim],
            )
            for name, info in infos.items()
        }

    return {n: (tensors(s.inputs), tensors(s.outputs)) for n, s in saved.signatures.items() if s.inputs}


def test_the_signatures_are_those_of_the_contract_and_the_same_without_a_tree(opened):
    found = {"scores": ("float32", [-1, -1]), "document_ids": ("string", [-1, -1])}
    search = {
        "queries": ("float32", [-1, DIM]), "k": ("int32", []), "num_leaves_to_search": ("int32", []),
        "num_reordering_candidates": ("int32", []),
    }  # fmt: skip
    filters = {
        "allowed_document_ids": ("string", [-1]), "excluded_document_ids": ("string", [-1]),
        "minimum_score": ("float32", []),
    }  # fmt: skip
    expected = {
        "serving_default": (
            {"input_1": ("float32", [-1])}, {"output_1": ("float32", None), "output_2": ("int32", None)},
        ),
        "serving_default_batch": (
            {"queries": search["queries"]}, {"scores": ("float32", [-1, 10]), "rows": ("int32", [-1, 10])},
        ),
        "search": (search, found),
        "exact": ({name: search[name] for name in ("queries", "k")}, found),
        "search_filtered": (search | filters, found),
    }  # fmt: skip
    for num_leaves in (None, 4):
        saved = opened(unit_rows, 60, num_leaves=num_leaves, num_leaves_to_search=2, limits=LIMITS)
        assert shown(saved) == expected


def test_codes_are_assets_and_no_variables(tmp_path):
    """A variable of them would stay in memory beside what ScaNN makes of it."""
    layer = built(clustered_rows(600), num_leaves=24)
    layer.save(tmp_path)
    assert (tmp_path / "assets" / "codes.uint8").stat().st_size == layer.served().n_entries * DIM // 2
    names = [name for name, _ in tf.train.list_variables(str(tmp_path / "variables" / "variables"))]
    assert sorted(name.split("/")[0] for name in names if "OBJECT" not in name) == [
        "hashed_rows",
        "hashes",
        "ids",
        "owners",
        "rows",
    ]


def test_a_loaded_version_needs_no_file_any_more(tmp_path):
    rows = unit_rows(60)
    built(rows, num_leaves=4, num_leaves_to_search=4, num_reordering_candidates=60).save(tmp_path / "saved")
    saved = Saved(tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved")
    found = saved("serving_default", input_1=rows[0])["output_2"]
    assert found.tolist() == brute_force(rows, rows[:1], 10)[0].tolist()


@pytest.mark.parametrize("storage", STORAGES)
def test_exact_is_over_the_stored_rows(opened, storage):
    saved, queries = opened(unit_rows, 500, quantize_reordering=storage), unit_rows(20, seed=1)
    exact = saved("exact", queries=queries, k=500)
    searched = saved("search", queries=queries, k=500, **everything(500))
    np.testing.assert_allclose(searched["scores"], exact["scores"], atol=1e-6)


def test_a_request_chooses_speed_against_recall(opened):
    rows, queries = unit_rows(3000), unit_rows(200, seed=1)
    saved, truth = opened(unit_rows, 3000, num_leaves=54), brute_force(rows, queries, 10)

    def share(leaves, candidates):
        asked = {"num_leaves_to_search": leaves, "num_reordering_candidates": candidates}
        return recall(saved.rows("search", queries=queries, k=10, **asked), truth)

    assert share(1, 20) < share(5, 20) < share(5, 200) < share(54, 200) <= share(54, 3000) == 1.0


# Several queries of `serving_default` at once


def singly(saved, queries, k):
    """`serving_default`'s answers, each filled with -1 to k rows."""
    answers = [saved("serving_default", input_1=query) for query in queries]
    missing = [k - len(answer["output_2"]) for answer in answers]
    lowest = np.finfo(np.float32).min
    scores = [
        np.pad(a["output_1"], (0, m), constant_values=lowest) for a, m in zip(answers, missing, strict=True)
    ]
    rows = [np.pad(a["output_2"], (0, m), constant_values=-1) for a, m in zip(answers, missing, strict=True)]
    return np.array(scores), np.array(rows)


@pytest.mark.parametrize("n_queries", [1, 2, 300])
@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize(("num_leaves", "spill"), [(None, None), (40, None), (40, 1.5)])
def test_a_batch_is_answered_as_its_queries_one_by_one(opened, num_leaves, spill, ids, n_queries):
    """In all leaves, all rows rescored: ScaNN picks leaves for one query by another arithmetic."""
    settings = {"num_leaves_to_search": 40, "num_reordering_candidates": 2000}
    saved = opened(clustered_rows, 2000, ids=ids, num_leaves=num_leaves, spill=spill, **settings)
    queries = clustered_rows(300, seed=3)[:n_queries]
    answer, (scores, rows) = saved("serving_default_batch", queries=queries), singly(saved, queries, 10)
    np.testing.assert_allclose(answer["scores"], scores, atol=1e-6)
    assert answer["rows"].tolist() == rows.tolist() == brute_force(clustered_rows(2000), queries, 10).tolist()


def test_a_batch_is_answered_with_the_settings_that_were_shipped(opened):
    """4 leaves of 40, 50 candidates: what a query alone finds but for a few leaves, and not all there is."""
    settings = {"num_leaves": 40, "num_leaves_to_search": 4, "num_reordering_candidates": 50}
    saved, queries = opened(clustered_rows, 2000, **settings), clustered_rows(200, seed=3)
    answer, (scores, rows) = saved("serving_default_batch", queries=queries), singly(saved, queries, 10)
    same = answer["rows"] == rows
    assert same.mean() > 0.97
    np.testing.assert_allclose(answer["scores"][same], scores[same], atol=1e-6)
    assert recall(answer["rows"], brute_force(clustered_rows(2000), queries, 10)) < 0.95


@pytest.mark.parametrize("n_queries", [1, 20])
def test_a_batch_says_where_fewer_rows_than_k_were_found(opened, n_queries):
    saved = opened(clustered_rows, 200, num_leaves=20, num_leaves_to_search=1, k=200)
    answer = saved("serving_default_batch", queries=clustered_rows(200)[:n_queries])
    assert answer["rows"].shape == (n_queries, 200)
    assert ((answer["rows"] == -1) == (answer["scores"] == np.finfo(np.float32).min)).all()
    assert (answer["rows"][:, 0] >= 0).all()
    assert (answer["rows"][:, -1] == -1).all()


@pytest.mark.parametrize("num_leaves", [None, 4])
def test_a_batch_is_no_wider_than_there_are_rows(opened, num_leaves):
    saved = opened(unit_rows, 20, k=30, num_leaves=num_leaves, num_leaves_to_search=4)
    for n_queries in (1, 3):
        found = saved("serving_default_batch", queries=unit_rows(20)[:n_queries])["rows"]
        assert found.tolist() == brute_force(unit_rows(20), unit_rows(20)[:n_queries], 20).tolist()


# Filters


def ask_filtered(saved, queries, k=5, allowed=(), excluded=(), minimum_score=-2.0, leaves=40, candidates=500):
    given = {"allowed_document_ids": allowed, "excluded_document_ids": excluded}
    given = {name: np.array([f"id-{row}".encode() for row in rows], object) for name, rows in given.items()}
    asked = {"queries": queries, "k": k, "minimum_score": minimum_score, **given}
    asked |= {"num_leaves_to_search": leaves, "num_reordering_candidates": candidates}
    return saved.rows("search_filtered", **asked), saved("search_filtered", **asked)["scores"]


@pytest.fixture(scope="module")
def filtered(opened):
    """2,000 rows in a tree; a filter of more than 100 rows goes through the tree."""
    return clustered_rows(2000), opened(clustered_rows, 2000, num_leaves=40, exact_below_allowed=100)


@pytest.mark.parametrize("n_allowed", [1, 3, 100, 101, 1000])
def test_only_allowed_rows_are_found_and_the_best_of_them(filtered, n_allowed):
    rows, saved = filtered
    queries = clustered_rows(20, seed=3)
    allowed = np.sort(np.random.default_rng(0).choice(2000, n_allowed, replace=False))
    found, _ = ask_filtered(saved, queries, allowed=allowed, candidates=2000)
    k = min(5, n_allowed)
    assert found[:, :k].tolist() == allowed[brute_force(rows[allowed], queries, k)].tolist()
    assert (found[:, k:] == -1).all()


def test_excluded_rows_are_not_found_and_the_next_best_are(filtered):
    rows, saved = filtered
    queries = clustered_rows(20, seed=3)
    best = brute_force(rows, queries, 10)
    found, _ = ask_filtered(saved, queries, excluded=np.unique(best[:, :2]), candidates=2000)
    left = np.setdiff1d(np.arange(2000), best[:, :2])
    assert found.tolist() == left[brute_force(rows[left], queries, 5)].tolist()


@pytest.mark.parametrize(("share", "excludes"), [(0.3, False), (0.01, True)])
def test_a_filter_costs_little_recall(filtered, share, excludes):
    """At settings that find 95 % without a filter, which leave enough candidates where 30 % are allowed."""
    rows, saved = filtered
    queries = clustered_rows(200, seed=3)
    named = np.random.default_rng(0).choice(2000, int(2000 * share), replace=False)
    left = np.setdiff1d(np.arange(2000), named) if excludes else np.sort(named)
    given = {"excluded": named} if excludes else {"allowed": named}
    settings = {"k": 10, "leaves": 4, "candidates": 200}
    truth = left[brute_force(rows[left], queries, 10)]
    with_filter = recall(ask_filtered(saved, queries, **settings, **given)[0], truth)
    without = recall(ask_filtered(saved, queries, **settings)[0], brute_force(rows, queries, 10))
    assert without > 0.95
    assert with_filter > without - 0.02


def test_where_the_leaves_hold_too_few_allowed_rows_search_is_exact(filtered):
    rows, saved = filtered
    queries = clustered_rows(20, seed=3)
    allowed = np.arange(0, 2000, 19)  # 106 rows, of which one leaf holds two or three
    found, _ = ask_filtered(saved, queries, k=20, allowed=allowed, leaves=1, candidates=20)
    assert found.tolist() == allowed[brute_force(rows[allowed], queries, 20)].tolist()
    found, _ = ask_filtered(saved, queries, k=20, excluded=np.arange(1800), leaves=1, candidates=20)
    assert found.tolist() == (1800 + brute_force(rows[1800:], queries, 20)).tolist()


def test_an_excluded_row_is_not_found_although_it_is_allowed(filtered):
    rows, saved = filtered
    found, _ = ask_filtered(saved, rows[7:8], allowed=[7, 8], excluded=[7])
    assert found.tolist() == [[8, -1, -1, -1, -1]]


def test_ids_that_no_document_has_allow_nothing(filtered):
    rows, saved = filtered
    found, scores = ask_filtered(saved, rows[:1], allowed=["nobody"])
    assert found.tolist() == [[-1] * 5]
    assert (scores == np.finfo(np.float32).min).all()


def test_no_result_scores_less_than_the_minimum(filtered):
    rows, saved = filtered
    every, scores = ask_filtered(saved, rows[:1], k=100)
    found, _ = ask_filtered(saved, rows[:1], k=100, minimum_score=float(scores[0, 9]))
    assert found[0, :10].tolist() == every[0, :10].tolist()
    assert (found[0, 10:] == -1).all()


def test_a_filter_of_too_many_ids_is_refused(opened):
    saved = opened(unit_rows, 60, num_leaves=4, num_leaves_to_search=2, limits=LIMITS)
    asked = FAIR | {"minimum_score": 0.0, "excluded_document_ids": np.array([], object)}
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"number of ids in a filter, wanted 0 to 3, got:\] \[4\]"
    ):
        saved("search_filtered", allowed_document_ids=np.array([b"id-1"] * 4, object), **asked)


def test_several_minimum_scores_are_refused(opened):
    """Each would be compared with every score, and so make the answer as many times as large."""
    saved = opened(unit_rows, 60, num_leaves=4, num_leaves_to_search=2, limits=LIMITS)
    none = np.array([], object)
    asked = FAIR | {"allowed_document_ids": none, "excluded_document_ids": none}
    saved("search_filtered", minimum_score=0.0, **asked)
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"number of minimum scores, wanted 1, got:\] \[50\]"
    ):
        ask_any_shape(saved, "search_filtered", minimum_score=np.zeros((50, 1, 1), np.float32), **asked)


def ask_any_shape(saved, signature_name, **inputs):
    """As TensorFlow Serving asks: it holds no request against the signature's shapes."""
    signature = saved.signatures[signature_name]
    options = config_pb2.CallableOptions()
    options.feed.extend(signature.inputs[name].name for name in sorted(inputs))
    options.fetch.append(signature.outputs["scores"].name)
    call = saved.session._make_callable_from_options(options)
    return call(*[np.asarray(inputs[n], signature_type(signature.inputs[n])) for n in sorted(inputs)])


def signature_type(info):
    return tf.dtypes.as_dtype(info.dtype).as_numpy_dtype


# Files that were damaged


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    built(unit_rows(60), num_leaves=4).save(folder := tmp_path_factory.mktemp("whole"))
    return folder


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("leaves.int32", lambda content: b"\xff" * len(content)),  # all in leaf -1: loads, and finds nothing
        ("codes.uint8", lambda content: content[:-1]),
        ("codebook.pb", lambda content: bytes([content[0] ^ 1]) + content[1:]),
        ("partitioner.pb", lambda content: content[:300]),  # ends the process that gives it to ScaNN
    ],
)
def test_a_version_with_a_damaged_file_does_not_load_and_names_it(whole, tmp_path, name, damaged):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "assets" / name
    file.write_bytes(damaged(file.read_bytes()))
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=f"assets/{name} is not as it was published: copy the version"
    ):
        Saved(tmp_path)


# Documents in several passages


PASSAGES = 3  # of each document: rows 3 d, 3 d + 1 and 3 d + 2


def by_documents(scores, documents, k):
    """The k best documents of each query by their best row, and these rows' scores, one by one."""
    found = []
    for row in scores:
        best = {}
        for document, score in zip(documents, row, strict=True):
            best[document] = max(score, best.get(document, -2.0))
        found.append(sorted(best.items(), key=lambda item: -item[1])[:k])
    return [[document for document, _ in row] for row in found], [[s for _, s in row] for row in found]


def of_passages(n, documents, **settings):
    rows = clustered_rows(n)
    return rows, TunedScaNN(num_leaves_to_search=10, **settings).index(rows, [f"id-{d}" for d in documents])


@pytest.fixture(scope="module", params=[None, 10], ids=["exact", "tree"])
def passages(request, tmp_path_factory):
    """Rows, each row's document, and an index; a filter of more than 90 rows goes through the tree."""
    documents = np.arange(600) // PASSAGES
    rows, layer = of_passages(600, documents, num_leaves=request.param, exact_below_allowed=90)
    layer.save(folder := tmp_path_factory.mktemp("passages"))
    return rows, documents, Saved(folder)


@pytest.mark.parametrize("n_queries", [1, 20])
@pytest.mark.parametrize("signature", ["search", "exact"])
def test_a_document_is_found_once_by_its_best_row(passages, signature, n_queries):
    rows, documents, saved = passages
    queries = rows[:n_queries]  # their own documents' passages are other clusters'
    expected, scores = by_documents(queries @ rows.T, documents, 10)
    asked = {"queries": queries, "k": 10} | (everything(600) if signature == "search" else {})
    assert saved.rows(signature, **asked).tolist() == expected
    np.testing.assert_allclose(saved(signature, **asked)["scores"], scores, atol=1e-5)


def test_few_candidates_still_give_k_documents(passages):
    rows, documents, saved = passages
    asked = {"k": 50, "num_leaves_to_search": 10, "num_reordering_candidates": 1}
    found = saved.rows("search", queries=clustered_rows(20, seed=3), **asked)
    expected, _ = by_documents(clustered_rows(20, seed=3) @ rows.T, documents, 50)
    assert all(len(set(row) - {-1}) >= 45 for row in found)
    assert recall(found, np.array(expected)) > 0.8


def test_as_many_documents_as_there_are_each_once(passages):
    rows, _, saved = passages
    for found in (
        saved.rows("exact", queries=rows[:2], k=600),
        saved.rows("search", queries=rows[:2], k=600, **everything(600)),
    ):
        assert [sorted(row) for row in found] == [list(range(200))] * 2


@pytest.mark.parametrize("n_allowed", [5, 29, 31, 150])
def test_a_filter_gives_each_allowed_document_once(passages, n_allowed):
    """29 documents are 87 rows, 31 are 93: either side of what is searched exactly."""
    rows, documents, saved = passages
    queries, allowed = clustered_rows(20, seed=3), np.arange(0, n_allowed)
    is_allowed = np.isin(documents, allowed)
    expected, _ = by_documents(queries @ rows[is_allowed].T, documents[is_allowed], 10)
    found, _ = ask_filtered(saved, queries, k=10, allowed=allowed, candidates=600)
    n = min(10, n_allowed)
    assert found[:, :n].tolist() == expected
    assert (found[:, n:] == -1).all()
    found, _ = ask_filtered(saved, queries, k=10, excluded=np.arange(n_allowed, 200), candidates=600)
    assert found[:, :n].tolist() == expected


@pytest.mark.parametrize("documents", [np.arange(101) // 4, np.arange(101) % 26], ids=["beside", "apart"])
def test_a_document_on_both_sides_of_a_block_is_found_once(monkeypatch, tmp_path, documents):
    monkeypatch.setattr(served, "BLOCK_ROWS", 10)
    monkeypatch.setattr(served, "BLOCK_FLOATS", 50 * DIM)
    rows, layer = of_passages(101, documents, num_leaves=4)
    layer.save(tmp_path)
    queries = clustered_rows(7, seed=3)
    expected, scores = by_documents(queries @ rows.T, documents, 12)
    found = Saved(tmp_path)("exact", queries=queries, k=12)
    assert [[int(i[3:]) for i in ids] for ids in found["document_ids"]] == expected
    np.testing.assert_allclose(found["scores"], scores, atol=1e-5)


def test_rows_are_what_the_layer_and_serving_default_answer_with(passages):
    rows, _, saved = passages
    found = saved("serving_default", input_1=rows[0])["output_2"]
    assert found.tolist() == brute_force(rows, rows[:1], 10)[0].tolist()
    found = saved("serving_default_batch", queries=rows[:2])["rows"]
    assert found.tolist() == brute_force(rows, rows[:2], 10).tolist()


def test_an_index_without_passages_holds_and_does_nothing_for_them(tmp_path):
    assert built(unit_rows(60), num_leaves=4).served().documents is None


# Memory of a request


PEAK = """
import re, sys
import numpy as np
from pathlib import Path
from scann_parts import Saved, tf

def resident(name):
    return int(re.search(name + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) // 1024

saved = Saved(sys.argv[1])
asked = {"queries": np.eye(16, dtype=np.float32)[:1], "k": 3, "num_leaves_to_search": 1}
asked |= {"num_reordering_candidates": 10, "minimum_score": -2.0}
asked |= {"excluded_document_ids": np.array([], object)}
def filtered(ids):
    saved("search_filtered", allowed_document_ids=np.array(ids, object), **asked)

def exact(n_queries):
    saved("exact", queries=np.repeat(asked["queries"], n_queries, axis=0), k=3)

filtered([b"few"])
exact(1)
before = resident("RssAnon")
Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
try:
    eval(sys.argv[2])
except tf.errors.InvalidArgumentError as error:
    print("refused" if "number of ids in a filter" in str(error) else error)
print(resident("VmHWM") - resident("VmRSS") + resident("RssAnon") - before)
"""


@pytest.fixture(scope="module")
def of_a_long_document(tmp_path_factory):
    """30,000 rows, 2,000 of them passages of one document."""
    ids = ["long"] * 2000 + [f"few{row}" for row in range(28_000)]
    folder = tmp_path_factory.mktemp("long")
    TunedScaNN(num_leaves=None, limits=Limits(filter_ids=20_000)).index(unit_rows(30_000), ids).save(folder)
    return folder


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("filtered([b'long'] * 10_000)", []),
        ("filtered([b'long', *(b'x%d' % i for i in range(10_000))])", []),
        ("filtered([b'long'] * 10_000 + [b'x'] * 40_000)", ["refused"]),
    ],
    ids=["repeated", "beside others", "too many"],
)
def test_ids_in_a_filter_take_memory_for_themselves_and_not_for_every_passage_of_each(
    of_a_long_document, given, said
):
    """A table of 10,000 ids by the longest document's passages would be 160 MB and more."""
    refusals, mib = peak(of_a_long_document, given)
    assert refusals == said
    assert mib < 80


def test_exact_search_holds_the_scores_of_one_block_at_a_time(of_a_long_document):
    """4,096 queries: a block of 1,024 rows has 16 MB of scores, and there are 30 of them."""
    assert peak(of_a_long_document, "exact(4096)")[1] < 200


def peak(folder, asked):
    """What a fresh process said, and the MiB that the request took beside what was there."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, folder, asked],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *refusals, mib = done.stdout.split()
    return refusals, int(mib)
