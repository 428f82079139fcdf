"""What one client may take of the REST port, and what the others notice of it: nothing.

Bare sockets to the real application with a stand-in index; processes where signals and open files count.
"""

import gzip
import json
import resource
import signal
import socket
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import requests
from serving_parts import (
    RowsSearcher,
    app_server,
    free_port,
    predict_body,
    publish_rows,
    raw_connection,
    read_answer,
    rows_process,
    rows_server,
    unit_rows,
)

from serving import protocol
from serving.coalescing import Searches
from serving.flags import Flags
from serving.http_limits import Limits
from serving.monitoring import Monitoring
from serving.protocol import Tensor
from serving.server import IndexApp, allow_connections
from serving.versions import Models
from serving.wanted import ModelConfig

DIM = 8
ROWS = unit_rows(20, DIM)
BODY = predict_body(ROWS[4]).encode()
PREDICT = b"POST /v1/models/index:predict HTTP/1.1\r\nHost: a\r\n"
STATUS = b"GET /v1/models/index HTTP/1.1\r\n\r\n"
QUICK = Limits(idle_seconds=0.4, head_seconds=0.4, transfer_seconds=0.4, linger_seconds=0.2)


def predict(body: bytes = BODY) -> bytes:
    return PREDICT + b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.fixture
def base(tmp_path) -> Path:
    publish_rows(tmp_path / "models" / "index", 7, ROWS)
    return tmp_path / "models" / "index"


@pytest.fixture
def url(base):
    with rows_server(base) as (address, _):
        yield address


def refused(url: str, request: bytes) -> tuple[int, str]:
    """Status and error of an answer after which the connection ends."""
    with raw_connection(url) as (connection, file):
        connection.sendall(request)
        answer = read_answer(file)
        assert answer.headers["connection"] == "close"
        connection.shutdown(socket.SHUT_WR)
        assert file.read() == b""
        return answer.status, json.loads(answer.body)["error"]


def is_answered(url: str) -> bool:
    answer = requests.post(f"{url}/v1/models/index:predict", BODY, timeout=10)
    return answer.json()["outputs"]["output_2"][0] == 4


# Size


@pytest.fixture
def narrow(base):
    with rows_server(base, max_body_bytes=1000) as (address, _):
        yield address


def test_a_body_beyond_the_limit_is_refused_before_it_is_sent(narrow):
    said = (413, "The body is larger than 1000 bytes, which is the most")
    assert refused(narrow, PREDICT + b"Content-Length: 1001\r\n\r\n") == said
    # a client that waits for leave to send does not get it
    assert refused(narrow, PREDICT + b"Expect: 100-continue\r\nContent-Length: 100000000\r\n\r\n") == said
    assert refused(narrow, PREDICT + b"Content-Length: 99999999999999999\r\n\r\n") == said
    assert is_answered(narrow)


def test_chunks_count_until_they_are_too_many(narrow):
    chunk = b"1f4\r\n" + b" " * 500 + b"\r\n"
    request = PREDICT + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 3
    assert refused(narrow, request) == (413, "The body is larger than 1000 bytes, which is the most")


def test_a_bomb_is_refused_when_it_would_burst(narrow):
    packed = gzip.compress(b" " * 10**8)  # 100 MB in 97 kB: within the limit of no packed body
    bomb = gzip.compress(b" " * 1001)
    for body, said in ((packed, "The body is larger"), (bomb, "The unpacked body is larger")):
        answer = requests.post(
            f"{narrow}/v1/models/index:predict", body, headers={"Content-Encoding": "gzip"}, timeout=10
        )
        assert answer.status_code == 413
        assert answer.json()["error"].startswith(said)
    assert is_answered(narrow)


def test_a_client_that_sends_on_regardless_reads_why_it_was_refused(narrow):
    # 20 MB do not fit into the sockets' buffers: without a lingering close the answer would be lost
    answer = requests.post(f"{narrow}/v1/models/index:predict", b" " * 20_000_000, timeout=10)
    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("request_head", "status", "said"),
    [
        (b"GET /" + b"a" * 8192, 414, "The path is longer than 8192 bytes, which is the most"),
        (
            b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 101 + b"\r\n",
            431,
            "There are more than 100 headers, which is the most",
        ),
        (
            b"GET / HTTP/1.1\r\na: " + b"b" * 65536 + b"\r\n\r\n",
            431,
            "The headers are larger than 65536 bytes, which is the most",
        ),
        # a header without an end stays inside the parser, where only what has come can be counted
        (
            b"GET / HTTP/1.1\r\na: " + b"b" * 1_000_000,
            431,
            "The headers are larger than 65536 bytes, which is the most",
        ),
    ],
)
def test_a_head_beyond_the_limit_is_refused(url, request_head, status, said):
    assert refused(url, request_head) == (status, said)
    assert is_answered(url)


def test_what_frames_chunks_is_bounded_too(url):
    request = PREDICT + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 1_000_000
    with raw_connection(url) as (connection, file):
        connection.sendall(request)
        assert read_answer(file).first == "HTTP/1.1 413 Request Entity Too Large"
    trailer = PREDICT + b"Transfer-Encoding: chunked\r\n\r\n0\r\na: " + b"b" * 65536 + b"\r\n\r\n"
    assert refused(url, trailer)[0] == 431


def test_bodies_of_one_byte_a_chunk_are_read(url):
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY)
    request = PREDICT + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    with raw_connection(url) as (connection, file):
        connection.sendall(request)
        assert json.loads(read_answer(file).body)["outputs"]["output_2"][0] == 4


def test_all_bodies_together_are_bounded(base):
    half = PREDICT + b"Content-Length: 2000\r\n\r\n" + b" " * 600
    with rows_server(base, Limits(max_held_bytes=1000)) as (url, _):
        with raw_connection(url) as (first, _):
            first.sendall(half)
            time.sleep(0.1)
            assert refused(url, half) == (
                503,
                "Requests of 1000 bytes are held, which is the most; try again later",
            )
            assert is_answered(url)  # what is small still fits
        assert wait_until(
            lambda: requests.post(url + "/v1/models/index:predict", b" " * 600).status_code == 400
        )


def test_what_is_dropped_unanswered_is_held_no_longer(base):
    """An answer that ends the connection, a body sent ahead after it, and what is no request at all."""
    sent = b"GET /nothing HTTP/1.1\r\n\r\n" + predict() + b"nonsense\r\n\r\n"
    with rows_server(base, Limits(max_held_bytes=1000)) as (url, _):
        for _ in range(10):
            with raw_connection(url) as (connection, file):
                connection.sendall(sent)
                assert read_answer(file).status == 404
        blank = b" " * 1000
        assert wait_until(lambda: requests.post(f"{url}/v1/models/index:predict", blank).status_code == 400)


LARGE = b" " * 70_000  # read by a thread


@pytest.fixture
def reading(monkeypatch):
    """The sizes of what threads read, and the event until which each of them waits."""
    sizes, go_on, own = [], threading.Event(), protocol.read_json

    def read(body):
        if len(body) >= len(LARGE):
            sizes.append(len(body))
            assert go_on.wait(20)
        return own(body)

    monkeypatch.setattr(protocol, "read_json", read)
    yield sizes, go_on
    go_on.set()


def test_what_a_thread_still_reads_is_held_though_its_client_has_left(base, reading):
    sizes, go_on = reading
    with rows_server(base, Limits(max_held_bytes=100_000)) as (url, _):
        address = f"{url}/v1/models/index:predict"
        with raw_connection(url) as (connection, _):
            connection.sendall(predict(LARGE))
            assert wait_until(lambda: sizes)
        time.sleep(0.2)  # the server notices
        assert requests.post(address, LARGE, timeout=2).status_code == 503
        go_on.set()
        assert wait_until(lambda: requests.post(address, LARGE, timeout=2).status_code == 400)


def test_what_waits_for_a_thread_is_dropped_when_its_client_leaves(base, reading):
    sizes, go_on = reading
    with rows_server(base, Limits(max_held_bytes=250_000)) as (url, _), ExitStack() as stack:
        for n in (1, 2):
            stack.enter_context(raw_connection(url))[0].sendall(predict(LARGE))
            assert wait_until(lambda n=n: len(sizes) == n)
        for _ in range(5):  # two are held for good, and one at a time fits beside them
            with raw_connection(url) as (connection, _):
                connection.sendall(predict(LARGE + b" "))
                time.sleep(0.1)
            assert is_answered(url)
        go_on.set()
        assert requests.post(f"{url}/v1/models/index:predict", LARGE, timeout=5).status_code == 400
        assert sizes == [len(LARGE)] * 3


def test_the_end_does_not_wait_for_what_a_thread_reads(base, reading):
    sizes, _ = reading
    with rows_server(base) as (url, _), raw_connection(url) as (connection, _):
        connection.sendall(predict(LARGE))
        assert wait_until(lambda: sizes)
        assert {one.daemon for one in threading.enumerate() if one.name == "large"} == {True}


# Number


def wait_until(holds, seconds: float = 5) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_a_connection_too_many_is_told_so_and_closed(base):
    with rows_server(base, max_connections=2) as (url, _):
        with raw_connection(url) as (first, file), raw_connection(url):
            first.sendall(STATUS)
            assert read_answer(file).status == 200
            with raw_connection(url) as (_, third):
                answer = read_answer(third)  # without having asked
                assert answer.status == 503
                said = "2 connections are open, which is the most; try again later"
                assert json.loads(answer.body) == {"error": said}
                assert third.read() == b""
            first.sendall(STATUS)  # those that are open go on
            assert read_answer(file).status == 200
        assert wait_until(lambda: requests.get(f"{url}/v1/models/index", timeout=10).status_code == 200)


def test_a_thousand_idle_connections_cost_little_and_disturb_nobody(base):
    with rows_process(base) as (url, process), ExitStack() as open_connections:
        allow_connections(1100)  # this side of them
        assert is_answered(url)
        before = memory(process.pid)
        for _ in range(1000):
            open_connections.enter_context(raw_connection(url))
        started = time.monotonic()
        assert is_answered(url)
        assert time.monotonic() - started < 1
        # a socket's objects in Python: the parser, the protocol, the transport; no buffer until data comes
        assert memory(process.pid) - before < 1000 * 20_000
        files, _ = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        assert files >= 4096  # the server asked the system for what --max_connections promises


def memory(pid: int) -> int:
    """Bytes of a process's memory that no file holds."""
    [line] = [one for one in Path(f"/proc/{pid}/status").read_text().splitlines() if "RssAnon" in one]
    return int(line.split()[1]) * 1024


# Order


def test_requests_sent_ahead_are_answered_in_their_order(url):
    # the real server ends itself here: libevent 2.1.8, evhttp_read_cb, event_errx
    bodies = [predict_body(ROWS[row]).encode() for row in range(20)]
    with raw_connection(url) as (connection, file):
        connection.sendall(b"".join(predict(body) for body in bodies) + STATUS)
        best = [json.loads(read_answer(file).body)["outputs"]["output_2"][0] for _ in bodies]
        assert best == list(range(20))
        assert b"AVAILABLE" in read_answer(file).body


def test_too_many_sent_ahead_are_refused_after_the_answers_to_the_others(url):
    with raw_connection(url) as (connection, file):
        connection.sendall(STATUS * 2000)
        statuses = []
        while not statuses or statuses[-1] == 200:
            statuses.append(read_answer(file).status)
        assert statuses[-1] == 503
        assert len(statuses) > 100
    assert is_answered(url)


def test_what_is_sent_faster_than_it_is_answered_waits_in_the_clients_own_buffers(url):
    large = predict(BODY + b" " * 20_000)  # the server reads a dozen at once
    with raw_connection(url) as (connection, file):
        sender = threading.Thread(target=lambda: [connection.sendall(large) for _ in range(500)])
        sender.start()
        assert {read_answer(file).status for _ in range(500)} == {200}
        sender.join()


def test_what_is_wrong_is_said_after_the_answer_to_what_was_right(url):
    with raw_connection(url) as (connection, file):
        connection.sendall(predict() + b"nonsense\r\n\r\n")
        assert read_answer(file).status == 200
        assert read_answer(file).status == 501
        assert file.read() == b""


def test_a_body_that_comes_with_get_is_not_the_next_request(url):
    # the real server takes it for one
    with raw_connection(url) as (connection, file):
        connection.sendall(b"GET /v1/models/index HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc" + STATUS)
        assert [read_answer(file).status for _ in range(2)] == [200, 200]


# Time


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /v1/models/ind",
        PREDICT,
        PREDICT + b"Content-Length: 100\r\n\r\n" + BODY[:10],
        PREDICT + b"Transfer-Encoding: chunked\r\n\r\n1\r\n",
        STATUS,  # answered, then idle
    ],
)
def test_a_client_that_stops_is_closed_without_a_word(base, sent):
    with rows_server(base, QUICK) as (url, _), raw_connection(url) as (connection, file):
        started = time.monotonic()
        connection.sendall(sent)
        if sent == STATUS:
            assert read_answer(file).status == 200
        assert file.read() == b""
        assert 0.3 < time.monotonic() - started < 3
        assert is_answered(url)


@pytest.mark.parametrize("begin", [b"", b"GET /", PREDICT, PREDICT + b"Content-Length: 100\r\n\r\n"])
def test_a_drop_now_and_then_does_not_keep_a_connection_open(base, begin):
    """The real server's 50 s begin anew with every piece; here a whole phase has to end in time."""
    with rows_server(base, QUICK) as (url, _), raw_connection(url) as (connection, file):
        connection.sendall(begin)
        drop = b"\r\n" if not begin else b"a"
        ended = threading.Thread(target=file.read)
        ended.start()
        for _ in range(30):
            if not ended.is_alive():
                break
            send_if_open(connection, drop)
            time.sleep(0.1)
        assert not ended.is_alive()


def send_if_open(connection: socket.socket, data: bytes) -> None:
    with suppress(OSError):
        connection.sendall(data)


def test_half_a_body_and_an_end_is_no_request(url):
    with raw_connection(url) as (connection, file):
        connection.sendall(PREDICT + b"Content-Length: 100\r\n\r\n" + BODY[:10])
        connection.shutdown(socket.SHUT_WR)
        assert file.read() == b""
    assert is_answered(url)


N_TEXTS = 100


class LongTexts(RowsSearcher):
    """Answers with twenty megabytes: more than the sockets' buffers hold."""

    def run(self, signature_name, inputs):
        return {"texts": Tensor("DT_STRING", (N_TEXTS,), [b"x" * 200_000] * N_TEXTS)}


def texts_server(base: Path, limits: Limits | None, stack: ExitStack) -> str:
    models = Models([ModelConfig("index", base)], lambda _: LongTexts(ROWS))
    models.poll()
    searches = Searches(Monitoring())
    stack.callback(models.close)
    stack.callback(searches.close)
    return stack.enter_context(app_server(IndexApp(models, searches, Monitoring(), Flags()), limits))


def test_a_client_that_does_not_take_its_answer_is_closed(base):
    with ExitStack() as stack:
        url = texts_server(base, QUICK, stack)
        connection, file = stack.enter_context(raw_connection(url))
        connection.sendall(predict())
        connection.recv(1, socket.MSG_PEEK)  # it begins to come
        time.sleep(2)
        answer = read_answer(file, to_end=True)
        assert len(answer.body) < int(answer.headers["content-length"])
        assert requests.get(f"{url}/v1/models/index", timeout=10).status_code == 200


def test_a_large_answer_is_taken_whole_while_others_are_answered(base):
    with ExitStack() as stack:
        url = texts_server(base, None, stack)
        connection, file = stack.enter_context(raw_connection(url))
        connection.sendall(predict() + STATUS)
        connection.recv(1, socket.MSG_PEEK)
        assert requests.get(f"{url}/v1/models/index", timeout=10).status_code == 200
        answer = json.loads(read_answer(file).body)
        assert [len(text) for text in answer["outputs"]] == [200_000] * N_TEXTS
        assert b"AVAILABLE" in read_answer(file).body


def test_a_client_that_goes_away_leaves_nothing_behind(base):
    with rows_server(base) as (url, models):
        for sent in (b"", b"GET /", PREDICT + b"Content-Length: 100\r\n\r\n12345", predict(), STATUS * 50):
            for _ in range(20):
                with raw_connection(url) as (connection, _):
                    connection.sendall(sent)
        assert is_answered(url)
        models.close()  # every version was given back: else this waits five seconds
        assert models.available("index") == []


# Signals


def test_sigterm_answers_what_was_asked_and_closes_what_is_idle(base):
    with rows_process(base) as (url, process):
        with raw_connection(url) as (idle, idle_file), raw_connection(url) as (busy, busy_file):
            idle.sendall(STATUS)
            assert read_answer(idle_file).status == 200
            busy.sendall(predict()[:-10])
            time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            assert idle_file.read() == b""
            with pytest.raises(requests.ConnectionError):
                requests.get(f"{url}/v1/models/index", timeout=5)
            busy.sendall(predict()[-10:])
            answer = read_answer(busy_file)
            assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert process.wait(timeout=10) == 0


def test_a_second_sigterm_ends_at_once(base):
    with rows_process(base) as (url, process), raw_connection(url) as (connection, _):
        connection.sendall(predict()[:-10])  # a request that would be waited for
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(TimeoutError):
            process_wait(process, 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == -signal.SIGTERM


def process_wait(process, seconds: float) -> int:
    if not wait_until(lambda: process.poll() is not None, seconds):
        raise TimeoutError
    return process.returncode


def test_after_sigkill_the_next_server_starts_on_the_same_port(base):
    port = free_port()
    for _ in range(2):
        with rows_process(base, port=port) as (_, process):
            url = f"http://127.0.0.1:{port}"
            with raw_connection(url) as (connection, file):
                connection.sendall(STATUS + predict()[:-10])
                assert read_answer(file).status == 200
                process.kill()
                process.wait(timeout=10)


def test_of_two_servers_that_wait_with_one_port_one_serves_and_one_says_why_not(tmp_path, base):
    """Both could take it: a port that nobody listens on yet can be shared."""
    port, empty = free_port(), tmp_path / "empty"
    with (
        rows_process(empty, port=port, is_awaited=False) as (url, first),
        rows_process(empty, port=port, is_awaited=False) as (_, second),
    ):
        time.sleep(2)
        publish_rows(empty, 7, ROWS)
        assert wait_until(lambda: first.poll() is not None or second.poll() is not None, 20)
        loser = second if first.poll() is None else first
        assert loser.returncode == 1
        assert "cannot listen on 127.0.0.1:" in loser.stderr.read().splitlines()[-1]
        assert is_answered(url)
