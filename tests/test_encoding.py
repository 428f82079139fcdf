"""Texts to vectors for serving: what is encoded together, remembered and refused; other servers asked."""

import asyncio
import json
import threading
import zlib
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving import encoding as encoding_module
from serving.encoding import (
    EncodingError,
    FullError,
    LocalEncoding,
    OtherEncoderError,
    Row,
    Rows,
    TooLongError,
    UnavailableError,
    VectorCache,
    WrongRequestError,
    chosen_precision,
)
from serving.remote_encoding import RemoteEncoding

DIM = 64
MAX_WORDS = 4
SECONDS = 10  # in which whatever a test waits for has long come


class WordComputing:
    """Stands in for a model: a text's vector has a 1 on the axis of each of its first four words.

    Attributes:
        rounds: what it was given, (way, texts) each.
        may_go: cleared, it computes nothing until it is set again.
    """

    dim, max_tokens = DIM, MAX_WORDS
    described = {"prompts": {"query": "find ", "document": ""}, "precision": "float32", "device": "cpu"}  # noqa: RUF012

    def __init__(self, round_tokens: int = 1000) -> None:
        self.round_tokens = round_tokens
        self.ways = {"query": "query", "document": "document", None: "document"}
        self.rounds: list[tuple[str, list[str]]] = []
        self.may_go = threading.Event()
        self.may_go.set()

    def rows(self, texts: Sequence[str], way: str) -> Rows:
        self.rounds.append((way, list(texts)))
        assert self.may_go.wait(SECONDS)
        if "bad" in texts:
            raise ValueError("a bad text")
        counts = np.array([len(text.split()) for text in texts])
        vectors = np.stack([vector_of(text, way) for text in texts])
        return Rows(vectors, np.minimum(counts, MAX_WORDS), counts > MAX_WORDS)

    def tokens(self, text: str) -> int | None:
        return len(text.split())

    def text_of(self, ids: Sequence[int]) -> str:
        return " ".join(f"w{number}" for number in ids)


def vector_of(text: str, way: str = "query") -> np.ndarray:
    """By definition: ones on the words' axes, an axis apart for each way, scaled to unit length."""
    vector = np.zeros(DIM, np.float32)
    vector[0 if way == "query" else 1] = 1
    for word in text.split()[:MAX_WORDS]:
        vector[2 + zlib.crc32(word.encode()) % (DIM - 2)] += 1
    if "nan" in text:
        vector[0] = np.nan
    return vector / np.linalg.norm(vector)


def run(
    work: Callable[[LocalEncoding, WordComputing], Awaitable[Any]], round_tokens: int = 1000, **settings: Any
) -> WordComputing:
    """Do something with an encoding over the stand-in, which is closed after it."""
    computing = WordComputing(round_tokens)

    async def main() -> None:
        encoding = LocalEncoding(computing, **settings)
        try:
            await work(encoding, computing)
        finally:
            computing.may_go.set()
            await encoding.close()

    asyncio.run(asyncio.wait_for(main(), SECONDS))
    return computing


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


@asynccontextmanager
async def busy(computing: WordComputing, encoding: LocalEncoding):
    """The thread computes a text "first", and nothing else until the block ends."""
    computing.may_go.clear()
    first = asyncio.create_task(encoding.queries(["first"]))
    await until(lambda: len(computing.rounds) == 1)
    yield
    computing.may_go.set()
    await first


def ask(encoding: LocalEncoding, texts: list[str], prompt_name: str = "query") -> asyncio.Task[Rows]:
    return asyncio.create_task(encoding.encoded(texts, prompt_name))


# --- In this process


def test_vectors_come_in_the_order_of_the_texts():
    async def work(encoding: LocalEncoding, _: WordComputing) -> None:
        texts = ["red fox", "blue", "red fox"]
        np.testing.assert_array_equal(await encoding.queries(texts), [vector_of(text) for text in texts])
        assert (await encoding.documents(["blue"]))[0].tolist() == vector_of("blue", "document").tolist()
        assert (await encoding.queries([])).shape == (0, DIM)

    run(work)


def test_requests_that_come_while_it_computes_are_encoded_together():
    async def work(encoding: LocalEncoding, computing: WordComputing) -> None:
        async with busy(computing, encoding):
            asked = [ask(encoding, [text]) for text in ("a", "b", "c")]
            await until(lambda: encoding.n_queued == 3)
        for task, text in zip(asked, ("a", "b", "c"), strict=True):
            np.testing.assert_array_equal((await task).vectors, [vector_of(text)])
        assert computing.rounds == [("query", ["first"]), ("query", ["a", "b", "c"])]

    run(work)


def test_queries_and_documents_take_turns():
    async def work(encoding: LocalEncoding, computing: WordComputing) -> None:
        async with busy(computing, encoding):
            texts = {"d1": "document", "q1": "query", "d2": "document"}
            asked = [ask(encoding, [text], task) for text, task in texts.items()]
            await until(lambda: encoding.n_queued == 3)
        await asyncio.gather(*asked)
        assert computing.rounds[1:] == [("document", ["d1", "d2"]), ("query", ["q1"])]

    run(work)


def test_a_query_waits_for_one_round_of_documents_alone():
    # A round of 16 guessed tokens is four texts of 4
    many = [f"d{n}" for n in range(8)]

    async def work(encoding: LocalEncoding, computing: WordComputing) -> None:
        async with busy(computing, encoding):
            asked = [ask(encoding, many, "document"), ask(encoding, ["q1"])]
            await until(lambda: encoding.n_queued == 9)
        await asyncio.gather(*asked)
        assert [texts for _, texts in computing.rounds[1:]] == [many[:4], ["q1"], many[4:]]

    run(work, round_tokens=16)


def test_a_large_request_does_not_hold_up_a_small_one():
    # The model reads 4 tokens of a text: a round of 16 is four texts, or a share of two for each of two.
    many = [f"d{n}" for n in range(8)]

    async def work(encoding: LocalEncoding, computing: WordComputing) -> None:
        async with busy(computing, encoding):
            large, small = ask(encoding, many), ask(encoding, ["xx"])
            await until(lambda: encoding.n_queued == 9)
        np.testing.assert_array_equal((await small).vectors, [vector_of("xx")])
        np.testing.assert_array_equal((await large).vectors, [vector_of(text) for text in many])
        assert [texts for _, texts in computing.rounds[1:]] == [["d0", "d1", "xx"], many[2:6], many[6:]]

    run(work, round_tokens=16)


def test_how_much_is_encoded_at_one_go_is_learned():
    # 512 guessed tokens at first, 4 a text; the stand-in is so fast that the model's 1000 are soon allowed
    texts = [f"d{n}" for n in range(600)]

    async def work(encoding: LocalEncoding, computing: WordComputing) -> None:
        assert (await encoding.encoded(texts, "query")).vectors.shape == (600, DIM)
        assert [len(texts) for _, texts in computing.rounds] == [128, 250, 222]

    run(work, round_tokens=1000)


def test_what_nobody_waits_for_any_more_is_not_encoded():
    async def work(encoding: LocalEncoding, computing: WordComputing) -> None:
        async with busy(computing, encoding):
            gone, stays = ask(encoding, ["gone"]), ask(encoding, ["stays"])
            await until(lambda: encoding.n_queued == 2)
            gone.cancel()
            await until(lambda: encoding.n_queued == 1)
        await stays
        assert computing.rounds[1:] == [("query", ["stays"])]

    run(work)


def test_a_text_that_was_asked_for_before_is_not_encoded_again():
    async def work(encoding: LocalEncoding, computing: WordComputing) -> None:
        first = await encoding.encoded(["a b", "c"], "query")
        again = await encoding.encoded(["c", "a b"], "query")
        np.testing.assert_array_equal(again.vectors, first.vectors[::-1])
        assert again.n_tokens.tolist() == [1, 2]
        await encoding.encoded(["c"], "document")  # another prompt, another vector
        assert computing.rounds == [("query", ["a b", "c"]), ("document", ["c"])]
        assert (encoding.cache.n_hits, encoding.cache.n_misses) == (2, 3)

    run(work)


def test_a_vector_that_is_handed_out_may_be_changed():
    async def work(encoding: LocalEncoding, _: WordComputing) -> None:
        for _round in range(2):
            vectors = await encoding.queries(["a"])
            np.testing.assert_array_equal(vectors, [vector_of("a")])
            vectors[:] = 0

    run(work)


def test_a_cache_forgets_what_was_used_least_lately():
    row = Row(np.zeros(4, np.float32), 1, False)
    cache = VectorCache(10_000)
    cache.put(("query", "a"), row)
    size = cache.n_bytes
    cache = VectorCache(2 * size)
    for text in "ab":
        cache.put(("query", text), row)
    assert cache.get(("query", "a")) is row
    cache.put(("query", "c"), row)
    assert [cache.get(("query", text)) is row for text in "abc"] == [True, False, True]
    assert (len(cache), cache.n_bytes) == (2, 2 * size)


def test_a_row_that_is_larger_than_the_cache_is_not_kept():
    cache = VectorCache(0)
    cache.put(("query", "a"), Row(np.zeros(4, np.float32), 1, False))
    assert (len(cache), cache.n_bytes) == (0, 0)


def test_a_long_text_is_cut_or_refused_as_the_caller_wants():
    async def work(encoding: LocalEncoding, _: WordComputing) -> None:
        rows = await encoding.encoded(["1 2 3 4 5"], "query")
        np.testing.assert_array_equal(rows.vectors, [vector_of("1 2 3 4")])
        assert (rows.n_tokens.tolist(), rows.is_cut.tolist()) == ([4], [True])
        for _time in range(2):  # remembered by now, and still too long
            with pytest.raises(TooLongError, match=r"text 2 of 2 has more than the 4 tokens") as refused:
                await encoding.encoded(["1 2 3 4", "1 2 3 4 5"], "query", truncate=False)
            assert refused.value.status == 413

    run(work)


def test_a_full_queue_refuses():
    async def work(encoding: LocalEncoding, computing: WordComputing) -> None:
        async with busy(computing, encoding):
            waits = ask(encoding, ["a", "b"])
            await until(lambda: encoding.n_queued == 2)
            with pytest.raises(FullError, match=r"2 texts wait to be encoded, at most 3 may") as refused:
                await encoding.queries(["c", "d"])
            assert refused.value.status == 429
        await waits
        # More than may wait, but nothing waits
        assert (await encoding.queries(["e", "f", "g", "h"])).shape == (4, DIM)

    run(work, max_queued=3)


def test_more_texts_than_may_wait_are_asked_for_in_parts(monkeypatch):
    monkeypatch.setattr(encoding_module, "PART_TEXTS", 2)

    async def work(encoding: LocalEncoding, computing: WordComputing) -> None:
        texts = ["a", "b", "c", "d", "e"]
        np.testing.assert_array_equal(await encoding.queries(texts), [vector_of(text) for text in texts])
        assert [len(texts) for _, texts in computing.rounds] == [2, 2, 1]

    run(work, max_queued=2)


def test_one_request_s_fault_is_not_another_s():
    async def work(encoding: LocalEncoding, computing: WordComputing) -> None:
        async with busy(computing, encoding):
            good, bad = ask(encoding, ["good"]), ask(encoding, ["x", "bad"])
            await until(lambda: encoding.n_queued == 3)
        np.testing.assert_array_equal((await good).vectors, [vector_of("good")])
        with pytest.raises(EncodingError, match=r"^not encoded: a bad text$") as failed:
            await bad
        assert (failed.value.status, failed.value.kind) == (424, "backend")

    run(work)


def test_a_vector_that_is_no_vector_is_an_error():
    async def work(encoding: LocalEncoding, _: WordComputing) -> None:
        with pytest.raises(EncodingError, match="not finite"):
            await encoding.queries(["nan"])

    run(work)


def test_half_a_letter_is_refused_before_it_reaches_the_tokenizer():
    async def work(encoding: LocalEncoding, computing: WordComputing) -> None:
        with pytest.raises(WrongRequestError, match=r"letter 3 of a text is U\+D800"):
            await encoding.queries(["한 \ud800"])
        assert (await encoding.queries(["한국어 🙂"])).shape == (1, DIM)

    run(work)


def test_a_prompt_that_the_model_has_not_is_refused():
    async def work(encoding: LocalEncoding, _: WordComputing) -> None:
        with pytest.raises(WrongRequestError, match=r"prompt_name is 'title', .*: document, query"):
            await encoding.encoded(["a"], "title")

    run(work)


def test_what_waits_when_it_is_closed_is_finished_and_what_comes_then_is_refused():
    async def work(encoding: LocalEncoding, computing: WordComputing) -> None:
        async with busy(computing, encoding):
            waits = ask(encoding, ["a"])
            await until(lambda: encoding.n_queued == 1)
            closing = asyncio.create_task(encoding.close())
            await until(lambda: not encoding.is_healthy)
            with pytest.raises(UnavailableError, match="ending") as refused:
                await encoding.queries(["late"])
            assert refused.value.status == 503
        await closing
        np.testing.assert_array_equal((await waits).vectors, [vector_of("a")])

    run(work)


def test_what_is_not_done_in_time_when_it_is_closed_is_told_so(monkeypatch):
    monkeypatch.setattr(encoding_module, "GRACE_SECONDS", 0.01)

    async def work(encoding: LocalEncoding, computing: WordComputing) -> None:
        computing.may_go.clear()
        first = ask(encoding, ["first"])
        await until(lambda: len(computing.rounds) == 1)
        waits = ask(encoding, ["waits"])
        await until(lambda: encoding.n_queued == 1)
        await encoding.close()
        with pytest.raises(UnavailableError):
            await waits
        first.cancel()

    run(work)


def test_a_thread_that_does_not_come_back_is_not_healthy(monkeypatch):
    monkeypatch.setattr(encoding_module, "STUCK_SECONDS", 0.01)

    async def work(encoding: LocalEncoding, computing: WordComputing) -> None:
        assert encoding.is_healthy
        async with busy(computing, encoding):
            await until(lambda: not encoding.is_healthy)
        await until(lambda: encoding.is_healthy)

    run(work)


# --- Which precision


def published(folder: Path, version: int, sha256: str, precision: str) -> None:
    extra = folder / "models" / "index" / str(version) / "assets.extra"
    extra.mkdir(parents=True)
    (extra / "manifest.json").write_text(json.dumps({"encoder_sha256": sha256}))
    (extra / "report.json").write_text(json.dumps({"encoding": {"precision": precision}}))


@pytest.mark.parametrize(("hardware", "chosen"), [(True, "bfloat16"), (False, "float32")])
def test_the_precision_is_the_newest_version_s_where_the_machine_is_made_for_it(
    tmp_path, monkeypatch, hardware, chosen
):
    monkeypatch.setattr("pipeline.encoder.has_bfloat16", lambda device: hardware)
    monkeypatch.setattr("pipeline.encoder.device_type", lambda device: "cpu")
    published(tmp_path, 9, "aa", "mixed")
    published(tmp_path, 10, "aa", "bfloat16")  # 10 is newer than 9
    published(tmp_path, 11, "bb", "float32")  # by another encoder
    assert chosen_precision(tmp_path / "encoders" / "aa", "auto") == chosen
    assert chosen_precision(tmp_path / "encoders" / "cc", "auto") == "float32"


# --- By another server


class Stub:
    """Stands in for an encoder server: what it was asked, and what a test has it answer.

    Attributes:
        asked: (path, body) of every request.
        answer: (path, body) -> (status, content, headers).
    """

    def __init__(self, answer: Callable[[str, Any], tuple[int, Any, dict[str, str]]]) -> None:
        self.answer = answer
        self.asked: list[tuple[str, Any]] = []
        self.n_dropped = 0

    async def respond(self, request: Any) -> Any:
        from aiohttp import web

        if self.n_dropped:
            self.n_dropped -= 1
            request.transport.abort()
            return web.Response()
        body = await request.json() if request.can_read_body else None
        self.asked.append((request.path, body))
        status, content, headers = self.answer(request.path, body)
        return web.json_response(content, status=status, headers=headers)


def run_remote(stub: Stub, work: Callable[[str], Awaitable[Any]]) -> None:
    from aiohttp import web
    from aiohttp.test_utils import TestServer

    async def main() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", stub.respond)
        async with TestServer(app) as server:
            await work(str(server.make_url("")))

    asyncio.run(asyncio.wait_for(main(), SECONDS))


def tei(known: Sequence[str], **info: Any) -> Callable[[str, Any], tuple[int, Any, dict[str, str]]]:
    """Text Embeddings Inference with these prompt names: a text's vector points to (its length, 1)."""

    def answer(path: str, body: Any) -> tuple[int, Any, dict[str, str]]:
        if path == "/info":
            return 200, {"model_type": {"embedding": {"pooling": "mean"}}, **info}, {}
        if body.get("prompt_name", known[0] if known else None) not in (*known, None):
            return 422, {"error": "no such prompt", "error_type": "validation"}, {}
        return 200, [[n / (n * n + 1) ** 0.5, 1 / (n * n + 1) ** 0.5] for n in map(len, body["inputs"])], {}

    return answer


def test_of_an_unknown_server_the_prompts_are_tried_and_the_width_is_seen():
    stub = Stub(tei(["query", "passage"]))

    async def work(url: str) -> None:
        encoding = await RemoteEncoding.open(url)
        assert (encoding.encoder_sha256, encoding.dim, encoding.tokens("a")) == (None, 2, None)
        stub.asked.clear()
        # (3, 1) and (7, 1) at length 1
        vectors = await encoding.documents(["abc", "abcdefg"])
        np.testing.assert_allclose(
            vectors, [[3 / 10**0.5, 1 / 10**0.5], [7 / 50**0.5, 1 / 50**0.5]], rtol=1e-6
        )
        await encoding.queries(["a"])
        assert [body["prompt_name"] for _, body in stub.asked] == ["passage", "query"]
        await encoding.close()

    run_remote(stub, work)


def test_a_server_without_prompts_gets_none():
    stub = Stub(tei([]))

    async def work(url: str) -> None:
        encoding = await RemoteEncoding.open(url)
        stub.asked.clear()
        await encoding.queries(["a"])
        assert stub.asked == [("/embed", {"inputs": ["a"], "truncate": True, "normalize": True})]
        await encoding.close()

    run_remote(stub, work)


@pytest.mark.parametrize(
    ("known", "api", "sent"),
    [
        ([], "embed", ["find abc", "text: abc"]),
        (["query"], "embed", ["abc", "text: abc"]),  # it puts its own before a query
        (["query", "document"], "openai", ["find abc", "text: abc"]),  # OpenAI's requests name no prompt
    ],
)
def test_a_prompt_that_the_server_does_not_know_is_sent_before_the_text(known, api, sent):
    def openai(path: str, body: Any) -> tuple[int, Any, dict[str, str]]:
        return 200, {"data": [{"index": 0, "embedding": [1, 1]}]}, {}

    stub = Stub(openai if api == "openai" else tei(known))

    async def work(url: str) -> None:
        prompts = {"query": "find ", "document": "text: "}
        encoding = await RemoteEncoding.open(url, encoder_api=api, prompts=prompts)
        stub.asked.clear()
        await encoding.queries(["abc"])
        await encoding.documents(["abc"])
        assert [body.get("inputs", body.get("input")) for _, body in stub.asked] == [[text] for text in sent]
        await encoding.close()

    run_remote(stub, work)


def test_more_texts_than_the_server_takes_are_sent_in_several_requests():
    stub = Stub(tei(["query", "document"], max_client_batch_size=2, prompts={}, encoder_sha256="ab"))

    async def work(url: str) -> None:
        encoding = await RemoteEncoding.open(url)
        assert encoding.encoder_sha256 == "ab"
        stub.asked.clear()
        vectors = await encoding.queries(["a", "bb", "ccc"])
        assert [body["inputs"] for _, body in stub.asked] == [["a", "bb"], ["ccc"]]
        np.testing.assert_allclose(vectors[:, 0] / vectors[:, 1], [1, 2, 3], rtol=1e-6)
        await encoding.close()

    run_remote(stub, work)


def test_an_openai_shaped_server_is_asked_without_prompts_and_its_order_is_by_index():
    def answer(path: str, body: Any) -> tuple[int, Any, dict[str, str]]:
        data = [{"index": n, "embedding": [len(text), 1]} for n, text in enumerate(body["input"])]
        return 200, {"object": "list", "data": data[::-1]}, {}

    stub = Stub(answer)

    async def work(url: str) -> None:
        encoding = await RemoteEncoding.open(url, encoder_api="openai", model="small")
        expected = [[3 / 10**0.5, 1 / 10**0.5], [1 / 2**0.5, 1 / 2**0.5]]
        np.testing.assert_allclose(await encoding.documents(["abc", "a"]), expected, rtol=1e-6)
        asked = {"input": ["abc", "a"], "model": "small", "encoding_format": "float"}
        assert stub.asked[-1] == ("/v1/embeddings", asked)
        await encoding.close()

    run_remote(stub, work)


def replies(status: int, content: Any) -> Callable[[str, Any], tuple[int, Any, dict[str, str]]]:
    return lambda path, body: (status, content, {})


@pytest.mark.parametrize(
    ("status", "content", "error", "said"),
    [
        (429, {"error": "full", "error_type": "overloaded"}, FullError, "answered 429: full"),
        (413, {"error": "long"}, TooLongError, "answered 413: long"),
        (422, {"error": "odd"}, WrongRequestError, "answered 422: odd"),
        (503, {"error": "down"}, UnavailableError, "answered 503: down"),
        (401, {"error": {"message": "no key"}}, EncodingError, "no key: give the encoder server's key"),
        (500, {"message": "broken"}, EncodingError, "broken: wanted vectors"),
        (200, {"surprise": 1}, EncodingError, "wanted 1 vectors of one width"),
        (200, [[1, 2], [3, 4]], EncodingError, r"shape \(2, 2\), wanted 1 vectors"),
        (200, [[0, 0]], EncodingError, "a vector of length 0"),
        (200, [[1e30, 1e30]], EncodingError, r"length 1.41421e\+30, wanted 0.5 to 2"),
        (200, [["a", "b"]], EncodingError, "wanted 1 vectors"),
        (200, [[1, 0, 0]], OtherEncoderError, "have 3 numbers and had 2"),
    ],
)
def test_an_answer_without_the_vectors_is_told_with_the_address(status, content, error, said):
    stub = Stub(tei(["query", "document"]))

    async def work(url: str) -> None:
        encoding = await RemoteEncoding.open(url)
        stub.answer = replies(status, content)
        with pytest.raises(error, match=said) as failed:
            await encoding.queries(["a"])
        assert url.rstrip("/") in str(failed.value)
        assert failed.value.status == (502 if error is EncodingError else error.default_status)
        await encoding.close()

    run_remote(stub, work)


def test_of_an_answer_without_end_only_the_beginning_is_read():
    # 64 KiB, 1 KiB a text and 32 bytes a number; two million numbers take four million bytes
    most = 2**16 + 1024 + 2 * 32
    stub = Stub(tei(["query", "document"]))

    async def work(url: str) -> None:
        encoding = await RemoteEncoding.open(url)
        stub.answer = replies(200, [[1] * 2_000_000])
        with pytest.raises(
            EncodingError, match=f"/embed: its answer has more than the {most} bytes"
        ) as failed:
            await encoding.queries(["a"])
        assert failed.value.status == 502
        await encoding.close()

    run_remote(stub, work)


def test_a_server_that_runs_another_model_now_is_refused():
    stub = Stub(tei(["query"], prompts={}, encoder_sha256="a" * 64))

    async def work(url: str) -> None:
        encoding = await RemoteEncoding.open(url)
        stub.answer = lambda path, body: (200, [[1, 1]], {"x-encoder-sha256": "b" * 64})
        with pytest.raises(OtherEncoderError, match="by encoder bbbbbbbbbbbb now and did by aaaaaaaaaaaa"):
            await encoding.queries(["a"])
        await encoding.close()

    run_remote(stub, work)


@pytest.mark.parametrize(
    ("info", "said"),
    [
        ((404, {"detail": "Not Found"}), "/info answered 404, wanted 200"),
        ((200, {"model_type": {"reranker": {}}}), "its model is a reranker"),
    ],
)
def test_what_is_no_encoder_server_is_refused_at_the_start(info, said):
    async def work(url: str) -> None:
        with pytest.raises(EncodingError, match=said):
            await RemoteEncoding.open(url)

    run_remote(Stub(replies(*info)), work)


def test_a_width_other_than_the_index_s_is_refused_at_the_start():
    async def work(url: str) -> None:
        with pytest.raises(EncodingError, match="its vectors have 2 numbers, wanted 384"):
            await RemoteEncoding.open(url, dim=384)

    run_remote(Stub(tei([])), work)


@pytest.mark.parametrize(("n_dropped", "answers"), [(1, True), (2, False)])
def test_a_dropped_connection_is_tried_once_more(n_dropped, answers):
    stub = Stub(tei([]))

    async def work(url: str) -> None:
        encoding = await RemoteEncoding.open(url)
        stub.n_dropped = n_dropped
        if answers:
            assert (await encoding.queries(["a"])).shape == (1, 2)
        else:
            with pytest.raises(UnavailableError, match="cannot be reached"):
                await encoding.queries(["a"])
        await encoding.close()

    run_remote(stub, work)


def test_where_no_server_listens_the_address_and_the_command_are_told():
    async def main() -> None:
        with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9/info: .* `python -m serving encoder`"):
            await RemoteEncoding.open("http://127.0.0.1:9")

    asyncio.run(asyncio.wait_for(main(), SECONDS))


def test_a_server_that_does_not_answer_is_given_up():
    stub = Stub(tei([]))

    async def work(url: str) -> None:
        encoding = await RemoteEncoding.open(url, timeout_seconds=0.2)

        async def hang(request: Any) -> Any:
            await asyncio.sleep(SECONDS)

        stub.respond = hang  # type: ignore[method-assign]
        with pytest.raises(UnavailableError, match=r"no answer within 0\.2 seconds"):
            await encoding.queries(["a"])
        await encoding.close()

    async def dispatch(request: Any) -> Any:
        return await stub.respond(request)

    class Late(Stub):
        async def respond(self, request: Any) -> Any:
            return await dispatch(request)

    run_remote(Late(tei([])), work)


# --- The pipeline's own encoder

TEXTS = ["notes", "a", "b c d", "x y z " * 30, "a b"]


@pytest.fixture(scope="module")
def opened(tiny_model, tmp_path_factory):
    """An opened tiny model with prompts, and the pipeline's Encoder of the same folder."""
    import shutil

    from pipeline.encoder import Encoder

    folder = tmp_path_factory.mktemp("prompted") / "model"
    shutil.copytree(tiny_model, folder)
    file = folder / "config_sentence_transformers.json"
    prompts = {"query": "find ", "document": "", "title": "t "}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prompts": prompts}))
    encoding = LocalEncoding.open(folder, device="cpu")
    yield encoding, Encoder.open(folder, device="cpu")
    asyncio.run(encoding.close())


@pytest.mark.slow
def test_vectors_are_the_pipeline_s_whatever_they_were_encoded_with(opened):
    encoding, encoder = opened

    async def main() -> None:
        together = await asyncio.gather(*(encoding.queries([text]) for text in TEXTS))
        expected = np.concatenate([encoder.queries([text]) for text in TEXTS])
        cosines = np.einsum("ij,ij->i", np.concatenate(together), expected)
        assert cosines.min() > 0.9999
        documents = await encoding.documents(TEXTS)
        np.testing.assert_allclose(documents, encoder.documents(TEXTS), atol=1e-5)
        assert np.abs(documents[0] - expected[0]).max() > 0.01, "the prompt changes nothing"
        # No default prompt, as a document has none; a prompt of another name
        bare = (await encoding.encoded(["notes"])).vectors
        np.testing.assert_allclose(bare, documents[:1], atol=1e-5)
        named = (await encoding.encoded(["notes"], "title")).vectors
        np.testing.assert_allclose(named, encoder.documents(["t notes"]), atol=1e-5)

    asyncio.run(main())


@pytest.mark.slow
def test_tokens_are_those_of_the_text_alone_and_of_what_was_read_with_the_prompt(opened):
    encoding, _ = opened
    assert encoding.tokens("a b c") == 3  # neither the prompt "find " nor [CLS] and [SEP]
    assert encoding.tokens("a " * 100) == 100  # uncut
    assert encoding.computing.text_of([2, 5, 3]) == encoding.computing.text_of([5])

    async def main() -> None:
        assert encoding.computing.max_tokens == 64
        for texts in (["a " * 100], ["a " * 100, "a"], ["a " * 2000]):  # alone, together, and very long
            rows = await encoding.encoded(texts, "query")
            assert (rows.n_tokens[0], rows.is_cut[0]) == (64, True)
        # [CLS], "f", "##i", "##n", "##d", three letters, [SEP]
        rows = await encoding.encoded(["a b c", "a"], "query")
        assert (rows.n_tokens.tolist(), rows.is_cut.tolist()) == ([9, 7], [False, False])
        with pytest.raises(WrongRequestError, match="token 99999: the model has tokens 0 to"):
            encoding.computing.text_of([99999])

    asyncio.run(main())


@pytest.mark.slow
@pytest.mark.parametrize("prompt_name", ["query", "title"])  # by the pipeline, and by the library
def test_of_a_word_of_a_million_letters_only_the_beginning_is_tokenised(opened, monkeypatch, prompt_name):
    encoding, _ = opened
    encoder, seen = encoding.computing._encoder, []
    windows, encode = encoder.windows, encoder.model.encode

    def seen_windows(given, *more):
        seen.extend(map(len, given[0]))
        return windows(given, *more)

    def seen_texts(texts, **more):
        seen.extend(map(len, texts))
        return encode(texts, **more)

    monkeypatch.setattr(encoder, "windows", seen_windows)
    monkeypatch.setattr(encoder.model, "encode", seen_texts)
    rows = asyncio.run(encoding.encoded(["a" * 1_000_000], prompt_name))
    assert seen == [64 * 100]  # tokens that the model reads, letters of each
    assert rows.is_cut.tolist() == [True]


@pytest.mark.slow
def test_an_encoder_is_named_by_its_files(opened, tiny_model):
    from pipeline.artifacts import encoder_sha256, file_hashes

    encoding, _ = opened
    assert len(encoding.encoder_sha256) == 64
    assert encoding.encoder_sha256 != encoder_sha256(file_hashes(tiny_model))  # other prompts
