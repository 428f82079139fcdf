"""Wikispeedia's click paths, in the files that SNAP publishes -> events.parquet, documents.parquet.

Real readers who move from article to article towards a target: https://snap.stanford.edu/data/wikispeedia.html.
The publisher records the end of a game and its length, so the times inside a game are a guess: its clicks
are spread evenly over it, the first at its start. The length of a game that ended by "timeout" includes the
half hour without a click that ended it, which is taken off first. A back click "<" is a visit of the article
gone back to.
"""

import gzip
import zlib
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.importers.tables import Event, Tables, writing

PATHS = ("paths_finished.tsv", "paths_unfinished.tsv")
N_FIELDS = {"paths_finished.tsv": 5, "paths_unfinished.tsv": 6, "articles.tsv": 1, "categories.tsv": 2}
IDLE = 1800  # seconds without a click after which the publisher ended a game
MAX_SECONDS = 253_402_300_800  # the year 10000, where datetime ends
DOCUMENTS = pa.schema({"document_id": pa.string(), "title": pa.string(), "categories": pa.string()})


def read(folder: Path, out: Path, max_rejected_share: float = 0.01) -> dict[str, int]:
    """Write `out/events.parquet`, `out/documents.parquet` and `out/rejects.parquet`, all or none.

    Args:
        folder: holds articles.tsv, categories.tsv, and paths_finished.tsv or paths_unfinished.tsv or
            both; each may be compressed (.gz).

    events.parquet:    user_id str (hashed address), document_id str (the article's name as published),
                       timestamp timestamp[us, UTC], text null; by user and time.
    documents.parquet: document_id, title str (decoded), categories str ("A > B; C"): all listed articles,
                       read or not, for an index must also find what nobody has opened yet.
    rejects.parquet:   file str, line int64, reason str, detail str: every line that could not be used.

    Returns:
        events, readers, games, articles_read, documents, rejects (counts).

    Raises:
        InputError: a file is missing or damaged, or more than `max_rejected_share` of the lines is bad.
    """
    folder, out = Path(folder), Path(out)
    paths = [path for name in PATHS if (path := _find(folder, name))]
    if not paths:
        raise InputError(f"{folder} has neither {PATHS[0]} nor {PATHS[1]} (or .gz); download one of them")
    with writing(out, documents=DOCUMENTS) as tables:
        games = [game for path in paths for game in _games(path, tables)]
        clicks = sorted(click for game in games for click in game)
        articles = {article for _, _, article in clicks}
        for document in _documents(folder, articles, tables):
            tables.document(document)
        tables.check(max_rejected_share)
        for user, second, article in clicks:
            tables.event(Event(user, article, datetime.fromtimestamp(second, UTC), None))
    return {
        "events": tables.counts.events,
        "readers": tables.counts.readers,
        "games": len(games),
        "articles_read": len(articles),
        "documents": tables.counts.documents,
        "rejects": tables.counts.rejects.total(),
    }


def _games(path: Path, tables: Tables) -> Iterator[list[tuple[str, int, str]]]:
    """The clicks (user_id, epoch second, article) of each game."""
    for line, fields in _lines(path, tables):
        user, end, duration, steps = fields[:4]
        try:
            visits = visited(steps)
            times = spread(*played(_whole(end), _whole(duration), fields[-1]), len(visits))
        except ValueError as error:
            tables.reject(path, line, "bad_game", f"{error}: " + "\t".join(fields))
            continue
        yield [(user, time, article) for time, article in zip(times, visits, strict=True)]


def _whole(number: str) -> int:
    if not (number.isascii() and number.isdigit()):
        raise ValueError(f"{number!r} is not a whole number")
    return int(number)


def visited(steps: str) -> list[str]:
    """The articles of a path such as "A;B;<;C" in the order they were seen: A, B, A, C.

    Raises:
        ValueError: an empty name, or a back click at the first article.
    """
    trail: list[str] = []
    seen = []
    for step in steps.split(";"):
        if step == "<":
            if len(trail) < 2:
                raise ValueError("a back click at the first article")
            trail.pop()
        elif step:
            trail.append(step)
        else:
            raise ValueError("an article without a name")
        seen.append(trail[-1])
    return seen


def played(end: int, duration: int, type_of_end: str) -> tuple[int, int]:
    """End and length of a game without the idle half hour that ended it, seconds."""
    idle = IDLE if type_of_end == "timeout" and duration >= IDLE else 0
    return end - idle, duration - idle


def spread(end: int, duration: int, n_clicks: int) -> list[int]:
    """The epoch seconds of a game's clicks: evenly from its start, whole seconds, rounded down.

    Raises:
        ValueError: the times are negative or too large to be seconds.
    """
    start = end - duration
    if not 0 <= start <= end < MAX_SECONDS:
        raise ValueError(f"ends at {end} after {duration} s")
    return [start + i * duration // n_clicks for i in range(n_clicks)]


def _documents(folder: Path, clicked: set[str], tables: Tables) -> list[tuple[str, str, str]]:
    """(document_id, title, categories) of every article that is listed or was clicked, sorted by id."""
    articles = {fields[0] for _, fields in _lines(_need(folder, "articles.tsv"), tables)}
    categories: dict[str, list[str]] = defaultdict(list)
    for _, (article, category) in _lines(_need(folder, "categories.tsv"), tables):
        categories[article].append(readable_category(category))
    return [(a, title(a), "; ".join(categories.get(a, ()))) for a in sorted(articles | clicked)]


def title(article: str) -> str:
    """%C3%89douard_Manet -> Édouard Manet."""
    return unquote(article).replace("_", " ")


def readable_category(category: str) -> str:
    """subject.Geography.European_Geography -> Geography > European Geography."""
    return category.removeprefix("subject.").replace(".", " > ").replace("_", " ")


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _need(folder: Path, name: str) -> Path:
    path = _find(folder, name)
    if path is None:
        raise InputError(
            f"{folder} has no {name} (or {name}.gz); download it from the same page as the paths"
        )
    return path


def _lines(path: Path, tables: Tables) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of every line but comments and blank ones; another number of fields is bad."""
    n_fields = N_FIELDS[path.name.removesuffix(".gz")]
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                if not raw.strip() or raw.startswith(b"#"):
                    continue
                tables.counts.lines += 1
                try:
                    fields = raw.decode("utf-8").rstrip("\r\n").split("\t")
                except UnicodeDecodeError:
                    tables.reject(path, number, "not_utf8", raw.decode("utf-8", errors="replace"))
                    continue
                if len(fields) != n_fields:
                    tables.reject(path, number, f"not_{n_fields}_fields", "\t".join(fields))
                elif not all(fields):
                    tables.reject(path, number, "empty_field", "\t".join(fields))
                else:
                    yield number, fields
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: cannot be decompressed: {error}; download it again") from None
