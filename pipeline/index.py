"""Stage `index`: embeddings -> index/, a SavedModel for TensorFlow Serving, tuned to its contract.

Two layers stand behind one interface (ask, ship, save, release): `TunedScaNN`, exact where there are few
documents, and tfrs's own. Builds are tried on samples, one is made of all documents, its search settings are
tuned on dev queries, and what was saved is asked once more by a process of its own.
"""

import dataclasses
import errno
import gc
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pipeline import saved_index, tuning, warmup
from pipeline.artifacts import Embeddings, Index, writing
from pipeline.builds import try_builds, words_of
from pipeline.chatter import tensorflow, without_chatter
from pipeline.checks import first_bad_row
from pipeline.config import IndexConfig, as_dict
from pipeline.errors import ArtifactError
from pipeline.index_settings import (
    Settings,
    candidates_of,
    choose_settings,
    leaves_to_try,
    memory_warning,
    most_entries,
    served_mib,
)
from pipeline.layers import Layer, as_ask, asking, fastest, say, train, tuned_layer
from pipeline.recall import judged_latency
from pipeline.tuning import Answers, Judge, Queries, Record, Search, Trial

KINDS = ("document", "typed", "logged")  # of held-out queries
N_STORED_QUERIES = 300  # of each kind that the stored rows are judged by
N_FOUND_QUERIES = 2000  # test queries of each kind that found.parquet answers
N_LATENCY_QUERIES = 1000
N_PROBES = 100  # answers that must be the same before saving and after loading
N_FRONTIER = 12  # settings of it that are answered
FOUND_BLOCK = 1 << 19  # answers of found.parquet held at once

FOUND = pa.schema(
    {
        "query": pa.int32(),
        "num_leaves_to_search": pa.int32(),
        "num_reordering_candidates": pa.int32(),
        "shipped": pa.bool_(),
        "document_rows": pa.list_(pa.int32()),
        "scores": pa.list_(pa.float32()),
    }
)


@dataclasses.dataclass(frozen=True)
class Point:
    """A search setting of the frontier, and how fast it is; recall on dev queries, None without them."""

    search: Search
    recall: float | None = None
    low: float | None = None
    single_qps: float | None = None
    batched_qps: float | None = None


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The search setting to ship, and how it was found."""

    shipped: Search
    tried: Sequence[Record] = ()
    frontier: Sequence[Point] = ()


def run(config: IndexConfig, embeddings: Embeddings, out: Path) -> Index:
    """Build, tune and export the index, and ask the export what its speed and memory are.

    Raises:
        ArtifactError: the embeddings hold no rows, rows that are not unit vectors, or parts that do not fit.
        ConfigError: a setting does not fit this number of documents.
        PipelineError: ScaNN refuses to build, or the saved index answers otherwise than before saving.
    """
    matrix = embeddings.matrix()
    check_embeddings(embeddings, matrix)
    settings, reason = choose_settings(config, *matrix.shape)
    say(f"{len(matrix):,} documents: {reason}")
    with writing(Index, out, config=as_dict(config), inputs=[embeddings]) as draft:
        _empty(draft.folder)
        dev = read_queries(embeddings, "dev", config.n_tuning_queries, config.seed)
        layer, settings, facts = make(config, settings, embeddings, matrix, dev, draft.folder)
        judge = judge_of(config, settings, matrix, dev)
        facts["stored_recall"] = stored_recall(config, settings, layer, matrix, dev, judge)
        tuned = tune(config, settings, layer, judge)
        settings = settings.with_search(tuned.shipped) if settings.num_leaves else settings
        test, probes = read_test_queries(embeddings), read_probes(embeddings, matrix)
        n_found = write_found(draft.folder / "found.parquet", layer, settings, tuned, test)
        expected = [scores_of(layer, probe, config.k) for probe in probes[:N_PROBES]]
        save(layer, draft.folder)
        layer.release()  # the loaded copy takes as much memory again
        del layer
        gc.collect()
        extra = draft.folder / "assets.extra"
        extra.mkdir(exist_ok=True)
        shutil.copyfile(embeddings.path / "documents.parquet", extra / "documents.parquet")
        asked = tuned.shipped if settings.num_leaves else Search(1, config.k)
        n_warm = warmup.write_requests(
            draft.folder, matrix, k=config.k, search=asked, max_queries=config.max_queries
        )
        draft.rows.update(documents=len(matrix), found=n_found, warmup_requests=n_warm)
        draft.facts.update(
            layer=config.layer if settings.num_leaves else "exact",
            reason=reason,
            settings=dataclasses.asdict(settings),
            tuning=[as_fact(record) for record in tuned.tried],
            **facts,
            **ask_saved(config, draft.folder, settings, tuned, probes, expected),
            bytes=sum(file.stat().st_size for file in draft.folder.rglob("*") if file.is_file()),
            dim=matrix.shape[1],
        )
    return Index.open(out)


def check_embeddings(embeddings: Embeddings, matrix: np.ndarray) -> None:
    """Refuse rows that ScaNN cannot take (a NaN ends the process) or that the dot product would misrank.

    Raises:
        ArtifactError: which file and row, what it holds, and what to do.
    """
    again = "run stage encode --force"
    if matrix.ndim != 2 or matrix.dtype != np.float32 or not matrix.size:
        raise ArtifactError(
            f"{embeddings.path}/embeddings.npy holds {in_words(matrix)}, "
            f"wanted float32 vectors of one width, of at least one document: {again}"
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
        name = " ".join(str(documents["document_id"][row]).split())[:60]  # a line, whatever it holds
        raise ArtifactError(
            f"{embeddings.path}/embeddings.npy row {row} (document_id {name}) "
            f"{what}, wanted unit length: mend or remove the document's text, then {again}"
        )
    queries = np.load(embeddings.path / "queries.npy", mmap_mode="r")
    n_queries = pq.read_metadata(embeddings.path / "queries.parquet").num_rows
    if queries.shape != (n_queries, matrix.shape[1]):
        raise ArtifactError(
            f"{embeddings.path}/queries.npy holds {in_words(queries)}, wanted {n_queries:,}, one for each "
            f"row of queries.parquet, of {matrix.shape[1]:,} numbers, as many as in embeddings.npy: {again}"
        )
    bad = first_bad_row(queries)
    if bad is not None:
        raise ArtifactError(
            f"{embeddings.path}/queries.npy row {bad[0]} {bad[1]}, wanted unit length: {again}"
        )


def in_words(vectors: np.ndarray) -> str:
    """What an array of vectors is, for a message."""
    if vectors.ndim == 2:
        s = "" if len(vectors) == 1 else "s"
        return f"{len(vectors):,} {vectors.dtype} vector{s} of {vectors.shape[1]:,} numbers"
    sizes = " x ".join(f"{size:,}" for size in vectors.shape)
    return f"{sizes or 'one'} {vectors.dtype} numbers and no list of vectors"


# Builds


def make(
    config: IndexConfig,
    settings: Settings,
    embeddings: Embeddings,
    matrix: np.ndarray,
    dev: Mapping[str, Queries],
    scratch: Path,
) -> tuple[Layer, Settings, dict[str, Any]]:
    """The layer over all documents, its settings, and what is to be said of how it was chosen."""
    tensorflow()
    if config.layer == "tfrs" and settings.num_leaves is not None:
        return make_tfrs(config, settings, matrix), settings, told([], len(matrix), TFRS_VARIES)
    trials: list[Trial] = []
    assets = None
    if settings.num_leaves is not None:
        settings, trials, assets = try_builds(config, settings, matrix, dev, scratch)
    if not trials:  # a trial has told it before
        say_if_it_will_not_fit(config, settings, matrix.shape)
    if settings.num_leaves is not None and assets is None:
        say(f"building with {words_of(settings.as_build())}")
        assets = train(config, settings, matrix, scratch)
    ids = pq.read_table(embeddings.path / "documents.parquet", columns=["document_id"])["document_id"]
    layer = tuned_layer(config, settings)
    with without_chatter():
        layer.index(matrix, ids.to_numpy(), assets=assets)
    n_entries = len(assets.owners) if assets is not None else 0
    return layer, settings, told(trials, n_entries, _varies(config, settings, len(matrix)) if assets else [])


def say_if_it_will_not_fit(config: IndexConfig, settings: Settings, shape: tuple[int, ...]) -> None:
    """Before anything is trained, with as many second leaves as there can be."""
    n_entries = 0 if settings.num_leaves is None else most_entries(settings.spill, shape[0])
    mib = served_mib(config, settings.quantize_reordering or "float32", shape, n_entries)
    if line := memory_warning(config, mib):
        say(line)


# What building again does not give bit for bit, and why. All else hangs on the seed alone.
TIMED = (
    "num_leaves_to_search and num_reordering_candidates, where they are auto: the cheapest setting is found "
    "by measuring time, which decides between near equals"
)
TFRS_VARIES = [TIMED]
TUNED_VARIES = [
    TIMED,
    "num_leaves, spill, anisotropic_quantization_threshold and quantize_reordering, where they are auto: "
    "builds are compared by measured time",
]
STARTED_AT_RANDOM = (
    "the tree and the codes: k-means starts at random rows, which ScaNN takes in another order each time; "
    "its seeded start, k-means++, would take longer than all the rest of the training at this size"
)


def _varies(config: IndexConfig, settings: Settings, n_rows: int) -> list[str]:
    from pipeline.scann_assets import starts_at_random

    n_training_rows = min(config.training_sample_size, n_rows)
    is_random = starts_at_random(settings.num_leaves or 1, n_training_rows)
    return [*TUNED_VARIES, STARTED_AT_RANDOM] if is_random else TUNED_VARIES


def told(trials: Sequence[Trial], n_entries: int, varies: Sequence[str]) -> dict[str, Any]:
    """Facts of how the index was made."""
    return {
        "builds": [as_build_fact(t) for t in trials],
        "n_entries": n_entries,
        "not_reproducible": list(varies),
    }


def make_tfrs(config: IndexConfig, settings: Settings, matrix: np.ndarray) -> Layer:
    """tfrs's layer, built and not shipped yet."""
    from pipeline.tfrs_layer import TfrsLayer

    started = time.monotonic()
    say("building")
    names = (
        *("k", "distance_measure", "num_leaves", "num_reordering_candidates"),
        *("dimensions_per_block", "training_iterations"),
    )
    layer = TfrsLayer(matrix, seed=config.seed, **{name: getattr(settings, name) for name in names})
    say(f"built in {time.monotonic() - started:.1f} s")
    return layer


# Search settings


def judge_of(
    config: IndexConfig, settings: Settings, matrix: np.ndarray, dev: Mapping[str, Queries]
) -> Judge | None:
    """What measures recall on dev queries; None where nothing is to be tuned, or there are too few to."""
    if settings.num_leaves is None:
        return None
    rest = "all leaves will be searched" if config.num_leaves_to_search == "auto" else "nothing is tuned"
    if not dev:
        say(f"no dev queries to tune on: {rest}")
        return None
    judge = Judge(matrix, dev, config.k, config.target_recall, progress=True)
    for kind, n in judge.too_few.items():
        say(
            f"{n} {kind} queries are too few to tune on: even without a miss they would not prove "
            f"index.target_recall = {config.target_recall:g}"
        )
    if not judge.by_kind:
        say(f"no queries are left to tune on: {rest}")
        return None
    return judge


def tune(config: IndexConfig, settings: Settings, layer: Layer, judge: Judge | None) -> Tuned:
    """The cheapest search setting whose recall surely meets the target, with every kind of queries.

    Without queries that could prove it: all leaves. Where none meets it: the best, which `publish` refuses.
    """
    given = settings.as_search()
    if settings.num_leaves is None:
        return Tuned(given)
    if judge is None:
        return Tuned(given, frontier=[Point(given)])
    explored = tuning.explore(
        saying(config, settings, judge, layer),
        config.target_recall,
        leaves=leaves_to_try(config, settings),
        candidates=candidates_of(config),
        upwards=True,
    )
    if explored.met:
        shipped = fastest(layer, judge, explored.met, config.requests)
    else:
        shipped = explored.best()
        say(
            f"nothing tried is sure to reach index.target_recall = {config.target_recall:g}; the best, "
            f"surely {shipped.low:.4f}, is shipped, and publish will refuse it"
        )
    say(
        f"shipped: {shipped.search.num_leaves_to_search:,} leaves, "
        f"{shipped.search.num_reordering_candidates:,} candidates"
    )
    frontier = frontier_of(config, layer, judge, explored.tried, shipped)
    return Tuned(shipped.search, explored.tried, frontier)


def saying(config: IndexConfig, settings: Settings, judge: Judge, layer: Layer) -> Callable[[Search], Record]:
    """Measures a setting and says what came out."""

    def measure(search: Search) -> Record:
        record = judge.record(as_ask(layer), search)
        say(
            f"{search.num_leaves_to_search:,} of {settings.num_leaves:,} leaves, "
            f"{search.num_reordering_candidates:,} candidates: recall@{judge.k} {record.recall:.4f}, "
            f"surely {record.low:.4f} ({record.kind} queries)"
        )
        return record

    return measure


def frontier_of(
    config: IndexConfig, layer: Layer, judge: Judge, tried: Sequence[Record], shipped: Record
) -> list[Point]:
    """Settings from fast to exact, about N_FRONTIER of them spread over recall, and the shipped one.

    What `TunedScaNN` saves is asked for their speed by a process of its own (`ask_saved`); what tfrs saves
    takes no settings with a request, so that its searcher is timed here.
    """
    records = sorted(tuning.undominated(tried), key=lambda record: record.recall)
    is_tfrs = config.layer == "tfrs"
    most = 2 * N_FRONTIER if is_tfrs else N_FRONTIER  # of those timed here, the slower and worse still go
    records = [records[i] for i in tuning.spread([r.recall for r in records], most)]
    if shipped not in records:
        records.append(shipped)
    if not is_tfrs:
        return sorted(
            (Point(record.search, record.recall, record.low) for record in records),
            key=lambda point: point.recall or 0.0,
        )
    rates = {
        requests: [
            1 / seconds
            for seconds in tuning.seconds_each(
                [asking(layer, judge, record.search, requests) for record in records],
                progress=f"index: timing {requests} queries",
            )
        ]
        for requests in ("single", "batched")
    }
    points = [
        Point(record.search, record.recall, record.low, single, batched)
        for record, single, batched in zip(records, rates["single"], rates["batched"], strict=True)
    ]
    return thinned(on_frontier(points, shipped.search, config.requests), shipped.search)


def on_frontier(points: Sequence[Point], shipped: Search, requests: str) -> list[Point]:
    """Those that no other is both faster and better than, by recall; the shipped one whatever it is."""
    speed = [(p.single_qps if requests == "single" else p.batched_qps) or 0.0 for p in points]
    best = tuning.pareto([(point.recall or 0.0, qps) for point, qps in zip(points, speed, strict=True)])
    kept = [point for i, point in enumerate(points) if i in best or point.search == shipped]
    return sorted(kept, key=lambda point: point.recall or 0.0)


def thinned(points: Sequence[Point], shipped: Search) -> list[Point]:
    """About N_FRONTIER of them, spread over recall."""
    chosen = set(tuning.spread([point.recall or 0.0 for point in points], N_FRONTIER))
    return [point for i, point in enumerate(points) if i in chosen or point.search == shipped]


def stored_recall(
    config: IndexConfig,
    settings: Settings,
    layer: Any,
    matrix: np.ndarray,
    dev: Mapping[str, Queries],
    judge: Judge | None,
) -> float | None:
    """Recall of exact search over the stored rows against float32; None for float32, or one row alone.

    Args:
        dev: asked where nothing was tuned, and so nothing is to be proved; without them, the first documents.
    """
    if settings.quantize_reordering in (None, "float32") or len(matrix) == 1:
        return None
    if judge is None:
        n = min(N_STORED_QUERIES, len(matrix))
        asked = {kind: queries.part(slice(N_STORED_QUERIES)) for kind, queries in dev.items()}
        first = Queries(np.arange(n), np.array(matrix[:n]), np.arange(n))
        judge = Judge(matrix, asked or {"document": first}, config.k, 0.0)
    shares = []
    for kind, queries in judge.by_kind.items():
        some = queries.part(slice(N_STORED_QUERIES))
        k = judge.k + int((some.own >= 0).any())
        shares.append(judge.recalls(kind, layer.served().exact(some.vectors, k)[1].numpy()))
    recall = float(np.mean(np.concatenate(shares)))
    say(f"exact search over the {settings.quantize_reordering} rows: recall@{judge.k} {recall:.4f}")
    return round(recall, 6)


# What is kept


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
    """Single queries to try the export with, float32 (n, dim): test queries first, then documents.

    A handful of queries would make the latency that of the first, cold calls.
    """
    vectors = read_test_queries(embeddings).vectors[:N_LATENCY_QUERIES]
    documents = np.array(matrix[: N_LATENCY_QUERIES - len(vectors)])
    return np.concatenate([vectors, documents]) if len(vectors) else documents


def write_found(path: Path, layer: Layer, settings: Settings, tuned: Tuned, test: Queries) -> int:
    """Write the answers to test queries, and ship the settings on the way. Returns the rows written.

    The frontier's come first: tfrs's layer can be asked with other settings than its own only before it is
    shipped.
    """
    k = max(settings.k, 10) + 1
    others = [point.search for point in tuned.frontier if point.search != tuned.shipped]
    with pq.ParquetWriter(path, FOUND) as writer:
        bar = tqdm(others, desc="index: answers on the frontier", unit="setting", leave=False)
        n_rows = sum(_write_answers(writer, layer, search, False, test, k) for search in bar)
        if settings.num_leaves is not None:
            layer.ship(tuned.shipped.num_leaves_to_search, tuned.shipped.num_reordering_candidates)
        return n_rows + _write_answers(writer, layer, tuned.shipped, True, test, k)


def _write_answers(
    writer: pq.ParquetWriter, layer: Layer, search: Search, shipped: bool, test: Queries, k: int
) -> int:
    asked = (None, None) if shipped else dataclasses.astuple(search)
    for block in _blocks(test, max(1, FOUND_BLOCK // k)):
        scores, rows = layer.ask(block.vectors, k, *asked)
        writer.write_table(as_table(block, search, shipped, Answers(rows, scores)))
    return len(test.rows)


def _blocks(queries: Queries, size: int) -> Iterator[Queries]:
    for start in range(0, len(queries.rows), size):
        yield queries.part(slice(start, start + size))


def as_table(queries: Queries, search: Search, shipped: bool, answers: Answers) -> pa.Table:
    """Rows of found.parquet; where fewer rows were found there are fewer."""
    there = answers.rows >= 0
    ends = np.concatenate([[0], np.cumsum(there.sum(axis=1))]).astype(np.int32)
    n_queries = len(queries.rows)
    columns = [
        queries.rows,
        np.full(n_queries, search.num_leaves_to_search, np.int32),
        np.full(n_queries, search.num_reordering_candidates, np.int32),
        np.full(n_queries, shipped),
        pa.ListArray.from_arrays(ends, pa.array(answers.rows[there], pa.int32())),
        pa.ListArray.from_arrays(ends, pa.array(answers.scores[there], pa.float32())),
    ]
    return pa.table(columns, schema=FOUND)


def scores_of(layer: Layer, query: np.ndarray, k: int) -> np.ndarray:
    """Scores of the shipped answers to one query, best first, as many as there are."""
    scores, rows = layer.ask(query[np.newaxis], k)
    return scores[0][rows[0] >= 0]


def save(layer: Layer, folder: Path) -> None:
    """Write the SavedModel.

    Raises:
        OSError: the disk is full.
    """
    tf = tensorflow()
    say("saving")
    try:
        with without_chatter():
            layer.save(folder)
    except tf.errors.OpError as error:
        if "No space left" in str(error):  # TensorFlow has no error number for it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from None
        raise


def ask_saved(
    config: IndexConfig,
    folder: Path,
    settings: Settings,
    tuned: Tuned,
    probes: np.ndarray,
    expected: Sequence[np.ndarray],
) -> dict[str, Any]:
    """Speed and memory of what was saved, as facts; with the frontier's speeds in a process that serves."""
    say("asking what was saved, in a process of its own")
    measured = saved_index.measure(
        folder,
        probes,
        expected,
        k=config.k,
        shipped=tuned.shipped if settings.num_leaves else Search(1, config.k),
        frontier=[point.search for point in tuned.frontier],
        max_queries=config.max_queries,
    )
    points = list(tuned.frontier)
    if measured.single_qps:
        rates = zip(points, measured.single_qps, measured.batched_qps_of, strict=True)
        points = [dataclasses.replace(p, single_qps=s, batched_qps=b) for p, s, b in rates]
        points = on_frontier(points, tuned.shipped, config.requests)
    facts = {
        "frontier": [as_point_fact(point, tuned.shipped) for point in points],
        "latency_ms": measured.latency_ms,
        "batched_qps": measured.batched_qps,
        "memory_mib": measured.memory_mib,
        "load_seconds": measured.load_seconds,
    }
    p95, memory = measured.latency_ms["p95"], measured.memory_mib
    say(f"single queries p95 {p95:g} ms, {memory:,.0f} MiB, loaded in {measured.load_seconds:g} s")
    latency = judged_latency(facts, config.requests)
    for name, figure in (("memory_mib", memory), ("target_latency_ms", latency)):
        most = getattr(config, name)
        if most is not None and figure is not None and figure > most:
            say(f"{figure:,.3g} is above index.{name} = {most:,}: publish will refuse it")
    return facts


def as_fact(record: Record) -> dict[str, Any]:
    return {
        **dataclasses.asdict(record.search),
        "kind": record.kind,
        "recall": round(record.recall, 6),
        "low": round(record.low, 6),
    }


def as_point_fact(point: Point, shipped: Search) -> dict[str, Any]:
    return {
        **dataclasses.asdict(point.search),
        "recall": _rounded(point.recall, 6),
        "low": _rounded(point.low, 6),
        "single_qps": _rounded(point.single_qps, 1),
        "batched_qps": _rounded(point.batched_qps, 1),
        "shipped": point.search == shipped,
    }


def as_build_fact(trial: Trial) -> dict[str, Any]:
    return {
        "n_rows": trial.n_rows,
        **dataclasses.asdict(trial.build),
        "recall": round(trial.recall, 6),
        "queries_per_second": _rounded(trial.queries_per_second, 1),
        "memory_mib": round(trial.memory_mib, 1),
        "fits": trial.fits,
        "kept": trial.kept,
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _empty(folder: Path) -> None:
    """Remove what a killed attempt left: nothing here goes on from it, and TensorFlow would add to it."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
