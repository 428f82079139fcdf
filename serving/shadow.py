"""Live recall: a share of the answers is checked against the `exact` signature, off the request path.

What is measured, for one query and its k:

- `search` answers documents, as `exact` does. Wanted are the k exact documents; one is a hit if its id was
  answered. An answered document that scores as much as the last exact one is a hit too: it is as near.
- `serving_default` answers rows, and a document in several passages is several rows. Wanted are the exact
  documents whose best passage scores at least the lowest score that was answered; one is a hit if that score
  was answered. With a row a document these are the k exact documents, found among the k rows. With passages
  fewer are wanted, because k rows may belong to fewer documents; where the index missed rows, a document just
  below the true k-th row is wanted as well, so that the share is nearly, not exactly, that of k rows.

Scores are compared with TOLERANCE: one version scores a row alike in both signatures, but for rounding.

Exact searches give way by taking a small share of the time, one after the other, and not by a low priority
of their thread: on a busy machine such a thread stands still with Python's lock in its hands, and all wait.
"""

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakSet

import numpy as np

from serving.handles import Loaded
from serving.monitoring import Monitoring
from serving.protocol import DEFAULT_SIGNATURE, RequestError, Tensor

log = logging.getLogger("serving")

EXACT = "exact"
SEARCH = "search"
TOLERANCE = 1e-5  # of the largest score, at least of 1
SHARE_OF_TIME = 0.05  # that exact searches take at most, whatever the rate: each reads every row
MAX_FIRST_PAUSE = 10.0  # seconds: a version's first exact search takes many times as long as the next
MAX_WAITING = 64  # answers, one query each
MAX_QUERIES = 4  # of one request
TOGETHER = 16  # queries of one exact search: all read the same rows
NO_SCORE = float(np.finfo(np.float32).min)  # what the index answers where fewer than k were found


@dataclass(frozen=True)
class Answer:
    """One query of a request, and what was answered; `ids` are None where the answer is rows.

    Attributes:
        query: float32 (dim,).
        scores: float32, best first.
        ids: as many.
    """

    loaded: Loaded
    signature_name: str
    k: int
    query: np.ndarray
    scores: np.ndarray
    ids: Sequence[bytes] | None


class Shadow:
    """Draws answers, asks `exact` for the same on a thread of its own, and counts what both have.

    It never makes a request wait, and nothing that goes wrong here reaches one.
    """

    def __init__(self, monitoring: Monitoring, rate: float, *, seed: int | None = None) -> None:
        """Nothing is drawn at a rate of 0.

        Args:
            rate: share of the answered requests that is checked, 0 to 1.
        """
        self._monitoring = monitoring
        self._rate = rate
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._to_skip = self._gap()  # requests until the next one drawn
        self._waiting: deque[Answer] = deque()
        self._known: WeakSet[Loaded] = WeakSet()  # versions that `exact` has been asked of
        self._some_wait = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="shadow", daemon=True)
        if rate > 0:
            self._thread.start()

    def draw(self, signature_name: str, n: int) -> list[int]:
        """Which of n requests that were answered just now are to be offered; mostly none."""
        if self._rate <= 0 or signature_name not in (DEFAULT_SIGNATURE, SEARCH):
            return []
        drawn = []
        with self._lock:
            at = self._to_skip
            while at < n:
                drawn.append(at)
                at += 1 + self._gap()
            self._to_skip = at - n
        return drawn

    def offer(
        self, loaded: Loaded, signature_name: str, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> None:
        """Take a drawn request and its answer; returns at once, and never raises."""
        name = loaded.model_name
        try:
            if EXACT not in loaded.servable.signatures:
                self._monitoring.shadowed(name, "skipped")
                return
            answers = _answers(loaded, signature_name, inputs, outputs)
            answers = self._random.sample(answers, min(MAX_QUERIES, len(answers)))
            if len(self._waiting) + len(answers) > MAX_WAITING:
                self._monitoring.shadowed(name, "dropped")
                return
            self._waiting.extend(answers)
            self._some_wait.set()
        except Exception:
            log.exception("a shadow request failed")
            self._monitoring.shadowed(name, "failed")

    def close(self, grace_seconds: float = 5.0) -> None:
        """Stop; what waits is not compared."""
        self._stop.set()
        self._some_wait.set()
        if self._thread.is_alive():
            self._thread.join(grace_seconds)
        self._waiting.clear()

    def _gap(self) -> int:
        """Requests between two that are drawn, so that each is drawn with the same chance, by itself."""
        if self._rate >= 1 or self._rate <= 0:
            return 0
        return int(np.log(1 - self._random.random()) / np.log(1 - self._rate))

    def _work(self) -> None:
        while not self._stop.is_set():
            self._some_wait.wait()
            self._some_wait.clear()
            while (answers := self._next()) and not self._stop.is_set():
                started = time.perf_counter()
                self._compare(answers)
                pause = self._pause(answers[0].loaded, time.perf_counter() - started)
                answers.clear()  # else a version that is gone would stay until the next answer
                self._stop.wait(pause)

    def _pause(self, loaded: Loaded, seconds: float) -> float:
        """Seconds until the next exact search, after one that took so many."""
        pause = seconds * (1 / SHARE_OF_TIME - 1)
        if loaded in self._known:
            return pause
        self._known.add(loaded)
        return min(MAX_FIRST_PAUSE, pause)

    def _next(self) -> list[Answer]:
        """Some that wait and can be searched as one: of one version and one k."""
        answers: list[Answer] = []
        for _ in range(len(self._waiting)):  # what comes in meanwhile comes behind these
            answer = self._waiting.popleft()
            first = answers[0] if answers else answer
            if answer.loaded is first.loaded and answer.k == first.k and len(answers) < TOGETHER:
                answers.append(answer)
            else:
                self._waiting.append(answer)
        return answers

    def _compare(self, answers: list[Answer]) -> None:
        loaded, k = answers[0].loaded, answers[0].k
        outcome = "failed"
        try:
            queries = np.stack([answer.query for answer in answers])
            inputs = {
                "queries": Tensor("DT_FLOAT", queries.shape, queries.ravel()),
                "k": Tensor("DT_INT32", (), [k]),
            }
            scores, ids = _exact(loaded.servable.run(EXACT, inputs))
            for answer, exact_scores, exact_ids in zip(answers, scores, ids, strict=True):
                hits, wanted = compared(answer, exact_scores, exact_ids)
                self._monitoring.recall(
                    loaded.model_name, loaded.version, answer.signature_name, k, hits, wanted
                )
            outcome = "compared"
        except RequestError as error:  # the version is gone, or refuses
            log.debug("a shadow request was refused: %s", error.message)
        except Exception:
            log.exception("a shadow request failed")
        for _ in answers:
            self._monitoring.shadowed(loaded.model_name, outcome)


def compared(answer: Answer, exact_scores: np.ndarray, exact_ids: Sequence[bytes]) -> tuple[int, int]:
    """Hits and wanted results of one query; see above.

    Args:
        exact_scores: of the exact documents, best first; NO_SCORE from where there are no more.
        exact_ids: as many.
    """
    there = exact_scores > NO_SCORE
    exact_scores = exact_scores[there]
    found = answer.scores[answer.scores > NO_SCORE]
    if not len(exact_scores):
        return 0, 0
    tolerance = TOLERANCE * max(1.0, float(np.abs(exact_scores).max()))
    if answer.ids is None:
        return _hits_by_score(found, exact_scores, answer.k, tolerance)
    exact = {name for name, is_there in zip(exact_ids, there, strict=True) if is_there}
    good = exact_scores[-1] - tolerance
    hits = sum(
        name in exact or score >= good for name, score in zip(answer.ids, answer.scores, strict=True) if name
    )
    return min(hits, len(exact_scores)), len(exact_scores)


def _hits_by_score(found: np.ndarray, exact: np.ndarray, k: int, tolerance: float) -> tuple[int, int]:
    """Both best first. Each answered score stands for one document at most."""
    lowest = found[k - 1] if len(found) >= k else -np.inf  # an answer that is not full had room for more
    wanted = exact[exact >= lowest - tolerance]
    hits = at = 0
    for score in wanted:
        while at < len(found) and found[at] > score + tolerance:
            at += 1
        if at < len(found) and found[at] >= score - tolerance:
            hits, at = hits + 1, at + 1
    return hits, len(wanted)


def _answers(
    loaded: Loaded, signature_name: str, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
) -> list[Answer]:
    """Each query of a request with its answer."""
    if signature_name == DEFAULT_SIGNATURE:
        scores = _matrix(outputs["output_1"])
        k = _shipped_k(loaded, scores.shape[-1])
        return [Answer(loaded, signature_name, k, _matrix(inputs["input_1"]), scores, None)] if k else []
    queries, scores = _matrix(inputs["queries"]), _matrix(outputs["scores"])
    ids = _matrix(outputs["document_ids"]).tolist()
    k = int(inputs["k"].values[0])
    return [Answer(loaded, signature_name, k, *each) for each in zip(queries, scores, ids, strict=True)]


def _shipped_k(loaded: Loaded, n_found: int) -> int:
    """How many results `serving_default` is asked for: its answer is shorter where fewer were found."""
    batch = loaded.servable.signatures.get("serving_default_batch")
    shape = batch.outputs["scores"].shape if batch else None
    return shape[1] if shape and len(shape) == 2 and shape[1] > 0 else n_found


def _exact(outputs: Mapping[str, Tensor]) -> tuple[np.ndarray, list[list[bytes]]]:
    return _matrix(outputs["scores"]), _matrix(outputs["document_ids"]).tolist()


def _matrix(tensor: Tensor) -> np.ndarray:
    dtype = object if tensor.dtype == "DT_STRING" else np.float32
    return np.asarray(tensor.values, dtype).reshape(tensor.shape)
