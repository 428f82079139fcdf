"""The one queue that every search goes through, the few threads that search, and what they search together.

Idle threads search at once and one by one. While all are busy requests wait, and a thread that becomes free
takes those that can be joined (joining.py): so load itself makes the batches, and no request waits for others
to come. How long searches of each size take is learned as they are made, and decides

- which may hold all threads but one, so that `exact` over many rows never stops the quick ones;
- how many are joined: where several together take longer than one after the other, none;
- which are searched on the event loop's own thread: two changes of thread cost as much as a quick search.
  Only those that nothing in the request can make slow, and that took next to no time by the clock.
"""

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Hashable, Mapping, Sequence
from queue import SimpleQueue
from weakref import WeakKeyDictionary

import numpy as np

from serving.batching import Batching, run_batched
from serving.handles import Loaded
from serving.joining import BATCH_SIGNATURE, Join, join_of
from serving.monitoring import Monitoring
from serving.protocol import DEFAULT_SIGNATURE, RequestError, Tensor
from serving.shadow import Shadow

log = logging.getLogger("serving")

HEAVY_SECONDS = 0.05  # of one search: what takes longer is heavy, and what is joined should not
HERE_SECONDS = 0.001  # of one search: what takes less by the clock may be searched on the event loop
CALM_SECONDS = 0.05  # since two requests came at once: from then on one may be searched there
FORGET = 1 / 16  # of what was learned, when a search takes longer than that
TRY_AGAIN = 32  # a size that did not pay is tried again at every so many chances
MAX_NUMBERS = 1 << 26  # in the inputs of all that wait: 256 MB of float32
MAX_KEYS = 1000  # of a signature and its sizes, whose seconds are remembered: clients choose the scalars

# The real server's words: TensorFlow's batch scheduler, and a session whose time is over
FULL = "The batch scheduling queue to which this task was submitted is full"
LATE = "Timed out waiting for notification"
CLOSED = "The server is shutting down"

Inputs = Mapping[str, Tensor]
Outputs = dict[str, Tensor]
Outcome = Outputs | Exception


class Searches:
    """Every search of the server. Safe to use from several threads and event loops at once."""

    def __init__(
        self,
        monitoring: Monitoring,
        *,
        n_threads: int | None = None,
        max_queued: int = 1000,
        max_batch: int = 256,
        coalesce: bool = True,
        shadow: Shadow | None = None,
        enable_batching: bool = False,
        batching: Batching = Batching(),  # noqa: B008 - frozen
    ) -> None:
        """Start the threads.

        Args:
            n_threads: searches at once; default: one a core, at least two, so that one is left for the quick.
            max_queued: requests that wait; one more is refused.
            max_batch: queries that are searched as one.
            coalesce: False: every request is searched alone.
            enable_batching: answer as the real server does with --enable_batching; nothing is joined then.
            batching: what --batching_parameters_file says.
        """
        n_threads = max(2, n_threads or _n_cores())
        self._monitoring, self._shadow = monitoring, shadow
        self._max_queued, self._max_batch = max_queued, max_batch
        self._coalesce = coalesce and not enable_batching
        self._batching = batching if enable_batching else None
        self._lock = threading.Lock()  # of all below
        self._plans: WeakKeyDictionary[Loaded, dict[str, _Plan]] = WeakKeyDictionary()
        self._turns: WeakKeyDictionary[asyncio.AbstractEventLoop, _Turn] = WeakKeyDictionary()
        self._quick, self._heavy = _Line(), _Line()
        self._n_queued = self._n_numbers = self._n_idle = 0
        self._n_heavy_left = n_threads - 1  # heavy searches that may begin
        self._n_free = n_threads  # threads that do not search, idle or about to look
        self._is_closed = False
        self._wake: SimpleQueue[None] = SimpleQueue()  # one for each thread that is to look again
        self._threads = [
            threading.Thread(target=self._work, name=f"search-{i}", daemon=True) for i in range(n_threads)
        ]
        monitoring.watch_queue(lambda: self._n_queued)
        for thread in self._threads:
            thread.start()

    async def ask(
        self, loaded: Loaded, signature_name: str, inputs: Inputs, *, deadline: float | None = None
    ) -> Outputs:
        """Search. When the caller is cancelled, what has not begun is not searched.

        Args:
            inputs: every input of the signature, by name.
            deadline: of time.monotonic(); then the error comes at once, even amid the search.

        Raises:
            RequestError: an op refused the input, the queue is full, or it is too late.
        """
        loop = asyncio.get_running_loop()
        search = self._planned(_Search(loaded, signature_name, inputs, deadline, loop))
        if self._may_search_here(search, loop):
            return self._search_here(search)
        self._put(search)
        timer = None
        if deadline is not None:
            timer = loop.call_later(max(0.0, deadline - time.monotonic()), self._expire, search)
        try:
            return await search.future
        except asyncio.CancelledError:
            self._forget(search, "gone")
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def close(self, grace_seconds: float = 5.0) -> None:
        """Finish what was begun or waits; refuse what is not done in time, and what comes now."""
        end = time.monotonic() + grace_seconds
        with self._lock:
            self._is_closed = True
        for _ in self._threads:
            self._wake.put(None)
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        with self._lock:
            left = [*self._quick.all(), *self._heavy.all()]
            self._quick, self._heavy = _Line(), _Line()
            for search in left:
                self._leave(search)
        _deliver(left, [RequestError("UNAVAILABLE", CLOSED) for _ in left])
        if self._shadow is not None:
            self._shadow.close()

    # The queue

    def _planned(self, search: "_Search") -> "_Search":
        plan = search.plan = self._plan(search.loaded, search.signature_name)
        if plan.join is not None:
            search.key = plan.join.key(search.inputs)
        search.is_joined = self._coalesce and search.key is not None
        return search

    def _may_search_here(self, search: "_Search", loop: asyncio.AbstractEventLoop) -> bool:
        """Whether a request is quick, and alone for a while: what comes next will find the loop free."""
        return (
            search.plan.is_instant(search)
            and self._turn(loop).is_calm(loop)
            and self._n_free == len(self._threads)  # without the lock: at worst a wrong guess
            and not self._n_queued
            and not self._is_closed
        )

    def _turn(self, loop: asyncio.AbstractEventLoop) -> "_Turn":
        turn = self._turns.get(loop)
        if turn is None:
            with self._lock:
                turn = self._turns.setdefault(loop, _Turn())
        return turn

    def _search_here(self, search: "_Search") -> Outputs:
        started = time.monotonic()
        outcome = self._alone(search)
        self._note([search], [outcome], started, time.monotonic() - started)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _put(self, search: "_Search") -> None:
        with self._lock:
            self._refuse_if_full(search)
            search.line = self._heavy if search.plan.is_heavy(search) else self._quick
            search.line.append(search)
            self._n_queued += 1
            self._n_numbers += search.n_numbers
            wake = self._n_idle > 0
            self._n_idle -= wake
        if wake:
            self._wake.put(None)

    def _refuse_if_full(self, search: "_Search") -> None:
        if self._is_closed:
            raise RequestError("UNAVAILABLE", CLOSED)
        is_too_much = self._n_queued > 0 and self._n_numbers + search.n_numbers > MAX_NUMBERS
        if self._n_queued >= self._max_queued or is_too_much:
            self._monitoring.refused("full")
            raise RequestError("UNAVAILABLE", FULL)

    def _plan(self, loaded: Loaded, signature_name: str) -> "_Plan":
        plan = self._plans.get(loaded, {}).get(signature_name)
        if plan is None:
            join = join_of(loaded.servable.signatures, signature_name)
            with self._lock:
                plans = self._plans.setdefault(loaded, {})
                plan = plans.setdefault(signature_name, _Plan(signature_name, join))
        return plan

    def _forget(self, search: "_Search", reason: str) -> None:
        """Take a request out of the queue, if it still waits there."""
        with self._lock:
            if search.line is None:
                return
            search.line.remove(search)
            self._leave(search)
        self._monitoring.refused(reason)

    def _expire(self, search: "_Search") -> None:
        if not search.future.done():
            search.future.set_exception(RequestError("DEADLINE_EXCEEDED", LATE))
            self._forget(search, "late")

    def _leave(self, search: "_Search") -> None:
        search.line = None
        self._n_queued -= 1
        self._n_numbers -= search.n_numbers

    def _take(self) -> tuple[list["_Search"], bool]:
        """What a free thread searches next, and whether it is heavy; nothing: it has to wait.

        The oldest comes first, but heavy ones leave a thread to the others.
        """
        is_heavy = self._n_heavy_left > 0 and self._heavy.is_before(self._quick)
        batch = (self._heavy if is_heavy else self._quick).take(self._max_batch, self._n_free)
        for search in batch:
            self._leave(search)
        self._n_heavy_left -= is_heavy
        self._n_free -= bool(batch)
        return batch, is_heavy

    # The threads

    def _work(self) -> None:
        is_heavy = was_busy = False
        while True:
            with self._lock:
                self._n_heavy_left += is_heavy
                self._n_free += was_busy
                batch, is_heavy = self._take()
                was_busy = bool(batch)
                if not batch and self._is_closed:
                    return
                self._n_idle += not batch
            if not batch:
                self._wake.get()
                continue
            try:
                self._search(batch)
            except Exception:
                log.exception("a fault while searching")
            batch.clear()  # else this thread would keep a version that is gone

    def _search(self, batch: list["_Search"]) -> None:
        batch = self._begin(batch)
        if not batch:
            return
        started = time.monotonic()
        outcomes = self._outcomes(batch)
        seconds = time.monotonic() - started
        _deliver(batch, outcomes)
        self._note(batch, outcomes, started, seconds)

    def _begin(self, batch: Sequence["_Search"]) -> list["_Search"]:
        """Those that somebody still waits for."""
        now = time.monotonic()
        late = [search for search in batch if search.deadline is not None and search.deadline <= now]
        if late:
            _deliver(late, [RequestError("DEADLINE_EXCEEDED", LATE) for _ in late])
            for _ in late:
                self._monitoring.refused("late")
        return [search for search in batch if search not in late and not search.future.done()]

    def _note(
        self, batch: Sequence["_Search"], outcomes: Sequence[Outcome], started: float, seconds: float
    ) -> None:
        """Count a search that is over, and offer its answers to be checked."""
        loaded, name = batch[0].loaded, batch[0].signature_name
        good = [(s.inputs, o) for s, o in zip(batch, outcomes, strict=True) if not isinstance(o, Exception)]
        waited = [started - search.queued_at for search in batch]
        self._monitoring.batch(loaded.model_name, name, waited, seconds, len(good))
        if self._shadow is not None:
            for drawn in self._shadow.draw(name, len(good)):
                self._shadow.offer(loaded, name, *good[drawn])

    def _outcomes(self, batch: Sequence["_Search"]) -> Sequence[Outcome]:
        """Each request's answer, as if it had been searched alone."""
        if len(batch) == 1:
            return [self._alone(batch[0])]
        plan, join = batch[0].plan, batch[0].plan.join
        assert join is not None
        queries = join.queries([search.inputs for search in batch])
        if not np.isfinite(queries).all():
            return self._outcomes_of_finite(batch, join)
        started = _now()
        try:
            name, inputs = join.request(queries, batch[0].inputs)
            outputs = batch[0].loaded.servable.run(name, inputs)
            answers = join.split(outputs, [search.n_queries for search in batch])
            plan.learn(batch[0].key, len(queries), started)
            return answers
        except Exception as error:
            if not isinstance(error, RequestError):
                log.exception("%s: joined requests could not be answered", plan.signature_name)
            return self._one_by_one(batch)

    def _one_by_one(self, batch: Sequence["_Search"]) -> Sequence[Outcome]:
        """Where one request spoils the others, or together they are more than the index takes."""
        outcomes = [self._alone(search) for search in batch]
        if not any(isinstance(outcome, Exception) for outcome in outcomes):
            batch[0].plan.most_queries = max(1, sum(search.n_queries for search in batch) // 2)
        return outcomes

    def _outcomes_of_finite(self, batch: Sequence["_Search"], join: Join) -> Sequence[Outcome]:
        """As `_outcomes`; a request with a number that is not finite would be refused with all others."""
        finite = [bool(np.isfinite(join.queries([search.inputs])).all()) for search in batch]
        good = [search for search, is_finite in zip(batch, finite, strict=True) if is_finite]
        answers = iter(self._outcomes(good) if good else [])
        return [
            next(answers) if is_finite else self._alone(search)
            for search, is_finite in zip(batch, finite, strict=True)
        ]

    def _alone(self, search: "_Search") -> Outcome:
        servable = search.loaded.servable
        started = _now()
        try:
            if self._batching is not None:
                return run_batched(servable, search.signature_name, search.inputs, self._batching)
            outputs = servable.run(search.signature_name, search.inputs)
            search.plan.learn(search.key, search.n_queries, started)
            return outputs
        except RequestError as error:
            return error
        except Exception as error:
            log.exception("%s: a fault while searching", search.signature_name)
            return error


class _Turn:
    """Whether requests come to an event loop one by one. Used by that loop's thread alone."""

    def __init__(self) -> None:
        self._is_asked = False  # in this turn of the loop
        self._crowded_until = 0.0

    def is_calm(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether no other has asked in this turn of the loop, and no two in one turn for a while."""
        if self._is_asked:
            self._crowded_until = time.monotonic() + CALM_SECONDS
            return False
        self._is_asked = True
        loop.call_soon(self._next)
        return time.monotonic() > self._crowded_until

    def _next(self) -> None:
        self._is_asked = False


class _Search:
    """One request on its way.

    Attributes:
        loop: of the future.
        key: requests of one version and signature that have the same take as long and may be joined; None:
            how long it takes may depend on what is in it.
        is_joined: with others of its key.
        line: where it waits, None where it does not.
    """

    __slots__ = (
        "deadline", "future", "inputs", "is_joined", "key", "line", "loaded", "loop", "n_numbers",
        "n_queries", "plan", "queued_at", "signature_name",
    )  # fmt: skip

    def __init__(
        self,
        loaded: Loaded,
        signature_name: str,
        inputs: Inputs,
        deadline: float | None,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.loaded, self.signature_name, self.inputs = loaded, signature_name, inputs
        self.deadline, self.loop = deadline, loop
        self.future: asyncio.Future[Outputs] = loop.create_future()
        self.queued_at = time.monotonic()
        self.n_queries = _n_queries(inputs)
        self.n_numbers = sum(len(tensor.values) for tensor in inputs.values())
        self.key: Hashable | None = None
        self.is_joined = False
        self.line: _Line | None = None
        self.plan: _Plan

    @property
    def group(self) -> Hashable:
        return (self.loaded, self.signature_name, self.key) if self.is_joined else self


class _Line:
    """Requests that wait, those that can be joined in groups; groups in the order of their firsts' ages."""

    def __init__(self) -> None:
        self._groups: OrderedDict[Hashable, deque[_Search]] = OrderedDict()

    def append(self, search: _Search) -> None:
        self._groups.setdefault(search.group, deque()).append(search)

    def remove(self, search: _Search) -> None:
        group = self._groups.pop(search.group)
        group.remove(search)
        if group:
            self._put_back(search.group, group)

    def is_before(self, other: "_Line") -> bool:
        """Whether the first of this line came before the first of the other one."""
        first, others = self._first(), other._first()
        return first is not None and (others is None or first.queued_at <= others.queued_at)

    def take(self, max_queries: int, n_free: int) -> list[_Search]:
        """The first, and of its group what is better searched with it.

        Args:
            n_free: threads that could take a part of the group now, this one included.
        """
        if not self._groups:
            return []
        key, group = self._groups.popitem(last=False)
        first = group.popleft()
        batch = [first]
        share = -(-(1 + len(group)) // n_free) * first.n_queries
        left = first.plan.n_together(first, min(max_queries, share)) - first.n_queries
        while group and group[0].n_queries <= left:
            batch.append(group.popleft())
            left -= batch[-1].n_queries
        if group:
            self._put_back(key, group)
        return batch

    def all(self) -> list[_Search]:
        return [search for group in self._groups.values() for search in group]

    def _put_back(self, key: Hashable, group: deque[_Search]) -> None:
        """A group with another first than before, at its place by age."""
        self._groups[key] = group
        by_age = sorted(self._groups.items(), key=lambda item: item[1][0].queued_at)  # all but one in order
        self._groups = OrderedDict(by_age)

    def _first(self) -> _Search | None:
        return next(iter(self._groups.values()))[0] if self._groups else None


class _Plan:
    """How requests of one signature of one version are joined, and what was learned of how long they take.

    Sizes are known by their number of binary digits. What holds others up, and so what is heavy and what is
    instant, shows in the time of day. What pays shows in the thread's own time: by the day a search waits for
    others' Python, and most so where many requests come at once.
    """

    def __init__(self, signature_name: str, join: Join | None) -> None:
        self.signature_name, self.join = signature_name, join
        self.most_queries: int | None = None  # joined; None: nothing was refused for being too many
        self._seconds: dict[tuple[Hashable | None, int], tuple[float, float]] = {}  # day and own, a query
        self._last: float | None = None  # a query, of any key and size
        self._n_declined = 0

    def is_heavy(self, search: _Search) -> bool:
        known = self._known(search.key, search.n_queries)
        seconds = self._last if known is None else known[0]
        if seconds is None:  # only these are known to be quick before they are measured
            return self.signature_name not in (DEFAULT_SIGNATURE, BATCH_SIGNATURE)
        return seconds * search.n_queries > HEAVY_SECONDS

    def is_instant(self, search: _Search) -> bool:
        """Whether it may hold up an event loop: its like took next to no time, waiting for ops included."""
        known = self._known(search.key, search.n_queries)
        return search.key is not None and known is not None and known[0] * search.n_queries < HERE_SECONDS

    def n_together(self, search: _Search, n_queries: int) -> int:
        """Queries to search together with this one, of so many; not so many that they are heavy together."""
        if self.most_queries is not None:
            n_queries = min(n_queries, self.most_queries)
        alone = self._known(search.key, search.n_queries)
        if alone is None or n_queries <= search.n_queries:
            return n_queries
        n_queries = max(1, min(n_queries, int(HEAVY_SECONDS / max(*alone, 1e-6))))
        together = self._known(search.key, n_queries)
        if together is None or together[1] < alone[1]:
            return n_queries
        self._n_declined += 1
        return 1 if self._n_declined % TRY_AGAIN else n_queries

    def learn(self, key: Hashable | None, n_queries: int, started: tuple[float, float]) -> None:
        """A search is over. The shortest count most: a first one is longer, and one on a busy machine."""
        day, own = ((now - then) / max(1, n_queries) for now, then in zip(_now(), started, strict=True))
        self._last = day
        if len(self._seconds) >= MAX_KEYS:
            self._seconds.clear()
        known = key, n_queries.bit_length()
        before = self._seconds.get(known, (day, own))
        self._seconds[known] = _learned(before[0], day), _learned(before[1], own)

    def _known(self, key: Hashable | None, n_queries: int) -> tuple[float, float] | None:
        return self._seconds.get((key, n_queries.bit_length()))


def _learned(before: float, seconds: float) -> float:
    return seconds if seconds < before else before + (seconds - before) * FORGET


def _now() -> tuple[float, float]:
    """Seconds of the day and of this thread's own work: ScaNN's, but not what TensorFlow's own threads do, as
    the product of matrices and the best of a long row."""
    return time.monotonic(), time.thread_time()


def _n_queries(inputs: Inputs) -> int:
    queries = inputs.get("queries")
    return queries.shape[0] if queries is not None and len(queries.shape) == 2 else 1


def _n_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _deliver(batch: Sequence[_Search], outcomes: Sequence[Outcome]) -> None:
    """Hand out the answers; an event loop is woken once for all of its own."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Outputs], Outcome]]] = {}
    for search, outcome in zip(batch, outcomes, strict=True):
        by_loop.setdefault(search.loop, []).append((search.future, outcome))
    for loop, answers in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(_settle, answers)


def _settle(answers: Sequence[tuple[asyncio.Future[Outputs], Outcome]]) -> None:
    for future, outcome in answers:
        with contextlib.suppress(asyncio.InvalidStateError):  # cancelled, or too late
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)
