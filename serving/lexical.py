"""Search by words: BM25 over a version's titles and texts, one query at a time in a few milliseconds."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.bm25 import Bm25, words

SPARSE_BELOW = 0.05  # postings of a query as a share of the rows: fewer are sorted, more are added up
MAX_WORDS = 64  # of a query, the rarest: a pasted page would walk through every posting there is
K1, B = 1.5, 0.75  # pipeline.bm25's
MEASURED = (
    1_000  # texts whose words are counted for their mean number, and behind them every MEASURED_EACH-th
)
MEASURED_EACH = 64

Rows = np.ndarray
WordCounts = tuple[np.ndarray, np.ndarray]  # hashes int64 (n,) of a text's words, how often float32 (n,)


@dataclass(frozen=True)
class Counted:
    """How often some documents, which the index has not, have which words.

    Attributes:
        hashes: int64 (n_postings,), of a word.
        counts: float32 (n_postings,), how often the document has it.
        owners: int32 (n_postings,), the document's number.
        lengths: float32 (n_documents,), words.
    """

    hashes: np.ndarray
    counts: np.ndarray
    owners: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, documents: Sequence[WordCounts]) -> "Counted":
        hashes = np.concatenate([np.empty(0, np.int64), *(each for each, _ in documents)])
        counts = np.concatenate([np.empty(0, np.float32), *(each for _, each in documents)])
        owners = np.repeat(np.arange(len(documents), dtype=np.int32), [len(each) for each, _ in documents])
        return cls(hashes, counts, owners, np.array([each.sum() for _, each in documents], np.float32))


def counts_of(text: str) -> WordCounts:
    found = Counter(words(text))
    hashes = np.fromiter((hash(word) for word in found), np.int64, len(found))
    return hashes, np.fromiter(found.values(), np.float32, len(found))


class Lexical:
    """The same words and the same scores as the report's BM25.

    A word's postings are one slice of a sparse matrix. Few postings are sorted by row and summed; many are
    added into one row of all documents: 6 MB at 1.5 million, once a query and not once a word.
    """

    def __init__(self, index: Bm25, mean_words: float) -> None:
        self._words, table = index.words, index.scores
        self._starts, self._rows, self._scores = table.indptr, table.indices, table.data
        self._n_rows, self._mean_words = table.shape[1], mean_words

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Lexical":
        lengths: list[int] = []
        index = Bm25.of(_measured(texts, lengths))
        return cls(index, sum(lengths) / len(lengths) if any(lengths) else 1.0)

    def best(
        self, query: str, k: int, keep: Callable[[Rows], np.ndarray] | None = None
    ) -> list[tuple[int, float]]:
        """The rows that share words with a query, best first; of equal scores the earlier row comes first.

        Args:
            keep: rows int64 (n,) -> bool (n,), whether each may be found; None: each may.

        Returns:
            At most k pairs of row and score, every score above 0.
        """
        rows, scores = self._summed(query)
        if keep is not None and len(rows):
            kept = keep(rows)
            rows, scores = rows[kept], scores[kept]
        if len(rows) > k:
            least = np.partition(scores, len(scores) - k)[len(scores) - k]
            contending = scores >= least  # all that tie with the last one
            rows, scores = rows[contending], scores[contending]
        order = np.lexsort((rows, -scores))[:k]
        return list(zip(rows[order].tolist(), scores[order].tolist(), strict=True))

    def scores_of(self, query: str, others: Counted) -> np.ndarray:
        """float32 (n_documents,): what documents beside the index score, each as though it were a row of it.

        A word that no row has counts as one that a single row has: as the rarest.
        """
        counts = Counter(words(query))
        n_rows = {word: max(1, self._n_rows_with(word)) for word in counts}
        damping = K1 * (1 - B + B * others.lengths / self._mean_words)
        sums = np.zeros(len(others.lengths))
        for word in sorted(counts, key=n_rows.__getitem__)[:MAX_WORDS]:
            at = np.flatnonzero(others.hashes == hash(word))
            owners, found = others.owners[at], others.counts[at]
            rarity = math.log(1 + (max(1, self._n_rows) - n_rows[word] + 0.5) / (n_rows[word] + 0.5))
            sums[owners] += counts[word] * rarity * found / (found + damping[owners])
        return sums.astype(np.float32)

    def _n_rows_with(self, word: str) -> int:
        at = self._words.get(word)
        return 0 if at is None else int(self._starts[at + 1] - self._starts[at])

    def _summed(self, query: str) -> tuple[Rows, np.ndarray]:
        """Rows ascending, int64 (n,), and what their words add up to, float32 (n,)."""
        counts = Counter(self._words[word] for word in words(query) if word in self._words)
        lengths = {word: int(self._starts[word + 1] - self._starts[word]) for word in counts}
        chosen = sorted((word for word in counts if lengths[word]), key=lengths.__getitem__)[:MAX_WORDS]
        if not chosen:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        parts = [slice(self._starts[word], self._starts[word + 1]) for word in chosen]
        if sum(lengths[word] for word in chosen) < SPARSE_BELOW * self._n_rows:
            rows, place = np.unique(np.concatenate([self._rows[part] for part in parts]), return_inverse=True)
            weighted = [self._scores[part] * counts[word] for part, word in zip(parts, chosen, strict=True)]
            sums = np.bincount(place, np.concatenate(weighted), len(rows))
            return rows.astype(np.int64), sums.astype(np.float32)
        sums = np.zeros(self._n_rows)
        for part, word in zip(parts, chosen, strict=True):
            sums[self._rows[part]] += self._scores[part] * counts[word]
        rows = np.flatnonzero(sums > 0)
        return rows, sums[rows].astype(np.float32)


def _measured(texts: Iterable[str], lengths: list[int]) -> Iterator[str]:
    """The texts; how many words some of them have goes into `lengths`."""
    for number, text in enumerate(texts):
        if number < MEASURED or not number % MEASURED_EACH:
            lengths.append(len(words(text)))
        yield text
