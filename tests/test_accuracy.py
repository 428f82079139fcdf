"""Ranks over a pool, with ties and without the anchor's own document."""

import numpy as np
import pandas as pd
import pytest

from pipeline.accuracy import MEASURES, Placed, bands, dot_scores, place


def pairs(*rows: tuple[int, int, int]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["query", "own", "positive"])


def given(*scores: list[float]):
    """A system whose scores are these, one list a query."""
    return lambda rows: np.array(scores, np.float32)[rows]


def hits(placed, *cutoffs: int) -> list[float]:
    return [float(placed.expected(np.ones(k))[0]) for k in cutoffs]


def test_a_positive_is_found_from_its_rank_on():
    placed = place(given([0.9, 0.2, 0.5, 0.7]), pairs((0, -1, 2)), 4)  # third of four
    assert hits(placed, 1, 2, 3, 4) == [0, 0, 1, 1]


def test_the_anchors_own_document_takes_no_place():
    placed = place(given([0.9, 0.2, 0.5, 0.7]), pairs((0, 0, 2)), 4)
    assert hits(placed, 1, 2) == [0, 1]


def test_ties_count_as_the_chance_of_a_shuffle():
    # one document before it, two others tied with it: places 2, 3 or 4
    placed = place(given([0.9, 0.5, 0.5, 0.5, 0.1]), pairs((0, -1, 2)), 5)
    assert hits(placed, 1, 2, 3, 4) == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_the_order_of_tied_documents_in_the_file_changes_nothing():
    scores = given([0.5, 0.5, 0.5])
    placed = place(scores, pairs((0, -1, 0), (0, -1, 2)), 3)
    assert placed.expected(np.ones(1)).tolist() == pytest.approx([1 / 3, 1 / 3])


def test_an_own_document_that_ties_is_left_out_too():
    placed = place(given([0.5, 0.5, 0.1]), pairs((0, 0, 1)), 3)
    assert hits(placed, 1) == [1]


def test_no_word_in_common_is_not_found_however_long_the_list():
    scores = given([0.0, 0.0, 3.0])
    placed = place(scores, pairs((0, -1, 0), (0, -1, 2)), 3, needs_a_match=True)
    assert placed.expected(np.ones(100)).tolist() == [0, 1]


def test_negative_dot_products_are_ranked_like_others():
    placed = place(given([-0.2, -0.1, -0.3]), pairs((0, -1, 0)), 3)
    assert hits(placed, 1, 2) == [0, 1]


def test_a_rank_counts_as_its_measure_says():
    # ranks 1, 3, 10 and 11
    placed = Placed(np.array([0, 2, 9, 10]), np.zeros(4, int))
    assert placed.expected(MEASURES["mrr_at_10"]).tolist() == pytest.approx([1, 1 / 3, 1 / 10, 0])
    # 1 / log2(rank + 1): log2 of 2, 4 and 11
    wanted = [1, 1 / 2, 1 / np.log2(11), 0]
    assert placed.expected(MEASURES["ndcg_at_10"]).tolist() == pytest.approx(wanted)


def test_a_tie_counts_the_mean_of_its_ranks():
    # rank 1, 2 or 3, and rank 10 or 11
    placed = Placed(np.array([0, 9]), np.array([2, 1]))
    wanted = [(1 + 1 / 2 + 1 / 3) / 3, (1 / 10 + 0) / 2]
    assert placed.expected(MEASURES["mrr_at_10"]).tolist() == pytest.approx(wanted)


def test_what_is_never_found_counts_nothing():
    placed = place(given([0.0, 1.0]), pairs((0, -1, 0)), 2, needs_a_match=True)
    assert [placed.expected(gains)[0] for gains in MEASURES.values()] == [0] * len(MEASURES)


def test_bands_are_thirds_of_the_pairs_and_what_is_new():
    # six pairs whose positives are known: two a third; equally popular ones stay together
    assert bands(np.array([9, 8, 5, 4, 2, 1, 0])).tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert bands(np.array([7, 7, 7, 0])).tolist() == [0, 0, 0, 3]
    assert bands(np.array([0, 0])).tolist() == [3, 3]


@pytest.mark.parametrize("block_bytes", [1, 4096, 1 << 26])
def test_blocks_of_any_size_rank_as_a_full_sort_does(monkeypatch, block_bytes):
    monkeypatch.setattr("pipeline.accuracy.BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng(5)
    queries, documents = rng.standard_normal((30, 8)), rng.standard_normal((200, 8))
    held_out = pairs(
        *[(q, q, int(p)) for q in range(30) for p in rng.choice(range(30, 200), 4, replace=False)]
    )
    placed = place(dot_scores(queries, documents), held_out, 200)
    for row, (query, own, positive) in enumerate(held_out.to_numpy()):
        order = [d for d in np.argsort(-(documents @ queries[query])) if d != own]
        assert placed.higher[row] == order.index(positive)
