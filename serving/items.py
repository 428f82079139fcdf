"""Items: canned answers and menu entries out of a CSV, each found by the best of its phrases.

Columns: document_id; `phrase`, one a row and as many rows as an item has phrases, or `phrases`, several in
one row with | between them; and, where wanted, path (where the item leads), open, threshold, memo. An item's
later rows may leave out what its first one says.
"""

import csv
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import InputError, from_os_error
from serving.shown import shown, shows

ID, PATH, OPEN, THRESHOLD, MEMO, PHRASE, PHRASES = COLUMNS = (
    "document_id", "path", "open", "threshold", "memo", "phrase", "phrases"
)  # fmt: skip
BETWEEN_PHRASES = "|"
BETWEEN_MEMOS = "; "
OPEN_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
SAVE_AS_UTF8 = "save it as UTF-8 (spreadsheets call it 'CSV UTF-8')"

MATCH, CLOSED, BELOW = "match", "closed", "below its threshold"


@dataclass(frozen=True)
class Item:
    """One canned answer or menu entry.

    Attributes:
        threshold: the score below which it is no match, -1 to 1; None: each score is one.
        phrases: at least one, each once.
    """

    document_id: str
    phrases: tuple[str, ...]
    path: str = ""
    open: bool = True
    threshold: float | None = None
    memo: str = ""


@dataclass(frozen=True)
class ItemMatch:
    """An item as a query finds it.

    Attributes:
        score: of its best phrase.
        verdict: MATCH, or why it is none: CLOSED, BELOW.
    """

    item: Item
    phrase: str
    score: float

    @property
    def verdict(self) -> str:
        if not self.item.open:
            return CLOSED
        is_below = self.item.threshold is not None and self.score < self.item.threshold
        return BELOW if is_below else MATCH


class Items:
    """The items of one file, in its order. Encode `phrases` as queries and hand them to `embedded` once."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = tuple(items)
        self.phrases = [phrase for item in self.items for phrase in item.phrases]
        n_phrases = [len(item.phrases) for item in self.items]
        self._starts = np.concatenate([[0], np.cumsum(n_phrases)]).astype(np.int64)
        self._vectors: np.ndarray | None = None

    @classmethod
    def read(cls, path: Path) -> "Items":
        """Read a CSV in UTF-8, with a byte order mark or without.

        Raises:
            InputError: it cannot be read, or a row cannot be used; file and line are named.
        """
        path = Path(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise from_os_error(error) or InputError(f"{path}: {error}; check the path") from None
        return cls(_items(_rows(_decoded(content, path), path), path))

    def listed(self) -> list[dict[str, Any]]:
        """Every item, closed ones too, with the keys document_id, path, open, threshold, memo, phrases."""
        return [
            {
                ID: item.document_id,
                PATH: item.path,
                OPEN: item.open,
                THRESHOLD: item.threshold,
                MEMO: item.memo,
                PHRASES: list(item.phrases),
            }
            for item in self.items
        ]

    def embedded(self, vectors: np.ndarray) -> None:
        """Take over the vectors of `phrases`, float32 (n_phrases, dim), unit length.

        Raises:
            ValueError: there are more or fewer of them, or one is not finite.
        """
        given = np.array(vectors, np.float32)  # a copy: nobody else's changes reach it
        if not self.phrases:
            given = given.reshape(0, given.shape[-1] if given.ndim == 2 else 0)
        if given.ndim != 2 or len(given) != len(self.phrases) or not np.isfinite(given).all():
            raise ValueError(
                f"vectors of shape {given.shape}, wanted a finite one for each of {len(self.phrases)} phrases"
            )
        self._vectors = given

    def matches(self, query: np.ndarray, k: int) -> list[ItemMatch]:
        """The k best open items that reach their own thresholds, best first, each once by its best phrase.

        Args:
            query: float32 (dim,), unit length.
        """
        matches = (found for found in self._found(query) if found.verdict == MATCH)
        return list(itertools.islice(matches, max(k, 0)))

    def tried(self, query: np.ndarray, k: int) -> list[ItemMatch]:
        """The k items with the best scores whatever their verdicts: why something is found, or is not."""
        return list(itertools.islice(self._found(query), max(k, 0)))

    def _found(self, query: np.ndarray) -> Iterator[ItemMatch]:
        """Every item by its best phrase, best first; equal ones in the file's order."""
        if self._vectors is None:
            raise ValueError("the phrases have no vectors yet; call embedded() with them first")
        if not self.items:
            return
        scores = self._vectors @ np.asarray(query, np.float32)
        if scores.ndim != 1:
            raise ValueError(f"a query of shape {np.shape(query)}, wanted ({self._vectors.shape[1]},)")
        best = np.maximum.reduceat(scores, self._starts[:-1])
        order = np.argsort(-best, kind="stable")
        for at in order.tolist():
            yield self._match(at, scores)

    def _match(self, at: int, scores: np.ndarray) -> ItemMatch:
        item, start = self.items[at], int(self._starts[at])
        own = scores[start : int(self._starts[at + 1])]
        phrase = int(np.argmax(own))
        return ItemMatch(item, item.phrases[phrase], float(own[phrase]))


# --- Reading ---------------------------------------------------------------------------------------------


@dataclass
class _Draft:
    """What the rows of one item have said so far.

    Attributes:
        line: of its first row.
        said: path, open, threshold -> (value, the cell, the line that says it first).
    """

    line: int
    said: dict[str, tuple[Any, str, int]] = field(default_factory=dict)
    memos: dict[str, None] = field(default_factory=dict)
    phrases: dict[str, None] = field(default_factory=dict)  # in the file's order, each once


def _decoded(content: bytes, path: Path) -> str:
    if content.startswith(UTF16):
        raise InputError(f"{path}: this is UTF-16, wanted UTF-8; {SAVE_AS_UTF8}")
    content = content.removeprefix(BYTE_ORDER_MARK)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path}: line {line} is not UTF-8: {error.reason} at byte {error.start}; {SAVE_AS_UTF8}"
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise InputError(f"{path}: line {line} holds a zero byte, wanted a CSV; {SAVE_AS_UTF8}")
    return text


def _rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, cells by column) of every row below the header that is not blank."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1  # where the next row begins: a cell in quotes can hold several lines
        try:
            cells = [cell.strip() for cell in next(reader)]
        except StopIteration:
            break
        except csv.Error as error:
            raise InputError(f"{path}: line {line}: {error}; check the quotes from there on") from None
        if not any(cells):
            continue
        if header is None:
            header = _header(cells, f"{path}: line {line}")
            continue
        if len(cells) != len(header):
            raise InputError(
                f"{path}: line {line} has {len(cells)} cells, the header has {len(header)}; put a cell that "
                'holds a comma in "quotes"'
            )
        yield line, dict(zip(header, cells, strict=True))
    if header is None:
        raise InputError(f"{path}: it is empty, wanted a CSV with the columns {ID} and {PHRASE}")


def _header(cells: list[str], where: str) -> list[str]:
    if len(cells) == 1 and any(mark in cells[0] for mark in ";\t"):
        raise InputError(f"{where}: one column, {shown(cells[0])}; save it with commas between the cells")
    unknown = [name for name in cells if name not in COLUMNS]
    if unknown:
        raise InputError(f"{where}: {shown(unknown[0])} is no column of items; known: {', '.join(COLUMNS)}")
    twice = [name for at, name in enumerate(cells) if name in cells[:at]]
    if twice:
        raise InputError(f"{where}: the column {twice[0]} is there twice; take one out")
    if ID not in cells:
        raise InputError(f"{where}: there is no column {ID}; it has: {', '.join(cells)}")
    if (PHRASE in cells) == (PHRASES in cells):
        got = "both" if PHRASE in cells else "neither"
        raise InputError(
            f"{where}: wanted a column {PHRASE}, one a row, or {PHRASES}, with {BETWEEN_PHRASES} between "
            f"them; it has {got}"
        )
    return cells


def _items(rows: Iterable[tuple[int, Mapping[str, str]]], path: Path) -> list[Item]:
    drafts: dict[str, _Draft] = {}
    for line, row in rows:
        where = f"{path}: line {line}"
        if not shows(row[ID]):
            raise InputError(f"{where} has no {ID}; fill it in, in every row of an item")
        _take(drafts.setdefault(row[ID], _Draft(line)), row, line, where)
        # An empty cell could mean either: whether people are answered with it is for the file to say.
        if OPEN in row and not row[OPEN] and OPEN not in drafts[row[ID]].said:
            raise InputError(f"{where}: {OPEN} is empty, wanted {', '.join(OPEN_WORDS)}; fill it in")
    return [_item(name, draft, path) for name, draft in drafts.items()]


def _take(draft: _Draft, row: Mapping[str, str], line: int, where: str) -> None:
    """Add what a row says to its item's draft."""
    for name, read in ((PATH, _path), (OPEN, _open), (THRESHOLD, _threshold)):
        cell = row.get(name, "")
        if not cell:
            continue
        value = read(cell, where)
        before, said, first = draft.said.setdefault(name, (value, cell, line))
        if before != value:
            raise InputError(
                f"{where}: the {name} of {shown(row[ID])} is {shown(cell)}, and line {first} says "
                f"{shown(said)}; let an item's rows agree, or leave the cell empty"
            )
    if row.get(MEMO):
        draft.memos.setdefault(row[MEMO])
    cells = row[PHRASES].split(BETWEEN_PHRASES) if PHRASES in row else [row[PHRASE]]
    draft.phrases.update(dict.fromkeys(phrase for cell in cells if shows(phrase := cell.strip())))


def _item(document_id: str, draft: _Draft, path: Path) -> Item:
    if not draft.phrases:
        raise InputError(
            f"{path}: line {draft.line}: {shown(document_id)} has no phrase; write one that people type"
        )
    said = {name: value for name, (value, _, _) in draft.said.items()}
    return Item(document_id, tuple(draft.phrases), memo=BETWEEN_MEMOS.join(draft.memos), **said)


def _path(cell: str, where: str) -> str:
    return cell


def _open(cell: str, where: str) -> bool:
    if cell.lower() not in OPEN_WORDS:
        raise InputError(f"{where}: {OPEN} is {shown(cell)}, wanted {', '.join(OPEN_WORDS)}")
    return OPEN_WORDS[cell.lower()]


def _threshold(cell: str, where: str) -> float:
    if not NUMBER.fullmatch(cell) or not -1 <= float(cell) <= 1:
        is_comma = "," in cell and NUMBER.fullmatch(cell.replace(",", "."))
        advice = "; write a point, not a comma" if is_comma else ""
        raise InputError(
            f"{where}: {THRESHOLD} is {shown(cell)}, wanted a score from -1 to 1, such as 0.71, or nothing"
            f"{advice}"
        )
    return float(cell)
