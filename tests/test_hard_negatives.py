"""Hard documents: the best by any scores, none of them ever read with its anchor, against plain Python."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import co_reading, hard_negatives
from pipeline.bm25 import bm25_scores, words
from pipeline.co_reading import CoReading
from pipeline.hard_negatives import EarlierEmbeddings, Found

PAIRS = st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(lambda pair: pair[0] != pair[1])


def met_of(together: list[tuple[int, int]], n_documents: int) -> CoReading:
    a, b = np.array(together, np.int32).reshape(-1, 2).T
    keys = co_reading.distinct(co_reading.pair_keys(a, b))
    return CoReading.of([keys], co_reading.bounds(1, n_documents), np.empty(0, co_reading.LONG), n_documents)


def found_by(table: np.ndarray, anchors: list[int], n_wanted: int, together: list) -> Found:
    n_documents = table.shape[1]
    return hard_negatives.best(
        np.array(anchors, np.int32),
        lambda rows: table[rows].copy(),
        n_documents,
        n_wanted,
        met_of(together, n_documents),
    )


def plain_best(
    scores: list[float], anchor: int, n_wanted: int, together: list
) -> tuple[list[tuple[int, int, float]], int]:
    """(anchor, document, score) best first, and how many higher ones were refused."""
    ranked = sorted(range(len(scores)), key=lambda d: (-scores[d], d))
    ranked = [d for d in ranked if d != anchor and scores[d] > 0]
    taken, n_refused = [], 0
    for document in ranked[: 5 * n_wanted]:
        if len(taken) == n_wanted:
            break
        if (anchor, document) in together or (document, anchor) in together:
            n_refused += 1
        else:
            taken.append((anchor, document, scores[document]))
    return taken, n_refused


@given(
    table=st.lists(st.lists(st.integers(-1, 3), min_size=10, max_size=10), min_size=10, max_size=10),
    anchors=st.sets(st.integers(0, 9)),
    n_wanted=st.integers(2, 4),  # five times as many are looked at: all ten
    together=st.lists(PAIRS, max_size=40),
    block_bytes=st.sampled_from([1, 80, 64 << 20]),  # one anchor, two, all at once
)
def test_the_best_equal_those_found_one_by_one(table, anchors, n_wanted, together, block_bytes):
    scores = np.array(table, np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hard_negatives, "BLOCK_BYTES", block_bytes)
        found = found_by(scores, sorted(anchors), n_wanted, together)
    plain = [plain_best(table[anchor], anchor, n_wanted, together) for anchor in sorted(anchors)]
    rows = zip(found.anchor.tolist(), found.document.tolist(), found.score.tolist(), strict=True)
    assert list(rows) == [row for taken, _ in plain for row in taken]
    assert found.n_refused == sum(n_refused for _, n_refused in plain)


@given(st.permutations(range(1, 31)), st.lists(st.integers(1, 29).map(lambda d: (0, d)), max_size=25))
def test_no_more_than_five_times_as_many_as_wanted_are_looked_at(scores, together):
    table = np.array([scores], np.float32)
    taken, n_refused = plain_best([0, *scores[1:]], 0, 2, together)
    table[0, 0] = 0
    found = found_by(table, [0], 2, together)
    assert found.document.tolist() == [document for _, document, _ in taken]
    assert found.n_refused == n_refused


def test_the_first_two_of_a_ranking_by_hand():
    # 3 was read with the anchor 0, 5 scores nothing; 1 and 2 are twins
    table = np.array([[9, 4, 4, 8, 1, 0]], np.float32)
    found = found_by(table, [0], 2, [(3, 0), (4, 0)])
    assert (found.document.tolist(), found.score.tolist()) == ([1, 2], [4.0, 4.0])
    assert found.n_refused == 1  # 4 stands behind the two


def test_more_twins_than_are_looked_at_are_taken_by_their_rows():
    table = np.full((1, 3000), 0.5, np.float32)
    table[0, 2000] = 1
    assert found_by(table, [0], 4, []).document.tolist() == [2000, 1, 2, 3]


def test_an_anchor_that_shares_nothing_has_no_candidate():
    found = found_by(np.zeros((3, 3), np.float32), [0, 2], 5, [])
    assert (len(found.anchor), found.n_refused) == (0, 0)


TEXT = st.lists(st.sampled_from(["ape", "bee", "cat", "dog"]), max_size=3).map(" ".join)


@given(st.lists(TEXT, min_size=10, max_size=10), st.lists(PAIRS, max_size=20))
@settings(deadline=None)  # the first case imports bm25s
def test_a_bm25_candidate_shares_a_word_with_its_anchor_and_no_session(texts, together):
    met = met_of(together, 10)
    found = hard_negatives.best(np.arange(10, dtype=np.int32), bm25_scores(texts, texts), 10, 10, met)
    pairs = {frozenset(pair) for pair in together}
    expected = {
        (a, b)
        for a in range(10)
        for b in range(10)
        if a != b and frozenset((a, b)) not in pairs and set(words(texts[a])) & set(words(texts[b]))
    }
    assert set(zip(found.anchor.tolist(), found.document.tolist(), strict=True)) == expected
    assert (found.score > 0).all()


def test_candidates_are_looked_up_by_their_anchor():
    one = Found(np.array([1, 1], np.int32), np.array([4, 0], np.int32), np.array([2, 1], np.float32), 0)
    other = Found(np.array([3], np.int32), np.array([2], np.int32), np.array([5], np.float32), 0)
    found = hard_negatives.by_anchor([one, other], 5)
    assert found.first.tolist() == [0, 0, 2, 2, 3, 3]
    assert (found.document.tolist(), found.score.tolist()) == ([4, 0, 2], [2.0, 1.0, 5.0])
    assert hard_negatives.by_anchor([], 2).first.tolist() == [0, 0, 0]


# --- An earlier run's embeddings ------------------------------------------------------------------------

# This run's documents 0 to 3; the earlier one had 2, 0 and 3, in that order, and not 1.
EARLIER = EarlierEmbeddings(
    np.array([[1, 0], [0.6, 0.8], [0, 1]], np.float32), np.array([1, -1, 0, 2])
)  # fmt: skip


def test_scores_are_dot_products_and_nothing_where_there_is_no_vector():
    expected = [[1.0, 0, 0.6, 0.8], [0, 0, 0, 0], [0.8, 0, 0, 1.0]]
    np.testing.assert_allclose(EARLIER.scores(np.array([0, 1, 3])), expected, rtol=1e-6)


def test_a_pair_without_two_vectors_has_no_score():
    score = EARLIER.score(np.array([0, 0, 1, 1, 3]), np.array([2, 1, 2, 1, 3]))
    np.testing.assert_allclose(score, [0.6, np.nan, np.nan, np.nan, 1.0], rtol=1e-6)


def test_scores_are_the_same_behind_the_first_block_and_from_disk(tmp_path):
    np.save(tmp_path / "embeddings.npy", EARLIER.matrix)
    mapped = EarlierEmbeddings(np.load(tmp_path / "embeddings.npy", mmap_mode="r"), EARLIER.row_of)
    n = 70_000  # more than are scored at once
    score = mapped.score(np.zeros(n, np.int32), np.full(n, 2, np.int32))
    np.testing.assert_allclose(score, np.full(n, 0.6), rtol=1e-6)
