"""Files on any Beam file system: given logs and documents in, tables and arrays of a job out and in again."""

import errno
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
from apache_beam.io.filesystem import BeamIOError, CompressionTypes
from apache_beam.io.filesystems import FileSystems

from pipeline.artifacts import sha256
from pipeline.errors import InputError, is_full_disk

CODECS = {"gz": "gzip", "zst": "zstd", "bz2": "bz2"}


def match(patterns: Iterable[str], setting: str) -> list[str]:
    """All files of the globs, each glob's sorted.

    Raises:
        InputError: a glob matches no file, or a folder; named by `setting`.
    """
    found: list[str] = []
    for pattern in patterns:
        try:
            paths = _match(pattern)
        except (BeamIOError, ValueError) as error:
            raise InputError(f"{setting}: {pattern}: {' '.join(str(error).split())[:300]}") from None
        if not paths:
            raise InputError(f"{setting}: {pattern}: no such file")
        folders = [path for path in paths if is_local(path) and Path(path).is_dir()]
        if folders:
            raise InputError(
                f"{setting}: {folders[0]} is a folder; give its files, as in {folders[0]}/*.jsonl.gz"
            )
        found += paths
    return found


def names(folder: str, pattern: str) -> list[str]:
    """Paths of what in a folder matches a glob, sorted; none is fine, and no folder too."""
    if is_local(folder):
        return sorted(str(path) for path in Path(folder).glob(pattern))  # a folder may be called [1]
    return _match(f"{folder}/{pattern}")


def _match(pattern: str) -> list[str]:
    (matched,) = FileSystems.match([pattern])
    return sorted(metadata.path for metadata in matched.metadata_list)


def size(path: str) -> int:
    """Bytes of one file."""
    if is_local(path):
        return Path(path).stat().st_size
    (matched,) = FileSystems.match([path])
    return matched.metadata_list[0].size_in_bytes


def digest(path: str) -> str:
    """Content of a local file; elsewhere what the file system says of its content."""
    if is_local(path):
        return sha256(Path(path))
    (matched,) = FileSystems.match([path])
    (metadata,) = matched.metadata_list
    return f"{FileSystems.checksum(path)}-{metadata.size_in_bytes}-{metadata.last_updated_in_seconds}"


def is_local(path: str) -> bool:
    return "://" not in path


def make_folder(path: str) -> None:
    if is_local(path):
        Path(path).mkdir(parents=True, exist_ok=True)  # Beam's error would have no errno
    elif not FileSystems.exists(path):
        FileSystems.mkdirs(path)


def remove(folder: str, pattern: str) -> None:
    """Remove the files in a folder that match a glob; none is fine."""
    found = names(folder, pattern)
    if is_local(folder):
        for path in found:
            Path(path).unlink(missing_ok=True)
    elif found:
        FileSystems.delete(found)


def remove_folder(path: str) -> None:
    """Remove a folder with all that is in it, if it is there."""
    if is_local(path):
        shutil.rmtree(path, ignore_errors=True)
    elif names(path, "*"):
        FileSystems.delete([f"{path}/"])  # Beam's buckets take the slash for "and all below"


def remove_folders(folder: str, prefix: str) -> None:
    """Remove the folders in a folder whose names begin so."""
    inside = names(folder, f"{prefix}*/*")
    for path in {path.rpartition("/")[0] for path in inside} | set(names(folder, f"{prefix}*")):
        remove_folder(path)


@contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """Open a given file, decompressed by its ending.

    Beam's own decompression takes a file that was cut short for a whole one; Arrow's raises OSError.
    """
    with open_raw(path) as raw, decompressed(raw, path) as file:
        yield file


@contextmanager
def decompressed(raw: BinaryIO, path: str) -> Iterator[BinaryIO]:
    """What is in an open file, by the ending of its path."""
    codec = CODECS.get(path.rpartition(".")[2].lower())
    if codec is None:
        yield raw
        return
    with pa.CompressedInputStream(pa.PythonFile(raw, "r"), codec) as stream:
        yield stream


@contextmanager
def open_raw(path: str) -> Iterator[BinaryIO]:
    with FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED) as file:
        yield file


@contextmanager
def created(path: str) -> Iterator[BinaryIO]:
    """Write a file under another name and rename it, so that nobody reads half of it.

    A runner may try a task again while its first attempt is still at work: each writes under a name of its
    own, that no glob for complete files matches, and a local rename replaces the other's file at once, so
    that a reader always finds one.
    """
    parent, _, name = path.rpartition("/")
    unique = uuid4().hex
    temporary = f"{parent}/.part-{unique}-{name}.part"
    try:
        with FileSystems.create(
            temporary,
            mime_type="application/octet-stream",
            compression_type=CompressionTypes.UNCOMPRESSED,
        ) as file:
            yield file
    except Exception:
        with suppress(OSError):
            remove(parent, f".part-{unique}-*")  # its room may be what is needed to say so
        raise
    if not is_local(path) and FileSystems.exists(path):
        FileSystems.delete([path])
    FileSystems.rename([temporary], [path])


def fetch(path: str, folder: Path) -> None:
    """Bring a worker's complete file into a local folder, by a rename where that is enough."""
    if is_local(path):
        shutil.move(path, folder / Path(path).name)
        return
    with open_raw(path) as source, (folder / path.rpartition("/")[2]).open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)


def read_parquet(path: str, columns: list[str] | None = None) -> pl.DataFrame:
    with FileSystems.open(path) as file:
        return pl.read_parquet(file, columns=columns)


def write_parquet(rows: pl.DataFrame, path: str) -> None:
    with created(path) as file:
        _full_disk_as_os_error(lambda: rows.write_parquet(file, compression="zstd"))


def write_dictionaries(table: pa.Table, path: str) -> None:
    """Write a table of dictionary arrays to Parquet as it is: each text once, and its rows as numbers.

    Read back the columns are plain ones: the dictionaries are Parquet's own encoding.
    """
    with created(path) as file:
        pq.write_table(
            table,
            file,
            compression="zstd",
            row_group_size=max(1, len(table)),  # each row group would carry the whole dictionary
            dictionary_pagesize_limit=1 << 30,  # by default a dictionary of 1 MiB is given up
            store_schema=False,
            write_statistics=False,
        )


def read_arrow(path: str) -> pa.Table:
    """A table as `write_arrow` left it; where the file is local its memory is the file's."""
    if is_local(path):
        with pa.memory_map(path) as mapped:
            return pa.ipc.open_file(mapped).read_all()
    with open_raw(path) as file:
        return pa.ipc.open_file(pa.py_buffer(file.read())).read_all()


def write_arrow(table: pa.Table, path: str, compression: str | None = "lz4") -> None:
    """Write an Arrow file; uncompressed, `read_arrow` reads of it only what is looked at."""
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with created(path) as file, pa.ipc.new_file(file, table.schema, options=options) as writer:
        writer.write_table(table)


def read_array(path: str) -> np.ndarray:
    """An array as `write_array` left it, read-only; memory-mapped where the file is local."""
    if is_local(path):
        return np.load(path, mmap_mode="r")
    with open_raw(path) as file:
        return np.load(file)


def write_array(array: np.ndarray, path: str) -> None:
    array = np.ascontiguousarray(array)
    with created(path) as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        # numpy's own way to a real file loses the errno, and of its last 4 KiB the failure itself
        file.write(array.view(np.uint8).data if array.size else b"")


def _full_disk_as_os_error(write: Callable[[], Any]) -> None:
    try:
        write()
    except pl.exceptions.PolarsError as error:
        if is_full_disk(error):
            raise OSError(errno.ENOSPC, str(error)) from error
        raise
