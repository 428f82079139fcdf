"""The local server over sockets: a stand-in index for the protocol, a real one for everything else."""

import gzip
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
from serving_parts import (
    ROOT,
    K,
    curl,
    export,
    open_rows,
    predict_body,
    publish_rows,
    rows_server,
    server_process,
    unit_rows,
    wait_for_version,
)

from serving import server as server_module
from serving.client import Client
from serving.errors import ServingError
from serving.server import wait_for_first
from serving.versions import Versions

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


def test_head_is_refused_and_no_answer_names_its_server(url):
    answer = requests.head(f"{url}/v1/models/index", timeout=10)
    assert answer.status_code == 400
    assert "server" not in answer.headers
    assert answer.headers["content-type"] == "application/json"


def test_options_want_an_origin_and_trace_is_unknown(url):
    assert curl("-X", "OPTIONS", f"{url}/v1/models/index")[0] == 400
    assert curl("-X", "OPTIONS", "-H", "Origin: https://a.example", f"{url}/v1/models/index")[0] == 200
    assert curl("-X", "TRACE", f"{url}/v1/models/index")[:2] == (501, "text/html")


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
    cut = requests.post(address, packed[:-10], headers=headers, timeout=10)
    assert cut.json() == {"error": "JSON Parse error: The document is empty"}


def test_a_body_beyond_the_limit_is_refused_packed_or_not(url, monkeypatch):
    monkeypatch.setattr(server_module, "MAX_BODY_BYTES", 1000)
    address = f"{url}/v1/models/index:predict"
    large = b" " * 1001
    assert requests.post(address, large, timeout=10).status_code == 413
    packed = requests.post(address, gzip.compress(large), headers={"Content-Encoding": "gzip"}, timeout=10)
    assert packed.status_code == 413
    assert requests.post(address, predict_body(ROWS[4]), timeout=10).status_code == 200


def test_a_connection_is_kept_after_an_error(url):
    with requests.Session() as session:
        first = session.get(f"{url}/v1/models/nope", timeout=10, stream=True)
        connection = first.raw.connection
        first.content  # noqa: B018 reading it gives the connection back
        second = session.get(f"{url}/v1/models/index", timeout=10, stream=True)
        assert second.raw.connection is connection
        second.close()


def test_a_fault_of_ours_is_one_line_to_the_client(base, monkeypatch):
    with rows_server(base) as (url, versions):
        _, servable = versions.find(server_module.Route("predict", "index"))
        monkeypatch.setattr(servable, "rows", None)  # what no check foresees
        answer = requests.post(f"{url}/v1/models/index:predict", predict_body(ROWS[0]), timeout=10)
        assert answer.status_code == 500
        assert answer.json() == {"error": "Internal error: AttributeError"}
        assert requests.get(f"{url}/v1/models/index", timeout=10).status_code == 200


def test_a_newer_version_replaces_the_old_and_no_request_fails(base):
    with rows_server(base) as (url, versions), Client(url, retries=0) as client:
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
                versions.poll()
            stop.set()
            assert all(asker.result() > 0 for asker in askers)
        assert client.available_version() == 17
        assert [row["state"] for row in client.status()] == ["AVAILABLE"] + ["END"] * 10


def test_a_broken_version_leaves_the_old_one_serving_and_is_tried_again_when_its_files_change(base):
    with rows_server(base) as (url, versions), Client(url) as client:
        (base / "8").mkdir()
        versions.poll()
        row = client.status(8)[0]
        assert (row["state"], row["status"]["error_code"]) == ("END", "NOT_FOUND")
        assert "Could not find rows.npy" in row["status"]["error_message"]
        assert client.metadata()["model_spec"]["version"] == "7"
        np.save(base / "8" / "rows.npy", ROWS)
        versions.poll()
        assert client.available_version() == 8
        assert client.status(8)[0]["status"] == {"error_code": "OK", "error_message": ""}


def test_removing_the_newest_version_goes_back_and_removing_all_unloads(base):
    publish_rows(base, 8, ROWS)
    with rows_server(base) as (url, versions), Client(url) as client:
        assert client.available_version() == 8
        shutil.rmtree(base / "8")
        versions.poll()
        assert client.available_version() == 7
        shutil.rmtree(base / "7")
        versions.poll()
        # the status stays 200: only its rows tell
        assert {row["state"] for row in client.status()} == {"END"}
        with pytest.raises(ServingError, match=r"404: Servable not found for request: Latest\(index\)"):
            client.metadata()


def test_names_that_are_no_version_are_skipped(base):
    for name in ("007a", "-9", "1.5", ".10.partial", str(2**63), "٣"):
        shutil.copytree(base / "7", base / name)
    (base / "99").write_text("a file")
    versions = Versions("index", base, open_rows)
    versions.poll()
    assert versions.serving_version == 7


def test_a_start_without_a_version_waits_or_says_why_not(tmp_path, base):
    empty = Versions("index", tmp_path / "empty", open_rows)
    with pytest.raises(ServingError, match="holds no numbered folder"):
        wait_for_first(empty, poll_seconds=0)
    threading.Timer(0.05, publish_rows, (tmp_path / "empty", 3, ROWS)).start()
    wait_for_first(empty, poll_seconds=0.01)
    assert empty.serving_version == 3
    (base / "8").mkdir()
    with pytest.raises(ServingError, match=r"index/8 cannot be served: Could not find rows\.npy"):
        wait_for_first(Versions("index", base, open_rows), poll_seconds=0.01)


@pytest.mark.slow
def test_a_real_index_is_served_reloaded_and_stopped(tmp_path, exported):
    base = tmp_path / "models" / "index"
    shutil.copytree(exported, base / "7")
    with server_process(base, "--model_name=index") as (url, process):
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


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port=8500"], "unrecognized arguments: --port=8500"),
        (["--rest_api=9090"], "unrecognized arguments: --rest_api=9090"),
        (["--rest_api_port=0"], "argument --rest_api_port: is 0, wanted a port of 1 to 65535"),
        (["--rest_api_port=x"], "argument --rest_api_port: is x, wanted a port of 1 to 65535"),
        (
            ["--file_system_poll_wait_seconds=-1"],
            "argument --file_system_poll_wait_seconds: is -1, wanted seconds, 0 or more",
        ),
    ],
)
def test_a_wrong_flag_is_refused_by_name(flags, said):
    done = _serve(*flags)
    assert (done.returncode, said in done.stderr) == (2, True)


def test_a_taken_port_is_known_before_anything_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = _serve(f"--rest_api_port={port}", f"--model_base_path={tmp_path}")
    assert done.returncode == 1
    assert done.stderr == (
        f"error: --rest_api_port {port}: cannot listen on 127.0.0.1:{port}: "
        "Address already in use; choose another\n"
    )
