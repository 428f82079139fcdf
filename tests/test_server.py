"""The local server over sockets: a stand-in index for the protocol, a real one for everything else."""

import gzip
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import requests
from serving_parts import (
    ROOT,
    K,
    RowsSearcher,
    app_server,
    curl,
    export,
    open_rows,
    predict_body,
    publish_rows,
    raw_connection,
    read_answer,
    rows_models,
    rows_server,
    server_process,
    unit_rows,
    wait_for_version,
)

from serving.client import Client
from serving.errors import ServingError
from serving.flags import Flags
from serving.monitoring import Monitoring
from serving.protocol import Route
from serving.server import IndexApp, StartError, make_searches, wait_for_models
from serving.versions import Models
from serving.wanted import ModelConfig

DIM = 8
ROWS = unit_rows(20, DIM)


@pytest.fixture
def base(tmp_path) -> Path:
    publish_rows(tmp_path / "models" / "index", 7, ROWS)
    return tmp_path / "models" / "index"


@pytest.fixture
def url(base):
    with rows_server(base) as (address, _):
        yield address


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """One real SavedModel, a few seconds to make; tests copy it."""
    folder = tmp_path_factory.mktemp("exported") / "saved_model"
    export(ROWS, folder)
    return folder


@pytest.mark.parametrize(
    ("method", "path", "status", "error"),
    [
        ("GET", "/v1/models/nope", 404, "Could not find any versions of model nope"),
        ("GET", "/v1/models/index/versions/9999", 404, "Could not find version 9999 of model index"),
        ("GET", "/v1/models/nope/metadata", 404, "Servable not found for request: Latest(nope)"),
        (
            "GET",
            "/v1/models/index/versions/8/metadata",
            404,
            "Servable not found for request: Specific(index, 8)",
        ),
        ("GET", "/v1/models/index/labels/x/metadata", 400, "Unrecognized servable version label: x"),
        ("GET", "/v1/models/index?x=1", 404, "Could not find any versions of model index?x=1"),
        ("GET", "/v1/models", 400, "Missing model name in request."),
        ("GET", "/v1/models/index/", 400, "Malformed request: GET /v1/models/index/"),
        ("GET", "/v1/../v1/models/index", 400, "Malformed request: GET /v1/../v1/models/index"),
        ("DELETE", "/v1/models/index", 400, "Malformed request: DELETE /v1/models/index"),
        ("PUT", "/v1/models/index:predict", 400, "Malformed request: PUT /v1/models/index:predict"),
        ("PATCH", "/v1/models/index", 400, "Malformed request: PATCH /v1/models/index"),
        ("GET", "/v1/models/..%2f..%2findex", 404, "Could not find any versions of model ../../index"),
    ],
)
def test_a_request_that_means_nothing_gets_the_real_servers_error(url, method, path, status, error):
    got, content_type, body = curl("-X", method, url + path)
    assert (got, content_type, json.loads(body)) == (status, "application/json", {"error": error})


@pytest.mark.parametrize("path", ["/", "/v1", "/health", "/metrics"])
def test_outside_the_api_there_is_an_html_404(url, path):
    status, content_type, body = curl(url + path)
    assert (status, content_type) == (404, "text/html")
    assert "<H1>Not Found</H1>" in body


def ask_bare(url: str, request: str, *, to_end: bool = False):
    with raw_connection(url) as (connection, file):
        connection.sendall(request.replace("\n", "\r\n").encode() + b"\r\n\r\n")
        return read_answer(file, to_end=to_end)


STATUS = "/v1/models/index"


def test_no_answer_names_its_server_and_every_one_has_a_date_and_a_length(url):
    answer = ask_bare(url, f"GET {STATUS} HTTP/1.1\nHost: a")
    assert answer.first == "HTTP/1.1 200 OK"
    assert set(answer.headers) == {"content-type", "date", "content-length"}
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["date"].endswith(" GMT")


def test_head_is_refused_with_a_body_but_no_length(url):
    # libevent 2.1.8, http.c: evhttp_response_needs_body is false, evhttp_make_header writes the body
    with raw_connection(url) as (connection, file):
        connection.sendall(f"HEAD {STATUS} HTTP/1.1\r\n\r\n".encode())
        answer = read_answer(file)
        assert (answer.status, "content-length" in answer.headers) == (400, False)
        said = b'{\n    "error": "Malformed request: HEAD /v1/models/index"\n}'
        assert file.read(len(said)) == said


@pytest.mark.parametrize(
    ("request_head", "first", "headers"),
    [
        (f"GET {STATUS} HTTP/1.0", "HTTP/1.0 200 OK", {"content-type"}),
        (
            f"GET {STATUS} HTTP/1.1\nConnection: close",
            "HTTP/1.1 200 OK",
            {"content-type", "date", "content-length", "connection"},
        ),
    ],
)
def test_a_connection_that_is_not_kept_ends_with_the_answer(url, request_head, first, headers):
    answer = ask_bare(url, request_head, to_end=True)
    assert (answer.first, set(answer.headers)) == (first, headers)
    assert json.loads(answer.body)["model_version_status"][0]["version"] == "7"


def test_http_1_0_may_ask_to_keep_the_connection(url):
    with raw_connection(url) as (connection, file):
        for _ in range(2):
            connection.sendall(f"GET {STATUS} HTTP/1.0\r\nConnection: keep-alive\r\n\r\n".encode())
            answer = read_answer(file)
            assert answer.first == "HTTP/1.0 200 OK"
            assert set(answer.headers) == {"content-type", "content-length", "connection"}
            assert answer.headers["connection"] == "keep-alive"


@pytest.mark.parametrize(
    ("request_head", "status", "reason"),
    [
        ("GET /nothing HTTP/1.1", 404, "Not Found"),
        (f"TRACE {STATUS} HTTP/1.1", 501, "Not Implemented"),
        ("CONNECT a:80 HTTP/1.1", 501, "Not Implemented"),
        (f"BREW {STATUS} HTTP/1.1", 501, "Not Implemented"),  # there: a status 0, which is no HTTP
        ("GET /v1/models/in[dex HTTP/1.1", 400, "Bad Request"),  # no URI by RFC 3986
        ("GET /v1/models/%zz HTTP/1.1", 400, "Bad Request"),
        (f"GET {STATUS} HTTP/2.0", 400, "Bad Request"),
        (f"GET {STATUS}", 400, "Bad Request"),
        (f"GET {STATUS} HTTP/1.1\nno colon", 400, "Bad Request"),
        (f"POST {STATUS}:predict HTTP/1.1\nConnection: keep-alive", 400, "Bad Request"),  # no length
        (f"POST {STATUS}:predict HTTP/1.1\nContent-Length: x", 400, "Bad Request"),
        (
            f"POST {STATUS}:predict HTTP/1.1\nExpect: tea\nContent-Length: 2",
            417,
            "Expectation Failed",
        ),
        (
            f"POST {STATUS}:predict HTTP/1.1\nTransfer-Encoding: chunked\n\nxx",
            413,
            "Request Entity Too Large",  # libevent's word for chunks that are none
        ),
    ],
)
def test_what_never_reaches_the_api_gets_libevents_page_and_the_connection_ends(
    url, request_head, status, reason
):
    answer = ask_bare(url, request_head, to_end=True)
    assert answer.first == f"HTTP/1.1 {status} {reason}"
    assert (answer.headers["content-type"], answer.headers["connection"]) == ("text/html", "close")
    assert answer.body.decode() == (
        f"<HTML><HEAD>\n<TITLE>{status} {reason}</TITLE>\n</HEAD><BODY>\n<H1>{reason}</H1>\n</BODY></HTML>\n"
    )


def test_an_address_with_scheme_and_host_means_its_path_and_a_fragment_is_part_of_it(url):
    assert ask_bare(url, f"GET http://any.example:80{STATUS} HTTP/1.1").status == 200
    answer = ask_bare(url, f"GET {STATUS}#x HTTP/1.1")  # evhttp_request.cc, decode
    assert json.loads(answer.body) == {"error": "Could not find any versions of model index#x"}


def test_a_client_that_waits_for_leave_to_send_gets_it(url):
    body = predict_body(ROWS[4]).encode()
    head = f"POST {STATUS}:predict HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n"
    with raw_connection(url) as (connection, file):
        connection.sendall(head.encode())
        assert read_answer(file).first == "HTTP/1.1 100 Continue"
        connection.sendall(body)
        assert json.loads(read_answer(file).body)["outputs"]["output_2"][0] == 4


def test_a_body_may_come_in_chunks(url):
    parts = (p for p in (b'{"inputs": ', json.dumps(ROWS[4].tolist()).encode(), b"}"))
    answer = requests.post(f"{url}/v1/models/index:predict", parts, timeout=10)
    assert answer.json()["outputs"]["output_2"][0] == 4


def test_options_want_an_origin(url):
    no, yes = (
        ask_bare(url, f"OPTIONS {STATUS} HTTP/1.1{origin}") for origin in ("", "\nOrigin: https://a.example")
    )
    assert (no.status, no.body, yes.status, yes.body) == (400, b"", 200, b"")
    # libevent's type, where an answer names none
    assert yes.headers["content-type"] == "text/html; charset=ISO-8859-1"
    assert "access-control-allow-origin" not in yes.headers


def test_cors_headers_come_with_the_flag_on_every_answer_of_the_api(base):
    wanted = {
        "access-control-allow-origin": "*",
        "access-control-allow-methods": "POST, GET",
        "access-control-allow-headers": "Content-Type",
    }
    with rows_server(base, rest_api_enable_cors_support=True) as (url, _):
        for request_head in (
            f"OPTIONS {STATUS} HTTP/1.1\nOrigin: http://a.example",
            f"GET {STATUS} HTTP/1.1",
            "GET /v1/models/nope HTTP/1.1",
        ):
            headers = ask_bare(url, request_head).headers
            assert {name: headers.get(name) for name in wanted} == wanted
        assert "access-control-allow-origin" not in ask_bare(url, "GET / HTTP/1.1").headers


METRICS = "/monitoring/prometheus/metrics"


def test_metrics_are_a_404_without_their_file_and_text_with_it(base, url):
    assert curl(url + METRICS)[:2] == (404, "text/html")
    with rows_server(base, monitoring=METRICS) as (monitored, _):
        Client(monitored).predict(ROWS[0])
        status, content_type, page = curl(monitored + METRICS)
        assert (status, content_type) == (200, "text/plain")
        assert ':tensorflow:serving:request_count{model_name="index",status="OK"} 1\n' in page
        asked = (
            ':tensorflow:serving:request_latency_count{model_name="index",API="predict",entrypoint="REST"} 1'
        )
        assert asked in page
        assert curl("-X", "POST", monitored + METRICS)[0] == 200  # any method, as there
        assert curl(f"{monitored}{METRICS}?x=1") == (
            400, "text/plain", f"Unexpected path: {METRICS}?x=1. Should be {METRICS}",
        )  # fmt: skip
        assert curl(f"{monitored}{METRICS}/x")[0] == 404


def test_every_request_to_the_api_is_counted_by_its_code_and_only_good_ones_are_timed(base):
    with rows_server(base, monitoring=METRICS) as (url, _):
        curl(f"{url}/v1/models/index")
        curl(f"{url}/v1/models/nope")
        curl("-d", "{", f"{url}/v1/models/index:predict")
        curl(f"{url}/v1/nothing")
        curl(f"{url}/v1/models/long/versions/9223372036854775808")
        page = curl(url + METRICS)[2]
    count = ":tensorflow:serving:request_count"
    for labels in (
        'model_name="index",status="OK"',
        'model_name="nope",status="NOT_FOUND"',
        'model_name="index",status="INVALID_ARGUMENT"',
        'model_name="",status="INVALID_ARGUMENT"',  # no name was read
        'model_name="long",status="INVALID_ARGUMENT"',  # a name, and no version of 64 bits
    ):
        assert f"{count}{{{labels}}} 1\n" in page
    timed = [
        line for line in page.splitlines() if line.startswith(":tensorflow:serving:request_latency_count")
    ]
    assert timed == [
        ':tensorflow:serving:request_latency_count{model_name="index",API="",entrypoint="REST"} 1'
    ]


def test_status_is_200_whatever_the_case_or_encoding_of_the_path(url):
    for path in ("/v1/models/index", "/V1/Models/index", "/v1/models/%69ndex", "/v1/models/index/labels/x"):
        assert curl(url + path)[0] == 200


def test_a_query_is_answered_in_both_forms(url):
    wanted = np.argsort(-(ROWS @ ROWS[4]))[:K].tolist()
    address = f"{url}/v1/models/index:predict"
    outputs = requests.post(address, predict_body(ROWS[4]), timeout=10).json()["outputs"]
    assert outputs["output_2"] == wanted
    rows = requests.post(address, predict_body(ROWS[4], "instances"), timeout=10).json()["predictions"]
    assert [row["output_2"] for row in rows] == wanted
    assert [row["output_1"] for row in rows] == outputs["output_1"]


def test_a_gzipped_body_is_unpacked_and_a_false_one_is_empty(url):
    address, headers = f"{url}/v1/models/index:predict", {"Content-Encoding": "gzip"}
    packed = gzip.compress(predict_body(ROWS[4]).encode())
    assert requests.post(address, packed, headers=headers, timeout=10).json()["outputs"]["output_2"][0] == 4
    answer = requests.post(address, predict_body(ROWS[4]), headers=headers, timeout=10)
    assert answer.json() == {"error": "JSON Parse error: The document is empty"}
    for spoilt in (packed[:-10], packed + b"more"):
        cut = requests.post(address, spoilt, headers=headers, timeout=10)
        assert cut.json() == {"error": "JSON Parse error: The document is empty"}
    # the real server looks for the very letters
    answer = requests.post(address, predict_body(ROWS[4]), headers={"Content-Encoding": "GZIP"}, timeout=10)
    assert answer.json()["outputs"]["output_2"][0] == 4


def test_what_is_large_is_read_and_printed_aside_and_answered_the_same(url):
    address = f"{url}/v1/models/index:predict"
    small = requests.post(address, predict_body(ROWS[4]), timeout=10)
    large = requests.post(address, " " * 2**17 + predict_body(ROWS[4]), timeout=10)
    assert large.content == small.content


def test_a_connection_is_kept_after_an_error(url):
    with requests.Session() as session:
        first = session.get(f"{url}/v1/models/nope", timeout=10, stream=True)
        connection = first.raw.connection
        first.content  # noqa: B018 reading it gives the connection back
        second = session.get(f"{url}/v1/models/index", timeout=10, stream=True)
        assert second.raw.connection is connection
        second.close()


def test_a_fault_of_ours_is_one_line_to_the_client(base, monkeypatch):
    with rows_server(base) as (url, models):
        with models.use(Route("predict", "index")) as loaded:
            monkeypatch.setattr(loaded.servable, "rows", None)  # what no check foresees
        answer = requests.post(f"{url}/v1/models/index:predict", predict_body(ROWS[0]), timeout=10)
        assert answer.status_code == 500
        assert answer.json() == {"error": "Internal error: AttributeError"}
        assert requests.get(f"{url}/v1/models/index", timeout=10).status_code == 200


def test_examples_are_looked_at_before_the_model(url):
    # http_rest_api_handler.cc: FillClassificationRequestFromJson, then Classify
    address = f"{url}/v1/models/nope:classify"
    missing = "When method is classify, key 'examples' is expected and was not found"
    assert curl("-d", "{}", address)[::2] == (
        400,
        json.dumps({"error": f"JSON Value: {{}} {missing}"}, indent=4),
    )
    good = json.dumps({"examples": [{"x": 1}]})
    status, _, body = curl("-d", good, address)
    assert (status, json.loads(body)["error"]) == (404, "Servable not found for request: Latest(nope)")
    status, _, body = curl("-d", good, f"{url}/v1/models/index:classify")
    assert (status, "No classification inputs found in SignatureDef: " in body) == (400, True)


def test_nesting_beyond_the_readers_stack_is_refused(url):
    for depth in (300, 900, 1000, 1020, 5000):
        body = '{"inputs": ' + "[" * depth + "]" * depth + "}"
        assert curl("-d", body, f"{url}/v1/models/index:predict")[0] == 400
    assert "Nested too deeply" in curl("-d", body, f"{url}/v1/models/index:predict")[2]


class SlowRows(RowsSearcher):
    """Answers when it is told to."""

    def __init__(self, rows: np.ndarray) -> None:
        super().__init__(rows)
        self.asked, self.go = threading.Event(), threading.Event()

    def run(self, signature_name, inputs):
        self.asked.set()
        assert self.go.wait(10)
        return super().run(signature_name, inputs)


@contextmanager
def slow_server(base: Path, **flags):
    """A server of one SlowRows."""
    slow = SlowRows(ROWS)
    models = Models([ModelConfig("index", base)], lambda _: slow)
    models.poll()
    searches = make_searches(Flags(**flags), Monitoring())
    try:
        with app_server(IndexApp(models, searches, Monitoring(), Flags(**flags))) as url:
            yield url, slow
    finally:
        slow.go.set()
        searches.close()
        models.close()


def test_a_request_that_takes_too_long_is_a_504_in_tensorflows_words(base):
    with slow_server(base, rest_api_timeout_in_ms=50) as (url, slow):
        answer = requests.post(f"{url}/v1/models/index:predict", predict_body(ROWS[0]), timeout=10)
        assert (answer.status_code, answer.reason) == (504, "Gateway Time-out")
        assert answer.json() == {"error": "Timed out waiting for notification"}
        slow.go.set()
        answer = requests.post(f"{url}/v1/models/index:predict", predict_body(ROWS[0]), timeout=10)
        assert answer.status_code == 200


def test_a_full_queue_is_a_503(base):
    with slow_server(base, max_queued=1) as (url, slow), ThreadPoolExecutor(20) as pool:
        address = f"{url}/v1/models/index:predict"
        asked = [pool.submit(requests.post, address, predict_body(ROWS[0]), timeout=10) for _ in range(20)]
        done = next(as_completed(asked)).result()
        assert done.status_code == 503
        said = "The batch scheduling queue to which this task was submitted is full"
        assert done.json() == {"error": said}
        slow.go.set()
        assert {a.result().status_code for a in asked} == {200, 503}


def test_a_newer_version_replaces_the_old_and_no_request_fails(base):
    with rows_server(base) as (url, models), Client(url, retries=0) as client:
        stop = threading.Event()

        def ask() -> int:
            n_answers = 0
            with Client(url, retries=0) as own:
                while not stop.is_set():
                    assert len(own.predict(ROWS[0]).rows) == K
                    n_answers += 1
            return n_answers

        with ThreadPoolExecutor(4) as pool:
            askers = [pool.submit(ask) for _ in range(4)]
            for version in range(8, 18):
                publish_rows(base, version, ROWS)
                models.poll()
            stop.set()
            assert all(asker.result() > 0 for asker in askers)
        assert client.available_version() == 17
        assert [row["state"] for row in client.status()] == ["AVAILABLE"] + ["END"] * 10


def test_a_broken_version_leaves_the_old_one_serving_and_shows_its_error(base):
    with rows_server(base) as (url, models), Client(url) as client:
        (base / "8").mkdir()
        models.poll()
        row = client.status(8)[0]
        assert (row["state"], row["status"]["error_code"]) == ("END", "NOT_FOUND")
        assert "Could not find rows.npy" in row["status"]["error_message"]
        assert client.metadata()["model_spec"]["version"] == "7"
        publish_rows(base, 9, ROWS)
        models.poll()
        assert client.available_version() == 9


def test_removing_every_version_unloads(base):
    with rows_server(base) as (url, models), Client(url) as client:
        shutil.rmtree(base / "7")
        models.poll()
        # the status stays 200: only its rows tell
        assert {row["state"] for row in client.status()} == {"END"}
        with pytest.raises(ServingError, match=r"404: Servable not found for request: Latest\(index\)"):
            client.metadata()


def test_a_start_waits_for_a_version_or_says_why_not(tmp_path, base):
    for poll_seconds, how in ((0, "looks only once"), (-1, "looks never")):
        with pytest.raises(ServingError, match=how):
            wait_for_models(Models([ModelConfig("index", tmp_path / "empty")], open_rows), poll_seconds)
    empty = Models([ModelConfig("index", tmp_path / "empty")], open_rows)
    threading.Timer(0.05, publish_rows, (tmp_path / "empty", 3, ROWS)).start()
    wait_for_models(empty, poll_seconds=0.01)
    assert empty.available("index") == [3]
    (base / "8").mkdir()
    with pytest.raises(StartError) as caught:
        wait_for_models(rows_models(base), poll_seconds=0.01)
    # core/load_servables_fast.cc: a list in braces, of servables in braces, each with its id in braces
    servable = "{name: index version: 8} due to error: NOT_FOUND: Could not find rows.npy in " + str(
        base / "8"
    )
    assert str(caught.value).startswith(
        "Failed to start server. Error: UNKNOWN: 1 servable(s) did not become available: {{"
        + servable
        + "}, }"
    )
    assert caught.value.exit_code == 255  # main.cc returns -1


@pytest.mark.slow
def test_a_real_index_is_served_reloaded_and_stopped(tmp_path, exported):
    base = tmp_path / "models" / "index"
    shutil.copytree(exported, base / "7")
    with server_process(base) as (url, process):
        with Client(url) as client:
            assert client.wait_until_ready(deadline=60) == 7
        _check_metadata(url)
        _check_answers(url)
        _check_refusals(url)
        _check_reload(base, exported, url)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        with pytest.raises(requests.ConnectionError):
            requests.get(f"{url}/v1/models/index", timeout=5)


def _check_metadata(url: str) -> None:
    shown = json.loads(curl(f"{url}/v1/models/index/metadata")[2])["metadata"]["signature_def"][
        "signature_def"
    ]
    default = shown["serving_default"]
    assert default["method_name"] == "tensorflow/serving/predict"
    vector = default["inputs"]["input_1"]
    assert vector["dtype"] == "DT_FLOAT"
    assert vector["tensor_shape"] == {"dim": [{"size": "-1", "name": ""}], "unknown_rank": False}
    assert [default["outputs"][name]["dtype"] for name in ("output_1", "output_2")] == [
        "DT_FLOAT",
        "DT_INT32",
    ]
    assert all(
        out["tensor_shape"] == {"dim": [], "unknown_rank": True} for out in default["outputs"].values()
    )
    assert shown["__saved_model_init_op"]["outputs"]["__saved_model_init_op"]["dtype"] == "DT_INVALID"


def _check_answers(url: str) -> None:
    """Every row is searched and rescored, so the index must equal brute force."""
    for row in range(5):
        status, _, body = curl("-d", predict_body(ROWS[row]), "-X", "POST", f"{url}/v1/models/index:predict")
        outputs = json.loads(body)["outputs"]
        exact = ROWS @ ROWS[row]
        assert (status, outputs["output_2"]) == (200, np.argsort(-exact)[:K].tolist())
        np.testing.assert_allclose(outputs["output_1"], np.sort(exact)[::-1][:K], rtol=1e-5, atol=1e-6)


def _check_refusals(url: str) -> None:
    """The ops' own texts, as far as the facts about the real server go."""
    address = f"{url}/v1/models/index:predict"
    for body, begin in (
        (predict_body([1.0, 2.0]), "Query doesn't match dataset dimsensionality"),
        (
            predict_body([ROWS[0].tolist()]),
            "Query must be one-dimensional. Use ScannSearchBatched for batching",
        ),
        (json.dumps({"inputs": 1.0}), "Query must be one-dimensional. Use ScannSearchBatched for batching"),
    ):
        status, _, answer = curl("-d", body, address)
        said = json.loads(answer)["error"]
        assert (status, said.startswith(begin), "\n\t [[" in said) == (400, True, True)
    init = json.dumps({"signature_name": "__saved_model_init_op", "inputs": [1.0]})
    assert "Failed to get input map for signature: __saved_model_init_op" in curl("-d", init, address)[2]


def _check_reload(base: Path, exported: Path, url: str) -> None:
    shutil.copytree(exported, base / ".8.partial")
    (base / ".8.partial").rename(base / "8")
    wait_for_version(url, 8, "AVAILABLE")
    wait_for_version(url, 7, "END")
    shutil.copytree(exported, base / ".9.partial")
    (base / ".9.partial" / "saved_model.pb").write_bytes(b"not a SavedModel")
    (base / ".9.partial").rename(base / "9")
    wait_for_version(url, 9, "END")
    with Client(url) as client:
        assert "saved_model.pb" in client.status(9)[0]["status"]["error_message"]
        assert client.metadata()["model_spec"]["version"] == "8"
    _check_answers(url)


def _serve(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "serving", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_taken_port_is_known_before_anything_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        rest = _serve("--port=0", f"--rest_api_port={port}", f"--model_base_path={tmp_path}")
        grpc = _serve(f"--port={port}", f"--model_base_path={tmp_path}")
    assert rest.returncode == grpc.returncode == 1
    assert rest.stderr == (
        f"error: --rest_api_port {port}: cannot listen on 127.0.0.1:{port}: "
        "Address already in use; choose another\n"
    )
    assert f"--port {port}" in grpc.stderr.replace("=", " ")
