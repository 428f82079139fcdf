"""A published version's folder: its manifest, its encoder, its documents and its rows."""

import contextlib
import json
import os
import tempfile
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.artifacts import encoder_sha256, file_hashes
from pipeline.errors import ArtifactError

ASSETS = "assets.extra"
PASSAGE = "passage"  # number of a row in its document, where documents have several
COLUMNS = ("document_id", "title", "text", "threshold", PASSAGE)
COLUMN_KINDS = {
    "document_id": "text", "text": "text", "title": "text", "language": "text", "threshold": "numbers"
}  # fmt: skip
LENGTH_TOLERANCE = 0.01  # of a unit row: far more than rounding to 16 bits takes
ROWS, RELATED = "rows.npy", "related.parquet"
BATCH_ROWS = 65_536  # of the Arrow file: what is read of the Parquet file at once
MAX_LANGUAGES = 1000  # a column of more values is no language
MAX_CO_READ = 20  # of one document, as many as `publish` writes by default


class PublishedVersion:
    """One published version folder, as far as a question needs it.

    Attributes:
        folder: FOLDER/models/<model_name>/<version>/.
        version: its number.
        manifest: assets.extra/manifest.json: encoder_sha256, k, dim, description, settings.
    """

    def __init__(self, model_base_path: Path, version: int) -> None:
        self.folder = model_base_path / str(version)
        self.version = version
        self.manifest = self._read_manifest()

    @property
    def encoder_sha256(self) -> str:
        """Which encoder the version's vectors were made with.

        Raises:
            ArtifactError: the manifest does not say.
        """
        sha256 = self.manifest.get("encoder_sha256")
        if not isinstance(sha256, str):
            raise ArtifactError(f"{self.folder / ASSETS / 'manifest.json'} names no encoder_sha256")
        return sha256

    @property
    def encoder_folder(self) -> Path:
        folder = self.folder.parent.parent.parent / "encoders" / self.encoder_sha256
        if not folder.is_dir():
            raise ArtifactError(f"{folder} is not there: version {self.folder.name} was encoded with it")
        return folder

    def checked_encoder(self) -> Path:
        """The encoder's folder, its files as they were published: another prefix gives other vectors.

        Raises:
            ArtifactError: it is missing, or a file of it was changed, added or removed.
        """
        folder = self.encoder_folder
        if encoder_sha256(file_hashes(folder)) != folder.name:
            raise ArtifactError(
                f"{folder} was changed after version {self.folder.name} was made with it: its vectors would "
                "be of another model than the index's; publish again, or put its files back as they were"
            )
        return folder

    def documents(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """What stands in these rows, in their order: COLUMNS, as far as the version has them.

        Raises:
            ArtifactError: the table is not there, or too short: it belongs to another index.
        """
        with self.table() as table:
            n_rows = table.metadata.num_rows
            beyond = [row for row in rows if not 0 <= row < n_rows]
            if beyond:
                path = self.folder / ASSETS / "documents.parquet"
                raise ArtifactError(f"{path} has {n_rows} rows, the index found row {beyond[0]}")
            return _take(table, rows)

    def table(self) -> pq.ParquetFile:
        """documents.parquet, to be closed; raises ArtifactError."""
        path = self.folder / ASSETS / "documents.parquet"
        try:
            return pq.ParquetFile(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise ArtifactError(f"{path}: {error}") from None

    def asset(self, name: str) -> Path | None:
        """A file of assets.extra/, or None: older versions, and large ones, lack some."""
        path = self.folder / ASSETS / name
        return path if path.is_file() else None

    def _read_manifest(self) -> dict[str, Any]:
        path = self.folder / ASSETS / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ArtifactError(
                f"{path} is not there: give the folder that the server watches as --model_base_path"
            ) from None
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}") from None
        if not isinstance(manifest, dict):
            raise ArtifactError(f"{path} cannot be read: it holds no JSON object; publish the version again")
        return manifest


def newest_version(model_base_path: Path) -> int:
    """The largest number among the version folders; raises ArtifactError where there is none."""
    folders = model_base_path.iterdir() if model_base_path.is_dir() else ()
    versions = [int(path.name) for path in folders if _is_version(path.name) and path.is_dir()]
    if not versions:
        raise ArtifactError(f"{model_base_path} holds no version: publish one first")
    return max(versions)


def _is_version(name: str) -> bool:
    return name.isdecimal() and str(int(name)) == name  # as the index server reads it: 07 and ٧ are none


class Catalogue:
    """All documents of one version, row by row, and back from a document's id to its rows.

    The table lies in an Arrow file without a name, mapped into memory: 1.5 million texts are the page cache's
    to keep, and the file goes with the process. Ids are found by their hash: 16 bytes a row.

    Attributes:
        n_rows: rows; more than documents where documents were encoded in passages.
        columns: the names of what a document has.
        rows: float32 (n_rows, dim), in memory; None where the version has no assets.extra/rows.npy.
        languages: what the column `language` holds, most frequent first; [] without one.
    """

    def __init__(self, batches: list[pa.RecordBatch], rows: np.ndarray | None, related: Path | None) -> None:
        self._batches = batches
        self._starts = [0]
        for batch in batches:
            self._starts.append(self._starts[-1] + batch.num_rows)
        self.n_rows = self._starts.pop()
        self.columns = batches[0].schema.names if batches else []
        self.rows = rows
        self._order, self._hashes = _by_hash(self.ids)
        self.languages, self._language_codes = self._read_languages()
        self._co_read = _CoRead.read(related, self) if related else None

    @classmethod
    def open(cls, version: PublishedVersion) -> "Catalogue":
        """Raises ArtifactError: documents.parquet or rows.npy is missing, broken or of another index."""
        with version.table() as table:
            path = version.folder / ASSETS / "documents.parquet"
            _check_columns(table.schema_arrow, path)
            batches = _mapped(table, path)
        n_rows = sum(batch.num_rows for batch in batches)
        if any(batch.column("document_id").null_count for batch in batches):
            raise ArtifactError(f"{path}: a document_id is missing; publish the version again")
        rows = _open_rows(version, n_rows) if version.asset(ROWS) else None
        return cls(batches, rows, version.asset(RELATED))

    @property
    def ids(self) -> Iterator[str]:
        """The document_id of each row."""
        return (each for batch in self._batches for each in batch.column("document_id").to_pylist())

    @cached_property
    def has_passages(self) -> bool:
        """Whether a document can have several rows."""
        return PASSAGE in self.columns or len(np.unique(self._hashes)) < self.n_rows

    @cached_property
    def has_thresholds(self) -> bool:
        return "threshold" in self.columns and any(
            batch.column("threshold").null_count < batch.num_rows for batch in self._batches
        )

    def documents(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """What stands in these rows, in their order, every column of it."""
        return [self._document(row) for row in rows]

    def id_of(self, row: int) -> str:
        return self.value(row, "document_id")

    def value(self, row: int, column: str) -> Any:
        batch, at = self._place(row)
        return batch.column(column)[at].as_py()

    def row_of(self, document_id: str) -> int | None:
        """The document's first row; None: it is none of this version's."""
        rows = self.rows_of(document_id)
        return rows[0] if rows else None

    def rows_of(self, document_id: str) -> list[int]:
        """The rows of a document, ascending: several where it was encoded in passages."""
        wanted = np.int64(hash(document_id))
        low, high = (int(np.searchsorted(self._hashes, wanted, side)) for side in ("left", "right"))
        found = sorted(int(row) for row in self._order[low:high])
        return [row for row in found if self.id_of(row) == document_id]  # two ids may share a hash

    def rows_in(self, document_ids: Sequence[str]) -> np.ndarray:
        """All rows of these documents, ascending, int64; ids that the version lacks count nothing."""
        found = [row for each in dict.fromkeys(document_ids) for row in self.rows_of(each)]
        return np.array(sorted(found), np.int64)

    def among(self, document_ids: Collection[str]) -> list[str]:
        """Those of many ids that the version holds; by their hashes alone, so rarely one more."""
        names = list(document_ids)
        wanted = np.fromiter((hash(name) for name in names), np.int64, len(names))
        low, high = (np.searchsorted(self._hashes, wanted, side) for side in ("left", "right"))
        return [names[at] for at in np.flatnonzero(low < high).tolist()]

    def rows_in_language(self, language: str) -> np.ndarray:
        """Rows of one of `languages`, ascending, int64."""
        code = self.languages.index(language)
        return np.flatnonzero(self._language_codes == code)

    def titles(self) -> pa.ChunkedArray:
        """Each row's title, or its text's first line where it has none."""
        return pa.chunked_array([_titles(batch) for batch in self._batches], pa.large_string())

    def texts(self) -> Iterator[str]:
        """Each row's title and text, for a search by words."""
        for batch in self._batches:
            texts = batch.column("text").to_pylist()
            titles = batch.column("title").to_pylist() if "title" in self.columns else [None] * len(texts)
            yield from map(searched_text, titles, texts)

    def co_read(self, row: int) -> list[dict[str, Any]]:
        """What its readers read in the same session: row, n_readers, n_sessions; most readers first."""
        return self._co_read.of(row) if self._co_read else []

    def _document(self, row: int) -> dict[str, Any]:
        batch, at = self._place(row)
        return {name: batch.column(i)[at].as_py() for i, name in enumerate(self.columns)}

    def _place(self, row: int) -> tuple[pa.RecordBatch, int]:
        if not 0 <= row < self.n_rows:
            raise ArtifactError(f"documents.parquet has {self.n_rows} rows, the index found row {row}")
        n = bisect_right(self._starts, row) - 1
        return self._batches[n], row - self._starts[n]

    def _read_languages(self) -> tuple[list[str], np.ndarray]:
        if "language" not in self.columns or not self.n_rows:
            return [], np.empty(0, np.int16)
        column = pa.chunked_array([batch.column("language") for batch in self._batches])
        counts = pc.value_counts(column.drop_null()).to_pylist()
        if len(counts) > MAX_LANGUAGES:
            return [], np.empty(0, np.int16)
        known = [str(each["values"]) for each in sorted(counts, key=lambda each: -each["counts"])]
        codes = pc.index_in(column.cast(pa.large_string()), pa.array(known, pa.large_string()))
        return known, codes.fill_null(-1).to_numpy().astype(np.int16)


class _CoRead:
    """related.parquet as rows: four int32 columns, sorted by row, most readers first."""

    def __init__(self, columns: dict[str, np.ndarray]) -> None:
        order = np.lexsort((columns["other"], -columns["n_sessions"], -columns["n_readers"], columns["row"]))
        self._columns = {name: column[order] for name, column in columns.items()}

    @classmethod
    def read(cls, path: Path, catalogue: Catalogue) -> "_CoRead":
        """Raises ArtifactError: it cannot be read. Documents that the version lacks are left out."""
        names = ["document_id", "related_document_id", "n_readers", "n_sessions"]
        parts: dict[str, list[np.ndarray]] = {each: [] for each in ("row", "other", *names[2:])}
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(BATCH_ROWS, columns=names):
                    row, other = (_rows_by_id(batch.column(name), catalogue) for name in names[:2])
                    kept = (row >= 0) & (other >= 0)
                    counts = [np.asarray(batch.column(name), np.int32) for name in names[2:]]
                    for into, column in zip(parts.values(), (row, other, *counts), strict=True):
                        into.append(column[kept])
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise ArtifactError(f"{path}: {error}; publish the version again") from None
        empty = np.empty(0, np.int32)
        return cls({name: np.concatenate([empty, *part]) for name, part in parts.items()})

    def of(self, row: int) -> list[dict[str, Any]]:
        low, high = np.searchsorted(self._columns["row"], [row, row + 1])
        part = slice(low, min(high, low + MAX_CO_READ))
        other, n_readers, n_sessions = (
            self._columns[name][part].tolist() for name in ("other", "n_readers", "n_sessions")
        )
        return [
            {"row": o, "n_readers": r, "n_sessions": s}
            for o, r, s in zip(other, n_readers, n_sessions, strict=True)
        ]


def title_of(document: Mapping[str, Any]) -> str:
    """A document's title, or its text's first line."""
    return str(document.get("title") or str(document.get("text") or "").strip().partition("\n")[0])


def searched_text(title: str | None, text: str | None) -> str:
    """What is searched by words: title and text; a title that begins the text comes once."""
    text = text or ""
    return text if not title or text.startswith(title) else f"{title}\n{text}"


def _rows_by_id(column: pa.Array, catalogue: Catalogue) -> np.ndarray:
    """int32 (n,): each id's first row, -1 where the version lacks it; an id comes many times."""
    encoded = column.dictionary_encode()
    rows = [catalogue.row_of(each) for each in encoded.dictionary.to_pylist()]
    known = np.array([-1 if row is None else row for row in rows], np.int32)
    return known[np.asarray(encoded.indices)]


def _by_hash(ids: Iterator[str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows in the order of their ids' hashes, and those hashes: int64 (n,) each."""
    hashes = np.fromiter((hash(each) for each in ids), np.int64)
    order = np.argsort(hashes, kind="stable")
    return order, hashes[order]


def _titles(batch: pa.RecordBatch) -> pa.Array:
    texts = pc.fill_null(batch.column("text").cast(pa.large_string()), "")
    lines = pc.list_element(pc.split_pattern(texts, "\n", max_splits=1), 0)
    if "title" not in batch.schema.names:
        return lines
    titles = pc.fill_null(batch.column("title").cast(pa.large_string()), "")
    return pc.if_else(pc.equal(pc.utf8_trim_whitespace(titles), ""), lines, titles)


def _mapped(table: pq.ParquetFile, path: Path) -> list[pa.RecordBatch]:
    """The table's rows in batches that are mapped from a file, which has no name once it is open."""
    name = None
    try:
        descriptor, name = tempfile.mkstemp(suffix=".arrow")
        os.close(descriptor)
        with pa.OSFile(name, "wb") as sink, pa.ipc.new_file(sink, table.schema_arrow) as writer:
            for batch in _batches(table, path):
                writer.write_batch(batch)
        reader = pa.ipc.open_file(pa.memory_map(name))
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except OSError as error:
        raise ArtifactError(
            f"{path}: its copy cannot be written to the temporary folder: {error}; make room there, or name "
            "another folder as TMPDIR"
        ) from None
    finally:
        if name is not None:
            with contextlib.suppress(FileNotFoundError):
                Path(name).unlink()


def _batches(table: pq.ParquetFile, path: Path) -> Iterator[pa.RecordBatch]:
    try:
        yield from table.iter_batches(BATCH_ROWS)
    except (OSError, pa.ArrowInvalid) as error:
        said = " ".join(str(error).split())
        raise ArtifactError(f"{path}: {said}; publish the version again") from None


def _check_columns(schema: pa.Schema, path: Path) -> None:
    for name, wanted in COLUMN_KINDS.items():
        if name not in schema.names:
            if name in ("document_id", "text"):
                raise ArtifactError(f"{path} has no column {name}; publish the version again")
            continue
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        is_right = is_number if wanted == "numbers" else is_text
        if not is_right and not pa.types.is_null(kind):  # null: every value is missing
            raise ArtifactError(f"{path}: {name} is {kind}, wanted {wanted}; publish the version again")


def _open_rows(version: PublishedVersion, n_rows: int) -> np.ndarray:
    """The rows, in memory: whoever overwrites a mapped file ends the processes that read it."""
    path = version.folder / ASSETS / ROWS
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}; publish the version again") from None
    wanted = (n_rows, version.manifest.get("dim"))
    if rows.shape != wanted or rows.dtype != np.float32:
        raise ArtifactError(
            f"{path} is {rows.dtype} {rows.shape}, wanted float32 {wanted}: it is of another index; publish "
            "the version again"
        )
    lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    wrong = np.flatnonzero(~(np.abs(lengths - 1) < LENGTH_TOLERANCE))  # NaN is not below it either
    if len(wrong):
        raise ArtifactError(
            f"{path}: row {wrong[0]} has length {lengths[wrong[0]]:.4g}, wanted 1; publish the version again"
        )
    return rows


def _take(table: pq.ParquetFile, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Rows by number, reading only the row groups they are in: a table can hold millions."""
    columns = [name for name in COLUMNS if name in table.schema_arrow.names]
    found: dict[int, dict[str, Any]] = {}
    start = 0
    for group in range(table.num_row_groups):
        end = start + table.metadata.row_group(group).num_rows
        wanted = sorted({row for row in rows if start <= row < end})
        if wanted:
            part = table.read_row_group(group, columns=columns).take([row - start for row in wanted])
            found.update(zip(wanted, part.to_pylist(), strict=True))
        start = end
    return [found[row] for row in rows]
