"""An index version's warm-up requests: what TensorFlow Serving answers while it loads, before it is asked.

The first request of each kind makes TensorFlow prepare what later ones find ready. The server runs these
inside the load, so that no client waits for that; a request that it refuses would fail the load.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.chatter import tensorflow
from pipeline.tuning import Search

REQUESTS = "assets.extra/tf_serving_warmup_requests"  # where TensorFlow Serving looks
N_QUERIES = 64  # rows that are asked for, spread over the index; a batch of all of them is one request
N_SINGLE = 8  # requests of one query each
NO_MINIMUM = float(np.finfo(np.float32).min)


def write_requests(folder: Path, rows: np.ndarray, *, k: int, search: Search, max_queries: int) -> int:
    """Write warm-up requests for the signatures that a saved index has.

    The same index and settings give the same bytes.

    Args:
        folder: holds saved_model.pb; the file goes to assets.extra/ below it.
        rows: float32 (n_rows, dim), of the index: they are the queries.
        search: what is shipped; what an index without a tree is asked with, it does not read.
        max_queries: of one request.

    Returns:
        How many were written.
    """
    tf = tensorflow()
    chosen = np.linspace(0, len(rows) - 1, N_QUERIES).round().astype(np.int64)
    queries = np.ascontiguousarray(rows[chosen], np.float32)
    requests = list(_requests(_signatures(folder), queries, k, search, max_queries))
    path = folder / REQUESTS
    path.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for name, inputs in requests:
            writer.write(_record(tf, name, inputs))
    return len(requests)


def _requests(
    signatures: set[str], queries: np.ndarray, k: int, search: Search, max_queries: int
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each request's signature and inputs; batches of one and of many, which take different ways."""
    numbers = {
        "k": np.int32(k),
        "num_leaves_to_search": np.int32(search.num_leaves_to_search),
        "num_reordering_candidates": np.int32(search.num_reordering_candidates),
    }
    batches = [queries[:n] for n in sorted({1, min(len(queries), max_queries)})]
    no_ids = np.empty(0, object)
    filters = {
        "allowed_document_ids": no_ids,
        "excluded_document_ids": no_ids,
        "minimum_score": np.float32(NO_MINIMUM),
    }
    if "serving_default" in signatures:
        yield from (("serving_default", {"input_1": query}) for query in queries[:N_SINGLE])
    if "serving_default_batch" in signatures:
        yield from (("serving_default_batch", {"queries": batch}) for batch in batches)
    if "search" in signatures:
        yield from (("search", {"queries": batch, **numbers}) for batch in batches)
    if "search_filtered" in signatures:
        yield "search_filtered", {"queries": queries[:1], **numbers, **filters}
    if "exact" in signatures:
        yield "exact", {"queries": queries[:1], "k": numbers["k"]}


def _signatures(folder: Path) -> set[str]:
    """Names of a SavedModel's signatures."""
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    return {name for graph in saved.meta_graphs for name in graph.signature_def}


def _record(tf: Any, signature_name: str, inputs: Mapping[str, Any]) -> bytes:
    """A PredictionLog; it names no model, for that is chosen when the index is published."""
    from tensorflow_serving.apis import prediction_log_pb2

    log = prediction_log_pb2.PredictionLog()
    request = log.predict_log.request
    request.model_spec.signature_name = signature_name
    for name, value in inputs.items():
        dtype = tf.string if value.dtype == object else None
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value, dtype=dtype))
    return log.SerializeToString(deterministic=True)
