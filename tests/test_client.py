"""The client against a real server, and against servers that misbehave."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from serving_parts import K, free_port, publish_rows, rows_server, unit_rows

from serving import client as client_module
from serving.client import Client, body_of
from serving.errors import ServingError

ROWS = unit_rows(20, 8)


@pytest.fixture
def server(tmp_path):
    publish_rows(tmp_path, 7, ROWS)
    with rows_server(tmp_path) as server:
        yield server


@contextmanager
def answering(*answers: tuple[int, str]) -> Iterator[tuple[str, list[str]]]:
    """A server that gives these answers in turn, the last one for ever; and what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers[min(len(asked), len(answers) - 1)]
            asked.append(f"{self.command} {self.path}")
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.send_header("location", "http://127.0.0.1:1/elsewhere")
            self.send_header("retry-after", "3600")
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(client_module, "BACKOFF_SECONDS", 0)


def test_status_metadata_and_predict_give_what_the_server_said(server):
    url, _ = server
    with Client(url) as client:
        assert [(row["version"], row["state"]) for row in client.status()] == [("7", "AVAILABLE")]
        assert client.available_version() == 7
        assert client.metadata(7)["model_spec"] == {"name": "index", "signature_name": "", "version": "7"}
        found = client.predict(ROWS[4], version=7)
    exact = ROWS @ ROWS[4]
    assert found.rows == np.argsort(-exact)[:K].tolist()
    np.testing.assert_allclose(found.scores, np.sort(exact)[::-1][:K], rtol=1e-6)


def test_a_body_holds_the_very_float32_numbers():
    sent = json.loads(body_of(ROWS[4]))["inputs"]
    assert np.array_equal(np.array(sent, np.float32), ROWS[4])


def test_the_servers_words_are_in_the_error(server):
    url, _ = server
    with Client(url) as client, pytest.raises(ServingError) as caught:
        client.predict([1.0])
    assert str(caught.value) == (
        f"{url}/v1/models/index:predict: 400: Query doesn't match dataset dimsensionality"
    )
    assert caught.value.status == 400


@pytest.mark.usefixtures("no_pauses")
def test_what_was_unavailable_is_asked_again_and_soon():
    # a Retry-After of an hour is not waited for
    found = json.dumps({"outputs": {"output_1": [0.5], "output_2": [3]}})
    with answering((503, ""), (502, ""), (200, found)) as (url, asked), Client(url) as client:
        assert client.predict([1.0]) == ([0.5], [3])
        assert asked == ["POST /v1/models/index:predict"] * 3


@pytest.mark.usefixtures("no_pauses")
def test_asking_again_ends():
    with answering((503, "")) as (url, asked), Client(url, retries=2) as client:
        with pytest.raises(ServingError, match="503"):
            client.status()
        assert len(asked) == 3


@pytest.mark.parametrize("status", [400, 404, 429, 500])
def test_a_refusal_is_asked_once(status):
    with answering((status, '{"error": "no"}')) as (url, asked), Client(url) as client:
        with pytest.raises(ServingError, match=f"{status}: no$"):
            client.status()
        assert len(asked) == 1


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, "<html>"), "got something else than a JSON object; is this TensorFlow Serving's API?"),
        ((200, "[]"), "got something else than a JSON object"),
        ((200, "{}"), "wanted a dict under 'outputs' in the answer"),
        ((200, '{"outputs": {"scores": []}}'), "wanted lists output_1 and output_2, got"),
        ((200, '{"outputs": {"output_1": [1.0], "output_2": []}}'), "wanted lists output_1 and output_2"),
        ((404, "<html>"), "404: Not Found; is this TensorFlow Serving's API?"),
        ((302, ""), "302: Found; is this TensorFlow Serving's API?"),
    ],
)
def test_an_answer_of_something_else_is_named(answer, said):
    with answering(answer) as (url, _), Client(url) as client, pytest.raises(ServingError) as caught:
        client.predict([1.0])
    assert said in str(caught.value)


@pytest.mark.usefixtures("no_pauses")
def test_a_server_that_is_not_there_is_one_line():
    url = f"http://127.0.0.1:{free_port()}"
    with Client(url) as client, pytest.raises(ServingError) as caught:
        client.status()
    assert str(caught.value) == f"{url}/v1/models/index: no server answers: Connection refused"


def test_a_silent_server_is_given_up():

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with (
            Client(url, timeout=0.1) as client,
            pytest.raises(ServingError, match=r"no answer within 0\.1 s"),
        ):
            client.status()


@pytest.mark.parametrize("url", ["localhost:9090", "ftp://localhost", "http://", ""])
def test_an_address_without_scheme_or_host_is_refused(url):
    with pytest.raises(ServingError, match="wanted http://HOST:PORT"):
        Client(url)


def test_a_model_name_cannot_leave_its_place_in_the_path(server):
    url, _ = server
    with Client(url, "../index?x=") as client, pytest.raises(ServingError, match=r"of model \.\./index"):
        client.status()


def test_no_version_available_says_the_states(tmp_path):
    publish_rows(tmp_path, 7, ROWS)
    with rows_server(tmp_path) as (url, versions), Client(url) as client:
        for file in (tmp_path / "7" / "rows.npy", tmp_path / "7"):
            file.unlink() if file.is_file() else file.rmdir()
        versions.poll()
        with pytest.raises(ServingError, match=r"no version is AVAILABLE \(7 is END\)"):
            client.available_version()


def test_waiting_ends_when_the_version_answers(tmp_path):
    with rows_server(tmp_path) as (url, versions), Client(url) as client:

        def publish() -> None:
            publish_rows(tmp_path, 3, ROWS)
            versions.poll()

        threading.Timer(0.1, publish).start()
        assert client.wait_until_ready(deadline=20, poll_seconds=0.01) == 3


def test_waiting_for_nothing_ends_with_the_last_reason():
    url = f"http://127.0.0.1:{free_port()}"
    with Client(url) as client, pytest.raises(ServingError, match=r"^not ready after 0\.05 s: .*refused$"):
        client.wait_until_ready(deadline=0.05, poll_seconds=0.01)
