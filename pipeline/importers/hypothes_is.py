"""Hypothes.is annotations as JSON -> highlights by the account that made each.

Four forms: pages of the search API ({"total": ..., "rows": [...]}), the client's export ({"export_date":
..., "annotations": [...]}), a bare list, and one annotation after another (JSON Lines). They are read as a
stream: one annotation is in memory at a time, however large the file.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any, BinaryIO

import ijson

from pipeline.errors import InputError
from pipeline.importers import urls
from pipeline.importers.tables import Document, Event, Item, Reject, Skipped

WANTED = (
    'annotations of Hypothes.is as JSON: the client\'s export, or pages of its search API ({"rows": [...]})'
)
LISTS = ("rows", "annotations")  # where an object that is no annotation itself holds them
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read(path: Path, user_id: str, zone: tzinfo | None) -> Iterator[Item]:
    """Yield each annotation of a passage as its document and an event, at the time it was made.

    Skipped: replies, notes on a whole page, and pages that no other reader can open (a file of one's own).
    A PDF without an address has the id that Hypothes.is makes of its content, urn:x-pdf:..., for all readers.

    Args:
        user_id: not used: every annotation names its account (acct:name@hypothes.is -> name@hypothes.is).
        zone: of times that are written without one; those of Hypothes.is have one.

    Raises:
        InputError: no such JSON, or broken JSON on the way.
    """
    if not path.stat().st_size:
        raise InputError(f"{path}: the file is empty; wanted {WANTED}")
    number = 0
    try:
        for number, annotation in enumerate(_annotations(path), 1):
            if number == 1:
                _check(path, annotation)
            yield from _items(number, annotation, zone)
    except (ijson.JSONError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: broken JSON after {number} annotations ({_one_line(error)}); wanted {WANTED}"
        ) from None


def _annotations(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        prefix = _prefix(_without_mark(file))
        # several values: JSON Lines, or pages of the API one after another
        yield from ijson.items(_without_mark(file), prefix, multiple_values=True)


def _without_mark(file: BinaryIO) -> BinaryIO:
    file.seek(0)
    file.seek(3 if file.read(3) == BYTE_ORDER_MARK else 0)
    return file


def _prefix(file: BinaryIO) -> str:
    """Where in the JSON the annotations are, in ijson's words; read as far as it takes to know."""
    for place, kind, value in ijson.parse(file, multiple_values=True):
        if place == "" and kind == "start_array":
            return "item"
        if place == "" and kind == "map_key" and value in LISTS:
            return f"{value}.item"
        if place == "" and kind not in ("start_map", "map_key"):
            break  # the first object has ended
    return ""


def _check(path: Path, annotation: Any) -> None:
    if isinstance(annotation, dict) and {"uri", "target", "user"} & annotation.keys():
        return
    got = repr(annotation)[:60]
    if isinstance(annotation, dict):
        got = f"an object with the keys {', '.join(list(annotation)[:6]) or '(none)'}"
    raise InputError(f"{path}: its first value is no annotation, got {got}; wanted {WANTED}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:100]


def _items(
    number: int, annotation: Any, zone: tzinfo | None
) -> Iterator[Document | Event | Reject | Skipped]:
    if not isinstance(annotation, dict):
        yield Reject(number, "not_an_annotation", repr(annotation))
        return
    if annotation.get("references"):
        yield Skipped(number, "reply")
        return
    quote = _quote(annotation.get("target"))
    if not quote:
        yield Skipped(number, "page_note")
        return
    try:
        user, uri, when = _user(annotation), _text(annotation, "uri"), _time(annotation, zone)
    except _UnusableError as error:
        yield Reject(number, error.reason, error.detail)
        return
    identity = uri if uri.startswith("urn:x-pdf:") else urls.document_id(uri)
    if identity is None:
        yield Skipped(number, "no_web_page")
        return
    title = _title(annotation.get("document")) or identity
    yield Document(identity, title, title, None if identity.startswith("urn:") else identity)
    yield Event(user, identity, when, quote)


class _UnusableError(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def _text(annotation: dict[str, Any], key: str) -> str:
    value = annotation.get(key)
    if not isinstance(value, str) or not value.strip():
        raise _UnusableError(f"no_{key}", f"{key} is {value!r} in annotation {annotation.get('id')!r}")
    return value.strip()


def _user(annotation: dict[str, Any]) -> str:
    account = _text(annotation, "user").removeprefix("acct:")
    if not account:
        raise _UnusableError("no_user", f"user is 'acct:' in annotation {annotation.get('id')!r}")
    return account


def _time(annotation: dict[str, Any], zone: tzinfo | None) -> datetime:
    written = _text(annotation, "created" if annotation.get("created") else "updated")
    try:
        when = datetime.fromisoformat(written)
        if when.tzinfo is None and zone is None:
            raise _UnusableError("timestamp_without_zone", written)
        return (when if when.tzinfo else when.replace(tzinfo=zone)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise _UnusableError("bad_timestamp", written) from None


def _quote(target: Any) -> str:
    """The passage of the first target that quotes one."""
    for part in target if isinstance(target, list) else []:
        selectors = part.get("selector") if isinstance(part, dict) else None
        for selector in selectors if isinstance(selectors, list) else []:
            if isinstance(selector, dict) and selector.get("type") == "TextQuoteSelector":
                exact = selector.get("exact")
                if isinstance(exact, str) and exact.strip():
                    return exact.strip()
    return ""


def _title(document: Any) -> str:
    """The page's title: a list of them in the API, a text in older exports."""
    titles = document.get("title") if isinstance(document, dict) else None
    first = titles[0] if isinstance(titles, list) and titles else titles
    return " ".join(first.split()) if isinstance(first, str) else ""
