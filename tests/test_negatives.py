"""What each strategy draws, against plain Python and against the frequencies that it promises."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import co_reading
from pipeline.co_reading import CoReading
from pipeline.hashing import mix
from pipeline.negatives import (
    NONE,
    UNIT,
    AskedPairs,
    Candidates,
    Popularity,
    assign,
    choose,
    draw_bm25,
    draw_cross_user,
    draw_mined,
    draw_random,
)

HASHES = mix(np.arange(40_000, dtype=np.uint64))  # as good as random, and the same in every run
ALL = 2**64 - 1


def asked(*rows: tuple[int, int, int, int]) -> AskedPairs:
    """(key, user, anchor, positive) of each pair."""
    key, user, anchor, positive = zip(*rows, strict=True) if rows else ((), (), (), ())
    return AskedPairs(
        np.array(key, np.uint64),
        np.array(user, np.uint64),
        np.array(anchor, np.int32),
        np.array(positive, np.int32),
    )


def alike(n: int, user: int = 1, anchor: int = 0, positive: int = 1) -> AskedPairs:
    """n pairs that differ in their keys alone."""
    return AskedPairs(
        HASHES[:n], np.full(n, user, np.uint64), np.full(n, anchor, np.int32), np.full(n, positive, np.int32)
    )


def met_of(together: list[tuple[int, int]], n_documents: int) -> CoReading:
    a, b = np.array(together, np.int32).reshape(-1, 2).T
    keys = co_reading.distinct(co_reading.pair_keys(a, b))
    limits = co_reading.bounds(2, n_documents)
    long = np.empty(0, co_reading.LONG)
    return CoReading.of(co_reading.by_range(keys, limits), limits, long, n_documents)


def candidates_of(of_anchor: list[list[tuple[int, float]]]) -> Candidates:
    """(document, score) of each anchor, best first."""
    first = np.cumsum([0, *map(len, of_anchor)])
    flat = [found for per_anchor in of_anchor for found in per_anchor]
    document, score = [d for d, _ in flat], [s for _, s in flat]
    return Candidates(first, np.array(document, np.int32), np.array(score, np.float32))


def as_often(count: int, n: int, share: float) -> bool:
    """Within four standard deviations of a binomial."""
    return abs(count - n * share) <= 4 * math.sqrt(n * share * (1 - share))


# --- Popularity -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exponent", "quarters"),
    [(1.0, [1, 1, 4, 4]), (0.0, [2, 2, 4, 4])],  # 1, 0, 3 and 0 events; then every read one alike
)
def test_popularity_is_summed_up_to_one(exponent, quarters):
    popularity = Popularity(np.array([1, 0, 3, 0]), np.zeros(4, np.uint64))
    assert popularity.cumulative(exponent).tolist() == [n * int(UNIT) // 4 for n in quarters]


def test_where_nothing_was_read_nothing_is_popular():
    assert Popularity(np.zeros(3, np.int64), np.zeros(3, np.uint64)).cumulative(1.0).tolist() == [0, 0, 0]


# --- One strategy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_cross_user_draws_as_often_as_a_document_is_popular(exponent):
    n_events = [4, 0, 25, 100, 1, 9]
    draw = draw_cross_user(Popularity(np.array(n_events), np.zeros(6, np.uint64)), exponent)
    drawn = Counter(draw(alike(len(HASHES)), HASHES).tolist())
    weights = [n**exponent if n else 0 for n in n_events]
    for document, weight in enumerate(weights):
        assert as_often(drawn[document], len(HASHES), weight / sum(weights)), document


def test_cross_user_leaves_out_what_only_the_same_user_read():
    # user 1 alone read document 0, user 2 alone document 1, several document 2
    draw = draw_cross_user(Popularity(np.array([1, 1, 1]), np.array([1, 2, 0], np.uint64)), 1.0)
    assert set(draw(alike(200, user=1), HASHES[:200]).tolist()) == {NONE, 1, 2}
    assert set(draw(alike(200, user=2), HASHES[:200]).tolist()) == {NONE, 0, 2}
    assert set(draw(alike(200, user=3), HASHES[:200]).tolist()) == {0, 1, 2}


def test_the_smallest_and_the_largest_hash_draw_a_document_that_was_read():
    draw = draw_cross_user(Popularity(np.array([0, 5, 2, 0]), np.zeros(4, np.uint64)), 1.0)
    assert draw(alike(2), np.array([0, ALL], np.uint64)).tolist() == [1, 2]


def test_cross_user_has_nothing_where_nothing_was_read():
    draw = draw_cross_user(Popularity(np.zeros(3, np.int64), np.zeros(3, np.uint64)), 1.0)
    assert draw(alike(2), HASHES[:2]).tolist() == [NONE, NONE]


def test_random_draws_every_document_as_often():
    drawn = Counter(draw_random(8)(alike(len(HASHES)), HASHES).tolist())
    assert sorted(drawn) == list(range(8))
    assert all(as_often(count, len(HASHES), 1 / 8) for count in drawn.values())


def test_bm25_draws_every_candidate_of_the_anchor_as_often():
    draw = draw_bm25(candidates_of([[(7, 3.0)], [(4, 2.0), (9, 1.5), (2, 0.5)], []]))
    drawn = Counter(draw(alike(len(HASHES), anchor=1), HASHES).tolist())
    assert sorted(drawn) == [2, 4, 9]
    assert all(as_often(count, len(HASHES), 1 / 3) for count in drawn.values())
    assert set(draw(alike(50, anchor=0), HASHES[:50]).tolist()) == {7}
    assert set(draw(alike(50, anchor=2), HASHES[:50]).tolist()) == {NONE}


EIGHTHS = st.integers(1, 8).map(lambda n: n / 8)  # exact in float32, as are their products below


@given(
    scores=st.lists(st.lists(EIGHTHS, max_size=6), min_size=1, max_size=4),
    positives=st.lists(
        st.tuples(st.integers(0, 3), st.integers(-8, 8).map(lambda n: n / 8) | st.just(math.nan)), min_size=1
    ),
    ratio=st.sampled_from([0.0, 0.5, 0.75, 1.0]),
)
def test_mined_draws_only_what_is_not_too_near(scores, positives, ratio):
    of_anchor = [
        [(10 * anchor + n, score) for n, score in enumerate(sorted(found, reverse=True))]
        for anchor, found in enumerate(scores)
    ]
    rows = [(n, 0, anchor % len(scores), n) for n, (anchor, _) in enumerate(positives)]
    scored = np.array([score for _, score in positives], np.float32)
    draw = draw_mined(candidates_of(of_anchor), lambda anchors, documents: scored[documents], ratio, 2)
    drawn = draw(asked(*rows), HASHES[: len(rows)]).tolist()
    for (_, _, anchor, n), document in zip(rows, drawn, strict=True):
        # NaN, a positive without a vector: no comparison with it is true
        eligible = [d for d, score in of_anchor[anchor] if score <= ratio * positives[n][1]][:2]
        assert document == (eligible[int(HASHES[n]) % len(eligible)] if eligible else NONE)


# --- Shares ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shares",
    [{"a": 1.0}, {"a": 0.9, "b": 0.1}, {"a": 0.25, "b": 0.5, "c": 0.25}, {"a": 0.5, "b": 0.0, "c": 0.5}],
)
def test_pairs_are_shared_out_as_the_config_says(shares):
    places = Counter(assign(HASHES, shares).tolist())
    for place, share in enumerate(shares.values()):
        assert as_often(places[place], len(HASHES), share)


def test_shares_that_miss_one_by_a_rounding_leave_no_pair_out():
    shares = dict.fromkeys("abcdefghij", 0.1)
    assert sum(shares.values()) != 1.0
    assert set(assign(HASHES, shares).tolist()) == set(range(10))


def test_a_pairs_strategy_is_its_own_affair():
    shares = {"a": 0.3, "b": 0.7}
    np.testing.assert_array_equal(assign(HASHES[::-7], shares), assign(HASHES, shares)[::-7])


# --- All together ---------------------------------------------------------------------------------------

N = 6
ROWS = st.lists(
    st.tuples(st.integers(0, ALL), st.integers(1, 3), st.integers(0, N - 1), st.integers(0, N - 1)),
    max_size=30,
    unique_by=lambda row: row[0],
)
TOGETHER = st.lists(
    st.tuples(st.integers(0, N - 1), st.integers(0, N - 1)).filter(lambda p: p[0] != p[1]), max_size=20
)
SHARES = st.sampled_from(
    [
        {"random": 1.0},
        {"cross_user": 0.5, "bm25": 0.5},
        {"bm25": 0.3, "random": 0.2, "cross_user": 0.5},
        {"mined": 0.6, "bm25": 0.4},
    ]
)
EVENTS, ONLY_READER = [3, 1, 0, 2, 5, 1], [0, 1, 0, 2, 0, 3]
FOUND = [[(3, 1.0), (5, 0.5)], [], [(0, 0.75)], [(1, 0.5), (2, 0.5), (4, 0.25)], [], [(2, 0.125)]]
POSITIVE_SCORE = [1.0, 0.5, 0.25, math.nan, 0.75, 1.0]


def strategies() -> dict:
    return {
        "random": draw_random(N),
        "cross_user": draw_cross_user(Popularity(np.array(EVENTS), np.array(ONLY_READER, np.uint64)), 1.0),
        "bm25": draw_bm25(candidates_of(FOUND)),
        "mined": draw_mined(
            candidates_of(FOUND), lambda a, b: np.array(POSITIVE_SCORE, np.float32)[b], 0.5, n_candidates=2
        ),
    }


def plain_draw(name: str, row: tuple[int, int, int, int], number: int) -> int:
    _, user, anchor, positive = row
    if name == "random":
        return number % N
    if name == "cross_user":
        units = [d for d, n in enumerate(EVENTS) for _ in range(n)]
        document = units[(number >> 11) * len(units) >> 53]
        return NONE if ONLY_READER[document] == user else document
    limit = 0.5 * POSITIVE_SCORE[positive] if name == "mined" else math.inf
    eligible = [d for d, score in FOUND[anchor] if score <= limit][: 2 if name == "mined" else None]
    return eligible[number % len(eligible)] if eligible else NONE


def plain_choice(
    row: tuple[int, int, int, int], shares: dict[str, float], together: set[frozenset[int]], max_draws: int
) -> tuple[int, Counter]:
    """One pair's negative, drawn one at a time: its own strategy first, then the others in their order."""
    key, _, anchor, _ = row
    at = int(mix(np.uint64(key), np.uint64(0))[0]) >> 11
    ends = np.cumsum(list(shares.values())) * 2**53
    own = list(shares)[min(sum(at >= end for end in ends), len(shares) - 1)]
    counts: Counter = Counter()
    for name in [own, *(name for name in shares if name != own)]:
        salt = mix(*(np.uint64(letter) for letter in name.encode()))
        for turn in range(max_draws):
            document = plain_draw(name, row, int(mix(np.uint64(key), salt, np.uint64(turn))[0]))
            if document == NONE:
                continue
            if document == anchor or frozenset((document, anchor)) in together:
                counts[f"refused:{name}"] += 1
                continue
            counts[f"negatives:{name}"] += 1
            return document, counts
    return NONE, counts


@given(ROWS, TOGETHER, SHARES, st.integers(1, 4))
def test_negatives_and_counts_equal_those_drawn_one_by_one(rows, together, shares, max_draws):
    found, counts = choose(asked(*rows), shares, strategies(), met_of(together, N), max_draws)
    pairs_together = {frozenset(pair) for pair in together}
    plain = [plain_choice(row, shares, pairs_together, max_draws) for row in rows]
    assert found.tolist() == [document for document, _ in plain]
    recounted = sum((counted for _, counted in plain), Counter())
    assert counts == {
        f"{kind}:{name}": recounted[f"{kind}:{name}"] for kind in ("negatives", "refused") for name in shares
    }
    assert sum(counts[f"negatives:{name}"] for name in shares) == (found != NONE).sum()


@given(ROWS, TOGETHER, SHARES, st.integers(1, 4), st.randoms(use_true_random=False))
def test_order_and_bundles_of_the_pairs_change_nothing(rows, together, shares, n_bundles, random):
    met = met_of(together, N)
    whole, counts = choose(asked(*rows), shares, strategies(), met, 5)
    shuffled = list(range(len(rows)))
    random.shuffle(shuffled)
    again, sums = {}, Counter()
    for n in range(n_bundles):
        bundle = shuffled[n::n_bundles]
        found, some = choose(asked(*(rows[row] for row in bundle)), shares, strategies(), met, 5)
        again |= dict(zip(bundle, found.tolist(), strict=True))
        sums.update(some)
    assert [again[row] for row in range(len(rows))] == whole.tolist()
    assert sums == counts


def always(document: int):
    return lambda pairs, hashes: np.full(len(pairs), document, np.int32)


def test_a_pair_whose_strategy_finds_none_asks_the_others_in_their_order():
    shares = {"first": 0.4, "second": 0.3, "third": 0.3}
    n_of = Counter(assign(HASHES[:1000], shares).tolist())
    # the second never finds any, so its pairs go to the first, and none to the third
    draws = {"first": always(3), "second": always(NONE), "third": always(4)}
    found, counts = choose(alike(1000), shares, draws, met_of([], 6), 20)
    assert Counter(found.tolist()) == {3: n_of[0] + n_of[1], 4: n_of[2]}
    assert counts["negatives:first"] == n_of[0] + n_of[1]
    assert (counts["negatives:second"], counts["negatives:third"]) == (0, n_of[2])
    # the first's are all refused, so all its pairs and the second's go to the third
    found, counts = choose(alike(1000), shares, draws, met_of([(0, 3)], 6), 20)
    assert Counter(found.tolist()) == {4: 1000}
    assert counts["refused:first"] == 20 * (n_of[0] + n_of[1])


def test_a_pair_that_no_strategy_serves_has_no_negative():
    shares = {"a": 0.5, "b": 0.5}
    found, counts = choose(alike(10), shares, {"a": always(0), "b": always(NONE)}, met_of([], 4), max_draws=3)
    assert set(found.tolist()) == {NONE}
    assert counts == {"negatives:a": 0, "negatives:b": 0, "refused:a": 30, "refused:b": 0}


def test_of_the_documents_not_refused_each_is_drawn_as_often():
    # the anchor is 0, and 1 and 2 were read with it: 3 to 7 remain
    n = len(HASHES)
    found, _ = choose(
        alike(n), {"random": 1.0}, {"random": draw_random(8)}, met_of([(0, 1), (2, 0)], 8), max_draws=100
    )
    drawn = Counter(found.tolist())
    assert sorted(drawn) == [3, 4, 5, 6, 7]
    assert all(as_often(count, n, 1 / 5) for count in drawn.values())


def test_a_document_with_the_anchors_or_the_positives_own_text_is_refused():
    # documents 0 and 3 have one text, and 1 and 4: a pair (0, 1) gets neither
    texts = np.array([0, 1, 2, 0, 1, 5])
    user, anchor, positive = np.full(1000, 7, np.uint64), np.zeros(1000, int), np.ones(1000, int)
    pairs = AskedPairs(HASHES[:1000], user, anchor, positive)
    found, _ = choose(pairs, {"random": 1.0}, {"random": draw_random(6)}, met_of([(0, 1)], 6), 100, texts)
    assert set(found.tolist()) == {2, 5}


def test_another_key_draws_another():
    draws, met = {"random": draw_random(1000)}, met_of([], 1000)
    one, _ = choose(alike(1000), {"random": 1.0}, draws, met, 5)
    others = AskedPairs(HASHES[1000:2000], *(getattr(alike(1000), c) for c in ("user", "anchor", "positive")))
    other, _ = choose(others, {"random": 1.0}, draws, met, 5)
    assert (one == other).sum() < 10  # one in a thousand is the same by chance
