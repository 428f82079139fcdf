"""Exact search in blocks against a full sort, and recall by scores, counted by hand."""

import tracemalloc

import numpy as np
import pytest

from pipeline import exact
from pipeline.exact import exact_scores, exact_search, first_others, kth_scores, recall_at_k


def drawn(n, dim=16, seed=0):
    return np.random.default_rng(seed).standard_normal((n, dim), dtype=np.float32)


# Exact search


@pytest.fixture(params=[1, 3, 256], ids=lambda n: f"{n} queries at once")
def queries_at_once(request, monkeypatch):
    monkeypatch.setattr(exact, "BLOCK_QUERIES", request.param)


@pytest.fixture(params=[1, 10_000, 1 << 26], ids=lambda n: f"{n} bytes at once")
def bytes_at_once(request, monkeypatch):
    monkeypatch.setattr(exact, "BLOCK_BYTES", request.param)


@pytest.mark.usefixtures("queries_at_once", "bytes_at_once")
@pytest.mark.parametrize("k", [1, 11, 600])
def test_search_in_blocks_finds_what_a_full_sort_finds(k):
    rows, queries = drawn(500), drawn(7, seed=1)
    found, scores = exact_search(rows, queries, k)
    products = queries @ rows.T
    expected = np.argsort(-products, axis=1)[:, :k]
    assert (np.sort(found) == np.sort(expected)).all()
    np.testing.assert_allclose(scores, np.take_along_axis(products, found, axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(kth_scores(rows, queries, k), scores.min(axis=1), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("queries_at_once", "bytes_at_once")
def test_a_query_does_not_find_its_own_row():
    rows = np.eye(4, dtype=np.float32)
    queries = np.array([[0.8, 0.6, 0, 0], [0, 0, 0.6, 0.8], [0, 0.8, 0.6, 0]], np.float32)
    own = np.array([0, 3, -1])
    found, scores = exact_search(rows, queries, 1, own)
    assert found.tolist() == [[1], [2], [1]]
    np.testing.assert_allclose(scores, [[0.6], [0.6], [0.8]])
    np.testing.assert_allclose(kth_scores(rows, queries, 1, own), [0.6, 0.6, 0.8])


@pytest.mark.parametrize("k", [3, 10])
def test_where_no_more_rows_are_to_be_found_there_are_none(k):
    rows = np.array([[1, 0], [0.6, 0.8], [0, 1]], np.float32)
    found, scores = exact_search(rows, rows[:2], k, np.array([0, -1]))
    assert [sorted(line) for line in found.tolist()] == [[-1, 1, 2], [0, 1, 2]]
    assert scores[found == -1].tolist() == [-np.inf]
    assert kth_scores(rows, rows[:2], k, np.array([0, -1])).tolist() == pytest.approx([-np.inf, 0.6])


def test_no_queries_find_nothing():
    found, scores = exact_search(drawn(20), np.empty((0, 16), np.float32), 5)
    assert found.shape == scores.shape == (0, 5)


def test_search_holds_few_scores_at_once(monkeypatch):
    monkeypatch.setattr(exact, "BLOCK_BYTES", 1 << 18)
    rows = drawn(20_000, 8, seed=3)
    tracemalloc.start()
    try:
        exact_search(rows, rows[:500], 20, np.arange(500))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # a block's scores take 256 KB, sorting the first in ten times that; all scores would take 40 MB
    assert peak < 8 << 20


def test_whoever_watches_sees_every_block_once(monkeypatch):
    monkeypatch.setattr(exact, "BLOCK_BYTES", 4 * 2 * 40)  # two queries' scores with forty rows
    seen = []

    def watch(starts):
        for start in starts:
            seen.append(start)
            yield start

    kth_scores(drawn(100), drawn(2), 5, watch=watch)
    assert seen == [0, 40, 80]


@pytest.mark.parametrize("block", [1, 32, 1 << 20])
def test_scores_of_what_was_found_are_the_float32_rows(monkeypatch, block):
    monkeypatch.setattr(exact, "BLOCK_BYTES", block)
    rows = np.array([[1, 0], [0.6, 0.8], [0, 1]], np.float32)
    queries = np.array([[1, 0], [0, 1]], np.float32)
    scores = exact_scores(rows, queries, np.array([[1, 0], [1, -1]]))
    np.testing.assert_allclose(scores, [[0.6, 1.0], [0.8, -np.inf]])


def test_scores_are_computed_a_block_of_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(exact, "BLOCK_BYTES", 1 << 18)
    rows, queries = drawn(100, 64), drawn(2000, 64)
    found = np.tile(np.arange(50), (2000, 1))
    tracemalloc.start()
    try:
        exact_scores(rows, queries, found)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20  # the scores are 400 KB; the rows of all answers at once would take 26 MB


# What of the answers counts


def test_the_own_row_and_what_stands_behind_the_first_k_others_does_not_count():
    found = np.array([[5, 1, 2], [1, 5, 2], [1, -1, 2], [3, 1, 2]])
    kept = first_others(found, np.array([5, 5, -1, -1]), 2)
    assert kept.tolist() == [[-1, 1, 2], [1, -1, 2], [1, -1, 2], [3, 1, -1]]


def test_a_row_that_is_given_twice_takes_two_of_the_places():
    assert first_others(np.array([[7, 7, 8]]), np.array([-1]), 2).tolist() == [[7, 7, -1]]


# Recall


def test_the_other_of_two_equal_rows_is_no_loss():
    # rows 8 and 9 hold the same text; exact search took 8 as its third, the index 9
    assert recall_at_k(np.array([3, 5, 9]), np.array([0.9, 0.8, 0.7]), kth=0.7, k=3) == 1.0


def test_more_equal_rows_than_places_are_one_full_answer():
    assert recall_at_k(np.array([8, 9, 3]), np.array([1.0, 1.0, 1.0]), kth=1.0, k=2) == 1.0


def test_a_row_returned_twice_counts_once():
    assert recall_at_k(np.array([3, 3, 5]), np.array([0.9, 0.9, 0.8]), kth=0.7, k=3) == pytest.approx(2 / 3)


def test_a_farther_row_is_a_loss():
    assert recall_at_k(np.array([3, 4]), np.array([0.9, 0.69]), kth=0.7, k=2) == 0.5


def test_what_another_order_of_adding_up_makes_of_a_score_is_no_loss():
    kth = np.float32(0.7)
    assert recall_at_k(np.array([3]), np.array([kth - np.float32(2e-7)]), kth, k=1) == 1.0
    assert recall_at_k(np.array([3]), np.array([kth - np.float32(2e-6)]), kth, k=1) == 0.0


def test_many_queries_have_their_recall_at_once_each_with_its_own_k():
    found = np.array([[3, 4], [3, 3], [-1, -1]])
    scores = np.array([[0.9, 0.8], [0.9, 0.9], [-np.inf, -np.inf]])
    shares = recall_at_k(found, scores, np.array([0.8, 0.8, 0.8]), np.array([2, 2, 0]))
    assert shares.tolist() == [1.0, 0.5, 1.0]  # of nothing to find all is found


def test_random_answers_agree_with_the_overlap_of_row_numbers():
    rng = np.random.default_rng(4)
    scores = drawn(300, 8) @ drawn(1, 8, seed=1)[0]
    best = np.argsort(-scores)
    found = rng.choice(best[:20], 10, replace=False)
    overlap = len(set(best[:10].tolist()) & set(found.tolist()))
    assert recall_at_k(found, scores[found], scores[best[9]], 10) == overlap / 10
