"""Settings of an index for so many documents: what it may be built with, what is tried, what memory it is."""

import dataclasses
import math

from pipeline import tuning
from pipeline.config import STORAGES, IndexConfig, Storage
from pipeline.errors import ConfigError
from pipeline.scann_assets import MIN_ROWS, served_bytes
from pipeline.tuning import Build, Search

MIN_MANY_BUILDS = 50_000  # documents; fewer are built in seconds however they are built
SPILL = 1.5  # SOAR's lambda, as ScaNN's own examples set it
ID_BYTES = 16  # of an id on average, for the memory's estimate
MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the index is built and exported with; None where the layer has no such setting."""

    k: int
    distance_measure: str
    num_leaves: int | None = None
    num_leaves_to_search: int | None = None
    num_reordering_candidates: int | None = None
    dimensions_per_block: int | None = None
    training_iterations: int | None = None
    training_sample_size: int | None = None
    spherical: bool | None = None
    anisotropic_quantization_threshold: float | None = None
    spill: float | None = None
    quantize_reordering: str | None = None

    def with_build(self, build: Build) -> "Settings":
        return dataclasses.replace(self, **dataclasses.asdict(build))

    def with_search(self, search: Search) -> "Settings":
        return dataclasses.replace(self, **dataclasses.asdict(search))

    def as_build(self) -> Build:
        return Build(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Build)})

    def as_search(self) -> Search:
        """What is shipped; 0 and 0 where all is searched exactly."""
        return Search(self.num_leaves_to_search or 0, self.num_reordering_candidates or 0)


def choose_settings(config: IndexConfig, n_documents: int, dim: int) -> tuple[Settings, str]:
    """The layer and settings for this many documents, and the reason in words.

    What is auto is given as it is until something is tried: the likeliest build, all leaves, 10 k candidates.

    Raises:
        ConfigError: more leaves than documents, or more leaves to search than leaves.
    """
    settings = Settings(config.k, config.distance_measure)
    exact = None
    if n_documents < config.exact_below:
        exact = f"exact search, fewer than index.exact_below = {config.exact_below:,}"
    elif n_documents < MIN_ROWS:
        exact = f"exact search, ScaNN needs at least {MIN_ROWS} to train on"
    if exact:
        storage = next(iter(storages(config, n_documents, 0, dim)), STORAGES[-1])
        return dataclasses.replace(settings, quantize_reordering=storage), exact
    num_leaves = round(math.sqrt(n_documents)) if config.num_leaves == "auto" else config.num_leaves
    if num_leaves > n_documents:
        raise ConfigError(
            f"index.num_leaves is {num_leaves}, but there are {n_documents} documents; "
            f"choose 1 to {n_documents}, or auto"
        )
    to_search = num_leaves if config.num_leaves_to_search == "auto" else config.num_leaves_to_search
    if to_search > num_leaves:
        raise ConfigError(
            f"index.num_leaves_to_search is {to_search}, but {n_documents} documents make {num_leaves} "
            f"leaves; choose 1 to {num_leaves}, or auto"
        )
    candidates = config.num_reordering_candidates
    settings = dataclasses.replace(
        settings,
        num_leaves=num_leaves,
        num_leaves_to_search=to_search,
        num_reordering_candidates=likeliest_candidates(config) if candidates == "auto" else candidates,
        dimensions_per_block=config.dimensions_per_block,
        training_iterations=config.training_iterations,
    )
    if config.layer == "tfrs":
        return settings, f"tfrs's ScaNN layer with {num_leaves:,} leaves"
    settings = dataclasses.replace(
        settings,
        training_sample_size=min(config.training_sample_size, n_documents),
        spherical=config.spherical,
    )
    builds = [b for b in builds_to_try(config, n_documents, dim) if b.num_leaves == num_leaves]
    likeliest = min(builds, key=lambda build: STORAGES.index(build.quantize_reordering))
    return settings.with_build(likeliest), f"a tree of about {num_leaves:,} leaves, tuned"


def builds_to_try(config: IndexConfig, n_rows: int, dim: int) -> list[Build]:
    """Builds that differ in what is auto, the likeliest first; of few documents in little.

    Those that index.memory_mib does not allow are left out; where it allows none, the smallest is there.
    """
    many = n_rows >= MIN_MANY_BUILDS
    root = round(math.sqrt(n_rows)) if config.num_leaves == "auto" else config.num_leaves
    leaves = [root]
    if config.num_leaves == "auto" and many:
        leaves += [max(1, root // 2), min(2 * root, n_rows)]
    spills = [SPILL, None] if config.spill == "auto" else [config.spill]
    threshold = config.anisotropic_quantization_threshold
    thresholds = [tuning.threshold_for(dim) if threshold == "auto" else threshold]
    if threshold == "auto" and many:
        thresholds.append(None)
    stored: dict[float | None, list[Storage]] = {
        spill: storages(config, n_rows, most_entries(spill, n_rows), dim) for spill in spills
    }
    if not any(stored.values()):
        stored = {spills[-1]: [STORAGES[-1]]}
    return [
        Build(n, spill, t, storage)
        for n in leaves
        for spill in stored
        for t in thresholds
        for storage in stored[spill]
    ]


def storages(config: IndexConfig, n_rows: int, n_entries: int, dim: int) -> list[Storage]:
    """Ways to store rows that are worth a trial: float32 alone where index.memory_mib allows it."""
    if config.quantize_reordering != "auto":
        return [config.quantize_reordering]
    if config.memory_mib is None:
        return ["float32"]
    allowed = [
        storage
        for storage in STORAGES
        if served_mib(config, storage, (n_rows, dim), n_entries) <= config.memory_mib
    ]
    return allowed[:1] if allowed[:1] == ["float32"] else allowed


def served_mib(config: IndexConfig, storage: str, shape: tuple[int, ...], n_entries: int) -> float:
    """Estimated memory of the loaded index.

    Args:
        shape: of the rows, (n_rows, dim).
        n_entries: rows and their second leaves; 0 where there is no tree.
    """
    return served_bytes(shape[0], n_entries, shape[1], storage, config.dimensions_per_block, ID_BYTES) / MIB


def most_entries(spill: float | None, n_rows: int) -> int:
    """Entries of a tree before it is trained: with spilling every row may have a second leaf."""
    return n_rows * (2 if spill else 1)


def memory_warning(config: IndexConfig, mib: float) -> str | None:
    """What to say of an estimate above index.memory_mib."""
    if config.memory_mib is None or mib <= config.memory_mib:
        return None
    return (
        f"about {mib:,.0f} MiB when served, above index.memory_mib = {config.memory_mib:,}: publish will "
        "probably refuse it; allow more, set index.spill to null or index.quantize_reordering to int8"
    )


# Searches


def leaves_of(settings: Settings) -> int:
    assert settings.num_leaves is not None
    return settings.num_leaves


def leaves_to_try(config: IndexConfig, settings: Settings) -> list[int]:
    """The one number that is given, or the least and the most."""
    if config.num_leaves_to_search != "auto":
        return [config.num_leaves_to_search]
    return [1, leaves_of(settings)] if leaves_of(settings) > 1 else [1]


def candidates_of(config: IndexConfig) -> list[int]:
    """Numbers of entries to rescore; one for tfrs's layer, whose candidates are not tuned."""
    if config.num_reordering_candidates != "auto":
        return [config.num_reordering_candidates]
    if config.layer == "tfrs":
        return [likeliest_candidates(config)]
    return tuning.candidates_to_try(config.k, max(config.k, config.max_num_reordering_candidates))


def likeliest_candidates(config: IndexConfig) -> int:
    """Entries to rescore where that is not tuned: as many as a request may ask for, at most."""
    return min(max(100, 10 * config.k), max(config.k, config.max_num_reordering_candidates))
