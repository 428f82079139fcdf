"""Random and mutated requests over real sockets to the real application, with a stand-in for the index.

No request may end in a 500, a hang or a server that answers no more; and whatever is faster than the plain
way to an answer must give the very same bytes. `make test` sends some thousands, `make soak` 100,000.
"""

import gzip
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_parts import RowsSearcher, app_server, publish_rows, raw_connection, read_answer, unit_rows

from serving import protocol, rapidjson
from serving.coalescing import Searches
from serving.flags import Flags
from serving.http_limits import Limits
from serving.monitoring import Monitoring
from serving.protocol import RequestError, Route, Signature, Tensor, TensorInfo
from serving.server import IndexApp
from serving.versions import Models
from serving.wanted import ModelConfig

DIM = 3
ROWS = unit_rows(10, DIM)
TYPES = {
    "b": "DT_BOOL",
    "d": "DT_DOUBLE",
    "f": "DT_FLOAT",
    "i": "DT_INT32",
    "s": "DT_STRING",
    "u": "DT_UINT64",
}
HELD_BYTES = 10**6
SHORT, LONG = 300, 13_000  # examples of each test; one sends four requests on average

fuzzed = settings(
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)


class Echo(RowsSearcher):
    """Searches rows, and with another signature gives back what it gets, of every type."""

    def __init__(self) -> None:
        super().__init__(ROWS)
        infos = {name: TensorInfo(f"{name}:0", dtype, None) for name, dtype in TYPES.items()}
        self.signatures = {
            **self.signatures,
            "echo": Signature(infos, infos, "tensorflow/serving/predict"),
            "text": Signature({"s": infos["s"]}, {"s": infos["s"]}, "tensorflow/serving/predict"),
            "init": Signature({}, {}, ""),
        }

    def run(self, signature_name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if signature_name == protocol.DEFAULT_SIGNATURE:
            return super().run(signature_name, inputs)
        return dict(inputs)


class Fuzzed:
    """The server under test, and what it must have answered."""

    def __init__(self, url: str, models: Models) -> None:
        self.url, self.models = url, models

    def answers(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """What the plain way gives: the exact reader, each number printed alone."""
        try:
            return 200, self._body(method, path, body)
        except RequestError as error:
            return error.http_status, error.body()
        except RecursionError:
            return 400, protocol.error_body("JSON Parse error: Nested too deeply.")

    def _body(self, method: str, path: str, body: bytes) -> bytes:
        route = protocol.route.__wrapped__(method, path)
        if route.action == "status":
            return protocol.status_body(self.models.status(route))
        if route.action != "metadata":
            with plain_reading_and_printing():
                return self._predict(route, body)
        with self.models.use(route) as loaded:
            return protocol.metadata_body(route.model_name, loaded.version, loaded.servable.signatures)

    def _predict(self, route: Route, body: bytes) -> bytes:
        document = protocol.read_json(body)
        name = protocol.signature_name(document)
        if route.action != "predict":
            protocol.check_examples(document)
        with self.models.use(route) as loaded:
            signatures = loaded.servable.signatures
            if route.action != "predict":
                protocol.refuse_examples(route.action, document, signatures)
            inputs = protocol.read_inputs(document, protocol.find_signature(signatures, document).inputs)
            return protocol.predict_body(loaded.servable.run(name, inputs), document)

    def send(self, data: bytes) -> None:
        """Bytes that may be no request at all; the server may answer or wait for more."""
        with raw_connection(self.url) as (connection, _):
            try:
                connection.sendall(data)
                connection.settimeout(0.001)
                connection.recv(2**16)
            except OSError:
                pass

    def is_well(self) -> None:
        with raw_connection(self.url) as (connection, file):
            connection.sendall(request("GET", "/v1/models/index"))
            assert read_answer(file).status == 200


@contextmanager
def plain_reading_and_printing() -> Iterator[None]:
    """Only the exact reader and the exact printer; the server has answered, and is idle."""

    def parse(body: bytes) -> rapidjson.JsonValue:
        if not body:
            raise rapidjson.JsonError("The document is empty")
        return rapidjson._Reader(body).document()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rapidjson, "parse", parse)
        patch.setattr(rapidjson, "numbers", one_by_one)
        yield


def one_by_one(values: Sequence[float], single: bool) -> list[str]:
    return [rapidjson.number(value, single) for value in values]


def n_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Fuzzed]:
    """One server for all tests; at the end nothing of a thousand clients is left."""
    base = tmp_path_factory.mktemp("models") / "index"
    publish_rows(base, 7, ROWS)
    models = Models([ModelConfig("index", base)], lambda _: Echo())
    models.poll()
    searches = Searches(Monitoring())
    app = IndexApp(models, searches, Monitoring(), Flags(monitoring="/metrics"))
    try:
        with app_server(app, Limits(max_held_bytes=HELD_BYTES)) as url:
            fuzzed = Fuzzed(url, models)
            fuzzed.is_well()  # the first connection opens what the loop keeps
            n_before = n_files()
            yield fuzzed
            with raw_connection(url) as (connection, file):  # nothing is held for those who are gone
                connection.sendall(request("POST", "/v1/models/index:predict", b" " * (HELD_BYTES - 1)))
                assert read_answer(file).status == 400
            end = time.monotonic() + 5
            while n_files() > n_before:
                assert time.monotonic() < end, "connections are left open"
                time.sleep(0.05)
    finally:
        searches.close()
        models.close()


@pytest.fixture
def faults(caplog) -> Callable[[], list[str]]:
    """What the server logged as its own fault so far: each would have been a 500."""
    caplog.set_level(logging.ERROR)
    return lambda: [record.getMessage() for record in caplog.records]


def request(method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in (headers or {}).items())]
    if body or method in ("POST", "PUT", "PATCH"):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


# What is sent

NUMBERS = (
    st.integers()
    | st.floats()
    | st.floats(width=32)
    | st.sampled_from([2**31, 2**63, 2**64, -(2**63) - 1, 1e39, 1e308, 5e-324, -0.0])
)
TEXTS = st.text(max_size=5) | st.sampled_from(["input_1", "b64", "/w==", "serving_default", 'é"\\\n', "a:b"])
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS
KEYS = st.sampled_from(["input_1", "b64", "x", *TYPES]) | TEXTS
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)
VECTORS = st.lists(NUMBERS, min_size=DIM, max_size=DIM) | st.lists(NUMBERS, max_size=6)
SAME = st.integers(0, 3)


@st.composite
def echoes(draw) -> dict:
    """A request that fits the signature of every type, or nearly."""
    n = draw(SAME)
    values = {
        "b": st.booleans(), "d": NUMBERS, "f": NUMBERS, "i": st.integers(-(2**31), 2**31 - 1),
        "s": TEXTS, "u": st.integers(0, 2**64 - 1),
    }  # fmt: skip
    columns = {name: draw(st.lists(kind, min_size=n, max_size=n)) for name, kind in values.items()}
    if draw(st.booleans()):
        return {"signature_name": "echo", "inputs": columns}
    rows = [{name: column[i] for name, column in columns.items()} for i in range(n)]
    return {"signature_name": "echo", "instances": rows}


DOCUMENTS = (
    st.fixed_dictionaries({}, optional=dict.fromkeys(("inputs", "instances"), VECTORS | VALUES))
    | st.fixed_dictionaries(
        {"inputs": VALUES}, optional={"signature_name": st.sampled_from(["text", "init", "no", ""]) | LEAVES}
    )
    | st.fixed_dictionaries({"examples": VALUES}, optional={"context": VALUES, "signature_name": LEAVES})
    | st.builds(lambda vector: {"inputs": {"input_1": vector}}, VECTORS)
    | echoes()
    | VALUES
)


@st.composite
def bodies(draw) -> bytes:
    """JSON in one of the ways to write it, or no longer JSON."""
    document = draw(DOCUMENTS)
    separators = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t: ")]))
    body = json.dumps(document, separators=separators, ensure_ascii=draw(st.booleans())).encode(
        "utf-8", "surrogatepass"
    )
    if draw(st.integers(0, 3)) == 0:
        body = mutated(body, draw(MUTATIONS))
    if draw(st.integers(0, 3)) == 0:  # a key twice, or an object that was none
        body = body.replace(b"{", draw(REPEATED), 1)
    return body


REPEATED = st.builds(
    lambda key, value: b"{" + json.dumps({key: value})[1:-1].encode() + b",",
    st.sampled_from(["inputs", "instances", "signature_name", "input_1"]),
    VECTORS | st.sampled_from(["serving_default", "echo"]),
)


MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["drop", "double", "swap", "insert", "set"]),
        st.floats(0, 1),
        st.integers(1, 8),
        st.sampled_from(
            [b"\0", b"\xff", b"{", b"]", b",", b'"', b"\\u", b"1e400", b"Inf", b"\r\n", b" ", b"9" * 30]
        )
        | st.binary(max_size=4),
    ),
    min_size=1,
    max_size=4,
)


def mutated(data: bytes, mutations: list[tuple[str, float, int, bytes]]) -> bytes:
    for kind, where, size, new in mutations:
        at = int(where * len(data))
        piece = data[at : at + size]
        data = (
            data[:at]
            + {
                "drop": b"",
                "double": piece + piece,
                "swap": piece[::-1],
                "insert": new + piece,
                "set": new,
            }[kind]
            + data[at + size :]
        )
    return data


NAMES = st.sampled_from(["index", "%69ndex", "nope", "..", "%2e%2e%2f", "in%00dex", "index?x=1", "a" * 300])
ENDS = st.sampled_from(
    [":predict", ":classify", ":regress", ":PREDICT", "/metadata", "/versions/7", "/versions/7:predict", ""]
)
PATHS = st.builds("".join, st.tuples(st.sampled_from(["/v1/models/", "/V1/Models/"]), NAMES, ENDS)) | (
    st.builds(
        "/v1/{}".format, st.text(alphabet="/:%?#abmodelsversions0127()é{|\\^", max_size=30)
    )
    | st.builds("/v1/models/index/versions/{}{}".format, st.integers(0, 10**40), ENDS)
)  # fmt: skip
METHODS = st.sampled_from(["GET", "POST", "POST", "POST", "PUT", "DELETE", "PATCH"])


def check_answers(server: Fuzzed, requests: list[tuple[str, str, bytes]]) -> None:
    """Sent on one connection, one after the other: each answer is the plain way's."""
    with raw_connection(server.url) as (connection, file):
        for method, path, body in requests:
            connection.sendall(request(method, path, body))
            answer = read_answer(file)
            assert answer.status != 500
            named = protocol.path_of(path.encode())
            if named is None:
                assert answer.status == 400
                return  # and the connection is closed
            if not protocol.is_api(named):
                assert answer.status == 404
                return
            assert (answer.status, answer.body) == server.answers(method, named, body)


REQUESTS = st.lists(
    st.tuples(METHODS, PATHS, bodies())
    | st.tuples(st.just("POST"), st.just("/v1/models/index:predict"), bodies()),
    min_size=1,
    max_size=8,
)


@given(requests=REQUESTS)
@settings(fuzzed, max_examples=SHORT)
def test_every_answer_is_the_one_that_the_plain_way_gives(server, requests):
    check_answers(server, requests)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@given(requests=REQUESTS)
@settings(fuzzed, max_examples=LONG)
def test_every_answer_is_the_one_that_the_plain_way_gives_in_full(server, requests):
    check_answers(server, requests)


# What is no request

PREDICT = request("POST", "/v1/models/index:predict", json.dumps({"inputs": ROWS[0].tolist()}).encode())
CHUNKED = (
    b"POST /v1/models/index:predict HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"4;x=y\r\n{\"in\r\n2\r\np}\r\n0\r\nTrailer: x\r\n\r\n"
)  # fmt: skip
PACKED = request(
    "POST",
    "/v1/models/index:predict",
    gzip.compress(b'{"inputs": [1, 2, 3]}', mtime=0),
    {"Content-Encoding": "gzip", "Expect": "100-continue"},
)
GOOD = [
    PREDICT,
    CHUNKED,
    PACKED,
    request("GET", "/v1/models/index"),
    request(
        "OPTIONS", "/v1/x", headers={"Origin": "https://a.example", "Connection": "Upgrade", "Upgrade": "h2c"}
    ),
    request("HEAD", "/v1/models/index/metadata").replace(b"1.1", b"1.0"),
    request("GET", "/metrics"),
]
BYTES = st.one_of(
    st.binary(max_size=200),
    st.builds(b"".join, st.lists(st.sampled_from(GOOD), min_size=1, max_size=5)),
    st.builds(
        mutated, st.builds(b"".join, st.lists(st.sampled_from(GOOD), min_size=1, max_size=3)), MUTATIONS
    ),
    st.builds(mutated, st.sampled_from(GOOD), MUTATIONS),
)


def check_bytes(server: Fuzzed, faults: Callable[[], list[str]], streams: list[bytes]) -> None:
    for stream in streams:
        server.send(stream)
    server.is_well()
    assert faults() == []


@given(streams=st.lists(BYTES, min_size=1, max_size=8))
@settings(fuzzed, max_examples=SHORT)
def test_no_bytes_disturb_the_server(server, faults, streams):
    check_bytes(server, faults, streams)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@given(streams=st.lists(BYTES, min_size=1, max_size=8))
@settings(fuzzed, max_examples=LONG)
def test_no_bytes_disturb_the_server_in_full(server, faults, streams):
    check_bytes(server, faults, streams)


@given(stream=st.sampled_from(GOOD[:4]), cuts=st.lists(st.floats(0, 1), max_size=4))
@settings(fuzzed, max_examples=100)
def test_where_a_request_is_cut_into_pieces_changes_nothing(server, stream, cuts):
    with raw_connection(server.url) as (connection, file):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(stream)
        whole = read_answer(file)
        if whole.first == "HTTP/1.1 100 Continue":
            whole = read_answer(file)
        places = sorted(int(cut * len(stream)) for cut in cuts)
        for begin, end in zip([0, *places], [*places, len(stream)], strict=True):
            connection.sendall(stream[begin:end])
            time.sleep(0.001)
        answer = read_answer(file)
        if answer.first == "HTTP/1.1 100 Continue":
            answer = read_answer(file)
        assert (answer.first, answer.body) == (whole.first, whole.body)
