"""The words that BM25 sees in several languages, and its scores against bm25s's own."""

import bm25s
import numpy as np
import pytest

from pipeline.bm25 import bm25_scores, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A quick fox's I/O", ["a", "quick", "fox", "s", "i", "o"]),  # one-letter words, no stopwords
        ("read_csv", ["read", "csv"]),
        ("Straße STRASSE", ["strasse", "strasse"]),
        ("ＡＢＣ １２３", ["abc", "123"]),  # full width
        ("naïve nai\u0308ve", ["naïve", "naïve"]),  # composed and decomposed
        ("हिन्दी में", ["हिन्दी", "में"]),  # vowel signs are no word ends
        ("한국어 검색", ["한국", "국어", "검색"]),
        ("가", ["가"]),
        ("東京タワー", ["東京", "京タ", "タワ", "ワー"]),
        ("ｶﾞｷﾞ", ["ガギ"]),  # half width, voice marks apart
        ("模型PyTorch人", ["模型", "pytorch", "人"]),
        ("東京・大阪", ["東京", "大阪"]),  # the middle dot separates
        ("ภาษา", ["ภา", "าษ", "ษา"]),
        ("... — !", []),
    ],
)
def test_words_in_many_scripts(text, expected):
    assert words(text) == expected


DOCUMENTS = ["red fox red", "red hen", "blue fox", "", "한국어 검색", "green owl by the blue sea"]
QUERIES = ["red fox fox unknown", "검색", "nothing shared", "", "the sea"]


def test_scores_are_those_of_bm25s_one_query_at_a_time():
    retriever = bm25s.BM25()
    retriever.index([words(text) for text in DOCUMENTS], show_progress=False)
    known = [[w for w in words(query) if w in retriever.vocab_dict] for query in QUERIES]
    expected = [retriever.get_scores(w) if w else np.zeros(len(DOCUMENTS)) for w in known]
    np.testing.assert_allclose(bm25_scores(QUERIES, DOCUMENTS)(np.arange(5)), expected, rtol=1e-6)


def test_only_documents_that_share_a_word_score_above_zero():
    found = bm25_scores(QUERIES, DOCUMENTS)(np.arange(5)) > 0
    assert [np.flatnonzero(row).tolist() for row in found] == [[0, 1, 2], [4], [], [], [5]]


def test_any_block_of_queries_may_be_asked_in_any_order():
    score = bm25_scores(QUERIES, DOCUMENTS)
    np.testing.assert_array_equal(score(np.array([4, 0]))[1], score(np.array([0]))[0])


def test_documents_with_the_same_words_score_exactly_alike():
    scores = bm25_scores(["red fox"], ["red fox", "fox, Red!", "hen"])(np.array([0]))[0]
    assert scores[0] == scores[1] > 0


def test_documents_without_any_word_score_zero():
    assert bm25_scores(["fox"], ["...", "!"])(np.array([0])).tolist() == [[0.0, 0.0]]
