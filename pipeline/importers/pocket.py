"""Pocket's exports -> saved links, and the passages highlighted in them.

Until 2024 a page, ril_export.html; then a zip of part_000000.csv (10,000 links each) and
annotations/part_000000.json (highlights). The zip is best given as it came: it is one reader's.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime, tzinfo
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, TextIO

from pipeline.errors import InputError
from pipeline.importers.readwise import rows
from pipeline.importers.tables import Document, Event, Item, Reject, Skipped
from pipeline.importers.urls import document_id

WANTED = "Pocket's export: ril_export.html, part_000000.csv, annotations/part_000000.json or the zip of them"
NEEDED = ("url", "time_added")
HEAD = 4_096  # bytes within which a page says that it is Pocket's
CHUNK = 1 << 16
BREAKS = ("a", "li", "ul", "h1")  # where a link's title ends


def read(path: Path, user_id: str, zone: tzinfo | None) -> Iterator[Item]:
    """Yield each saved link and each highlight as its document and an event.

    Skipped: what is no web page, and links from before Pocket kept the time (time_added 0).

    Args:
        zone: not needed: every time is in seconds since 1970.

    Raises:
        InputError: the file is none of Pocket's exports, or is damaged.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            yield from _read(file, str(path), user_id)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in sorted(archive.namelist()) if _is_part(name)]
            if not names:
                raise InputError(f"{path}: the zip holds no part_*.csv and no annotations; wanted {WANTED}")
            for name in names:
                with archive.open(name) as member:
                    for item in _read(member, f"{path}, {name}", user_id):
                        yield _placed(item, name)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InputError(f"{path}: the zip is damaged ({error}); download it again") from None


def _is_part(name: str) -> bool:
    folders, _, last = name.rpartition("/")
    if last.startswith("."):
        return False  # what macOS adds beside each file when it packs one anew
    is_highlights = folders.endswith("annotations") and last.endswith(".json")
    return is_highlights or last.endswith((".csv", ".html"))


def _placed(item: Item, member: str) -> Item:
    return item._replace(detail=f"{member}: {item.detail}") if isinstance(item, Reject) else item


def _read(file: IO[bytes], name: str, user_id: str) -> Iterator[Item]:
    head = file.read(HEAD).decode("utf-8-sig", "replace").lstrip()
    file.seek(0)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        if head.startswith("<"):
            _check_page(head, name)
            yield from _links(_anchors(text), user_id)
        elif head.startswith("["):
            yield from _highlights(text, name, user_id)
        else:
            yield from _links(_table(text, name), user_id)
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 ({error.reason}); wanted {WANTED}") from None


Link = tuple[int, str, str, str]  # line, URL, title, time_added


def _links(links: Iterator[Link | Reject], user_id: str) -> Iterator[Item]:
    for link in links:
        if isinstance(link, Reject):
            yield link
        else:
            line, url, title, added = link
            yield from _saved(line, url, title, added, None, user_id)


def _saved(
    line: int, url: str, title: str, added: str | int, text: str | None, user_id: str
) -> Iterator[Document | Event | Reject | Skipped]:
    identity = document_id(url)
    if identity is None:
        yield Skipped(line, "no_web_page") if url else Reject(line, "no_url", title)
        return
    try:
        seconds = int(added)
        when = datetime.fromtimestamp(seconds, UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        yield Reject(line, "bad_timestamp", f"{added} {url}")
        return
    if seconds <= 0:
        yield Skipped(line, "no_time")
        return
    title = " ".join(title.split())
    title = title if title and title != url else identity  # Pocket puts the URL where it knows no title
    yield Document(identity, title, title, identity)
    yield Event(user_id, identity, when, text)


def _check_page(head: str, name: str) -> None:
    if "<title>pocket export" not in head.lower() and "time_added=" not in head:
        raise InputError(f"{name}: a page, but it says neither Pocket Export nor time_added; wanted {WANTED}")


class _Anchors(HTMLParser):
    """Collects the links of what was fed."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[Link] = []
        self._open: Link | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BREAKS:
            self.handle_endtag(tag)  # of a link that was never closed
        if tag == "a":
            known = dict(attrs)
            self._open = (self.getpos()[0], known.get("href") or "", "", known.get("time_added") or "")

    def handle_data(self, data: str) -> None:
        if self._open:
            line, url, title, added = self._open
            self._open = (line, url, title + data, added)

    def handle_endtag(self, tag: str) -> None:
        if tag in BREAKS and self._open:
            self.found.append(self._open)
            self._open = None


def _anchors(file: TextIO) -> Iterator[Link]:
    parser = _Anchors()
    while chunk := file.read(CHUNK):
        parser.feed(chunk)
        yield from parser.found
        parser.found.clear()
    parser.close()
    parser.handle_endtag("a")
    yield from parser.found


def _table(file: TextIO, name: str) -> Iterator[Link | Reject]:
    for line, row in rows(name, file, NEEDED, WANTED):
        yield row if isinstance(row, Reject) else (line, row["url"], row.get("title", ""), row["time_added"])


def _highlights(file: TextIO, name: str, user_id: str) -> Iterator[Item]:
    """The passages of annotations/part_000000.json; `line` is the place of the link in its list.

    Read whole: a part holds the highlights of 10,000 links at most.
    """
    try:
        links = json.load(file)
    except ValueError as error:
        raise InputError(f"{name}: no whole JSON ({error}); export the file anew") from None
    for place, link in enumerate(links, 1):
        passages = link.get("highlights") if isinstance(link, dict) else None
        if not isinstance(passages, list):
            yield Reject(place, "not_a_link_with_highlights", json.dumps(link, ensure_ascii=False))
            continue
        url, title = str(link.get("url") or ""), str(link.get("title") or "")
        for passage in passages:
            quote = passage.get("quote") if isinstance(passage, dict) else None
            if isinstance(quote, str) and quote.strip():
                yield from _saved(place, url, title, passage.get("created_at") or 0, quote.strip(), user_id)
            else:
                yield Reject(place, "no_quote", json.dumps(passage, ensure_ascii=False))
