"""BM25 over documents in any language: the words it sees, and its scores for blocks of queries."""

import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np


def bm25_scores(queries: Sequence[str], documents: Sequence[str]) -> Callable[[np.ndarray], np.ndarray]:
    """Scores by BM25 as Lucene computes it (k1 1.5, b 0.75); 0 where no word is shared.

    bm25s keeps one number a (word, document), to be summed over a query's words. A sparse product does
    that for a block of queries; its own `get_scores` does one query at a time, many times slower.
    """
    import bm25s
    from scipy import sparse

    vocabulary: dict[str, int] = {"": 0}  # bm25s wants the empty word, and cannot index none at all
    ids = [[vocabulary.setdefault(w, len(vocabulary)) for w in words(text)] for text in documents]
    if len(vocabulary) == 1:
        return lambda rows: np.zeros((len(rows), len(documents)), np.float32)
    retriever = bm25s.BM25()
    retriever.index((ids, vocabulary), show_progress=False)
    postings = retriever.scores  # documents x words by column, so words x documents by row
    table = sparse.csr_array(
        (postings["data"], postings["indices"], postings["indptr"]),
        shape=(len(postings["indptr"]) - 1, len(documents)),
    )

    def score(rows: np.ndarray) -> np.ndarray:
        asked = [[vocabulary[w] for w in words(queries[row]) if w in vocabulary] for row in rows]
        columns = np.concatenate([np.asarray(a, np.int64) for a in asked])
        lines = np.repeat(np.arange(len(asked)), [len(a) for a in asked])
        times = sparse.coo_array(
            (np.ones(len(columns), np.float32), (lines, columns)), shape=(len(asked), table.shape[0])
        )
        return (times.tocsr() @ table).toarray()

    return score


def words(text: str) -> list[str]:
    """The words of a text as BM25 sees them: no stopword list, one-letter words kept, case folded.

    Underscores separate, as in the models' tokenizers: `read_csv` is found by "csv".

    Scripts written without spaces between words (Han, Kana, Thai, ...), and Hangul, whose endings stick
    to the word, become pairs of neighbouring characters; a character alone stays one.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    found: list[str] = []
    for match in _pattern().finditer(folded):
        run = match.group()
        if match.lastgroup == "word" or len(run) == 1:
            found.append(run)
        else:
            found.extend(run[i : i + 2] for i in range(len(run) - 1))
    return found


@cache
def _pattern() -> re.Pattern[str]:
    # Python's \w leaves out combining marks, which would cut every Hindi word at its vowel signs.
    characters = map(chr, range(sys.maxunicode + 1))
    marks = "".join(c for c in characters if unicodedata.category(c).startswith("M"))
    pairs = (
        "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
        "\u1100-\u11ff\u3131-\u318e\uac00-\ud7ff"  # Hangul
        "\u3005-\u3007\u3040-\u30fa\u30fc-\u30ff\u31f0-\u31ff"  # Kana
        "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    )
    return re.compile(f"(?P<pairs>[{pairs}]+)|(?P<word>(?:[^\\W_{pairs}]+|[{marks}])+)")
