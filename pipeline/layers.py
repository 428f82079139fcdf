"""An index's layer: how it is trained and made, and how it is asked before it is saved."""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from pipeline import tuning
from pipeline.chatter import without_chatter
from pipeline.config import IndexConfig
from pipeline.errors import PipelineError
from pipeline.index_settings import Settings
from pipeline.tuning import Answers, Judge, Record, Search

N_SINGLE = 64  # queries of a turn when single ones are timed
N_BATCH = 1024  # and in batches


class Layer(Protocol):
    """A built index."""

    def ask(
        self,
        queries: np.ndarray,
        k: int,
        num_leaves_to_search: int | None = None,
        num_reordering_candidates: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows, (n_queries, k) each, row -1 for none; default: the shipped settings."""

    def ship(self, num_leaves_to_search: int, num_reordering_candidates: int) -> None:
        """Set what `serving_default` uses."""

    def save(self, folder: Path) -> None:
        """Write the SavedModel."""

    def release(self) -> None:
        """Free the searcher."""


def tuned_layer(config: IndexConfig, settings: Settings) -> Any:
    """A `TunedScaNN` that is not built yet."""
    with without_chatter():
        from pipeline.scann_layer import Limits, TunedScaNN

    limits = Limits(
        queries=config.max_queries,
        k=max(config.max_k, config.k),
        num_reordering_candidates=max(config.max_num_reordering_candidates, config.k),
        filter_ids=config.max_filter_ids,
    )
    given = {name: value for name, value in dataclasses.asdict(settings).items() if value is not None}
    for name in ("num_leaves", "anisotropic_quantization_threshold", "spill"):
        given[name] = getattr(settings, name)  # None says something of these
    return TunedScaNN(**given, seed=config.seed, limits=limits)


def train(config: IndexConfig, settings: Settings, rows: np.ndarray, scratch: Path) -> Any:
    """The tree and codes of these rows.

    Args:
        scratch: a folder where ScaNN may write them meanwhile.

    Raises:
        PipelineError: ScaNN refuses the rows or the settings.
    """
    from pipeline.scann_assets import build

    started = time.monotonic()
    assert settings.num_leaves is not None
    try:
        with without_chatter():
            assets = build(
                rows,
                num_leaves=settings.num_leaves,
                training_iterations=config.training_iterations,
                dimensions_per_block=config.dimensions_per_block,
                spherical=config.spherical,
                training_sample_size=config.training_sample_size,
                anisotropic_quantization_threshold=settings.anisotropic_quantization_threshold,
                spill=settings.spill,
                seed=config.seed,
                scratch=scratch,
            )
    except ValueError as error:
        raise PipelineError(f"index: {error}") from None
    say(f"built over {len(rows):,} documents in {time.monotonic() - started:.1f} s")
    return assets


# Asked


def fastest(layer: Layer, judge: Judge, records: Sequence[Record], requests: str) -> Record:
    """The setting that answers soonest in the mode that will be served."""
    if len(records) == 1:
        return records[0]
    seconds = tuning.seconds_each([asking(layer, judge, record.search, requests) for record in records])
    return records[int(np.argmin(seconds))]


def as_ask(layer: Layer) -> tuning.Ask:
    def ask(vectors: np.ndarray, k: int, search: Search) -> Answers:
        scores, rows = layer.ask(vectors, k, search.num_leaves_to_search, search.num_reordering_candidates)
        return Answers(rows, scores)

    return ask


def asking(layer: Layer, judge: Judge, search: Search, requests: str) -> Callable[[], int]:
    """A call that asks for k answers to some queries, one by one or all at once, and counts them."""
    vectors = judge.vectors(N_SINGLE if requests == "single" else N_BATCH)
    size = 1 if requests == "single" else len(vectors)
    blocks = [vectors[start : start + size] for start in range(0, len(vectors), size)]
    ask = as_ask(layer)

    def call() -> int:
        for block in blocks:
            ask(block, judge.k, search)
        return len(vectors)

    return call


def say(line: str) -> None:
    """A line of the stage on stderr."""
    tqdm.write(f"index: {line}", file=sys.stderr)  # above a bar, where one is drawn
