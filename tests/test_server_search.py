"""`search`, `exact` and `search_filtered` over the local server, from real versions made by TunedScaNN."""

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from serving_parts import K, export_tuned, server_process, unit_rows, wait_for_version

from serving.client import Client
from serving.errors import ServingError

DIM, N = 8, 60
ROWS, OTHERS = unit_rows(N, DIM), unit_rows(N, DIM, seed=8)
QUERIES = unit_rows(5, DIM, seed=9)
ODD = 'é "quoted" \\ and\n한국어 🙂'
IDS = [ODD, *(f"d{row}" for row in range(1, N))]
NO_SCORE = -3.40282347e38  # float32's least; JSON knows no infinity
LOAD_SECONDS = 200  # TensorFlow's import takes most of it on a busy machine
EVERYTHING = {"num_leaves_to_search": 4, "num_reordering_candidates": N}
NO_FILTER = {"allowed_document_ids": [], "excluded_document_ids": [], "minimum_score": -1.0}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    others = [f"other{row}" for row in range(N)]
    export_tuned(folder, tree=(ROWS, IDS), exact=(ROWS, IDS), others=(OTHERS, others))
    return folder


@pytest.fixture(scope="module", params=["tree", "exact"])
def url(request, exported, tmp_path_factory) -> Iterator[str]:
    """A server of one version; with a tree, and below index.exact_below without one."""
    base = tmp_path_factory.mktemp("models") / "index"
    shutil.copytree(exported / request.param, base / "7")
    with server_process(base) as (address, _), Client(address) as client:
        client.wait_until_ready(deadline=LOAD_SECONDS)
        yield address


def post(url: str, document: dict[str, Any] | str) -> tuple[int, dict[str, Any]]:
    body = document if isinstance(document, str) else json.dumps(document)
    answer = requests.post(f"{url}/v1/models/index:predict", body.encode(), timeout=30)
    return answer.status_code, answer.json()


def ask(url: str, signature_name: str, **inputs: Any) -> dict[str, Any]:
    status, answer = post(
        url, {"signature_name": signature_name, "inputs": {"queries": QUERIES.tolist()} | inputs}
    )
    assert status == 200, answer
    return answer["outputs"]


def refusal(url: str, signature_name: str, **inputs: Any) -> str:
    given = {"queries": QUERIES.tolist(), "k": 3} | ({} if signature_name == "exact" else EVERYTHING)
    status, answer = post(url, {"signature_name": signature_name, "inputs": given | inputs})
    assert status == 400, answer
    return answer["error"]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_query_that_is_not_finite_is_refused(url, number):
    queries = QUERIES.tolist()
    queries[3][5] = number
    for signature in ("search", "exact"):
        assert "queries must be finite" in refusal(url, signature, queries=queries)
    status, answer = post(url, {"inputs": queries[3]})
    assert (status, "queries must be finite" in answer["error"]) == (400, True)


def best(rows: list[int], k: int, queries: np.ndarray = QUERIES) -> list[list[str]]:
    """Ids of the k best of some rows, by NumPy."""
    order = np.argsort(-(queries @ ROWS[rows].T), axis=1, kind="stable")[:, :k]
    return [[IDS[rows[at]] for at in found] for found in order]


EVERY = list(range(N))


def test_search_and_exact_answer_with_ids_and_scores(url):
    for found in (ask(url, "search", k=4, **EVERYTHING), ask(url, "exact", k=4)):
        assert found["document_ids"] == best(EVERY, 4)
        scores = -np.sort(-(QUERIES @ ROWS.T), axis=1)[:, :4]
        np.testing.assert_allclose(found["scores"], scores, atol=1e-6)


def test_one_query_by_serving_default_is_one_row_of_search(url):
    status, answer = post(url, {"inputs": QUERIES[0].tolist()})
    assert status == 200
    assert [IDS[row] for row in answer["outputs"]["output_2"]] == best(EVERY, K)[0]


def test_ids_are_text_both_ways_whatever_they_hold(url):
    query = {"queries": [ROWS[0].tolist()]}
    for given in (ODD, {"b64": base64.b64encode(ODD.encode()).decode()}):
        inputs = query | {"k": 2} | EVERYTHING | NO_FILTER | {"allowed_document_ids": [given, "d3"]}
        assert ask(url, "search_filtered", **inputs)["document_ids"] == [[ODD, "d3"]]
    escaped = json.dumps({"signature_name": "search", "inputs": query | {"k": 1} | EVERYTHING})
    plain = requests.post(f"{url}/v1/models/index:predict", escaped, timeout=30).content
    # RapidJSON escapes what JSON must have escaped, and nothing else
    assert 'é \\"quoted\\" \\\\ and\\n한국어 🙂"'.encode() in plain


def test_a_filter_allows_excludes_and_asks_for_a_score(url):
    inputs = EVERYTHING | NO_FILTER
    allowed = ask(
        url, "search_filtered", k=3, **inputs | {"allowed_document_ids": [IDS[row] for row in range(9)]}
    )
    assert allowed["document_ids"] == best(list(range(9)), 3)
    excluded = ask(
        url, "search_filtered", k=3, **inputs | {"excluded_document_ids": [IDS[row] for row in range(40)]}
    )
    assert excluded["document_ids"] == best(list(range(40, N)), 3)
    assert ask(url, "search_filtered", k=3, **inputs)["document_ids"] == best(EVERY, 3)


def test_what_no_row_is_found_for_is_an_empty_id_with_the_least_score(url):
    found = ask(url, "search_filtered", k=2, **EVERYTHING | NO_FILTER | {"allowed_document_ids": ["nobody"]})
    assert found["document_ids"] == [["", ""]] * len(QUERIES)
    assert found["scores"] == [[pytest.approx(NO_SCORE)] * 2] * len(QUERIES)
    high = ask(url, "search_filtered", k=2, **EVERYTHING | NO_FILTER | {"minimum_score": 1.5})
    assert high["document_ids"] == [["", ""]] * len(QUERIES)


@pytest.mark.parametrize(
    ("signature_name", "inputs", "said"),
    [
        ("search", {"k": 0}, "k, wanted 1 to 1000, got:] [0]"),
        ("search", {"k": 1001}, "k, wanted 1 to 1000, got:] [1001]"),
        ("search", {"num_leaves_to_search": 0}, "num_leaves_to_search, wanted 1 to"),
        (
            "search",
            {"num_reordering_candidates": 10_001},
            "num_reordering_candidates, wanted 1 to 10000, got:] [10001]",
        ),
        ("exact", {"k": 0}, "k, wanted 1 to 1000, got:] [0]"),
        ("search", {"queries": [[1.0, 2.0]]}, f"width of a query, wanted {DIM}, got:] [2]"),
        ("exact", {"queries": [[1.0, 2.0]]}, f"width of a query, wanted {DIM}, got:] [2]"),
        ("search", {"queries": [[0.5] * DIM] * 4097}, "number of queries, wanted 1 to 4096, got:] [4097]"),
    ],
)
def test_what_the_graph_refuses_is_a_400_that_says_which_input(url, signature_name, inputs, said):
    error = refusal(url, signature_name, **inputs)
    assert error.startswith("assertion failed: [")
    assert said in error
    assert "\n\t [[" in error  # the node, as every op's error has it


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"k": 2.0}, "JSON Value: 2.0 Type: Number is not of expected type: int32"),
        ({"k": "2"}, 'JSON Value: "2" Type: String is not of expected type: int32'),
        ({"queries": "one"}, 'JSON Value: "one" Type: String is not of expected type: float'),
    ],
)
def test_a_value_of_another_type_is_refused_before_the_graph(url, inputs, said):
    assert refusal(url, "search", **inputs) == said


def test_an_input_that_is_not_given_is_named(url):
    status, answer = post(url, {"signature_name": "search", "inputs": {"queries": QUERIES.tolist(), "k": 3}})
    assert (status, answer) == (
        400,
        {"error": "Missing named input: num_leaves_to_search in 'inputs' object."},
    )


VECTOR = QUERIES[0].tolist()


@pytest.mark.parametrize(
    ("signature_name", "inputs"),
    [
        ("search", {"queries": VECTOR}),
        ("search", {"queries": []}),
        ("search", {"queries": [[]]}),
        ("search", {"queries": 1.0}),
        ("search", {"queries": [[VECTOR]]}),
        ("search", {"k": [3, 3]}),
        ("search", {"k": []}),
        ("search", {"num_leaves_to_search": [4, 4]}),
        ("search", {"num_reordering_candidates": [[N, N]]}),
        ("exact", {"queries": VECTOR}),
        ("exact", {"queries": [[VECTOR]]}),
        ("exact", {"k": [3, 3]}),
        ("search_filtered", NO_FILTER | {"allowed_document_ids": [["d1", "d2"]]}),
        ("search_filtered", NO_FILTER | {"excluded_document_ids": "d1"}),
        ("search_filtered", NO_FILTER | {"minimum_score": [0.1, 0.2]}),
    ],
)
def test_an_input_of_another_rank_is_refused_and_the_server_goes_on(url, signature_name, inputs):
    # A fed tensor's shape is not checked against the signature, there or here: the graph must refuse it.
    assert refusal(url, signature_name, **inputs)
    assert ask(url, "exact", k=1)["document_ids"] == best(EVERY, 1)


def test_the_row_form_makes_a_vector_of_k_and_is_refused(url):
    row = {"queries": VECTOR, "k": 3} | EVERYTHING
    status, answer = post(url, {"signature_name": "search", "instances": [row, row]})
    assert status == 400
    assert "\n\t [[" in answer["error"]
    assert ask(url, "exact", k=1)["document_ids"] == best(EVERY, 1)


def test_several_queries_by_serving_default_batch_are_as_many_single_ones(url):
    found = ask(url, "serving_default_batch")
    for i, query in enumerate(QUERIES.tolist()):
        status, answer = post(url, {"inputs": query})
        assert (status, answer["outputs"]["output_2"]) == (200, found["rows"][i])
        np.testing.assert_allclose(answer["outputs"]["output_1"], found["scores"][i], atol=1e-6)


def test_queries_that_meet_are_answered_as_if_alone(url):
    """They are searched together; one of them is refused, and the others do not notice."""
    queries = unit_rows(40, DIM, seed=10)
    wanted = best(EVERY, K, queries)
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(post, url, {"inputs": query.tolist()}) for query in queries]
        wrong = [pool.submit(post, url, {"inputs": [float("nan")] * DIM}) for _ in range(4)]
        for at, (status, answer) in enumerate(one.result() for one in asked):
            assert status == 200
            assert [IDS[row] for row in answer["outputs"]["output_2"]] == wanted[at]
        for status, answer in (one.result() for one in wrong):
            assert (status, "queries must be finite" in answer["error"]) == (400, True)


def test_the_metadata_name_five_signatures_with_their_types_and_shapes(url):
    with Client(url) as client:
        shown = client.metadata()["metadata"]["signature_def"]["signature_def"]
    float_, int_, string = "DT_FLOAT", "DT_INT32", "DT_STRING"
    search = {
        "queries": (float_, [-1, DIM]), "k": (int_, []), "num_leaves_to_search": (int_, []),
        "num_reordering_candidates": (int_, []),
    }  # fmt: skip
    filters = {
        "allowed_document_ids": (string, [-1]), "excluded_document_ids": (string, [-1]),
        "minimum_score": (float_, []),
    }  # fmt: skip
    found = {"scores": (float_, [-1, -1]), "document_ids": (string, [-1, -1])}
    wanted = {
        "serving_default": (
            {"input_1": (float_, [-1])}, {"output_1": (float_, None), "output_2": (int_, None)},
        ),
        "serving_default_batch": (
            {"queries": search["queries"]}, {"scores": (float_, [-1, K]), "rows": (int_, [-1, K])},
        ),
        "search": (search, found),
        "exact": ({name: search[name] for name in ("queries", "k")}, found),
        "search_filtered": (search | filters, found),
    }  # fmt: skip
    signatures = {name: s for name, s in shown.items() if name != "__saved_model_init_op"}
    assert {
        n: tuple(map(types_and_shapes, (s["inputs"], s["outputs"]))) for n, s in signatures.items()
    } == wanted
    assert {s["method_name"] for s in signatures.values()} == {"tensorflow/serving/predict"}


def types_and_shapes(tensors: dict[str, Any]) -> dict[str, tuple]:
    shapes = {n: t["tensor_shape"] for n, t in tensors.items()}
    sizes = {n: None if s["unknown_rank"] else [int(d["size"]) for d in s["dim"]] for n, s in shapes.items()}
    return {name: (tensors[name]["dtype"], sizes[name]) for name in tensors}


def test_a_client_calls_any_signature_and_hears_what_it_lacks(url):
    inputs = {"queries": QUERIES.tolist(), "k": 4}
    with Client(url) as client:
        assert client.call("exact", inputs, version=7)["document_ids"] == best(EVERY, 4)
        with pytest.raises(ServingError, match='400: Serving signature name: "near" not found'):
            client.call("near", inputs)


def test_a_reload_never_mixes_two_versions_answers(exported, tmp_path):
    """Another index under 8, then 7's files under 9, as a rollback puts them: both name one searcher."""
    base = tmp_path / "models" / "index"
    shutil.copytree(exported / "tree", base / "7")
    truth = {tuple(map(tuple, best(EVERY, 4))): "first"}
    order = np.argsort(-(QUERIES @ OTHERS.T), axis=1, kind="stable")[:, :4]
    truth[tuple(tuple(f"other{row}" for row in rows) for rows in order)] = "second"
    with server_process(base) as (url, _):
        with Client(url) as client:
            client.wait_until_ready(deadline=LOAD_SECONDS)
        stop = threading.Event()

        def keep_asking(signature_name: str, **inputs: int) -> list[str]:
            seen = []
            while not stop.is_set():
                ids = ask(url, signature_name, k=4, **inputs)["document_ids"]
                answered = truth[tuple(map(tuple, ids))]  # a mix is no key
                if not seen or seen[-1] != answered:
                    seen.append(answered)
            return seen

        with ThreadPoolExecutor(3) as pool:
            askers = [pool.submit(keep_asking, "search", **EVERYTHING) for _ in range(2)]
            askers.append(pool.submit(keep_asking, "exact"))
            try:
                for number, name in ((8, "others"), (9, "tree")):
                    shutil.copytree(exported / name, base / f".{number}.partial")
                    (base / f".{number}.partial").rename(base / str(number))
                    wait_for_version(url, number, "AVAILABLE", LOAD_SECONDS)
                    wait_for_version(url, number - 1, "END")
            finally:
                stop.set()
        for asker in askers:
            assert asker.result() == ["first", "second", "first"]
