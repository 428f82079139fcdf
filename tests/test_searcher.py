"""A version opened by TensorFlow: its answers as arrays, to many threads, joined, and until it is closed."""

import asyncio
import gc
import threading
import weakref
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from searching_parts import submit
from serving_parts import K, export_tuned, unit_rows

from serving.coalescing import Searches
from serving.handles import Loaded, LoadError
from serving.monitoring import Monitoring
from serving.protocol import RequestError, Tensor
from serving.searcher import Searcher
from serving.shadow import Shadow

DIM, N = 8, 60
ROWS = unit_rows(N, DIM)
QUERIES = unit_rows(40, DIM, seed=9)
IDS = [f"d{row}" for row in range(N)]
BEST = np.argsort(-(QUERIES @ ROWS.T), axis=1, kind="stable")[:, :K]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export_tuned(folder, tree=(ROWS, IDS), exact=(ROWS, IDS))
    return folder


@pytest.fixture(scope="module", params=["tree", "exact"])
def searcher(request, exported) -> Iterator[Searcher]:
    opened = Searcher.open(exported / request.param)
    yield opened
    opened.close()


def vector(query: np.ndarray) -> dict[str, Tensor]:
    return {"input_1": Tensor("DT_FLOAT", query.shape, query)}


def matrix(queries: np.ndarray, k: int = K) -> dict[str, Tensor]:
    scalars = {"k": k, "num_leaves_to_search": 4, "num_reordering_candidates": N}
    inputs = {name: Tensor("DT_INT32", (), [value]) for name, value in scalars.items()}
    return inputs | {"queries": Tensor("DT_FLOAT", queries.shape, queries.ravel())}


def test_answers_are_arrays_in_row_major_order(searcher):
    answer = searcher.run("serving_default", vector(QUERIES[0]))
    scores, rows = answer["output_1"], answer["output_2"]
    assert (scores.dtype, scores.shape, scores.values.dtype) == ("DT_FLOAT", (K,), np.float32)
    assert (rows.dtype, rows.shape, rows.values.dtype) == ("DT_INT32", (K,), np.int32)
    assert rows.values.tolist() == BEST[0].tolist()
    found = searcher.run("search", matrix(QUERIES[:2]))["document_ids"]
    assert (found.dtype, found.shape) == ("DT_STRING", (2, K))
    assert found.values.tolist() == [IDS[row].encode() for row in BEST[:2].ravel()]


@pytest.mark.parametrize("values", [list, lambda query: array("f", query), np.asarray])
def test_a_vector_may_be_a_list_or_any_kind_of_array(searcher, values):
    inputs = {"input_1": Tensor("DT_FLOAT", (DIM,), values(QUERIES[0].tolist()))}
    assert searcher.run("serving_default", inputs)["output_2"].values.tolist() == BEST[0].tolist()


def test_many_threads_may_ask_at_once(searcher):
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda i: searcher.run("serving_default", vector(QUERIES[i % 40])), range(400))
        assert [a["output_2"].values.tolist() for a in answers] == [BEST[i % 40].tolist() for i in range(400)]


def test_an_op_refuses_in_its_own_words(searcher):
    with pytest.raises(RequestError, match=f"width of a query, wanted {DIM}") as caught:
        searcher.run("serving_default", vector(QUERIES[0][:3]))
    assert caught.value.code == "INVALID_ARGUMENT"
    assert not caught.value.message.startswith("Graph execution error")


def test_what_is_no_version_cannot_be_opened(tmp_path):
    with pytest.raises(LoadError, match=r"Could not find SavedModel \.pb or \.pbtxt") as caught:
        Searcher.open(tmp_path)
    assert caught.value.code == "NOT_FOUND"


def test_a_closed_version_refuses_and_gives_back_what_it_held(exported):
    opened = Searcher.open(exported / "tree")
    session = weakref.ref(opened._session)
    opened.close()
    opened.close()  # again: nothing
    gc.collect()
    assert session() is None
    with pytest.raises(RequestError, match=r"Session has been closed\."):
        opened.run("serving_default", vector(QUERIES[0]))


def test_closing_waits_for_what_is_searched(exported):
    """Searches that run end with an answer, later ones are refused, and none fails in another way."""
    opened = Searcher.open(exported / "tree")
    begun = threading.Barrier(5)
    outcomes = []

    def keep_asking() -> None:
        begun.wait()
        while True:
            try:
                found = opened.run("search", matrix(QUERIES))["document_ids"].values.tolist()
                outcomes.append(found == [IDS[row].encode() for row in BEST.ravel()])
            except RequestError as error:
                outcomes.append(error.message)
                return

    threads = [threading.Thread(target=keep_asking) for _ in range(4)]
    for thread in threads:
        thread.start()
    begun.wait()
    opened.close()
    for thread in threads:
        thread.join(30)
    assert set(outcomes) - {True} == {"Session has been closed."}


def test_a_fault_of_this_server_is_no_refusal_of_an_op(searcher):
    """Else nobody would see a traceback."""
    with pytest.raises(KeyError, match="k"):
        searcher.run("search", vector(QUERIES[0]))


@pytest.mark.parametrize(
    ("dtype", "cut"),
    [
        ("DT_UINT8", [44, 255, 112]),  # 300 - 256, 256 - 1, and 70000 - 273 * 256
        ("DT_INT8", [44, -1, 112]),
        ("DT_INT16", [300, -1, 4464]),  # 70000 - 65536
        ("DT_UINT16", [300, 65535, 4464]),
    ],
)
def test_numbers_too_large_for_a_small_type_are_cut_to_its_bits(tmp_path, dtype, cut):
    """They come in fields of 32 bits, and tensor.cc takes the lower ones."""
    opened = Searcher.open(export_echo(tmp_path, dtype))
    answer = opened.run("serving_default", {"x": Tensor(dtype, (3,), [300, -1, 70000])})
    opened.close()
    assert answer["y"].values.tolist() == cut


def export_echo(folder: Path, dtype: str) -> Path:
    """A version that answers `y`, which is its input `x`."""
    import tensorflow as tf

    spec = tf.TensorSpec([None], getattr(tf, dtype.removeprefix("DT_").lower()), "x")
    module = tf.Module()
    module.echo = tf.function(lambda x: {"y": tf.identity(x)}, input_signature=[spec])
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.echo})
    return folder


# Joined, by a real index


@pytest.fixture
def searches() -> Iterator[Searches]:
    made = Searches(Monitoring(), n_threads=2)
    yield made
    made.close()


def joined_at_all(made: Searches, version: Loaded, name: str, requests: list) -> list:
    """Answers or errors of requests that came at once; two keep the threads busy while the others wait."""

    async def asked() -> list:
        asks = [made.ask(version, name, inputs) for inputs in requests]
        return await asyncio.gather(*asks, return_exceptions=True)

    return asyncio.run(asked())


def test_joined_requests_are_answered_as_if_alone(searcher, searches, monkeypatch):
    sizes = []
    run = searcher.run
    monkeypatch.setattr(searcher, "run", lambda name, inputs: (sizes.append(name), run(name, inputs))[1])
    version = Loaded("index", 1, searcher)
    singles = [vector(query) for query in QUERIES] * 5
    answers = joined_at_all(searches, version, "serving_default", singles)
    assert "serving_default_batch" in sizes
    for answer, inputs in zip(answers, singles, strict=True):
        alone = run("serving_default", inputs)
        assert answer["output_2"].values.tolist() == alone["output_2"].values.tolist()
        np.testing.assert_allclose(answer["output_1"].values, alone["output_1"].values, atol=1e-6)
        for name, tensor in answer.items():
            assert (tensor.dtype, tensor.shape) == (alone[name].dtype, alone[name].shape)


def test_joined_searches_are_answered_as_if_alone(searcher, searches):
    version = Loaded("index", 1, searcher)
    requests = [matrix(QUERIES[i : i + n]) for n in (1, 2, 3) for i in range(30)]
    answers = joined_at_all(searches, version, "search", requests)
    for answer, inputs in zip(answers, requests, strict=True):
        alone = searcher.run("search", inputs)
        assert answer["document_ids"].values.tolist() == alone["document_ids"].values.tolist()
        np.testing.assert_allclose(answer["scores"].values, alone["scores"].values, atol=1e-6)


def test_among_many_a_bad_vector_fails_alone_in_the_ops_words(searcher, searches):
    version = Loaded("index", 1, searcher)
    odd = QUERIES[0].copy()
    odd[3] = np.nan
    requests = [vector(query) for query in [*QUERIES, odd, QUERIES[0][:3], *QUERIES]]
    answers = joined_at_all(searches, version, "serving_default", requests)
    failed = {i: str(answer) for i, answer in enumerate(answers) if isinstance(answer, Exception)}
    assert list(failed) == [40, 41]
    assert "queries must be finite" in failed[40]
    assert f"width of a query, wanted {DIM}" in failed[41]


def test_live_recall_of_an_index_that_finds_everything_is_one(searcher):
    counted = Monitoring()
    made = Searches(counted, n_threads=2, shadow=Shadow(counted, rate=1.0))
    version = Loaded("index", 7, searcher)
    for query in QUERIES[:5]:
        submit(made, version, "serving_default", vector(query)).result(30)
    submit(made, version, "search", matrix(QUERIES[:2], k=5)).result(30)
    for _ in range(1500):
        recalls = {row[0][2:]: row[1:3] for row in counted._recall.values()}
        if recalls.get(("search", "5")) == (10, 10) and recalls.get(("serving_default", str(K))) == (15, 15):
            break
        threading.Event().wait(0.02)
    made.close()
    assert recalls == {("search", "5"): (10, 10), ("serving_default", str(K)): (15, 15)}
