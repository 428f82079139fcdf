"""Tuning to a recall contract: recall by hand, and searches over callables whose costs a reader can check."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import tuning
from pipeline.tuning import Answers, Build, Judge, Queries, Record, Search, Trial


def unit_rows(n, dim=8, seed=0):
    rows = np.random.default_rng(seed).normal(size=(n, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def queries_of(vectors, own=None):
    vectors = np.array(vectors, np.float32)
    own = np.full(len(vectors), -1) if own is None else np.array(own)
    return Queries(np.arange(len(vectors), dtype=np.int32), vectors, own.astype(np.int32))


def measured_by(low):
    """Measures a setting by a function of leaves and candidates, and keeps what it was asked."""
    asked = []

    def measure(search):
        asked.append(search)
        value = low(search.num_leaves_to_search, search.num_reordering_candidates)
        return Record(search, "typed", value, value)

    return measure, asked


def settings_of(records):
    return [(r.search.num_leaves_to_search, r.search.num_reordering_candidates) for r in records]


# Recall


def test_the_first_few_queries_of_a_kind_can_be_judged_alone():
    judge = Judge(ROWS, {"typed": queries_of([[1, 0]] * 50 + [[0, 1]] * 50)}, k=1, target=0.9)
    assert judge.recalls("typed", np.array([[0], [1]])).tolist() == [1.0, 0.0]  # row 0 is the nearest


def test_one_own_row_in_a_sample_lends_the_other_queries_no_further_answer():
    # Exact: row 0; for the first query, whose own it is, row 1.
    queries = queries_of([[1, 0]] * 100, own=[0] + [-1] * 99)
    judge = Judge(ROWS, {"document": queries}, k=1, target=0.9)
    assert judge.record(found_by([1, 0])[0], Search(1, 1)).recall == pytest.approx(0.01)  # the first alone


def test_the_lower_bound_is_below_the_mean_and_nears_it_with_more_queries():
    few, many = ([0.9, 1.0] * n for n in (50, 5000))
    assert tuning.lower_bound(np.array(few)) < tuning.lower_bound(np.array(many)) < 0.95
    assert tuning.lower_bound(np.array(many)) == pytest.approx(0.95, abs=0.003)


def test_a_handful_of_perfect_queries_proves_nothing():
    assert tuning.lower_bound(np.ones(10)) < 0.9
    assert tuning.lower_bound(np.ones(1000)) > 0.99
    assert not tuning.can_prove(10, 0.9)
    assert tuning.can_prove(1000, 0.99)


@pytest.mark.parametrize("n", [0, 3])
def test_no_recall_at_all_has_a_bound_of_nought(n):
    assert tuning.lower_bound(np.zeros(n)) == 0.0


ROWS = np.array([[1, 0], [0.96, 0.28], [0.8, 0.6], [0, 1]], np.float32)  # ever farther from the first


def found_by(rows_of):
    """Answers the same rows to every query, with scores that mean nothing; keeps what was asked for."""
    asked = []

    def ask(vectors, k, search):
        asked.append(k)
        rows = np.tile(np.array(rows_of[:k], np.int32), (len(vectors), 1))
        return Answers(rows, np.full(rows.shape, 9.0, np.float32))

    return ask, asked


def test_the_kind_that_is_served_worst_judges_a_setting():
    by_kind = {
        "document": queries_of([[1, 0]] * 200, own=[0] * 200),  # exact: rows 1 and 2
        "typed": queries_of([[1, 0]] * 200),  # exact: rows 0 and 1
    }
    judge = Judge(ROWS, by_kind, k=2, target=0.9)
    ask, asked = found_by([0, 1, 3])
    record = judge.record(ask, Search(1, 2))
    assert (record.kind, record.recall) == ("document", 0.5)  # row 0 is its own, 3 is none of the best
    assert sorted(asked) == [2, 3]  # the own document is asked for on top, where there is one


def test_a_kind_with_too_few_queries_is_not_judged_by():
    by_kind = {"typed": queries_of([[1, 0]] * 200), "logged": queries_of([[0, 1]] * 5)}
    judge = Judge(ROWS, by_kind, k=1, target=0.9)
    assert (list(judge.by_kind), judge.too_few) == (["typed"], {"logged": 5})


def test_k_is_what_a_query_can_find_at_most():
    judge = Judge(ROWS, {"document": queries_of([[1, 0]] * 200, own=[0] * 200)}, k=10, target=0.9)
    assert judge.k == 3
    record = judge.record(found_by([0, 1, 2, 3])[0], Search(1, 10))
    assert record.recall == 1.0


# Search settings


@given(st.integers(1, 3000), st.data())
def test_fewest_finds_the_first_number_that_meets(most, data):
    first, begin = data.draw(st.integers(1, most)), data.draw(st.integers(1, most))
    asked = []

    def value(n):
        asked.append(n)
        return float(n >= first)

    assert tuning.fewest(value, 0.9, most, begin) == first
    assert max(asked) <= most
    assert len(asked) <= 2 * np.ceil(np.log2(most + 1)) + 1


def test_fewest_says_none_where_all_do_not_meet():
    assert tuning.fewest(lambda n: 0.0, 0.9, 7) is None


def test_fewest_does_not_search_all_leaves_where_recall_has_levelled_off_too_low():
    asked = []

    def value(n):
        asked.append(n)
        return min(0.8, n / 10)

    assert tuning.fewest(value, 0.9, 1 << 20) is None
    assert max(asked) == 16  # 8 gives 0.8, and 16 no more


def test_more_candidates_are_tried_until_they_save_no_leaves():
    measure, asked = measured_by(lambda leaves, candidates: min(1.0, leaves * candidates / 100))
    explored = tuning.explore(measure, 0.9, leaves=[1, 64], candidates=[10, 30, 50, 100, 200, 400])
    assert settings_of(explored.met) == [(9, 10), (3, 30), (2, 50), (1, 100)]
    assert max(search.num_reordering_candidates for search in asked) == 100  # one leaf is the least
    assert len(asked) == len(set(asked))


def test_too_few_candidates_are_given_up_and_equal_ones_end_the_search():
    ceiling = {10: 0.8, 30: 0.96, 50: 1.0, 100: 1.0}
    measure, asked = measured_by(lambda leaves, candidates: min(leaves / 10, ceiling[candidates]))
    explored = tuning.explore(measure, 0.9, leaves=[1, 64], candidates=list(ceiling))
    assert settings_of(explored.met) == [(9, 30)]  # 50 save no leaf
    assert 100 not in {search.num_reordering_candidates for search in asked}


def test_a_target_beyond_the_index_is_told_by_the_best_that_was_tried():
    measure, _ = measured_by(lambda leaves, candidates: min(0.97, leaves / 10))
    explored = tuning.explore(measure, 0.99, leaves=[1, 20], candidates=[10, 30, 50, 100])
    assert explored.met == ()
    best = explored.best()
    assert (best.low, best.search) == (0.97, Search(16, 10))  # the first with as much, not all 20 leaves


def test_all_leaves_are_tried_before_a_target_is_given_up():
    def low(leaves, candidates):
        return {1: 0.6, 2: 0.7, 4: 0.701, 8: 0.701, 16: 1.0}[leaves]  # it only seems to level off at 4

    explored = tuning.explore(measured_by(low)[0], 0.9, leaves=[1, 16], candidates=[10])
    assert settings_of(explored.met) == [(16, 10)]


def test_given_leaves_are_not_explored():
    measure, asked = measured_by(lambda leaves, candidates: candidates / 100)
    explored = tuning.explore(measure, 0.9, leaves=[7], candidates=[10, 50, 100, 200])
    assert settings_of(explored.met) == [(7, 100)]
    assert {search.num_leaves_to_search for search in asked} == {7}


def test_leaves_and_candidates_that_are_both_given_are_measured_once():
    measure, asked = measured_by(lambda leaves, candidates: 0.5)
    explored = tuning.explore(measure, 0.9, leaves=[7], candidates=[10])
    assert asked == [Search(7, 10)]
    assert explored.best().search == Search(7, 10)


def test_the_frontier_goes_on_beyond_the_target_until_all_is_found():
    measure, asked = measured_by(lambda leaves, candidates: 1 - 0.1 / leaves)
    explored = tuning.explore(measure, 0.95, leaves=[1, 1024], candidates=[10, 30], upwards=True)
    assert settings_of(explored.met) == [(2, 10)]
    assert max(search.num_leaves_to_search for search in asked) == 128  # 64 find 0.9984, 128 find 0.9992


def test_candidates_begin_with_k_and_end_with_the_limit():
    assert tuning.candidates_to_try(10, 200) == [10, 30, 50, 100, 200]
    assert tuning.candidates_to_try(300, 1000) == [300, 400, 800]
    assert tuning.candidates_to_try(2000, 1000) == [2000]


def test_a_setting_that_costs_more_and_finds_no_more_is_not_worth_timing():
    records = [
        Record(Search(leaves, candidates), "typed", recall, recall)
        for leaves, candidates, recall in [
            (1, 10, 0.5),
            (2, 10, 0.7),
            (2, 30, 0.7),
            (4, 30, 0.6),
            (4, 10, 0.8),
        ]
    ]
    assert settings_of(tuning.undominated(records)) == [(1, 10), (2, 10), (4, 10)]


def test_the_frontier_holds_what_none_is_faster_and_better_than():
    #         faster, worse; best; as good but slower; as fast but worse
    points = [(0.8, 200.0), (0.9, 100.0), (0.9, 90.0), (0.7, 200.0)]
    assert tuning.pareto(points) == [0, 1]


def test_equal_points_are_both_on_the_frontier():
    assert tuning.pareto([(0.9, 100.0), (0.9, 100.0)]) == [0, 1]


def test_a_spread_keeps_both_ends_and_even_steps():
    assert tuning.spread([0.0, 0.1, 0.5, 0.6, 1.0], 3) == [0, 2, 4]
    assert tuning.spread([0.2, 0.3], 3) == [0, 1]


# Time


class Clock:
    """Stands still but for what is said to pass."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_slow_turn_does_not_decide_and_the_first_is_not_counted():
    clock = Clock()
    turns = {"a": iter([99, 2, 2, 50, 2, 2]), "b": iter([1, 3, 3, 50, 3, 3])}  # the fourth is slow for both
    order = []

    def call_of(name):
        def call():
            order.append(name)
            clock.now += next(turns[name])
            return 10

        return call

    seconds = tuning.seconds_each([call_of("a"), call_of("b")], turns=5, clock=clock)
    assert seconds == [0.2, 0.3]  # a query: 2 and 3 seconds for ten
    assert order == ["a", "b"] * 6


# Builds


def trial_of(build, n_rows, qps=None, recall=0.95, mib=1.0, fits=True):
    return Trial(build, n_rows, recall, qps, mib, fits)


def test_a_third_of_the_builds_goes_on_and_the_fastest_of_the_last_wins():
    builds = [Build(leaves) for leaves in (1, 2, 3, 4, 5, 6)]
    rounds = []

    def try_on(these, n_rows):
        rounds.append((n_rows, [build.num_leaves for build in these]))
        return [
            trial_of(b, n_rows, qps=100.0 * b.num_leaves if n_rows < 900 else 1.0 / b.num_leaves)
            for b in these
        ]

    best, trials = tuning.halve(builds, [300, 900], try_on)
    assert rounds == [(300, [1, 2, 3, 4, 5, 6]), (900, [6, 5])]
    assert best == Build(5)
    assert [(t.n_rows, t.build.num_leaves) for t in trials if t.kept] == [(300, 6), (300, 5), (900, 5)]
    assert len(trials) == 8


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"qps": 10.0}, {"qps": 9.0, "recall": 1.0}),  # both meet the target: speed
        ({"qps": 1.0, "recall": 0.95}, {"recall": 0.99}),  # one does not meet it
        ({"recall": 0.9}, {"recall": 0.8}),  # none does: recall
        ({"recall": 0.1}, {"qps": 9.0, "mib": 9.0, "fits": False}),  # one takes too much memory
        ({"mib": 8.0, "fits": False}, {"qps": 9.0, "mib": 9.0, "fits": False}),  # both do: the smaller
    ],
)
def test_what_makes_a_build_the_better_one(better, worse):
    def try_on(these, n_rows):
        return [trial_of(Build(1), n_rows, **worse), trial_of(Build(2), n_rows, **better)]

    assert tuning.halve([Build(1), Build(2)], [100], try_on)[0] == Build(2)


def test_many_builds_are_first_tried_on_a_third_of_the_rows():
    assert tuning.sample_sizes(90_000, 12) == [30_000, 90_000]
    assert tuning.sample_sizes(90_000, 3) == [90_000]
    assert tuning.sample_sizes(9977, 12) == [9977]  # a third would make too few leaves


@pytest.mark.parametrize(("dim", "threshold"), [(384, 0.0882), (100, 0.1715), (768, 0.0624), (8, 0.5477)])
def test_the_threshold_keeps_the_penalty_ratio_at_any_width(dim, threshold):
    assert tuning.threshold_for(dim) == threshold
    t2 = threshold**2
    assert (dim - 1) * t2 / (1 - t2) == pytest.approx(3, rel=0.01)
