"""Hashes that no machine and no release changes: the buckets, ids and draws of `pairs` are made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import polars as pl


def stable_hash(column: str) -> pl.Expr:
    """64 bits of XXH64 (seed 0) of a string column; null stays null."""
    import polars as pl  # `mix` needs neither, and training has neither
    import polars_hash  # noqa: F401  adds `nchash` to polars' expressions

    return pl.col(column).nchash.xxhash64()  # type: ignore[attr-defined]


def of_texts(values: Iterable[str]) -> np.ndarray:
    """64 bits of each value's BLAKE2b, uint64 (n,): the number that `b2sum -l 64` prints."""
    digests = b"".join(hashlib.blake2b(value.encode(), digest_size=8).digest() for value in values)
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def mix(*parts: Any) -> np.ndarray:
    """One 64-bit hash of several numbers, by the finaliser of SplitMix64 (Steele, Lea, Flood 2014).

    Args:
        parts: uint64 scalars or arrays (n,).

    Returns:
        uint64 (n,), (1,) where all parts are scalars.
    """
    with np.errstate(over="ignore"):
        mixed = np.zeros(1, np.uint64)
        for part in parts:
            mixed = (mixed ^ part) + np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed ^= mixed >> np.uint64(31)
    return mixed
