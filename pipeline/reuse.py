"""Matrices of which only what is new is encoded: rows are keyed, planned, and put together.

A key is a hash of the text and of all else that decides its row: the code, model, task, prefix,
max_seq_length, precision and width. A row whose key the version before has, or a matrix that this run made
before, is copied; rows of equal keys are encoded once, and the rest is encoded in shards.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.artifacts import Embeddings, sha256, write_json
from pipeline.checks import equal_rows, halves
from pipeline.errors import ArtifactError
from pipeline.shards import UNSEEN, Engine, Job, Shards, Texts, in_process, sizes, windows
from pipeline.throughput import CUT, UNKNOWN, WINDOW

ROWS = 1  # of a key: raise it when the code gives another row to a text, so that no old one is copied
LIBRARIES = ("tokenizers", "transformers", "sentence-transformers")  # other versions may give other rows
FRESH = "shards-fresh"  # in a half-done folder: all that is in it was made without copying
SCRATCH = ("shards-*", "**/.*.tmp")  # of what `Matrices` makes, no part of the artefact
KEYS = "keys"  # folder of what is kept beside every matrix
KEY_BYTES = 16
KEYS_AT_ONCE = 1 << 16  # that are looked up
BLOCK = 4096  # rows that are copied at once
HERE = -1  # nowhere known: encoded for this matrix


def key_of_encoder(job: Job, model_hash: str) -> bytes:
    """What the rows of a job share: 16 bytes, other ones where another row would come out.

    Args:
        model_hash: of the content of the model's files. What `job` leaves to the model (prompts,
            max_seq_length) is in them.
    """
    prompt = None if job.prompts is None else job.prompts.get(job.task, "")
    settings = [made_by(), model_hash, job.task, prompt, job.max_seq_length, job.precision, job.dim]
    return hashlib.blake2b(json.dumps(settings).encode(), digest_size=KEY_BYTES).digest()


def made_by() -> dict[str, Any]:
    """The code that makes a text's row: {"rows": ROWS, library: version}."""
    return {"rows": ROWS} | {name: metadata.version(name) for name in LIBRARIES}


def row_keys(texts: Iterable[str], encoder_key: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Each text's key, uint8 (n, 16), and its characters, uint32 (n,)."""
    begun = hashlib.blake2b(digest_size=KEY_BYTES, key=encoder_key)
    keys, lengths = bytearray(), array("I")
    for text in texts:
        hashed = begun.copy()
        hashed.update(text.encode())
        keys += hashed.digest()
        lengths.append(len(text))
    return np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES), np.frombuffer(lengths, np.uint32)


def files_of(name: str) -> tuple[str, str, str, str]:
    """NAME.npy, its keys, its flags and its note, relative to the artefact's folder; NAME may be a glob.

    Keys are uint8 (n, 16), flags uint8 (n,): what was seen of each row's text. The note, {file: sha256} of
    the three, is written when they are whole.
    """
    beside = f"{KEYS}/{name.replace('/', '-')}"
    return f"{name}.npy", f"{beside}.npy", f"{beside}.flags.npy", f"{beside}.json"


class Matrix(NamedTuple):
    """Rows that can be copied.

    Attributes:
        keys: uint8 (n, 16).
        rows: float32 (n, dim).
        flags: uint8 (n,).
    """

    keys: np.ndarray
    rows: np.ndarray
    flags: np.ndarray


class Known:
    """Rows that were made before, found by their keys: of any width, by any model."""

    def __init__(self, matrices: Iterable[Matrix] = ()) -> None:
        self.matrices = list(matrices)

    @classmethod
    def of(cls, before: Embeddings | None) -> Known:
        """All matrices of the version before, known to be whole, that have keys; none without such one."""
        return cls(_matrices(before) if before else ())

    def add(self, matrix: Matrix) -> None:
        """Have a matrix's rows found, where no earlier one has them."""
        self.matrices.append(matrix)

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the rows of these keys are.

        Returns:
            int16 (n,), which of `matrices`, or HERE; int32 (n,), which row of it, the first of equal ones, or
            the key's own place.
        """
        origin, at = np.full(len(keys), HERE, np.int16), np.arange(len(keys), dtype=np.int32)
        for number, matrix in enumerate(self.matrices):
            if not (origin == HERE).any():
                break
            for rows, found in _positions(matrix.keys, keys, origin):
                origin[rows], at[rows] = number, found
        return origin, at


def _matrices(before: Embeddings) -> Iterator[Matrix]:
    written = before.manifest["files"]
    for file in sorted(written, key=lambda file: (file != "embeddings.npy", file)):
        *names, _ = files_of(file.removesuffix(".npy"))
        if file.endswith(".npy") and all(name in written for name in names):
            rows, keys, flags = (mapped(before.path / name) for name in names)
            if len(keys) == len(rows) == len(flags):
                yield Matrix(keys, rows, flags)


def damaged_file(folder: Path, hashes: Mapping[str, str]) -> Path | None:
    """The first file that is not there or has not the hash that it had, {name: sha256}."""
    for name, hashed in hashes.items():
        try:
            if sha256(folder / name) != hashed:
                return folder / name
        except OSError:
            return folder / name
    return None


def noted(file: Path) -> dict[str, Any] | None:
    """What a note of an earlier attempt says; None where there is none, or half of one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _positions(
    known: np.ndarray, keys: np.ndarray, origin: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of `keys` that are not found yet and that `known` has, and the first row of it that has each."""
    if not len(known):
        return
    first, second = halves(known).T
    order = np.argsort(first, kind="stable").astype(np.int32)
    ordered = first[order]
    for start in range(0, len(keys), KEYS_AT_ONCE):
        rows = start + np.flatnonzero(origin[start : start + KEYS_AT_ONCE] == HERE)
        wanted = halves(keys[rows])
        found = order[np.minimum(np.searchsorted(ordered, wanted[:, 0]), len(order) - 1)]
        # Of two keys that share their first half one is not found, and is encoded again: rare, and right.
        is_same = (first[found] == wanted[:, 0]) & (second[found] == wanted[:, 1])
        yield rows[is_same], found[is_same]


@dataclass(frozen=True)
class Plan:
    """Where each row of a matrix comes from.

    Attributes:
        origin: int16 (n,), which of `Known.matrices`, or HERE.
        at: int32 (n,), which row of that matrix; HERE: the first row of this one with the same key.
    """

    origin: np.ndarray
    at: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, known: Known) -> Plan:
        origin, at = known.find(keys)
        here = np.flatnonzero(origin == HERE).astype(np.int32)
        again, first = equal_rows(keys if len(here) == len(keys) else keys[here])
        at[here[again]] = here[first]
        return cls(origin, at)

    @property
    def is_encoded(self) -> np.ndarray:
        """Of each row, whether this run encodes its text: bool (n,)."""
        return (self.origin == HERE) & (self.at == np.arange(len(self.at)))

    @property
    def counts(self) -> dict[str, int]:
        """Rows that are copied, equal to an earlier one, and encoded."""
        n_here, n_encoded = int((self.origin == HERE).sum()), int(self.is_encoded.sum())
        return {"copied": len(self.at) - n_here, "equal": n_here - n_encoded, "encoded": n_encoded}


@dataclass(frozen=True)
class Planned:
    """A matrix to be made.

    Attributes:
        shards: of the rows that this run encodes; None where an earlier attempt has made the whole matrix.
    """

    name: str
    texts: Texts
    job: Job
    keys: np.ndarray
    plan: Plan
    shards: Shards | None

    @property
    def n_left(self) -> int:
        """Texts that no earlier attempt has encoded."""
        return sum(self.shards.n_rows[number] for number in self.shards.missing()) if self.shards else 0


class Matrices:
    """Makes the matrices of a half-done artefact, and goes on where an earlier attempt stopped.

    Args:
        folder: the artefact's.
        known: rows of the version before; what is made here is added to them.
    """

    def __init__(self, folder: Path, known: Known) -> None:
        self.folder = folder
        self.known = known

    def write(self, name: str, texts: Texts, job: Job, model_hash: str) -> np.ndarray:
        """NAME.npy and its keys: see `shards.Write`."""
        return self.make(self.plan(name, texts, job, model_hash))

    def plan(self, name: str, texts: Texts, job: Job, model_hash: str) -> Planned:
        """Where each row will come from; nothing is encoded yet."""
        keys, lengths = row_keys(texts(), key_of_encoder(job, model_hash))
        plan = Plan.of(keys, self.known)
        shards = None
        if not self._is_whole(name, keys):
            is_encoded = plan.is_encoded
            wanted = hashlib.blake2b(keys[is_encoded], digest_size=8).hexdigest()
            folder = self.folder / f"shards-{name.replace('/', '-')}-{wanted}"
            shards = Shards(folder, sizes(lengths[is_encoded], WINDOW), job.dim)
        return Planned(name, texts, job, keys, plan, shards)

    def make(self, planned: Planned, engine: Engine = in_process) -> np.ndarray:
        """Encode what is missing and put the matrix together.

        Returns:
            NAME.npy, memory-mapped, float32 (n, dim).
        """
        *names, note = files_of(planned.name)
        rows, keys, flags = (self.folder / name for name in names)
        if planned.shards is not None:
            _encode(planned, planned.shards, engine)
            _put_together(rows, flags, planned.plan, self.known, planned.shards)
            _put(keys, planned.keys)
            write_json(self.folder / note, {name: sha256(self.folder / name) for name in names})
            shutil.rmtree(planned.shards.folder)  # behind the note: a killed run finds the one or the other
        made = Matrix(mapped(keys), mapped(rows), mapped(flags))
        self.known.add(made)
        return made.rows

    def seen(self, name: str) -> dict[str, int]:
        """What was seen of the texts of all rows of NAME.npy, copied ones included: as `counted`."""
        return counted(mapped(self.folder / files_of(name)[2]))

    def _is_whole(self, name: str, keys: np.ndarray) -> bool:
        """Whether an earlier attempt has made this very matrix."""
        *_, note = files_of(name)
        hashes = noted(self.folder / note)
        if hashes is None:
            return False
        damaged = damaged_file(self.folder, hashes)
        if damaged is not None:
            print(f"encode: {damaged}: damaged, its rows are made again", file=sys.stderr)
            return False
        return np.array_equal(mapped(self.folder / files_of(name)[1]), keys)


def counted(flags: np.ndarray) -> dict[str, int]:
    """What was seen of some texts.

    Args:
        flags: uint8 (n,).

    Returns:
        cut: texts that are longer than max_seq_length; unknown_only: texts without one token that the model
        knows; of: texts that were looked at, which those are not that the library tokenised.
    """
    found = {"cut": flags & CUT, "unknown_only": flags & UNKNOWN, "of": ~flags & UNSEEN}
    return {name: int(np.count_nonzero(of_texts)) for name, of_texts in found.items()}


def start_fresh(folder: Path) -> None:
    """Let go of what a half-done folder holds, because rows may be copies; shards are none, and stay."""
    if (folder / FRESH).exists():  # an attempt that copied nothing either
        return
    for path in folder.iterdir():
        if path.is_dir() and not path.name.startswith("shards-"):
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
    (folder / FRESH).touch()


def _encode(planned: Planned, shards: Shards, engine: Engine) -> None:
    """Have the missing shards made.

    Raises:
        ArtifactError: the engine left some out.
    """
    missing = shards.missing()
    if not missing:
        return
    n_texts = sum(shards.n_rows)
    job = dataclasses.replace(planned.job, n_texts=n_texts, n_done=n_texts - planned.n_left)
    if job.n_done:
        print(f"encode: {job.title}: {job.n_done:,} of {n_texts:,} are there already", file=sys.stderr)
    texts = itertools.compress(planned.texts(), planned.plan.is_encoded)
    engine(job, windows(texts, shards.n_rows, missing), shards)
    if left := shards.missing():
        raise ArtifactError(
            f"{job.title}: {len(left)} of {len(missing)} shards did not come back; run the same command "
            "again: what is there is kept"
        )


def _put_together(rows_file: Path, flags_file: Path, plan: Plan, known: Known, shards: Shards) -> None:
    """The matrix and its flags from copied, encoded and equal rows."""
    matrix = _allocated(rows_file, (len(plan.at), shards.dim), np.float32)
    flags = np.empty(len(plan.at), np.uint8)
    for number, copied in enumerate(known.matrices):
        for block in _blocks(np.flatnonzero(plan.origin == number)):
            matrix[block] = copied.rows[plan.at[block]]
            flags[block] = copied.flags[plan.at[block]]
    encoded, start = np.flatnonzero(plan.is_encoded), 0
    for number, n in enumerate(shards.n_rows):
        shard, rows = shards.encoded(number), encoded[start : start + n]
        matrix[rows], flags[rows] = shard.rows, shard.flags
        start += n
    for block in _blocks(np.flatnonzero((plan.origin == HERE) & ~plan.is_encoded)):
        matrix[block] = matrix[plan.at[block]]
        flags[block] = flags[plan.at[block]]
    _finish(rows_file, matrix)
    _put(flags_file, flags)


def _put(file: Path, values: np.ndarray) -> None:
    array = _allocated(file, values.shape, values.dtype)
    array[:] = values
    _finish(file, array)


def _allocated(file: Path, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
    """An .npy file under another name, whose place on the disk is taken before a byte is written: a memory
    map that outgrows the disk ends the process with SIGBUS.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    begun = _begun(file)
    if not np.prod(shape):
        return np.zeros(shape, dtype)
    array = np.lib.format.open_memmap(begun, "w+", dtype, shape)
    try:
        with begun.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, begun.stat().st_size)
    except OSError as error:
        begun.unlink()
        error.filename = str(file)
        raise
    return array


def _finish(file: Path, array: np.ndarray) -> None:
    if isinstance(array, np.memmap):
        array.flush()
    else:
        with _begun(file).open("wb") as opened:
            np.save(opened, array)
    _begun(file).replace(file)


def _begun(file: Path) -> Path:
    return file.with_name(f".{file.name}.tmp")


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), BLOCK):
        yield rows[start : start + BLOCK]


def mapped(file: Path) -> np.ndarray:
    """An .npy file, memory-mapped read-only; no empty one can be mapped."""
    try:
        return np.load(file, mmap_mode="r")
    except ValueError:
        return np.load(file)
