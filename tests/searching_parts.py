"""What the tests of the search path share: a small index in NumPy that can be held up, and who asks it."""

import asyncio
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache

import numpy as np

from serving.coalescing import Searches
from serving.handles import Loaded
from serving.protocol import RequestError, Signature, Tensor, TensorInfo

NO_SCORE = float(np.finfo(np.float32).min)
PREDICT = "tensorflow/serving/predict"
SCALARS = ("k", "num_leaves_to_search", "num_reordering_candidates")


def floats(values) -> Tensor:
    array = np.asarray(values, np.float32)
    return Tensor("DT_FLOAT", array.shape, array.ravel())


def number(value: int) -> Tensor:
    return Tensor("DT_INT32", (), [value])


def one(vector) -> dict[str, Tensor]:
    """A request for `serving_default`."""
    return {"input_1": floats(vector)}


def several(queries, k: int = 2, leaves: int = 4, candidates: int = 10) -> dict[str, Tensor]:
    """A request for `search`."""
    scalars = dict(zip(SCALARS, map(number, (k, leaves, candidates)), strict=True))
    return {"queries": floats(queries)} | scalars


def info(dtype: str, shape: tuple[int, ...] | None) -> TensorInfo:
    return TensorInfo("x:0", dtype, shape)


class TinyIndex:
    """Stands in for an index version: brute force, with the index's own signatures and refusals.

    Attributes:
        calls: (signature, number of queries) of each search, as it began.
        begun: released once for each search that began.
    """

    def __init__(self, rows, ids=None, k: int = 2, max_queries: int = 4096, found: int | None = None) -> None:
        """
        Args:
            ids: of the rows, bytes; default: b"0", b"1", ...
            found: rows that a search of serving_default finds at most.
        """
        self.rows = np.asarray(rows, np.float32)
        self.ids = np.array(ids if ids is not None else [b"%d" % i for i in range(len(self.rows))], object)
        self.k, self.max_queries, self.found = k, max_queries, found
        self.calls: list[tuple[str, int]] = []
        self.begun = threading.Semaphore(0)
        self.is_closed = False
        self._held: dict[str, threading.Event] = {}
        dim = self.rows.shape[1]
        queries = info("DT_FLOAT", (-1, dim))
        answer = {"scores": info("DT_FLOAT", (-1, -1)), "document_ids": info("DT_STRING", (-1, -1))}
        scalars = {name: info("DT_INT32", ()) for name in SCALARS}
        self.signatures = {
            "serving_default": Signature(
                {"input_1": info("DT_FLOAT", (-1,))},
                {"output_1": info("DT_FLOAT", None), "output_2": info("DT_INT32", None)},
                PREDICT,
            ),
            "serving_default_batch": Signature(
                {"queries": queries},
                {"scores": info("DT_FLOAT", (-1, k)), "rows": info("DT_INT32", (-1, k))},
                PREDICT,
            ),
            "search": Signature({"queries": queries, **scalars}, answer, PREDICT),
            "exact": Signature({"queries": queries, "k": scalars["k"]}, answer, PREDICT),
        }

    @contextmanager
    def holding(self, *signature_names: str) -> Iterator[None]:
        """Searches of these signatures do not end before the block does."""
        event = threading.Event()
        self._held |= dict.fromkeys(signature_names, event)
        try:
            yield
        finally:
            for name in signature_names:
                del self._held[name]
            event.set()

    def wait_until_begun(self, n: int) -> None:
        for _ in range(n):
            assert self.begun.acquire(timeout=10), "a search did not begin"

    def forget_begun(self) -> None:
        while self.begun.acquire(blocking=False):
            pass

    def run(self, signature_name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        query = inputs["input_1" if signature_name == "serving_default" else "queries"]
        self.calls.append((signature_name, query.shape[0] if len(query.shape) == 2 else 1))
        held = self._held.get(signature_name)
        self.begun.release()
        if held is not None:
            assert held.wait(10)
        queries = np.asarray(query.values, np.float32).reshape(query.shape)
        self._check(queries, 1 if signature_name == "serving_default" else 2)
        if signature_name == "serving_default":
            scores, rows = self._best(queries[np.newaxis], self.k, self.found)
            there = rows[0] >= 0
            return {
                "output_1": floats(scores[0][there]),
                "output_2": Tensor("DT_INT32", (int(there.sum()),), rows[0][there]),
            }
        if signature_name == "serving_default_batch":
            scores, rows = self._best(queries, self.k, self.found)
            return {"scores": floats(scores), "rows": Tensor("DT_INT32", rows.shape, rows.ravel())}
        k = int(inputs["k"].values[0])
        return self._documents(queries, k, self.found if signature_name == "search" else None)

    def close(self) -> None:
        self.is_closed = True

    def _check(self, queries: np.ndarray, rank: int) -> None:
        if queries.ndim != rank or queries.shape[-1] != self.rows.shape[1]:
            raise RequestError("INVALID_ARGUMENT", f"width of a query: {queries.shape}")
        if not np.isfinite(queries).all():
            raise RequestError("INVALID_ARGUMENT", "queries must be finite")
        if rank == 2 and len(queries) > self.max_queries:
            raise RequestError("INVALID_ARGUMENT", f"number of queries: {len(queries)}")

    def _best(self, queries: np.ndarray, k: int, found: int | None) -> tuple[np.ndarray, np.ndarray]:
        scores = queries @ self.rows.T
        rows = np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int32)
        scores = np.take_along_axis(scores, rows, axis=1)
        if found is not None:
            scores[:, found:], rows[:, found:] = NO_SCORE, -1
        return scores, rows

    def _documents(self, queries: np.ndarray, k: int, found: int | None) -> dict[str, Tensor]:
        """Each document once, with the score of its best row."""
        scores, rows = self._best(queries, len(self.rows), None)
        best_scores, best_ids = [], []
        for line_scores, line_rows in zip(scores, rows, strict=True):
            best: dict[bytes, float] = {}
            for score, row in zip(line_scores, line_rows, strict=True):
                best.setdefault(self.ids[row], float(score))
            kept = list(best.items())[: min(k, found or k)]
            missing = min(k, len(best)) - len(kept)
            best_ids.append([name for name, _ in kept] + [b""] * missing)
            best_scores.append([score for _, score in kept] + [NO_SCORE] * missing)
        ids = np.array(best_ids, object)
        return {"scores": floats(best_scores), "document_ids": Tensor("DT_STRING", ids.shape, ids.ravel())}


def loaded(index: TinyIndex, version: int = 1) -> Loaded:
    return Loaded("index", version, index)


@cache
def event_loop() -> asyncio.AbstractEventLoop:
    """One that runs on a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="loop", daemon=True).start()
    return loop


def submit(made: Searches, version: Loaded, signature_name: str, inputs, **settings) -> Future:
    """Ask from a thread that has no event loop; the request waits or is searched when this returns."""
    future = asyncio.run_coroutine_threadsafe(
        made.ask(version, signature_name, inputs, **settings), event_loop()
    )
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), event_loop()).result(10)  # its turn comes after
    return future
