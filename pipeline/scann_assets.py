"""ScaNN's tree and codes: trained by its own Python module, then taken apart.

ScaNN's TensorFlow ops refuse rows that lie in two leaves (SOAR, "spilling"), and those of the serving image
do not know it. Taken apart, such an index is a plain one of more entries than rows, which those ops take.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}  # of a number, by storage
SERVED_BYTES = 58 << 20  # of graphs, threads and requests, batches of 1,024 queries among them; measured
SHORT_ID_BYTES = 22  # TensorFlow keeps so long a text where others have a pointer
ENOUGH_MIB = 1024  # of a disk: one with more was not full
MIN_ROWS = 16  # ScaNN trains 16 centres a block of dimensions, and refuses fewer rows
# Codes are trained on so many rows, 625 a centre. By one tree over 173,037 rows of 384 ScaNN's own 100,000
# gave the same recall@10 within 0.0004, and took 11 s more of one core and 300 MB.
CODES_SAMPLE = 10_000
# ScaNN's k-means++ compares every training row with every centre in doubles: 0.33 us each of 384 dimensions,
# four times what all rounds of k-means take. So many comparisons are 3 s: 46,000 rows at sqrt(rows) leaves.
MOST_COMPARED = 10_000_000


@dataclasses.dataclass(frozen=True)
class Assets:
    """A built index taken apart: what `Scann>TensorsToScann` takes.

    Attributes:
        config: a serialised ScannConfig.
        partitioner: the tree, serialised.
        codebook: centres of the codes, serialised.
        tokens: each entry's leaf, int32 (n_entries,).
        codes: uint8 (n_entries, n_blocks), one of 16 each.
        owners: each entry's row, int32 (n_entries,): every row first, in order, then the spilled ones.
    """

    config: bytes
    partitioner: bytes
    codebook: bytes
    tokens: np.ndarray
    codes: np.ndarray
    owners: np.ndarray


def build(
    rows: np.ndarray,
    *,
    num_leaves: int,
    training_iterations: int = 8,
    dimensions_per_block: int = 2,
    spherical: bool = True,
    training_sample_size: int | None = 250_000,
    anisotropic_quantization_threshold: float | None = 0.088,
    spill: float | None = 1.5,
    seed: int = 7,
    random_init: bool | None = None,
    training_threads: int = 0,
    scratch: str | os.PathLike[str] | None = None,
) -> Assets:
    """Train the tree and the codes.

    Args:
        rows: float32 (n_rows, dim), unit length.
        training_iterations: rounds of k-means. Over 173,037 rows, with spilling, 6, 8 and 12 gave the same
            recall@10 within 0.001; without, 6 lost 0.002 against 8.
        training_sample_size: rows that leaves are trained on, None for all. 100,000 of 173,037 (236 a leaf)
            lost 0.006 of recall@10 without spilling, 50,000 lost 0.006 with it.
        random_init: k-means starts at random rows, or by k-means++; default: see `starts_at_random`.
        training_threads: 0 for one a core.
        scratch: where ScaNN writes what is taken apart; default: the system's folder for temporary files.

    Raises:
        ValueError: more leaves than rows, or what ScaNN itself refuses.
        OSError: what ScaNN writes has no room there.
    """
    from scann.scann_ops.py import scann_ops_pybind

    if not 1 <= num_leaves <= len(rows):
        raise ValueError(
            f"num_leaves is {num_leaves}, but there are {len(rows)} rows: choose 1 to {len(rows)}"
        )
    spills = spill is not None and num_leaves > 1  # there is no second of one leaf
    tree: dict[str, Any] = {"soar_lambda": spill, "overretrieve_factor": 2.0} if spills else {}
    threshold = anisotropic_quantization_threshold
    n_training_rows = min(training_sample_size or len(rows), len(rows))
    if random_init is None:
        random_init = starts_at_random(num_leaves, n_training_rows)
    config = (
        scann_ops_pybind.builder(rows, 10, "dot_product")
        .tree(
            num_leaves=num_leaves,
            num_leaves_to_search=min(10, num_leaves),
            training_iterations=training_iterations,
            training_sample_size=n_training_rows,
            spherical=spherical,
            random_init=random_init,
            **tree,
        )
        .score_ah(
            dimensions_per_block,
            anisotropic_quantization_threshold=threshold or math.nan,
            training_sample_size=CODES_SAMPLE,
        )
        .create_config()
    )
    searcher = _train(rows, _seeded(config, seed), training_threads)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        _serialize(searcher, folder)
        del searcher  # it holds a copy of the rows
        return take_apart(Path(folder), len(rows))


def starts_at_random(num_leaves: int, n_training_rows: int) -> bool:
    """Whether `build` by default starts k-means at random rows, for k-means++ would take too long.

    The same seed then draws the same rows, but ScaNN takes them in another order each time, and trains codes
    in the order of leaves: the index is not bit for bit the same when built again. k-means++ gives that, on
    any number of threads, and 0.002 more recall@10 at the same few leaves, of 424 over 173,037 rows.
    """
    return num_leaves * n_training_rows > MOST_COMPARED


def _seeded(config: str, seed: int) -> str:
    """The builder's text config with what it gives no way to set."""
    from google.protobuf import text_format
    from scann.proto import scann_pb2

    parsed = text_format.Parse(config, scann_pb2.ScannConfig())
    parsed.partitioning.clustering_seed = seed
    parsed.hash.asymmetric_hash.clustering_seed = seed
    parsed.hash.asymmetric_hash.sampling_seed = seed
    return text_format.MessageToString(parsed)


def _train(rows: np.ndarray, config: str, training_threads: int) -> Any:
    from scann.scann_ops.py import scann_ops_pybind

    try:
        return scann_ops_pybind.create_searcher(rows, config, training_threads)
    except RuntimeError as error:
        raise ValueError(
            f"ScaNN cannot build over {rows.shape[0]} rows of {rows.shape[1]}: {error}"
        ) from None


def _serialize(searcher: Any, folder: str) -> None:
    """Write ScaNN's files; its own words for a full disk are of factory options."""
    try:
        searcher.serialize(folder)
    except RuntimeError as error:
        free = shutil.disk_usage(folder).free >> 20
        raise OSError(
            errno.ENOSPC if free < ENOUGH_MIB else errno.EIO,
            f"ScaNN could not write its index where {free:,} MiB are free ({str(error)[:200]}): make room, "
            "or set TMPDIR to a folder that has it",
            str(Path(folder).parent),
        ) from None


def take_apart(folder: Path, n_rows: int) -> Assets:
    """Read what ScaNN's Python module wrote, as one plain index of rows and spilled rows.

    With spilling datapoint_to_token.npy holds two leaves a row, one after the other, the second -1 where
    there is none, and hashed_dataset_soar.npy a second code for every row.

    Raises:
        ValueError: the files are not of these rows.
    """
    from scann.proto import scann_pb2

    def read(name: str) -> bytes:
        return (folder / name).read_bytes()

    config = scann_pb2.ScannConfig.FromString(read("scann_config.pb"))
    config.partitioning.ClearField("database_spilling")
    config.ClearField("exact_reordering")
    tokens = np.load(folder / "datapoint_to_token.npy")
    codes = np.load(folder / "hashed_dataset.npy", mmap_mode="r")
    owners = np.arange(n_rows, dtype=np.int32)
    if len(tokens) == 2 * n_rows:
        tokens, second = tokens[0::2], tokens[1::2]
        spilled = np.flatnonzero(second >= 0).astype(np.int32)
    else:
        spilled = np.empty(0, np.int32)
    if len(spilled):
        second_codes = np.load(folder / "hashed_dataset_soar.npy", mmap_mode="r")[spilled]
        tokens = np.concatenate([tokens, second[spilled]])
        codes = np.concatenate([codes, second_codes])
        owners = np.concatenate([owners, spilled])
    if not len(tokens) == len(codes) == len(owners):
        raise ValueError(
            f"ScaNN wrote {len(tokens)} leaves and {len(codes)} codes for {len(owners)} entries "
            f"of {n_rows} rows: is this scann 1.4.2?"
        )
    return Assets(
        config.SerializeToString(),
        read("serialized_partitioner.pb"),
        read("ah_codebook.pb"),
        np.ascontiguousarray(tokens, np.int32),
        np.ascontiguousarray(codes),
        owners,
    )


def served_bytes(
    n_rows: int, n_entries: int, dim: int, storage: str, dimensions_per_block: int, id_bytes: int = 0
) -> int:
    """An estimate of the memory that a loaded index takes once it has answered single queries and batches.

    Rows: n_rows * dim numbers, and for int8 a scale each. Entries: a code a block of dimensions, half a byte
    packed by ScaNN and a byte as it was loaded, which TensorFlow keeps for later requests; leaf, leaf's list
    and owner, 4 bytes each. Ids: 24 bytes a row, text beyond 22 bytes beside them, 12 for hash and row.

    Args:
        id_bytes: of an id, on average; 0 where there are no ids.
    """
    rows = n_rows * (dim * BYTES[storage] + (4 if storage == "int8" else 0))
    n_blocks = -(-dim // dimensions_per_block)
    entries = n_entries * (n_blocks // 2 + n_blocks + 12)
    text = 2 * id_bytes + 16 if id_bytes > SHORT_ID_BYTES else 0  # as measured
    ids = n_rows * (24 + 12 + text) if id_bytes else 0
    return SERVED_BYTES + rows + entries + ids
