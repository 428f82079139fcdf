"""Matrices of which only what is new is encoded: rows are keyed, planned, and put together.

A key is a hash of the text and of all else that decides its row: model, task, prefix, max_seq_length,
precision and width. A row whose key the version before has is copied, rows of equal keys are encoded once,
and the rest is encoded in shards.
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.artifacts import Embeddings, sha256, write_json
from pipeline.errors import ArtifactError
from pipeline.shards import Engine, Job, Shards, in_process, sizes, windows
from pipeline.throughput import WINDOW

SCRATCH = ("shards-*", "seen-*.json", "**/.*.tmp")  # of what `Matrices` makes, no part of the artefact
KEYS = "keys"  # folder of the keys of every matrix
KEY_BYTES = 16
KEYS_AT_ONCE = 1 << 16  # that are looked up
BLOCK = 4096  # rows that are copied at once
HERE = -1  # not in the version before: encoded by this run

Texts = Callable[[], Iterable[str]]


def key_of_encoder(job: Job, model_hash: str) -> bytes:
    """What the rows of a job share: 16 bytes, other ones where another row would come out.

    Args:
        model_hash: of the content of the model's files. What `job` leaves to the model (prompts,
            max_seq_length) is in them.
    """
    prompt = None if job.prompts is None else job.prompts.get(job.task, "")
    settings = [model_hash, job.task, prompt, job.max_seq_length, job.precision, job.dim]
    return hashlib.blake2b(json.dumps(settings).encode(), digest_size=KEY_BYTES).digest()


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


class Known:
    """The rows of the version before, found by their keys.

    Args:
        matrices: keys uint8 (n, 16), rows float32 (n, dim), and a call that tells whether both are as they
            were written, asked when a row is first wanted.
    """

    def __init__(self, matrices: Iterable[tuple[np.ndarray, np.ndarray, Callable[[], bool]]] = ()) -> None:
        self._matrices = list(matrices)
        self.rows = [rows for _, rows, _ in self._matrices]
        self._is_sound: dict[int, bool] = {}

    @classmethod
    def of(cls, before: Embeddings | None, dim: int) -> Known:
        """All matrices of the version before that have keys and this width; none without such a version."""
        return cls(_matrices(before, dim) if before else ())

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the rows of these keys are.

        Returns:
            int16 (n,), which of `rows`, or HERE; int32 (n,), which row of it, the first of equal ones, or the
            key's own place.
        """
        origin, at = np.full(len(keys), HERE, np.int16), np.arange(len(keys), dtype=np.int32)
        for number, (known, *_) in enumerate(self._matrices):
            for rows, found in _positions(known, keys, origin):
                if len(rows) and self._sound(number):
                    origin[rows], at[rows] = number, found
        return origin, at

    def _sound(self, number: int) -> bool:
        if number not in self._is_sound:
            self._is_sound[number] = self._matrices[number][2]()
        return self._is_sound[number]


def _matrices(before: Embeddings, dim: int) -> Iterator[tuple[np.ndarray, np.ndarray, Callable[[], bool]]]:
    for name in sorted(before.manifest["files"], key=lambda name: (name != "embeddings.npy", name)):
        keys_name = f"{KEYS}/{name.replace('/', '-')}"
        if not name.endswith(".npy") or keys_name not in before.manifest["files"]:
            continue
        keys, rows = mapped(before.path / keys_name), mapped(before.path / name)
        if rows.shape[-1] == dim and rows.size == len(keys) * dim:
            # sts-*.npy holds two rows a pair
            yield keys, rows.reshape(-1, dim), partial(_is_as_written, before, (name, keys_name))


def _is_as_written(before: Embeddings, names: Iterable[str]) -> bool:
    for name in names:
        if sha256(before.path / name) != before.manifest["files"][name]:
            print(f"encode: {before.path / name}: damaged, nothing is copied from it", file=sys.stderr)
            return False
    return True


def _halves(keys: np.ndarray) -> np.ndarray:
    """Keys as two numbers each, uint64 (n, 2)."""
    return np.ascontiguousarray(keys).view(np.uint64)


def _positions(
    known: np.ndarray, keys: np.ndarray, origin: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of `keys` that are not found yet and that `known` has, and the first row of it that has each."""
    if not len(known):
        return
    first, second = _halves(known).T
    order = np.argsort(first, kind="stable").astype(np.int32)
    ordered = first[order]
    for start in range(0, len(keys), KEYS_AT_ONCE):
        rows = start + np.flatnonzero(origin[start : start + KEYS_AT_ONCE] == HERE)
        wanted = _halves(keys[rows])
        found = order[np.minimum(np.searchsorted(ordered, wanted[:, 0]), len(order) - 1)]
        # Of two keys that share their first half one is not found, and is encoded again: rare, and right.
        is_same = (first[found] == wanted[:, 0]) & (second[found] == wanted[:, 1])
        yield rows[is_same], found[is_same]


def _repeated(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows whose key an earlier row has, and the first such row of each: two int64 (n_repeated,)."""
    first, second = _halves(keys).T
    order = np.argsort(first, kind="stable")  # of equal keys the first row comes first
    again = _as_before(first, order)
    if not _as_before(second, order)[again].all():  # two keys share their first half
        order = np.lexsort((second, first))
        again = _as_before(first, order) & _as_before(second, order)
    places = np.flatnonzero(again)
    begins = np.ones(len(places), bool)  # which of them come behind a row that is no repetition
    begins[1:] = np.diff(places) > 1
    before = np.maximum.accumulate(np.where(begins, places - 1, 0))
    return order[places], order[before]


def _as_before(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Whether each value is the one before it in this order: bool (n,)."""
    ordered = values[order]
    return np.concatenate([np.zeros(min(1, len(ordered)), bool), ordered[1:] == ordered[:-1]])


@dataclass(frozen=True)
class Plan:
    """Where each row of a matrix comes from.

    Attributes:
        origin: int16 (n,), which matrix of the version before, or HERE.
        at: int32 (n,), which row of that matrix; HERE: the first row of this one with the same key.
    """

    origin: np.ndarray
    at: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, known: Known) -> Plan:
        origin, at = known.find(keys)
        here = np.flatnonzero(origin == HERE).astype(np.int32)
        again, first = _repeated(keys if len(here) == len(keys) else keys[here])
        at[here[again]] = here[first]
        return cls(origin, at)

    @property
    def is_encoded(self) -> np.ndarray:
        """Of each row, whether this run encodes its text: bool (n,)."""
        return (self.origin == HERE) & (self.at == np.arange(len(self.at)))

    @property
    def counts(self) -> dict[str, int]:
        """Rows that are copied of the version before, equal to an earlier one, and encoded."""
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
        known: rows of the version before.
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
        if not self._is_whole(name, keys, job.dim):
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
        file, keys_file = self._files(planned.name)
        if planned.shards is not None:
            _encode(planned, planned.shards, engine)
            _put_together(file, planned.plan, self.known, planned.shards)
            write_json(self._seen_file(planned.name), planned.shards.seen()._asdict())
            _put(keys_file, planned.keys)  # the last: the matrix is whole where its keys are
            shutil.rmtree(planned.shards.folder)
        return mapped(file)

    def seen(self, name: str) -> dict[str, int]:
        """What the model saw of the texts that were encoded for NAME.npy: the names of `shards.Seen`."""
        return json.loads(self._seen_file(name).read_text(encoding="utf-8"))

    def _seen_file(self, name: str) -> Path:
        return self.folder / f"seen-{name.replace('/', '-')}.json"

    def _files(self, name: str) -> tuple[Path, Path]:
        return self.folder / f"{name}.npy", self.folder / KEYS / f"{name.replace('/', '-')}.npy"

    def _is_whole(self, name: str, keys: np.ndarray, dim: int) -> bool:
        file, keys_file = self._files(name)
        if not file.exists() or not keys_file.exists():
            return False
        return mapped(file).shape == (len(keys), dim) and np.array_equal(mapped(keys_file), keys)


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


def _put_together(file: Path, plan: Plan, known: Known, shards: Shards) -> None:
    """The matrix from copied, encoded and equal rows."""
    matrix = _allocated(file, (len(plan.at), shards.dim), np.float32)
    for number, rows in enumerate(known.rows):
        for block in _blocks(np.flatnonzero(plan.origin == number)):
            matrix[block] = rows[plan.at[block]]
    encoded, start = np.flatnonzero(plan.is_encoded), 0
    for number, n in enumerate(shards.n_rows):
        matrix[encoded[start : start + n]] = shards.read(number)
        start += n
    for block in _blocks(np.flatnonzero((plan.origin == HERE) & ~plan.is_encoded)):
        matrix[block] = matrix[plan.at[block]]
    _finish(file, matrix)


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
