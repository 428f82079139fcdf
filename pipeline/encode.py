"""Stage `encode`: documents and held-out queries -> embeddings/, one unit-length float32 row a text.

Row i of embeddings.npy is row i of documents.parquet. A killed run goes on behind its last whole chunk.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pipeline.artifacts import Embeddings, Model, Pairs, write_json, writing
from pipeline.config import EncodeConfig, as_dict
from pipeline.encoder import Encoder
from pipeline.errors import ArtifactError, ConfigError

CHUNK = 4096  # texts encoded between two marks of progress; sorted by length inside
ROW_GROUP = 10_000  # documents: a client reads only the groups that hold what was found
PROGRESS = "progress.json"
MIN_COSINE = 0.999  # of bfloat16 rows to float32 rows, else float32 is used
PROBE_SIZE = 128  # documents that this is tried on
MAX_TYPED = 1000  # half texts that stand for typed queries, a span
DOCUMENT, TYPED = "document", "typed"
QUERIES = pa.schema(
    {
        "text": pa.string(),
        "kind": pa.string(),
        "span": pa.string(),
        "document_id": pa.string(),
        "document_row": pa.int32(),
    }
)

Encode = Callable[[Sequence[str]], np.ndarray]


def run(config: EncodeConfig, model: Model, pairs: Pairs, out: Path) -> Embeddings:
    """Encode every document once, the held-out queries, and both by the model before tuning.

    Raises:
        ConfigError: the model's vectors have another width than `encode.dim`.
        ArtifactError: the model gave rows that are no vectors.
    """
    if model.facts["dim"] != config.dim:
        raise ConfigError(
            f"{model.path} gives vectors of {model.facts['dim']} numbers, but encode.dim is {config.dim}; "
            "set encode.dim or train another model"
        )
    documents = pairs.read("documents")
    with writing(
        Embeddings,
        out,
        config=as_dict(config),
        inputs=[model, pairs],
        scratch=[f"*.{PROGRESS}", f"untuned/*.{PROGRESS}"],
    ) as draft:
        folder = draft.folder
        pq.write_table(documents, folder / "documents.parquet", row_group_size=ROW_GROUP)
        queries = queries_of(pairs, documents, config)
        pq.write_table(queries, folder / "queries.parquet")

        encoder = open_encoder(model.path, config, documents)
        matrix = _encode_to(
            folder / "embeddings.npy", documents["text"], encoder.documents, "documents", config
        )
        _encode_to(folder / "queries.npy", queries["text"], encoder.queries, "queries", config)

        held_out = pairs.rows.get("test", 0) + pairs.rows.get("dev", 0) > 0
        pool = pool_of(pairs, documents, config.pool_size) if held_out else np.zeros(0, np.int32)
        if held_out:
            pq.write_table(pa.table({"document_row": pool}), folder / "pool.parquet")
            _write_untuned(folder, model, config, documents.take(pool), queries, matrix[pool])
        draft.rows |= {"documents": len(documents), "queries": len(queries), "pool": len(pool)}
        draft.facts |= {
            "dim": config.dim,
            "precision": encoder.precision,
            "description": pairs.facts["description"],
            "trained": model.facts["trained"],
        }
    return Embeddings.open(out)


def open_encoder(
    path: Path | str,
    config: EncodeConfig,
    documents: pa.Table,
    revision: str | None = None,
    max_seq_length: int | None = None,
    prompts: Mapping[str, str] | None = None,
) -> Encoder:
    """The encoder at the fastest precision whose rows are as good as float32's."""

    def at(precision: str) -> Encoder:
        return Encoder.open(
            path, config.device, precision, max_seq_length, config.batch_size, revision, prompts
        )

    encoder = at(config.precision)
    if encoder.precision == "float32" or config.precision != "auto":
        return encoder
    step = max(1, len(documents) // PROBE_SIZE)
    probes = documents["text"].take(np.arange(0, len(documents), step)[:PROBE_SIZE]).to_pylist()
    exact = at("float32")
    cosine = float((encoder.documents(probes) * exact.documents(probes)).sum(axis=1).min())
    if cosine < MIN_COSINE:
        print(f"encode: {encoder.precision} rows differ (cosine {cosine:.4f}): float32", file=sys.stderr)
        return exact
    return encoder


def fill(
    matrix: np.ndarray, texts: Sequence[str] | pa.ChunkedArray, encode: Encode, name: str, done: int = 0
) -> np.ndarray:
    """Write the texts' vectors into the rows of `matrix`, from row `done` on.

    Args:
        matrix: float32 (n_texts, dim); a memory map's progress is noted beside its file.

    Raises:
        ArtifactError: `encode` gave another shape, or rows that are not of unit length.
    """
    with tqdm(total=len(matrix), initial=done, desc=f"encode: {name}", unit=" texts") as bar:
        for start in range(done, len(matrix), CHUNK):
            chunk = texts[start : start + CHUNK]
            chunk = chunk.to_pylist() if isinstance(chunk, pa.ChunkedArray) else list(chunk)
            vectors = encode(chunk)
            if vectors.shape != (len(chunk), matrix.shape[1]):
                raise ArtifactError(
                    f"the model gave vectors of shape {vectors.shape} for {len(chunk)} texts; "
                    f"encode.dim = {matrix.shape[1]} needs ({len(chunk)}, {matrix.shape[1]})"
                )
            lengths = np.linalg.norm(vectors, axis=1)
            bad = np.flatnonzero(~(np.abs(lengths - 1) < 1e-3))  # NaN is caught too
            if len(bad):
                raise ArtifactError(
                    f"the model gave {name[:-1]} row {start + bad[0]} a vector of length "
                    f"{lengths[bad[0]]:.3f}, wanted 1; its text is {chunk[bad[0]][:80]!r}"
                )
            matrix[start : start + len(chunk)] = vectors
            if isinstance(matrix, np.memmap):
                _note_progress(matrix, start + len(chunk))
            bar.update(len(chunk))
    return matrix


def queries_of(pairs: Pairs, documents: pa.Table, config: EncodeConfig) -> pa.Table:
    """The held-out anchors, each once a span, and halves of some; without events, sampled documents."""
    ids = documents["document_id"].to_pylist()
    row_of = {document_id: row for row, document_id in enumerate(ids)}
    anchors: dict[str, list[str]] = {}
    for span in ("dev", "test"):
        anchors[span] = list(dict.fromkeys(_ids(pairs, span, "anchor_id")))
    if not any(anchors.values()):  # no held-out sessions: two disjoint halves of the documents
        for span, parity in (("dev", 0), ("test", 1)):
            anchors[span] = [i for i in ids if _hash(i)[0] % 2 == parity]
    texts = documents["text"]
    rows: list[tuple[str, str, str, str, int]] = []
    for span, names in anchors.items():
        chosen = sorted(names, key=_hash)[: config.max_queries]
        for kind, some in ((DOCUMENT, chosen), (TYPED, chosen[:MAX_TYPED])):
            for document_id in some:
                text = texts[row_of[document_id]].as_py()
                rows.append(
                    (half(text) if kind == TYPED else text, kind, span, document_id, row_of[document_id])
                )
    columns = zip(*rows, strict=True) if rows else [[]] * len(QUERIES)
    return pa.table([list(column) for column in columns], schema=QUERIES)


def half(text: str) -> str:
    """The first half of a text's words (of its letters where it is one word): stands for a typed query."""
    words = text.split()
    if len(words) > 1:
        return " ".join(words[: (len(words) + 1) // 2])
    return text[: (len(text) + 1) // 2]


def pool_of(pairs: Pairs, documents: pa.Table, size: int) -> np.ndarray:
    """Document rows that every compared system searches: held-out positives and at most `size` others.

    Returns:
        int32 (n_pool,), ascending.
    """
    ids = documents["document_id"].to_pylist()
    positives = {i for span in ("dev", "test") for i in _ids(pairs, span, "positive_id")}
    others = sorted((i for i in ids if i not in positives), key=_hash)[:size]
    chosen = positives.union(others)
    return np.array([row for row, document_id in enumerate(ids) if document_id in chosen], np.int32)


def _ids(pairs: Pairs, span: str, column: str) -> list[str]:
    return pairs.read(span, [column])[column].to_pylist() if pairs.tables(span) else []


def _write_untuned(
    folder: Path, model: Model, config: EncodeConfig, pool: pa.Table, queries: pa.Table, tuned: np.ndarray
) -> None:
    """The pool's and the queries' vectors by the model before tuning."""
    untuned = folder / "untuned"
    untuned.mkdir(exist_ok=True)
    if not model.facts["trained"]:  # the same weights: the same rows
        np.save(untuned / "documents.npy", tuned)
        np.save(untuned / "queries.npy", np.load(folder / "queries.npy"))
        return
    facts = model.facts
    encoder = open_encoder(
        facts["base_model"], config, pool, facts["revision"], facts["max_seq_length"], facts.get("prompts")
    )
    for name, texts, encode in (
        ("documents", pool["text"], encoder.documents),
        ("queries", queries["text"], encoder.queries),
    ):
        _encode_to(untuned / f"{name}.npy", texts, encode, f"untuned {name}", config)


def _encode_to(
    file: Path, texts: pa.ChunkedArray, encode: Encode, name: str, config: EncodeConfig
) -> np.ndarray:
    """Fill one .npy, going on where an earlier run of the same config and inputs stopped."""
    shape = (len(texts), config.dim)
    if not len(texts):
        np.save(file, np.zeros(shape, np.float32))
        return np.load(file)
    done = _progress(file, shape)
    mode = "r+" if done else "w+"
    matrix = np.lib.format.open_memmap(file, mode, np.float32, shape)
    with file.open("r+b") as opened:  # a memory map that outgrows the disk ends the process with SIGBUS
        os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    if done:
        print(f"encode: {name}: {done:,} of {len(texts):,} are there already", file=sys.stderr)
    fill(matrix, texts, encode, name, done)
    matrix.flush()
    return matrix


def _progress(file: Path, shape: tuple[int, int]) -> int:
    """Rows of `file` that are whole."""
    note = file.with_name(f"{file.stem}.{PROGRESS}")
    if not note.exists() or not file.exists():
        return 0
    if np.load(file, mmap_mode="r").shape != shape:
        return 0
    return int(json.loads(note.read_text(encoding="utf-8"))["rows"])


def _note_progress(matrix: np.memmap, rows: int) -> None:
    matrix.flush()
    file = Path(str(matrix.filename))
    write_json(file.with_name(f"{file.stem}.{PROGRESS}"), {"rows": rows})


def _hash(value: str) -> bytes:
    return hashlib.blake2b(value.encode(), digest_size=8).digest()
