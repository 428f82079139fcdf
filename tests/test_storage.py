"""Files of a job: whole or not there, the same back as written, on a disk and in an object store."""

import errno
import fnmatch
import hashlib
import io
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.io.filesystem import BeamIOError, FileMetadata, FileSystem
from apache_beam.io.filesystems import FileSystems

from pipeline import config, pairs, storage
from pipeline.artifacts import Pairs
from pipeline.co_reading import LONG
from pipeline.counts import failure
from pipeline.errors import InputError


class ObjectStore(FileSystem):
    """A Beam file system in memory that knows keys and no folders, as gs:// and s3:// do.

    A folder's name is the name of nothing, so `exists` denies it and `match` without a glob finds nothing
    (apache_beam/io/gcp/gcsfilesystem.py); deleting what is not there is no error, and a file is there
    from the moment that it is closed.
    """

    files: dict[str, bytes] = {}  # noqa: RUF012  shared by all that Beam makes of this class

    @classmethod
    def scheme(cls) -> str:
        return "memory"

    def join(self, basepath: str, *paths: str) -> str:
        return "/".join([basepath.rstrip("/"), *paths])

    def split(self, path: str) -> tuple[str, str]:
        head, _, tail = path.rpartition("/")
        return head, tail

    def mkdirs(self, path: str) -> None:
        pass

    def has_dirs(self) -> bool:
        return False

    def _list(self, dir_or_prefix: str) -> Iterator[FileMetadata]:
        for path in [path for path in self.files if path.startswith(dir_or_prefix)]:
            yield self.metadata(path)

    def create(self, path: str, mime_type: str = "", compression_type: str = "") -> io.BytesIO:
        return Upload(path)

    def open(self, path: str, mime_type: str = "", compression_type: str = "") -> io.BytesIO:
        return io.BytesIO(self._content(path))

    def copy(self, source_file_names: list[str], destination_file_names: list[str]) -> None:
        for source, destination in zip(source_file_names, destination_file_names, strict=True):
            self.files[destination] = self._content(source)

    def rename(self, source_file_names: list[str], destination_file_names: list[str]) -> None:
        self.copy(source_file_names, destination_file_names)
        self.delete(source_file_names)

    def exists(self, path: str) -> bool:
        return path in self.files

    def size(self, path: str) -> int:
        return len(self._content(path))

    def last_updated(self, path: str) -> float:
        return 0.0

    def checksum(self, path: str) -> str:
        return hashlib.md5(self._content(path)).hexdigest()

    def metadata(self, path: str) -> FileMetadata:
        return FileMetadata(path, self.size(path), 0.0)

    def delete(self, paths: list[str]) -> None:
        for pattern in [path + "**" if path.endswith("/") else path for path in paths]:
            for path in fnmatch.filter(list(self.files), pattern):
                del self.files[path]

    def _content(self, path: str) -> bytes:
        if path not in self.files:
            raise BeamIOError(f"no such object: {path}")
        return self.files[path]


class Upload(io.BytesIO):
    """What is written becomes an object when it is closed."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def close(self) -> None:
        if not self.closed:
            ObjectStore.files[self.path] = self.getvalue()
        super().close()


@pytest.fixture(params=["disk", "object store"])
def folder(request, tmp_path) -> Iterator[str]:
    """A place of each kind."""
    yield str(tmp_path) if request.param == "disk" else "memory://bucket/job"
    ObjectStore.files.clear()


TABLE = pa.table({"word": ["a", "b", None], "n": [1, 2, 3], "rows": [[1], [], [2, 3]]})
TEXTS = pa.table(
    {"text": pa.DictionaryArray.from_arrays(pa.array([2, 0, 2], pa.int32()), pa.array(["ä", "b", "c"]))}
)

# --- Round trips ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["lz4", None])
@pytest.mark.parametrize("table", [TABLE, TABLE.slice(0, 0), TEXTS], ids=["rows", "no rows", "dictionary"])
def test_an_arrow_table_comes_back_as_it_was(folder, table, compression):
    storage.write_arrow(table, f"{folder}/t.arrow", compression)
    assert storage.read_arrow(f"{folder}/t.arrow").equals(table)


def test_an_uncompressed_arrow_file_on_disk_is_mapped_and_not_read(tmp_path):
    path = str(tmp_path / "t.arrow")
    storage.write_arrow(pa.table({"n": np.arange(1_000_000)}), path, compression=None)
    before = pa.total_allocated_bytes()
    table = storage.read_arrow(path)
    assert table["n"][999_999].as_py() == 999_999
    assert pa.total_allocated_bytes() - before < 1_000_000  # of 8,000,000


@pytest.mark.parametrize(
    "array",
    [
        np.arange(5, dtype=np.uint64),
        np.empty(0, np.int32),  # the anchors of a bucket that asks for none
        np.array([(3, 2**64 - 1), (1, 0)], LONG),
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(20)[::3],
    ],
    ids=["numbers", "none", "records", "matrix", "every third"],
)
def test_an_array_comes_back_as_it_was(folder, array):
    storage.write_array(array, f"{folder}/a.npy")
    found = storage.read_array(f"{folder}/a.npy")
    assert (found.dtype, found.tolist()) == (array.dtype, array.tolist())


def test_an_array_on_disk_is_mapped_and_cannot_be_written(tmp_path):
    storage.write_array(np.arange(5), str(tmp_path / "a.npy"))
    found = storage.read_array(str(tmp_path / "a.npy"))
    assert isinstance(found, np.memmap)
    assert not found.flags.writeable


def test_a_parquet_table_comes_back_as_it_was(folder):
    rows = pl.DataFrame({"word": ["a", None], "n": [1, 2]})
    storage.write_parquet(rows, f"{folder}/t.parquet")
    assert storage.read_parquet(f"{folder}/t.parquet").equals(rows)
    assert storage.read_parquet(f"{folder}/t.parquet", ["n"]).rows() == [(1,), (2,)]


def test_dictionaries_come_back_as_plain_texts(tmp_path):
    path = str(tmp_path / "t.parquet")
    nested = pa.ListArray.from_arrays(pa.array([0, 1, 1, 3], pa.int32()), TEXTS["text"].chunk(0))
    storage.write_dictionaries(TEXTS.append_column("texts", nested), path)
    found = pq.read_table(path)
    assert found.schema.types == [pa.string(), pa.list_(pa.string())]
    assert found.to_pydict() == {"text": ["c", "ä", "c"], "texts": [["c"], [], ["ä", "c"]]}
    assert pl.read_parquet(path)["text"].to_list() == ["c", "ä", "c"]


def test_a_table_of_no_dictionaries_entries_can_be_written(folder):
    storage.write_dictionaries(TEXTS.slice(0, 0), f"{folder}/t.parquet")
    assert storage.read_parquet(f"{folder}/t.parquet").rows() == []


def test_each_text_is_stored_once_however_large_the_dictionary(tmp_path):
    # 2,000 texts of 1,000 random letters, each in ten rows: twice the size at which Parquet gives up
    letters = np.random.default_rng(7).integers(97, 123, 2_000_000, dtype=np.uint8).tobytes().decode()
    texts = pa.array([letters[n : n + 1000] for n in range(0, 2_000_000, 1000)])
    rows = pa.array(np.tile(np.arange(2000, dtype=np.int32), 10))
    path = tmp_path / "t.parquet"
    storage.write_dictionaries(pa.table({"text": pa.DictionaryArray.from_arrays(rows, texts)}), str(path))
    column = pq.read_metadata(path).row_group(0).column(0)
    assert pq.read_metadata(path).num_row_groups == 1
    assert column.total_uncompressed_size < 2_100_000
    assert pq.read_table(path)["text"].to_pylist() == texts.to_pylist() * 10


@pytest.mark.parametrize("write", [storage.write_dictionaries, storage.write_arrow])
def test_the_same_table_is_the_same_bytes(tmp_path, write):
    for name in ("one", "other"):
        write(TEXTS, str(tmp_path / name))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


# --- Whole or not there ---------------------------------------------------------------------------------


def test_a_file_has_its_name_only_when_it_is_whole(folder):
    path = f"{folder}/t.bin"
    with storage.created(path) as file:
        file.write(b"half")
        assert storage.names(*path.rsplit("/", 1)) == []
        file.write(b" and half")
    with storage.open_raw(path) as file:
        assert file.read() == b"half and half"
    assert storage.names(str(folder), "*") == [path]


def test_a_file_is_replaced_at_the_end_alone(folder):
    path = f"{folder}/t.bin"
    for content in (b"old", b"new"):
        with storage.created(path) as file:
            file.write(content)
            if content == b"new":
                with storage.open_raw(path) as before:
                    assert before.read() == b"old"
    with storage.open_raw(path) as file:
        assert file.read() == b"new"


def break_off(path: str) -> None:
    with storage.created(path) as file:
        file.write(b"ne")
        raise OSError("the cable is broken")


def test_a_write_that_fails_leaves_the_old_file_and_no_half_one(folder):
    path = f"{folder}/t.bin"
    with storage.created(path) as file:
        file.write(b"old")
    with pytest.raises(OSError, match="broken"):
        break_off(path)
    assert storage.names(str(folder), "*") == [path]
    with storage.open_raw(path) as file:
        assert file.read() == b"old"


class FullDisk(io.RawIOBase):
    """A file on a disk with room for 100 bytes more."""

    room = 100

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        n_bytes = memoryview(data).nbytes
        if n_bytes > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= n_bytes
        return n_bytes


LETTERS = [f"{n:x}" for n in range(1000)]
WRITERS: dict[str, Callable[[str], None]] = {
    "arrow": lambda path: storage.write_arrow(pa.table({"n": np.arange(1000)}), path),
    "array": lambda path: storage.write_array(np.arange(1000), path),
    "parquet": lambda path: storage.write_parquet(pl.DataFrame({"text": LETTERS}), path),
    "dictionaries": lambda path: storage.write_dictionaries(
        pa.table({"text": pa.array(LETTERS).dictionary_encode()}), path
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_said_to_be_full_and_holds_no_half_file(tmp_path, monkeypatch, name):
    def create(path: str, **_) -> io.RawIOBase:
        Path(path).touch()
        return FullDisk()

    monkeypatch.setattr(FileSystems, "create", create)
    with pytest.raises(OSError, match="No space left") as raised:
        WRITERS[name](str(tmp_path / "t"))
    assert failure(raised.value)["failure"][0] == 2
    assert "the disk is full" in failure(raised.value)["failure"][1]
    assert list(tmp_path.iterdir()) == []


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """Let the operating system refuse to make any file longer, as it refuses on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("name", "room"),
    [
        ("arrow", 4096),
        ("dictionaries", 1000),
        ("array", 4096),  # numpy's tofile would keep no errno
        # the header and the first numbers have room, the rest is lost in a buffer that nobody flushes
        ("array", 5000),
    ],
)
def test_what_the_operating_system_refuses_is_raised_and_leaves_no_file(tmp_path, name, room):
    with pytest.raises(OSError, match="File too large") as raised, files_of_at_most(room):
        WRITERS[name](str(tmp_path / "t"))
    assert raised.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_a_quota_that_is_used_up_is_a_full_disk_too(tmp_path, monkeypatch):
    def refuse(self, file, **_) -> None:
        file.write(b"PAR1")
        raise pl.exceptions.ComputeError("underlying IO error: Disk quota exceeded (os error 122)")

    monkeypatch.setattr(pl.DataFrame, "write_parquet", refuse)
    with pytest.raises(OSError, match="quota") as raised:
        WRITERS["parquet"](str(tmp_path / "t"))
    assert failure(raised.value)["failure"][0] == 2
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_hold_files_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file") as raised:
        WRITERS["array"](str(tmp_path / "file" / "t"))
    assert raised.value.errno in (errno.EEXIST, errno.ENOTDIR)
    assert failure(raised.value)["failure"] == [2, f"{tmp_path / 'file'}: File exists; check the path"]


# --- Names, folders, given files ------------------------------------------------------------------------


def test_names_are_sorted_and_none_is_fine(folder):
    for name in ("b.txt", "a.txt", "c.csv"):
        with storage.created(f"{folder}/{name}") as file:
            file.write(name.encode())
    assert storage.names(str(folder), "*.txt") == [f"{folder}/a.txt", f"{folder}/b.txt"]
    assert storage.names(str(folder), "d*") == []
    assert storage.size(f"{folder}/a.txt") == 5


def test_a_file_can_be_removed(folder):
    storage.make_folder(folder)
    storage.make_folder(folder)  # again is fine
    storage.write_array(np.arange(3), f"{folder}/a.npy")
    storage.remove(str(folder), "a.npy")
    assert storage.names(str(folder), "*") == []


def test_a_folder_is_removed_with_all_that_is_in_it_and_no_other(folder):
    for name in ("job/a.npy", "job/marks/b.npy", "job2/c.npy"):
        storage.write_array(np.arange(3), f"{folder}/{name}")
    storage.remove_folder(f"{folder}/job")
    storage.remove_folder(f"{folder}/job")  # what is not there needs no removal
    assert storage.names(f"{folder}/job", "*") == storage.names(f"{folder}/job/marks", "*") == []
    assert storage.names(f"{folder}/job2", "*") == [f"{folder}/job2/c.npy"]


def test_a_digest_follows_the_content_and_not_the_name(folder):
    for name, content in (("a", b"x"), ("b", b"x"), ("c", b"y")):
        with storage.created(f"{folder}/{name}") as file:
            file.write(content)
    a, b, c = (storage.digest(f"{folder}/{name}") for name in "abc")
    assert a == b != c


def test_globs_keep_their_order_and_their_files_are_sorted(tmp_path):
    for name in ("2.csv", "1.csv", "0.jsonl"):
        (tmp_path / name).touch()
    found = storage.match([f"{tmp_path}/*.csv", f"{tmp_path}/*.jsonl"], "events.paths")
    assert [Path(path).name for path in found] == ["1.csv", "2.csv", "0.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nope*.csv", r"events\.paths: .*nope\*\.csv: no such file"),
        ("logs", r"events\.paths: .*logs is a folder; give its files, as in .*logs/\*\.jsonl\.gz"),
        ("nowhere://logs/*.csv", r"events\.paths: nowhere://logs/\*\.csv: Unable to get filesystem"),
    ],
)
def test_a_glob_that_names_no_file_is_refused_by_its_setting(tmp_path, pattern, message):
    (tmp_path / "logs").mkdir()
    with pytest.raises(InputError, match=message):
        storage.match([pattern if "://" in pattern else f"{tmp_path}/{pattern}"], "events.paths")


@pytest.mark.parametrize(
    ("ending", "codec"), [("gz", "gzip"), ("zst", "zstd"), ("bz2", "bz2"), ("GZ", "gzip")]
)
def test_a_compressed_file_is_read_and_one_cut_short_is_an_error(tmp_path, ending, codec):
    path = tmp_path / f"log.csv.{ending}"
    content = "".join(f"{n * 7919}," for n in range(100_000)).encode()
    with pa.CompressedOutputStream(str(path), codec) as file:
        file.write(content)
    with storage.open_file(str(path)) as file:
        assert file.read() == content
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError), storage.open_file(str(path)) as file:  # noqa: PT011  the codec's own words
        file.read()


# --- A job whose workers share an object store ----------------------------------------------------------


@pytest.mark.slow
def test_a_job_through_an_object_store_gives_the_same_bytes_and_cleans_up(tmp_path, log):
    def run(name: str, temp_location: str | None) -> Pairs:
        given = config.from_dict(
            {
                "events": {"paths": [str(log / "events.jsonl")]},
                "documents": {"paths": [str(log / "documents.jsonl")]},
                "pairs": {
                    "temp_location": temp_location,
                    "negatives": {"cross_user": 0.5, "bm25": 0.5},
                    "n_buckets": 4,
                },
            }
        )
        return pairs.run(given.pairs, given.events, given.documents, tmp_path / name)

    far, near = run("far", "memory://bucket/tmp"), run("near", None)
    assert ObjectStore.files == {}
    assert far.manifest["files"] == near.manifest["files"]
    assert (far.rows, far.facts) == (near.rows, near.facts)
