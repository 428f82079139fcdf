"""Search by words: BM25 over a version's titles and texts, one query at a time in a few milliseconds."""

from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np

from pipeline.bm25 import Bm25, words

SPARSE_BELOW = 0.05  # postings of a query as a share of the rows: fewer are sorted, more are added up
MAX_WORDS = 64  # of a query, the rarest: a pasted page would walk through every posting there is

Rows = np.ndarray


class Lexical:
    """The same words and the same scores as the report's BM25.

    A word's postings are one slice of a sparse matrix. Few postings are sorted by row and summed; many are
    added into one row of all documents: 6 MB at 1.5 million, once a query and not once a word.
    """

    def __init__(self, index: Bm25) -> None:
        self._words, table = index.words, index.scores
        self._starts, self._rows, self._scores = table.indptr, table.indices, table.data
        self._n_rows = table.shape[1]

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Lexical":
        return cls(Bm25.of(texts))

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
