"""From a text to documents over one version: search, what is related to documents, and passages as context.

Dense and lexical answers are fused by reciprocal rank; fresh documents join the dense ones by score; what is
removed, filtered out or below its own threshold takes nobody's place.
"""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pipeline.bm25 import words
from pipeline.errors import InputError
from serving.ask import is_match
from serving.errors import ServingError
from serving.index_backends import Found, IndexBackend
from serving.lexical import Lexical
from serving.published import Catalogue, title_of

if TYPE_CHECKING:
    from serving.encoding import Encoding
    from serving.fresh import FreshDocuments

RRF_K = 60  # as in the report
WINDOW = 100  # the first so many of each system are fused: behind them a term is below 1 / 160
MOST = 1000  # results of one request to an index: its own index.max_k unless it was set
MAX_HIDDEN = 64  # ids that are asked for beyond and left out here; more are excluded by the index itself
MAX_FILTER_IDS = 10_000  # ids that one request of a person may name
RECENCY = 0.7  # a document read before another counts so much less
MAX_SEEDS = 50  # documents that `related` starts from
SHOWN_SESSIONS = 3  # other results that a result says it was read with
WORDS_TO_TOKENS = 4 / 3  # tokens a word where nobody can count them
CONTEXT_WINDOW = 50  # documents that passages are taken from

T = TypeVar("T")
Keep = Callable[[Mapping[str, Any]], bool]  # whether a document may be found


@dataclass(frozen=True)
class Filter:
    """What may be found.

    Attributes:
        allowed: document ids; None: all.
        minimum_score: of the dense score, whatever found the document.
        language: one of the catalogue's.
    """

    allowed: tuple[str, ...] | None = None
    excluded: tuple[str, ...] = ()
    minimum_score: float | None = None
    language: str | None = None


@dataclass(frozen=True)
class Hit:
    """One document found, and why.

    Attributes:
        row: of the catalogue; None: a fresh document.
        score: what the ranking is by: the dense score, or the fused one as a share of the best possible.
        sessions: which of the other results, or of what was asked about, readers had in the same session.
    """

    document: Mapping[str, Any]
    row: int | None
    score: float
    dense: float | None = None
    dense_rank: int | None = None
    lexical: float | None = None
    lexical_rank: int | None = None
    sessions: list[dict[str, Any]] = field(default_factory=list)

    @property
    def document_id(self) -> str:
        return self.document["document_id"]


@dataclass(frozen=True)
class Passage:
    """One passage of a context.

    Attributes:
        n_tokens: of the text, as the answer's `counted_by` says.
        is_cut: only the first words of a passage that alone was too long.
    """

    document_id: str
    title: str
    url: str | None
    score: float
    text: str
    n_tokens: int
    is_cut: bool = False


@dataclass(frozen=True)
class _Dense:
    """A document near a vector: `fresh` holds what is in no version yet."""

    document_id: str
    score: float
    row: int | None = None
    fresh: Mapping[str, Any] | None = None


class Finder:
    """Searches one version; everything that a request sees belongs to it.

    Args:
        lexical: None: whatever is asked, nothing is searched by words.
        fresh: documents beside the version, as its encoder sees them; None: none are kept.
        threads: where searching by words runs, so that other requests go on.
    """

    def __init__(
        self,
        version: int,
        catalogue: Catalogue,
        encoding: "Encoding",
        backend: IndexBackend,
        lexical: Lexical | None = None,
        fresh: "FreshDocuments | None" = None,
        threads: Executor | None = None,
    ) -> None:
        self.version, self.catalogue, self.encoding, self.backend = version, catalogue, encoding, backend
        self._lexical, self._fresh, self._threads = lexical, fresh, threads
        self._hiding = _Hiding(frozenset(), frozenset(), ())

    async def search(
        self, query: str, k: int, wanted: Filter | None = None, *, hybrid: bool = False
    ) -> list[Hit]:
        """The k best documents for a text, best first.

        Raises:
            InputError: the filter names a language that the version has not.
            ServingError: the encoder or the index cannot answer.
        """
        scope = await self._scope_of(wanted or Filter())
        if not hybrid or self._lexical is None:
            [vector] = await self.encoding.queries([query])
            [dense] = await self._near(vector[np.newaxis], k, scope)
            return self._with_sessions(self._dense_hits(dense[:k], vector))
        by_words = asyncio.ensure_future(self._in_thread(self._by_words, query, scope))
        try:
            [vector] = await self.encoding.queries([query])  # while words are looked for
            [dense] = await self._near(vector[np.newaxis], max(k, WINDOW), scope)
        except BaseException:
            by_words.cancel()
            raise
        lexical, others = await self._matching(await by_words, dense, vector, scope)
        return self._with_sessions(self._fused(dense, lexical, others, vector)[:k])

    async def related(self, document_ids: Sequence[str], k: int) -> list[Hit]:
        """What to read after some documents, which are not among it.

        Each document is searched for by its own stored vector, and a candidate's scores are summed, the
        latest document's in full and each earlier one's at RECENCY of the next. The mean of the vectors would
        be one search instead of several; but whoever read of two subjects has a mean that lies near neither,
        where the sum still finds each subject's own. What readers had in the same session is a second
        ranking, fused by reciprocal rank; a version without related.parquet has the first alone.

        Args:
            document_ids: latest first; one that comes twice counts at its first place.

        Raises:
            InputError: no document, too many, or one that is neither in the version nor fresh.
            ServingError: as `search`.
        """
        seeds = list(dict.fromkeys(document_ids))
        if not 1 <= len(seeds) <= MAX_SEEDS:
            raise InputError(f"document_ids has {len(seeds)} documents; wanted 1 to {MAX_SEEDS}")
        vectors = await self._vectors_of(seeds)
        scope = await self._scope_of(Filter(excluded=tuple(seeds)))
        near = await self._near(vectors, max(k, WINDOW), scope)
        weights = [RECENCY**place for place in range(len(seeds))]
        dense = _summed(near, weights)
        read = self._co_read(seeds, weights, scope)
        if not read:
            return self._with_sessions(self._dense_hits(dense[:k]), seeds)
        known = {each.document_id for each in dense}
        others = {
            name: _Dense(name, math.nan, self.catalogue.row_of(name)) for name in read if name not in known
        }
        hits = self._fused(dense, read, others)[:k]
        unnamed = [replace(hit, lexical=None, lexical_rank=None, dense=_number(hit.dense)) for hit in hits]
        return self._with_sessions(unnamed, seeds)

    async def context(
        self, query: str, max_tokens: int, *, hybrid: bool = False
    ) -> tuple[list[Passage], str]:
        """The best passages that fit into a budget, for a language model's prompt.

        A passage that does not fit is left out and the next is tried: none is cut, unless nothing fits: then
        the first one is.

        Returns:
            The passages, best first, and what their tokens were counted by.

        Raises:
            ServingError: as `search`.
        """
        hits = await self.search(query, CONTEXT_WINDOW, hybrid=hybrid)
        count, counted_by = await self._in_thread(self._counter)
        return await self._in_thread(_fitting, hits, max_tokens, count), counted_by

    @property
    def has_lexical(self) -> bool:
        return self._lexical is not None

    # --- Near a vector --------------------------------------------------------------------------------

    async def _near(self, vectors: np.ndarray, n: int, scope: "_Scope") -> list[list[_Dense]]:
        """At least n documents for each vector, or all that there are: the index's and the fresh, by score.

        More are asked for than wanted, as much as must be left out again; where thresholds or a language take
        more than that, once more with four times as many.
        """
        ask = n + scope.n_beyond + (n if self.catalogue.has_thresholds else 0)
        ask = min(MOST, ask * (4 if scope.is_thin else 1))
        while True:
            found = await self.backend.search(
                vectors, ask, version=self.version, allowed=scope.asked_for, excluded=scope.asked_without
            )
            lines = self._good(found, scope)
            is_done = ask >= MOST or all(
                len(line) >= n or _ends(scores, ids, scope.minimum_score)
                for line, scores, ids in zip(lines, *found, strict=True)
            )
            if is_done:
                break
            ask = min(MOST, 4 * ask)
        fresh = await self._fresh_near(vectors, n, scope, scope.keep_fresh)
        return [_merged(line, new) for line, new in zip(lines, fresh, strict=True)]

    async def _fresh_near(
        self, vectors: np.ndarray, n: int, scope: "_Scope", keep: Keep | None
    ) -> list[list[_Dense]]:
        """The n best fresh documents for each vector."""
        if self._fresh is None or not self._fresh.n_documents:
            return [[] for _ in vectors]
        found = await self._in_thread(self._fresh.search, vectors, n, keep)
        return [
            [_Dense(each["document_id"], score, None, each) for score, each in line if scope.is_enough(score)]
            for line in found
        ]

    def _good(self, found: Found, scope: "_Scope") -> list[list[_Dense]]:
        """What of an answer may be shown, still best first."""
        lines = []
        for scores, ids in zip(*found, strict=True):
            line = []
            for score, name in zip(scores.tolist(), ids, strict=True):
                if name and name not in scope.excluded and scope.is_enough(score):
                    row = self._row(name)
                    if scope.passes_row(row) and self._reaches_threshold(row, score):
                        line.append(_Dense(name, score, row))
            lines.append(line)
        return lines

    def _row(self, document_id: str) -> int:
        row = self.catalogue.row_of(document_id)
        if row is None:
            raise ServingError(
                f"the index answered with {document_id!r}, which version {self.version} in --model_base_path "
                "lacks: is it the folder that the index server watches?",
                502,
            )
        return row

    def _reaches_threshold(self, row: int, score: float) -> bool:
        return not self.catalogue.has_thresholds or is_match(
            score, {"threshold": self.catalogue.value(row, "threshold")}
        )

    def _dense_hits(self, dense: Sequence[_Dense], vector: np.ndarray | None = None) -> list[Hit]:
        return [
            Hit(self._document(each, vector), each.row, each.score, each.score, rank)
            for rank, each in enumerate(dense, 1)
        ]

    def _document(self, each: _Dense, vector: np.ndarray | None = None) -> Mapping[str, Any]:
        """A document as it is shown; of several passages the one nearest to the vector, where rows tell."""
        if each.fresh is not None:
            return each.fresh
        row = self._row(each.document_id) if each.row is None else each.row
        if vector is not None and self.catalogue.has_passages and self.catalogue.rows is not None:
            rows = self.catalogue.rows_of(each.document_id)
            row = rows[int(np.argmax(self.catalogue.rows[rows] @ vector))]
        return self.catalogue.documents([row])[0]

    # --- By words -------------------------------------------------------------------------------------

    def _by_words(self, query: str, scope: "_Scope") -> dict[str, float]:
        """{document_id: score} of the first WINDOW, best first.

        Fresh documents score by the version's own statistics: their words are what the version is not
        searched for yet, new names above all, and by the vectors alone each would lose half of its score.
        """
        assert self._lexical is not None
        n_rows = WINDOW * (4 if self.catalogue.has_passages else 1) + len(scope.excluded)
        found: dict[str, float] = {}
        for row, score in self._lexical.best(query, n_rows, scope.keep):
            name = self.catalogue.id_of(row)
            if name not in scope.excluded:
                found.setdefault(name, score)
        if self._fresh is not None and self._fresh.n_documents:
            scores_of = partial(self._lexical.scores_of, query)
            fresh = self._fresh.by_words(scores_of, WINDOW, scope.keep_fresh)
            found |= {each["document_id"]: score for score, each in fresh}
        return dict(sorted(found.items(), key=lambda item: -item[1])[:WINDOW])

    async def _matching(
        self, lexical: dict[str, float], dense: list[_Dense], vector: np.ndarray, scope: "_Scope"
    ) -> tuple[dict[str, float], dict[str, _Dense]]:
        """What words found and the vector did not, with its dense score: thresholds are of that.

        Returns:
            The lexical answer without documents below their threshold, and those that are not in `dense`.
        """
        known = {each.document_id for each in dense}
        missing = lexical.keys() - known
        if not missing:
            return lexical, {}
        one, n = vector[np.newaxis], len(missing)
        [fresh] = await self._fresh_near(one, n, scope, lambda each: each["document_id"] in missing)
        others = {each.document_id: each for each in fresh}
        published = sorted(missing - others.keys())
        if published:
            found = await self.backend.search(one, len(published), version=self.version, allowed=published)
            [line] = self._good(found, scope)
            others |= {each.document_id: each for each in line}
        return {name: s for name, s in lexical.items() if name in known or name in others}, others

    def _fused(
        self,
        dense: list[_Dense],
        ranked: Mapping[str, float],
        others: Mapping[str, _Dense],
        vector: np.ndarray | None = None,
    ) -> list[Hit]:
        """Two rankings in one, best first; of equal ones the dense score decides, then the id."""
        by_id = {each.document_id: each for each in dense} | dict(others)
        dense_ranks = {each.document_id: rank for rank, each in enumerate(dense, 1)}
        ranks = {name: rank for rank, name in enumerate(ranked, 1)}
        scores = _reciprocal_ranks({each.document_id: each.score for each in dense}, ranked)
        order = sorted(by_id, key=lambda name: (-scores[name], -_sortable(by_id[name].score), name))
        return [
            Hit(
                self._document(by_id[name], vector),
                by_id[name].row,
                scores[name],
                by_id[name].score,
                dense_ranks.get(name),
                ranked.get(name),
                ranks.get(name),
            )
            for name in order
        ]

    # --- Sessions -------------------------------------------------------------------------------------

    async def _vectors_of(self, seeds: Sequence[str]) -> np.ndarray:
        """Unit vectors of documents, float32 (n, dim): stored ones, else of their texts encoded now."""
        rows = {name: self.catalogue.rows_of(name) for name in seeds}
        vectors: dict[str, np.ndarray] = {}
        texts: dict[str, list[str]] = {}
        for name in seeds:
            fresh = self._fresh.document(name) if self._fresh is not None else None
            vector = self._fresh.vector(name) if self._fresh is not None else None
            if vector is not None:
                vectors[name] = vector
            elif fresh is not None:  # it still waits for this version's encoder
                texts[name] = [fresh["text"]]
            elif not rows[name] or name in self._hidden().ids:
                raise InputError(f"document_ids: version {self.version} has no document {name!r}")
            elif self.catalogue.rows is not None:
                vectors[name] = np.asarray(self.catalogue.rows[rows[name]], np.float32).mean(axis=0)
            else:
                texts[name] = [d["text"] or "" for d in self.catalogue.documents(rows[name])]
        if texts:
            encoded = await self.encoding.documents([text for some in texts.values() for text in some])
            ends = np.cumsum([len(some) for some in texts.values()])[:-1]
            parts = np.split(encoded, ends)
            vectors |= {name: part.mean(axis=0) for name, part in zip(texts, parts, strict=True)}
        found = np.stack([vectors[name] for name in seeds])
        lengths = np.linalg.norm(found, axis=1, keepdims=True)
        return (found / np.maximum(lengths, 1e-12)).astype(np.float32)

    def _co_read(self, seeds: Sequence[str], weights: Sequence[float], scope: "_Scope") -> dict[str, float]:
        """{document_id: readers it shares with the seeds, by recency}, most first; at most WINDOW."""
        total: dict[str, float] = {}
        for name, weight in zip(seeds, weights, strict=True):
            row = self.catalogue.row_of(name)
            for each in self.catalogue.co_read(row) if row is not None else []:
                other = self.catalogue.id_of(each["row"])
                if other not in scope.excluded:
                    total[other] = total.get(other, 0.0) + weight * each["n_readers"]
        return dict(sorted(total.items(), key=lambda item: (-item[1], item[0]))[:WINDOW])

    def _with_sessions(self, hits: list[Hit], seeds: Sequence[str] = ()) -> list[Hit]:
        """Each result with those others, or those seeds, that readers had in a session with it."""
        shown = {self.catalogue.row_of(hit.document_id): hit.document for hit in hits if hit.row is not None}
        for name in seeds:
            row = self.catalogue.row_of(name)
            if row is not None:
                shown[row] = self.catalogue.documents([row])[0]
        return [replace(hit, sessions=self._sessions_of(hit, shown)) for hit in hits]

    def _sessions_of(self, hit: Hit, shown: Mapping[int | None, Mapping[str, Any]]) -> list[dict[str, Any]]:
        row = self.catalogue.row_of(hit.document_id) if hit.row is not None else None
        found = self.catalogue.co_read(row) if row is not None else []
        return [
            {
                "document_id": shown[each["row"]]["document_id"],
                "title": title_of(shown[each["row"]]),
                "n_readers": each["n_readers"],
                "n_sessions": each["n_sessions"],
            }
            for each in found
            if each["row"] in shown
        ][:SHOWN_SESSIONS]

    # --- What may be found ----------------------------------------------------------------------------

    def _hidden(self) -> "_Hiding":
        """Removed documents, and published ones that a fresh one takes the place of."""
        by = self._fresh.hides if self._fresh is not None else frozenset()
        if by is not self._hiding.by:  # looked up once a change
            ids = self.catalogue.among(by)
            self._hiding = _Hiding(by, frozenset(ids), tuple(sorted(ids)))
        return self._hiding

    async def _in_thread(self, do: Callable[..., T], *given: Any) -> T:
        """What takes milliseconds, while other requests go on."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, do, *given)

    async def _scope_of(self, wanted: Filter) -> "_Scope":
        if wanted.allowed is None and wanted.language is None:
            return self._scope(wanted)
        return await self._in_thread(self._scope, wanted)  # thousands of ids are looked up

    def _scope(self, wanted: Filter) -> "_Scope":
        hidden = self._hidden()
        in_language = None
        if wanted.language is not None:
            if wanted.language not in self.catalogue.languages:
                known = ", ".join(self.catalogue.languages[:20]) or "none: its documents have no such column"
                raise InputError(
                    f"filter.language is {wanted.language!r}; version {self.version} has {known}"
                )
            in_language = self.catalogue.rows_in_language(wanted.language)
        rows = in_language
        if wanted.allowed is not None:
            rows = self.catalogue.rows_in(wanted.allowed)
            if in_language is not None:
                rows = np.intersect1d(rows, in_language)
        allowed = None
        if rows is not None and (wanted.allowed is not None or len(rows) <= MAX_FILTER_IDS):
            allowed = tuple(dict.fromkeys(self.catalogue.id_of(row) for row in rows.tolist()))
        if not wanted.excluded:
            return _Scope(wanted, rows, allowed, hidden.ids, hidden.ordered)
        excluded = hidden.ids.union(wanted.excluded)
        return _Scope(wanted, rows, allowed, excluded, tuple(sorted(excluded)))

    def _counter(self) -> tuple[Callable[[str], int], str]:
        """How a passage's tokens are counted, and what to say of it."""
        of_a_query = self.encoding.tokens("a")
        if of_a_query is None:
            return _estimated, "words x 4/3: the encoder does not count tokens"
        # A query's prompt and marks, which are in no prompt of a language model. "a" is one token everywhere;
        # the prompt alone may have one more, of the space that it ends in.
        n_around = of_a_query - 1
        return (lambda text: (self.encoding.tokens(text) or 0) - n_around), "the encoder's tokenizer"


@dataclass(frozen=True)
class _Hiding:
    """What the index must not answer with.

    Attributes:
        by: all ids that the fresh documents hide, as they say it.
        ids: those of them that the version may hold; most of `by` are of fresh documents, which it does not.
        ordered: the same, sorted.
    """

    by: frozenset[str]
    ids: frozenset[str]
    ordered: tuple[str, ...]


@dataclass(frozen=True)
class _Scope:
    """A filter as one version sees it.

    Attributes:
        rows: what may be found, ascending; None: every row.
        allowed: the same as ids, for the index; None: it is not told, and its answers are looked through.
        excluded: ids, the hidden ones among them.
        ordered: the same, sorted: equal ones go to the index together.
    """

    wanted: Filter
    rows: np.ndarray | None
    allowed: tuple[str, ...] | None
    excluded: frozenset[str]
    ordered: tuple[str, ...]

    @property
    def minimum_score(self) -> float | None:
        return self.wanted.minimum_score

    @property
    def asked_for(self) -> tuple[str, ...] | None:
        return self.allowed

    @property
    def asked_without(self) -> tuple[str, ...]:
        return self.ordered if len(self.excluded) > MAX_HIDDEN else ()

    @property
    def n_beyond(self) -> int:
        """Documents to ask for beyond those wanted, as they may be left out again."""
        return len(self.excluded) if len(self.excluded) <= MAX_HIDDEN else 0

    @property
    def is_thin(self) -> bool:
        """Whether the index answers with documents of every kind, and some are looked for."""
        return self.rows is not None and self.allowed is None

    def is_enough(self, score: float) -> bool:
        return self.minimum_score is None or score >= self.minimum_score

    def passes_row(self, row: int) -> bool:
        return not self.is_thin or bool(self.keep(np.array([row]))[0])

    def keep(self, rows: np.ndarray) -> np.ndarray:
        """bool (n,): which rows are among those that may be found."""
        if self.rows is None:
            return np.ones(len(rows), bool)
        if not len(self.rows):
            return np.zeros(len(rows), bool)
        at = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        return self.rows[at] == rows

    @cached_property
    def keep_fresh(self) -> Keep | None:
        """Whether a fresh document may be found; None: each may."""
        wanted = self.wanted
        if wanted.allowed is None and not wanted.excluded and wanted.language is None:
            return None
        allowed = None if wanted.allowed is None else frozenset(wanted.allowed)
        excluded = frozenset(wanted.excluded)

        def keep(document: Mapping[str, Any]) -> bool:
            name = document["document_id"]
            is_spoken = wanted.language is None or document.get("language") == wanted.language
            return is_spoken and name not in excluded and (allowed is None or name in allowed)

        return keep


def _ends(scores: np.ndarray, ids: Sequence[str], minimum_score: float | None) -> bool:
    """Whether asking for more would find nothing more."""
    return not ids or not ids[-1] or (minimum_score is not None and float(scores[-1]) < minimum_score)


def _merged(line: list[_Dense], fresh: list[_Dense]) -> list[_Dense]:
    """Both by score; of equal ones the published document comes first.

    A fresh document that came while the index was asked takes the place of the published one here.
    """
    names = {each.document_id for each in fresh}
    published = [each for each in line if each.document_id not in names]
    return sorted([*published, *fresh], key=lambda each: -each.score)


def _summed(lines: Sequence[Sequence[_Dense]], weights: Sequence[float]) -> list[_Dense]:
    """Each document's weighted scores over several searches, as a share of all weight; best first."""
    total: dict[str, float] = {}
    first: dict[str, _Dense] = {}
    for line, weight in zip(lines, weights, strict=True):
        for each in line:
            total[each.document_id] = total.get(each.document_id, 0.0) + weight * each.score
            first.setdefault(each.document_id, each)
    order = sorted(total, key=lambda name: (-total[name], name))
    return [replace(first[name], score=total[name] / sum(weights)) for name in order]


def _reciprocal_ranks(dense: Mapping[str, float], ranked: Mapping[str, float]) -> dict[str, float]:
    """Reciprocal rank fusion as the report computes it, divided by what the first of both would have."""
    from pipeline.hybrid import fused

    pool = list(dict.fromkeys([*dense, *ranked]))
    systems = [np.array([[system.get(name, -np.inf) for name in pool]]) for system in (dense, ranked)]
    [scores] = fused(systems, RRF_K) * (RRF_K + 1) / 2
    return dict(zip(pool, scores.tolist(), strict=True))


def _sortable(score: float) -> float:
    return -math.inf if math.isnan(score) else score


def _number(score: float | None) -> float | None:
    return None if score is None or math.isnan(score) else score


def _fitting(hits: Sequence[Hit], max_tokens: int, count: Callable[[str], int]) -> list[Passage]:
    """The passages of `context`."""
    chosen: list[Passage] = []
    left = max_tokens
    for hit in hits:
        text = str(hit.document.get("text") or "").strip()
        n = count(text) if text else 0
        if text and n <= left:
            chosen.append(_passage(hit, text, n))
            left -= n
    if not chosen and hits:
        text = _cut(str(hits[0].document.get("text") or ""), max_tokens, count)
        if text:
            chosen.append(replace(_passage(hits[0], text, count(text)), is_cut=True))
    return chosen


def _passage(hit: Hit, text: str, n_tokens: int) -> Passage:
    url = hit.document.get("url")
    return Passage(hit.document_id, title_of(hit.document), url, hit.score, text, n_tokens)


def _estimated(text: str) -> int:
    """Tokens by words; in scripts without spaces a pair of neighbouring letters counts as a word."""
    return math.ceil(len(words(text)) * WORDS_TO_TOKENS)


def _cut(text: str, max_tokens: int, count: Callable[[str], int]) -> str:
    """The longest beginning of a text within the budget, at a space where it has any."""
    low, high = 0, len(text)
    while low < high:  # the count grows with the text
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(text[:middle]) <= max_tokens else (low, middle - 1)
    if low == len(text):
        return text.strip()
    kept = text[:low]
    at_a_space = kept.rpartition(" ")[0] if not text[low].isspace() else kept
    return (at_a_space or kept).strip()
