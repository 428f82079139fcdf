"""The encoder server: both clients' shapes, their errors, who waits no more, and how it ends."""

import asyncio
import base64
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from test_encoding import DIM, SECONDS, WordComputing, until, vector_of

from pipeline.errors import ArtifactError
from serving import encoder_server
from serving.encoder_server import make_app, model_folder, parser
from serving.encoding import LocalEncoding, OtherEncoderError
from serving.errors import ServingError
from serving.listening import bind
from serving.remote_encoding import RemoteEncoding

ROOT = Path(__file__).parents[1]
SHA256 = "ab" * 32


@pytest.fixture
def client():
    encoding = LocalEncoding(WordComputing(), encoder_sha256=SHA256)
    app = make_app(encoding, model_id="words", max_client_batch_size=3, max_body_bytes=1000)
    with TestClient(app) as client:
        yield client


def post(client: TestClient, path: str, **body: Any) -> Any:
    return client.post(path, json=body)


# --- Text Embeddings Inference's shape


@pytest.mark.parametrize(
    ("prompt_name", "way"), [("query", "query"), ("document", "document"), (None, "document")]
)
def test_embed_answers_a_vector_for_each_text(client, prompt_name, way):
    answer = post(client, "/embed", inputs=["red fox", "blue"], prompt_name=prompt_name)
    assert answer.status_code == 200
    np.testing.assert_allclose(answer.json(), [vector_of("red fox", way), vector_of("blue", way)], rtol=1e-6)
    assert answer.headers["x-encoder-sha256"] == SHA256
    assert (answer.headers["x-compute-tokens"], answer.headers["x-compute-characters"]) == ("3", "11")


def test_embed_takes_a_single_text_and_tokens(client):
    [vector] = post(client, "/embed", inputs="red fox").json()
    np.testing.assert_allclose(vector, vector_of("red fox", "document"), rtol=1e-6)
    # The stand-in's token 7 is the word w7
    single, several = (
        post(client, "/embed", inputs=[7, 8]).json(),
        post(client, "/embed", inputs=[[7, 8], "w7 w8"]),
    )
    np.testing.assert_allclose(single, [vector_of("w7 w8", "document")], rtol=1e-6)
    np.testing.assert_allclose(several.json(), single * 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("body", "status", "kind", "said"),
    [
        ({"inputs": []}, 400, "empty", "`inputs` is empty"),
        ({"inputs": ["a"] * 4}, 413, "validation", "`inputs` has 4 texts, at most 3"),
        ({"inputs": "1 2 3 4 5", "truncate": False}, 413, "validation", "more than the 4 tokens"),
        ({"inputs": "a" * 1000}, 413, "validation", "more than 1000 bytes"),
        ({"inputs": "a", "prompt_name": "title"}, 422, "validation", "prompt_name is 'title'"),
        ({"inputs": [True]}, 422, "validation", "`inputs` is of another kind"),  # no token 1
        ({"inputs": 7}, 422, "validation", "`inputs` is of another kind: wanted a text"),
        ({}, 422, "validation", "`inputs` is missing: wanted a text"),
        ({"inputs": "a", "normalize": False}, 422, "validation", "`normalize` is not true"),
        ({"inputs": "a", "truncation_direction": "left"}, 422, "validation", "`truncation_direction`"),
        (
            {"inputs": "a", "dimensions": DIM + 1},
            422,
            "validation",
            f"dimensions is {DIM + 1}, wanted 1 to {DIM}",
        ),
        ({"inputs": ["a", "bad"]}, 424, "backend", "a bad text"),
    ],
)
def test_embed_refuses_as_text_embeddings_inference_does(client, body, status, kind, said):
    answer = post(client, "/embed", **body)
    assert (answer.status_code, answer.json()["error_type"]) == (status, kind)
    assert said in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


def test_a_body_that_is_no_json_is_refused(client):
    answer = client.post("/embed", content=b'{"inputs": ')
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
    assert "JSON" in answer.json()["error"]


def test_what_is_not_answered_here_is_told_in_the_shape_of_other_errors(client):
    for answer, status in ((client.get("/nowhere"), 404), (client.get("/embed"), 405)):
        assert (answer.status_code, answer.json()["error_type"]) == (status, "validation")
        assert answer.json()["error"].endswith("is not answered here; see /docs")


def test_a_text_that_is_too_long_is_cut_unless_told_otherwise(client):
    [vector] = post(client, "/embed", inputs="1 2 3 4 5").json()
    np.testing.assert_allclose(vector, vector_of("1 2 3 4", "document"), rtol=1e-6)


def test_the_first_dimensions_have_unit_length_again(client):
    # On the first two axes stands the way alone: (0, 1) of a document
    assert post(client, "/embed", inputs="red", dimensions=2).json() == [[0.0, 1.0]]


# --- OpenAI's shape


def test_openai_s_clients_get_their_shape(client):
    answer = post(client, "/v1/embeddings", input=["red fox", "blue"], model="any", user="u").json()
    assert (answer["object"], answer["model"]) == ("list", "words")
    assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert [(one["object"], one["index"]) for one in answer["data"]] == [("embedding", 0), ("embedding", 1)]
    np.testing.assert_allclose(answer["data"][1]["embedding"], vector_of("blue", "document"), rtol=1e-6)


def test_base64_is_little_endian_float32(client):
    answer = post(client, "/v1/embeddings", input="blue", encoding_format="base64").json()
    vector = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
    np.testing.assert_array_equal(vector, vector_of("blue", "document"))


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"input": []}, 400, "invalid_request_error"),
        ({"input": ["a"] * 4}, 400, "invalid_request_error"),
        ({"model": "any"}, 400, "invalid_request_error"),
        ({"input": "a", "encoding_format": "hex"}, 400, "invalid_request_error"),
        ({"input": "bad"}, 500, "server_error"),
    ],
)
def test_openai_s_clients_get_their_errors(client, body, status, kind):
    answer = post(client, "/v1/embeddings", **body)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.json()["error"]["type"] == kind


# --- What is said of it


def test_info_tells_what_a_client_has_to_know(client):
    info = client.get("/info").json()
    assert (info["encoder_sha256"], info["dim"], info["max_input_length"]) == (SHA256, DIM, 4)
    assert (info["model_id"], info["max_client_batch_size"], info["auto_truncate"]) == ("words", 3, True)
    assert info["prompts"] == {"query": "find ", "document": ""}
    assert "embedding" in info["model_type"]


def test_the_open_api_page_shows_the_bodies(client):
    document = client.get("/openapi.json").json()
    schema = document["paths"]["/embed"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/EmbedRequest"}
    fields = document["components"]["schemas"]["EmbedRequest"]["properties"]
    assert {"inputs", "truncate", "prompt_name"} <= set(fields)


def test_the_docs_page_loads_nothing_from_elsewhere(client):
    docs = client.get("/docs")
    assert (docs.status_code, "/v1/embeddings" in docs.text, "<script" in docs.text) == (200, True, False)
    assert "default-src 'none'" in docs.headers["content-security-policy"]


def test_metrics_have_text_embeddings_inference_s_names(client):
    post(client, "/embed", inputs=["a", "b"])
    post(client, "/embed", inputs="a")  # remembered
    post(client, "/embed", inputs=[])
    page = client.get("/metrics").text
    values = dict(re.findall(r"^([a-z_]+(?:{.*})?) (\S+)$", page, re.MULTILINE))
    assert values['te_request_count{method="batch"}'] == "2.0"
    assert values['te_request_count{method="single"}'] == "1.0"
    assert values["te_request_success"] == "2.0"
    assert values['te_request_failure{err="empty"}'] == "1.0"
    assert (values["te_batch_next_size_count"], values["te_batch_next_size_sum"]) == ("1.0", "2.0")
    assert (values["encoder_cache_hits_total"], values["encoder_cache_misses_total"]) == ("1.0", "2.0")
    assert values["te_queue_size"] == "0.0"
    assert "_created" not in page


# --- Over a real connection


@asynccontextmanager
async def served(app: FastAPI) -> AsyncIterator[str]:
    """The application by uvicorn on a free port; ended as at a SIGTERM."""
    import uvicorn

    listener = bind("127.0.0.1", 0, "--port")
    config = uvicorn.Config(
        app, log_level="error", lifespan="on", ws="none", timeout_graceful_shutdown=SECONDS
    )
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    await until(lambda: server.started)
    try:
        yield "http://{}:{}".format(*listener.getsockname())
    finally:
        server.should_exit = True
        await running


def run_served(work: Callable[[str, WordComputing, LocalEncoding], Awaitable[Any]], **settings: Any) -> None:
    async def main() -> None:
        computing = WordComputing()
        encoding = LocalEncoding(computing, encoder_sha256=SHA256, **settings)
        async with served(make_app(encoding, max_client_batch_size=3)) as url:
            try:
                await work(url, computing, encoding)
            finally:
                computing.may_go.set()

    asyncio.run(asyncio.wait_for(main(), SECONDS))


def test_a_gateway_gets_the_same_vectors_from_it_as_in_process():
    async def work(url: str, _: WordComputing, encoding: LocalEncoding) -> None:
        remote = await RemoteEncoding.open(url)
        assert (remote.encoder_sha256, remote.dim) == (SHA256, DIM)
        texts = ["red fox", "한국어 🙂", "क्षेत्र", "日本語", "中文 文本"]  # more than it takes at once
        np.testing.assert_allclose(await remote.queries(texts), await encoding.queries(texts), rtol=1e-6)
        np.testing.assert_allclose(await remote.documents(texts), await encoding.documents(texts), rtol=1e-6)
        await remote.close()

    run_served(work)


def test_openai_s_shape_gives_a_gateway_the_default_prompt_s_vectors():
    async def work(url: str, _: WordComputing, encoding: LocalEncoding) -> None:
        remote = await RemoteEncoding.open(url, encoder_api="openai")
        np.testing.assert_allclose(await remote.queries(["blue"]), [vector_of("blue", "document")], rtol=1e-6)
        await remote.close()

    run_served(work)


def test_another_encoder_at_the_same_address_is_noticed():
    async def main() -> None:
        first, second = (LocalEncoding(WordComputing(), encoder_sha256=name * 64) for name in "ab")
        async with served(make_app(first)) as url, served(make_app(second)) as other:
            remote = await RemoteEncoding.open(url)
            remote.url = other  # as if it had been started again there
            with pytest.raises(OtherEncoderError, match="by encoder bbbbbbbbbbbb now"):
                await remote.queries(["a"])
            await remote.close()

    asyncio.run(asyncio.wait_for(main(), SECONDS))


def test_nothing_is_encoded_for_a_client_that_has_left():
    async def work(url: str, computing: WordComputing, encoding: LocalEncoding) -> None:
        computing.may_go.clear()
        first = asyncio.create_task(encoding.queries(["first"]))
        await until(lambda: len(computing.rounds) == 1)
        body = b'{"inputs": "gone"}'
        _, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        writer.write(b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        await until(lambda: encoding.n_queued == 1)
        writer.close()
        await until(lambda: encoding.n_queued == 0)
        computing.may_go.set()
        await first
        assert [texts for _, texts in computing.rounds] == [["first"]]

    run_served(work)


def test_a_client_that_leaves_in_its_body_s_midst_is_no_fault(caplog):
    async def work(url: str, computing: WordComputing, encoding: LocalEncoding) -> None:
        import aiohttp

        _, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        writer.write(b'POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{"inputs')
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()
        async with aiohttp.ClientSession() as session:
            counted = ""
            while 'te_request_failure{err="dropped"} 1.0' not in counted:
                async with session.get(f"{url}/metrics") as answer:
                    counted = await answer.text()

    run_served(work)
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


def test_a_full_queue_is_told_with_429():
    async def work(url: str, computing: WordComputing, encoding: LocalEncoding) -> None:
        import aiohttp

        computing.may_go.clear()
        waiting = [asyncio.create_task(encoding.queries(["first"]))]
        await until(lambda: len(computing.rounds) == 1)
        waiting.append(asyncio.create_task(encoding.queries(["second"])))
        await until(lambda: encoding.n_queued == 1)
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{url}/embed", json={"inputs": "third"}) as answer:
                assert (answer.status, (await answer.json())["error_type"]) == (429, "overloaded")
            async with session.post(f"{url}/v1/embeddings", json={"input": "third"}) as answer:
                assert (answer.status, (await answer.json())["error"]["type"]) == (429, "rate_limit_error")
        computing.may_go.set()
        await asyncio.gather(*waiting)

    run_served(work, max_queued=1)


def test_what_was_taken_is_answered_before_it_ends():
    async def main() -> None:
        import aiohttp

        computing = WordComputing()
        encoding = LocalEncoding(computing)
        async with aiohttp.ClientSession() as session:
            async with served(make_app(encoding)) as url:
                computing.may_go.clear()
                asked = asyncio.create_task(session.post(f"{url}/embed", json={"inputs": "blue"}))
                await until(lambda: len(computing.rounds) == 1)
                asyncio.get_running_loop().call_later(0.1, computing.may_go.set)
            answer = await asked
            assert answer.status == 200
            np.testing.assert_allclose(await answer.json(), [vector_of("blue", "document")], rtol=1e-6)
        assert not encoding.is_healthy

    asyncio.run(asyncio.wait_for(main(), SECONDS))


def test_health_is_told_with_503_when_it_does_not_encode(client):
    assert client.get("/health").status_code == 200
    encoding = LocalEncoding(WordComputing())
    with TestClient(make_app(encoding)) as closing:
        asyncio.run(encoding.close())
        answer = closing.get("/health")
        assert (answer.status_code, answer.json()["error_type"]) == (503, "unhealthy")
        assert post(closing, "/embed", inputs="a").status_code == 503


# --- The command


def test_the_flags_have_defaults_and_are_checked(capsys):
    flags = parser().parse_args([])
    assert (flags.host, flags.port, flags.device, flags.precision) == ("127.0.0.1", 8080, "auto", "auto")
    for wrong in (["--port", "70000"], ["--max_queued", "0"], ["--cache_mib", "-1"], ["--precision", "int8"]):
        with pytest.raises(SystemExit):
            parser().parse_args(wrong)
        assert wrong[0] in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser().parse_args(["--model", "a", "--model_base_path", "b"])


def test_without_a_version_it_says_so(tmp_path):
    flags = parser().parse_args(["--model_base_path", str(tmp_path)])
    with pytest.raises(ArtifactError, match=f"{tmp_path} holds no version: publish one first"):
        model_folder(flags)


def test_the_newest_version_s_encoder_is_taken_as_it_was_published(tmp_path):
    from pipeline.artifacts import encoder_sha256, file_hashes

    made = tmp_path / "made"
    made.mkdir()
    (made / "model.safetensors").write_bytes(b"weights")
    sha256 = encoder_sha256(file_hashes(made))
    folder = made.rename((tmp_path / "encoders").mkdir() or tmp_path / "encoders" / sha256)
    for version, name in ((9, "cd" * 32), (10, sha256)):
        extra = tmp_path / "models" / "index" / str(version) / "assets.extra"
        extra.mkdir(parents=True)
        (extra / "manifest.json").write_text(json.dumps({"encoder_sha256": name}))
    flags = parser().parse_args(["--model_base_path", str(tmp_path / "models" / "index")])
    assert model_folder(flags) == folder
    (folder / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ArtifactError, match="was changed"):
        model_folder(flags)


def test_a_taken_port_is_told_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        flags = parser().parse_args(["--port", str(port), "--model", "no/such/folder"])
        with pytest.raises(ServingError, match=rf"--port {port}: cannot listen on 127\.0\.0\.1:{port}"):
            encoder_server.serve(flags)


# Runs in its own process: the command as it stands, but for the model.
SERVE = """
import sys
from serving import encoder_server
from serving.encoding import LocalEncoding
from test_encoding import WordComputing
LocalEncoding.open = classmethod(lambda cls, folder, **settings: cls(WordComputing()))
encoder_server.serve(encoder_server.parser().parse_args(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_process_answers_and_ends_at_a_sigterm():
    with bind("127.0.0.1", 0, "--port") as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVE, "--model", "models/words", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}) as process:
        try:
            _wait_for(f"{url}/health", process)
            asked = urllib.request.Request(f"{url}/embed", b'{"inputs": ["blue"], "prompt_name": "query"}')
            np.testing.assert_allclose(
                json.load(urllib.request.urlopen(asked)), [vector_of("blue")], rtol=1e-6
            )
            assert json.load(urllib.request.urlopen(f"{url}/info"))["model_id"] == "words"
        finally:
            process.terminate()
        assert process.wait(SECONDS) == 0


def _wait_for(url: str, process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url)
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"{url} did not come up")
