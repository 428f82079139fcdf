"""Readwise's CSV export -> highlights and the books, articles and podcasts they are of.

Columns of today's export: Highlight, Book Title, Book Author, Amazon Book ID, Note, Color, Tags, Location
Type, Location, Highlighted at, Document tags. Older ones lack some; three are needed, in any order.
"""

import csv
import re
from collections.abc import Collection, Iterable, Iterator
from datetime import UTC, datetime, tzinfo
from pathlib import Path

from pipeline.errors import InputError
from pipeline.importers.kindle import book
from pipeline.importers.tables import Event, Item, Reject, Skipped

NEEDED = ("highlight", "book title", "highlighted at")
MAX_FIELD = 16 << 20  # characters; Python's own limit, 131,072, is less than a long article highlighted whole

HEADING = re.compile(
    r"\.?h[1-6]"
)  # a note or tag by which Readwise takes the highlight for a chapter's title
IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)")
DATE_ALONE = re.compile(r"\d{4}-\d\d-\d\d")


def read(path: Path, user_id: str, zone: tzinfo | None) -> Iterator[Item]:
    """Yield the highlights of one export in its order, each book before its first one.

    Skipped: notes without a highlight, chapter headings (.h1), images, and rows without a time of day,
    for a session cannot be made of those: highlights that were typed in often have none.

    Args:
        zone: of the times that are written without one, as in older exports.

    Raises:
        InputError: no CSV in UTF-8, a column is missing, or a quoted field never ends.
    """
    described = set()
    with path.open(encoding="utf-8-sig", newline="") as file:
        for line, row in rows(path, file, NEEDED, "Readwise's CSV export (Export, then CSV)"):
            if isinstance(row, Reject):
                yield row
                continue
            item = _item(line, row, user_id, zone)
            if isinstance(item, Event) and item.document_id not in described:
                described.add(item.document_id)
                yield book(*_book_of(row))
            yield item


def rows(
    name: Path | str, lines: Iterable[str], needed: Collection[str], wanted: str
) -> Iterator[tuple[int, dict[str, str] | Reject]]:
    """The rows of a CSV file, by column name.

    Args:
        name: what to call the file in errors.
        lines: with their ends, for a quoted field may hold some.
        needed: columns, in lower case, that must be there.
        wanted: what to say that the file should have been.

    Yields:
        The row's first line, 1-based, and its values, stripped, by column name in lower case; a Reject for a
        row with more values than there are columns.

    Raises:
        InputError: not UTF-8, a column is missing, or a quoted field never ends.
    """
    csv.field_size_limit(MAX_FIELD)
    reader = csv.reader(lines, strict=True)  # strict: a quote that never closes is an error, not one huge row
    try:
        columns = [column.strip().lower() for column in next(reader, [])]
        _check_columns(name, columns, needed, wanted)
        line = reader.line_num + 1
        for values in reader:
            if len(values) > len(columns):
                yield line, Reject(line, "too_many_values", ",".join(values))
            elif values:
                yield (
                    line,
                    dict.fromkeys(columns, "") | dict(zip(columns, map(str.strip, values), strict=False)),
                )
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{name}:{reader.line_num}: {error}; export the file anew, or mend this line"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}: not UTF-8 ({error.reason}); wanted {wanted}, as it was downloaded: a "
            "spreadsheet may have saved it otherwise"
        ) from None


def _check_columns(name: Path | str, columns: list[str], needed: Collection[str], wanted: str) -> None:
    missing = [column for column in needed if column not in columns]
    if missing:
        got = ", ".join(column[:40] for column in columns[:12]) or "nothing"
        raise InputError(f"{name}: no column {missing[0]!r} in its first line, got {got}; wanted {wanted}")


def _item(line: int, row: dict[str, str], user_id: str, zone: tzinfo | None) -> Event | Reject | Skipped:
    text, at = row["highlight"], row["highlighted at"]
    title, _ = _book_of(row)
    reason = _why_not(text, row.get("note", ""), row.get("tags", ""), at)
    if reason:
        return Skipped(line, reason)
    if not title:
        return Reject(line, "no_title", text)
    try:
        when = datetime.fromisoformat(at)
        if when.tzinfo is None and zone is None:
            return Reject(line, "timestamp_without_zone", at)
        when = (when if when.tzinfo else when.replace(tzinfo=zone)).astimezone(UTC)
    except (ValueError, OverflowError):
        return Reject(line, "bad_timestamp", at)
    return Event(user_id, book(*_book_of(row)).document_id, when, text)


def _why_not(text: str, note: str, tags: str, at: str) -> str | None:
    """Why a row is by design no event, else None."""
    if not text:
        return "note_only" if note else "empty_row"
    if any(HEADING.fullmatch(word) for word in note.lower().split() if word.startswith(".")) or any(
        HEADING.fullmatch(tag.strip()) for tag in tags.lower().split(",")
    ):
        return "heading"
    if IMAGE.fullmatch(text):
        return "image"
    if not at:
        return "no_time"
    return "date_without_time" if DATE_ALONE.fullmatch(at) else None


def _book_of(row: dict[str, str]) -> tuple[str, str]:
    return " ".join(row["book title"].split()), " ".join(row.get("book author", "").split())
