"""Facts about the real server that docs/serving.md lists and no other test holds, over real sockets.

Expected values are those of tensorflow/serving r2.11 and libevent 2.1.8, never this server's own output.
"""

import ast
import email.utils
import json
import re
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pytest
import serving_parts
from serving_parts import (
    ROOT,
    Answer,
    K,
    export,
    free_port,
    predict_body,
    publish_rows,
    raw_connection,
    read_answer,
    rows_models,
    rows_server,
    server_process,
    unit_rows,
)

from serving.protocol import RequestError, Route, Tensor
from serving.server import watch

DIM = 8
ROWS = unit_rows(20, DIM)
QUERY = ROWS[4]
BEST = np.argsort(-(ROWS @ QUERY), kind="stable")[:K].tolist()  # rows, best first
MODEL = "/v1/models/index"
JSON = "application/json"
LOAD_SECONDS = 200  # TensorFlow's import takes most of it on a busy machine


def error_of(answer: Answer) -> str:
    """What the body's only key says."""
    document = json.loads(answer.body)
    assert list(document) == ["error"]
    return document["error"]


def request(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    """A request as its bytes; `content_encoding="gzip"` becomes a header."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + body


def send(url: str, method: str, path: str, body: bytes | str = b"", **headers: str) -> Answer:
    body = body.encode() if isinstance(body, str) else body
    with raw_connection(url) as (link, file):
        link.sendall(request(method, path, body, **headers))
        return read_answer(file)


def get(url: str, path: str) -> Answer:
    return send(url, "GET", path)


def predict(url: str, body: bytes | str | Mapping[str, Any], path: str = f"{MODEL}:predict") -> Answer:
    return send(url, "POST", path, json.dumps(body) if isinstance(body, Mapping) else body)


def vector(numbers: Sequence[float] | np.ndarray = QUERY) -> list[float]:
    return np.asarray(numbers, float).tolist()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """One version, 7."""
    folder = tmp_path_factory.mktemp("models") / "index"
    publish_rows(folder, 7, ROWS)
    return folder


@pytest.fixture(scope="module")
def url(base) -> Iterator[str]:
    with rows_server(base) as (address, _):
        yield address


@pytest.fixture
def answers(monkeypatch):
    """Makes the stand-in index answer what a test says, or raise it."""

    def set_answer(given: dict[str, Tensor] | RequestError) -> None:
        def run(*_: Any) -> dict[str, Tensor]:
            if isinstance(given, RequestError):
                raise given
            return given

        monkeypatch.setattr(serving_parts.RowsSearcher, "run", run)

    return set_answer


# Every answer


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", MODEL, "", 200),
        ("GET", f"{MODEL}/metadata", "", 200),
        ("POST", f"{MODEL}:predict", predict_body(QUERY), 200),
        ("POST", f"{MODEL}:predict", "[", 400),
        ("GET", "/v1/models/nope", "", 404),
        ("GET", "/v1/x", "", 400),
    ],
)
def test_every_answer_of_the_api_has_its_type_length_and_date_and_names_no_server(
    url, method, path, body, status
):
    answer = send(url, method, path, body)
    assert (answer.status, answer.headers["content-type"]) == (status, JSON)
    assert int(answer.headers["content-length"]) == len(answer.body)
    assert email.utils.parsedate_to_datetime(answer.headers["date"])
    assert "server" not in answer.headers


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("INVALID_ARGUMENT", 400), ("FAILED_PRECONDITION", 400), ("OUT_OF_RANGE", 400), ("NOT_FOUND", 404),
        ("UNIMPLEMENTED", 501), ("UNAVAILABLE", 503), ("DEADLINE_EXCEEDED", 504),
        ("RESOURCE_EXHAUSTED", 429), ("ALREADY_EXISTS", 409), ("ABORTED", 409), ("PERMISSION_DENIED", 403),
        ("UNAUTHENTICATED", 401), ("CANCELLED", 499), ("UNKNOWN", 500), ("INTERNAL", 500),
        ("DATA_LOSS", 500),
    ],
)  # fmt: skip
def test_a_failure_of_each_kind_has_its_http_status(url, answers, code, status):
    answers(RequestError(code, "why it failed"))
    answer = predict(url, predict_body(QUERY))
    assert (answer.status, error_of(answer)) == (status, "why it failed")


# Status and metadata

STATUS_OF_7 = b"""{
 "model_version_status": [
  {
   "version": "7",
   "state": "AVAILABLE",
   "status": {
    "error_code": "OK",
    "error_message": ""
   }
  }
 ]
}
"""


@pytest.mark.parametrize(
    "path",
    [
        MODEL,
        f"{MODEL}/versions/7",
        f"{MODEL}/versions/007",
        f"{MODEL}/labels/anything",
        "/v1/models/%69ndex",
        "/V1/Models/index",
        f"{MODEL}/METADATA",
    ],
)
def test_every_spelling_of_a_status_request_has_this_very_body(url, path):
    answer = get(url, path)
    assert (answer.status, answer.headers["content-type"], answer.body) == (200, JSON, STATUS_OF_7)


def test_a_models_name_keeps_its_case(url):
    answer = get(url, "/v1/models/INDEX")
    assert (answer.status, error_of(answer)) == (404, "Could not find any versions of model INDEX")


def test_rows_come_newest_first_and_one_version_shows_its_own(tmp_path):
    publish_rows(tmp_path, 9, ROWS)
    with rows_server(tmp_path) as (url, models):
        publish_rows(tmp_path, 10, ROWS)
        models.poll()
        rows = json.loads(get(url, MODEL).body)["model_version_status"]
        assert [(row["version"], row["state"]) for row in rows] == [("10", "AVAILABLE"), ("9", "END")]
        rows = json.loads(get(url, f"{MODEL}/versions/9").body)["model_version_status"]
        assert [(row["version"], row["state"]) for row in rows] == [("9", "END")]
        for answer in (
            get(url, f"{MODEL}/versions/9/metadata"),
            predict(url, predict_body(QUERY), f"{MODEL}/versions/9:predict"),
        ):
            assert (answer.status, error_of(answer)) == (
                404,
                "Servable not found for request: Specific(index, 9)",
            )
        assert get(url, f"{MODEL}/versions/10/metadata").status == 200


def test_without_versions_the_status_is_200_and_metadata_and_predict_are_404(tmp_path):
    publish_rows(tmp_path, 9, ROWS)
    with rows_server(tmp_path) as (url, models):
        shutil.rmtree(tmp_path / "9")
        models.poll()
        rows = json.loads(get(url, MODEL).body)["model_version_status"]
        assert rows == [{"version": "9", "state": "END", "status": {"error_code": "OK", "error_message": ""}}]
        for answer in (get(url, f"{MODEL}/metadata"), predict(url, predict_body(QUERY))):
            assert (answer.status, error_of(answer)) == (404, "Servable not found for request: Latest(index)")


def test_while_a_newer_version_loads_both_rows_show_and_the_old_one_answers(tmp_path, monkeypatch):
    begun, may_go_on = threading.Event(), threading.Event()
    open_rows = serving_parts.open_rows

    def open_slowly(folder: Path) -> serving_parts.RowsSearcher:
        if folder.name == "8":
            begun.set()
            may_go_on.wait(20)
        return open_rows(folder)

    monkeypatch.setattr(serving_parts, "open_rows", open_slowly)
    publish_rows(tmp_path, 7, ROWS)
    with rows_server(tmp_path) as (url, models):
        publish_rows(tmp_path, 8, ROWS)
        looking = threading.Thread(target=models.poll)
        looking.start()
        assert begun.wait(20)
        rows = json.loads(get(url, MODEL).body)["model_version_status"]
        assert [(row["version"], row["state"], row["status"]["error_code"]) for row in rows] == [
            ("8", "LOADING", "OK"),
            ("7", "AVAILABLE", "OK"),
        ]
        assert json.loads(get(url, f"{MODEL}/metadata").body)["model_spec"]["version"] == "7"
        assert found(predict(url, PLAIN)) == BEST
        may_go_on.set()
        looking.join()
        assert json.loads(get(url, f"{MODEL}/metadata").body)["model_spec"]["version"] == "8"


def test_whenever_a_row_says_available_its_version_can_be_asked(tmp_path):
    publish_rows(tmp_path, 1, ROWS)
    models, stop = rows_models(tmp_path), threading.Event()

    def watch_rows() -> int:
        n_asked = 0
        while not stop.is_set():
            for row in models.status(Route("status", "index")):
                route = Route("predict", "index", row.version)
                if row.state != "AVAILABLE":
                    continue
                try:
                    with models.use(route):
                        n_asked += 1
                except RequestError:  # then the row had changed before
                    assert models.status(route)[0].state != "AVAILABLE"
        return n_asked

    with ThreadPoolExecutor(1) as pool:
        watcher = pool.submit(watch_rows)
        for version in range(2, 30):
            publish_rows(tmp_path, version, ROWS)
            models.poll()
        stop.set()
        assert watcher.result() > 0
    models.close()


@pytest.mark.parametrize("seconds", [0, -1])
def test_an_interval_of_zero_or_less_looks_no_more(tmp_path, seconds):
    publish_rows(tmp_path, 7, ROWS)
    models = rows_models(tmp_path)
    publish_rows(tmp_path, 8, ROWS)
    watch(models, seconds, threading.Event())  # comes back at once
    assert [row.version for row in models.status(Route("status", "index"))] == [7]
    models.close()


TOO_LARGE = 2**63  # one more than an int64 holds


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", f"{MODEL}/versions/{TOO_LARGE}"),
        ("GET", f"{MODEL}/versions/{TOO_LARGE}/metadata"),
        ("POST", f"{MODEL}/versions/{TOO_LARGE}:predict"),
    ],
)
def test_a_version_past_int64_is_a_400_with_nothing_in_it(url, method, path):
    answer = send(url, method, path, predict_body(QUERY) if method == "POST" else "")
    assert (answer.status, answer.headers["content-type"], answer.body) == (400, JSON, b"")


@pytest.mark.parametrize(
    ("path", "status", "error"),
    [
        ("/v1/models", 400, "Missing model name in request."),
        ("/v1/models/versions/1", 400, "Missing model name in request."),
        (f"{MODEL}/versions/9999", 404, "Could not find version 9999 of model index"),
        ("/v1/models/nope", 404, "Could not find any versions of model nope"),
        (f"{MODEL}?x=1", 404, "Could not find any versions of model index?x=1"),
        ("/v1/models/nope/metadata", 404, "Servable not found for request: Latest(nope)"),
        (f"{MODEL}/versions/9999/metadata", 404, "Servable not found for request: Specific(index, 9999)"),
        (f"{MODEL}/labels/x/metadata", 400, "Unrecognized servable version label: x"),
    ],
)
def test_what_is_not_there_is_named(url, path, status, error):
    answer = get(url, path)
    assert (answer.status, answer.headers["content-type"], error_of(answer)) == (status, JSON, error)


@pytest.mark.parametrize(
    ("path", "status", "error"),
    [
        ("/v1/models/nope:predict", 404, "Servable not found for request: Latest(nope)"),
        (f"{MODEL}/versions/9999:predict", 404, "Servable not found for request: Specific(index, 9999)"),
        (f"{MODEL}/labels/x:predict", 400, "Unrecognized servable version label: x"),
    ],
)
def test_predict_looks_up_a_version_as_metadata_does(url, path, status, error):
    answer = predict(url, predict_body(QUERY), path)
    assert (answer.status, error_of(answer)) == (status, error)


# Paths and methods


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models/"),
        ("GET", f"{MODEL}/"),
        ("GET", f"{MODEL}/metadata/"),
        ("GET", f"{MODEL}/versions/abc"),
        ("GET", "/v1/x"),
        ("GET", f"{MODEL}:predict"),
        ("POST", MODEL),
        ("POST", f"{MODEL}:predict?x=1"),
        ("POST", f"{MODEL}:predict/"),
        ("POST", "/v1/models/index%3Apredict"),
        ("POST", f"{MODEL}:PREDICT"),
        ("PUT", f"{MODEL}:predict"),
        ("PATCH", f"{MODEL}:predict"),
        ("DELETE", MODEL),
    ],
)
def test_any_other_path_or_method_is_a_malformed_request(url, method, path):
    answer = send(url, method, path)
    assert (answer.status, answer.headers["content-type"]) == (400, JSON)
    assert error_of(answer) == f"Malformed request: {method} {path}"


# Predict


def found(answer: Answer) -> list[int]:
    """The rows of an answer in either form."""
    document = json.loads(answer.body)
    if "outputs" in document:
        return document["outputs"]["output_2"]
    return [row["output_2"] for row in document["predictions"]]


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": vector()},
        {"inputs": {"input_1": vector()}},
        {"inputs": {"input_1": vector(), "a name too many": 1}},
        {"instances": vector()},
        {"instances": [{"input_1": number} for number in vector()]},
        {"inputs": vector(), "a key too many": [None]},
        {"inputs": vector(), "signature_name": "serving_default"},
        {"inputs": vector(), "signature_name": ""},
    ],
)
def test_every_form_of_a_request_finds_the_same(url, body):
    answer = predict(url, body)
    assert (answer.status, found(answer)) == (200, BEST)


def test_the_row_answer_has_k_rows_whatever_the_width_of_the_query(url):
    predictions = json.loads(predict(url, {"instances": vector()}).body)["predictions"]
    assert len(predictions) == K != DIM
    assert all(row.keys() == {"output_1", "output_2"} for row in predictions)


def test_an_answer_has_four_spaces_a_level_and_no_last_line_break(url, answers):
    answers({"output_1": Tensor("DT_FLOAT", (2,), [1.0, 0.5]), "output_2": Tensor("DT_INT32", (2,), [4, 0])})
    columns = (
        '{\n    "outputs": {\n        "output_1": [\n            1.0,\n            0.5\n        ],\n'
        '        "output_2": [\n            4,\n            0\n        ]\n    }\n}'
    )
    assert predict(url, {"inputs": vector()}).body == columns.encode()
    rows = (
        '{\n    "predictions": [\n        {\n            "output_1": 1.0,\n            "output_2": 4\n'
        '        },\n        {\n            "output_1": 0.5,\n            "output_2": 0\n        }\n    ]\n}'
    )
    assert predict(url, {"instances": vector()}).body == rows.encode()


def single(bits: int) -> float:
    """The float32 of these bits."""
    return struct.unpack("f", struct.pack("I", bits))[0]


@pytest.mark.parametrize(
    ("value", "spelled"),
    [
        (0.25, "0.25"),
        (1.0, "1.0"),
        (-3.0, "-3.0"),
        (123456.0, "123456.0"),
        (1234567.0, "1234567.0"),  # six digits would be 1.23457e+06
        (single(0x3EAAAAAB), "0.333333343"),  # the float32 nearest to 1/3
        (single(0x3DCCCCCD), "0.1"),  # six digits read back as this float32
        (float("nan"), "NaN"),
        (float("inf"), "Infinity"),
        (float("-inf"), "-Infinity"),
    ],
)
def test_a_float_is_spelled_shortest_with_a_point_and_not_finite_ones_bare(url, answers, value, spelled):
    answers({"output_1": Tensor("DT_FLOAT", (1,), [value]), "output_2": Tensor("DT_INT32", (1,), [4])})
    body = predict(url, {"inputs": vector()}).body.decode()
    assert f'"output_1": [\n            {spelled}\n        ]' in body


@pytest.mark.parametrize(
    ("outputs", "error"),
    [
        (
            {"output_1": Tensor("DT_FLOAT", (), [1.0]), "output_2": Tensor("DT_INT32", (1,), [4])},
            "Tensor name: output_1 has no shape information ",
        ),
        (
            {"output_1": Tensor("DT_FLOAT", (2,), [1.0, 0.5]), "output_2": Tensor("DT_INT32", (1,), [4])},
            "Tensor name: output_2 has inconsistent batch size: 1 expecting: 2",
        ),
    ],
)
def test_outputs_that_make_no_rows_are_refused_in_the_row_form_alone(url, answers, outputs, error):
    answers(outputs)
    answer = predict(url, {"instances": vector()})
    assert (answer.status, error_of(answer)) == (400, error)
    assert predict(url, {"inputs": vector()}).status == 200


def pretty(document: Any) -> str:
    """As RapidJSON's PrettyWriter prints a document of strings and whole numbers."""
    return json.dumps(document, indent=4)


BOTH = {"inputs": [1], "instances": [1]}


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", "JSON Parse error: The document is empty"),
        (b'{"inputs": [1,]}', "JSON Parse error: Invalid value. at offset: 14"),
        (
            json.dumps(BOTH).encode(),
            f"JSON Value: {pretty(BOTH)} Not formatted correctly expecting only one of 'inputs' or "
            "'instances' keys to exist ",
        ),
        (b'{"other": 1}', "Missing 'inputs' or 'instances' key"),
        (b'{"inputs": {}}', "Missing named input: input_1 in 'inputs' object."),
        (
            b'{"signature_name": "nope", "inputs": [1]}',
            'Serving signature name: "nope" not found in signature def',
        ),
        (
            b'{"signature_name": 1, "inputs": 1}',
            f"JSON Value: {pretty({'signature_name': 1, 'inputs': 1})} not formatted correctly. "
            "'signature_name' key must be a string value.",
        ),
        (
            b'{"instances": [{"input_1": 1, "x": 2}]}',
            "Failed to process element: 0 key: x of 'instances' list. "
            "Error: INVALID_ARGUMENT: JSON object: does not have named input: x",
        ),
        (b'{"inputs": ["1"]}', 'JSON Value: "1" Type: String is not of expected type: float'),
        (b'{"inputs": [true]}', "JSON Value: true Type: True is not of expected type: float"),
        (b'{"inputs": [null]}', "JSON Value: null Type: Null is not of expected type: float"),
    ],
)
def test_a_body_that_cannot_be_asked_is_refused_in_the_real_words(url, body, error):
    answer = predict(url, body)
    assert (answer.status, error_of(answer)) == (400, error)


NOWHERE = "/v1/models/nope:predict"


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        # each body has the fault that is said, and one that is looked for later
        (NOWHERE, '{"inputs": ', "JSON Parse error: "),
        (NOWHERE, "[1]", "JSON Value: [\n    1\n] Is not object"),
        (NOWHERE, '{"signature_name": 1}', "'signature_name' key must be a string value."),
        (NOWHERE, '{"signature_name": "none"}', "Servable not found for request: Latest(nope)"),
        (f"{MODEL}:predict", '{"signature_name": "none", "inputs": 1, "instances": 1}', "not found in sig"),
        (f"{MODEL}:predict", '{"inputs": ["a"], "instances": 1}', "expecting only one of"),
        (f"{MODEL}:predict", '{"inputs": ["a", 1]}', "is not of expected type: float"),
        (f"{MODEL}:predict", '{"inputs": [1, 1]}', "Query doesn't match dataset dims"),
    ],
)
def test_faults_are_looked_for_in_the_real_order(url, path, body, said):
    assert said in error_of(predict(url, body, path))


@pytest.fixture
def seen(monkeypatch) -> list[np.float32]:
    """The first number of every query that reaches the index."""
    seen = []
    own = serving_parts.RowsSearcher.run

    def run(self: Any, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        seen.append(np.asarray(inputs["input_1"].values, np.float32)[0])
        return own(self, name, inputs)

    monkeypatch.setattr(serving_parts.RowsSearcher, "run", run)
    return seen


@pytest.mark.parametrize("spelling", ["NaN", "-NaN", "Infinity", "-Infinity", "Inf", "-Inf", "1e39"])
def test_numbers_that_json_does_not_know_reach_the_index(url, spelling, seen):
    numbers = [spelling] + ["0"] * (DIM - 1)
    assert predict(url, f'{{"inputs": [{", ".join(numbers)}]}}').status == 200
    wanted = np.float32("inf" if spelling == "1e39" else spelling)
    assert str(seen) == str([wanted])  # nan equals nothing, itself included


@pytest.mark.parametrize(
    ("spelling", "error"),
    [
        ("nan", "Invalid value. at offset: 13"),  # after the "n" of what could have been null
        ("inf", "Invalid value. at offset: 12"),
        ("-infinity", "Invalid value. at offset: 13"),
        ("1e400", "Number too big to be stored in double. at offset: 12"),
    ],
)
def test_numbers_that_rapidjson_does_not_know_are_refused(url, spelling, error):
    answer = predict(url, f'{{"inputs": [{spelling}]}}')
    assert (answer.status, error_of(answer)) == (400, f"JSON Parse error: {error}")


@pytest.mark.parametrize(
    ("first", "wanted"),
    [
        ("1", 1.0),
        ("9007199254740993", 2.0**53),  # one more than a double holds
        ("18446744073709551615", 2.0**64),  # one less, in 64 bits
        ("36893488147419103232", 2.0**65),
        ("1" + "0" * 30, 1e30),
        ("1e-400", 0.0),  # less than a double holds
        ("1e-60", 0.0),  # less than a float32 holds
        ("-0", 0.0),  # a whole number, which has no sign here
        ("-0.0", -0.0),
    ],
)
def test_whole_large_and_tiny_numbers_are_floats_too(url, first, wanted, seen):
    numbers = [first] + ["0"] * (DIM - 1)
    assert predict(url, f'{{"inputs": [{", ".join(numbers)}]}}').status == 200
    assert str(seen) == str([np.float32(wanted)])  # -0.0 equals 0.0


PLAIN = predict_body(QUERY).encode()


@pytest.mark.parametrize(
    "body",
    [
        b"\xef\xbb\xbf" + PLAIN,
        PLAIN[:-1] + b', "note": "\xff\xfe"}',
        PLAIN[:-1] + b', "inputs": "the second of two"}',
    ],
    ids=["byte order mark", "no UTF-8", "two keys"],
)
def test_what_rapidjson_forgives_is_forgiven(url, body):
    assert found(predict(url, body)) == BEST


@pytest.mark.parametrize(
    "body", [b"// note\n" + PLAIN, PLAIN[:-1] + b",}", PLAIN.replace(b'"', b"'")],
    ids=["comment", "trailing comma", "single quotes"],
)  # fmt: skip
def test_what_rapidjson_refuses_is_refused(url, body):
    answer = predict(url, body)
    assert (answer.status, error_of(answer).startswith("JSON Parse error: ")) == (400, True)


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", "application/x-www-form-urlencoded", ""])
def test_a_requests_content_type_means_nothing(url, kind):
    assert found(send(url, "POST", f"{MODEL}:predict", PLAIN, Content_Type=kind)) == BEST


WITHOUT_EXAMPLES = {"inputs": 1}
NO_EXAMPLES = (
    f"JSON Value: {pretty(WITHOUT_EXAMPLES)} When method is classify, key 'examples' is expected and was not "
    "found"
)


def test_classify_and_regress_are_refused_in_the_real_words(url):
    for action in ("classify", "regress"):
        answer = predict(url, WITHOUT_EXAMPLES, f"{MODEL}:{action}")
        assert (answer.status, error_of(answer)) == (400, NO_EXAMPLES)
    examples = {"examples": [{"a": 1}]}
    answer = predict(url, examples, f"{MODEL}:classify")
    assert answer.status == 400
    assert error_of(answer).startswith("No classification inputs found in SignatureDef: ")
    answer = predict(url, examples, f"{MODEL}:regress")
    assert (answer.status, error_of(answer)) == (400, "Expected one output Tensor.")


# HTTP


def test_a_connection_is_kept_also_after_errors(url):
    with raw_connection(url) as (link, file):
        for body, status in ((b"[", 400), (PLAIN, 200), (b"{}", 400), (PLAIN, 200)):
            link.sendall(request("POST", f"{MODEL}:predict", body))
            answer = read_answer(file)
            assert (answer.status, answer.headers.get("connection")) == (status, None)


def test_no_answer_is_packed_whatever_the_client_takes(url):
    answer = send(url, "GET", f"{MODEL}/metadata", Accept_Encoding="gzip, deflate, br")
    assert "content-encoding" not in answer.headers
    assert json.loads(answer.body)["model_spec"]["version"] == "7"


# A whole process: what comes before the ports open


def refuses(port: int) -> bool:
    with socket.socket() as link:
        link.settimeout(5)
        return link.connect_ex(("127.0.0.1", port)) != 0


def lines_until(process: subprocess.Popen, wanted: str) -> list[str]:
    """What a server logs, until a line has the words."""
    lines: list[str] = []
    while wanted not in (lines or [""])[-1]:
        line = process.stderr.readline()
        assert line, f"the log ended without {wanted!r}: {lines}"
        lines.append(line)
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("there", [[], ["not-a-number"]], ids=["no base path", "no numbered folder"])
def test_without_a_version_the_ports_stay_closed_and_the_process_waits(tmp_path, there):
    for name in there:
        (tmp_path / "index" / name).mkdir(parents=True)
    grpc = free_port()
    flags = (f"--port={grpc}", "--file_system_poll_wait_seconds=1")
    with server_process(tmp_path / "index", *flags) as (url, process):
        lines_until(process, "waiting for ")
        time.sleep(2.5)  # two looks more
        assert process.poll() is None
        assert refuses(grpc)
        assert refuses(urlsplit(url).port)


@pytest.mark.slow
def test_a_first_version_that_fails_is_tried_again_behind_closed_ports_then_the_process_ends(tmp_path):
    folder = tmp_path / "index" / "7"
    folder.mkdir(parents=True)
    grpc = free_port()
    flags = (f"--port={grpc}", "--max_num_load_retries=2", "--load_retry_interval_micros=1000000")
    with server_process(tmp_path / "index", *flags) as (url, process):
        lines_until(process, "cannot be served")
        assert refuses(grpc)
        assert refuses(urlsplit(url).port)
        rest = process.stderr.read()
        assert process.wait(timeout=30) == 255
    assert rest.count("cannot be served: ") == 2  # more tries
    # core/load_servables_fast.cc: a list in braces, of servables in braces, each with its id in braces; then
    # the loader's own words for a folder without a model
    assert (
        "Failed to start server. Error: UNKNOWN: 1 servable(s) did not become available: "
        "{{{name: index version: 7} due to error: NOT_FOUND: Could not find SavedModel .pb or .pbtxt at "
        f"supplied export directory path: {folder}. "
    ) in rest
    assert "}, }" in rest


# A whole process over a real index, REST and gRPC


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A real SavedModel of the tfrs layer."""
    folder = tmp_path_factory.mktemp("exported") / "saved_model"
    export(ROWS, folder)
    return folder


MODELS = """
model_config_list {{
  config {{
    name: "index" base_path: "{base}" model_platform: "tensorflow"
    version_labels {{ key: "stable" value: 7 }}
  }}
}}
"""


@pytest.fixture(scope="module")
def real(exported, tmp_path_factory) -> Iterator[tuple[str, int]]:
    """The address of a server of version 7, with metrics and a label, and its gRPC port."""
    folder = tmp_path_factory.mktemp("real")
    shutil.copytree(exported, folder / "index" / "7")
    (folder / "models.config").write_text(MODELS.format(base=folder / "index"))
    (folder / "monitoring.config").write_text("prometheus_config { enable: true }")
    grpc = free_port()
    flags = (
        f"--port={grpc}",
        f"--model_config_file={folder / 'models.config'}",
        "--allow_version_labels_for_unavailable_models",
        f"--monitoring_config_file={folder / 'monitoring.config'}",
        "--model_name=ignored",
    )
    with server_process(folder / "nowhere", *flags) as (url, process):
        until_open(url, process)
        assert not refuses(grpc)  # gRPC opens first
        yield url, grpc


def until_open(url: str, process: subprocess.Popen, seconds: float = LOAD_SECONDS) -> None:
    end = time.monotonic() + seconds
    while refuses(urlsplit(url).port):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, f"{url} did not open in {seconds} s"
        time.sleep(0.01)


@pytest.mark.slow
def test_when_rest_opens_grpc_is_open_and_the_version_is_served(real):
    url, _ = real
    assert get(url, MODEL).body == STATUS_OF_7
    assert get(url, f"{MODEL}/metadata").status == 200
    assert found(predict(url, PLAIN)) == BEST


@pytest.mark.slow
def test_with_a_config_file_name_and_base_path_of_the_flags_are_ignored(real):
    url, _ = real
    answer = get(url, "/v1/models/ignored")
    assert (answer.status, error_of(answer)) == (404, "Could not find any versions of model ignored")


@pytest.mark.slow
def test_a_label_is_looked_up_and_its_version_answers(real):
    url, _ = real
    metadata = json.loads(get(url, f"{MODEL}/labels/stable/metadata").body)
    assert metadata["model_spec"] == {"name": "index", "signature_name": "", "version": "7"}
    assert found(predict(url, PLAIN, f"{MODEL}/labels/stable:predict")) == BEST


RANK = "Query must be one-dimensional. Use ScannSearchBatched for batching"
WIDTH = "Query doesn't match dataset dimsensionality"
NODE = r"\n\t \[\[\{\{function_node __inference_\w+\}\}\{\{node sca_nn/Scann>ScannSearch\}\}\]\]"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"instances": [vector()]}, RANK),
        ({"instances": [{"input_1": vector()}]}, RANK),
        ({"inputs": [vector()]}, RANK),
        ({"inputs": 1.0}, RANK),
        ({"inputs": vector()[:-1]}, WIDTH),
        ({"inputs": [*vector(), 0.0]}, WIDTH),
    ],
)
def test_the_ops_refuse_another_rank_or_width_in_their_own_words(real, body, said):
    url, _ = real
    answer = predict(url, body)
    assert answer.status == 400
    # TensorFlow 2.11 with scann 1.2.9 says so of this very export, node and all
    assert re.fullmatch(re.escape(said) + NODE, error_of(answer))


@pytest.mark.slow
def test_with_batching_every_vector_is_refused_in_batchings_words(exported, tmp_path):
    base = tmp_path / "index"
    shutil.copytree(exported, base / "7")
    with server_process(base, "--enable_batching") as (url, process):
        until_open(url, process)
        answer = predict(url, PLAIN)
    assert (answer.status, error_of(answer)) == (
        400,
        "Batched output tensor's 0th dimension does not equal the sum of the 0th dimension sizes of the "
        "input tensors",
    )


# docs/serving.md itself

PAGE = ROOT / "docs" / "serving.md"
FACT = re.compile(r"^\| (\d+) \| (.+) \| (\S.*) \| (same|differs \((\w+)\): .+) \|$", re.MULTILINE)
TEST = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


class Fact(NamedTuple):
    number: int
    text: str
    tests: list[tuple[str, str]]
    reason: str  # why it differs, in a word; empty where it does not


def facts() -> list[Fact]:
    found_ones = FACT.findall(PAGE.read_text(encoding="utf-8"))
    return [Fact(int(n), text, TEST.findall(tests), reason) for n, text, tests, _, reason in found_ones]


def functions_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in tree.body if isinstance(node, functions)}


def test_every_fact_in_the_table_is_read_and_numbered_in_turn():
    rows = re.findall(r"^\| \d+ \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [fact.number for fact in facts()] == list(range(1, len(rows) + 1))


def test_every_fact_names_tests_that_exist():
    known = {file: functions_in(file) for file in {file for fact in facts() for file, _ in fact.tests}}
    missing = [fact.number for fact in facts() if not fact.tests]
    unknown = [
        (fact.number, test) for fact in facts() for file, test in fact.tests if test not in known[file]
    ]
    assert (missing, unknown) == ([], [])


def test_the_count_of_facts_is_true():
    reasons = Counter(fact.reason for fact in facts())
    same = reasons.pop("")
    by_reason = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items()))
    different = f"{reasons.total()} knowingly different ({by_reason})"
    assert f"**{len(facts())} facts: {same} the same, {different}.**" in PAGE.read_text(encoding="utf-8")
