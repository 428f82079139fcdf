"""Reading documents, or making them from the passages that readers highlighted. Columnar, no Beam.

A documents table has document_id (unique), text and title, then any further columns as given. A column
`threshold` is the score below which the document is no match for a query.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import ColumnRule, ExcludeConfig, Value
from pipeline.errors import InputError
from pipeline.events import LONE_SURROGATE

MAX_WORDS = 200  # of a document made from highlights
TITLE_LENGTH = 100  # characters of a title cut from a text
THRESHOLD = "threshold"
ID_LETTERS = 80  # of a document_id in a message
EXCLUDED = "excluded_document"  # why events and queries that lead to one are rejected: no fault of theirs
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NOT_UTF8 = {  # how a file that is something else begins
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
    b"\x1f\x8b": "compressed: let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "compressed: let its name end in .zst",
    b"BZh": "compressed: let its name end in .bz2",
}
SHOWN = r"[^\p{Cc}\p{Cf}\p{Z}]"  # a character that shows: no space, no control, no zero width
# Column: from 1, as a spreadsheet numbers rows: a CSV's header and blank lines count.
ROW = "row in its file"
NEWLINE = b"\n"
MAX_FIELD = 1 << 30  # characters of a CSV's field, where it is read again to find a fault


def read(
    file: BinaryIO,
    path: str,
    kind: str,
    *,
    document_id: str,
    text: Sequence[str],
    separator: str,
    title: str | None,
) -> pl.DataFrame:
    """Read one documents file.

    Args:
        file: its bytes, decompressed.
        path: what to call it in errors.
        kind: "jsonl", "csv" or "parquet".
        text: columns whose filled values, joined by `separator`, are a document's text.
        title: the column that people are shown; None for the text's first line.

    Returns:
        The documents and ROW, which `unique` takes out again.

    Raises:
        InputError: the file cannot be read, lacks a column, or has a row without an id or text, or with a
            threshold that is no score.
    """
    rows = _rows(file, path, kind)
    for name in (document_id, *text, *([title] if title else [])):
        if name not in rows.columns:
            there = ", ".join(column for column in rows.columns if column != ROW)
            raise InputError(
                f"{path}: no column {name!r}; it has: {there or 'none'}; "
                "set documents.document_id, documents.text, documents.title to this file's names"
            )
    for name in (document_id, *text, *([title] if title else [])):
        if rows.schema[name].is_nested():
            raise InputError(f"{path}: column {name!r} holds lists or objects, wanted text")
    parts = [pl.col(name).cast(pl.String).fill_null("").str.strip_chars() for name in text]
    filled = pl.concat_list(parts).list.eval(pl.element().filter(pl.element() != ""))
    joined = filled.list.join(separator)
    titles = pl.col(title).cast(pl.String).fill_null("").str.strip_chars() if title else pl.lit("")
    rows = rows.with_columns(
        document_id=pl.col(document_id).cast(pl.String), _text=joined, _title=titles
    ).with_columns(
        text=pl.col("_text"),
        title=pl.when(pl.col("_title") == "").then(first_line("_text")).otherwise("_title"),
    )
    for wanted, empty in (
        ("document_id", pl.col("document_id").fill_null("").str.strip_chars() == ""),
        ("text", ~pl.col("text").str.contains(SHOWN)),
    ):
        at = rows.select(pl.arg_where(empty)).to_series()
        if len(at):
            which = (
                "" if wanted == "document_id" else f" (document_id {_shown(rows['document_id'][int(at[0])])})"
            )
            others = f", nor have {len(at) - 1:,} others" if len(at) > 1 else ""
            raise InputError(
                f"{path}: row {rows[ROW][int(at[0])]}{which} has no {wanted}{others}; every document needs "
                "both: fill it in or take the row out"
            )
    ours = ("document_id", "text", "title", ROW, "_text", "_title")
    rest = [name for name in rows.columns if name not in ours]
    rows = rows.select("document_id", "text", "title", *rest, ROW)
    return _with_thresholds(rows, path) if THRESHOLD in rest else rows


def _with_thresholds(rows: pl.DataFrame, path: str) -> pl.DataFrame:
    """The column `threshold` as Float64; null stays null: such a document matches whatever its score."""
    kind = rows.schema[THRESHOLD]
    if kind.is_nested() or kind == pl.Boolean:
        what = "true and false" if kind == pl.Boolean else "lists or objects"
        raise InputError(f"{path}: column {THRESHOLD!r} holds {what}, wanted numbers from -1 to 1")
    given = rows[THRESHOLD]
    if kind == pl.String:
        given = given.str.strip_chars().replace("", None)
    score = given.cast(pl.Float64, strict=False)
    wrong = given.is_not_null() & ~score.is_between(-1, 1).fill_null(False)  # NaN is not between either
    if wrong.any():
        at = int(wrong.arg_true()[0])
        raise InputError(
            f"{path}: row {rows[ROW][at]} (document_id {_shown(rows['document_id'][at])}) has the threshold "
            f"{given[at]!r}, and {wrong.sum() - 1} others are wrong too; wanted a score from -1 to 1, or "
            "nothing: unit vectors have no other dot products"
        )
    return rows.with_columns(score.alias(THRESHOLD))


def unique(tables: Sequence[tuple[str, pl.DataFrame]]) -> pl.DataFrame:
    """All files' documents in one table, sorted by document_id, so that files may be cut anyhow.

    Args:
        tables: (path, documents) of each file.

    Raises:
        InputError: no documents, or two rows with one document_id; both are named.
    """
    placed = [table.with_columns(_file=pl.lit(number, pl.Int32)) for number, (_, table) in enumerate(tables)]
    documents = pl.concat(placed, how="diagonal_relaxed") if placed else pl.DataFrame({"document_id": []})
    if documents.is_empty():
        raise InputError(f"{', '.join(path for path, _ in tables) or 'documents'}: no documents in it")
    twice = documents.filter(pl.col("document_id").is_duplicated()).sort("document_id", "_file", ROW)
    if len(twice):
        first = twice.filter(pl.col("document_id") == twice["document_id"][0]).select("_file", ROW).rows()
        one, other = (f"{tables[file][0]} row {row}" for file, row in first[:2])
        raise InputError(
            f"document_id {_shown(twice['document_id'][0])} stands twice: {one} and {other} "
            f"({twice['document_id'].n_unique():,} ids do); a document_id must be unique"
        )
    return documents.drop("_file", ROW).sort("document_id")


# --- Keeping out -----------------------------------------------------------------------------------------


def _shown(document_id: str) -> str:
    """An id in quotes; of a long one the beginning."""
    return repr(document_id if len(document_id) <= ID_LETTERS else f"{document_id[:ID_LETTERS]}…")


def read_ids(file: BinaryIO, path: str) -> list[str]:
    """The document_ids of a file with one a line; blank lines are none.

    Raises:
        InputError: a line is not UTF-8.
    """
    found = []
    for number, line in enumerate(file.read().removeprefix(BYTE_ORDER_MARK).splitlines(), 1):
        try:
            found.append(line.decode("utf-8").strip())
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: line {number} is not UTF-8: {line[:40]!r} ({error.reason} at byte {error.start}); "
                "wanted one document_id a line"
            ) from None
    return [each for each in found if each]


def exclude(
    documents: pl.DataFrame, config: ExcludeConfig, listed: Iterable[str] = ()
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """What is kept, and document_id and reason of what is not: "document_ids" or "columns.NAME".

    A document that several rules keep out has the first one's reason, ids before columns.

    Args:
        listed: ids out of `config.document_ids_from`.

    Raises:
        InputError: a rule's column is in no file or cannot be compared with it, or no document is left.
    """
    reasons = {"document_ids": pl.col("document_id").is_in([*config.document_ids, *listed])}
    for name, rule in config.columns.items():
        reasons[f"columns.{name}"] = _meets(documents, name, rule)
    reason = pl.coalesce(
        *(pl.when(is_out).then(pl.lit(name)) for name, is_out in reasons.items()), pl.lit(None, pl.String)
    )
    marked = documents.with_columns(_reason=reason)
    out = marked.filter(pl.col("_reason").is_not_null()).select("document_id", reason="_reason")
    if len(out) == len(documents):
        counted = ", ".join(f"{name} {n:,}" for name, n in counts_of(out).items())
        raise InputError(f"documents.exclude: no documents left of {len(documents):,} ({counted})")
    return documents.filter(marked["_reason"].is_null()), out


def counts_of(out: pl.DataFrame) -> dict[str, int]:
    """{reason: documents} of what `exclude` kept out, in no order that rows decide."""
    return dict(out["reason"].value_counts().sort("reason").iter_rows())


def _meets(documents: pl.DataFrame, name: str, rule: ColumnRule | Sequence[Value]) -> pl.Expr:
    """Whether a row's value is kept out, true or false and never null."""
    if name not in documents.columns:
        there = ", ".join(column for column in documents.columns)
        raise InputError(f"documents.exclude.columns.{name}: no file has this column; there are: {there}")
    if documents.schema[name].is_nested():
        raise InputError(
            f"documents.exclude.columns.{name}: the column holds lists or objects, wanted text, numbers or "
            "true and false"
        )
    if not isinstance(rule, ColumnRule):
        return _is_one_of(documents, name, rule)
    met = pl.lit(False)
    if rule.other_than is not None:
        met |= ~_is_one_of(documents, name, rule.other_than)
    if rule.below is not None or rule.above is not None:
        number = _number(documents, name)
        if rule.below is not None:
            met |= (number < rule.below).fill_null(False)
        if rule.above is not None:
            met |= (number > rule.above).fill_null(False)
    return met


def _is_one_of(documents: pl.DataFrame, name: str, values: Sequence[Value]) -> pl.Expr:
    """Whether a row has one of the values; empty text is null, and text is compared by what it says.

    Of a CSV every column is text: "3" and "3.0" are the number 3 there, and "True" is true.
    """
    kind = documents.schema[name]
    is_text = not (kind.is_numeric() or kind == pl.Boolean or kind == pl.Null)
    text = _text(name)
    met = text.is_null() if None in values else pl.lit(False)
    for value in values:
        if value is None:
            continue
        if isinstance(value, bool):
            fits, found = is_text or kind == pl.Boolean, text.str.to_lowercase() == str(value).lower()
        elif isinstance(value, str):
            fits, found = is_text, text == value.strip()
        else:
            fits, found = is_text or kind.is_numeric(), text.cast(pl.Float64, strict=False) == value
        if not fits and kind != pl.Null:
            raise InputError(
                f"documents.exclude.columns.{name}: {value!r} is compared with a column of {kind}; wanted "
                f"{'true, false' if kind == pl.Boolean else 'numbers'} or null"
            )
        met |= found.fill_null(False)
    return met


def _number(documents: pl.DataFrame, name: str) -> pl.Expr:
    """A column as numbers, null where it says nothing.

    Raises:
        InputError: it says something else somewhere; the first such document is named.
    """
    number = _text(name).cast(pl.Float64, strict=False)
    wrong = documents.filter(_text(name).is_not_null() & number.is_null())
    if len(wrong):
        raise InputError(
            f"documents.exclude.columns.{name}: document_id {_shown(wrong['document_id'][0])} has "
            f"{wrong[name][0]!r}, and {len(wrong) - 1:,} others are no numbers either; below and above need "
            "numbers or nothing"
        )
    return number.fill_nan(None)


def _text(name: str) -> pl.Expr:
    """A column's values as text, null where there is none."""
    text = pl.col(name).cast(pl.String).str.strip_chars()
    return pl.when(text != "").then(text)


# --- Making ----------------------------------------------------------------------------------------------


def make(passages: pl.DataFrame, min_readers: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Documents from highlights: a document's most highlighted passages, up to MAX_WORDS words.

    Args:
        passages: events with user_id, document_id, text; rows without text count for nothing.
        min_readers: a document with text from fewer readers is left out.

    Returns:
        The documents, and document_id and readers of those left out, both sorted by document_id.
    """
    given = passages.with_columns(pl.col("text").str.strip_chars()).with_columns(
        text=pl.when(pl.col("text") == "").then(None).otherwise("text")
    )
    readers = given.group_by("document_id").agg(
        readers=pl.col("user_id").filter(pl.col("text").is_not_null()).n_unique()
    )
    left_out = readers.filter(pl.col("readers") < min_readers).sort("document_id")
    kept = readers.filter(pl.col("readers") >= min_readers).select("document_id")
    counted = (
        given.filter(pl.col("text").is_not_null())
        .join(kept, on="document_id", how="semi")
        .group_by("document_id", "text")
        .agg(readers=pl.col("user_id").n_unique(), highlights=pl.len())
        .with_columns(n_words=pl.col("text").str.split(" ").list.len())
        # ties by text: the same whatever the order of the input
        .sort("document_id", "readers", "highlights", "text", descending=[False, True, True, False])
        .with_columns(before=pl.col("n_words").cum_sum().over("document_id") - pl.col("n_words"))
        .filter(pl.col("before") < MAX_WORDS)
    )
    documents = (
        counted.group_by("document_id", maintain_order=True)
        .agg(text=pl.col("text").str.join(" "))
        .with_columns(text=pl.col("text").str.split(" ").list.head(MAX_WORDS).list.join(" "))
        .with_columns(title=first_line("text"))
    )
    return documents.sort("document_id"), left_out


def first_line(column: str) -> pl.Expr:
    """What stands for a title where there is none."""
    line = pl.col(column).str.strip_chars().str.split("\n").list.first()
    short = line.str.slice(0, TITLE_LENGTH)
    return pl.when(line.str.len_chars() > TITLE_LENGTH).then(short + "…").otherwise(short)


# --- Files -----------------------------------------------------------------------------------------------


def _rows(file: BinaryIO, path: str, kind: str) -> pl.DataFrame:
    """The file's rows as they stand, and ROW; blank lines are none."""
    try:
        if kind == "parquet":
            return _parquet_rows(pq.read_table(file), path)
        content = file.read().removeprefix(BYTE_ORDER_MARK)
        if not content.strip():
            raise InputError(f"{path}: empty; wanted documents")
        _check_utf8(content, path, kind)
        return _csv_rows(content, path) if kind == "csv" else _jsonl_rows(content, path)
    except (pl.exceptions.PolarsError, ValueError, EOFError, csv.Error) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: cannot be read as {kind}: {reason}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise InputError(f"{path}: cannot be read as {kind}: {error}") from error


def _parquet_rows(table: pa.Table, path: str) -> pl.DataFrame:
    for number, (name, column) in enumerate(zip(table.column_names, table.columns, strict=True)):
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            kind = pa.large_string() if pa.types.is_large_binary(column.type) else pa.string()
            column = pa.chunked_array([chunk.view(kind) for chunk in column.chunks], kind)
            table = table.set_column(number, name, column)
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            raise InputError(f"{path}: {_first_not_utf8(column)} of column {name!r} is not UTF-8") from None
    rows = pl.from_arrow(table)
    assert isinstance(rows, pl.DataFrame)
    return rows.with_row_index(ROW, offset=1)


def _first_not_utf8(column: pa.ChunkedArray) -> str:
    kind = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
    values = (value.as_py() for chunk in column.chunks for value in chunk.view(kind))
    for number, value in enumerate(values, 1):
        try:
            (value or b"").decode("utf-8")
        except UnicodeDecodeError as error:
            return f"row {number} ({_around(value, error)})"
    return "a row"


def _csv_rows(content: bytes, path: str) -> pl.DataFrame:
    try:
        rows = pl.read_csv(io.BytesIO(content), infer_schema=False)
    except pl.exceptions.PolarsError:
        fault = _csv_fault(content)
        if fault is None:
            raise
        raise InputError(f"{path}: {fault}") from None
    return rows.with_row_index(ROW, offset=2).filter(~pl.all_horizontal(pl.exclude(ROW).is_null()))


def _csv_fault(content: bytes) -> str | None:
    """The first row that is none, and what is wrong with it."""
    n_columns, row = 0, 0
    try:
        for row, fields in enumerate(_csv_records(content), 1):
            n_columns = n_columns or len(fields)
            if len(fields) > n_columns:
                return (
                    f"row {row} has {len(fields)} fields, but the header names {n_columns}; put a text with "
                    "commas in quotes"
                )
    except csv.Error as error:
        return f"row {row + 1} is not CSV: {error}; a quote may be left open there or before"
    return None


def _csv_records(content: bytes, strict: bool = True) -> Iterator[list[str]]:
    limit = csv.field_size_limit(MAX_FIELD)
    try:
        text = io.TextIOWrapper(io.BytesIO(content), "utf-8", newline="")
        yield from csv.reader(text, strict=strict)
    finally:
        csv.field_size_limit(limit)


def _jsonl_rows(content: bytes, path: str) -> pl.DataFrame:
    _check_surrogates(content, path)
    try:
        rows = pl.read_ndjson(io.BytesIO(content), infer_schema_length=None)
    except pl.exceptions.PolarsError:
        fault = next((fault for at, line in _json_lines(content) if (fault := _json_fault(at, line))), None)
        if fault is None:
            raise
        raise InputError(f"{path}: {fault}") from None
    if re.search(rb"(?:\A|\n)[ \t\r]*\n", content):
        numbers = pl.Series(ROW, [number for number, _ in _json_lines(content)], pl.UInt32)
        if len(numbers) == len(rows):
            return rows.with_columns(numbers)
    return rows.with_row_index(ROW, offset=1)


def _json_lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of the lines that are not blank."""
    return ((number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip())


def _json_fault(number: int, line: bytes) -> str | None:
    """What is wrong with a line that should be a JSON object."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return f"row {number} is not JSON: {error.msg} at character {error.pos + 1}; wanted an object a line"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or as many brackets
        return f"row {number} cannot be read: {' '.join(str(error).split())}"
    return None if isinstance(row, dict) else f"row {number} is {line[:40]!r}, wanted an object a line"


def _check_surrogates(content: bytes, path: str) -> None:
    """
    Raises:
        InputError: a text holds half of a character, as cutting one in JavaScript leaves it: polars would
            read another character in its place.
    """
    for match in LONE_SURROGATE.finditer(content):
        start = content.rfind(b"\n", 0, match.start()) + 1
        line = content[start:].partition(b"\n")[0]
        try:
            json.dumps(json.loads(line), ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            row, half = content.count(NEWLINE, 0, start) + 1, match.group()[:6].decode()
            raise InputError(
                f"{path}: row {row} holds half a character (the lone surrogate {half}), wanted Unicode: "
                "correct the text or take the row out"
            ) from None
        except (ValueError, RecursionError):
            continue  # it is said what is wrong with the line when it is read


def _check_utf8(content: bytes, path: str, kind: str) -> None:
    """
    Raises:
        InputError: the row that is not UTF-8, or what the file seems to be.
    """
    offsets = pa.py_buffer(np.array([0, len(content)], np.int64))
    try:  # without a copy of the file, which a decoded text would be
        pa.LargeStringArray.from_buffers(1, offsets, pa.py_buffer(content)).validate(full=True)
        return
    except pa.ArrowInvalid:
        pass
    for start, what in NOT_UTF8.items():
        if content.startswith(start):
            raise InputError(f"{path}: not UTF-8; it seems to be {what}")
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        row = before.count(NEWLINE) + 1
        if kind == "csv":  # a quoted field may hold line ends
            row = sum(1 for _ in _csv_records(before + b"x", strict=False))
        where = f"{path}: row {row} is not UTF-8 ({_around(content, error)})"
        raise InputError(f"{where}: save the file as UTF-8, or correct the row") from None


def _around(content: bytes, error: UnicodeDecodeError) -> str:
    """The bytes that are no UTF-8, and a few before them."""
    return repr(content[max(0, error.start - 20) : error.end].rpartition(NEWLINE)[2])
