"""Kindle's "My Clippings.txt" -> highlights, in every language whose records are documented.

A record is a line of title and author; a line of kind, page, location and time; an empty line; the words;
ten equals signs. Its language is the device's at that moment, so that one file may hold several. A change
appends: the Kindle never takes the shorter highlight out when a longer one replaces it.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from pathlib import Path

from pipeline.errors import InputError
from pipeline.importers.tables import Document, Event, Item, Reject, Skipped

SEPARATOR = "=========="
HEAD = 1 << 20  # bytes within which the first record must have ended

# A word of the label says what the record is; none occurs in another kind's label. Underline, circle and
# asterisk mark a passage too (firmware 5.19); an article clipped whole is no passage.
KINDS = {
    "highlight": (
        "highlight", "underline", "circle", "asterisk",  # English; Dutch says highlight too
        "markierung", "markering", "surlignement", "subrayado", "evidenziazione", "destaque", "выделенный",
        "ハイライト", "标注",
    ),
    "note": ("note", "notiz", "notitie", "nota", "заметка", "メモ", "笔记"),
    "bookmark": (
        "bookmark", "lesezeichen", "bladwijzer", "signet", "marcador", "segnalibro", "закладка",
        "ブックマーク", "书签",
    ),
    "article_clipping": (
        "clip this article", "artikel", "extrait", "artículo", "articolo", "artigo", "вырезка",
        "記事クリップ", "文章剪切",
    ),
}  # fmt: skip

# January to December. Every firmware also writes English dates inside labels of other languages.
MONTH_NAMES = (
    "january february march april may june july august september october november december",
    "januar februar märz april mai juni juli august september oktober november dezember",
    "janvier février mars avril mai juin juillet août septembre octobre novembre décembre",
    "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
    "gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre novembre dicembre",
    "janeiro fevereiro março abril maio junho julho agosto setembro outubro novembro dezembro",
    "januari februari maart april mei juni juli augustus september oktober november december",
    "января февраля марта апреля мая июня июля августа сентября октября ноября декабря",
)
MONTHS = {name: month for names in MONTH_NAMES for month, name in enumerate(names.split(), 1)}

_MONTH = rf"(?P<month>{'|'.join(sorted(MONTHS, key=len, reverse=True))})\b"
DATES = (
    re.compile(rf"\b(?P<day>\d\d?)(?:\.|er|o)?\s+(?:de\s+)?{_MONTH},?\s+(?:de\s+)?(?P<year>\d{{4}}|\d\d)\b"),
    re.compile(rf"\b{_MONTH}\s+(?P<day>\d\d?),?\s+(?P<year>\d{{4}})\b"),  # English as in the United States
    re.compile(r"(?P<year>\d{4})\s*年\s*(?P<month>\d\d?)\s*月\s*(?P<day>\d\d?)\s*日"),
)
TIME = re.compile(
    r"(?P<hour>\d\d?)\s*[:.h時时]\s*(?P<minute>\d\d)(?!\d)(?:\s*(?:[:.分]|min)\s*(?P<second>\d\d))?"
)
HALF = re.compile(r"(?P<am>(?<![a-z])a\.?\s?m\b|上午|午前)|(?P<pm>(?<![a-z])p\.?\s?m\b|下午|午後)")
OFFSET = re.compile(r"gmt(?P<sign>[+-])(?P<hours>\d\d?):?(?P<minutes>\d\d)|gmt|greenwich mean time")
YEARS = range(2007, 2100)  # the first Kindle came in 2007: an older date is a clock that was reset

RANGE = re.compile(r"(\d{1,9})(?:\s*(?:-|–|t/m)\s*(\d{1,9}))?")
MAX_LENGTH = 1_000  # locations of about 150 bytes in one highlight; more is a damaged line
BLOCK = 100  # locations looked through together for the highlight that another one replaces

# What stands for the words, or ends them, once the publisher's limit is reached
LIMIT = re.compile(r"\s*<[^<>]*(?:limit|límit|limiet|лимит|предел|上限|限制)[^<>]*>\s*$", re.IGNORECASE)
EDITION = re.compile(
    r"\s*\((?:english|german|french|spanish|italian|portuguese|dutch|russian|japanese|chinese|kindle)"
    r" edition\)$"
)


@dataclass(frozen=True)
class Highlight:
    line: int
    title: str
    author: str
    place: tuple[int, int] | str  # first and last location (or page), or a label without numbers
    stamp: str
    text: str


def read(path: Path, user_id: str, zone: tzinfo | None) -> Iterator[Item]:
    """Yield the highlights of one "My Clippings.txt", each with its book.

    A highlight whose words contain, or stand in, those of a later one at an overlapping place was edited:
    the last one counts. The same words at the same place again are a repetition: the first counts. Both
    need the whole file in memory, a few megabytes after years of reading.

    Args:
        zone: what the device's clock showed, for it writes none (Kindles of the first generations did, as
            GMT+02:00). A time that a change of clocks makes twice is the earlier one; one that it leaves out
            is read with the offset before the change.

    Raises:
        InputError: the file is empty, or holds no record.
    """
    _check(path)
    parsed = list(_records(path))
    reasons = _replaced([item for item in parsed if isinstance(item, Highlight)])
    described = set()
    for item in parsed:
        if not isinstance(item, Highlight):
            yield item
            continue
        event = _event(item, user_id, zone) if item.line not in reasons else None
        if event is None:
            yield Skipped(item.line, reasons[item.line])
            continue
        if isinstance(event, Event) and event.document_id not in described:
            described.add(event.document_id)
            yield book(item.title, item.author)
        yield event


def book(title: str, author: str) -> Document:
    """A book as its document: by title and author, so that Kindle's readers and Readwise's meet.

    The id is made of the title (but for the shop's "(English Edition)") and the author's words in
    alphabetical order, because shops write "Tidewell, Vera" where other files have "Vera Tidewell".
    """
    key = EDITION.sub("", _folded(title))
    words = sorted(set(re.findall(r"\w+", _folded(author))) - {"and"})
    identity = f"book:{key}|{' '.join(words)}" if words else f"book:{key}"
    return Document(identity, title, f"{title} - {author}" if author else title)


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _check(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(HEAD)
    if SEPARATOR.encode() not in head:
        first = head[:200].decode("utf-8", "replace").strip("\ufeff \r\n").splitlines()[:1]
        got = f"it begins with {first[0][:60]!r}" if first else "it is empty"
        raise InputError(
            f'{path}: {got} and no line is ten equals signs; wanted "My Clippings.txt" as UTF-8, from the '
            "folder documents of a Kindle"
        )


def _records(path: Path) -> Iterator[Highlight | Reject | Skipped]:
    n_labels = 0
    for number, lines in _pieces(path):
        item = _record(number, lines)
        n_labels += not isinstance(item, Reject) or item.reason != "not_a_clipping"
        yield item
    if not n_labels:
        raise InputError(
            f'{path}: none of its records has a line like "- Your Highlight on page 1 | Added on ..."; '
            'wanted "My Clippings.txt", from the folder documents of a Kindle'
        )


def _pieces(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Each record's first line number, 1-based, and its lines, without empty ones before the title."""
    start = 0
    lines: list[str] = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            # every record that the session which made the file appended has its own byte order mark
            line = raw.decode("utf-8", "surrogateescape").rstrip("\r\n").replace("\ufeff", "")
            if line == SEPARATOR:
                if lines:
                    yield start, lines
                lines = []
            elif lines or line.strip():
                start = start if lines else number
                lines.append(line)
    if lines:
        yield start, lines  # the device was unplugged before it wrote the separator


def _record(number: int, lines: list[str]) -> Highlight | Reject | Skipped:
    label_line = lines[1].strip() if len(lines) > 1 else ""
    if not label_line.startswith(("-", "–")) or "|" not in label_line:  # Russian opens with a dash
        return Reject(number, "not_a_clipping", " / ".join(lines[:2]))
    label, _, stamp = label_line[1:].rpartition("|")
    kind = _kind(label)
    if kind is None:
        return Reject(number, "unknown_kind", label_line)
    if kind != "highlight":
        return Skipped(number, kind)
    text = "\n".join(lines[2:]).strip()
    words = LIMIT.sub("", text).strip()
    if not words:
        return Skipped(number, "clipping_limit" if text else "empty_highlight")
    if not _is_utf_8(lines[0] + words):
        return Reject(number, "not_utf_8", label_line)
    title, author = _title_and_author(lines[0])
    return Highlight(number, title, author, _place(label), stamp.strip(), words)


def _is_utf_8(text: str) -> bool:
    return not any("\udc80" <= letter <= "\udcff" for letter in text)  # surrogateescape's marks


def _kind(label: str) -> str | None:
    folded = _folded(label)
    return next((kind for kind, words in KINDS.items() if any(word in folded for word in words)), None)


def _title_and_author(line: str) -> tuple[str, str]:
    """Split "Title (Series) (Author)": the last bracket, with what it nests, is the author's.

    A line that ends in two spaces has none, for the pattern writes one before the author's bracket.
    """
    whole = " ".join(line.split())
    if line.endswith("  ") or not whole.endswith(")"):
        return whole, ""
    depth = 0
    for at in range(len(whole) - 1, 0, -1):
        depth += {")": 1, "(": -1}.get(whole[at], 0)
        if depth == 0:
            return (whole[:at].strip(), whole[at + 1 : -1].strip()) if whole[at - 1] == " " else (whole, "")
    return whole, ""


def _place(label: str) -> tuple[int, int] | str:
    """The last range of the label, which is the location where there is one, else the page."""
    ranges = RANGE.findall(label)
    if not ranges:
        return _folded(label)  # a page in Roman numerals
    first, last = ranges[-1]
    if len(last) < len(first):
        last = first[: len(first) - len(last)] + last  # older firmware: 1024-25 ends at 1025
    start, end = int(first), int(last)
    return (start, end) if 0 <= end - start <= MAX_LENGTH else _folded(label)


def _replaced(highlights: list[Highlight]) -> dict[int, str]:
    """Line of each highlight that is no event of its own -> "edited" or "repeated"."""
    reasons: dict[int, str] = {}
    kept: defaultdict[tuple[str, int | str], list[Highlight]] = defaultdict(list)
    for new in highlights:
        keys = [(book(new.title, new.author).document_id, block) for block in _blocks(new.place)]
        for old in [old for key in keys for old in kept[key] if _overlap(old.place, new.place)]:
            if old.line in reasons:
                continue
            if old.text == new.text:
                reasons[new.line] = "repeated"
                break
            if old.text in new.text or new.text in old.text:
                reasons[old.line] = "edited"
        if new.line not in reasons:
            for key in keys:
                kept[key].append(new)
    return reasons


def _blocks(place: tuple[int, int] | str) -> list[int] | list[str]:
    return [place] if isinstance(place, str) else list(range(place[0] // BLOCK, place[1] // BLOCK + 1))


def _overlap(one: tuple[int, int] | str, other: tuple[int, int] | str) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return one[0] <= other[1] and other[0] <= one[1]


def _event(highlight: Highlight, user_id: str, zone: tzinfo | None) -> Event | Reject:
    try:
        when = moment(highlight.stamp)
    except ValueError:
        return Reject(highlight.line, "bad_timestamp", highlight.stamp)
    if when.tzinfo is None and zone is None:
        return Reject(highlight.line, "timestamp_without_zone", highlight.stamp)
    when = (when if when.tzinfo else when.replace(tzinfo=zone)).astimezone(UTC)
    return Event(user_id, book(highlight.title, highlight.author).document_id, when, highlight.text)


def moment(stamp: str) -> datetime:
    """The time in "Added on Sunday, 5 September 2021 16:39:07", in any of the languages.

    Returns:
        With a zone where one is written (GMT+02:00), else without.

    Raises:
        ValueError: no date or no time of day that is known, or one that cannot be.
    """
    folded = _folded(stamp)  # NFKC: also narrow spaces before PM, and full-width colons
    date = next((found for pattern in DATES if (found := pattern.search(folded))), None)
    rest = folded[date.end() :] if date else ""
    time = TIME.search(rest)
    if not date or not time:
        raise ValueError(f"no date and time in {stamp!r}")
    month = MONTHS.get(date["month"]) or int(date["month"])
    year = int(date["year"]) + (2000 if len(date["year"]) == 2 else 0)
    if year not in YEARS:
        raise ValueError(f"the year {year}")
    hour = _hour(int(time["hour"]), HALF.search(rest))
    second = int(time["second"] or 0)
    return datetime(year, month, int(date["day"]), hour, int(time["minute"]), second, tzinfo=_offset(rest))


def _hour(hour: int, half: re.Match[str] | None) -> int:
    if half is None or hour > 12:  # 下午18:10 is 18:10
        return hour
    return hour % 12 + (12 if half["pm"] else 0)


def _offset(text: str) -> tzinfo | None:
    found = OFFSET.search(text)
    if not found or not found["sign"]:
        return UTC if found else None
    size = timedelta(hours=int(found["hours"]), minutes=int(found["minutes"]))
    return timezone(size if found["sign"] == "+" else -size)
