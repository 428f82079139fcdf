"""Third table of benchmarks/gateway.py: titles found key by key, this project's Titles beside three peers.

Titles are made: words drawn by Zipf's law from a version's documents, and a share of Hangul ones from common
syllables. A title is typed as its first keys, Hangul as a keyboard gives it (ㅎ, 하, 한), half of them with a
slip inside a word: a letter too many, too few, another one, or two swapped. Peers are asked at some keys
only, as a few take long; none of them knows slips or unfinished syllables.
"""

from __future__ import annotations

import re
import sqlite3
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Entry = dict[str, Any]
Find = Callable[[str], Sequence[Any]]

K = 10
N_KEYS = 12  # of a title that are typed: by then people choose
HANGUL_SHARE = 0.2
N_HANGUL_WORDS = 20_000
ZIPF = 1.07  # exponent of English and Korean word counts, about
SEED = 9
SYLLABLES = (
    "가거게고구그기나너네노누는니다대더도독동드들라레로르를리마만말면모무문미바방보부비사산상서선성세소수"
    "스시신아안야어에여연오요우원위유은을의이인일입자장전정제조주중지진차천체초추치카크타트파포하한합해현"
    "호화회후"
)
LEADS = "ㄱㄲㄴㄷㄸㄹㅁㅂㅃㅅㅆㅇㅈㅉㅊㅋㅌㅍㅎ"


class Typed(NamedTuple):
    """One title as it is typed: what stands in the box after each key, and whether a slip is in it."""

    keys: list[str]
    has_slip: bool


def measure(texts: Iterable[str], n_titles: int, n_typed: int, one_in: int, work: Path) -> Entry:
    """Build and ask every system.

    Args:
        texts: where words come from.
        n_titles: titles that are made.
        n_typed: of them that are typed.
        one_in: peers are asked at one key in so many.

    Returns:
        `titles`, `words`, `typed`, and `systems`: by title a dict of `seconds` (to build), `bytes` (a title),
        `asked`, p50, p95, p99 in ms, and `found_exact`, `found_slip`: shares of typed titles for which
        something is shown at the last key.
    """
    rng = np.random.default_rng(SEED)
    words = words_of(texts)
    titles = make_titles(words, n_titles, rng)
    typed = [as_typed(titles[n], n % 2 == 1, rng) for n in rng.integers(len(titles), size=n_typed)]
    systems = {}
    for name, build, share in (
        ("Titles, this project", built_titles, 1),
        ("SQLite FTS5, prefix index, first rows", fts5(work, ""), one_in),
        ("SQLite FTS5, prefix index, by bm25", fts5(work, " order by rank"), one_in),
        ("polars, str.contains over all", polars_scan, one_in),
    ):
        began = time.perf_counter()
        find, n_bytes = build(titles)
        seconds = time.perf_counter() - began
        systems[name] = {"seconds": seconds, "bytes": n_bytes / len(titles), **asked(find, typed, share)}
    return {"titles": len(titles), "words": len(words), "typed": len(typed), "systems": systems}


def asked(find: Find, typed: Sequence[Typed], one_in: int) -> Entry:
    """Ask at one key in `one_in`, and at every `one_in`-th title's last one, which shows what is found."""
    took: list[float] = []
    shown: dict[bool, list[bool]] = {False: [], True: []}
    number = 0
    for at, title in enumerate(typed):
        for key in title.keys:
            is_last = key is title.keys[-1] and (at // 2) % one_in == 0
            number += 1
            if number % one_in and not is_last:
                continue
            began = time.perf_counter()
            found = find(key)
            took.append(1000 * (time.perf_counter() - began))
            if is_last:
                shown[title.has_slip].append(len(found) > 0)
    p50, p95, p99 = (float(each) for each in np.percentile(took, (50, 95, 99)))
    exact, slip = (sum(each) / max(1, len(each)) for each in (shown[False], shown[True]))
    return {"asked": len(took), "p50": p50, "p95": p95, "p99": p99, "found_exact": exact, "found_slip": slip}


# --- Titles and keys -----------------------------------------------------------------------------------


def words_of(texts: Iterable[str]) -> list[str]:
    """Words of letters alone, most frequent first."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(re.findall(r"[^\W\d_]{2,}", text))
    return [word for word, _ in counts.most_common()]


def make_titles(words: Sequence[str], n_titles: int, rng: np.random.Generator) -> list[str]:
    """Titles of 2 to 7 words (Hangul: 1 to 4), each kind's words drawn by Zipf's law."""
    lengths = rng.integers(2, 5, size=(N_HANGUL_WORDS, 1))
    drawn = rng.integers(len(SYLLABLES), size=(N_HANGUL_WORDS, 4))
    hangul = [
        "".join(SYLLABLES[n] for n in row[: int(size[0])]) for row, size in zip(drawn, lengths, strict=True)
    ]
    n_hangul = round(HANGUL_SHARE * n_titles)
    titles = [*_drawn(words, n_titles - n_hangul, (2, 7), rng), *_drawn(hangul, n_hangul, (1, 4), rng)]
    return [titles[n] for n in rng.permutation(n_titles)]


def _drawn(words: Sequence[str], n: int, sizes: tuple[int, int], rng: np.random.Generator) -> list[str]:
    shares = 1 / np.arange(1, len(words) + 1) ** ZIPF
    ends = np.cumsum(rng.integers(sizes[0], sizes[1] + 1, size=n))
    at = rng.choice(len(words), size=int(ends[-1]) if n else 0, p=shares / shares.sum()).tolist()
    starts = [0, *ends.tolist()]
    return [" ".join(words[k] for k in at[a:b]) for a, b in pairwise(starts)]


def as_typed(title: str, has_slip: bool, rng: np.random.Generator) -> Typed:
    """The first keys of a title, with a slip inside one of its words where it has a long enough one."""
    begun = title[:N_KEYS]
    places = [at for at in range(1, len(begun) - 1) if " " not in begun[at - 1 : at + 2]]
    has_slip = has_slip and bool(places)
    if has_slip:
        begun = with_slip(begun, int(rng.integers(4)), int(rng.choice(places)))
    return Typed(keys_of(begun)[:N_KEYS], has_slip)


def with_slip(text: str, kind: int, at: int) -> str:
    """A letter twice (0), left out (1), taken for its neighbour (2), or swapped with it (3), at `at`.

    One key of a syllable is its vowel: that is another one then, whatever the kind.
    """
    before, letter, after = text[:at], text[at], text[at + 1 :]
    if _is_syllable(letter):
        lead, vowel, *last = unicodedata.normalize("NFD", letter)
        other = chr(0x1161 + (ord(vowel) - 0x1161 + 1) % 21)
        return before + unicodedata.normalize("NFC", "".join([lead, other, *last])) + after
    changed = (letter * 2 + after, after, after[:1] + after, after[:1] + letter + after[1:])
    return before + changed[kind]


def keys_of(text: str) -> list[str]:
    """What stands in the box after each key; a syllable comes letter by letter."""
    found, before = [], ""
    for letter in text:
        for state in _states(letter):
            found.append(before + state)
        before += letter
    return [each for each in found if each.strip()]


def _states(letter: str) -> list[str]:
    if not _is_syllable(letter):
        return [letter]
    parts = unicodedata.normalize("NFD", letter)
    lead = LEADS[ord(parts[0]) - 0x1100]
    states = [lead, unicodedata.normalize("NFC", parts[:2]), letter]
    return list(dict.fromkeys(states))


def _is_syllable(letter: str) -> bool:
    return "가" <= letter <= "힣"


# --- Systems: titles -> how to find, and bytes ---------------------------------------------------------


def built_titles(titles: Sequence[str]) -> tuple[Find, int]:
    """This project's, over an Arrow column as a version holds its titles."""
    import pyarrow as pa

    from serving.titles import Titles

    built = Titles.of(pa.chunked_array([pa.array(titles, pa.large_string())]))
    return lambda typed: built.find(typed, K), built.n_bytes


def fts5(work: Path, order: str) -> Callable[[Sequence[str]], tuple[Find, int]]:
    """SQLite's full-text search without the texts themselves, in a file of `work`."""

    def build(titles: Sequence[str]) -> tuple[Find, int]:
        file = work / "titles.sqlite"
        file.unlink(missing_ok=True)
        database = sqlite3.connect(file, isolation_level=None)
        database.execute("pragma journal_mode = off")
        database.execute("create virtual table titles using fts5(title, content='', prefix='1 2 3')")
        database.execute("begin")
        rows = ((title,) for title in titles)
        database.executemany("insert into titles(title) values (?)", rows)
        database.execute("commit")
        asked_for = f"select rowid from titles where titles match ?{order} limit {K}"

        def find(typed: str) -> Sequence[Any]:
            words = re.findall(r"\w+", typed)
            if not words:
                return []
            match = " ".join(f'"{word}"' for word in words) + "*"
            return database.execute(asked_for, (match,)).fetchall()

        return find, file.stat().st_size

    return build


def polars_scan(titles: Sequence[str]) -> tuple[Find, int]:
    """Every title looked through, anywhere in it; nothing is built but the column in lower case."""
    import polars as pl

    column = pl.Series("title", titles).str.to_lowercase()

    def find(typed: str) -> Sequence[Any]:
        return column.filter(column.str.contains(typed.lower(), literal=True)).head(K).to_list()

    return find, int(column.estimated_size())
