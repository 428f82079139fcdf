"""Titles found while they are typed: letters of every script, slips, the order of showing, the memory."""

import random
import unicodedata
from collections.abc import Iterable

import pyarrow as pa
import pytest

from serving.titles import BLOCK, Titles

KOREAN = "한국어 문법"


def found(titles: Iterable[str], typed: str, k: int = 10) -> list[str]:
    """The titles that are found, best first."""
    titles = list(titles)
    return [titles[row] for row, _ in Titles.of(titles).find(typed, k)]


@pytest.mark.parametrize(
    "typed",
    ["ㅎ", "하", "한", "한ㄱ", "한구", "한국", "한국ㅇ", "한국어", "한국어 ", "한국어 ㅁ", "문버", "문법"],
)
def test_hangul_is_found_at_every_stroke_of_the_keyboard(typed):
    assert found([KOREAN, "영어 사전"], typed) == [KOREAN]


@pytest.mark.parametrize(
    ("title", "shown"),
    [
        ("과학", ["ㄱ", "고", "과", "괗", "과하", "과학"]),  # ㅎ ends a syllable until a vowel follows
        ("읽기", ["ㅇ", "이", "일", "읽", "읽ㄱ", "읽기"]),
        ("값싼", ["ㄱ", "가", "갑", "값", "값ㅆ", "값싸", "값싼"]),
        ("의사", ["ㅇ", "으", "의", "읫", "의사"]),
        ("꽃", ["ㄲ", "꼬", "꽃"]),
    ],
)
def test_whatever_a_korean_input_method_shows_on_the_way_begins_the_title(title, shown):
    titles = Titles.of([title, "다른 책"])
    found = [titles.find(text, 1)[0] for text in shown]
    assert [row for row, _ in found] == [0] * len(shown)
    assert min(score for _, score in found) >= 0.75  # the title's beginning, without a slip


def test_conjoining_and_decomposed_hangul_are_the_same_as_syllables():
    assert found([KOREAN], unicodedata.normalize("NFD", "한국")) == [KOREAN]
    assert found([unicodedata.normalize("NFD", KOREAN)], "한국") == [unicodedata.normalize("NFD", KOREAN)]


@pytest.mark.parametrize(
    ("title", "typed"),
    [
        ("Straße nach Süden", "STRASSE"),
        ("Merge two tables", "ｍｅｒｇｅ　ｔｗ"),  # full width, as a Japanese input method types
        ("pandas.merge_asof", "asof"),
        ("Café society", unicodedata.normalize("NFD", "café")),
        ("हिन्दी व्याकरण", "ह"),
        ("हिन्दी व्याकरण", "हिन्"),  # ends in a virama: half a letter
        ("हिन्दी व्याकरण", "व्याक"),
        ("日本語の文法", "本語"),
        ("日本語の文法", "の文法"),
        ("にほんごの本", "ほんg"),  # the input method still waits for the vowel
        ("カタカナ入門", "カナ"),
        ("ｶﾀｶﾅ入門", "カタ"),
        ("中文语法", "语法"),
        ("ภาษาไทย", "ไทย"),
        ("Париж зимой", "париж З"),
        ("🎉 party", "🎉"),
        ("party🎉time", "🎉"),
        ("family 👨‍👩‍👧 tree", "👩‍👧"),
        ("ok 👍🏽", "👍"),
        ("C++ in depth", "c+"),
    ],
)
def test_titles_of_every_script_are_found_by_their_words(title, typed):
    assert found(["something else", title], typed) == [title]


@pytest.mark.parametrize("typed", ["", " ", "-", "...", "\n", "xyz", "語", "뷁", "𝕏𝕐"])
def test_what_no_title_begins_with_finds_nothing(typed):
    assert found(["merge", KOREAN], typed) == []


@pytest.mark.parametrize(
    ("title", "typed"),
    [
        ("pandas", "pandsa"),  # two neighbours swapped
        ("pandas", "panads"),
        ("pandas", "padas"),  # one is missing
        ("pandas", "panndas"),  # one too many
        ("pandas", "pendas"),  # another
        ("pandas", "bandas"),  # another at the beginning
        (KOREAN, "함국"),  # ㅁ for ㄴ
        (KOREAN, "하국어"),  # ㄴ is missing
        (KOREAN, "한굮"),  # ㄲ for ㄱ
        (KOREAN, "한국어 문볍"),
        ("हिन्दी व्याकरण", "हिन्ती"),
        ("日本語文法", "日本話文"),
        ("日本語文法", "日語文法"),
        ("にほんご", "にほこ"),
        ("merge two tables", "merge tow"),
        ("merge two tables", "megre two"),
        ("文法 grammar", "文法 gramar"),
    ],
)
def test_one_slip_is_forgiven(title, typed):
    assert found(["another thing", title], typed) == [title]


@pytest.mark.parametrize("typed", ["pnadsa", "pxxdas", "px", "merge tow talbes"])
def test_two_slips_or_a_slip_in_two_letters_are_not(typed):
    assert found(["pandas", "merge two tables"], typed) == []


def test_a_slip_in_kana_that_changes_the_whole_run_is_not_taken_for_another_title():
    assert found(["さくら", "すし"], "さかな") == []


def test_slips_are_looked_for_only_where_too_few_titles_are_found_without():
    titles = ["panda", "panel", "pandas"]
    assert found(titles, "pand", 2) == ["panda", "pandas"]
    assert found(titles, "pand", 3) == ["panda", "pandas", "panel"]  # "pan" + another letter than d


def test_the_beginning_of_a_title_comes_before_later_words_and_the_shorter_before_the_longer():
    titles = ["the tables", "tables and chairs", "table", "old table", "tabel", "table"]
    # "tabel" is "tabl" with an e more; the two equal titles stand in the order of their rows
    assert [row for row, _ in Titles.of(titles).find("tabl", 6)] == [2, 5, 1, 3, 0, 4]


def test_scores_fall_in_the_order_of_showing_and_stay_between_0_and_1():
    titles = ["table", "tablet", "a table", "tabel", "a tabel"]
    scores = [score for _, score in Titles.of(titles).find("table", 5)]
    # exact and at the beginning 0.75, later 0.5, with a slip 0.25 and 0; a quarter is the typed share:
    # 5/5, 5/6, 5/7, 5/5, 5/7
    assert scores == pytest.approx([1.0, 0.75 + 0.25 * 5 / 6, 0.5 + 0.25 * 5 / 7, 0.5, 0.25 * 5 / 7])


def test_every_typed_word_must_begin_a_word_of_the_title():
    titles = ["merge two tables", "merge tables", "two tables", "tables merged"]
    assert found(titles, "merge tab", 10) == ["merge tables", "merge two tables", "tables merged"]


def test_letters_without_spaces_must_stand_together():
    # "語文" and "文法" stand in the first title too, but not as "語文法"
    assert found(["語文と文法", "日本語文法"], "語文法", 1) == ["日本語文法"]


def test_a_title_that_holds_the_word_twice_is_shown_once():
    assert found(["go go go", "gopher"], "go") == ["gopher", "go go go"]


def test_missing_titles_keep_their_rows():
    titles = pa.chunked_array([["first", None], ["", "two\nlines", "last"]])
    assert [row for row, _ in Titles.of(titles).find("l", 5)] == [4, 3]
    assert Titles.of(titles).find("first", 5)[0][0] == 0


@pytest.mark.parametrize("titles", [[], [""], ["..."], pa.chunked_array([], pa.large_string())])
def test_a_version_without_titles_finds_nothing(titles):
    assert Titles.of(titles).find("a", 5) == []


def test_no_results_are_asked_for():
    assert Titles.of(["a"]).find("a", 0) == []


def test_words_longer_than_a_key_are_found_by_their_beginning():
    long = "a" * 40 + "b"
    assert found([long, "a" * 20], "a" * 41) == [long]
    assert found(["한국어" * 20], "한국어" * 20) == ["한국어" * 20]


def test_endless_typing_is_cut():
    assert found(["word"], "word " * 10_000) == ["word"]


def by_definition(titles: list[str], typed: str, k: int) -> list[int]:
    """Rows in the order that is promised for words of plain letters, one by one."""
    begins = [(0, len(t), row) for row, t in enumerate(titles) if t.startswith(typed)]
    later = [
        (1, len(t), row)
        for row, t in enumerate(titles)
        if not t.startswith(typed) and any(word.startswith(typed) for word in t.split())
    ]
    return [row for _, _, row in sorted(begins + later)[:k]]


def test_the_best_of_many_are_those_that_sorting_all_gives():
    rng = random.Random(7)
    n = 10 * BLOCK  # more postings than are looked at one by one
    titles = [
        " ".join(rng.choice("ab") + rng.choice("xyz") * rng.randint(0, 3) for _ in range(3)) for _ in range(n)
    ]
    made = Titles.of(titles)
    for typed in ("a", "b", "ax", "by", "azzz"):
        assert [row for row, _ in made.find(typed, 20)] == by_definition(titles, typed, 20)


def test_memory_is_told_and_bounded():
    titles = [f"page {number} of the book" for number in range(5_000)]
    # 5 words: 20 bytes of postings, 8 of order, and 36 + 8 of the one word that no other title has
    assert 28 * 5_000 < Titles.of(titles).n_bytes < 80 * 5_000
