"""Passages: words of any script, slices of the text as it stands, and time in proportion to it."""

import time

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import EncodeConfig
from pipeline.errors import InputError
from pipeline.passages import cut, patterns, rows_of, words


def split(text: str) -> list[str]:
    return [word.group() for word in words(text)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("one two,  three\nfour", ["one", "two,", "three", "four"]),
        ("don't re-read", ["don't", "re-read"]),
        ("바람이 부는 날", ["바람이", "부는", "날"]),  # Korean puts spaces between words
        ("東京都庁前", ["東京", "都庁", "前"]),
        ("カタカナと字。", ["カタ", "カナ", "と字", "。"]),
        ("Python入門書", ["Python", "入門", "書"]),
        ("ภาษาไทย", ["ภาษา", "ไทย"]),
        ("ກາລະ", ["ກາລະ"]),
        ("ភាសា", ["ភាសា"]),  # two letters, each with a vowel sign
        ("", []),
        (" \n\u3000", []),
    ],
)
def test_a_word_is_a_run_without_spaces_or_some_letters_of_a_script_that_has_none(text, found):
    assert split(text) == found


def test_a_word_does_not_end_between_a_letter_and_its_marks():
    thai = "\u0e01\u0e33" + "\u0e17\u0e35\u0e48" * 5  # each of the five: a consonant, a vowel, a tone
    assert all(word[0] not in "\u0e35\u0e48" for word in split(thai))
    family = "\U0001f469\u200d\U0001f469\u200d\U0001f467"  # three emoji that are shown as one
    assert split(family * 101) == [family * 100, family]
    assert split("e\u0301" * 101) == ["e\u0301" * 100, "e\u0301"]


def test_a_short_text_is_one_passage_and_stays_as_it_is():
    assert cut("  three words here\n", 3, 1) == ["  three words here\n"]
    assert cut("", 3, 1) == [""]


def test_a_passage_begins_with_the_last_words_of_the_one_before():
    assert cut("a b  c\nd e f g", 4, 1) == ["a b  c\nd", "d e f g"]
    assert cut("a b c d e f g h", 4, 1) == ["a b c d", "d e f g", "g h"]


def test_what_the_passage_before_holds_whole_is_no_passage():
    # seven words in fours that share two: 0-3, 2-5, 4-6; a fourth, from word 6 on, would hold nothing new
    assert cut("a b c d e f g", 4, 2) == ["a b c d", "c d e f", "e f g"]
    assert cut("a b c d e f", 4, 2) == ["a b c d", "c d e f"]


def test_without_overlap_passages_follow_each_other():
    assert cut("a b c d e", 2, 0) == ["a b", "c d", "e"]


@pytest.mark.parametrize(
    ("text", "passages"),
    [
        ("東京都庁前駅", ["東京都庁", "都庁前駅"]),
        ("ภาษาไทยดีมาก", ["ภาษาไทยดี", "ไทยดีมาก"]),  # the sign above a letter is no letter of its own
        ("가 나 다", ["가 나", "나 다"]),
    ],
)
def test_three_words_in_passages_of_two_whatever_the_script(text, passages):
    assert len(split(text)) == 3
    assert cut(text, 2, 1) == passages


@given(st.text(alphabet="ab \n漢カกี가é\u0301\u200d🙂", max_size=60), st.integers(1, 6), st.integers(0, 5))
def test_passages_are_slices_that_together_hold_every_word(text, n_words, overlap):
    overlap = min(overlap, n_words - 1)
    passages = cut(text, n_words, overlap)
    spans = [match.span() for match in words(text)]
    if len(spans) <= n_words:
        assert passages == [text]
        return
    held: set[int] = set()
    at = 0
    for passage in passages:
        begins = spans[at][0]
        ends = begins + len(passage)
        assert text[begins:ends] == passage
        inside = {n for n, (start, end) in enumerate(spans) if begins <= start and end <= ends}
        assert len(inside) <= n_words
        assert inside - held
        held |= inside
        at += n_words - overlap
    assert held == set(range(len(spans)))


@pytest.mark.parametrize("text", ["a" * 1_000_000, "a " * 500_000, "字" * 1_000_000, "\u0301" * 1_000_000])
def test_a_text_of_a_million_letters_is_cut_in_time_in_proportion(text):
    def seconds(some: str) -> float:
        started = time.process_time()
        cut(some, 200, 40)
        return time.process_time() - started

    patterns()
    assert seconds(text) < 20 * seconds(text[:100_000]) + 0.5  # ten times the text


def test_one_word_of_a_million_letters_becomes_passages():
    # 10,000 words of 100 letters; passages of 200 begin every 160: 62 of them reach word 9,960, one more ends
    passages = cut("a" * 1_000_000, 200, 40)
    assert len(passages) == 63
    assert {len(passage) for passage in passages[:-1]} == {20_000}
    assert len(passages[-1]) == (10_000 - 62 * 160) * 100


DOCUMENTS = pa.table(
    {
        "document_id": ["a", "b"],
        "text": pa.array(["1 2 3 4 5 6 7 8 9 10", "short"], pa.large_string()),
        "title": ["A", None],
    }
)
EIGHT = EncodeConfig(passage_words=8, passage_overlap=2)


@pytest.mark.parametrize("form", [DOCUMENTS, DOCUMENTS.to_batches()[0]])
def test_a_document_has_a_row_a_passage_with_all_its_columns(form):
    assert rows_of(form, EIGHT).to_pydict() == {
        "document_id": ["a", "a", "b"],
        "text": ["1 2 3 4 5 6 7 8", "7 8 9 10", "short"],
        "title": ["A", "A", None],
        "passage": [0, 1, 0],
    }
    assert rows_of(form, EIGHT).schema.field("text").type == pa.large_string()


def test_without_passage_words_documents_are_rows():
    assert rows_of(DOCUMENTS, EncodeConfig()) == DOCUMENTS


def test_no_documents_are_no_rows():
    assert rows_of(DOCUMENTS.slice(0, 0), EIGHT).column_names == [*DOCUMENTS.column_names, "passage"]


def test_documents_with_a_column_of_that_name_are_refused():
    named = DOCUMENTS.append_column("passage", pa.array([1, 2]))
    with pytest.raises(InputError, match=r"a column 'passage', which encode\.passage_words makes"):
        rows_of(named, EIGHT)
    assert rows_of(named, EncodeConfig()) == named
