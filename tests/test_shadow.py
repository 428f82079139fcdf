"""Live recall: which answers are drawn, what is compared, and that no request ever notices."""

import threading
import time
from collections import Counter

import numpy as np
import pytest
from searching_parts import NO_SCORE, TinyIndex, floats, loaded, one, several, submit

from serving import shadow
from serving.coalescing import Searches
from serving.monitoring import Monitoring
from serving.protocol import RequestError, Tensor
from serving.shadow import Answer, Shadow, compared

ROWS = np.eye(4)  # a query's scores are its own numbers
QUERY = [0.9, 0.8, 0.7, 0.1]


class Counted(Monitoring):
    """Keeps what shadow tells, in the order of its coming."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: Counter[str] = Counter()
        self.recalls: list[tuple] = []

    def shadowed(self, model_name: str, outcome: str) -> None:
        self.outcomes[outcome] += 1

    def recall(self, *what) -> None:
        self.recalls.append(what)

    def wait(self, n: int, seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while sum(self.outcomes.values()) < n:
            assert time.monotonic() < end, f"{self.outcomes} after {seconds} s"
            time.sleep(0.002)


@pytest.fixture
def counted() -> Counted:
    return Counted()


@pytest.fixture
def watching(counted):
    """Every answer is drawn."""
    made = Shadow(counted, rate=1.0, seed=1)
    yield made
    made.close()


def answered(index: TinyIndex, signature_name: str, inputs: dict[str, Tensor]) -> tuple:
    """As `offer` takes it."""
    return loaded(index, 7), signature_name, inputs, index.run(signature_name, inputs)


# What is compared


def test_search_that_finds_all_has_recall_one(watching, counted):
    watching.offer(*answered(TinyIndex(ROWS), "search", several([QUERY, QUERY[::-1]], k=3)))
    counted.wait(2)
    assert counted.recalls == [("index", 7, "search", 3, 3, 3)] * 2  # of model 7's search: 3 of 3 each


def test_search_that_misses_some_is_counted_by_what_it_missed(watching, counted):
    index = TinyIndex(ROWS, found=2)  # answers two, and says of the third that there is none
    watching.offer(*answered(index, "search", several([QUERY], k=3)))
    counted.wait(1)
    assert counted.recalls == [("index", 7, "search", 3, 2, 3)]


def test_serving_default_is_compared_by_its_scores(watching, counted):
    index = TinyIndex(ROWS, k=3)
    version, name, inputs, _ = answered(index, "serving_default", one(QUERY))
    missed_the_best = {
        "output_1": floats([0.8, 0.7, 0.1]), "output_2": Tensor("DT_INT32", (3,), [1, 2, 3]),
    }  # fmt: skip
    watching.offer(version, name, inputs, missed_the_best)
    counted.wait(1)
    assert counted.recalls == [("index", 7, "serving_default", 3, 2, 3)]


def test_an_answer_of_serving_default_that_is_not_full_misses_the_rest(watching, counted):
    """It had room for more; how many, the batch signature says."""
    watching.offer(*answered(TinyIndex(ROWS, k=3, found=1), "serving_default", one(QUERY)))
    counted.wait(1)
    assert counted.recalls == [("index", 7, "serving_default", 3, 1, 3)]


def answer(scores, ids=None, k=None) -> Answer:
    scores = np.array(scores, np.float32)
    version = loaded(TinyIndex(ROWS))
    return Answer(version, "search", k or len(scores), np.zeros(4), scores, ids)


EXACT = np.array([0.9, 0.8, 0.7], np.float32)
IDS = [b"a", b"b", b"c"]


@pytest.mark.parametrize(
    ("scores", "ids", "hits", "reason"),
    [
        ([0.9, 0.8, 0.7], [b"a", b"b", b"c"], 3, "the same"),
        ([0.9, 0.8, 0.7], [b"c", b"b", b"a"], 3, "ids count, not their order"),
        ([0.9, 0.8, 0.6], [b"a", b"b", b"x"], 2, "one is another"),
        ([0.9, 0.8, 0.7], [b"a", b"b", b"x"], 3, "another, but as near as the last exact one"),
        ([0.9, NO_SCORE, NO_SCORE], [b"a", b"", b""], 1, "fewer were found"),
        ([0.5, 0.4, 0.3], [b"x", b"y", b"z"], 0, "all are others"),
    ],
)
def test_documents_are_compared_by_their_ids(scores, ids, hits, reason):
    assert compared(answer(scores, ids), EXACT, IDS) == (hits, 3), reason


@pytest.mark.parametrize(
    ("scores", "k", "hits_and_wanted", "reason"),
    [
        ([0.9, 0.8, 0.7], 3, (3, 3), "a row a document"),
        ([0.9000001, 0.8, 0.6999999], 3, (3, 3), "rounded otherwise"),
        ([0.9, 0.7, 0.6], 3, (2, 3), "0.8 is missing"),
        ([0.9, 0.85, 0.8], 3, (2, 2), "0.85 is a second passage: only two documents reach into three rows"),
        ([0.9, 0.9, 0.9], 3, (1, 1), "all three rows are of one document"),
        ([0.8, 0.8, 0.8], 3, (1, 2), "of another one than the best"),
        ([0.9], 3, (1, 3), "there was room for two more"),
        ([], 3, (0, 3), "nothing was found"),
    ],
)
def test_rows_are_compared_by_their_scores(scores, k, hits_and_wanted, reason):
    assert compared(answer(scores, k=k), EXACT, IDS) == hits_and_wanted, reason


def test_documents_of_equal_scores_count_once_each():
    exact = np.array([0.9, 0.8, 0.8], np.float32)
    assert compared(answer([0.9, 0.8, 0.8]), exact, IDS) == (3, 3)
    assert compared(answer([0.9, 0.8, 0.1]), exact, IDS) == (2, 3)


def test_where_the_index_has_fewer_documents_than_k_no_more_are_wanted():
    exact = np.array([0.9, NO_SCORE, NO_SCORE], np.float32)
    assert compared(answer([0.9, NO_SCORE, NO_SCORE], [b"a", b"", b""]), exact, [b"a", b"", b""]) == (1, 1)
    assert compared(answer([0.9, NO_SCORE, NO_SCORE]), exact, [b"a", b"", b""]) == (1, 1)


def test_a_document_in_two_passages_is_wanted_once(watching, counted):
    """Rows 0 and 1 are passages of `a`: the three best rows belong to two documents, which are found."""
    index = TinyIndex(ROWS, ids=[b"a", b"a", b"b", b"c"], k=3)
    watching.offer(*answered(index, "serving_default", one(QUERY)))
    watching.offer(*answered(index, "search", several([QUERY], k=2)))
    counted.wait(2)
    assert sorted(counted.recalls) == [
        ("index", 7, "search", 2, 2, 2),
        ("index", 7, "serving_default", 3, 2, 2),
    ]


# What is drawn


def test_the_rate_is_the_share_that_is_drawn():
    made = Shadow(Monitoring(), rate=0.01, seed=3)
    drawn = sum(len(made.draw("serving_default", n)) for n in [1, 64, 135] * 500)  # 100,000 requests
    made.close()
    assert 850 < drawn < 1150  # 1,000, and 32 of standard deviation


def test_every_request_of_a_batch_may_be_drawn():
    made = Shadow(Monitoring(), rate=0.5, seed=3)
    drawn = Counter(i for _ in range(2000) for i in made.draw("search", 4))
    made.close()
    assert set(drawn) == {0, 1, 2, 3}
    assert all(850 < n < 1150 for n in drawn.values())


def test_only_what_is_approximate_is_drawn(watching):
    assert watching.draw("serving_default", 2) == watching.draw("search", 2) == [0, 1]
    for name in ("exact", "search_filtered", "serving_default_batch"):
        assert watching.draw(name, 2) == []


def test_at_a_rate_of_zero_nothing_is_drawn_and_no_thread_runs():
    n_threads = threading.active_count()
    made = Shadow(Monitoring(), rate=0.0)
    assert threading.active_count() == n_threads
    assert made.draw("search", 1_000_000) == []
    made.close()


def test_drawing_costs_next_to_nothing():
    made = Shadow(Monitoring(), rate=0.001)
    started = time.perf_counter()
    for _ in range(1000):
        made.draw("serving_default", 8)
    seconds = time.perf_counter() - started
    made.close()
    assert seconds < 1000 * 20e-6  # measured: about half a microsecond


# No request notices


def test_a_version_without_exact_is_skipped_and_counted(watching, counted):
    index = TinyIndex(ROWS)
    del index.signatures["exact"]
    watching.offer(*answered(index, "search", several([QUERY])))
    assert counted.outcomes == {"skipped": 1}


def test_an_exact_search_that_fails_is_counted(watching, counted):
    index = TinyIndex(ROWS)
    offered = answered(index, "search", several([QUERY]))

    def refuse(signature_name, inputs):
        raise RequestError("CANCELLED", "Session has been closed.")

    index.run = refuse
    watching.offer(*offered)
    counted.wait(1)
    assert counted.outcomes == {"failed": 1}


def test_a_fault_is_counted_and_the_next_answer_is_compared(watching, counted):
    index = TinyIndex(ROWS)
    version, name, inputs, outputs = answered(index, "search", several([QUERY]))
    watching.offer(version, name, inputs, {"scores": outputs["scores"]})  # no ids
    watching.offer(version, name, inputs, outputs)
    counted.wait(2)
    assert counted.outcomes == {"failed": 1, "compared": 1}


def test_what_is_more_than_waits_is_dropped_and_counted(watching, counted, monkeypatch):
    monkeypatch.setattr(shadow, "MAX_WAITING", 3)
    index = TinyIndex(ROWS)
    offered = answered(index, "search", several([QUERY]))
    index.forget_begun()
    with index.holding("exact"):
        watching.offer(*offered)
        index.wait_until_begun(1)
        for _ in range(5):
            watching.offer(*offered)
        assert counted.outcomes == {"dropped": 2}
    counted.wait(6)
    assert counted.outcomes == {"dropped": 2, "compared": 4}


def test_what_waits_for_one_version_and_k_is_searched_as_one(watching, counted):
    index = TinyIndex(ROWS)
    version = loaded(index, 7)
    offers = [(several([QUERY], k=k), k) for k in (2, 2, 3, 2)]
    with index.holding("exact"):
        for inputs, _ in [(several([QUERY], k=1), 1)]:
            watching.offer(version, "search", inputs, index.run("search", inputs))
        index.wait_until_begun(2)
        for inputs, _ in offers:
            watching.offer(version, "search", inputs, index.run("search", inputs))
        index.calls.clear()
    counted.wait(5)
    assert index.calls == [("exact", 3), ("exact", 1)]


def test_of_a_request_with_many_queries_a_few_are_compared(watching, counted):
    watching.offer(*answered(TinyIndex(ROWS), "search", several([QUERY] * 50)))
    counted.wait(shadow.MAX_QUERIES)
    assert counted.outcomes == {"compared": shadow.MAX_QUERIES}


def test_exact_searches_take_no_more_than_their_share_of_the_time(counted, monkeypatch):
    monkeypatch.setattr(shadow, "SHARE_OF_TIME", 0.25)
    monkeypatch.setattr(shadow, "TOGETHER", 1)
    index = TinyIndex(ROWS)
    offered = answered(index, "search", several([QUERY]))
    times = []
    run = index.run

    def slow(signature_name, inputs):
        times.append(time.monotonic())
        time.sleep(0.03)
        return run(signature_name, inputs)

    index.run = slow
    made = Shadow(counted, rate=1.0)
    for _ in range(3):
        made.offer(*offered)
    counted.wait(3)
    made.close()
    assert min(np.diff(times)) > 0.1  # 0.03 s of work is a quarter of 0.12 s


def test_only_after_a_versions_first_exact_search_is_the_pause_cut(counted, monkeypatch):
    monkeypatch.setattr(shadow, "MAX_FIRST_PAUSE", 0.01)
    index = TinyIndex(ROWS)
    offered = answered(index, "search", several([QUERY]))
    run, pauses = index.run, []
    index.run = lambda *call: (time.sleep(0.02), run(*call))[1]
    made = Shadow(counted, rate=1.0)
    monkeypatch.setattr(made._stop, "wait", pauses.append)  # a pause takes no time
    for n in (1, 2):
        made.offer(*offered)
        counted.wait(n)
    made.close()
    assert pauses[0] == 0.01
    assert pauses[1] >= 19 * 0.02  # 0.02 s are a twentieth of that and the search


def test_closing_stops_the_thread(counted):
    made = Shadow(counted, rate=1.0)
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "shadow" and thread.is_alive()]


def test_searches_offer_what_they_answered_and_nothing_that_failed(counted):
    index = TinyIndex(ROWS)
    version = loaded(index, 7)
    made = Searches(counted, n_threads=2, shadow=Shadow(counted, rate=1.0))
    good = submit(made, version, "search", several([QUERY], k=3))
    bad = submit(made, version, "search", several([[1.0]], k=3))
    assert bad.exception(10) is not None
    assert good.exception(10) is None
    counted.wait(1)
    made.close()
    assert counted.recalls == [("index", 7, "search", 3, 3, 3)]
