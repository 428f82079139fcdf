"""Trials of build settings on samples of the documents, which decide what is built over all of them."""

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipeline import tuning
from pipeline.chatter import without_chatter
from pipeline.config import IndexConfig
from pipeline.index_settings import (
    Settings,
    builds_to_try,
    candidates_of,
    leaves_of,
    leaves_to_try,
    memory_warning,
    served_mib,
)
from pipeline.layers import Layer, as_ask, asking, fastest, say, train, tuned_layer
from pipeline.tuning import Build, Judge, Queries, Record, Trial

MIN_TRIAL_ROWS = 5000  # of fewer documents builds cannot be told apart
N_TRIAL_QUERIES = 500  # dev queries of each kind that builds are tried with


def try_builds(
    config: IndexConfig,
    settings: Settings,
    matrix: np.ndarray,
    dev: Mapping[str, Queries],
    scratch: Path,
) -> tuple[Settings, list[Trial], Any]:
    """The best of several builds, tried on samples, as settings; its assets where it was one of all rows."""
    builds = builds_to_try(config, *matrix.shape)
    if len(builds) == 1 or len(matrix) < MIN_TRIAL_ROWS:
        return settings, [], None
    bench = Bench(config, settings, matrix, dev, scratch)
    if not bench.dev:
        say(
            f"{len(builds)} builds are not told apart, the likeliest is made: no dev queries, or too few to "
            f"prove index.target_recall = {config.target_recall:g}"
        )
        return settings, [], None
    sizes = tuning.sample_sizes(min(config.n_tuning_rows, len(matrix)), len(builds))
    best, trials = tuning.halve(builds, sizes, bench.try_on)
    say(f"chosen: {words_of(best)}")
    if line := memory_warning(config, next(t.memory_mib for t in reversed(trials) if t.kept)):
        say(line)
    return settings.with_build(best), trials, bench.of_all.get(tree_of(best))


@dataclasses.dataclass(frozen=True)
class Tried:
    """A build of a sample, while it is there to be timed."""

    build: Build
    layer: Layer | None  # None where it does not meet the target: there is nothing to time
    record: Record  # at its cheapest setting
    memory_mib: float  # of all documents


class Bench:
    """Tries builds on samples of the documents: the same sample and queries for all, timed in turns.

    Attributes:
        dev: dev queries by kind, those kinds of which there are enough to prove the target.
        of_all: {tree: assets} of what was trained on all rows.
    """

    def __init__(
        self,
        config: IndexConfig,
        settings: Settings,
        matrix: np.ndarray,
        dev: Mapping[str, Queries],
        scratch: Path,
    ) -> None:
        self.config, self.settings, self.matrix, self.scratch = config, settings, matrix, scratch
        # A high target takes more queries to prove: then all of them are asked.
        n = N_TRIAL_QUERIES if tuning.can_prove(N_TRIAL_QUERIES, config.target_recall) else None
        some = {kind: queries.part(slice(n)) for kind, queries in dev.items()}
        self.dev = {k: q for k, q in some.items() if tuning.can_prove(len(q.rows), config.target_recall)}
        self.of_all: dict[Build, Any] = {}

    def try_on(self, builds: Sequence[Build], n_rows: int) -> list[Trial]:
        """A trial of each, on one sample; no layer of them outlives this."""
        trials = self.round_of(builds, n_rows)
        gc.collect()  # a layer and its graph refer to each other, and hold the rows
        return trials

    def round_of(self, builds: Sequence[Build], n_rows: int) -> list[Trial]:
        """Each tree is trained once, and ways to store rows are tried on it."""
        say(f"trying {len(builds)} builds on {n_rows:,} of {len(self.matrix):,} documents")
        rows, own_of = self.sample(n_rows)
        dev = {kind: dataclasses.replace(q, own=own_of(q.own)) for kind, q in self.dev.items()}
        judge = Judge(rows, dev, self.config.k, self.config.target_recall)
        tried: list[Tried] = []
        with tqdm(total=len(builds), desc="index: builds", unit="build", leave=False) as bar:
            for tree, stored in by_tree(builds).items():
                assets = train(self.config, self.scaled(tree, n_rows), rows, self.scratch)
                if n_rows == len(self.matrix):
                    self.of_all[tree] = assets
                for build in stored:
                    tried.append(self.tried(build, rows, assets, judge))
                    bar.update()
        return self.timed(tried, judge, n_rows)

    def tried(self, build: Build, rows: np.ndarray, assets: Any, judge: Judge) -> Tried:
        """One build's cheapest setting that meets the target, or its best."""
        settings = self.scaled(build, len(rows))
        layer = tuned_layer(self.config, settings)
        with without_chatter():
            layer.index(rows, None, assets=assets)
        leaves = leaves_to_try(self.config, settings)
        if self.config.num_leaves_to_search != "auto":  # as large a part of the leaves as of all documents
            share = self.config.num_leaves_to_search / build.num_leaves
            leaves = [max(1, round(share * leaves_of(settings)))]
        explored = tuning.explore(
            lambda search: judge.record(as_ask(layer), search),
            self.config.target_recall,
            leaves=leaves,
            candidates=candidates_of(self.config),
        )
        n_entries = round(len(assets.owners) / len(rows) * len(self.matrix))
        mib = served_mib(self.config, build.quantize_reordering, self.matrix.shape, n_entries)
        if not explored.met:
            layer.release()
            return Tried(build, None, explored.best(), mib)
        record = fastest(layer, judge, explored.met, self.config.requests)
        return Tried(build, layer, record, mib)

    def timed(self, tried: Sequence[Tried], judge: Judge, n_rows: int) -> list[Trial]:
        """The trials, those that meet the target timed in turns; their layers end here."""
        there = [(t.build, t.layer, t.record.search) for t in tried if t.layer is not None]
        calls = [asking(layer, judge, search, self.config.requests) for _, layer, search in there]
        seconds = tuning.seconds_each(calls, progress="index: timing builds")
        centre = seconds_a_centre(self.matrix.shape[1], self.config.requests)
        rates: dict[Build, float] = {}
        for (build, layer, _), measured in zip(there, seconds, strict=True):
            layer.release()
            # A query is compared with every leaf's centre, and a sample has fewer leaves.
            missing = build.num_leaves - leaves_of(self.scaled(build, n_rows))
            rates[build] = 1 / (measured + missing * centre)
        trials = []
        for one in tried:
            rate = rates.get(one.build)
            fits = self.config.memory_mib is None or one.memory_mib <= self.config.memory_mib
            trials.append(Trial(one.build, n_rows, one.record.recall, rate, one.memory_mib, fits))
            speed = f"{rate:,.0f} queries/s" if rate else "target not met"
            say(
                f"{words_of(one.build)}: recall {one.record.recall:.4f}, {speed}, "
                f"about {one.memory_mib:,.0f} MiB served"
            )
        return trials

    def sample(self, n_rows: int) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
        """Rows, drawn by the seed, and what gives a document's row among them, -1 where it is not."""
        n_all = len(self.matrix)
        if n_rows == n_all:
            return self.matrix, lambda own: own
        drawn = np.sort(np.random.default_rng(self.config.seed).choice(n_all, n_rows, replace=False))
        of_all = np.full(n_all + 1, -1, np.int32)  # the last stands for -1
        of_all[drawn] = np.arange(n_rows, dtype=np.int32)
        return np.asarray(self.matrix[drawn]), lambda own: of_all[own]

    def scaled(self, build: Build, n_rows: int) -> Settings:
        """The settings of a build for a sample: leaves hold as many rows as they would of all documents."""
        num_leaves = max(1, round(build.num_leaves * n_rows / len(self.matrix)))
        return dataclasses.replace(self.settings.with_build(build), num_leaves=num_leaves)


def tree_of(build: Build) -> Build:
    """The build without how its rows are stored."""
    return dataclasses.replace(build, quantize_reordering="float32")


def by_tree(builds: Sequence[Build]) -> dict[Build, list[Build]]:
    """{tree: its builds}, which differ in how rows are stored; both in the order of the builds."""
    trees: dict[Build, list[Build]] = {}
    for build in builds:
        trees.setdefault(tree_of(build), []).append(build)
    return trees


def seconds_a_centre(dim: int, requests: str) -> float:
    """Seconds that a query takes for each leaf's centre, which a sample has fewer of than all documents."""
    centres = np.ones((2048, dim), np.float32)
    queries = np.ones((dim, 1 if requests == "single" else 256), np.float32)

    def call() -> int:
        for _ in range(10):
            centres @ queries
        return 10 * queries.shape[1]

    return tuning.seconds_each([call])[0] / len(centres)


def words_of(build: Build) -> str:
    threshold = build.anisotropic_quantization_threshold
    return (
        f"{build.num_leaves:,} leaves, {f'spill {build.spill:g}' if build.spill else 'no spill'}, "
        f"{f'threshold {threshold:g}' if threshold else 'plain codes'}, {build.quantize_reordering} rows"
    )
