"""The queue of searches: what is searched together, what alone, in what order, and what is not at all."""

import asyncio
import gc
import threading
import time
import weakref
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
from searching_parts import TinyIndex, floats, loaded, number, one, several, submit

from serving import coalescing
from serving.batching import Batching
from serving.coalescing import Searches
from serving.monitoring import Monitoring
from serving.protocol import RequestError, Tensor

CROSS = [[1, 0], [0, 1], [-1, 0], [0, -1]]  # row 0 lies right, 1 up, 2 left, 3 down
RIGHT, UP, LEFT, DOWN = ([2, 1], [1, 2], [-2, -1], [-1, -2])  # each nearest to the row of its name
N_THREADS = 2


@contextmanager
def searches(**settings):
    made = Searches(Monitoring(), n_threads=N_THREADS, **settings)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def index() -> TinyIndex:
    return TinyIndex(CROSS)


@contextmanager
def all_threads_busy(made: Searches):
    """Every thread searches another index until the block ends; what is submitted in the block waits."""
    index = TinyIndex(CROSS)
    version, busy = loaded(index), []
    with index.holding("serving_default"):
        for _ in range(N_THREADS):  # one after the other: two that come at once are searched as one
            busy.append(submit(made, version, "serving_default", one(RIGHT)))
            index.wait_until_begun(1)
        yield
    for future in busy:
        future.result(10)


def rows_of(future: Future) -> list[int]:
    return list(future.result(10)["output_2"].values)


def ids_of(future: Future) -> list[list[bytes]]:
    ids = future.result(10)["document_ids"]
    return np.asarray(ids.values, object).reshape(ids.shape).tolist()


def error_of(future: Future) -> tuple[str, str]:
    error = future.exception(10)
    assert isinstance(error, RequestError), error
    return error.code, error.message


def test_a_request_is_searched_alone_where_no_thread_is_busy(index):
    with searches() as made:
        answer = submit(made, loaded(index), "serving_default", one(RIGHT)).result(10)
    assert index.calls == [("serving_default", 1)]
    assert list(answer["output_2"].values) == [0, 1]
    assert list(answer["output_1"].values) == [2, 1]  # [2, 1] x [1, 0] and [0, 1]


def test_requests_that_wait_are_searched_together_and_each_gets_its_own_answer(index):
    version = loaded(index)
    with searches() as made:
        with all_threads_busy(made):
            waiting = [submit(made, version, "serving_default", one(v)) for v in (UP, LEFT, DOWN, RIGHT)]
        assert [rows_of(future) for future in waiting] == [[1, 0], [2, 3], [3, 2], [0, 1]]
    assert index.calls == [("serving_default_batch", 4)]
    answer = waiting[0].result()
    assert list(answer) == ["output_1", "output_2"]
    assert [(t.dtype, t.shape) for t in answer.values()] == [("DT_FLOAT", (2,)), ("DT_INT32", (2,))]
    assert list(answer["output_1"].values) == [2, 1]


def test_what_waits_of_another_version_is_not_mixed_in(index):
    other = TinyIndex(CROSS[::-1])
    version, another = loaded(index), loaded(other, 2)
    with searches() as made:
        with all_threads_busy(made):
            waiting = [submit(made, v, "serving_default", one(RIGHT)) for v in (version, another) * 2]
        assert [rows_of(future)[0] for future in waiting] == [0, 3, 0, 3]
    assert index.calls == other.calls == [("serving_default_batch", 2)]


def test_without_a_signature_for_several_each_request_goes_alone(index):
    del index.signatures["serving_default_batch"]
    version = loaded(index)
    with searches() as made:
        with all_threads_busy(made):
            waiting = [submit(made, version, "serving_default", one(v)) for v in (UP, LEFT)]
        assert [rows_of(future) for future in waiting] == [[1, 0], [2, 3]]
    assert index.calls == [("serving_default", 1)] * 2


def test_a_signature_of_that_name_with_other_outputs_is_not_trusted(index):
    batch = index.signatures["serving_default_batch"]
    del batch.outputs["rows"]
    version = loaded(index)
    with searches() as made:
        with all_threads_busy(made):
            waiting = [submit(made, version, "serving_default", one(v)) for v in (UP, LEFT)]
        assert [rows_of(future) for future in waiting] == [[1, 0], [2, 3]]
    assert index.calls == [("serving_default", 1)] * 2


def test_coalescing_can_be_switched_off(index):
    version = loaded(index)
    with searches(coalesce=False) as made:
        with all_threads_busy(made):
            waiting = [submit(made, version, "serving_default", one(v)) for v in (UP, LEFT)]
        assert [rows_of(future) for future in waiting] == [[1, 0], [2, 3]]
    assert index.calls == [("serving_default", 1)] * 2


def test_search_requests_are_joined_where_their_scalars_are_equal(index):
    version = loaded(index)
    with searches() as made:
        submit(made, version, "search", several([RIGHT])).result(10)  # measured: from now on it is quick
        index.calls.clear()
        with all_threads_busy(made):
            first = submit(made, version, "search", several([UP, LEFT], k=1))
            other = submit(made, version, "search", several([UP], k=3))
            second = submit(made, version, "search", several([DOWN], k=1))
        assert ids_of(first) == [[b"1"], [b"2"]]
        assert ids_of(second) == [[b"3"]]
        assert ids_of(other) == [[b"1", b"0", b"2"]]
        assert first.result()["scores"].shape == (2, 1)
    assert sorted(index.calls) == [("search", 1), ("search", 3)]


@pytest.mark.parametrize("name", ["k", "num_leaves_to_search", "num_reordering_candidates"])
def test_a_difference_in_any_scalar_keeps_requests_apart(index, name):
    version = loaded(index)
    with searches() as made:
        with all_threads_busy(made):
            waiting = [submit(made, version, "search", several([UP]) | {name: number(n)}) for n in (2, 3)]
        for future in waiting:
            future.result(10)
    assert index.calls == [("search", 1)] * 2


def test_no_more_queries_than_max_batch_are_joined(index):
    version = loaded(index)
    with searches(max_batch=3) as made:
        with all_threads_busy(made):
            waiting = [submit(made, version, "serving_default", one(UP)) for _ in range(7)]
        assert [rows_of(future) for future in waiting] == [[1, 0]] * 7
    assert sorted(n for _, n in index.calls) == [1, 3, 3]


@pytest.mark.parametrize(
    ("vector", "said"),
    [
        ([1, 2, 3], "width of a query: (3,)"),
        ([[1, 2]], "width of a query: (1, 2)"),
        ([], "width of a query: (0,)"),
    ],
)
def test_a_query_of_another_shape_fails_alone_in_its_own_words(index, vector, said):
    version = loaded(index)
    with searches() as made:
        with all_threads_busy(made):
            waiting = [submit(made, version, "serving_default", one(v)) for v in (UP, vector, LEFT)]
        assert [rows_of(waiting[i]) for i in (0, 2)] == [[1, 0], [2, 3]]
        assert error_of(waiting[1]) == ("INVALID_ARGUMENT", said)
    assert ("serving_default_batch", 2) in index.calls


def test_a_query_of_another_type_fails_alone(index):
    version = loaded(index)
    doubles = {"input_1": Tensor("DT_DOUBLE", (2,), [1.0, 2.0])}
    with searches() as made, all_threads_busy(made):
        for inputs in (one(UP), doubles, one(LEFT)):
            submit(made, version, "serving_default", inputs)
    assert sorted(index.calls) == [("serving_default", 1), ("serving_default_batch", 2)]


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("signature_name", ["serving_default", "search"])
def test_a_query_that_is_not_finite_fails_alone(index, number, signature_name):
    requests = {"serving_default": one, "search": lambda vector: several([vector])}[signature_name]
    version = loaded(index)
    with searches() as made:
        with all_threads_busy(made):
            waiting = [submit(made, version, signature_name, requests(v)) for v in (UP, [1, number], LEFT)]
        assert error_of(waiting[1]) == ("INVALID_ARGUMENT", "queries must be finite")
        for i in (0, 2):
            assert waiting[i].exception(10) is None


def test_numbers_too_large_to_add_up_are_searched_like_any(index):
    """The sum of such a query is infinite; the query is not."""
    version = loaded(index)
    with searches() as made:
        with all_threads_busy(made):
            waiting = [submit(made, version, "serving_default", one(v)) for v in ([2e38, 3e38], UP)]
        assert [rows_of(future) for future in waiting] == [[1, 0], [1, 0]]
    assert index.calls == [("serving_default_batch", 2)]


def sleeping(index: TinyIndex, seconds: float):
    """An index's `run` that takes so long without any work of the thread that asks."""
    run = index.run

    def slept(signature_name, inputs):
        time.sleep(seconds)
        return run(signature_name, inputs)

    return slept


def busy(seconds: float) -> None:
    """This thread's own time, as a search takes it."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@pytest.mark.parametrize(("seconds_together", "joined"), [(0.004, False), (0.0005, True)])
def test_requests_are_joined_only_where_that_takes_less_than_one_after_the_other(
    index, seconds_together, joined
):
    version, run = loaded(index), index.run

    def timed(signature_name, inputs):
        busy(seconds_together if signature_name == "serving_default_batch" else 0.001)
        return run(signature_name, inputs)

    index.run = timed
    with searches() as made:
        submit(made, version, "serving_default", one(UP)).result(10)  # 1 ms a query, alone
        for _ in range(2):  # two together: 2 ms a query, or a quarter of one
            index.calls.clear()
            with all_threads_busy(made):
                waiting = [submit(made, version, "serving_default", one(UP)) for _ in range(2)]
            assert [rows_of(future) for future in waiting] == [[1, 0]] * 2
    assert index.calls == ([("serving_default_batch", 2)] if joined else [("serving_default", 1)] * 2)


def search_in(made: Searches, version, signature_name: str, inputs) -> coalescing._Search:
    """As `ask` makes it."""

    async def planned() -> coalescing._Search:
        loop = asyncio.get_running_loop()
        return made._planned(coalescing._Search(version, signature_name, inputs, None, loop))

    return asyncio.run(planned())


def test_the_oldest_comes_first_even_if_it_is_what_was_left_of_a_group(index):
    """1 and 2 could be joined, but one query is the most; 3 came later and must not overtake 2."""
    version = loaded(index)
    with searches() as made:
        line = coalescing._Line()
        first, second = (search_in(made, version, "search", several([UP], k=1)) for _ in range(2))
        third = search_in(made, version, "search", several([UP], k=2))
        for search in (first, second, third):
            line.append(search)
        assert [line.take(1, 1) for _ in range(3)] == [[first], [second], [third]]


def test_a_group_whose_first_is_gone_is_as_old_as_its_second(index):
    version = loaded(index)
    with searches() as made:
        line = coalescing._Line()
        gone, other, left = (search_in(made, version, "search", several([UP], k=k)) for k in (1, 2, 1))
        for search in (gone, other, left):
            line.append(search)
        line.remove(gone)
        assert [line.take(256, 1) for _ in range(2)] == [[other], [left]]


def test_what_waits_long_for_others_work_is_not_joined_until_it_is_heavy(index):
    """TensorFlow multiplies matrices on threads of its own, and the caller's own time says nothing."""
    version = loaded(index)
    index.run = sleeping(index, 0.03)  # two together may take 60 ms, which is more than 50
    with searches() as made:
        submit(made, version, "serving_default", one(UP)).result(10)
        index.calls.clear()
        with all_threads_busy(made):
            waiting = [submit(made, version, "serving_default", one(UP)) for _ in range(2)]
        assert [rows_of(future) for future in waiting] == [[1, 0]] * 2
    assert index.calls == [("serving_default", 1)] * 2


def test_what_waits_is_shared_by_the_threads_that_are_free(index):
    """Both become free at once, and each takes a half."""
    version = loaded(index)
    with searches() as made:
        line = coalescing._Line()
        for _ in range(7):
            line.append(search_in(made, version, "serving_default", one(UP)))
        assert [len(line.take(256, n_free)) for n_free in (2, 1)] == [4, 3]


def test_more_than_the_index_takes_at_once_is_searched_one_by_one_and_then_in_smaller_parts():
    index = TinyIndex(CROSS, max_queries=3)
    version = loaded(index)
    with searches() as made:
        with all_threads_busy(made):
            waiting = [submit(made, version, "serving_default", one(UP)) for _ in range(4)]
        assert [rows_of(future) for future in waiting] == [[1, 0]] * 4
        assert index.calls == [("serving_default_batch", 4)] + [("serving_default", 1)] * 4
        with all_threads_busy(made):
            waiting = [submit(made, version, "serving_default", one(UP)) for _ in range(4)]
        assert [rows_of(future) for future in waiting] == [[1, 0]] * 4
        assert index.calls[5] == ("serving_default_batch", 2)
        assert ("serving_default_batch", 4) not in index.calls[5:]


def test_an_answer_with_another_number_of_rows_is_not_split_but_asked_for_again(index):
    run = index.run

    def halved(signature_name, inputs):
        outputs = run(signature_name, inputs)
        if signature_name != "serving_default_batch":
            return outputs
        return {n: Tensor(t.dtype, (1, 2), t.values[:2]) for n, t in outputs.items()}

    index.run = halved
    version = loaded(index)
    with searches() as made:
        with all_threads_busy(made):
            waiting = [submit(made, version, "serving_default", one(v)) for v in (UP, LEFT)]
        assert [rows_of(future) for future in waiting] == [[1, 0], [2, 3]]


def test_rows_that_were_not_found_are_cut_off_as_serving_default_does():
    index = TinyIndex(CROSS, k=3, found=1)
    version = loaded(index)
    with searches() as made:
        alone = submit(made, version, "serving_default", one(UP)).result(10)
        with all_threads_busy(made):
            waiting = [submit(made, version, "serving_default", one(UP)) for _ in range(2)]
        together = waiting[1].result(10)
    assert index.calls == [("serving_default", 1), ("serving_default_batch", 2)]
    for answer in (alone, together):
        assert answer["output_2"].shape == answer["output_1"].shape == (1,)
        assert list(answer["output_2"].values) == [1]


def test_a_thousand_requests_of_many_threads_all_get_their_own_answers():
    rows = np.eye(16, dtype=np.float32)
    version = loaded(TinyIndex(rows, k=1))
    wrong = []

    def keep_asking(made: Searches, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for row in rng.integers(0, 16, 125):
            if rng.random() < 0.5:
                found = rows_of(submit(made, version, "serving_default", one(rows[row])))
            else:
                found = [int(ids_of(submit(made, version, "search", several([rows[row]], k=1)))[0][0])]
            if found != [row]:
                wrong.append((row, found))

    with searches() as made:
        threads = [threading.Thread(target=keep_asking, args=(made, seed)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


# The event loop


def ask(index, *calls, **settings):
    """Answers or errors of (signature, inputs) asked at once on one event loop."""

    async def asked():
        with searches(**settings) as made:
            version = loaded(index)
            return await asyncio.gather(*(made.ask(version, *call) for call in calls), return_exceptions=True)

    return asyncio.run(asked())


def test_an_event_loop_asks_and_gets_answers_and_errors(index):
    good, bad = ask(index, ("serving_default", one(UP)), ("serving_default", one([1])))
    assert list(good["output_2"].values) == [1, 0]
    assert (bad.code, bad.message) == ("INVALID_ARGUMENT", "width of a query: (1,)")


def test_an_event_loop_is_woken_once_for_all_that_was_searched_together(index):
    version = loaded(index)
    wake_ups = []

    async def asked():
        loop = asyncio.get_running_loop()
        wake, loop.call_soon_threadsafe = loop.call_soon_threadsafe, lambda *a: (wake_ups.append(a), wake(*a))
        with searches() as made:
            with all_threads_busy(made):
                tasks = [asyncio.create_task(made.ask(version, "serving_default", one(UP))) for _ in range(9)]
                await asyncio.sleep(0.01)
            return await asyncio.gather(*tasks)

    answers = asyncio.run(asked())
    assert [list(answer["output_2"].values) for answer in answers] == [[1, 0]] * 9
    assert [name for name, _ in index.calls] == ["serving_default_batch"]
    assert len([call for call in wake_ups if call[0] is coalescing._settle]) == 1


def test_what_nobody_waits_for_any_more_is_not_searched_and_leaves_the_queue(index):
    version = loaded(index)

    async def asked():
        with searches(max_queued=1) as made:
            with all_threads_busy(made):
                gone = asyncio.create_task(made.ask(version, "search", several([UP])))
                await asyncio.sleep(0.01)
                gone.cancel()
                await asyncio.sleep(0.01)
                stays = submit(made, version, "search", several([LEFT]))  # there is room again
            await asyncio.to_thread(stays.result, 10)
            return gone.cancelled()

    assert asyncio.run(asked())
    assert index.calls == [("search", 1)]


def test_who_goes_while_it_is_searched_harms_nobody(index):
    version = loaded(index)

    async def asked():
        with searches() as made:
            with index.holding("serving_default"):
                gone = asyncio.create_task(made.ask(version, "serving_default", one(UP)))
                await asyncio.to_thread(index.wait_until_begun, 1)
                gone.cancel()
                await asyncio.sleep(0.01)
            return await made.ask(version, "serving_default", one(UP))

    assert list(asyncio.run(asked())["output_2"].values) == [1, 0]


def threads_of(index: TinyIndex) -> list[str]:
    """Fills with the name of the thread of each search."""
    names, run = [], index.run
    index.run = lambda *call: (names.append(threading.current_thread().name), run(*call))[1]
    return names


async def all_free(made: Searches) -> None:
    """A thread that has just answered is busy for a moment more."""
    await asyncio.sleep(0.001)
    while made._n_free < N_THREADS:
        await asyncio.sleep(0.001)


def test_who_asks_alone_is_answered_on_the_event_loops_own_thread_once_the_search_is_known_to_be_quick(index):
    version, names = loaded(index), threads_of(index)

    async def asked(made):
        answers = []
        for _ in range(3):
            answers.append(await made.ask(version, "serving_default", one(UP)))
            await all_free(made)
        return answers

    with searches() as made:
        answers = asyncio.run(asked(made))
        with pytest.raises(RequestError, match="queries must be finite"):
            asyncio.run(made.ask(version, "serving_default", one([1, np.nan])))
    assert [list(answer["output_2"].values) for answer in answers] == [[1, 0]] * 3
    assert names[0].startswith("search-")
    assert names[1:] == ["MainThread"] * 3


def test_who_asks_among_many_is_answered_by_the_threads_for_a_while(index, monkeypatch):
    monkeypatch.setattr(coalescing, "CALM_SECONDS", 60.0)
    version, names = loaded(index), threads_of(index)

    async def asked(made):
        for n_at_once in (1, 1, 3, 1):
            await asyncio.gather(*(made.ask(version, "serving_default", one(UP)) for _ in range(n_at_once)))
            await all_free(made)

    with searches() as made:
        asyncio.run(asked(made))
    assert names[1] == "MainThread"  # alone
    assert names.count("MainThread") == 2  # and the first of three, before others were seen


@pytest.mark.parametrize(
    ("signature_name", "inputs"), [("serving_default", one(UP)), ("search", several([UP, LEFT]))]
)
def test_what_is_not_quick_never_holds_up_the_event_loop(index, signature_name, inputs):
    """Quick by the clock: the thread that asks may do nothing, and wait for TensorFlow's own threads."""
    index.run = sleeping(index, 0.02)
    assert threads_that_answer(index, signature_name, inputs) == {"search"}


def test_what_a_larger_request_may_make_slow_never_holds_up_the_event_loop(index):
    """Nothing tells how many documents a request allows, or how many rows `exact` reads."""
    exact = {"queries": floats([UP]), "k": number(1)}
    assert threads_that_answer(index, "exact", exact) == {"search"}


def test_without_coalescing_too_a_quick_search_is_answered_on_the_event_loops_own_thread(index):
    found = threads_that_answer(index, "serving_default", one(UP), coalesce=False)
    assert found == {"search", "MainThread"}  # the first is measured on a thread


def threads_that_answer(index: TinyIndex, signature_name: str, inputs, **settings) -> set[str]:
    """Of three requests, one after the other on an event loop; without the threads' numbers."""
    version, names = loaded(index), threads_of(index)

    async def asked(made):
        for _ in range(3):
            await made.ask(version, signature_name, inputs)
            await all_free(made)

    with searches(**settings) as made:
        asyncio.run(asked(made))
    return {name.split("-")[0] for name in names}


def test_a_crowd_on_one_event_loop_is_none_on_another(index, monkeypatch):
    monkeypatch.setattr(coalescing, "CALM_SECONDS", 60.0)
    version, names = loaded(index), threads_of(index)

    async def asked(made, n_at_once):
        await asyncio.gather(*(made.ask(version, "serving_default", one(UP)) for _ in range(n_at_once)))
        await all_free(made)

    with searches() as made:
        asyncio.run(asked(made, 1))
        asyncio.run(asked(made, 3))
        names.clear()
        asyncio.run(asked(made, 1))
    assert names == ["MainThread"]


# Deadlines


def test_a_request_whose_time_is_over_is_not_searched(index):
    version = loaded(index)
    with searches() as made:
        with all_threads_busy(made):
            late = submit(made, version, "search", several([UP]), deadline=time.monotonic() + 0.01)
            good = submit(made, version, "search", several([UP]), deadline=time.monotonic() + 60)
            time.sleep(0.02)
        # direct_session.cc, WaitForNotification
        assert error_of(late) == ("DEADLINE_EXCEEDED", "Timed out waiting for notification")
        assert ids_of(good) == [[b"1", b"0"]]
    assert index.calls == [("search", 1)]


def test_at_the_deadline_an_event_loop_has_its_error_even_while_it_is_searched(index):
    version = loaded(index)

    async def asked(made):
        with pytest.raises(RequestError) as caught:
            await made.ask(version, "serving_default", one(UP), deadline=time.monotonic() + 0.05)
        return caught.value

    with searches() as made, index.holding("serving_default"):
        error = asyncio.run(asked(made))
    assert (error.code, error.http_status) == ("DEADLINE_EXCEEDED", 504)


# The queue


def test_a_full_queue_refuses_in_the_real_servers_words_and_takes_requests_again_later(index):
    version = loaded(index)
    with searches(max_queued=3) as made:
        with all_threads_busy(made):
            waiting = [submit(made, version, "serving_default", one(UP)) for _ in range(3)]
            refused = submit(made, version, "serving_default", one(UP))
            # shared_batch_scheduler.h of TensorFlow
            said = "The batch scheduling queue to which this task was submitted is full"
            assert error_of(refused) == ("UNAVAILABLE", said)
            with pytest.raises(RequestError, match=said):
                asyncio.run(made.ask(version, "serving_default", one(UP)))
        assert [rows_of(future) for future in waiting] == [[1, 0]] * 3
        assert rows_of(submit(made, version, "serving_default", one(UP))) == [1, 0]


def test_the_queue_is_full_too_when_its_numbers_fill_the_memory(index, monkeypatch):
    monkeypatch.setattr(coalescing, "MAX_NUMBERS", 20)
    version = loaded(index)
    large = several([UP] * 10)  # 20 numbers, and three scalars
    with searches() as made:
        with all_threads_busy(made):
            waiting = [submit(made, version, "search", large)]  # where nothing waits, anything may
            waiting.append(submit(made, version, "search", several([UP])))
        assert waiting[0].exception(10) is None
        assert error_of(waiting[1])[0] == "UNAVAILABLE"


def test_heavy_searches_leave_a_thread_to_the_others(index):
    version = loaded(index)
    exact = {"queries": floats([UP]), "k": number(1)}
    with searches() as made:
        with index.holding("exact"):
            heavy = [submit(made, version, "exact", exact) for _ in range(3)]
            index.wait_until_begun(1)
            assert rows_of(submit(made, version, "serving_default", one(UP))) == [1, 0]
            assert index.calls == [("exact", 1), ("serving_default", 1)]  # one of two threads
        assert [ids_of(future) for future in heavy] == [[[b"1"]]] * 3


def test_quick_searches_do_not_overtake_a_heavy_one_that_came_before(index):
    version = loaded(index)
    with searches() as made:
        with all_threads_busy(made):
            heavy = submit(made, version, "exact", {"queries": floats([UP]), "k": number(1)})
            quick = [submit(made, version, "serving_default", one(UP)) for _ in range(3)]
        for future in (heavy, *quick):
            future.result(10)
    assert index.calls[0] == ("exact", 1)


def test_exact_is_heavy_until_it_is_known_to_be_quick(index):
    version = loaded(index)
    exact = {"queries": floats([UP]), "k": number(1)}
    with searches() as made:
        submit(made, version, "exact", exact).result(10)  # over four rows: no time at all
        index.forget_begun()
        with index.holding("exact"):
            for _ in range(2):
                submit(made, version, "exact", exact)
            index.wait_until_begun(2)


def test_what_takes_long_is_heavy_whatever_its_name(index, monkeypatch):
    monkeypatch.setattr(coalescing, "HEAVY_SECONDS", 0.01)
    version = loaded(index)
    slow = TinyIndex.run

    def run(signature_name, inputs):
        time.sleep(0.02 if signature_name == "search" else 0)
        return slow(index, signature_name, inputs)

    index.run = run
    with searches() as made:
        submit(made, version, "search", several([UP])).result(10)
        index.forget_begun()
        with index.holding("search"):
            for _ in range(2):
                submit(made, version, "search", several([UP]))
            index.wait_until_begun(1)
            assert rows_of(submit(made, version, "serving_default", one(UP))) == [1, 0]


# Faults, the end


def test_a_fault_in_a_search_reaches_its_caller_and_the_thread_lives(index):
    def broken(signature_name, inputs):
        raise ZeroDivisionError

    version, other = loaded(index), loaded(TinyIndex(CROSS))
    index.run = broken
    with searches() as made:
        for _ in range(2 * N_THREADS):
            assert isinstance(submit(made, version, "exact", several([UP])).exception(10), ZeroDivisionError)
        assert rows_of(submit(made, other, "serving_default", one(UP))) == [1, 0]


def test_a_version_is_held_by_nothing_once_its_searches_are_over(index):
    version = loaded(index)
    with searches() as made:
        with all_threads_busy(made):
            waiting = [submit(made, version, "serving_default", one(UP)) for _ in range(3)]
        for future in waiting:
            future.result(10)
        gone = weakref.ref(version)
        del version
        end = time.monotonic() + 10
        while gone() is not None and time.monotonic() < end:
            gc.collect()
            time.sleep(0.01)
        assert gone() is None


def test_closing_finishes_what_waits_and_refuses_what_comes(index):
    version = loaded(index)
    made = Searches(Monitoring(), n_threads=N_THREADS)
    with all_threads_busy(made):
        waiting = [submit(made, version, "serving_default", one(UP)) for _ in range(3)]
        closing = threading.Thread(target=made.close)
        closing.start()
    closing.join(10)
    assert [rows_of(future) for future in waiting] == [[1, 0]] * 3
    assert error_of(submit(made, version, "serving_default", one(UP)))[0] == "UNAVAILABLE"


def test_closing_waits_no_longer_than_it_is_told(index):
    version = loaded(index)
    made = Searches(Monitoring(), n_threads=N_THREADS)
    with all_threads_busy(made):
        left = submit(made, version, "serving_default", one(UP))
        made.close(grace_seconds=0.05)
        assert error_of(left)[0] == "UNAVAILABLE"


# As the real server with --enable_batching; texts: r2.11, batching_session.cc and batching_util.h

SPLIT = (
    "Batched output tensor's 0th dimension does not equal the sum of the "
    "0th dimension sizes of the input tensors"
)
RANK_0 = "Batching Run() input tensors must have at least one dimension"


@pytest.mark.parametrize(
    ("signature_name", "inputs", "code", "said"),
    [
        ("serving_default", one([1, 2, 0]), "FAILED_PRECONDITION", SPLIT),  # 3 numbers in, k = 2 out
        ("serving_default", {"input_1": floats(1)}, "INVALID_ARGUMENT", RANK_0),
        ("serving_default", one([1, 2]), "INVALID_ARGUMENT", "width of a query: (2,)"),  # the op's own
        ("search", several([[1, 2, 0]]), "INVALID_ARGUMENT", RANK_0),
        ("exact", {"queries": floats([[1, 2, 0]]), "k": number(1)}, "INVALID_ARGUMENT", RANK_0),
        (
            "exact",
            {"queries": floats([[1, 2, 0]]), "k": floats([1, 1])},
            "INVALID_ARGUMENT",
            "Batching Run() input tensors must have equal 0th-dimension size",
        ),
        (
            "serving_default",
            one([0] * 1001),
            "INVALID_ARGUMENT",
            "Task size 1001 is larger than maximum input batch size 1000",
        ),
    ],
)
def test_with_batching_enabled_requests_fail_as_there(signature_name, inputs, code, said):
    index = TinyIndex(np.eye(3), k=2)
    with searches(enable_batching=True) as made:
        assert error_of(submit(made, loaded(index), signature_name, inputs)) == (code, said)


def test_with_batching_enabled_a_vector_as_long_as_k_is_answered(index):
    with searches(enable_batching=True) as made:  # two numbers in, two results out
        assert rows_of(submit(made, loaded(index), "serving_default", one(UP))) == [1, 0]


def test_with_batching_enabled_the_batch_signature_is_answered_and_nothing_is_joined(index):
    version = loaded(index)
    with searches(enable_batching=True) as made:
        with all_threads_busy(made):
            batch = partial(submit, made, version, "serving_default_batch")
            waiting = [batch({"queries": floats([UP, LEFT])}) for _ in range(2)]
        assert [list(future.result(10)["rows"].values) for future in waiting] == [[1, 0, 2, 3]] * 2
    assert index.calls == [("serving_default_batch", 2)] * 2


def test_allowed_batch_sizes_pad_with_the_first_row_and_cut_again(index):
    batching = Batching(max_batch_size=4, allowed_batch_sizes=(1, 4))
    with searches(enable_batching=True, batching=batching) as made:
        queries = {"queries": floats([UP, LEFT])}
        answer = submit(made, loaded(index), "serving_default_batch", queries).result(10)
    assert index.calls == [("serving_default_batch", 4)]
    assert answer["rows"].shape == (2, 2)
    assert list(answer["rows"].values) == [1, 0, 2, 3]
