"""The recall of stored answers against exact search, and where a contract is not kept or not proved."""

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import EvaluateConfig
from pipeline.recall import (
    frontier,
    is_proved,
    judged_latency,
    nearest,
    own_rows,
    padded,
    sample,
    shortfalls,
    with_recalls,
)

CONFIG = EvaluateConfig(n_draws=50)
WANTED = {"k": 10, "target_recall": 0.95, "target_latency_ms": None, "memory_mib": None}


KINDS = pd.DataFrame({"kind": ["document", "typed", "logged"], "document_row": [0, 0, -1]})


def test_the_nearest_leave_out_the_own_document_of_a_document_query_only():
    matrix = np.arange(12, 0, -1, dtype=np.float32)[:, None]  # scores 12, 11, ..., 1
    assert own_rows(KINDS).tolist() == [0, -1, -1]
    exact = nearest(matrix, np.ones((3, 1), np.float32), KINDS, np.array([0, 1, 2]), 11)
    assert exact.scores[:, 9].tolist() == [2.0, 3.0, 3.0]  # the tenth best
    assert exact.worst(np.array([0, 2]), np.array([1, 2])).tolist() == [11.0, 11.0]


def test_a_query_stands_for_the_document_asked_or_else_for_the_nearest():
    matrix = np.eye(3, dtype=np.float32)
    vectors = np.array([[0, 1, 0], [0, 0, 1], [0, 1, 0]], np.float32)
    exact = nearest(matrix, vectors, KINDS, np.array([0, 1, 2]), 2)
    assert exact.stands_for.tolist() == [0, 2, 1]


def test_a_collection_of_fewer_than_ten_is_found_whole_or_not(tmp_path):
    matrix = np.array([[3.0], [2.0], [1.0]], np.float32)
    queries = pd.DataFrame({"kind": ["document", "typed"], "document_row": [0, 0]})
    vectors = np.ones((2, 1), np.float32)
    exact = nearest(matrix, vectors, queries, np.array([0, 1]), 11)
    # asked for ten, and for 300: the first query has two to find and finds both, then one; the second
    # finds two of its three
    answers = found(tmp_path, [(0, [0, 1, 2]), (0, [0, 1]), (1, [0, 2])])
    for k in (10, 300):
        recalls = with_recalls(tmp_path / "found.parquet", answers, matrix, vectors, exact, k)
        assert recalls["recall_at_k"].tolist() == pytest.approx([1.0, 0.5, 2 / 3])


def found(folder, rows: list[tuple[int, list[int]]]) -> pd.DataFrame:
    """Writes found.parquet of (query, document rows), all of them scored 2.0, and gives its first column."""
    documents = pa.array([r for _, r in rows], pa.list_(pa.int32()))
    scores = pa.array([[2.0] * len(r) for _, r in rows], pa.list_(pa.float32()))
    queries = pa.array([q for q, _ in rows], pa.int32())
    columns = {"query": queries, "document_rows": documents, "scores": scores}
    pq.write_table(pa.table(columns), folder / "found.parquet")
    return pd.DataFrame({"query": [q for q, _ in rows]})


@pytest.mark.parametrize("n_at_once", [1, 2, 100])
def test_answers_in_blocks_have_the_recall_of_their_own_query(tmp_path, monkeypatch, n_at_once):
    monkeypatch.setattr("pipeline.recall.BLOCK_ANSWERS", n_at_once)
    monkeypatch.setattr("pipeline.exact.BLOCK_BYTES", 4 * 2 * 4 * n_at_once)  # four answers, two numbers
    matrix = np.array([[1, 0], [0.8, 0], [0, 1], [0, 0.8]], np.float32)
    vectors = np.eye(2, dtype=np.float32)
    queries = pd.DataFrame({"kind": ["typed"] * 2, "document_row": [-1] * 2})
    exact = nearest(matrix, vectors, queries, np.array([0, 1]), 4)
    answers = found(tmp_path, [(0, [0, 1, -1, -1]), (1, [0, 2]), (0, [2, 3]), (1, []), (0, [1, 0])])
    kept = answers.drop(index=2)
    recalls = with_recalls(tmp_path / "found.parquet", kept, matrix, vectors, exact, 2)
    assert recalls["recall_at_k"].tolist() == [1.0, 0.5, 0.0, 1.0]
    # of four documents all are among the ten nearest
    assert recalls["recall_at_10"].tolist() == [0.5, 0.5, 0.0, 0.5]
    # stored as 2.0: farthest from 0.8, from 0.0, no answer, from 0.8
    assert recalls["error"].tolist() == pytest.approx([1.2, 2.0, 0.0, 1.2])


def test_only_the_first_k_beside_the_own_document_count(tmp_path):
    matrix = np.array([[5.0], [4.0], [3.0], [2.0], [1.0]], np.float32)
    queries = pd.DataFrame({"kind": ["document"], "document_row": [1]})
    exact = nearest(matrix, np.ones((1, 1), np.float32), queries, np.array([0]), 11)
    # its nearest are 0 and 2: the answer 2 stands third behind 0, its own document and 4
    answers = found(tmp_path, [(0, [0, 1, 4, 2])])
    path, ones = tmp_path / "found.parquet", np.ones((1, 1), np.float32)
    assert with_recalls(path, answers, matrix, ones, exact, 2)["recall_at_k"].tolist() == [0.5]
    assert with_recalls(path, answers, matrix, ones, exact, 3)["recall_at_k"].tolist() == [2 / 3]


def test_lists_of_unequal_length_are_filled_up():
    lists = pa.array([[1, 2], [], [3]], pa.list_(pa.int32()))
    assert padded(lists, -1).tolist() == [[1, 2], [-1, -1], [3, -1]]
    assert padded(lists.slice(1), -1).tolist() == [[-1], [3]]


def test_a_sample_is_of_its_kind_and_the_same_for_the_same_seed():
    found = pd.DataFrame({"query": range(100), "kind": ["document", "typed"] * 50})
    one, two = (sample(found, "typed", 10, np.random.default_rng(7)) for _ in range(2))
    assert len(set(one)) == 10
    assert all(query % 2 for query in one)
    assert one.tolist() == two.tolist()
    assert len(sample(found, "typed", 1000, np.random.default_rng(7))) == 50


POINT = {"num_reordering_candidates": 30, "single_qps": 5000.0, "batched_qps": 9000.0}


def test_a_setting_of_the_frontier_has_the_recall_of_the_kind_that_it_serves_worst():
    settings = {"num_reordering_candidates": 30, "shipped": False, "num_leaves_to_search": 4}
    measured = pd.DataFrame(
        [
            {**settings, "query": 0, "kind": "document", "recall_at_k": 1.0},
            {**settings, "query": 1, "kind": "typed", "recall_at_k": 0.8},
            {**settings, "query": 2, "kind": "typed", "recall_at_k": 0.6},
            {**settings, "query": 0, "kind": "document", "recall_at_k": 0.1, "num_leaves_to_search": 8},
            {**settings, "query": 0, "kind": "document", "recall_at_k": 0.9, "shipped": True},
        ]
    )
    points = [
        {**POINT, "num_leaves_to_search": 4, "shipped": False},
        {**POINT, "num_leaves_to_search": 4, "shipped": True},
        {**POINT, "num_leaves_to_search": 16, "shipped": False},
    ]
    one, shipped, unasked = frontier(points, measured, CONFIG)
    assert (one["kind"], one["recall_at_k"], one["n_queries"]) == ("typed", 0.7, 2)
    assert (one["single_qps"], one["batched_qps"], one["shipped"]) == (5000.0, 9000.0, False)
    assert (shipped["kind"], shipped["recall_at_k"], shipped["shipped"]) == ("document", 0.9, True)
    assert (unasked["recall_at_k"], unasked["interval"], unasked["n_queries"]) == (None, None, 0)


def said(index: dict[str, Any], **wanted: Any) -> list[str]:
    return [str(shortfall) for shortfall in shortfalls(index, WANTED | wanted)]


def test_an_index_at_its_limits_keeps_its_contract():
    reached = {"latency_ms": 5.0, "served_mib": 2048.0, "kinds": []}
    index = {"recall_at_10": 0.95, "recall_at_10_typed": 0.95, "contract": reached}
    assert said(index, target_latency_ms=5.0, memory_mib=2048) == []


def test_a_shortfall_says_the_figure_what_was_wanted_and_what_to_do():
    index = {"recall_at_10": 0.97, "recall_at_10_typed": 0.94, "contract": {"latency_ms": 5.04}}
    recall, latency = said(index, target_latency_ms=5)
    assert recall.startswith(
        "index.recall_at_10_typed is 0.9400, wanted index.target_recall = 0.95; search more leaves"
    )
    assert latency.startswith(
        "index.contract.latency_ms is 5.04, wanted at most index.target_latency_ms = 5; allow more"
    )
    (memory,) = said({"recall_at_10": 1.0, "contract": {"served_mib": 2300.4}}, memory_mib=2048)
    assert memory.startswith(
        "index.contract.served_mib is 2300, wanted at most index.memory_mib = 2048; set index.quantize"
    )


def test_what_the_contract_names_and_nobody_measured_is_a_shortfall():
    found = said({"recall_at_10": None, "contract": {}}, target_latency_ms=5, memory_mib=2048)
    assert [line.split(" was not measured")[0] for line in found] == [
        "index.recall_at_10", "index.contract.latency_ms", "index.contract.served_mib",
    ]  # fmt: skip
    assert said({"recall_at_10": 1.0, "contract": {}}) == []  # no limits are named


def test_another_k_than_ten_is_judged_beside_recall_at_ten():
    kinds = [{"name": "document", "recall_at_k": 0.97}, {"name": "logged", "recall_at_k": 0.93}]
    index = {"recall_at_10": 0.94, "recall_at_10_logged": 0.99, "contract": {"kinds": kinds}}
    ten, many = said(index, k=300)
    assert ten.startswith("index.recall_at_10 is 0.9400")
    assert many.startswith("recall@300 of logged queries is 0.9300, wanted index.target_recall = 0.95")
    # where five are asked for, nobody asks for ten
    (few,) = said(index, k=5)
    assert few.startswith("recall@5 of logged queries is 0.9300")
    (unmeasured,) = said({"recall_at_10": 0.99, "contract": {"kinds": []}}, k=300)
    assert unmeasured.startswith("recall@300 of documents asked as queries was not measured")


def kinds_of(**n_queries: int) -> list[dict[str, Any]]:
    return [{"name": name, "recall_at_k": 1.0, "n_queries": n} for name, n in n_queries.items()]


@pytest.mark.parametrize(
    ("layer", "storage", "n_queries", "proved"),
    [
        ("tuned", "float32", {"document": 10}, True),
        ("tuned", "float32", {"document": 9, "typed": 9, "logged": 9}, False),  # of the same nine documents
        ("tuned", "float32", {"document": 1, "logged": 10}, True),
        ("tfrs", None, {"document": 1}, False),
        ("tuned", "float32", {}, False),
        ("exact", "float32", {"document": 1}, True),  # finds all there is, by what it is
        ("exact", "int8", {"document": 1}, False),  # finds all that its rounded rows let it find
        ("exact", "int8", {"document": 10}, True),
    ],
)
def test_ten_queries_of_one_kind_prove_a_recall_and_exact_search_needs_none(
    layer, storage, n_queries, proved
):
    facts = {"layer": layer, "settings": {"quantize_reordering": storage}}
    assert is_proved(facts, kinds_of(**n_queries)) is proved


def test_a_recall_that_few_queries_found_is_a_shortfall_that_says_how_many_are_wanted():
    reached = {"proved": False, "kinds": kinds_of(document=3, typed=2)}
    (line,) = said({"recall_at_10": 1.0, "contract": reached})
    assert line.startswith(
        "the number of test queries is 3, wanted at least 10 of one kind to prove index.target_recall; hold"
    )
    assert "raise index.exact_below" in line
    assert "\n" not in line
    # where nobody asked at all, that is said, and not twice
    (unmeasured,) = said({"recall_at_10": None, "contract": {"proved": False, "kinds": []}})
    assert "was not measured" in unmeasured


@pytest.mark.parametrize(
    ("facts", "requests", "latency"),
    [
        ({"latency_ms": {"p50": 1.0, "p95": 3.0}, "batched_qps": 4000.0}, "single", 3.0),
        ({"latency_ms": {"p50": 1.0, "p95": 3.0}, "batched_qps": 4000.0}, "batched", 0.25),
        ({"latency_ms": {"p50": 1.0, "p95": 3.0}, "batched_qps": None}, "batched", None),
        ({}, "single", None),
    ],
)
def test_single_requests_are_held_to_p95_and_batched_ones_to_a_batchs_time_a_query(facts, requests, latency):
    assert judged_latency(facts, requests) == latency
