"""Means and intervals over clusters, held against SciPy's bootstrap."""

import numpy as np
import pytest
from scipy import stats

from pipeline.bootstrap import bootstrap, estimate


def test_the_mean_is_over_values_not_over_clusters():
    # one reader with three pairs found, one with one pair missed: 3 of 4
    mean, low, high = bootstrap(np.array([[1.0], [1.0], [1.0], [0.0]]), np.array([0, 0, 0, 1]), 500, seed=7)
    assert mean[0] == 0.75
    assert (low[0], high[0]) == (0.0, 1.0)  # a quarter of the draws have one reader twice


def test_intervals_are_those_of_scipy():
    rng = np.random.default_rng(3)
    clusters = rng.integers(60, size=900)
    clusters[:60] = np.arange(60)
    better = (rng.random(900) < 0.3 + 0.3 * (clusters % 2)).astype(float)
    worse = (rng.random(900) < 0.2).astype(float)
    sums = [np.bincount(clusters, w, 60) for w in (better, worse, np.ones(900))]
    scipys = stats.bootstrap(
        sums,
        lambda a, b, n, axis: (a.sum(axis) - b.sum(axis)) / n.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=10_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    mean, low, high = bootstrap((better - worse)[:, None], clusters, 10_000, seed=1)
    assert mean[0] == pytest.approx((better - worse).mean())
    # both draw 10,000 times: their ends differ by a few hundredths of the interval's width
    width = scipys.high - scipys.low
    assert low[0] == pytest.approx(scipys.low, abs=0.05 * width)
    assert high[0] == pytest.approx(scipys.high, abs=0.05 * width)


def test_values_that_move_together_give_a_narrower_difference():
    reader_luck = np.repeat([0.0, 1.0], 50)[:, None]
    pairs = np.concatenate([reader_luck, reader_luck, reader_luck - reader_luck], axis=1)
    _, low, high = bootstrap(pairs, np.arange(100), 300, seed=7)
    assert (high - low)[0] > 0.1
    assert (high - low)[2] == 0.0


def test_many_clusters_in_blocks_give_an_interval_of_the_known_width(monkeypatch):
    monkeypatch.setattr("pipeline.bootstrap.BLOCK_BYTES", 1 << 16)  # one or two draws at a time
    values = np.tile([0.0, 1.0], 1500)[:, None]
    _, low, high = bootstrap(values, np.arange(3000), 2000, seed=7)
    # the mean of 3,000 fair coins: standard error 0.5 / sqrt(3000), 3.92 of them between the ends
    assert high[0] - low[0] == pytest.approx(3.92 * 0.5 / 3000**0.5, rel=0.1)


def test_one_reader_rules_nothing_out():
    mean, low, high = bootstrap(np.array([[1.0], [0.0]]), np.array([0, 0]), 100, seed=7)
    assert estimate(mean[0], low[0], high[0]) == {"mean": 0.5, "low": 0.0, "high": 1.0}
    assert estimate(mean[0], low[0], high[0], lowest=-1.0)["low"] == -1.0


def test_the_same_seed_gives_the_same_interval():
    values, clusters = np.arange(20.0)[:, None], np.arange(20)
    assert bootstrap(values, clusters, 100, 7) == bootstrap(values, clusters, 100, 7)
    assert bootstrap(values, clusters, 100, 7) != bootstrap(values, clusters, 100, 8)
