"""Stage `encode`: documents and held-out queries -> embeddings/, one unit-length float32 row a text.

Row i of embeddings.npy is row i of documents.parquet. Texts that the version before has by the same model and
settings are copied, the others are encoded in shards: a killed run goes on behind its last one. Documents are
streamed; what is held of all of them at once is numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import checks, compared, encoder, passages, precision, reuse, shards
from pipeline.artifacts import (
    MANIFEST,
    SAID_OF_A_MODEL,
    Embeddings,
    Model,
    Pairs,
    library_versions,
    sha256,
    write_json,
    writing,
)
from pipeline.config import EncodeConfig, as_dict
from pipeline.errors import ArtifactError, ConfigError, InputError
from pipeline.reuse import Known, Matrices, Planned
from pipeline.shards import Encoded, Engine, Job, Precision, Shards, Texts
from pipeline.throughput import WINDOW

ROW_GROUP = 10_000  # rows: a client reads only the groups that hold what was found
BYTES_AT_ONCE = 32 << 20  # of rows that are read or written together, where texts are long
MATRIX = "embeddings"
DOCUMENTS = "documents.parquet"
CHOSEN = "precision.json"  # what was chosen, for the run that goes on after a kill
SCRATCH = (*reuse.SCRATCH, *compared.SCRATCH)
# Who computes, where, and what is refused; the bits stay the same, and a raised limit keeps what is done.
NOT_OF_THE_RESULT = ("processes", "temp_location", "max_mean_cosine")
CARRIED = 0.8  # share of the rows that must be copied for the guard's verdict on them to hold for all


def settings_of(config: EncodeConfig) -> dict[str, Any]:
    """The settings that decide the artefact."""
    return {name: value for name, value in as_dict(config).items() if name not in NOT_OF_THE_RESULT}


def inputs_of(config: EncodeConfig, model: Model, pairs: Pairs) -> list[Any]:
    """The model, the pairs and the files of `encode.sts`.

    Raises:
        InputError: no such file.
    """
    files = []
    for language, path in config.sts.items():
        if not Path(path).is_file():
            raise InputError(f"encode.sts: {language}: {path}: no such file; wanted a KorSTS or STS-B file")
        files.append({"path": path, "digest": sha256(Path(path))})
    return [model, pairs, *files]


def run(
    config: EncodeConfig,
    model: Model,
    pairs: Pairs,
    out: Path,
    published: Path | None = None,
    engine: Engine | None = None,
    fresh: bool = False,
) -> Embeddings:
    """Encode what is new among the documents, the held-out queries, and what models are compared by.

    Args:
        published: the folder of the encoder that is served now, `encoders/<sha256>`: left out where it is
            this model's own. It decides nothing but its own vectors, so it is no part of the artefact's key.
        engine: what encodes the documents; None: this process.
        fresh: copy no row of the version before.

    Raises:
        ConfigError: the model's vectors have another width than `encode.dim`.
        ArtifactError: the model gave rows that are no vectors, or that no search can be built on.
        InputError: there are no documents, or a file of `encode.sts` cannot be used.
    """
    check_width(config, model)
    inputs = inputs_of(config, model, pairs)
    compared.sts_of(config)  # refused now, not after hours
    before = version_before(out)
    with (
        shards.one_open(),
        writing(
            Embeddings, out, config=settings_of(config), inputs=inputs, scratch=SCRATCH, notes=[CHOSEN]
        ) as draft,
    ):
        folder, file = draft.folder, draft.folder / DOCUMENTS
        if fresh:
            reuse.start_fresh(folder)
        n_documents, n_rows = write_documents(pairs, file, config)
        matrices = Matrices(folder, Known.of(None if fresh else before))
        asked = Asked(config, model, before, fresh, n_documents, count_deleted(before, file))
        planned, guard = plan(asked, matrices, texts_of(file), n_rows)
        matrix, speed = encode(matrices, planned, engine, asked)
        job = planned.job

        seen = matrices.seen(MATRIX)
        limit, n_unknown = config.max_mean_cosine, seen["unknown_only"]
        found = checks.check(matrix, planned.keys, config.dim, limit, ids_of(file), n_unknown)
        drift = checks.drift(matrix, planned.keys, file, before)
        draft.facts |= {
            "dim": config.dim,
            "precision": job.precision,
            "guard": guard,
            "checks": dataclasses.asdict(found) | {"drift": drift},
            "seen": seen,
            "made_by": reuse.made_by(),
            "description": pairs.facts["description"],
            "trained": model.facts["trained"],
            "texts_a_second": speed,
            "n_parameters": n_parameters(job, model, before),
            "model_bytes": model_bytes(model),
            **encoder_facts(config, model),
        }
        counts, facts = compared.write_compared(
            folder, pairs, model, config, matrices.write, job.precision, published,
            before.facts if before else None,
        )  # fmt: skip
        draft.rows |= planned.plan.counts | counts
        draft.rows |= {"documents": n_documents, "rows": n_rows, "deleted": asked.n_deleted}
        draft.facts |= facts
    return Embeddings.open(out)


def check_width(config: EncodeConfig, model: Model) -> None:
    if model.facts["dim"] != config.dim:
        raise ConfigError(
            f"{model.path} gives vectors of {model.facts['dim']} numbers, but encode.dim is {config.dim}; "
            "set encode.dim or train another model"
        )


def version_before(out: Path) -> Embeddings | None:
    """What stands in `out`, of which rows can be copied; a damaged one is said, and is as good as none."""
    try:
        before = Embeddings.open(out)
    except ArtifactError as error:
        if (out / MANIFEST).exists():
            say(f"nothing can be copied: {str(error).partition(': run stage')[0]}")
        return None
    damaged = reuse.damaged_file(before.path, before.manifest["files"])
    if damaged is not None:
        say(f"nothing can be copied: {damaged} is damaged")
    return before if damaged is None else None


# --- Documents ---------------------------------------------------------------------------------------


def write_documents(pairs: Pairs, file: Path, config: EncodeConfig) -> tuple[int, int]:
    """documents.parquet: the documents in the order of their ids, or their passages.

    Returns:
        How many documents there are, and how many rows.

    Raises:
        InputError: none; or they have a column that passages are numbered by.
    """
    n_documents = sum(count(part) for part in pairs.tables("documents"))
    if not n_documents:
        raise InputError(f"{pairs.path} has no documents, so there is nothing to encode; see documents.paths")
    begun, n_rows, writer = file.with_name(f".{file.name}.tmp"), 0, None
    given = (batch for part in pairs.tables("documents") for batch in batches(part))
    for group in row_groups(passages.rows_of(batch, config) for batch in given):
        writer = writer or pq.ParquetWriter(begun, group.schema)
        writer.write_table(group, row_group_size=ROW_GROUP)
        n_rows += len(group)
    if writer:
        writer.close()
    begun.replace(file)
    return n_documents, n_rows


def row_groups(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same rows, ROW_GROUP in each table but the last; fewer where they take more than BYTES_AT_ONCE."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        while sum(map(len, held)) >= ROW_GROUP or (held and sum(t.nbytes for t in held) > BYTES_AT_ONCE):
            joined = pa.concat_tables(held, promote_options="default")
            yield joined.slice(0, ROW_GROUP)
            held = [joined.slice(ROW_GROUP)] if len(joined) > ROW_GROUP else []
    if held:
        yield pa.concat_tables(held, promote_options="default")


def batches(file: Path, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """A Parquet file's rows, so many at once as take BYTES_AT_ONCE at most where they are of like length."""
    with pq.ParquetFile(file, buffer_size=1 << 20) as parquet:
        groups = [parquet.metadata.row_group(n) for n in range(parquet.num_row_groups)]
        row_bytes = max([1, *(group.total_byte_size // max(1, group.num_rows) for group in groups)])
        yield from parquet.iter_batches(max(1, min(ROW_GROUP, BYTES_AT_ONCE // row_bytes)), columns=columns)


def texts_of(file: Path) -> Texts:
    """Every row's text, one after the other, each time it is called."""
    return lambda: (text for batch in batches(file, ["text"]) for text in batch["text"].to_pylist())


def ids_of(file: Path) -> Callable[[int], str]:
    """The document_id of a row, looked up in the file."""

    def id_of(row: int) -> str:
        ids = (i for batch in batches(file, ["document_id"]) for i in batch["document_id"].to_pylist())
        return next(itertools.islice(ids, row, None))

    return id_of


def count(file: Path) -> int:
    """Rows of a Parquet file; 0 where there is none."""
    return pq.read_metadata(file).num_rows if file.exists() else 0


def count_deleted(before: Embeddings | None, file: Path) -> int:
    """Documents of the version before that are gone."""
    if before is None:
        return 0
    known = np.concatenate([*checks.hashes(before.path / DOCUMENTS, "document_id")])
    known.sort()
    is_gone = np.ones(len(known), bool)
    is_gone[1:] = known[1:] != known[:-1]  # of a document's passages only the first one counts
    for hashes in checks.hashes(file, "document_id"):
        at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        is_gone[at[known[at] == hashes]] = False
    return int(is_gone.sum())


# --- The plan and the encoder -------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What a run is about.

    Attributes:
        before: the version before.
        fresh: no row of it is copied.
        n_documents: of this version.
        n_deleted: documents of the version before that are gone.
    """

    config: EncodeConfig
    model: Model
    before: Embeddings | None
    fresh: bool
    n_documents: int
    n_deleted: int


def plan(asked: Asked, matrices: Matrices, texts: Texts, n_rows: int) -> tuple[Planned, dict[str, Any]]:
    """Where the rows come from, and facts.guard: why they are encoded at their precision.

    What is copied is said before the precision is chosen, which may take hours. Until then it is taken to be
    that of the version before.
    """
    config, model, before = asked.config, asked.model, asked.before
    job = Job(
        str(model.path), config.dim, device=config.device, batch_size=config.batch_size,
        batch_tokens=config.batch_tokens, title="documents",
    )  # fmt: skip

    def at(wanted: str) -> Job:
        return dataclasses.replace(job, precision=cast(Precision, wanted))

    def plan_at(wanted: str) -> Planned:
        return matrices.plan(MATRIX, texts, at(wanted), model.encoder_sha256)

    chosen = chosen_before_a_kill(matrices.folder, config)
    planned = plan_at(chosen["precision"] if chosen else expected(config, before))
    say_plan(asked, planned)
    if chosen is None:
        is_carried = before and is_same_choice(before, config, model)
        is_carried = is_carried and planned.plan.counts["copied"] >= CARRIED * n_rows
        found, guard = precision.choose(
            lambda tried: shards.opened(at(tried)),
            lambda n: sample(texts, n_rows, n),
            n_rows,
            config,
            before.facts if before and is_carried else None,
        )
        chosen = {"precision": found, "guard": guard}
        write_json(matrices.folder / CHOSEN, chosen)
    if chosen["precision"] != planned.job.precision:
        counts = planned.plan.counts
        planned = plan_at(chosen["precision"])
        if planned.plan.counts != counts:
            say_plan(asked, planned)
    return planned, chosen["guard"]


def chosen_before_a_kill(folder: Path, config: EncodeConfig) -> dict[str, Any] | None:
    """What an earlier attempt chose, where it can be had here: {"precision", "guard"}."""
    chosen = reuse.noted(folder / CHOSEN)
    return chosen if chosen and can_be_had(chosen["precision"], config) else None


def expected(config: EncodeConfig, before: Embeddings | None) -> str:
    """The precision that is likely to be chosen."""
    if config.precision != "auto":
        return config.precision
    return (
        before.facts["precision"] if before and can_be_had(before.facts["precision"], config) else "float32"
    )


def can_be_had(wanted: str, config: EncodeConfig) -> bool:
    """Whether this machine computes at a precision that another may have chosen."""
    is_chosen_here = wanted in ("float32", config.precision)
    return is_chosen_here or encoder.has_bfloat16(encoder.device_type(config.device))


def is_same_choice(before: Embeddings, config: EncodeConfig, model: Model) -> bool:
    """Whether the guard would ask the same encoder the same thing again."""
    asked = ("guard_sample", "guard_recall")
    return (
        all(before.facts.get(name) == value for name, value in encoder_facts(config, model).items())
        and all(before.manifest["config"].get(name) == getattr(config, name) for name in asked)
        and before.manifest["libraries"].get("torch") == library_versions().get("torch")
    )


def encoder_facts(config: EncodeConfig, model: Model) -> dict[str, Any]:
    """What tells one encoder of documents from another."""
    return {
        "encoder_sha256": model.encoder_sha256,
        "prompts": model.facts.get("prompts"),
        "max_seq_length": model.facts.get("max_seq_length"),
        "device": encoder.device_type(config.device),
    }


def sample(texts: Texts, n_rows: int, n: int) -> list[str]:
    """So many texts at equal distances."""
    chosen = np.zeros(n_rows, bool)
    chosen[np.linspace(0, n_rows - 1, min(n, n_rows)).astype(np.int64)] = True
    return list(itertools.compress(texts(), chosen))


def encode(
    matrices: Matrices, planned: Planned, engine: Engine | None, asked: Asked
) -> tuple[np.ndarray, float | None]:
    """The documents' matrix, and texts a second: of the version before where it is known and this run encodes
    too few to tell; None where no text has been encoded.

    Raises:
        ArtifactError: the first shard of a model of which nothing is copied shows that it is collapsed.
    """
    fetch_from_workers(matrices.folder, planned)
    n_left, rate = planned.n_left, asked.before.facts["texts_a_second"] if asked.before else None
    if planned.shards and len(planned.shards.n_rows) > 1 and not planned.plan.counts["copied"]:
        planned.shards.watch_first(lambda first: check_first(first, asked.config.max_mean_cosine))

    def timed(job: Job, windows: Iterable[tuple[int, list[str]]], made: Shards) -> None:
        nonlocal rate
        if engine is None:
            shards.opened(job)  # the clock measures encoding
        started = time.perf_counter()
        (engine or shards.in_process)(job, windows, made)
        if rate is None or n_left >= WINDOW:
            rate = round(n_left / (time.perf_counter() - started), 1)

    matrix = matrices.make(planned, timed)
    return matrix, rate


def fetch_from_workers(folder: Path, planned: Planned) -> None:
    """Take what workers finished for a driver that was killed; Beam is loaded only where there was one."""
    if (folder / shards.ELSEWHERE).exists():
        from pipeline import encode_line

        encode_line.fetch(folder, planned.shards)


def check_first(first: Encoded, max_mean_cosine: float) -> None:
    """Refuse a model by its first shard; the last one may come many hours later."""
    n_rows, n_unknown = len(first.rows), reuse.counted(first.flags)["unknown_only"]
    what = f"the first {n_rows:,} documents' rows"
    checks.check_spread(first.rows, np.ones(n_rows, bool), max_mean_cosine, what, n_unknown)


def n_parameters(job: Job, model: Model, before: Embeddings | None) -> int:
    if before and before.facts["encoder_sha256"] == model.encoder_sha256:
        return before.facts["n_parameters"]
    return sum(weights.numel() for weights in shards.opened(job).model.parameters())


def model_bytes(model: Model) -> int:
    """Size of the files that make a text's vector: what serving loads, without what is said of the model."""
    names = set(model.manifest["files"]) - set(SAID_OF_A_MODEL)
    return sum((model.path / name).stat().st_size for name in names)


# --- What is said beforehand -------------------------------------------------------------------------


def say_plan(asked: Asked, planned: Planned) -> None:
    """How many rows are copied and encoded, why none is copied, and how long it takes."""
    counts, before = planned.plan.counts, asked.before
    n_rows = sum(counts.values())
    passages = f" of {asked.n_documents:,} documents" if n_rows != asked.n_documents else ""
    said = [f"{n_rows:,} rows{passages}: {counts['copied']:,} copied"]
    said += [f"{counts['equal']:,} equal to another"] * (counts["equal"] > 0)
    said += [f"{counts['encoded']:,} to encode"]
    gone = f"; {asked.n_deleted:,} documents are gone" if asked.n_deleted else ""
    say(", ".join(said) + gone)
    if before and asked.fresh:
        say("nothing is copied from the version before: --force")
    elif before and not counts["copied"]:
        why = ", ".join(changes(before, planned.job, asked.model))
        say(f"nothing can be copied from the version before: {why}")
    speed = before.facts["texts_a_second"] if before else None
    if speed and planned.n_left:
        took = duration(planned.n_left / speed)
        say(f"{planned.n_left:,} texts take about {took} at the {speed:,g} a second of the version before")


def changes(before: Embeddings, job: Job, model: Model) -> list[str]:
    """Why no row of the version before has a key of this one's."""
    now = {
        "encoder_sha256": model.encoder_sha256,
        "document prefix": (model.facts.get("prompts") or {}).get("document"),
        "max_seq_length": model.facts.get("max_seq_length"),
        "precision": job.precision,
        "dim": job.dim,
    }
    then = before.facts | {"document prefix": (before.facts.get("prompts") or {}).get("document")}
    found = [
        "the model changed" if name == "encoder_sha256" else f"{name} was {then.get(name)!r}, is {value!r}"
        for name, value in now.items() if then.get(name) != value
    ]  # fmt: skip
    made_by = before.facts.get("made_by", {})
    found += [
        "the code that makes rows changed" if name == "rows" else f"{name} was {made_by.get(name)}, is {now}"
        for name, now in reuse.made_by().items() if made_by.get(name) != now
    ]  # fmt: skip
    return found or ["every text changed"]


def duration(seconds: float) -> str:
    """As a person says it: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def say(line: str) -> None:
    print(f"encode: {line}", file=sys.stderr, flush=True)
