"""The artefacts that stages hand to each other: folders, complete or not there, with a manifest written last.

A stage writes into `.NAME.partial-<key>` beside its target, where `key` is the hash of its config and
inputs, so a killed stage finds its own half-done work again and nobody else's. The swap is: target to
`.NAME.old`, partial to target, old removed; `Artifact.open` finishes one that was interrupted.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ArtifactError, BusyError

MANIFEST = "manifest.json"
SAID_OF_A_MODEL = ("training.jsonl", "learning_curve.json", "README.md")
LIBRARIES = (
    "apache-beam", "numpy", "polars", "pyarrow", "scann", "sentence-transformers",
    "tensorflow", "tensorflow-recommenders", "tokenizers", "torch", "transformers",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Artifact:
    """One stage's complete output.

    Attributes:
        path: the folder.
        manifest: kind, format, key, created (UTC), config, inputs ({path, digest}), rows (counts by
            name), facts (what the stage found out), files ({name: sha256}), libraries.
    """

    path: Path
    manifest: dict[str, Any]

    kind: ClassVar[str]
    format: ClassVar[int] = 1
    stage: ClassVar[str]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a complete artefact.

        Raises:
            ArtifactError: it is not there, is another kind, or has a format this code does not know.
        """
        path = Path(path)
        _finish_swap(path)
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ArtifactError(f"{path} has no {MANIFEST}: run stage {cls.stage} first") from None
        except (json.JSONDecodeError, UnicodeDecodeError):
            manifest = None
        if not isinstance(manifest, dict):
            raise ArtifactError(f"{path / MANIFEST} is damaged: run stage {cls.stage} --force")
        if manifest.get("kind") != cls.kind:
            raise ArtifactError(f"{path} holds {manifest.get('kind')!r}, wanted {cls.kind!r}")
        if manifest.get("format") != cls.format:
            raise ArtifactError(
                f"{path} has format {manifest.get('format')}, this code reads format {cls.format}: "
                f"run stage {cls.stage} again"
            )
        return cls(path, manifest)

    @property
    def digest(self) -> str:
        """Hash of what the artefact is, not of when it was made: equal content, equal digest."""
        return _hash({name: self.manifest[name] for name in ("kind", "format", "config", "files")})

    @property
    def rows(self) -> dict[str, int]:
        return self.manifest["rows"]

    @property
    def facts(self) -> dict[str, Any]:
        return self.manifest["facts"]

    def tables(self, name: str) -> list[Path]:
        """The parts of a table such as "pairs": pairs-00000.parquet, pairs-00001.parquet, ..."""
        return sorted(self.path.glob(f"{name}-*.parquet"))

    def read(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """All parts of a table in one; an empty table without columns where it has no rows."""
        parts = [pq.read_table(part, columns=columns) for part in self.tables(name)]
        return pa.concat_tables(parts, promote_options="default") if parts else pa.table({})


@dataclasses.dataclass(frozen=True)
class Pairs(Artifact):
    """`pairs/`, all Parquet, in parts `NAME-00000.parquet`.

    sessions-*:  session_id str, user_id str, start and end timestamp[us, UTC], document_ids list<str>
    pairs-*:     anchor, positive, negative str (texts), anchor_id, positive_id, negative_id str,
                 session_id str, user_id str, source str; sessions of the train span.
                 source: "sessions" (a document and the one read next), "queries" (a logged query and what
                 answered it), "synthetic", "bm25_top" (a title or query and a document like it). Where the
                 anchor is a query and no document, anchor_id is null; where there was no session, session_id
    dev-*, test-*: the same columns and answers list<str> (null but where given); sources "sessions" and
                 "queries" of the later spans
    documents-*: document_id str (unique), text str, title str, then any further columns as given
    rejects-*:   file str, line int64, reason str, detail str; file and line null for pairs, and for a
                 user with too many events, who is one row and many events

    facts: description (of the events), dev_start and test_start (ISO 8601, or null without events),
        events (counts: read, in_sessions, duplicates, rejected), rejects ({reason: count}),
        session_lengths ({"documents a session": sessions}), gap_duration, queries and synthetic ({read,
        pairs, duplicates, rejected}, or {}), bm25_top ({texts, pairs, without_negative}, or {}),
        negatives (summed over sessions, queries and synthetic: {strategy: {given, refused}}: how many it
        gave, and how many of its draws or candidates had been read with the anchor, or have a text of the
        pair), co_read ({pairs, long_sessions}: what that filter holds), excluded ({reason: documents}
        kept out by documents.exclude: "document_ids", "columns.NAME").
    rows: events, rejects, sessions, pairs, dev, test, documents.
    """

    kind: ClassVar[str] = "pairs"
    format: ClassVar[int] = 3  # 2: column source; 3: documents kept out are counted
    stage: ClassVar[str] = "pairs"


@dataclasses.dataclass(frozen=True)
class Model(Artifact):
    """`model/`: a Sentence Transformers folder with its card, and how the training went.

    facts: dim (width of a vector), base_model (what was tuned: folder, hub name or package:NAME), revision,
        commit (of a hub's model, or null), max_seq_length, prompts ({"query", "document"}: what stands before
        each), trained (false: the weights as they were), trained_until (ISO 8601: sessions that start from
        then on were held out; null without sessions), loss, sources ({name: pairs}), best_by,
        separate_encoders, trim (what train.trim_vocabulary left out, or null), main_similarity,
        similarity_before and similarity_after (EmbeddingSimilarityEvaluator on dev pairs, or null).
    training.jsonl: step int, epoch float, and any of loss, accuracy_at_20, spearman_dot.
    learning_curve.json: with train.learning_curve alone: {n_dev_pairs, n_pool, bm25, points: [{pairs,
        accuracy_at_20}], passes_bm25_at}.
    """

    kind: ClassVar[str] = "model"
    format: ClassVar[int] = 2  # 2: a model card, a learning curve
    stage: ClassVar[str] = "train"

    @property
    def encoder_sha256(self) -> str:
        """Names `encoders/<sha256>/`: the hash of the files that make a text's vector."""
        return encoder_sha256(self.manifest["files"])


@dataclasses.dataclass(frozen=True)
class Embeddings(Artifact):
    """`embeddings/`: every document once, or each of its passages, and the held-out queries.

    embeddings.npy    float32 (n_rows, dim), unit length; row i is row i of documents.parquet
    documents.parquet document_id, text, title, then any further columns; with encode.passage_words one row a
                      passage: text is the passage, passage int32 its number in the document, from 0; the rows
                      of a document follow each other
    queries.npy       float32 (n_queries, dim), unit length, by the tuned model
    queries.parquet   text str; kind "document" (a held-out anchor, its own row to be left out of every
                      answer), "typed" (a few of an anchor's words, stands for a typed query) or "logged" (a
                      held-out logged query); span "dev" or "test"; document_id str, document_row int32: the
                      first row of the anchor's document (null and -1 of a logged query)
    pool.parquet      document_row int32: the first rows of the documents that all systems are compared over;
                      n_rows int32: how many rows each has
    untuned/documents.npy float32 (n_pool_rows, dim): the rows of the pool's documents, one after the other
    untuned/queries.npy   float32 (n_queries, dim), rows as queries.npy
    published/        the same by the published model, where there is one and it is another
    sts.parquet       language, sentence1, sentence2 str, score float 0 to 1: encode.sts
    sts-tuned.npy, sts-untuned.npy, sts-published.npy  float32 (2 n, dim), unit length: both sentences of a
                      row of sts.parquet, one after the other
    keys/NAME.npy     uint8 (n, 16): hash of the text, prefix, model and settings behind each row of NAME.npy
                      (embeddings, queries, untuned-documents, ...), by which the next run finds it again
    keys/NAME.flags.npy uint8 (n,): what was seen of each text; 1: longer than max_seq_length, 2: without one
                      token that the model knows, 4: nothing is known, because the library tokenised it
    keys/NAME.json    {file: sha256} of these three: a killed run tells by it what it had finished
    precision.json    precision and guard, as in facts: what a killed run had chosen; in no hash

    Without held-out sessions the queries of kind "document" are a seeded sample of the documents; without any
    held-out pairs untuned/ and published/ are not there.
    facts: dim, precision, guard ({n_sample, n_queries, needed, tried: [{precision, recall_at_10, mean_cosine,
        min_cosine}], texts_a_second: {precision: rate}, carried: taken over from the version before}, or
        {reason} where nothing was tried), checks (`checks.Findings`, and drift: {neighbours_kept,
        n_documents, n_queries, same_encoder} or null), seen ({"cut", "unknown_only", "of"}: rows, by their
        flags; of: those of which something is known), made_by ({"rows": a number that the code raises where
        it gives other rows, library: version}), description, trained, encoder_sha256, prompts,
        max_seq_length, device, precision_untuned and precision_published (of their documents, or null),
        untuned_prompts ({"query", "document"}: with which its vectors were made, or null), untuned_on_dev
        ({"as_given", "prefixed"}: accuracy at 20 of both ways on dev pairs, or null where there was no
        choice), untuned_choice (hash of what was chosen between: while it is the same, the next version takes
        the choice over; or null), precision_untuned and precision_published (of their documents' rows, or
        null where they were not compared), published (the sha256 of the published model that was compared,
        or null), published_left_out ({"encoder", "reason"} of one that does not load, or null),
        texts_a_second (of this run, or of the version before where less than a window was encoded),
        n_parameters, model_bytes.
    rows: documents, rows, copied (of the version before), equal (to an earlier row's text), encoded, deleted
        (documents of the version before that are gone), queries, pool (documents).
    """

    kind: ClassVar[str] = "embeddings"
    format: ClassVar[int] = 3  # 2: logged queries, STS sets, the published model; 3: keys, passages, checks
    stage: ClassVar[str] = "encode"

    def matrix(self) -> np.ndarray:
        """The document vectors, memory-mapped read-only, float32 (n_documents, dim)."""
        return np.load(self.path / "embeddings.npy", mmap_mode="r")


@dataclasses.dataclass(frozen=True)
class Index(Artifact):
    """`index/`: a SavedModel without a version number, and what it answered.

    saved_model.pb, variables/, assets/, assets.extra/documents.parquet (row number -> document)
    found.parquet  query int32 (row of queries.npy), num_leaves_to_search and num_reordering_candidates int32
                   (0: exact), shipped bool (at the settings that were exported), document_rows list<int32>
                   and scores list<float>, best first: up to k + 1 answers (at least 11), the query's own
                   document not removed; test queries only. Rows with shipped = false are the frontier's.

    facts: layer "tuned", "tfrs" or "exact"; reason (why this layer);
        settings: k, distance_measure, num_leaves, num_leaves_to_search, num_reordering_candidates,
            dimensions_per_block, training_iterations, training_sample_size, spherical,
            anisotropic_quantization_threshold, spill, quantize_reordering; null where the layer has none;
        builds: what was tried on samples, [{n_rows, num_leaves, spill, anisotropic_quantization_threshold,
            quantize_reordering, recall, queries_per_second, memory_mib (at full size), fits (within
            index.memory_mib), kept}], in order;
        tuning: what was tried on the built index with dev queries, [{num_leaves_to_search,
            num_reordering_candidates, kind, recall, low}], of the kind of queries that is served worst;
        frontier: settings that nothing tried is both faster and better than, [{num_leaves_to_search,
            num_reordering_candidates, recall, low, single_qps, batched_qps, shipped}], recall on dev queries;
        stored_recall: recall@k of exact search over the stored rows against float32, or null for float32;
        latency_ms {p50, p95, p99} of single queries, batched_qps, memory_mib (RssAnon that loading and asking
            added) and load_seconds: of the SavedModel, loaded by a fresh process as TensorFlow Serving does;
        not_reproducible: what is not bit for bit the same when built again, and why;
        bytes, dim, n_entries (rows and their second leaves).
    """

    kind: ClassVar[str] = "index"
    format: ClassVar[int] = 3  # 2: answers to logged queries; 3: tuned layers, the frontier
    stage: ClassVar[str] = "index"


@dataclasses.dataclass(frozen=True)
class Report(Artifact):
    """`report/`: report.json (the keys of `evaluate`) and report.html."""

    kind: ClassVar[str] = "report"
    format: ClassVar[int] = 6  # 4: how the rows were encoded; 5: the recall contract; 6: whether it is proved
    stage: ClassVar[str] = "evaluate"

    def figures(self) -> dict[str, Any]:
        return json.loads((self.path / "report.json").read_text(encoding="utf-8"))


def encoder_sha256(files: Mapping[str, str]) -> str:
    """The name of an encoder: the hash of the files that make a text's vector, not of what is said of it.

    Args:
        files: {name: sha256} of a model folder.
    """
    return _hash({name: hashed for name, hashed in files.items() if name not in SAID_OF_A_MODEL})


def belong_together(made: Artifact, *inputs: Artifact) -> None:
    """Check that `made` was made from these very inputs.

    Raises:
        ArtifactError: from others; running its stage again makes it belong.
    """
    digests = {given["digest"] for given in made.manifest["inputs"]}
    for given in inputs:
        if given.digest not in digests:
            raise ArtifactError(
                f"{made.path} was made from another {given.path}: run stage {made.stage} again"
            )


@contextmanager
def locked(folder: Path, name: str) -> Iterator[int]:
    """Hold `folder` for one process; yields the file descriptor that holds it.

    The lock is the kernel's: it ends with the last process that holds it, however that ends.

    Raises:
        BusyError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"{folder}: another run is at work in it; wait for it to end") from None
        yield descriptor
    finally:
        os.close(descriptor)


@dataclasses.dataclass
class Draft:
    """An artefact being written: put files into `folder`, counts into `rows`, findings into `facts`."""

    folder: Path
    rows: dict[str, int] = dataclasses.field(default_factory=dict)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def key_of(artifact: type[Artifact], config: Mapping[str, Any], inputs: Sequence[Artifact | Mapping]) -> str:
    """Hash of everything that decides an artefact: code format, config, inputs."""
    digests = [i.digest if isinstance(i, Artifact) else i["digest"] for i in inputs]
    return _hash([artifact.kind, artifact.format, config, digests])


def is_complete(artifact: type[Artifact], out: Path, key: str) -> bool:
    """Whether `out` already holds what this config and these inputs make."""
    try:
        return artifact.open(out).manifest.get("key") == key
    except ArtifactError:
        return False


@contextmanager
def writing(
    artifact: type[Artifact],
    out: Path,
    *,
    config: Mapping[str, Any],
    inputs: Sequence[Artifact | Mapping[str, str]],
    scratch: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Iterator[Draft]:
    """Write an artefact so that `out` is complete, or as it was before.

    The folder of a failed or killed attempt with the same key is handed out again as it stands, though it may
    lack its scratch.

    Args:
        config: the stage's settings, JSON-ready.
        inputs: artefacts, or {"path", "digest"} of given files.
        scratch: globs below the folder, of what saves work after a kill and is no part of the result.
        notes: globs of files that stay and are in no hash, because they tell of one run: without them no
            later attempt could go on.
    """
    out = Path(out)
    _finish_swap(out)
    if out.exists() and not (out / MANIFEST).exists():
        raise ArtifactError(f"{out} is there and no {artifact.kind} of ours: move it, or give another --work")
    key = key_of(artifact, config, inputs)
    folder = out.parent / f".{out.name}.partial-{key[:16]}"
    for stale in out.parent.glob(f".{out.name}.partial-*"):
        if stale != folder:
            shutil.rmtree(stale)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    draft = Draft(folder)
    yield draft
    manifest = {
        "kind": artifact.kind,
        "format": artifact.format,
        "key": key,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": dict(config),
        "inputs": [
            {"path": str(i.path), "digest": i.digest} if isinstance(i, Artifact) else dict(i) for i in inputs
        ],
        "rows": draft.rows,
        "facts": draft.facts,
        "files": file_hashes(folder, _matching(folder, [*scratch, *notes])),
        "libraries": library_versions(),
    }
    for file in folder.rglob("*"):
        if file.is_file():
            fsync(file)
    write_json(folder / MANIFEST, manifest)
    for path in _matching(folder, scratch):  # until now a kill could want it again
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    fsync(folder)
    _swap(folder, out)


def write_json(path: Path, content: Any) -> None:
    """Write JSON by a temporary name and a rename, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def file_hashes(folder: Path, left_out: Collection[Path] = ()) -> dict[str, str]:
    """{name relative to the folder: sha256} of every file below it, manifest.json at its top left out.

    Args:
        left_out: files and folders that are left out too.
    """
    left_out = {folder / MANIFEST, *left_out}
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        str(file.relative_to(folder)): sha256(file)
        for file in files
        if left_out.isdisjoint((file, *file.parents))
    }


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return [path for pattern in patterns for path in folder.glob(pattern)]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that decide results."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # each stage can be installed alone
    return found


def fsync(path: Path) -> None:
    """Put a file or a folder's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(folder: Path, out: Path) -> None:
    old = out.parent / f".{out.name}.old"
    if out.exists():
        out.rename(old)
    folder.rename(out)
    fsync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _finish_swap(out: Path) -> None:
    """Complete a swap that a kill cut in two: the new folder where it is complete, else the old."""
    old = out.parent / f".{out.name}.old"
    if not old.exists():
        return
    if not out.exists():
        complete = [p for p in out.parent.glob(f".{out.name}.partial-*") if (p / MANIFEST).exists()]
        (complete[0] if complete else old).rename(out)
        fsync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
