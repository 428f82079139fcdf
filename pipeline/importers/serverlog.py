"""Web servers' access logs: combined and common format of Apache and nginx, plain or compressed.

A reader is who logged in, else an address and browser together. An event is a page that was asked for and
sent; errors, forms, parts of pages and bots are skipped, each by its reason. Bots are told by is-bot's list;
a common log names no browser, so none is told there.

The lines are taken apart here and not by apachelogs: that reads one format a file, which must be named to
it, and refuses fields behind it; nginx's default format has one.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone, tzinfo
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

import pyarrow as pa
from is_bot import Bots

from pipeline.errors import InputError
from pipeline.importers.tables import Document, Event, Item, Progress, Reject, Skipped
from pipeline.importers.urls import document_id

MAX_LINE = 1 << 17  # bytes; servers stop at 8 KiB for each of request, referer and agent, escaped fourfold
PROGRESS_EVERY = 10_000  # lines
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}  # by a file's first bytes
NO_HOST = "http://host.invalid"  # stands for the server where a line does not name it

# [VHOST] HOST IDENT USER [TIME] "REQUEST" STATUS BYTES ["REFERER" "AGENT" [whatever else]]
# A VHOST is there when the word behind it is no "-": that would be IDENT, which hardly anyone fills.
LINE = re.compile(
    r'(?:(?P<vhost>\S+) (?!- ))?(?P<host>\S+) \S+ (?P<user>.+?) \[(?P<time>\d[^\[\]]{,40})\] '
    r'"(?P<request>(?:[^"\\]|\\.)*)" (?P<status>\d{3}|-) (?:\d+|-)'
    r'(?: "(?:[^"\\]|\\.)*" "(?P<agent>(?:[^"\\]|\\.)*)"(?: .*)?)?\s*'
)  # fmt: skip
REQUEST = re.compile(r"(?P<method>\S+) (?P<target>.+?)(?: HTTP/[\d.]+)?", re.DOTALL)
TIME = re.compile(r"(\d\d)/([A-Z][a-z]{2})/(\d{4}):(\d\d):(\d\d):(\d\d) ([+-]\d\d)(\d\d)")
MONTHS = {
    "Jan": 1, "Feb": 2, "Mar": 3, "Apr": 4, "May": 5, "Jun": 6,
    "Jul": 7, "Aug": 8, "Sep": 9, "Oct": 10, "Nov": 11, "Dec": 12,
}  # fmt: skip
ESCAPE = re.compile(r'\\(?:x([0-9A-Fa-f]{2})|(["\\bnrtv]))')
CONTROLS = {"b": "\b", "n": "\n", "r": "\r", "t": "\t", "v": "\v", '"': '"', "\\": "\\"}
URL_SAFE = "".join(chr(code) for code in range(0x21, 0x7F))  # what is escaped already stays as it is

# What a page is made of, and what programs read. A .pdf or .txt is a page of its own.
ASSETS = {
    ".atom", ".avi", ".avif", ".bmp", ".css", ".cur", ".eot", ".flac", ".gif", ".ico", ".jpeg", ".jpg", ".js",
    ".json", ".jsonld", ".m3u8", ".m4a", ".m4v", ".map", ".mjs", ".mov", ".mp3", ".mp4", ".ogg", ".ogv",
    ".otf", ".png", ".rdf", ".rss", ".svg", ".swf", ".tif", ".tiff", ".ts", ".ttf", ".wasm", ".wav", ".webm",
    ".webmanifest", ".webp", ".woff", ".woff2", ".xml", ".xsl",
}  # fmt: skip
FOR_PROGRAMS = ("/robots.txt", "/ads.txt", "/app-ads.txt", "/.well-known/")
ENDINGS = re.compile(r"\.(?:aspx?|cgi|html?|jsp|php|shtml|xhtml)$")  # no word of a page's name


def read(path: Path, user_id: str, zone: tzinfo | None) -> Iterator[Item]:
    """A document and an event for each page that was sent, in the order of the log.

    `user_id` and `zone` go unused: a log names its readers, and its times have an offset.

    Raises:
        InputError: the file cannot be decompressed.
    """
    is_bot = lru_cache(maxsize=65_536)(Bots().is_bot)  # 0.1 ms a name, and the same few in every log
    try:
        with _opened(Path(path)) as (file, position):
            seen = 0
            for line, raw in enumerate(_lines(file), start=1):
                if line % PROGRESS_EVERY == 0:
                    yield Progress(position() - seen)
                    seen = position()
                if raw.strip():
                    yield from _items(line, raw, is_bot)
    except OSError as error:
        if error.errno is not None:
            raise  # the disk or the rights, not what the file holds
        raise InputError(f"{path}: cannot be decompressed: {error}; copy it again, whole") from None


def _items(line: int, raw: bytes, is_bot: Callable[[str], bool]) -> Iterator[Item]:
    text = raw.decode("utf-8", "surrogateescape")
    found = LINE.fullmatch(text)
    if found is None:
        yield Reject(line, "not_common_or_combined", text.strip())
        return
    vhost, host, user, time, status = found.group("vhost", "host", "user", "time", "status")
    request, agent = (unescaped(part) if part else part for part in found.group("request", "agent"))
    method, target = _parts(request)
    reason = why_skipped(status, method, target)
    if not reason and agent is not None and is_bot(agent):
        reason = "bot"
    page = None if reason else page_of(vhost, target)
    if page is None:
        yield Skipped(line, reason or "no_web_page")
        return
    timestamp = time_of(time)
    if timestamp is None:
        yield Reject(line, "bad_timestamp", text.strip())
        return
    yield page
    yield Event(reader_of(host, user, agent), page.document_id, timestamp, None)


def why_skipped(status: str, method: str, target: str) -> str:
    """Why a request is none of a reader for a page, or ""."""
    if status not in ("200", "304"):  # 304: sent before, and read again
        return "not_successful"
    if method != "GET":
        return "not_get"
    path = target.partition("?")[0]
    if path.startswith(FOR_PROGRAMS):
        return "for_programs"
    dot = path.rpartition("/")[2].rfind(".")
    ending = path.rpartition("/")[2][dot:].lower() if dot >= 0 else ""
    return "asset" if ending in ASSETS else ""


@lru_cache(maxsize=65_536)  # few pages make most of a log
def page_of(vhost: str | None, target: str) -> Document | None:
    """The document that a request's target is, or None: no address.

    Its id is a URL where the line names the host, as a virtual host or in the target (a proxy's log), else
    the path. No line says what the page is called: its text is the words of its address.

    Args:
        vhost: "example.com" or "example.com:443".
        target: unescaped; bytes that are no UTF-8 are surrogates.
    """
    address = quote(target.encode("utf-8", "surrogateescape"), safe=URL_SAFE)
    if "://" in target.partition("?")[0]:
        url = document_id(address)
    elif not target.startswith("/"):
        return None
    elif vhost in (None, "-"):
        url = document_id(NO_HOST + address)
        page = url and url.removeprefix(NO_HOST)
        return Document(page, _readable(page), _words(page)) if page else None
    else:
        url = document_id(f"{_origin(str(vhost))}{address}")
    return Document(url, _readable(url), _words(url.partition("://")[2]), url) if url else None


def _origin(vhost: str) -> str:
    """http://example.com of example.com:80; a port says which scheme."""
    host, colon, port = vhost.rpartition(":")
    if not colon or not port.isdigit():
        return f"http://{vhost}"
    return f"https://{host}" if port == "443" else f"http://{host}:{port}"


def _readable(address: str) -> str:
    """/caf%C3%A9 -> /café; old pages were named in Windows-1252."""
    raw = unquote_to_bytes(address)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("cp1252", "replace")


def _words(address: str) -> str:
    """/wiki/Sea_birds.html?page=2 -> wiki Sea birds page 2."""
    path, _, query = address.partition("?")
    return " ".join(re.findall(r"[^\W_]+", f"{ENDINGS.sub('', _readable(path))} {_readable(query)}"))


def reader_of(host: str, user: str, agent: str | None) -> str:
    """Who logged in, else `host|agent`: an office or a household shares an address, rarely a browser too."""
    if user not in ("-", '""'):
        return user
    return host if agent is None else f"{host}|{agent}"


@lru_cache(maxsize=4096)  # a busy server writes one second many times
def time_of(text: str) -> datetime | None:
    """10/Oct/2000:13:55:36 -0700, or ISO 8601 with an offset (nginx's $time_iso8601); else None."""
    found = TIME.fullmatch(text)
    try:
        if found is None:
            moment = datetime.fromisoformat(text)
            return moment if moment.tzinfo else None
        day, month, year, hour, minute, second, hours, minutes = found.groups()
        offset = timedelta(hours=int(hours), minutes=int(hours[0] + minutes))
        numbers = (int(year), MONTHS[month], int(day), int(hour), int(minute), int(second))
        return datetime(*numbers, tzinfo=timezone(offset))
    except (ValueError, KeyError):
        return None


def unescaped(text: str) -> str:
    r"""Without the servers' escapes, \" and \x22; bytes that are no UTF-8 become surrogates."""
    if "\\" not in text:
        return text
    return ESCAPE.sub(_character, text).encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")


def _character(escape: re.Match[str]) -> str:
    if escape[2]:
        return CONTROLS[escape[2]]
    return bytes([int(escape[1], 16)]).decode("utf-8", "surrogateescape")


def _parts(request: str) -> tuple[str, str]:
    """(method, target); a target may hold blanks, and HTTP/0.9 names no version."""
    found = REQUEST.fullmatch(request)
    return (found["method"], found["target"]) if found else ("", "")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BufferedReader, Callable[[], int]]]:
    """The decompressed file, and a function that says how many of its bytes on the disk were read."""
    with path.open("rb") as file:
        kind = next((name for magic, name in COMPRESSIONS.items() if file.peek(4).startswith(magic)), None)
        if kind is None:
            yield file, file.tell
            return
        stream = pa.CompressedInputStream(pa.PythonFile(file, "r"), kind)
        yield BufferedReader(stream, 1 << 16), file.tell


def _lines(file: BufferedReader) -> Iterator[bytes]:
    """Lines cut at MAX_LINE bytes, so that a file without line ends does not fill the memory."""
    while line := file.readline(MAX_LINE):
        rest = line
        while len(rest) == MAX_LINE and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE)
        yield line
