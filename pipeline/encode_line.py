"""Stage `encode` on many machines, or in several processes of one: a Beam line whose workers encode shards.

    shards' numbers -> encode one -> sum counts -> write them

Driver and workers share a folder and nothing else: the driver leaves the model and each shard's texts there,
a worker leaves its shard, under the name that `Shards` gives it. It is encoded by the same function as in the
driver's own process, from the same texts by the same job: it has the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import apache_beam as beam
import pyarrow as pa
from apache_beam.io.filesystems import FileSystems

from pipeline import progress, shards, storage
from pipeline.artifacts import write_json
from pipeline.config import EncodeConfig
from pipeline.counts import SumCounts, counted, raise_failure, read_counts, write_counts
from pipeline.errors import ConfigError, InputError, PipelineError
from pipeline.runners import Options, engine_faults_in_a_line
from pipeline.shards import Encoded, Engine, Job, Shards

if TYPE_CHECKING:
    from pipeline.encoder import Encoder

MODEL = "model.tar"
COUNTS = "counts.parquet"
GIVEN_UP = "given-up"  # a shard could not be encoded: what was not begun need not be
OF_ONE_RUN = ("texts-*", MODEL, COUNTS, GIVEN_UP)


def engine(options: Options, config: EncodeConfig, out: Path) -> Engine:
    """What encodes missing shards on the runner of `options`.

    Args:
        out: the artefact's folder, by whose name its folders in `encode.temp_location` are told.

    Raises:
        ConfigError: `encode.temp_location` cannot be written.
    """
    if config.temp_location is not None:
        _try_to_write(config.temp_location)
    return Line(options, config.temp_location, out.name)


def fetch(artefact: Path, made: Shards | None) -> None:
    """Take the shards that workers finished for a driver that was killed, and remove all that it left there.

    Args:
        artefact: the half-done one's folder, in which is noted where.
        made: the shards that are needed now; None: none are.
    """
    note = artefact / shards.ELSEWHERE
    if not note.exists():
        return
    left = json.loads(note.read_text(encoding="utf-8"))
    folder = f"{left['temp_location'] or artefact}/{left['folder']}"
    if made is not None and made.folder.name == left["shards"]:
        _collect(folder, made)
    storage.remove_folder(folder)
    shutil.rmtree(note.parent)


@dataclass(frozen=True)
class Line:
    """Encodes shards by one straight Beam line: an `Engine`."""

    options: Options
    temp_location: str | None
    name: str

    def __call__(self, job: Job, windows: Iterable[tuple[int, list[str]]], made: Shards) -> None:
        """Encode the windows of the shards that are missing.

        Raises:
            PipelineError: a worker's failure, in one line; what the others finished is kept.
        """
        fetch(made.folder.parent, made)
        if missing := set(made.missing()):
            folder = self._place(made)
            try:
                sizes = _send_texts(folder, windows, missing)
                _let_go()  # of what the driver encoded by so far: workers may need the room
                self._run(job, sizes, made, folder)
            finally:
                _let_go()  # the workers may have been threads of this process
                for pattern in OF_ONE_RUN:  # shards stay: the next run may need them
                    storage.remove(folder, pattern)
                storage.remove_folder(progress.marks_of(folder, job.title))
            fetch(made.folder.parent, made)

    def _place(self, made: Shards) -> str:
        """A new folder that driver and workers share.

        Its name is drawn and kept in the half-done artefact: the next run finds there what this one leaves,
        and no other run takes or removes it, be its artefact's path the same on another machine, or its
        settings others.
        """
        artefact, drawn = made.folder.parent, uuid4().hex[:16]
        base = self.temp_location and self.temp_location.rstrip("/")
        name = f".{self.name}.shards-{drawn}" if base else f"shards-line-{drawn}"
        note = artefact / shards.ELSEWHERE
        note.parent.mkdir(exist_ok=True)
        write_json(note, {"temp_location": base, "folder": name, "shards": made.folder.name})
        folder = f"{base or artefact}/{name}"
        storage.make_folder(folder)
        return folder

    def _run(self, job: Job, sizes: dict[int, int], made: Shards, folder: str) -> None:
        """Have the shards encoded whose texts are in the folder.

        Args:
            sizes: texts of each shard, by number.
        """
        marks = progress.marks_of(folder, job.title)
        sent = replace(job, model=_send_model(job.model, folder))
        encode = EncodeShard(sent, job.model, folder, marks, self.options.cores_a_worker)
        n_texts, n = sum(sizes.values()), len(sizes)
        print(f"encode: {n_texts:,} {job.title} in {n:,} shard{'s' * (n != 1)}", file=sys.stderr)
        with (
            progress.shown(f"encode: {job.title}", n_texts, " texts", marks),
            engine_faults_in_a_line(self.options.runner),
            beam.Pipeline(runner=self.options.runner, options=self.options.beam) as pipeline,
        ):
            # Every shard gives counts, so there is a sum: see the lines of stage pairs.
            _ = (
                pipeline
                | "shards" >> beam.Create(sorted(sizes))
                | "encode" >> beam.Map(encode)
                | "sum" >> beam.CombineGlobally(SumCounts()).without_defaults()
                | "write counts" >> beam.Map(write_counts, f"{folder}/{COUNTS}")
            )
        counts = read_counts(f"{folder}/{COUNTS}")
        _collect(folder, made)
        raise_failure(counts)
        if left := made.missing():
            raise PipelineError(
                f"{folder}: of {len(sizes):,} shards {len(left):,} are not there or damaged, first number "
                f"{left[0]}, though workers wrote them: run the same command again"
            )


@dataclass(frozen=True)
class EncodeShard:
    """Encodes one shard in a worker, unless an earlier attempt has.

    Attributes:
        job: its model is the driver's folder as one file, or a name that workers look up.
        named: the model as the driver calls it, for messages.
        folder: where texts come from and shards go.
        marks: where progress is said.
        n_threads: that PyTorch computes with; None: as many as a Dask worker has, or as PyTorch likes.
    """

    job: Job
    named: str
    folder: str
    marks: str
    n_threads: int | None

    def __call__(self, number: int) -> dict[str, Any]:
        if storage.names(self.folder, GIVEN_UP):
            return {"given_up": 1}
        counts = counted(self._encode, number)
        if "failure" in counts:
            with suppress(OSError):  # the disk may be full: then the others fail on their own
                FileSystems.create(f"{self.folder}/{GIVEN_UP}").close()
        return counts

    def _encode(self, number: int) -> dict[str, Any]:
        texts = storage.read_arrow(_texts_file(self.folder, number))["text"].to_pylist()
        if not storage.names(self.folder, f"{number:05}-*.npy"):
            content = shards.npy(self._rows(texts))
            with storage.created(f"{self.folder}/{shards.name_of(number, content)}") as file:
                file.write(content)
        progress.mark(self.marks, f"{number:05}", len(texts), {})
        return {"shards": 1}

    def _rows(self, texts: list[str]) -> Encoded:
        import torch

        with _alone:
            encoder = _opened(self.job, self.named)
            if n_threads := self.n_threads or _of_dask_worker():
                torch.set_num_threads(n_threads)  # of this thread: a runner takes another for each shard
            return shards.encode_shard(replace(self.job, model=self.named), texts, encoder)


# --- The model in a worker ---------------------------------------------------------------------------

# Threads of one process share its model and its cores, so they take turns: a shard keeps all cores busy.
_alone = threading.Lock()
_kept: list[tuple[Job, Encoder]] = []  # one at most


def _opened(job: Job, named: str) -> Encoder:
    """The job's encoder, kept in this process for the next shard.

    Raises:
        InputError: as `Encoder.open`.
    """
    if not _kept or _kept[0][0] != job:
        _let_go()  # before the next one comes: two may not fit
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as in the driver
        _kept.append((job, _open(job, named)))
    return _kept[0][1]


def _open(job: Job, named: str) -> Encoder:
    if not job.model.endswith(f"/{MODEL}"):
        return shards.opened(job)
    with tempfile.TemporaryDirectory(prefix="encode-") as place:  # open, it needs its files no more
        with storage.open_raw(job.model) as file, tarfile.open(fileobj=file, mode="r|") as packed:
            packed.extractall(place, filter="data")
        try:
            return shards.opened(replace(job, model=place))
        except InputError as error:
            raise InputError(str(error).replace(place, named)) from None


def _let_go() -> None:
    _kept.clear()
    shards.close()


def _of_dask_worker() -> int | None:
    """Threads of the Dask worker in which this runs, if it does."""
    if "distributed" not in sys.modules:
        return None
    from distributed import get_worker

    try:
        return int(get_worker().state.nthreads)
    except ValueError:  # not in a worker
        return None


# --- What driver and workers share -------------------------------------------------------------------


def _try_to_write(folder: str) -> None:
    """Make the folder where it is not there, and refuse one that takes no file.

    Raises:
        ConfigError: so it is.
    """
    probe = f"{folder.rstrip('/')}/.{uuid4().hex}.part"
    try:
        storage.make_folder(folder)
        FileSystems.create(probe).close()
        FileSystems.delete([probe])
    except Exception as error:  # each file system's library has errors of its own
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"encode.temp_location: {folder}: {reason}; wanted a folder that this machine and all workers "
            "can write"
        ) from None


def _texts_file(folder: str, number: int) -> str:
    return f"{folder}/texts-{number:05}.arrow"


def _send_texts(folder: str, windows: Iterable[tuple[int, list[str]]], missing: set[int]) -> dict[int, int]:
    """Leave the missing shards' texts for the workers; returns how many texts each has, by number."""
    sizes = {}
    for number, texts in windows:
        if number in missing:
            table = pa.table({"text": pa.array(texts, pa.large_string())})
            storage.write_arrow(table, _texts_file(folder, number))
            sizes[number] = len(texts)
    return sizes


def _send_model(model: str, folder: str) -> str:
    """Leave a model folder for the workers, as one file; returns what they open."""
    if not Path(model).is_dir():
        return model  # a name, that each of them looks up
    with (
        storage.created(f"{folder}/{MODEL}") as file,
        tarfile.open(fileobj=file, mode="w|", dereference=True) as packed,
    ):
        packed.add(model, ".")
    return f"{folder}/{MODEL}"


def _collect(folder: str, made: Shards) -> None:
    """Move shards that workers finished to the others; a damaged one is said."""
    missing = set(made.missing())
    for path in storage.names(folder, "[0-9]*-*.npy"):
        name = path.rpartition("/")[2]
        number = int(name.partition("-")[0])
        with storage.open_raw(path) as file:
            content = file.read()
        if name != shards.name_of(number, content):
            print(f"encode: {path}: damaged, it is encoded again", file=sys.stderr)
        elif number in missing:
            made.write_bytes(number, content)
        storage.remove(folder, name)
