"""What benchmarks/serving.py serves, and the same graphs asked without a server: a process each.

    python benchmarks/serving_models.py build tuned|tfrs ROWS.npy QUERIES.npy FOLDER PLAN
    python benchmarks/serving_models.py bare FOLDER QUERIES.npy
    python benchmarks/serving_models.py messages QUERIES.npy MESSAGES.npy

`build` makes the version FOLDER/1 with the fastest settings that reach the plan's recall, and built.json.
`bare` loads a version as TensorFlow Serving does and, for every line of its input, measures for a while and
says one line of JSON. `messages` writes the queries as gRPC's PredictRequest: uint8 (n_queries, bytes).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for when it is run as a file
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

from benchmarks.index_systems import SAMPLE, exact_search, leaves_of, threshold_of

K = 10
CANDIDATES = (30, 50, 100)  # rescored for ten results: each with the fewest leaves that are enough
N_TIMED = 300  # queries, one at a time, by which the fastest of them is chosen
BATCH = 64
TIE = 1e-6  # float32 dot products of unit rows differ by less between two ways of adding up


def main(arguments: list[str]) -> None:
    task, *rest = arguments
    if task == "build":
        layer, rows, queries, folder, plan = rest
        build(layer, np.load(rows, mmap_mode="r"), np.load(queries), Path(folder), json.loads(plan))
    elif task == "bare":
        bare(Path(rest[0]), np.load(rest[1]))
    else:
        np.save(rest[1], messages(np.load(rest[0])))


# --- Versions ------------------------------------------------------------------------------------------


def build(name: str, rows: np.ndarray, queries: np.ndarray, folder: Path, plan: dict[str, Any]) -> None:
    """Write FOLDER/1 and FOLDER/built.json: the settings, and the recall that they were chosen by.

    Args:
        rows: float32 (n_rows, dim), unit length; the plan's n_rows first of them are taken.
        queries: float32 (n_queries, dim), by which the settings are chosen.
        plan: n_rows, recall.
    """
    rows = np.ascontiguousarray(rows[: plan["n_rows"]])
    n_leaves = leaves_of(len(rows))
    layer = {"tuned": tuned_layer, "tfrs": tfrs_layer}[name](rows, n_leaves)
    kth = exact_search(rows, queries, K)[0][:, -1]
    tried = []
    for candidates in CANDIDATES:

        def recall(leaves: int, candidates: int = candidates) -> float:
            return recall_of(rows, queries, kth, layer.ask(queries, K, leaves, candidates)[1])

        leaves, reached = fewest(recall, plan["recall"], n_leaves)
        setting = {"num_leaves_to_search": leaves, "candidates": candidates, "recall": reached}
        tried.append(setting | {"seconds": seconds_one_by_one(layer, queries, leaves, candidates)})
    enough = [one for one in tried if one["recall"] >= plan["recall"]]
    best = (
        min(enough, key=lambda one: one["seconds"]) if enough else max(tried, key=lambda one: one["recall"])
    )
    layer.ship(best["num_leaves_to_search"], best["candidates"])
    layer.save(folder / "1")
    built = {"num_leaves": n_leaves, **best, "tried": tried}
    (folder / "built.json").write_text(json.dumps(built), encoding="utf-8")


def seconds_one_by_one(layer: Any, queries: np.ndarray, leaves: int, candidates: int) -> float:
    """The median search of one query."""
    took = []
    for number in range(N_TIMED):
        started = time.perf_counter()
        layer.ask(queries[number % len(queries)][np.newaxis], K, leaves, candidates)
        took.append(time.perf_counter() - started)
    return float(np.median(took))


def tuned_layer(rows: np.ndarray, n_leaves: int) -> Any:
    from pipeline.scann_layer import TunedScaNN

    return TunedScaNN(
        k=K,
        num_leaves=n_leaves,
        training_sample_size=min(SAMPLE, len(rows)),
        anisotropic_quantization_threshold=threshold_of(rows.shape[1]),
    ).index(rows)


def tfrs_layer(rows: np.ndarray, n_leaves: int) -> Any:
    """tfrs's own layer as an expert sets it: leaves by the square root, candidates rescored."""
    from pipeline.tfrs_layer import TfrsLayer

    return TfrsLayer(
        rows, k=K, distance_measure="dot_product", num_leaves=n_leaves, dimensions_per_block=2,
        num_reordering_candidates=max(CANDIDATES), training_iterations=12, seed=7,
    )  # fmt: skip


def fewest(recall: Callable[[int], float], wanted: float, most: int) -> tuple[int, float]:
    """The fewest leaves whose recall is as wanted, and that recall; all where none is enough.

    Recall grows with the leaves, so halving the range finds them.
    """
    low, high, reached = 1, most, recall(most)
    while low < high:
        middle = (low + high) // 2
        measured = recall(middle)
        if measured >= wanted:
            high, reached = middle, measured
        else:
            low = middle + 1
    return high, reached


def recall_of(rows: np.ndarray, queries: np.ndarray, kth: np.ndarray, found: np.ndarray) -> float:
    """Mean share of a query's K found rows that score as much as its exact k-th.

    Args:
        kth: float32 (n_queries,), the exact k-th score.
        found: int (n_queries, K), -1 for none.
    """
    shares = []
    for query, worst, some in zip(queries, kth, found, strict=True):
        given = np.unique(some[some >= 0])
        shares.append(min(K, int((rows[given] @ query >= worst - TIE).sum())) / K)
    return float(np.mean(shares))


# --- Without a server ----------------------------------------------------------------------------------


def bare(folder: Path, queries: np.ndarray) -> None:
    """Measure once for each line of the input, {"seconds": S, "threads": N}; a line of JSON each."""
    one, several = load(folder)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        seconds, threads = asked["seconds"], asked["threads"]
        said = {"1 thread": called(one, queries, seconds, 1)}
        if threads > 1:
            said[f"{threads} threads"] = called(one, queries, seconds, threads)
        if several:
            parts = [queries[at : at + BATCH] for at in range(0, len(queries) - BATCH + 1, BATCH)]
            batches = called(several, parts, seconds, 1)
            said[f"batches of {BATCH}"] = {**batches, "rate": batches["rate"] * BATCH}
        print(json.dumps(said), flush=True)


def load(folder: Path) -> tuple[Callable, Callable | None]:
    """`serving_default` of one query, and its form for several where the version has one."""
    import tensorflow.compat.v1 as tf
    from scann.scann_ops.py import scann_ops  # noqa: F401  registers ScaNN's ops
    from tensorflow.core.protobuf import config_pb2

    session = tf.Session(graph=tf.Graph())
    with session.graph.as_default():
        signatures = tf.saved_model.load(session, ["serve"], str(folder)).signature_def

    def callable_of(name: str) -> Callable:
        options = config_pb2.CallableOptions()
        options.feed.extend(info.name for info in signatures[name].inputs.values())
        options.fetch.extend(info.name for info in signatures[name].outputs.values())
        return session._make_callable_from_options(options)

    batch = "serving_default_batch"
    return callable_of("serving_default"), callable_of(batch) if batch in signatures else None


def called(call: Callable, queries: Any, seconds: float, n_threads: int) -> dict[str, float]:
    """Calls a second, and percentiles of a call's milliseconds; each thread waits for its answers."""
    took: list[list[float]] = [[] for _ in range(n_threads)]
    end = time.perf_counter() + seconds

    def ask(number: int) -> None:
        now, at = time.perf_counter(), number * 997
        while now < end:
            call(queries[at % len(queries)])
            then, now, at = now, time.perf_counter(), at + 1
            took[number].append(now - then)

    started = time.perf_counter()
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    each = np.concatenate([np.array(part) for part in took]) * 1e3
    p50, p99, p999 = np.percentile(each, (50, 99, 99.9))
    return {"rate": len(each) / (time.perf_counter() - started), "p50": p50, "p99": p99, "p999": p999}


# --- gRPC ----------------------------------------------------------------------------------------------


def messages(queries: np.ndarray) -> np.ndarray:
    """One PredictRequest a query: all are equally long, because all vectors are."""
    from tensorflow import make_tensor_proto
    from tensorflow_serving.apis import predict_pb2

    rows = []
    for query in queries:
        request = predict_pb2.PredictRequest()
        request.model_spec.name = "index"
        request.inputs["input_1"].CopyFrom(make_tensor_proto(query))
        rows.append(np.frombuffer(request.SerializeToString(), np.uint8))
    return np.stack(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
