"""Shards: the rows that must be encoded, in files of one window each, that a killed run finds again.

A shard's file is named by its number and by a hash of its bytes, so it is whole or not there, and a damaged
one is told from a good one. Who encodes it, this process or a worker on another machine, does not matter: the
same worker makes the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from tqdm import tqdm

from pipeline.checks import first_bad_row
from pipeline.errors import ArtifactError
from pipeline.throughput import WINDOW_CHARACTERS, ignored

if TYPE_CHECKING:
    from pipeline.encoder import Encoder
    from pipeline.throughput import Window

Precision = Literal["float32", "mixed", "bfloat16"]
Texts = Callable[[], Iterable[str]]  # called more than once; gives the same texts each time

NAME = re.compile(r"\d{5,}-[0-9a-f]{16}\.npy")
ELSEWHERE = "shards-elsewhere/place.json"  # in a half-done artefact: where workers leave shards for it
UNSEEN = 4  # beside the flags of `throughput.Window`: the library tokenised the text, nothing is known


@dataclass(frozen=True)
class Job:
    """Everything that a worker needs to encode texts; it can be pickled.

    Attributes:
        model: a folder, a hub name or package:NAME.
        revision: of a hub name.
        precision: "float32", "mixed" or "bfloat16": chosen, never "auto".
        max_seq_length: tokens read of a text; None: the model's own.
        prompts: what stands before each "query" and each "document"; None: the model's own.
        dim: width of a vector.
        title: what the progress bar says is encoded, such as "documents".
        n_texts: to be encoded in all.
        n_done: of these, in shards that an earlier attempt has left.
    """

    model: str
    dim: int
    task: Literal["query", "document"] = "document"
    precision: Precision = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    revision: str | None = None
    max_seq_length: int | None = None
    prompts: Mapping[str, str] | None = field(default=None, hash=False)
    batch_size: int = 128
    batch_tokens: int | Literal["auto"] = "auto"
    title: str = "texts"
    n_texts: int = 0
    n_done: int = 0


@dataclass(frozen=True)
class Encoded:
    """What a worker makes of a window.

    Attributes:
        rows: float32 (n_texts, dim).
        flags: what was seen of each text, uint8 (n_texts,), as `throughput.Window.flags`, or UNSEEN.
    """

    rows: np.ndarray
    flags: np.ndarray

    @classmethod
    def unseen(cls, rows: np.ndarray) -> Encoded:
        """Rows of texts that the library tokenised."""
        return cls(rows, np.full(len(rows), UNSEEN, np.uint8))


class Shards:
    """A folder of shards, `00012-<first 16 hex of the sha256 of its bytes>.npy`.

    In each are two arrays, one behind the other: the rows, float32 (n_rows, dim), and the flags of their
    texts, uint8 (n_rows,). A reader of the first needs not know of the second.

    Args:
        folder: is made where it is not there.
        n_rows: of each shard, in order.
        dim: width of a row.
    """

    def __init__(self, folder: Path, n_rows: Sequence[int], dim: int) -> None:
        self.folder = folder
        self.n_rows = list(n_rows)
        self.dim = dim
        self._first: Callable[[Encoded], object] = ignored
        folder.mkdir(parents=True, exist_ok=True)
        self._files = dict(self._found())

    def missing(self) -> list[int]:
        """The numbers of the shards that are not there, ascending."""
        return [number for number in range(len(self.n_rows)) if number not in self._files]

    def write(self, number: int, encoded: Encoded) -> None:
        """Put a shard there: whole, or not at all.

        Raises:
            ArtifactError: the rows have another shape than this shard's.
        """
        self.write_bytes(number, npy(encoded))

    def write_bytes(self, number: int, content: bytes) -> None:
        """The same from a shard's bytes, as a worker elsewhere made them."""
        self._check(number, content)
        file = self.folder / name_of(number, content)
        temporary = self.folder / f"{number:05}.tmp"
        try:
            temporary.write_bytes(content)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            error.filename = error.filename or str(file)
            raise
        temporary.replace(file)
        self._files[number] = file
        if number == 0:
            self._first(self.encoded(0))

    def watch_first(self, look: Callable[[Encoded], object]) -> None:
        """Have shard 0 looked at as soon as it is there: by what is wrong with it, all may be refused."""
        self._first = look
        if 0 in self._files:
            look(self.encoded(0))

    def read(self, number: int) -> np.ndarray:
        """The rows of a shard that is there, float32 (n_rows, dim)."""
        return np.load(self._files[number])

    def encoded(self, number: int) -> Encoded:
        """The same with the flags of its texts."""
        with self._files[number].open("rb") as file:
            return Encoded(np.load(file), np.load(file))

    def _found(self) -> Iterator[tuple[int, Path]]:
        """The shards that an earlier attempt left; a damaged one is said and removed."""
        for file in sorted(self.folder.glob("*.npy")):
            if not NAME.fullmatch(file.name):
                continue  # none of ours
            number, content = int(file.name.partition("-")[0]), file.read_bytes()
            if file.name == name_of(number, content) and self._fits(number, content):
                yield number, file
            else:
                print(f"encode: {file}: damaged, it is encoded again", file=sys.stderr)
                file.unlink()

    def _check(self, number: int, content: bytes) -> None:
        if not self._fits(number, content):
            rows = np.load(io.BytesIO(content))
            raise ArtifactError(
                f"shard {number} came as {rows.dtype} {rows.shape}, wanted float32 "
                f"{(self.n_rows[number], self.dim)}: is another version of the pipeline at work?"
            )

    def _fits(self, number: int, content: bytes) -> bool:
        """Whether a file's bytes, known to be whole, are this shard's."""
        if number >= len(self.n_rows):
            return False
        n_rows, opened = self.n_rows[number], io.BytesIO(content)
        rows = np.load(opened)
        fits = rows.shape == (n_rows, self.dim) and rows.dtype == np.float32
        return fits and np.load(opened).shape == (n_rows,)


# Encodes windows, (number of the shard, its texts), into shards; those that are missing and no others come.
Engine = Callable[[Job, Iterable[tuple[int, list[str]]], Shards], None]

# write(NAME, texts, job, model_hash) -> NAME.npy, memory-mapped float32 (n, dim), row i of text i. Rows whose
# texts this model encoded last time, or for a matrix that this run wrote before, are copied; equal texts are
# encoded once, and a killed run goes on behind its last shard. Of `job` n_texts and n_done are set by write.
# The model is opened only where something must be encoded. NAME may have a "/" in it; its folder is made, and
# `reuse.files_of` tells what is written.
Write = Callable[[str, Texts, Job, str], np.ndarray]


def name_of(number: int, content: bytes) -> str:
    """A shard's file name, of the file's bytes: the same wherever its rows were made."""
    return f"{number:05}-{hashlib.sha256(content).hexdigest()[:16]}.npy"


def npy(encoded: Encoded) -> bytes:
    """A shard as the bytes of its file."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(encoded.rows, np.float32))
    np.save(buffer, np.ascontiguousarray(encoded.flags, np.uint8))
    return buffer.getvalue()


def sizes(lengths: np.ndarray, n_texts: int, n_characters: int = WINDOW_CHARACTERS) -> list[int]:
    """How many texts each window takes: at most `n_texts`, and at most `n_characters` in all, but one.

    Args:
        lengths: characters of each text, int (n,).
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    found, start = [], 0
    while start < len(lengths):
        before = int(ends[start - 1]) if start else 0
        fitting = int(np.searchsorted(ends, before + n_characters, side="right")) - start
        found.append(max(1, min(fitting, n_texts, len(lengths) - start)))
        start += found[-1]
    return found


def windows(
    texts: Iterable[str], n_rows: Sequence[int], wanted: Sequence[int]
) -> Iterator[tuple[int, list[str]]]:
    """The wanted shards' (number, texts), in order.

    Args:
        texts: all that must be encoded, one after the other.
        n_rows: of each shard.
        wanted: numbers, ascending.
    """
    rest, needed = iter(texts), set(wanted)
    for number, n in enumerate(n_rows):
        if number in needed:
            yield number, list(itertools.islice(rest, n))
        else:
            next(itertools.islice(rest, n, n), None)  # passed over, without holding them


_kept: dict[Job, Encoder] = {}  # one at most


def opened(job: Job) -> Encoder:
    """The job's encoder; the last one opened in this process stays open, for the job that comes next.

    Raises:
        InputError: as `Encoder.open`.
    """
    from pipeline.encoder import Encoder

    how = replace(job, task="document", title="", n_texts=0, n_done=0)  # of these no encoder depends
    if how not in _kept:
        close()  # before the next one comes: two may not fit
        _kept[how] = Encoder.open(
            job.model, job.device, job.precision, job.max_seq_length, job.batch_size, job.revision,
            job.prompts, job.batch_tokens,
        )  # fmt: skip
    return _kept[how]


def close() -> None:
    """Let go of the encoder that `opened` keeps."""
    _kept.clear()


@contextmanager
def one_open() -> Iterator[None]:
    """Opens encoders anew, because another model may lie where the last one lay, and lets the last one go."""
    close()
    try:
        yield
    finally:
        close()


def encode_shard(job: Job, texts: Sequence[str], encoder: Encoder) -> Encoded:
    """The worker, here as on any other machine: one window.

    Args:
        encoder: as `opened(job)` gives it; whoever calls keeps it open from one shard to the next.

    Raises:
        ArtifactError: the model gave another shape, or rows that are not of unit length.
    """
    return next(encoded_windows(job, [(0, list(texts))], encoder))[1]


def encoded_windows(
    job: Job,
    windows: Iterable[tuple[int, list[str]]],
    encoder: Encoder,
    done: Callable[[int], object] = ignored,
) -> Iterator[tuple[int, Encoded]]:
    """(number, what comes of it) of each window; while one is computed, the next is tokenised.

    Args:
        done: is told how many texts more are computed.

    Raises:
        ArtifactError: as `encode_shard`.
    """
    under_way: deque[tuple[int, list[str]]] = deque()
    flags: deque[np.ndarray] = deque()

    def texts() -> Iterator[list[str]]:
        for window in windows:
            under_way.append(window)
            yield window[1]

    def see(window: Window) -> None:
        flags.append(window.flags)

    for rows in encoder.windows(texts(), job.task, see, done):
        number, of = under_way.popleft()
        rows = checked(job, of, rows)
        yield number, Encoded(rows, flags.popleft()) if flags else Encoded.unseen(rows)


def in_process(job: Job, windows: Iterable[tuple[int, list[str]]], shards: Shards) -> None:
    """The engine of one process."""
    encoder = opened(job)
    with progress(job) as bar:
        for number, encoded in encoded_windows(job, windows, encoder, bar.update):
            shards.write(number, encoded)


def progress(job: Job) -> tqdm:
    """The bar of a job: texts done of all, texts a second, time left."""
    return tqdm(
        total=job.n_texts, initial=job.n_done, desc=f"encode: {job.title}", unit=" texts", smoothing=0.1
    )


def checked(job: Job, texts: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """The rows as they are, where each is a vector of unit length.

    Raises:
        ArtifactError: the model gave another shape, or rows that are not of unit length.
    """
    if rows.shape != (len(texts), job.dim):
        raise ArtifactError(
            f"{job.model} gave vectors of shape {rows.shape} for {len(texts)} texts; encode.dim = {job.dim} "
            f"needs ({len(texts)}, {job.dim})"
        )
    bad = first_bad_row(rows)
    if bad is not None:
        raise ArtifactError(
            f"{job.model}: the vector of the text {texts[bad[0]][:80]!r} {bad[1]}, wanted unit length: the "
            f"model is damaged, or {job.precision} is no precision for it"
        )
    return rows
