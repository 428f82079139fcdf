"""Means with intervals by a bootstrap over whole clusters: all pairs of a reader, or one query."""

import numpy as np

BLOCK_BYTES = 64 << 20  # of drawn clusters at once


def bootstrap(
    values: np.ndarray, clusters: np.ndarray, n_draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means and their 95 % percentile intervals, by drawing whole clusters with replacement.

    A draw of clusters enters a ratio of sums only by how often each cluster was drawn, so one matrix
    product gives every figure of a whole block of draws. `scipy.stats.bootstrap` gives the same intervals
    (a test holds them together), but gathers every column again for every draw.

    Args:
        values: float (n, m).
        clusters: int (n,), 0 to n_clusters - 1, each present.

    Returns:
        mean, low, high, each (m,). low and high are nan where there is one cluster only: nothing to draw.
    """
    n_clusters = int(clusters.max()) + 1
    table = np.empty((n_clusters, values.shape[1] + 1))
    for column in range(values.shape[1]):
        table[:, column] = np.bincount(clusters, values[:, column], n_clusters)
    table[:, -1] = np.bincount(clusters, minlength=n_clusters)
    mean = table[:, :-1].sum(axis=0) / table[:, -1].sum()
    if n_clusters == 1:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    rng = np.random.default_rng(seed)
    size = max(1, BLOCK_BYTES // (16 * n_clusters))
    drawn = []
    for start in range(0, n_draws, size):
        n = min(size, n_draws - start)
        picks = rng.integers(n_clusters, size=(n, n_clusters)) + n_clusters * np.arange(n)[:, None]
        times = np.bincount(picks.ravel(), minlength=n * n_clusters).reshape(n, n_clusters)
        sums = times.astype(np.float64) @ table
        drawn.append(sums[:, :-1] / sums[:, -1:])
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5], axis=0)
    return mean, low, high


def estimate(mean: float, low: float, high: float, lowest: float = 0.0) -> dict[str, float]:
    """A share, or a difference of shares, with its interval, for JSON.

    Where one cluster gave no interval it is the widest there can be: nothing is ruled out.
    """
    low, high = (lowest, 1.0) if np.isnan(low) else (low, high)
    return {"mean": number(mean), "low": number(low), "high": number(high)}


def number(value: float) -> float:
    """A figure for JSON: six decimals."""
    return round(float(value), 6)
