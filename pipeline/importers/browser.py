"""Browser history, one person's profile a file: Firefox's places.sqlite, Chromium's History.

A visit is an event where the person saw the page it names: not the stations of a redirect (its end is a
visit of its own), not frames, downloads, reloads (a restored session reloads every tab at once) or pages
that the browser itself hides. Both browsers count microseconds, in UTC.
"""

import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.importers.tables import Document, Event, Item, Reject, Skipped
from pipeline.importers.urls import document_id

PARTS = ("", "-wal", "-journal")  # of one database: what is not yet in the file itself lies beside it
COPIES = 5  # tries at a copy that the browser does not write into

FIREFOX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
CHROMIUM_EPOCH = datetime(1601, 1, 1, tzinfo=UTC)

# Firefox's visit_type: nsINavHistoryService, TRANSITION_*; 5 and 6 are the page that a redirect led to
FIREFOX_SKIPPED = {4: "frame", 8: "frame", 7: "download", 9: "reload"}
FIREFOX_VISITS = """
    SELECT v.id, p.url, p.title, v.visit_date, v.visit_type, p.hidden,
        v.id IN (SELECT from_visit FROM moz_historyvisits WHERE visit_type IN (5, 6)) AS redirects
    FROM moz_historyvisits v LEFT JOIN moz_places p ON p.id = v.place_id
"""

# Chromium's transition: ui/base/page_transition_types.h, a core in the low byte and flags above it
CHROMIUM_CORE = 0xFF
CHROMIUM_CHAIN_END = 0x2000_0000  # the last page of a chain of redirects, or the only one
CHROMIUM_SKIPPED = {3: "frame", 4: "frame", 8: "reload", 10: "keyword_generated"}
CHROMIUM_VISITS = """
    SELECT v.id, u.url, u.title, v.visit_time, v.transition, u.hidden, 0 AS redirects
    FROM visits v LEFT JOIN urls u ON u.id = v.url
"""


@dataclass(frozen=True)
class Browser:
    """What tells one browser's history from another's."""

    name: str
    file: str
    tables: tuple[str, str]
    visits: str
    epoch: datetime


FIREFOX = Browser(
    "firefox", "places.sqlite", ("moz_places", "moz_historyvisits"), FIREFOX_VISITS, FIREFOX_EPOCH
)
CHROMIUM = Browser("chromium", "History", ("urls", "visits"), CHROMIUM_VISITS, CHROMIUM_EPOCH)


def read_firefox(path: Path, user_id: str, zone: tzinfo | None) -> Iterator[Item]:
    """The visits of a places.sqlite (Firefox, and browsers made of it); as `read`."""
    return read(FIREFOX, path, user_id)


def read_chromium(path: Path, user_id: str, zone: tzinfo | None) -> Iterator[Item]:
    """The visits of a History file (Chromium, Chrome, Edge, Brave, Opera, Vivaldi); as `read`."""
    return read(CHROMIUM, path, user_id)


def read(browser: Browser, path: Path, user_id: str) -> Iterator[Item]:
    """A document and an event for each page seen, in the order the browser keeps them.

    The line of an item is the visit's id. The browser may be running: what is read is a copy.

    Raises:
        InputError: no SQLite, another browser's, damaged, or written into all the while.
    """
    path = Path(path)
    with _copy(path) as copy, closing(sqlite3.connect(copy)) as database:
        database.text_factory = lambda raw: raw.decode("utf-8", "replace")
        try:
            _check_tables(database, browser, path)
            for visit in database.execute(browser.visits):
                yield from _items(browser, visit, user_id)
        except sqlite3.Error as error:
            raise InputError(
                f"{path}: cannot be read as SQLite: {error}; wanted {browser.name}'s {browser.file}, "
                "copied whole"
            ) from error


def _items(browser: Browser, visit: tuple[Any, ...], user_id: str) -> Iterator[Item]:
    number, url, title, moment, kind, hidden, redirects = visit
    if not isinstance(url, str):
        yield Reject(number, "no_page", f"visit {number} is of no page that the history knows")
        return
    timestamp = _time(browser.epoch, moment)
    if timestamp is None:
        yield Reject(number, "bad_timestamp", f"{moment!r} {url}")
        return
    reason = "redirect" if redirects else why_skipped(browser, kind or 0)
    page = document_id(url)
    if reason or hidden or page is None:
        yield Skipped(number, reason or ("hidden" if hidden else "no_web_page"))
        return
    yield Document(page, title or page, title or page, page)
    yield Event(user_id, page, timestamp, None)


def why_skipped(browser: Browser, kind: int) -> str:
    """Why a visit of this visit_type or transition is none that a person made, or ""."""
    if browser is FIREFOX:
        return FIREFOX_SKIPPED.get(kind, "")
    return CHROMIUM_SKIPPED.get(kind & CHROMIUM_CORE, "" if kind & CHROMIUM_CHAIN_END else "redirect")


def _time(epoch: datetime, microseconds: object) -> datetime | None:
    """None for what is no time after 1970; browsers write 0 where they know none."""
    if not isinstance(microseconds, int):
        return None
    try:
        moment = epoch + timedelta(microseconds=microseconds)
    except OverflowError:
        return None
    return moment if moment > FIREFOX_EPOCH else None


def _check_tables(database: sqlite3.Connection, browser: Browser, path: Path) -> None:
    found = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if set(browser.tables) <= found:
        return
    other = next((b for b in (FIREFOX, CHROMIUM) if set(b.tables) <= found), None)
    advice = f"it is {other.name}'s: import it as {other.name}" if other else f"give {browser.file} itself"
    raise InputError(
        f"{path}: has the tables {', '.join(sorted(found)) or 'none'}; wanted {' and '.join(browser.tables)} "
        f"of {browser.name}'s {browser.file}; {advice}"
    )


@contextmanager
def _copy(path: Path) -> Iterator[Path]:
    """A copy of the database and of what belongs to it; the person's own is never opened.

    A running browser holds its lock all day, and to open a database that was left in the middle of a
    write is to write into it.
    """
    with tempfile.TemporaryDirectory(prefix="history-") as folder:
        copy = Path(folder) / "history.sqlite"
        for _ in range(COPIES):
            before = _state(path)
            for part in PARTS:
                _copy_part(Path(f"{path}{part}"), Path(f"{copy}{part}"), needed=not part)
            if _state(path) == before:
                break
        else:
            raise InputError(f"{path}: is being written into all the time; close the browser and try again")
        yield copy


def _copy_part(source: Path, target: Path, needed: bool) -> None:
    try:
        shutil.copyfile(source, target)
    except FileNotFoundError:
        target.unlink(missing_ok=True)
        if needed:
            raise


def _state(path: Path) -> list[tuple[int, int] | None]:
    """Size and time of each part, which a write changes."""
    states: list[tuple[int, int] | None] = []
    for part in PARTS:
        try:
            stat = Path(f"{path}{part}").stat()
            states.append((stat.st_size, stat.st_mtime_ns))
        except FileNotFoundError:
            states.append(None)
    return states
