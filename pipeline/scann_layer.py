"""`TunedScaNN`: tfrs's ScaNN layer with what ScaNN can do beyond it, by the ops that the serving image knows.

Importing this imports TensorFlow. The layer differs from tfrs's in four things:

- Leaves are spherical, trained on a sample of any size; codes know which error matters (anisotropic).
- A row may lie in two leaves (SOAR, "spilling"): the graph maps an entry of the searcher to its row.
- How rows are stored is a choice, and one copy of them serves rescoring and `exact`.
- It is saved with signatures that let a request choose its settings, filter, and ask for the exact answer.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # tfrs 0.7.7 knows no Keras 3

import numpy as np
import tensorflow as tf
from tensorflow_recommenders.layers import factorized_top_k

from pipeline.config import STORAGES, Storage
from pipeline.scann_assets import MIN_ROWS, Assets, build
from pipeline.served import NO_SCORE, Limits, Served
from pipeline.stored_rows import as_ids, as_rows, check_rows


class TunedScaNN(factorized_top_k.ScaNN):
    """Approximate search over unit rows by their dot product.

    Called as tfrs's layer is: `layer(queries, k)` gives (scores, rows or identifiers). `save` writes the
    signatures `serving_default`, `serving_default_batch`, `search`, `exact` and, with identifiers,
    `search_filtered`.

    Args beside tfrs's own:
        num_leaves: None for exact search alone, with the same signatures.
        num_reordering_candidates: entries rescored when a request names no number; None: 10 k, at least 100.
            With spilling a row may be among them twice. At least k rows are always rescored, and all of
            them where as many are asked for as there are rows.
        spherical: leaves are trained by direction, as dot products of unit rows want it.
        training_iterations, training_sample_size: as `build` takes them, whose defaults these are.
        anisotropic_quantization_threshold: None for plain codes. 0.2 is for 100 dimensions; 384 want 0.088.
        quantize_reordering: how rows are stored, and so rescored.
        spill: SOAR's lambda (1.5), or None: each row in one leaf.
        seed: of k-means and of samples.
        random_init: how k-means starts, as `build` takes it. Where it starts at random rows, the same seed
            does not build the same index bit for bit.
        limits: see Limits.
        exact_below_allowed: a filter that allows at most so many rows is answered exactly.
    """

    def __init__(
        self,
        query_model: Any = None,
        k: int = 10,
        distance_measure: str = "dot_product",
        num_leaves: int | None = 100,
        num_leaves_to_search: int = 10,
        training_iterations: int = 8,
        dimensions_per_block: int = 2,
        num_reordering_candidates: int | None = None,
        parallelize_batch_searches: bool = True,
        name: str | None = None,
        *,
        spherical: bool = True,
        training_sample_size: int | None = 250_000,
        anisotropic_quantization_threshold: float | None = 0.088,
        quantize_reordering: Storage = "float32",
        spill: float | None = 1.5,
        seed: int = 7,
        random_init: bool | None = None,
        limits: Limits | None = None,
        exact_below_allowed: int = 10_000,
    ) -> None:
        if distance_measure != "dot_product":
            raise ValueError(f"distance_measure is {distance_measure!r}, wanted 'dot_product'")
        if quantize_reordering not in STORAGES:
            raise ValueError(
                f"quantize_reordering is {quantize_reordering!r}, wanted one of {', '.join(STORAGES)}"
            )
        super().__init__(
            query_model,
            k,
            distance_measure,
            num_leaves or 1,
            num_leaves_to_search,
            training_iterations,
            dimensions_per_block,
            num_reordering_candidates or max(100, 10 * k),
            parallelize_batch_searches,
            name,
        )
        self._settings: dict[str, Any] = {
            "num_leaves": num_leaves,
            "training_iterations": training_iterations,
            "dimensions_per_block": dimensions_per_block,
            "spherical": spherical,
            "training_sample_size": training_sample_size,
            "anisotropic_quantization_threshold": anisotropic_quantization_threshold,
            "spill": spill,
            "seed": seed,
            "random_init": random_init,
        }
        self._storage = quantize_reordering
        self._num_leaves_to_search = num_leaves_to_search
        self._limits = limits or Limits()
        self._exact_below_allowed = exact_below_allowed
        self._served: Served | None = None
        self._found: Any = None  # `Served.find` as a graph

    def index(
        self,
        candidates: Any,
        identifiers: Any = None,
        assets: Assets | None = None,
        scratch: str | os.PathLike[str] | None = None,
    ) -> TunedScaNN:
        """Build over the rows.

        Args:
            candidates: float32 (n_rows, dim), unit length: an array, a memory map or a tensor.
            identifiers: str or bytes (n_rows,); default: row numbers, as numbers.
            assets: what `build` made of the same rows: then nothing is trained.
            scratch: as `build` takes it.

        Raises:
            ValueError: shapes do not fit, or a row is not a unit vector; the message names the rows.
        """
        rows = as_rows(candidates)
        ids = None if identifiers is None else as_ids(identifiers, len(rows))
        check_rows(rows, ids)
        self.release()
        self._served = self._found = None  # two copies of the rows would be too much
        if assets is None and self._settings["num_leaves"] is not None and len(rows) >= MIN_ROWS:
            assets = build(rows, scratch=scratch, **self._settings)
        elif assets is not None:
            _check_built_over(assets, rows)
        self._served = Served(
            rows,
            assets,
            ids,
            storage=self._storage,
            k=self._k,
            num_leaves_to_search=self._num_leaves_to_search,
            num_reordering_candidates=self._num_reordering_candidates,
            parallel=self._parallelize_batch_searches,
            limits=self._limits,
            exact_below_allowed=self._exact_below_allowed,
        )
        self._found = self._served.asking()
        return self

    def call(self, queries: Any, k: int | None = None) -> tuple[Any, Any]:
        """(scores, rows or identifiers) of one query, (k,) each, or of several, (n_queries, k) each."""
        served = self.served()
        if self.query_model is not None:
            queries = self.query_model(queries)
        queries = tf.convert_to_tensor(queries, tf.float32)
        if len(queries.shape) not in (1, 2):
            raise ValueError(f"queries have shape {queries.shape}, wanted (dim,) or (n_queries, dim)")
        k = self._k if k is None else k
        one = len(queries.shape) == 1
        scores, rows = self._found(queries[tf.newaxis] if one else queries, k, *served.defaults(k))
        found = rows if served.ids is None else served.ids_of(rows)
        return (scores[0], found[0]) if one else (scores, found)

    def ask(
        self,
        queries: np.ndarray,
        k: int,
        num_leaves_to_search: int | None = None,
        num_reordering_candidates: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Search by the graph that is served, without its limits.

        Args:
            queries: float32 (n_queries, dim), one at least.
            num_leaves_to_search: as num_reordering_candidates, default: what `serving_default` uses.

        Returns:
            Scores float32 and rows int32, (n_queries, k) each, best first; NO_SCORE and -1 where fewer rows
            were found.
        """
        served = self.served()
        leaves = num_leaves_to_search or served.num_leaves_to_search
        candidates = max(num_reordering_candidates or served.num_reordering_candidates, k)
        scores, rows = (found.numpy() for found in self._found(queries, k, leaves, candidates))
        missing = ((0, 0), (0, k - scores.shape[1]))  # k above the number of rows
        return (
            np.pad(scores, missing, constant_values=NO_SCORE),
            np.pad(rows, missing, constant_values=-1),
        )

    def ship(self, num_leaves_to_search: int, num_reordering_candidates: int) -> None:
        """Set what `serving_default` uses; before `save`.

        Raises:
            ValueError: a number below 1, or fewer candidates than k.
        """
        if num_leaves_to_search < 1 or num_reordering_candidates < self._k:
            raise ValueError(
                f"num_leaves_to_search is {num_leaves_to_search} and num_reordering_candidates "
                f"{num_reordering_candidates}, wanted at least 1 and at least k = {self._k}"
            )
        self._num_leaves_to_search = num_leaves_to_search
        self._num_reordering_candidates = num_reordering_candidates
        if self._served is not None:
            self._served.num_leaves_to_search = num_leaves_to_search
            self._served.num_reordering_candidates = num_reordering_candidates

    def served(self) -> Served:
        """The tensors and signatures, with a searcher.

        Raises:
            ValueError: `index` was not called.
        """
        if self._served is None:
            raise ValueError("The `index` method must be called first to create the retrieval index.")
        self._served.make()
        return self._served

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a SavedModel with every signature; nothing of Keras is in it, nor the query model."""
        self.served().save(folder)

    def release(self) -> None:
        """Free the searcher; Python's garbage collection does not. The next call makes it again.

        What TensorFlow allocated, the stored rows among it, it keeps for itself and what comes next.
        """
        if self._served is not None:
            self._served.release()

    def is_exact(self) -> bool:
        return self._served is not None and not self._served.has_tree


def _check_built_over(assets: Assets, rows: np.ndarray) -> None:
    n_rows = int(assets.owners.max()) + 1
    if n_rows != len(rows):
        raise ValueError(f"assets are of {n_rows} rows, wanted those of the {len(rows)} rows given")
