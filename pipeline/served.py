"""The graph that answers from a built index: its searcher, its stored rows, its signatures.

Importing this imports TensorFlow. Candidates are rescored in the graph, block by block, from one copy of the
rows, which `exact` reads too. The searcher holds codes alone, and all signatures share one: it is made when a
SavedModel is loaded, so that no request makes it and none carries what it is made from.

Row -1 stands for no row, inside this module.

A document in several passages is several rows with one id. `search`, `exact` and `search_filtered` answer by
documents: inside this module a document's number is its first row. `serving_default`, its batch, `find` and
`ask` answer by rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.config import Storage
from pipeline.scann_assets import Assets
from pipeline.stored_rows import BLOCK_ROWS, StoredRows

BLOCK_FLOATS = 1 << 19  # of gathered rows at once, 2 MB: more leaves the core's cache
BLOCK_SCORES = 1 << 22  # of exact search at once, 16 MB
PARALLEL_QUERIES = 256  # ScaNN gives so many to a thread; below that, threads only cost
NO_SCORE = float(np.finfo(np.float32).min)  # JSON knows no infinity


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may ask for at most; the graph refuses more, so that no request fills the memory."""

    queries: int = 4096
    k: int = 1000
    num_reordering_candidates: int = 10_000
    filter_ids: int = 100_000  # document ids in one filter

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"limit {name} is {value}, wanted at least 1")


class Served(tf.Module):
    """All tensors of an index version, and the functions that answer from them.

    Attributes:
        n_rows, dim: of the stored rows.
        has_tree: False: every search is exact, whatever it asks for.
        ids: tf.string (n_rows,), or None.
        documents: each row's document int32 (n_rows,), or None where no two rows have one id.
        n_documents: n_rows without `documents`.
    """

    def __init__(
        self,
        rows: np.ndarray,
        assets: Assets | None,
        ids: np.ndarray | None,
        *,
        storage: Storage,
        k: int,
        num_leaves_to_search: int,
        num_reordering_candidates: int,
        parallel: bool,
        limits: Limits,
        exact_below_allowed: int,
    ) -> None:
        super().__init__()
        self.n_rows, self.dim = rows.shape
        self.k, self.limits = k, limits
        self.num_leaves_to_search = num_leaves_to_search
        self.num_reordering_candidates = num_reordering_candidates
        self.exact_below_allowed = exact_below_allowed
        self.parallel = parallel
        self.has_tree = assets is not None
        self.rows = StoredRows(rows, storage)
        self.ids, self.hashes, self.hashed_rows = None, None, None
        self.n_documents = self.n_rows
        self.documents: Any = None
        if ids is not None:
            self.ids = tf.Variable(ids, trainable=False, dtype=tf.string)
            self.hashes, self.hashed_rows = _sorted_hashes(ids)
            self.n_documents = len(set(ids.tolist()))
            if self.n_documents < self.n_rows:
                self.documents = tf.Variable(_first_rows(ids), trainable=False)
        if assets is not None:
            self.n_entries = len(assets.owners)
            self.spills = self.n_entries > self.n_rows
            self.owners = tf.Variable(assets.owners, trainable=False) if self.spills else None
            self.searcher = Searcher(assets)
        self.at_loading: list[Any] = []

    def make(self) -> None:
        """Make the searcher in this process, if it is not there."""
        if self.has_tree:
            self.searcher.make()

    def release(self) -> None:
        if self.has_tree:
            self.searcher.release()

    def defaults(self, k: int) -> tuple[int, int]:
        """Leaves and candidates of a request that names none."""
        return self.num_leaves_to_search, max(self.num_reordering_candidates, k)

    def asking(self) -> Any:
        """`find` as one traced graph; no attribute, which a SavedModel would hold too."""
        number = tf.TensorSpec([], tf.int32)
        return _function(self.find, tf.TensorSpec([None, self.dim], tf.float32), number, number, number)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a SavedModel with every signature."""
        options = tf.saved_model.SaveOptions(namespace_whitelist=["Scann"])
        with contextlib.ExitStack() as stack:
            if self.has_tree:
                Path(folder).mkdir(parents=True, exist_ok=True)  # the assets' first copy lies here too
                assets = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
                self.at_loading = stack.enter_context(self.searcher.exported(assets))
                stack.callback(setattr, self, "at_loading", [])
            tf.saved_model.save(self, str(folder), signatures=self.signatures(), options=options)

    # Signatures

    def signatures(self) -> dict[str, Any]:
        """The functions to export, by name."""
        queries = tf.TensorSpec([None, self.dim], tf.float32, "queries")
        k = tf.TensorSpec([], tf.int32, "k")
        leaves = tf.TensorSpec([], tf.int32, "num_leaves_to_search")
        candidates = tf.TensorSpec([], tf.int32, "num_reordering_candidates")
        one = tf.TensorSpec([None], tf.float32, "input_1")
        made = {
            "serving_default": _function(self._serving_default, one),
            "serving_default_batch": _function(self._serving_default_batch, queries),
            "search": _function(self._search, queries, k, leaves, candidates),
            "exact": _function(self._exact, queries, k),
        }
        if self.ids is not None:
            allowed = tf.TensorSpec([None], tf.string, "allowed_document_ids")
            excluded = tf.TensorSpec([None], tf.string, "excluded_document_ids")
            minimum = tf.TensorSpec([], tf.float32, "minimum_score")
            made["search_filtered"] = _function(
                self._search_filtered, queries, k, leaves, candidates, allowed, excluded, minimum
            )
        return made

    def _serving_default(self, input_1: Any) -> dict[str, Any]:
        """As tfrs's own export answers: one query, and no more rows than were found."""
        width = {"width of a query": (tf.size(input_1), self.dim, self.dim)}
        query = _unless_outside(width | _finite(input_1), input_1)
        k = min(self.k, self.n_rows)
        if self.has_tree:
            leaves, candidates = self.defaults(k)
            with tf.init_scope():  # a number, not ops of each request
                n_entries = int(self._n_entries(k, candidates))
            scores, rows = self._find_one(query, k, n_entries, leaves)
        else:
            scores, rows = (found[0] for found in self.exact(query[tf.newaxis], k))
        return {"output_1": _any_rank(scores), "output_2": _any_rank(rows)}

    def _serving_default_batch(self, queries: Any) -> dict[str, Any]:
        """Several queries of `serving_default` at once, for a server that joins the requests of a moment.

        Answers are min(k, n_rows) wide: row -1 and NO_SCORE where fewer were found. ScaNN picks leaves for
        one query by another arithmetic than for several, so a query may have other candidates than alone.
        """
        k = min(self.k, self.n_rows)
        found = self.find(self._checked(queries), k, *self.defaults(k))
        scores, rows = (tf.ensure_shape(each, [None, k]) for each in found)
        return {"scores": scores, "rows": rows}

    def _search(
        self, queries: Any, k: Any, num_leaves_to_search: Any, num_reordering_candidates: Any
    ) -> dict[str, Any]:
        queries = self._checked(queries, k, num_leaves_to_search, num_reordering_candidates)
        if self.documents is None:
            scores, rows = self.find(queries, k, num_leaves_to_search, num_reordering_candidates)
        else:
            scores, rows = self._find_documents(queries, k, num_leaves_to_search, num_reordering_candidates)
        return {"scores": scores, "document_ids": self.ids_of(rows)}

    def _exact(self, queries: Any, k: Any) -> dict[str, Any]:
        queries = self._checked(queries, k)
        scores, rows = self.exact(queries, k, by_document=self.documents is not None)
        return {"scores": scores, "document_ids": self.ids_of(rows)}

    def _search_filtered(
        self,
        queries: Any,
        k: Any,
        num_leaves_to_search: Any,
        num_reordering_candidates: Any,
        allowed_document_ids: Any,
        excluded_document_ids: Any,
        minimum_score: Any,
    ) -> dict[str, Any]:
        """As `search`, but every result is allowed (if any id is given), not excluded, and scores enough."""
        queries = self._checked(queries, k, num_leaves_to_search, num_reordering_candidates)
        n_ids = tf.maximum(tf.size(allowed_document_ids), tf.size(excluded_document_ids))
        ranges = {
            "number of ids in a filter": (n_ids, 0, self.limits.filter_ids),
            # Its size as given, not as the signature has it: several would be compared with every score each.
            "number of minimum scores": (tf.size(_any_rank(minimum_score)), 1, 1),
        }
        queries = _unless_outside(ranges, queries)
        with tf.control_dependencies([queries]):  # what reads no query would run before it is checked
            allowed = self._rows_of(tf.identity(allowed_document_ids))
            excluded = self._rows_of(tf.identity(excluded_document_ids))
        scores, rows = tf.cond(
            tf.size(allowed_document_ids) > 0,
            lambda: self._find_allowed(
                queries, k, num_leaves_to_search, num_reordering_candidates, allowed, excluded
            ),
            lambda: self._find_not_excluded(
                queries, k, num_leaves_to_search, num_reordering_candidates, excluded
            ),
        )
        good = (rows >= 0) & (scores >= minimum_score)
        scores, rows = tf.where(good, scores, NO_SCORE), tf.where(good, rows, -1)
        return {"scores": scores, "document_ids": self.ids_of(rows)}

    def _checked(self, queries: Any, k: Any = None, leaves: Any = None, candidates: Any = None) -> Any:
        """The queries; the graph refuses what a request must not ask for, of what it names."""
        ranges = {
            "number of queries": (tf.shape(queries)[0], 1, self.limits.queries),
            "width of a query": (tf.shape(queries)[1], self.dim, self.dim),
            **_finite(queries),
        }
        if k is not None:
            ranges["k"] = (k, 1, self.limits.k)
        if leaves is not None:
            ranges["num_leaves_to_search"] = (leaves, 1, 2**31 - 1)
            ranges["num_reordering_candidates"] = (candidates, 1, self.limits.num_reordering_candidates)
        return _unless_outside(ranges, queries)

    # Search

    def find(self, queries: Any, k: Any, leaves: Any, candidates: Any) -> tuple[Any, Any]:
        """The best k rows among the candidates of the nearest leaves, best first.

        Args:
            queries: float32 (n_queries, dim).

        Returns:
            Scores float32 and rows int32, (n_queries, min(k, n_rows)) each; NO_SCORE and -1 where fewer
            rows were found.
        """
        k = tf.minimum(k, self.n_rows)
        if not self.has_tree:
            return self.exact(queries, k)

        def one() -> tuple[Any, Any]:
            scores, rows = self._find_one(queries[0], k, self._n_entries(k, candidates), leaves)
            missing = [[0, k - tf.size(rows)]]
            scores = tf.pad(scores, missing, constant_values=NO_SCORE)
            return scores[tf.newaxis], tf.pad(rows, missing, constant_values=-1)[tf.newaxis]

        # A function of its own: TensorFlow walks through every op of a branch that is not taken.
        @tf.function(autograph=False, experimental_attributes={"_noinline": True})
        def several() -> tuple[Any, Any]:
            return self._rescored(queries, self._candidates(queries, k, leaves, candidates), k)

        return tf.cond(tf.equal(tf.shape(queries)[0], 1), one, several)

    def _find_documents(self, queries: Any, k: Any, leaves: Any, candidates: Any) -> tuple[Any, Any]:
        """As `find`, but documents, each with the score of its best row: (n_queries, min(k, n_documents))."""
        k = tf.minimum(k, self.n_documents)
        if not self.has_tree:
            return self.exact(queries, k, by_document=True)
        rows = self._candidates(queries, self._n_rows_for(k), leaves, candidates)
        return self._rescored(queries, rows, k, by_document=True)

    def _n_rows_for(self, k: Any) -> Any:
        """Rows to rescore for k results: k of them, or as many as k documents have on average."""
        if self.documents is None:
            return k
        a_document = -(-self.n_rows // self.n_documents)
        return tf.maximum(k, tf.minimum(k * a_document, self.limits.num_reordering_candidates))

    def _find_one(self, query: Any, k: Any, n_entries: Any, leaves: Any) -> tuple[Any, Any]:
        """As `find` for one query (dim,), and no more rows than were found: (at most k,) each."""
        rows = self.searcher.search_one(query, n_entries, leaves)
        if self.spills:
            rows = tf.unique(tf.gather(self.owners, rows))[0]
        scores, at = tf.math.top_k(self.rows.score_one(query, rows), tf.minimum(k, tf.size(rows)))
        return scores, tf.gather(rows, at)

    def _n_entries(self, k: Any, candidates: Any) -> Any:
        """Entries to fetch: of a spilled row two may be among them, so k rows are in 2 k entries."""
        wanted = tf.maximum(candidates, 2 * k if self.spills else k)
        return tf.where(candidates >= self.n_rows, self.n_entries, tf.minimum(wanted, self.n_entries))

    def _candidates(self, queries: Any, k: Any, leaves: Any, candidates: Any) -> Any:
        """Rows int32 (n_queries, at least k), ascending, each once; -1 for the rest."""
        wanted = self._n_entries(k, candidates)
        entries, there = self.searcher.search(queries, wanted, leaves, self.parallel)
        if not self.spills:
            rows = tf.where(there, entries, -1)
        else:
            rows = tf.where(there, tf.gather(self.owners, tf.where(there, entries, 0)), -1)
            rows = tf.sort(rows, axis=1)  # beside an entry's rescoring this costs next to nothing
            again = tf.pad(rows[:, 1:] == rows[:, :-1], [[0, 0], [1, 0]])
            rows = tf.where(again, -1, rows)
        missing = tf.maximum(0, k - tf.shape(rows)[1])  # fewer were found than results are wanted
        return tf.pad(rows, [[0, 0], [0, missing]], constant_values=-1)

    def _rescored(self, queries: Any, rows: Any, k: Any, by_document: bool = False) -> tuple[Any, Any]:
        """The best k of the given rows, or of their documents, by stored vectors; some queries at a time.

        Gathering the vectors of all queries at once would ask the system for fresh memory each time, which
        costs more than the multiplication.
        """
        n_queries = tf.shape(queries)[0]
        size = tf.maximum(1, BLOCK_FLOATS // (self.dim * tf.shape(rows)[1]))

        def best(queries: Any, rows: Any) -> tuple[Any, Any]:
            scores = self.rows.score_own(queries, tf.maximum(rows, 0))
            scores = tf.where(rows >= 0, scores, NO_SCORE)
            if by_document:
                documents = tf.gather(self.documents, tf.maximum(rows, 0))
                return _best_of_each(scores, tf.where(rows >= 0, documents, -1), k)
            return _best(scores, rows, k)

        return _in_blocks(best, n_queries, size, queries, rows)

    def exact(self, queries: Any, k: Any, keep: Any = None, by_document: bool = False) -> tuple[Any, Any]:
        """The best k of all stored rows, or of their documents, over blocks of rows; as `find` otherwise.

        Args:
            keep: bool (n_rows,): which rows may be found; default: all.
        """
        k = tf.minimum(k, self.n_documents if by_document else self.n_rows)
        n_queries = tf.shape(queries)[0]
        size = tf.clip_by_value(BLOCK_SCORES // tf.maximum(1, n_queries), 1, BLOCK_ROWS)

        def add(start: Any, scores: Any, rows: Any) -> tuple[Any, Any, Any]:
            stop = tf.minimum(start + size, self.n_rows)
            new = self.rows.score_span(queries, start, stop)
            if keep is not None:
                new = tf.where(keep[start:stop], new, NO_SCORE)
            if by_document:
                found = _best_documents(new, self.documents[start:stop], k)
                scores, rows = tf.concat([scores, found[0]], 1), tf.concat([rows, found[1]], 1)
                return stop, *_best_of_each(scores, rows, k)
            numbers = tf.range(start, stop)
            if keep is not None:
                numbers = tf.where(keep[start:stop], numbers, -1)
            numbers = tf.repeat(numbers[tf.newaxis], n_queries, axis=0)
            return stop, *_best(tf.concat([scores, new], 1), tf.concat([rows, numbers], 1), k)

        start = (tf.constant(0), tf.fill([n_queries, k], NO_SCORE), tf.fill([n_queries, k], -1))
        unknown = tf.TensorShape([None, None])
        _, scores, rows = tf.while_loop(
            lambda start, *_: start < self.n_rows,
            add,
            start,
            (tf.TensorShape([]), unknown, unknown),
            parallel_iterations=1,  # more would hold the scores of several blocks at once
        )
        return scores, rows

    # Filters

    def _find_allowed(
        self, queries: Any, k: Any, leaves: Any, candidates: Any, allowed: Any, excluded: Any
    ) -> tuple[Any, Any]:
        """Search among some rows: exactly where they are few, or where leaves hold fewer of them than k."""
        by_document = self.documents is not None
        allowed = tf.boolean_mask(allowed, ~_among(allowed, excluded))
        k = tf.minimum(k, self.n_documents)
        wanted = tf.minimum(k, self._n_documents_of(allowed))

        def few() -> tuple[Any, Any]:
            return self._exact_among(queries, k, allowed)

        def many() -> tuple[Any, Any]:
            rows = self._candidates(queries, self._n_rows_for(k), leaves, candidates)
            allowed_rows = tf.where(_among(rows, allowed), rows, -1)
            scores, rows = self._rescored(queries, allowed_rows, k, by_document)
            return tf.cond(_any_short(rows, wanted), few, lambda: (scores, rows))

        if not self.has_tree:
            return few()
        return tf.cond(tf.size(allowed) <= self.exact_below_allowed, few, many)

    def _find_not_excluded(
        self, queries: Any, k: Any, leaves: Any, candidates: Any, excluded: Any
    ) -> tuple[Any, Any]:
        by_document = self.documents is not None
        k = tf.minimum(k, self.n_documents)
        wanted = tf.minimum(k, self.n_documents - self._n_documents_of(excluded))

        def exactly() -> tuple[Any, Any]:
            return self.exact(queries, k, self._all_but(excluded), by_document)

        if not self.has_tree:
            return exactly()
        rows = self._candidates(queries, self._n_rows_for(k), leaves, candidates)
        left = tf.where(_among(rows, excluded), -1, rows)
        scores, rows = self._rescored(queries, left, k, by_document)
        return tf.cond(_any_short(rows, wanted), exactly, lambda: (scores, rows))

    def _exact_among(self, queries: Any, k: Any, rows: Any) -> tuple[Any, Any]:
        """Exact search among ascending rows int32 (n,)."""
        by_document = self.documents is not None

        def few() -> tuple[Any, Any]:
            scores = self.rows.score_all(queries, rows)
            if by_document:
                return _best_documents(scores, tf.gather(self.documents, rows), k)
            return _best_shared(scores, rows, k)

        def many() -> tuple[Any, Any]:
            keep = tf.scatter_nd(rows[:, tf.newaxis], tf.ones_like(rows), [self.n_rows]) > 0
            return self.exact(queries, k, keep, by_document)

        is_small = tf.size(rows) * tf.shape(queries)[0] <= BLOCK_SCORES
        return tf.cond(is_small & (tf.size(rows) <= 4 * BLOCK_ROWS), few, many)

    def _all_but(self, rows: Any) -> Any:
        return tf.scatter_nd(rows[:, tf.newaxis], tf.ones_like(rows), [self.n_rows]) == 0

    def _n_documents_of(self, rows: Any) -> Any:
        """How many documents have the rows, each given once."""
        if self.documents is None:
            return tf.size(rows)
        return tf.size(tf.unique(tf.gather(self.documents, rows))[0])

    def _rows_of(self, ids: Any) -> Any:
        """Rows of document ids, ascending, each once; ids that no document has are left out.

        No more memory than ids and rows need: an op that repeats, `tf.repeat` and `value_rowids` alike, would
        first make a table of all ids by the passages of the longest document.
        """
        ids = tf.unique(ids)[0]
        hashes = _hash(ids)
        spans = tf.ragged.range(
            tf.searchsorted(self.hashes, hashes), tf.searchsorted(self.hashes, hashes, side="right")
        )
        rows = tf.gather(self.hashed_rows, spans.flat_values)
        numbers = tf.range(tf.size(rows, spans.row_splits.dtype), dtype=spans.row_splits.dtype)
        of = tf.searchsorted(spans.row_splits, numbers, side="right") - 1  # the id that a row was found by
        same = tf.gather(self.ids, rows) == tf.gather(ids, of)  # two ids may have one hash
        return tf.sort(tf.boolean_mask(rows, same))

    def ids_of(self, rows: Any) -> Any:
        """Document ids of rows, "" for -1; row numbers as text where the index has no ids."""
        there = rows >= 0
        if self.ids is None:
            return tf.where(there, tf.strings.as_string(rows), "")
        return tf.where(there, tf.gather(self.ids, tf.maximum(rows, 0)), "")


# ScaNN's own searcher


class Searcher:
    """ScaNN's own searcher over codes: which entries lie nearest, roughly.

    The searcher is a resource of the process, found by `shared_name`. Its one op makes it from tensors if it
    is not there, and gives its handle: requests name it with tensors that hold nothing.
    """

    def __init__(self, assets: Assets) -> None:
        self.assets = assets
        self.shared_name = _new_name()
        self.is_made = False

    def make(self) -> None:
        if not self.is_made:
            with tf.init_scope():
                _tensors_to_scann(self.shared_name, *_tensors(self.assets))
            self.is_made = True

    def release(self) -> None:
        """Free ScaNN's own memory: Python's garbage collection does not. `make` makes it again."""
        if self.is_made:
            tf.raw_ops.DestroyResourceOp(resource=_handle(self.shared_name))
            self.is_made = False

    def search_one(self, query: Any, n: Any, leaves: Any) -> Any:
        """The nearest entries int32 (at most n,) of one query (dim,) by their codes, nearest first."""
        from scann.scann_ops.py import scann_ops

        return scann_ops.scann_search(_handle(self.shared_name), query, n, -1, leaves).index

    def search(self, queries: Any, n: Any, leaves: Any, parallel: bool) -> tuple[Any, Any]:
        """The nearest entries int32 (n_queries, at most n) by their codes, and which of them there are."""
        from scann.scann_ops.py import scann_ops

        in_parallel = (tf.shape(queries)[0] > PARALLEL_QUERIES) & parallel
        handle = _handle(self.shared_name)
        found = scann_ops.scann_search_batched(handle, queries, n, -1, leaves, in_parallel)
        return found.indices, ~tf.math.is_nan(found.distances)

    @contextlib.contextmanager
    def exported(self, folder: Path) -> Iterator[list[Any]]:
        """What makes the searcher where a SavedModel is loaded; graphs traced meanwhile name that one.

        Its name is new: a process that saves, loads and releases never takes one searcher for another.
        """
        own, self.shared_name = self.shared_name, _new_name()
        try:
            made = SearcherAtLoading(self.shared_name, self.assets, folder)
            yield [made, *made.files.values()]  # a resource tracks nothing by itself
        finally:
            self.shared_name = own


class SearcherAtLoading(tf.saved_model.experimental.TrackableResource):
    """Makes the searcher from the SavedModel's assets, by its init op.

    Assets and not variables, so that requests can name the searcher without reading what it is made from.
    ScaNN packs the codes into a copy of its own; of what was decoded for it TensorFlow keeps the memory for
    later requests, as long as oneDNN is on. (Off, it goes back to the system, and `exact` takes half as long
    again: oneDNN's matrix product is faster.)

    The searcher goes with the session that loaded it; in Python's `tf.saved_model.load` it stays until the
    process ends, because two loadings of one folder share it.
    """

    def __init__(self, shared_name: str, assets: Assets, folder: Path) -> None:
        super().__init__()
        self.shared_name = shared_name
        self.n_entries, self.n_blocks = assets.codes.shape
        contents: dict[str, Any] = {
            "scann_config.pb": assets.config,
            "partitioner.pb": assets.partitioner,
            "codebook.pb": assets.codebook,
            "leaves.int32": assets.tokens,
            "codes.uint8": assets.codes,
        }
        for name, content in contents.items():
            (folder / name).write_bytes(memoryview(content))
        self.files = {name: tf.saved_model.Asset(str(folder / name)) for name in contents}
        self.hashes = {name: int(_hash(tf.io.read_file(str(folder / name)))) for name in contents}

    def _create_resource(self) -> Any:
        """A handle that nobody reads: ScaNN's op makes and names its own."""
        return tf.raw_ops.VarHandleOp(dtype=tf.float32, shape=[], shared_name=f"{self.shared_name}-unused")

    def _initialize(self) -> None:
        def text(name: str) -> Any:
            """The file, if it is what was written: ScaNN ends the whole server for some that are not."""
            content = tf.io.read_file(self.files[name].asset_path)
            said = f"assets/{name} is not as it was published: copy the version again"
            with tf.control_dependencies([tf.debugging.Assert(_hash(content) == self.hashes[name], [said])]):
                return tf.identity(content)

        def numbers(name: str, dtype: Any, shape: list[int]) -> Any:
            return tf.reshape(tf.io.decode_raw(text(name), dtype), shape)

        _tensors_to_scann(
            self.shared_name,
            text("scann_config.pb"),
            text("partitioner.pb")[tf.newaxis],
            numbers("leaves.int32", tf.int32, [self.n_entries]),
            text("codebook.pb")[tf.newaxis],
            numbers("codes.uint8", tf.uint8, [self.n_entries, self.n_blocks]),
        )


def _new_name() -> str:
    return f"scann-{uuid.uuid4()}"


def _tensors(assets: Assets) -> tuple[Any, ...]:
    return [assets.config], [assets.partitioner], assets.tokens, [assets.codebook], assets.codes


def _handle(shared_name: str) -> Any:
    """The handle of a searcher that is there; where it is not, ScaNN refuses the empty configuration."""
    nothing = tf.constant("")
    return _tensors_to_scann(shared_name, nothing, nothing, np.int32(0), nothing, np.uint8(0))


def _tensors_to_scann(
    shared_name: str, config: Any, partitioner: Any, tokens: Any, codebook: Any, codes: Any
) -> Any:
    """`Scann>TensorsToScann`; a scalar stands for what there is none of: rows, int8 rows, their norms."""
    from scann.scann_ops.py import scann_ops

    none = np.float32(0)
    return scann_ops.tensors_to_scann(
        none, config, partitioner, tokens, codebook, codes, np.int8(0), none, none, shared_name=shared_name
    )


# Pieces of a graph


def _function(python: Callable, *specs: Any) -> Any:
    return tf.function(python, input_signature=specs, autograph=False)


def _any_rank(tensor: Any) -> Any:
    """The tensor, its rank unknown to the signature, as tfrs's own export shows it."""
    return tf.raw_ops.PlaceholderWithDefault(input=tensor, shape=None)


def _unless_outside(ranges: dict[str, tuple[Any, int, int]], queries: Any) -> Any:
    """The queries, once every (value, least, most) by name is found right.

    One assertion for all: an op each costs as much as a good part of the search. Nothing that needs the
    queries runs before it.
    """
    data: list[Any] = []
    for name, (value, least, most) in ranges.items():
        data += [f"{name}, wanted {least}" + (f" to {most}, got:" if most > least else ", got:"), value]
    values, least, most = (tf.stack(numbers) for numbers in zip(*ranges.values(), strict=True))
    right = tf.reduce_all((values >= least) & (values <= most))
    with tf.control_dependencies([tf.debugging.Assert(right, data)]):
        return tf.identity(queries)


def _finite(queries: Any) -> dict[str, tuple[Any, int, int]]:
    """A range for `_unless_outside`. ScaNN answers a NaN with anything, or with an internal error."""
    return {
        "queries must be finite (1 if so)": (
            tf.cast(tf.reduce_all(tf.math.is_finite(queries)), tf.int32),
            1,
            1,
        )
    }


def _best(scores: Any, rows: Any, k: Any) -> tuple[Any, Any]:
    """The best k of scores and their rows, best first, of (n_queries, at least k) each."""
    scores, at = tf.math.top_k(scores, k)
    return scores, tf.gather(rows, at, batch_dims=1)


def _best_shared(scores: Any, rows: Any, k: Any) -> tuple[Any, Any]:
    """As `_best`, of any number of rows (n,) that all queries share; NO_SCORE and -1 where too few."""
    missing = tf.maximum(0, k - tf.size(rows))
    scores, at = tf.math.top_k(tf.pad(scores, [[0, 0], [0, missing]], constant_values=NO_SCORE), k)
    rows = tf.gather(tf.pad(rows, [[0, missing]], constant_values=-1), at)
    return scores, tf.where(scores > NO_SCORE, rows, -1)


def _best_documents(scores: Any, documents: Any, k: Any) -> tuple[Any, Any]:
    """As `_best_shared`, of each document (n,) its best score.

    By a maximum over each document's rows, and not by `_best_of_each`: sorting a block costs many times more.
    """
    documents, at = tf.unique(documents)
    scores = tf.math.unsorted_segment_max(tf.transpose(scores), at, tf.size(documents))
    return _best_shared(tf.transpose(scores), documents, k)


def _best_of_each(scores: Any, documents: Any, k: Any) -> tuple[Any, Any]:
    """As `_best`, of each document its best score; documents int32 (n_queries, at least k)."""
    scores, documents = _best(scores, documents, tf.shape(scores)[1])
    order = tf.argsort(documents, axis=1, stable=True)  # a document's best score stays its first
    scores, documents = (tf.gather(each, order, batch_dims=1) for each in (scores, documents))
    again = tf.pad(documents[:, 1:] == documents[:, :-1], [[0, 0], [1, 0]])
    return _best(tf.where(again, NO_SCORE, scores), tf.where(again, -1, documents), k)


def _in_blocks(function: Callable, n: Any, size: Any, *arguments: Any) -> tuple[Any, Any]:
    """`function` of some rows of the arguments at a time; its two results, (n, ...) each, joined."""
    n_blocks = (n + size - 1) // size
    unknown = tf.TensorShape([None, None])
    results = tuple(
        tf.TensorArray(dtype, n_blocks, infer_shape=False, element_shape=unknown)
        for dtype in (tf.float32, tf.int32)
    )

    def step(number: Any, scores: Any, rows: Any) -> tuple[Any, Any, Any]:
        start = number * size
        new = function(*(argument[start : start + size] for argument in arguments))
        return number + 1, scores.write(number, new[0]), rows.write(number, new[1])

    _, scores, rows = tf.while_loop(
        lambda number, *_: number < n_blocks, step, (tf.constant(0), *results), parallel_iterations=4
    )
    return scores.concat(), rows.concat()


def _among(rows: Any, ascending: Any) -> Any:
    """Which of the rows are among ascending ones, as bool of the rows' shape."""
    flat = tf.reshape(rows, [-1])
    padded = tf.concat([ascending, [-2]], 0)  # no row is -2
    same = tf.gather(padded, tf.searchsorted(ascending, flat)) == flat
    return tf.reshape(same, tf.shape(rows))


def _any_short(rows: Any, wanted: Any) -> Any:
    """Whether a query has fewer rows than wanted."""
    found = tf.reduce_sum(tf.cast(rows >= 0, tf.int32), axis=1)
    return tf.reduce_any(found < wanted)


def _hash(ids: Any) -> Any:
    return tf.strings.to_hash_bucket_fast(ids, 2**63 - 1)


def _sorted_hashes(ids: np.ndarray) -> tuple[Any, Any]:
    """64-bit hashes of the ids, ascending, and their rows."""
    hashes = _hash(tf.constant(ids)).numpy()
    order = np.argsort(hashes, kind="stable")
    return (
        tf.Variable(hashes[order], trainable=False),
        tf.Variable(order.astype(np.int32), trainable=False),
    )


def _first_rows(ids: np.ndarray) -> np.ndarray:
    """Of each row the first row with its id, int32."""
    first: dict[bytes, int] = {}
    return np.array([first.setdefault(name, row) for row, name in enumerate(ids)], np.int32)
