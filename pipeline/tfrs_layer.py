"""The ScaNN layer of tfrs as it stands (`index.layer: tfrs`), searched and shipped as `TunedScaNN` is.

k-means runs once: the leaves to search are tuned on the built searcher, whose search op takes them with
every call, and are then written into the searcher's config, from which the export makes its searcher.
"""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.chatter import tensorflow, without_chatter
from pipeline.errors import PipelineError


class TfrsLayer:
    """A built ScaNN searcher of tfrs's settings; `ship` makes the layer that `save` writes."""

    def __init__(
        self,
        rows: np.ndarray,
        *,
        k: int,
        distance_measure: str,
        num_leaves: int,
        num_reordering_candidates: int,
        dimensions_per_block: int,
        training_iterations: int,
        seed: int,
    ) -> None:
        """Build.

        Args:
            rows: float32 (n_rows, dim); ScaNN takes a copy.

        Raises:
            PipelineError: ScaNN refuses the rows or the settings.
        """
        self.settings: dict[str, Any] = {
            "k": k,
            "distance_measure": distance_measure,
            "num_leaves": num_leaves,
            "num_leaves_to_search": num_leaves,
            "num_reordering_candidates": num_reordering_candidates,
            "dimensions_per_block": dimensions_per_block,
            "training_iterations": training_iterations,
        }
        self.searcher = build_searcher(rows, self.settings, seed)
        self.layer: Any = None
        self.n_rows, self.dim = rows.shape

    def ask(
        self,
        queries: np.ndarray,
        k: int,
        num_leaves_to_search: int | None = None,
        num_reordering_candidates: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 and rows int32, (n_queries, k) each, best first; rows -1 where fewer are found.

        Once shipped, the layer answers by its own settings alone.
        """
        if self.layer is None:
            found = self.searcher.search_batched_parallel(
                queries,
                final_num_neighbors=k,
                pre_reorder_num_neighbors=max(
                    k, num_reordering_candidates or self.settings["num_reordering_candidates"]
                ),
                leaves_to_search=num_leaves_to_search or self.settings["num_leaves_to_search"],
            )
            rows, scores = found.indices.numpy(), found.distances.numpy()
        elif len(queries) == 1:  # as `serving_default` asks
            scores, rows = (answer.numpy()[np.newaxis] for answer in self.layer(queries[0], k=k))
        else:
            scores, rows = (answer.numpy() for answer in self.layer(queries, k=k))
        return scores, np.where(np.isfinite(scores), rows, -1)  # ScaNN fills short answers with NaN

    def ship(self, num_leaves_to_search: int, num_reordering_candidates: int) -> None:
        """Make the layer with these settings as its own. The searcher ends: it holds a copy of the rows."""
        tf = tensorflow()
        self.settings["num_leaves_to_search"] = num_leaves_to_search
        self.settings["num_reordering_candidates"] = num_reordering_candidates
        state = self.searcher.serialize_to_module()
        tf.raw_ops.DestroyResourceOp(resource=self.searcher.searcher_handle)  # nothing else ever frees it
        self.searcher = None
        self.layer = build_scann(state, self.settings)
        with without_chatter():  # Keras makes `serving_default` take what the first call took: one query
            self.layer(tf.ones(self.dim))

    def save(self, folder: Path) -> None:
        """Write the SavedModel."""
        tf = tensorflow()
        options = tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])
        tf.saved_model.save(self.layer, str(folder), options=options)

    def release(self) -> None:
        """Free the searcher; Python's garbage collection does not."""
        tf = tensorflow()
        state = getattr(self.layer, "_serialized_searcher", None)
        if state is not None:
            tf.raw_ops.DestroyResourceOp(resource=state.recreate_handle())


def build_searcher(rows: np.ndarray, settings: dict[str, Any], seed: int) -> Any:
    """A `ScannSearcher` built as the tfrs layer builds it, but for k-means' start.

    The layer starts k-means at random rows and takes no seed; k-means++ takes one, and then gives the
    same index every time, on any number of threads.

    Raises:
        PipelineError: ScaNN refuses the rows or the settings.

    Source: tensorflow_recommenders/layers/factorized_top_k.py, `ScaNN.build_searcher`.
    """
    tf = tensorflow()
    with without_chatter():
        from google.protobuf import text_format
        from scann.proto import scann_pb2
        from scann.scann_ops.py import scann_ops

    builder = (
        scann_ops.builder(rows, settings["k"], settings["distance_measure"])
        .tree(
            num_leaves=settings["num_leaves"],
            num_leaves_to_search=settings["num_leaves_to_search"],
            training_iterations=settings["training_iterations"],
            random_init=False,
        )
        .score_ah(dimensions_per_block=settings["dimensions_per_block"])
        .reorder(settings["num_reordering_candidates"])
    )
    scann_config = text_format.Parse(builder.create_config(), scann_pb2.ScannConfig())
    scann_config.partitioning.clustering_seed = seed
    scann_config.hash.asymmetric_hash.clustering_seed = seed
    scann_config.hash.asymmetric_hash.sampling_seed = seed
    try:
        with without_chatter():
            return scann_ops.create_searcher(rows, text_format.MessageToString(scann_config))
    except tf.errors.InvalidArgumentError as error:
        said = ", ".join(f"{name} {value}" for name, value in settings.items())
        raise PipelineError(
            f"ScaNN cannot build over {rows.shape[0]:,} rows of {rows.shape[1]:,} numbers with {said}: "
            f"{error.message}"
        ) from None


def build_scann(state: Any, settings: dict[str, Any]) -> Any:
    """The tfrs ScaNN layer of a serialised searcher, with the settings' leaves and candidates as its own."""
    from scann.proto import scann_pb2
    from tensorflow_recommenders.layers import factorized_top_k

    # The layer's first call makes its own searcher from these tensors: until then its config can be changed.
    scann_config = scann_pb2.ScannConfig.FromString(state.scann_config.numpy()[0])
    scann_config.partitioning.query_spilling.max_spill_centers = settings["num_leaves_to_search"]
    reordering = scann_config.exact_reordering
    reordering.approx_num_neighbors = settings["num_reordering_candidates"]
    state.scann_config.assign([scann_config.SerializeToString()])
    layer = factorized_top_k.ScaNN(**settings)
    layer._serialized_searcher = state  # all that `layer.index(rows)` would do, after building again
    return layer
