"""Stage `index`: embeddings -> index/, a SavedModel that TensorFlow Serving answers from, and its own recall.

The layer is tfrs's ScaNN, or its BruteForce where exact search is fast enough; clients see no difference.
k-means runs once: the leaves to search are tuned on the built searcher, whose search op takes them with
every call, and are then written into the searcher's config, from which the export makes its searcher.
"""

import dataclasses
import errno
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pipeline.artifacts import Embeddings, Index, writing
from pipeline.checks import first_bad_row
from pipeline.config import IndexConfig, as_dict
from pipeline.errors import ArtifactError, ConfigError, PipelineError

MIN_SCANN_ROWS = 16  # ScaNN trains 16 centres a block of dimensions, and refuses fewer rows
KINDS = ("document", "typed", "logged")  # of held-out queries
N_FOUND_QUERIES = 2000  # test queries of each kind that found.parquet answers
N_LATENCY_QUERIES = 1000
N_PROBES = 100  # answers that must be the same before saving and after loading
BLOCK_SCORES = 1 << 26  # scores held at once: 256 MB
TIE = 1e-6  # float32 dot products of unit vectors differ by less between two ways of adding up
# What ScaNN and TensorFlow log although nothing is wrong; no environment variable silences it.
CHATTER = r"^[IW][0-9]{4} |^WARNING: All log messages before absl|failed call to cuInit"

FOUND = pa.schema(
    {
        "query": pa.int32(),
        "num_leaves_to_search": pa.int32(),
        "shipped": pa.bool_(),
        "document_rows": pa.list_(pa.int32()),
        "scores": pa.list_(pa.float32()),
    }
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the searcher is built and exported with; None where the layer has no such setting."""

    k: int
    distance_measure: str
    num_leaves: int | None = None
    num_leaves_to_search: int | None = None
    num_reordering_candidates: int | None = None
    dimensions_per_block: int | None = None
    training_iterations: int | None = None


@dataclasses.dataclass(frozen=True)
class Queries:
    """Held-out queries of one span and kind.

    Attributes:
        rows: int32 (n,), rows of queries.npy.
        vectors: float32 (n, dim), unit length.
        own: int32 (n,), the document row to leave out of every answer, -1 for none.
    """

    rows: np.ndarray
    vectors: np.ndarray
    own: np.ndarray


@dataclasses.dataclass(frozen=True)
class TuningRecord:
    """Recall on dev queries at one number of leaves: the kind of queries that is served worst."""

    num_leaves_to_search: int
    recall: float
    low: float  # lower end of the 95 % interval
    kind: str


@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers to n queries, best first: rows int32 (n, k), scores float32 (n, k), NaN where there is none."""

    rows: np.ndarray
    scores: np.ndarray


def run(config: IndexConfig, embeddings: Embeddings, out: Path) -> Index:
    """Build, tune and export the index, and ask the export what found.parquet and the latency say.

    Raises:
        ArtifactError: the embeddings hold no rows, rows that are not unit vectors, or parts that do not fit.
        ConfigError: a setting does not fit this number of documents.
        PipelineError: ScaNN refuses to build, or the saved index answers otherwise than before saving.
    """
    matrix = embeddings.matrix()
    check_embeddings(embeddings, matrix)
    settings, reason = choose_settings(config, len(matrix))
    _say(f"{len(matrix):,} documents: {reason}")
    with writing(Index, out, config=as_dict(config), inputs=[embeddings]) as draft:
        _empty(draft.folder)
        layer, settings, tuning, found = build(config, settings, embeddings, matrix)
        pq.write_table(found, draft.folder / "found.parquet")
        probes = read_probes(embeddings, matrix)
        expected = [ask_layer(layer, probe) for probe in probes[:N_PROBES]]
        save(layer, draft.folder)
        assets = draft.folder / "assets.extra"
        assets.mkdir()
        shutil.copyfile(embeddings.path / "documents.parquet", assets / "documents.parquet")
        release(layer)  # the loaded copy takes as much memory again
        draft.rows.update(documents=len(matrix), found=len(found))
        draft.facts.update(
            layer="scann" if settings.num_leaves else "brute_force",
            reason=reason,
            settings=dataclasses.asdict(settings),
            tuning=[as_fact(record, config.k) for record in tuning],
            latency_ms=ask_saved(draft.folder, probes, expected),
            bytes=sum(file.stat().st_size for file in draft.folder.rglob("*") if file.is_file()),
            dim=matrix.shape[1],
        )
    return Index.open(out)


def build(
    config: IndexConfig, settings: Settings, embeddings: Embeddings, matrix: np.ndarray
) -> tuple[Any, Settings, list[TuningRecord], pa.Table]:
    """The layer ready to save, its tuned settings, what tuning tried, and found.parquet."""
    test = read_test_queries(embeddings)
    if settings.num_leaves is None:
        layer = build_brute_force(matrix, settings)
        return layer, settings, [], ask_shipped(layer, settings, test, len(matrix))
    searcher = build_searcher(matrix, settings, config.seed)
    tuning: list[TuningRecord] = []
    if config.num_leaves_to_search == "auto":
        dev = read_queries(embeddings, "dev", config.n_tuning_queries, config.seed)
        settings, tuning = tune(searcher, settings, matrix, dev, config.target_recall)
    sweep = sweep_leaves(searcher, settings, test)
    layer = build_scann(searcher, settings)
    swept = [as_table(test, leaves, False, answers) for leaves, answers in sweep.items()]
    found = pa.concat_tables([*swept, ask_shipped(layer, settings, test, len(matrix))])
    return layer, settings, tuning, found


def check_embeddings(embeddings: Embeddings, matrix: np.ndarray) -> None:
    """Refuse rows that ScaNN cannot take (a NaN ends the process) or that the dot product would misrank.

    Raises:
        ArtifactError: which file and row, what it holds, and what to do.
    """
    again = "run stage encode --force"
    if matrix.ndim != 2 or matrix.dtype != np.float32 or not matrix.size:
        raise ArtifactError(
            f"{embeddings.path}/embeddings.npy holds {matrix.dtype} {matrix.shape}, "
            f"wanted float32 (rows, dim) with at least one document: {again}"
        )
    n_rows = pq.read_metadata(embeddings.path / "documents.parquet").num_rows
    if n_rows != len(matrix):
        raise ArtifactError(
            f"{embeddings.path} has {n_rows} rows in documents.parquet but {len(matrix)} in "
            f"embeddings.npy, wanted a vector for each document, or for each of its passages: {again}"
        )
    bad = first_bad_row(matrix)
    if bad is not None:
        row, what = bad
        documents = pq.read_table(embeddings.path / "documents.parquet", columns=["document_id"])
        raise ArtifactError(
            f"{embeddings.path}/embeddings.npy row {row} (document_id {documents['document_id'][row]}) "
            f"{what}, wanted unit length: mend or remove the document's text, then {again}"
        )
    queries = np.load(embeddings.path / "queries.npy", mmap_mode="r")
    n_queries = pq.read_metadata(embeddings.path / "queries.parquet").num_rows
    if queries.shape != (n_queries, matrix.shape[1]):
        raise ArtifactError(
            f"{embeddings.path}/queries.npy has shape {queries.shape}, wanted ({n_queries}, "
            f"{matrix.shape[1]}): a row of queries.parquet each, as wide as embeddings.npy: {again}"
        )
    bad = first_bad_row(queries)
    if bad is not None:
        raise ArtifactError(
            f"{embeddings.path}/queries.npy row {bad[0]} {bad[1]}, wanted unit length: {again}"
        )


def choose_settings(config: IndexConfig, n_documents: int) -> tuple[Settings, str]:
    """The layer and settings for this many documents, and the reason in words.

    `num_leaves_to_search` auto is given as all leaves, until it is tuned.

    Raises:
        ConfigError: more leaves than documents, or more leaves to search than leaves.
    """
    exact = Settings(k=config.k, distance_measure=config.distance_measure)
    if n_documents < config.exact_below:
        return exact, f"exact search, fewer than index.exact_below = {config.exact_below:,}"
    if n_documents < MIN_SCANN_ROWS:
        return exact, f"exact search, ScaNN needs at least {MIN_SCANN_ROWS} to train on"
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
        exact,
        num_leaves=num_leaves,
        num_leaves_to_search=to_search,
        num_reordering_candidates=max(100, 10 * config.k) if candidates == "auto" else candidates,
        dimensions_per_block=config.dimensions_per_block,
        training_iterations=config.training_iterations,
    )
    return settings, f"ScaNN with {num_leaves:,} leaves"


def build_searcher(matrix: np.ndarray, settings: Settings, seed: int) -> Any:
    """A `ScannSearcher` built as the tfrs layer builds it, but for k-means' start.

    The layer starts k-means at random rows and takes no seed; k-means++ takes one, and then gives the
    same index every time, on any number of threads.

    Raises:
        PipelineError: ScaNN refuses the rows or the settings.

    Source: tensorflow_recommenders/layers/factorized_top_k.py, `ScaNN.build_searcher`.
    """
    tf, _ = _tensorflow()
    from google.protobuf import text_format
    from scann.proto import scann_pb2
    from scann.scann_ops.py import scann_ops

    builder = (
        scann_ops.builder(matrix, settings.k, settings.distance_measure)
        .tree(
            num_leaves=settings.num_leaves,
            num_leaves_to_search=settings.num_leaves_to_search,
            training_iterations=settings.training_iterations,
            random_init=False,
        )
        .score_ah(dimensions_per_block=settings.dimensions_per_block)
        .reorder(settings.num_reordering_candidates)
    )
    scann_config = text_format.Parse(builder.create_config(), scann_pb2.ScannConfig())
    scann_config.partitioning.clustering_seed = seed
    scann_config.hash.asymmetric_hash.clustering_seed = seed
    scann_config.hash.asymmetric_hash.sampling_seed = seed
    _say("building")
    started = time.monotonic()
    try:
        with _without_chatter():
            searcher = scann_ops.create_searcher(matrix, text_format.MessageToString(scann_config))
    except tf.errors.InvalidArgumentError as error:
        raise PipelineError(f"ScaNN cannot build with {settings}: {error.message}") from None
    _say(f"built in {time.monotonic() - started:.1f} s")
    return searcher


def build_scann(searcher: Any, settings: Settings) -> Any:
    """The tfrs ScaNN layer of a built searcher, with `settings.num_leaves_to_search` as its own.

    Args:
        searcher: from `build_searcher`; it is used up, because it holds a copy of the matrix.
    """
    tf, factorized_top_k = _tensorflow()
    from scann.proto import scann_pb2

    state = searcher.serialize_to_module()
    tf.raw_ops.DestroyResourceOp(resource=searcher.searcher_handle)  # nothing else ever frees it
    # The layer's first call makes its own searcher from these tensors: until then its config can be changed.
    scann_config = scann_pb2.ScannConfig.FromString(state.scann_config.numpy()[0])
    scann_config.partitioning.query_spilling.max_spill_centers = settings.num_leaves_to_search
    state.scann_config.assign([scann_config.SerializeToString()])
    layer = factorized_top_k.ScaNN(**dataclasses.asdict(settings))
    layer._serialized_searcher = state  # all that `layer.index(matrix)` would do, after building again
    return _first_call(layer, state.dataset.shape[1])


def build_brute_force(matrix: np.ndarray, settings: Settings) -> Any:
    """The tfrs BruteForce layer, taking and giving what the ScaNN layer does.

    tfrs's own wants a batch of queries, refuses a k above the number of rows, and shows the rank of its
    outputs.
    """
    tf, factorized_top_k = _tensorflow()
    n_documents, dim = matrix.shape

    class BruteForce(factorized_top_k.BruteForce):  # type: ignore[name-defined]
        def call(self, queries: Any, k: int | None = None) -> tuple[Any, ...]:
            one = len(queries.shape) == 1
            k = min(k or settings.k, n_documents)
            answers = super().call(queries[tf.newaxis] if one else queries, k)
            return tuple(
                tf.raw_ops.PlaceholderWithDefault(input=a[0] if one else a, shape=None) for a in answers
            )

    return _first_call(BruteForce(k=settings.k).index(tf.convert_to_tensor(matrix)), dim)


def _first_call(layer: Any, dim: int) -> Any:
    """Ask the layer once, with one query: Keras makes `serving_default` take what the first call took."""
    with _without_chatter():
        ask_layer(layer, np.ones(dim, np.float32))
    return layer


def release(layer: Any) -> None:
    """Free the searcher that a ScaNN layer's first call made; Python's garbage collection does not."""
    tf, _ = _tensorflow()
    state = getattr(layer, "_serialized_searcher", None)
    if state is not None:
        tf.raw_ops.DestroyResourceOp(resource=state.recreate_handle())


def save(layer: Any, folder: Path) -> None:
    """Write the SavedModel.

    Raises:
        OSError: the disk is full.
    """
    tf, _ = _tensorflow()
    _say("saving")
    options = tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])
    try:
        with _without_chatter():
            tf.saved_model.save(layer, str(folder), options=options)
    except tf.errors.OpError as error:
        if "No space left" in str(error):  # TensorFlow has no error number for it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from None
        raise


def search(
    searcher: Any, vectors: np.ndarray, settings: Settings, k: int, num_leaves_to_search: int
) -> Answers:
    """Ask a `ScannSearcher` with this many leaves, whatever it was built with.

    Args:
        vectors: float32 (n, dim).
    """
    found = searcher.search_batched_parallel(
        vectors,
        final_num_neighbors=k,
        pre_reorder_num_neighbors=max(k, settings.num_reordering_candidates or 0),
        leaves_to_search=num_leaves_to_search,
    )
    return Answers(found.indices.numpy(), found.distances.numpy())


def kth_scores(matrix: np.ndarray, queries: Queries, k: int) -> np.ndarray:
    """The exact k-th best score of every query, its own document left out, over row blocks.

    Args:
        matrix: float32 (n_documents, dim).
        k: lowered to the number of documents where there are fewer.

    Returns:
        float32 (n_queries,); -inf where a query has fewer than k documents beside its own.
    """
    n_queries, k = len(queries.vectors), min(k, len(matrix))
    best = np.full((n_queries, k), -np.inf, np.float32)
    n_rows = max(1, BLOCK_SCORES // max(1, n_queries))
    blocks = range(0, len(matrix), n_rows)
    for start in tqdm(blocks, desc="index: exact answers", unit="block", disable=len(blocks) < 3):
        scores = queries.vectors @ matrix[start : start + n_rows].T  # (n_queries, n_rows)
        own = np.flatnonzero((queries.own >= start) & (queries.own < start + scores.shape[1]))
        scores[own, queries.own[own] - start] = -np.inf
        scores = np.concatenate([best, scores], axis=1)
        best = np.partition(scores, scores.shape[1] - k, axis=1)[:, -k:]
    return best.min(axis=1)


def recalls(kth: np.ndarray, answers: Answers, own: np.ndarray, k: int) -> np.ndarray:
    """Share of the exact top k that was found, a query each.

    A found row counts where its exact score reaches the k-th: of equal documents any will do.

    Args:
        kth: float32 (n,), from `kth_scores`.
        answers: k + 1 answers each, with scores computed exactly (reordered).
        own: int32 (n,), rows that do not count.
    """
    good = (answers.scores >= kth[:, None] - TIE) & (answers.rows != own[:, None])
    return np.minimum(good.sum(axis=1), k) / k


def lower_bound(shares: np.ndarray) -> float:
    """Lower end of the 95 % interval of a mean of shares (Student's t).

    One miss is added, so that a handful of queries without a miss proves nothing: it takes about 60 of
    them for a bound of 0.95, as the rule of three has it.
    """
    from scipy import stats

    shares = np.append(shares, 0.0)
    error = stats.sem(shares)
    if not error:  # nothing but misses
        return float(shares.mean())
    return float(max(0.0, stats.t.interval(0.95, len(shares) - 1, shares.mean(), error)[0]))


def fewest(meets: Callable[[int], bool], most: int) -> int | None:
    """The smallest of 1 to `most` that meets, in about 2 log2(most) tries; None where `most` does not.

    More leaves find more, so that what one number meets, the next meets too.
    """
    low, high = 0, 1
    while not meets(high):
        if high == most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high


def tune(
    searcher: Any, settings: Settings, matrix: np.ndarray, by_kind: dict[str, Queries], target: float
) -> tuple[Settings, list[TuningRecord]]:
    """Settings with the fewest leaves at which every kind of query has recall of at least `target`, surely.

    Returns:
        The settings (all leaves where none will do, or there are no queries), and what was tried, by leaves.
    """
    if not by_kind:
        _say("no dev queries to tune on: all leaves will be searched")
        return settings, []
    k = min(settings.k, len(matrix) - 1)
    kth = {kind: kth_scores(matrix, queries, k) for kind, queries in by_kind.items()}
    tried: list[TuningRecord] = []

    def meets(leaves: int) -> bool:
        records = []
        for kind, queries in by_kind.items():
            answers = search(searcher, queries.vectors, settings, k + 1, leaves)
            shares = recalls(kth[kind], answers, queries.own, k)
            records.append(TuningRecord(leaves, float(shares.mean()), lower_bound(shares), kind))
        worst = min(records, key=lambda record: record.low)
        tried.append(worst)
        _say(
            f"{leaves} of {settings.num_leaves} leaves: recall@{k} {worst.recall:.4f}, "
            f"surely {worst.low:.4f} ({worst.kind} queries)"
        )
        return worst.low >= target

    assert settings.num_leaves is not None
    found = fewest(meets, settings.num_leaves)
    if found is None:
        _say(f"no number of leaves is sure to reach index.target_recall = {target}: all will be searched")
    tuned = dataclasses.replace(settings, num_leaves_to_search=found or settings.num_leaves)
    return tuned, sorted(tried, key=lambda record: record.num_leaves_to_search)


def read_queries(embeddings: Embeddings, span: str, limit: int, seed: int) -> dict[str, Queries]:
    """The held-out queries of a span by kind, those of KINDS that there are: at most `limit` each, seeded."""
    columns = ["kind", "span", "document_row"]
    table = pq.read_table(embeddings.path / "queries.parquet", columns=columns)
    kinds, spans, documents = (table[name].to_numpy() for name in columns)
    vectors = np.load(embeddings.path / "queries.npy", mmap_mode="r")
    by_kind = {}
    for kind in KINDS:
        rows = np.flatnonzero((kinds == kind) & (spans == span)).astype(np.int32)
        if len(rows) > limit:
            rows = np.sort(np.random.default_rng(seed).choice(rows, limit, replace=False))
        if len(rows):
            own = documents[rows] if kind == "document" else np.full(len(rows), -1)
            by_kind[kind] = Queries(rows, np.ascontiguousarray(vectors[rows]), own.astype(np.int32))
    return by_kind


def read_test_queries(embeddings: Embeddings) -> Queries:
    """The queries that found.parquet answers: all kinds in one, none where there are none."""
    seed = 0  # which queries are asked does not hang on the settings
    parts = list(read_queries(embeddings, "test", N_FOUND_QUERIES, seed).values())
    if not parts:
        return Queries(np.empty(0, np.int32), np.empty((0, 1), np.float32), np.empty(0, np.int32))
    return Queries(
        *(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Queries))
    )


def read_probes(embeddings: Embeddings, matrix: np.ndarray) -> np.ndarray:
    """Single queries to try the export with, float32 (n, dim): test queries, or documents without them."""
    vectors = read_test_queries(embeddings).vectors
    return np.array((vectors if len(vectors) else matrix)[:N_LATENCY_QUERIES])


def sweep_leaves(searcher: Any, settings: Settings, queries: Queries) -> dict[int, Answers]:
    """k + 1 answers to the queries at 1, 2, 4, ... and all leaves; nothing where there are no queries."""
    if not len(queries.rows) or settings.num_leaves is None:
        return {}
    powers = [2**i for i in range(settings.num_leaves.bit_length()) if 2**i < settings.num_leaves]
    bar = tqdm([*powers, settings.num_leaves], desc="index: sweep over leaves", unit="sweep")
    return {leaves: search(searcher, queries.vectors, settings, settings.k + 1, leaves) for leaves in bar}


def ask_shipped(layer: Any, settings: Settings, queries: Queries, n_documents: int) -> pa.Table:
    """found.parquet's rows at the exported settings, k + 1 answers a query."""
    size = max(1, BLOCK_SCORES // n_documents)  # what brute force can answer at once
    leaves = settings.num_leaves_to_search or 0
    parts = [FOUND.empty_table()]
    for start in range(0, len(queries.rows), size):
        block = Queries(
            *(getattr(queries, f.name)[start : start + size] for f in dataclasses.fields(Queries))
        )
        scores, rows = layer(block.vectors, k=settings.k + 1)
        parts.append(as_table(block, leaves, True, Answers(rows.numpy(), scores.numpy())))
    return pa.concat_tables(parts)


def as_table(queries: Queries, leaves: int, shipped: bool, answers: Answers) -> pa.Table:
    """Rows of found.parquet; the NaN that ScaNN fills short answers with are left out."""
    there = np.isfinite(answers.scores)
    ends = np.concatenate([[0], np.cumsum(there.sum(axis=1))]).astype(np.int32)
    n_queries = len(queries.rows)
    columns = [
        queries.rows,
        np.full(n_queries, leaves, np.int32),
        np.full(n_queries, shipped),
        pa.ListArray.from_arrays(ends, pa.array(answers.rows[there], pa.int32())),
        pa.ListArray.from_arrays(ends, pa.array(answers.scores[there], pa.float32())),
    ]
    return pa.table(columns, schema=FOUND)


def ask_layer(layer: Any, query: np.ndarray) -> Answers:
    """One query's answers, (k,) each.

    Args:
        query: float32 (dim,).
    """
    tf, _ = _tensorflow()
    scores, rows = layer(tf.constant(query))
    return Answers(rows.numpy(), scores.numpy())


def ask_saved(folder: Path, probes: np.ndarray, expected: list[Answers]) -> dict[str, float]:
    """Milliseconds of single queries through the loaded SavedModel, which must answer as before saving.

    Args:
        probes: float32 (n, dim).
        expected: the layer's answers to the first of them.

    Raises:
        PipelineError: it answers otherwise.
    """
    tf, _ = _tensorflow()
    _say("loading what was saved")
    with _without_chatter():
        answer = tf.saved_model.load(str(folder)).signatures["serving_default"]
        answer(input_1=tf.constant(probes[0]))  # the first call makes the searcher
    for row, (probe, before) in enumerate(zip(probes, expected, strict=False)):
        after = answer(input_1=tf.constant(probe))["output_1"].numpy()
        if after.shape != before.scores.shape or not np.allclose(after, before.scores, atol=TIE):
            raise PipelineError(
                f"{folder}: the saved index scores probe {row} {after.tolist()}, before saving it was "
                f"{before.scores.tolist()}: run stage index --force"
            )
    times = []
    for probe in probes:
        query = tf.constant(probe)
        started = time.perf_counter()
        answer(input_1=query)["output_2"].numpy()
        times.append(1000 * (time.perf_counter() - started))
    return {f"p{p}": round(float(np.percentile(times, p)), 3) for p in (50, 95, 99)}


def as_fact(record: TuningRecord, k: int) -> dict[str, Any]:
    return {
        "num_leaves_to_search": record.num_leaves_to_search,
        f"recall_at_{k}": round(record.recall, 6),
        "low": round(record.low, 6),
        "kind": record.kind,
    }


def _tensorflow() -> tuple[Any, Any]:
    """TensorFlow, and the module that holds tfrs's two layers; seconds the first time."""
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # tfrs 0.7.7 knows no Keras 3
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors only
    first = "tensorflow" not in sys.modules
    with _without_chatter() if first else nullcontext():
        import tensorflow as tf
        from tensorflow_recommenders.layers import factorized_top_k

        if first:
            tf.config.set_visible_devices([], "GPU")  # what is built here is served on CPUs
            tf.constant(0)  # devices are looked for, and logged about, now
    return tf, factorized_top_k


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Keep known C++ log lines from stderr; all else passes at once, also the last words of a crash."""
    sys.stderr.flush()
    stderr = os.dup(2)
    grep = subprocess.Popen(["grep", "--line-buffered", "-vE", CHATTER], stdin=subprocess.PIPE, stdout=stderr)
    assert grep.stdin is not None
    os.dup2(grep.stdin.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)
        grep.stdin.close()
        grep.wait()


def _empty(folder: Path) -> None:
    """Remove what a killed attempt left: nothing here goes on from it, and TensorFlow would add to it."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _say(line: str) -> None:
    print(f"index: {line}", file=sys.stderr, flush=True)
