"""Finds titles while they are typed: by the beginnings of their words, letter by letter, with one slip.

A word's key is its folded letters, Hangul taken apart into the strokes of a keyboard, so that an unfinished
syllable is a beginning of the finished one. Where no spaces part words (Han, Kana, Thai, emoji) every pair of
neighbouring letters is a key. Sorted keys make whatever begins with the typed letters one slice of the
postings, and a posting is the title's place in the order of showing: nothing is ever sorted by relevance.
"""

import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import pyarrow as pa

from pipeline.folding import fold

KEY_BYTES = 36  # of a word: 36 Latin letters or Hangul strokes, 18 Cyrillic, 12 Devanagari
BLOCK = 1024  # postings whose smallest is known
BATCH = 20_000  # titles folded at once
MOST_TYPED = 200  # characters looked at
MOST_WORDS = 8
SLIP_FROM = 3  # letters: a shorter beginning with a slip would be anything
SLIP_WITHIN = 16  # letters of a word, from its beginning
SLIP_WITHIN_RUN = 8  # letters where words have no spaces
LETTERS = 48  # of a script that may stand in a slip's place: the most frequent
CHECKED = 2_000  # titles read again, where pairs of letters do not say that all stand together
ROMAJI = 3  # Latin letters that a Japanese input method may still turn into Kana

Ranges = list[tuple[int, int]]


class Titles:
    """All titles of a version, as one looks for them letter by letter.

    Attributes:
        n_rows: titles.
    """

    def __init__(self, titles: "Sequence[str] | pa.ChunkedArray", made: "_Made") -> None:
        self._titles = titles
        self.n_rows = len(titles)
        self._lengths, self._rows = made.lengths, made.rows
        self._keys, self._starts, self._postings = made.keys, made.starts, made.postings
        blocks = np.arange(0, len(self._postings), BLOCK)
        self._least_of_block = np.minimum.reduceat(self._postings, blocks) if len(blocks) else self._postings
        self._alphabets = made.alphabets

    @classmethod
    def of(cls, titles: "Sequence[str] | pa.ChunkedArray") -> "Titles":
        """Reads all titles once; row i of an answer is titles[i], and a missing title is never found."""
        return cls(titles, _made(titles))

    @property
    def n_bytes(self) -> int:
        """Memory held, in bytes, without the titles themselves."""
        held = (self._lengths, self._rows, self._keys, self._starts, self._postings, self._least_of_block)
        return sum(array.nbytes for array in held)

    def find(self, typed: str, k: int) -> list[tuple[int, float]]:
        """The titles with a word that begins with the last typed word, and with all earlier ones.

        Where fewer than k are found, those that one letter too many, too few, another or two neighbours
        swapped would have found follow.

        Returns:
            At most k pairs of row and score, best first: at the title's beginning, then in later words;
            there the shorter title, then the earlier row. From 0.5 without a slip, below it with one; half of
            each for the title's beginning; the rest is the typed share of the title's length.
        """
        parts = _parts(typed[:MOST_TYPED])[:MOST_WORDS]
        if not parts or k < 1 or not self.n_rows:
            return []
        found = self._found(parts, k)
        shown = [(place, 0.5) for place in found]
        if len(found) < k and any(part.n_letters >= SLIP_FROM for part in parts):
            taken = {place % self.n_rows for place in found}
            slipped = self._with_a_slip(parts, k + len(found))
            shown += [(place, 0.0) for place in slipped if place % self.n_rows not in taken]
        n_typed = sum(len(part.text) for part in parts) + len(parts) - 1
        return [self._scored(place, least, n_typed) for place, least in shown[:k]]

    def _scored(self, place: int, least: float, n_typed: int) -> tuple[int, float]:
        title, begins = place % self.n_rows, place < self.n_rows
        share = min(1.0, n_typed / max(1, int(self._lengths[title])))
        return int(self._rows[title]), least + 0.25 * begins + 0.25 * share

    def _found(self, parts: "list[_Part]", k: int) -> list[int]:
        needles = [self._ranges([key]) for part in parts for key in part.needles()]
        if not all(needles):
            return []
        if len(needles) == 1:
            return self._best(needles[0], k)
        masks = [self._mask(ranges) for ranges in needles]
        checks = [re.compile(re.escape(part.text)) for part in parts if part.is_run and len(part.text) > 2]
        return self._first(_all(masks), masks[0][0], checks, k)

    def _with_a_slip(self, parts: "list[_Part]", k: int) -> list[int]:
        """Places with one slip in one of the parts; all others as they were typed."""
        if len(parts) == 1 and not parts[0].is_run:
            return self._best(self._ranges(self._neighbours(parts[0])), k)
        masks = [[self._mask(self._ranges([key])) for key in part.needles()] for part in parts]
        found: set[int] = set()
        for number, part in enumerate(parts):
            others = [mask for at, of_part in enumerate(masks) if at != number for mask in of_part]
            both = _all(others)
            if part.n_letters < SLIP_FROM or (others and not both.any()):
                continue  # too short, or two words are wrong
            slipped, check = self._slipped(part)
            begins = masks[0][0][0] if number else slipped[0]
            checks = [re.compile(re.escape(p.text)) for p in parts if p is not part and p.is_run]
            either = slipped[0] | slipped[1]
            found.update(self._first(either & both if others else either, begins, [*checks, *check], k))
        return sorted(found)[:k]

    def _slipped(self, part: "_Part") -> tuple[np.ndarray, list[re.Pattern[str]]]:
        """The mask of titles that may hold a part with a slip, and what a title's text must then match."""
        if not part.is_run:
            return self._mask(self._ranges(self._neighbours(part))), []
        run = part.text[:SLIP_WITHIN_RUN]
        letters = [self._mask(self._ranges([letter.encode()])) for letter in dict.fromkeys(run)]
        enough = sum((mask[0] | mask[1]).astype(np.uint8) for mask in letters) >= max(1, len(letters) - 1)
        begins = letters[0][0] | letters[1 % len(letters)][0]  # the slip may be the first letter
        return np.stack([enough & begins, enough & ~begins]), [_slips_of(run)]

    def _neighbours(self, part: "_Part") -> list[bytes]:
        """Keys of what a word would be without one slip."""
        word = part.key
        alphabet = "".join({self._alphabets.get(_script(letter), "") for letter in word})
        found = set()
        for at in range(min(len(word), SLIP_WITHIN)):
            before, after = word[:at], word[at + 1 :]
            found.add(before + after)
            found.add(before + after[:1] + word[at : at + 1] + after[1:])
            for letter in alphabet:
                found.add(before + letter + after)
                found.add(before + letter + word[at:])
        return [_cut(text.encode()) for text in found - {word}]

    def _ranges(self, keys: Iterable[bytes]) -> Ranges:
        """Slices of the postings whose words begin with one of these keys: ascending, none overlapping."""
        wanted = sorted(keys)
        low = np.searchsorted(self._keys, np.array(wanted, self._keys.dtype))
        high = np.searchsorted(self._keys, np.array([key + b"\xff" for key in wanted], self._keys.dtype))
        ranges: Ranges = []
        for start, end in zip(self._starts[low].tolist(), self._starts[high].tolist(), strict=True):
            # Beginnings are nested or apart, and the longer ones come later.
            if start < end and (not ranges or start >= ranges[-1][1]):
                ranges.append((start, end))
        return ranges

    def _best(self, ranges: Ranges, k: int) -> list[int]:
        """The k smallest places of these slices, each title once."""
        wanted = 4 * k
        while True:
            slices = [self._least(low, high, wanted) for low, high in ranges]
            places = np.unique(np.concatenate(slices)) if slices else np.empty(0, np.uint32)
            _, first = np.unique(places % self.n_rows, return_index=True)
            best = places[np.sort(first)]
            if len(best) >= k or all(high - low <= wanted for low, high in ranges):
                return best[:k].tolist()
            wanted *= 4

    def _least(self, low: int, high: int, n: int) -> np.ndarray:
        """At least the n smallest places of a slice, or all of it where it is small."""
        if high - low <= max(n, 8 * BLOCK):
            return self._postings[low:high]
        # What is among the n smallest stands in one of the n blocks with the smallest least places.
        first, last = -(-low // BLOCK), high // BLOCK
        blocks = np.arange(first, last)
        if len(blocks) > n:
            blocks = first + np.argpartition(self._least_of_block[first:last], n)[:n]
        inner = [self._postings[block * BLOCK : (block + 1) * BLOCK] for block in blocks.tolist()]
        places = np.concatenate(
            [self._postings[low : first * BLOCK], *inner, self._postings[last * BLOCK : high]]
        )
        return np.partition(places, n)[:n] if len(places) > n else places

    def _mask(self, ranges: Ranges) -> np.ndarray:
        """Bool (2, n_rows): which titles begin with one of these, and which hold one in a later word."""
        mask = np.zeros(2 * self.n_rows, dtype=bool)
        for low, high in ranges:
            mask[self._postings[low:high]] = True
        return mask.reshape(2, self.n_rows)

    def _first(self, found: np.ndarray, begins: np.ndarray, checks: Sequence, k: int) -> list[int]:
        """The first k places of a mask of titles; `checks` are matched with a title's folded text."""
        at_start, later = np.flatnonzero(found & begins), np.flatnonzero(found & ~begins) + self.n_rows
        if not checks:
            return np.concatenate([at_start[:k], later[:k]])[:k].tolist()
        places: list[int] = []
        for place in np.concatenate([at_start[:CHECKED], later[:CHECKED]])[:CHECKED].tolist():
            text = _folded(_text(self._titles[int(self._rows[place % self.n_rows])]))
            if all(check.search(text) for check in checks):
                places.append(place)
                if len(places) == k:
                    break
        return places


@dataclass(frozen=True)
class _Part:
    """One typed word, or a run of letters that no spaces part.

    Attributes:
        text: folded.
        key: the same with Hangul taken apart.
    """

    text: str
    is_run: bool

    @property
    def key(self) -> str:
        return self.text.translate(_strokes())

    @property
    def n_letters(self) -> int:
        return len(self.key)

    def needles(self) -> list[bytes]:
        """What a title's keys must begin with, each of them."""
        if not self.is_run or len(self.text) < 3:
            return [_cut(self.key.encode())]
        return [self.text[at : at + 2].encode() for at in range(len(self.text) - 1)]


@dataclass(frozen=True)
class _Made:
    """What `Titles` looks things up in; a title's place is its rank by length, then by row.

    Attributes:
        keys: (n_keys,) of KEY_BYTES, sorted.
        starts: int64 (n_keys + 1,): where each key's postings begin.
        postings: uint32: the place where the title begins with the key, n_rows more where a later word does.
        rows, lengths: uint32 (n_rows,): of the title in each place.
        alphabets: the letters that may stand in a slip's place, of each script.
    """

    keys: np.ndarray
    starts: np.ndarray
    postings: np.ndarray
    rows: np.ndarray
    lengths: np.ndarray
    alphabets: dict[int, str]


def _made(titles: "Sequence[str] | pa.ChunkedArray") -> _Made:
    lengths, words, occurrences = _read(titles)
    n_rows = len(lengths)
    rows = np.argsort(lengths, kind="stable").astype(np.uint32)
    place = np.empty(n_rows, np.uint32)
    place[rows] = np.arange(n_rows, dtype=np.uint32)
    texts = [word.translate(_strokes()) for word in words]
    keys = np.array([text.encode()[:KEY_BYTES] for text in texts], dtype=f"S{KEY_BYTES}")
    order = np.argsort(keys, kind="stable")
    where = np.empty(len(keys), np.uint32)
    where[order] = np.arange(len(keys), dtype=np.uint32)
    # Number 0 ends a title; its postings are left out.
    is_end = occurrences == 0
    begins = np.concatenate([[True], is_end[:-1]]) if len(is_end) else is_end
    row = np.cumsum(is_end)[~is_end]
    values = place[row] + np.uint32(n_rows) * ~begins[~is_end]
    numbers = where[occurrences[~is_end]]
    del is_end, begins, row, occurrences
    sorted_ = np.argsort(numbers, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(numbers, minlength=len(keys)))])
    return _Made(
        keys[order], starts, values[sorted_].astype(np.uint32), rows, lengths[rows], _alphabets(texts)
    )


def _read(titles: "Sequence[str] | pa.ChunkedArray") -> tuple[np.ndarray, list[str], np.ndarray]:
    """Lengths of all titles, the distinct words and pairs, and their numbers, a 0 after every title."""
    lengths, occurrences = array("I"), [np.empty(0, np.uint32)]
    numbers_of: dict[str, tuple[int, ...]] = {"\n": (0,)}
    number_of: dict[str, int] = {"\n": 0}
    for batch in _batches(titles):
        lengths.extend(map(len, batch))
        found = array("I")
        for token in _tokens().findall(_folded("\n".join(batch) + "\n")):
            numbers = numbers_of.get(token)
            if numbers is None:
                keys = _pairs(token) if _is_run(token) else [token]
                numbers = tuple(number_of.setdefault(key, len(number_of)) for key in keys)
                if len(keys) == 1:  # runs are hardly ever the same: words are
                    numbers_of[token] = numbers
            found.extend(numbers)
        occurrences.append(np.frombuffer(found, np.uint32))
    return np.array(lengths, np.uint32), list(number_of), np.concatenate(occurrences)


def _batches(titles: "Sequence[str] | pa.ChunkedArray") -> Iterator[list[str]]:
    for start in range(0, len(titles), BATCH):
        batch = titles[start : start + BATCH]
        texts = batch.to_pylist() if isinstance(batch, pa.ChunkedArray) else batch
        yield [text.replace("\n", " ") if text else "" for text in texts]


def _text(title: "str | pa.Scalar | None") -> str:
    return (title.as_py() if isinstance(title, pa.Scalar) else title) or ""


def _alphabets(texts: list[str]) -> dict[int, str]:
    letters: dict[int, str] = {}
    for letter, _ in Counter("".join(texts)).most_common():
        if len(letters.get(_script(letter), "")) < LETTERS:
            letters[_script(letter)] = letters.get(_script(letter), "") + letter
    return letters


def _script(letter: str) -> int:
    """One number for letters mistaken for each other: Hangul's strokes, Latin with accents, 128 others."""
    if letter in STROKES:
        return -1
    return 0 if letter < "\u0250" else ord(letter) >> 7


def _parts(typed: str) -> list[_Part]:
    text = _folded(typed.replace("\n", " "))
    tokens = list(_tokens().finditer(text))
    if len(tokens) > 1 and tokens[-1].start() == tokens[-2].end():
        last = tokens[-1].group()
        # A Japanese input method is about to turn "k" into か: nothing to look for yet.
        if len(last) <= ROMAJI and last.isascii() and last.isalpha() and _is_kana(text[tokens[-2].end() - 1]):
            tokens.pop()
    return [_Part(token.group(), _is_run(token.group())) for token in tokens]


def _is_kana(letter: str) -> bool:
    return "\u3040" <= letter <= "\u30ff"


def _all(masks: list[np.ndarray]) -> np.ndarray:
    """Titles that every one of these masks holds, wherever in the title; of no masks, nothing to look at."""
    if not masks:
        return np.zeros(0, dtype=bool)
    found = masks[0][0] | masks[0][1]
    for mask in masks[1:]:
        found &= mask[0] | mask[1]
        if not found.any():
            break
    return found


def _pairs(run: str) -> list[str]:
    return [run[at : at + 2] for at in range(len(run))]


@lru_cache(maxsize=64)
def _slips_of(run: str) -> re.Pattern[str]:
    """Matches a run with one slip, anywhere in a text."""
    found = set()
    for at in range(len(run)):
        before, letter, after = re.escape(run[:at]), re.escape(run[at]), re.escape(run[at + 1 :])
        found |= {before + after, f"{before}.{after}"}
        if at:
            found.add(f"{before}.{letter}{after}")
        if at + 1 < len(run):
            found.add(before + re.escape(run[at + 1]) + letter + re.escape(run[at + 2 :]))
    return re.compile("|".join(sorted(found)))


def _cut(key: bytes) -> bytes:
    """A key that leaves room for what stands after all of its continuations."""
    return key if len(key) < KEY_BYTES else key[: KEY_BYTES - 1].decode(errors="ignore").encode()


def _folded(text: str) -> str:
    """Without case and width, and without signs that change no letter."""
    return _UNSEEN.sub("", fold(text))


# Joiners, the choice between a sign's text and emoji form, and shades of skin.
_UNSEEN = re.compile("[\u00ad\u200b-\u200f\u2060\ufe00-\ufe0f\ufeff\U0001f3fb-\U0001f3ff]+")
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3005-\u3007\u3040-\u30fa\u30fc-\u30ff\u31f0-\u31ff"  # Kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\U0001f000-\U0001fbff"  # emoji; the signs below U+10000 are told by their category
)


@cache
def _tokens() -> re.Pattern[str]:
    """Finds runs, words and ends of titles. Punctuation parts words; combining signs do not."""
    unspaced = re.compile(f"[{_UNSPACED}]")
    runs, words = [], []
    for number in range(0x21, 0x10000):
        category = unicodedata.category(chr(number))
        if category == "So" or unspaced.match(chr(number)):
            runs.append(number)
        elif category[0] in "LMN" or category in ("Sm", "Sc", "Sk"):
            words.append(number)
    # Ranges of single code points only: with \w beside them re would look through them one by one.
    run = _spans(runs) + "\U0001f000-\U0001fbff\U00020000-\U0003ffff"
    return re.compile(f"[{run}]+|[{_spans(words)}\U00010000-\U0001efff]+|\n")


def _spans(numbers: list[int]) -> str:
    """Ascending code points as a character class writes them."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return "".join(f"\\u{first:04x}-\\u{last:04x}" for first, last in spans)


@lru_cache(maxsize=100_000)
def _is_run_letter(letter: str) -> bool:
    return unicodedata.category(letter) == "So" or re.match(f"[{_UNSPACED}]", letter) is not None


def _is_run(token: str) -> bool:
    return _is_run_letter(token[0])


# The 33 strokes of a Korean keyboard, first consonants and then vowels. Each stands in keys as a single byte
# that folded words have no other use for: capitals and control characters.
_CONSONANTS = "ㄱㄲㄴㄷㄸㄹㅁㅂㅃㅅㅆㅇㅈㅉㅊㅋㅌㅍㅎ"
_VOWELS = "ㅏㅐㅑㅒㅓㅔㅕㅖㅗㅛㅜㅠㅡㅣ"
STROKES = "".join(map(chr, range(1, 8))) + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_COMPOUND = {
    **{"ㅘ": "ㅗㅏ", "ㅙ": "ㅗㅐ", "ㅚ": "ㅗㅣ", "ㅝ": "ㅜㅓ", "ㅞ": "ㅜㅔ", "ㅟ": "ㅜㅣ", "ㅢ": "ㅡㅣ"},
    **{"ㄳ": "ㄱㅅ", "ㄵ": "ㄴㅈ", "ㄶ": "ㄴㅎ", "ㄺ": "ㄹㄱ", "ㄻ": "ㄹㅁ", "ㄼ": "ㄹㅂ", "ㄽ": "ㄹㅅ"},
    **{"ㄾ": "ㄹㅌ", "ㄿ": "ㄹㅍ", "ㅀ": "ㄹㅎ", "ㅄ": "ㅂㅅ"},
}
_MIDDLES = "ㅏㅐㅑㅒㅓㅔㅕㅖㅗㅘㅙㅚㅛㅜㅝㅞㅟㅠㅡㅢㅣ"  # Unicode's order, as are the ends of a syllable
_ENDS = " ㄱㄲㄳㄴㄵㄶㄷㄹㄺㄻㄼㄽㄾㄿㅀㅁㅂㅄㅅㅆㅇㅈㅊㅋㅌㅍㅎ"


@cache
def _strokes() -> dict[int, str]:
    """Every Hangul syllable and letter as the strokes that type it; NFKC makes single letters conjoining."""
    stroke = dict(zip(_CONSONANTS + _VOWELS, STROKES, strict=True))
    of = {
        letter: "".join(stroke[part] for part in _COMPOUND.get(letter, letter))
        for letter in {*stroke, *_COMPOUND}
    }
    of[" "] = ""
    table = {ord(letter): strokes for letter, strokes in of.items() if letter != " "}
    table |= {0x1100 + n: of[letter] for n, letter in enumerate(_CONSONANTS)}
    table |= {0x1161 + n: of[letter] for n, letter in enumerate(_MIDDLES)}
    table |= {0x11A7 + n: of[letter] for n, letter in enumerate(_ENDS) if n}
    for number in range(19 * 21 * 28):
        first, rest = divmod(number, 21 * 28)
        middle, end = divmod(rest, 28)
        table[0xAC00 + number] = of[_CONSONANTS[first]] + of[_MIDDLES[middle]] + of[_ENDS[end]]
    return table
