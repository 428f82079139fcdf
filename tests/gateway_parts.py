"""What the gateway's tests share: small published versions, stand-ins for an encoder and an index server."""

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from aiohttp import web

from pipeline.artifacts import file_hashes
from pipeline.errors import PipelineError
from serving.gateway import Gateway
from serving.gateway_flags import parse
from serving.gateway_routes import make_app
from serving.index_backends import RowsIndex, ServedIndex
from serving.pinning import Means
from serving.published import PublishedVersion

AXES = ("sea", "ship", "bread", "oven", "star", "moon", "한국", "(other)")
DIM = len(AXES)
ENCODER, OTHER_ENCODER = "ab" * 32, "cd" * 32
# By the words below: "ship" scores sqrt(1/2) with harbour, 2 / sqrt(5) with voyage, and 0 with the others.
DOCUMENTS = [
    {"document_id": "harbour", "title": "Harbour", "text": "sea ship", "url": "https://example.org/harbour"},
    {"document_id": "voyage", "title": "Voyage", "text": "ship ship sea", "url": None},
    {"document_id": "loaf", "title": "Loaf", "text": "bread oven", "url": None},
    {"document_id": "sky", "title": "Sky", "text": "star", "url": None},
]


def vector_of(text: str) -> np.ndarray:
    """A text as the stand-in encoder sees it: how often it has each of AXES, at unit length."""
    counts = np.zeros(DIM, np.float32)
    for word in text.lower().split():
        counts[AXES.index(word) if word in AXES else DIM - 1] += 1
    return counts / max(1, np.linalg.norm(counts))


class WordsEncoding:
    """Stands in for an encoder: words are axes; queries and documents alike, a token a word.

    Args:
        says: its encoder_sha256; None: as a server that does not say.
        turned: by so many axes: another model, whose vectors mean something else.
    """

    def __init__(self, says: str | None = ENCODER, turned: int = 0, counts_tokens: bool = True) -> None:
        self.encoder_sha256, self.dim = says, DIM
        self.is_closed = False
        self._turned, self._counts_tokens = turned, counts_tokens

    async def queries(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.array([vector_of(text) for text in texts], np.float32).reshape(-1, DIM)
        return np.roll(vectors, self._turned, axis=1)

    documents = queries

    def tokens(self, text: str) -> int | None:
        return len(text.split()) if self._counts_tokens else None

    async def close(self) -> None:
        self.is_closed = True


def publish(
    folder: Path,
    version: int = 7,
    documents: Sequence[dict[str, Any]] = DOCUMENTS,
    *,
    co_read: Sequence[tuple[str, str, int, int]] = (),
    has_rows: bool = True,
    **manifest: Any,
) -> PublishedVersion:
    """A version as `publish` leaves it, but for the SavedModel: FOLDER/models/index/<version>/."""
    assets = folder / "models" / "index" / str(version) / "assets.extra"
    assets.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys(name for document in documents for name in document)
    table = pa.table({name: [document.get(name) for document in documents] for name in names})
    pq.write_table(table, assets / "documents.parquet", row_group_size=2)
    if has_rows:
        np.save(assets / "rows.npy", rows_of(documents))
    if co_read:
        names = ("document_id", "related_document_id", "n_readers", "n_sessions")
        columns = zip(*co_read, strict=True)
        table = pa.table(dict(zip(names, map(list, columns), strict=True)))
        pq.write_table(table, assets / "related.parquet")
    files = file_hashes(assets.parent, left_out=[assets / "manifest.json"])
    written = {"encoder_sha256": ENCODER, "k": 3, "dim": DIM, "layer": "tuned", "files": files}
    (assets / "manifest.json").write_text(json.dumps(written | manifest))
    return PublishedVersion(folder / "models" / "index", version)


def rows_of(documents: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.stack([vector_of(document["text"]) for document in documents])


class IndexServer:
    """Stands in for an index server: TensorFlow Serving's routes over exact rows, and its 404.

    Attributes:
        versions: {version: the index that it answers with}; a test changes it as a reload would.
        asked: (signature_name, inputs) of every search.
        hold: searches wait for it, those of other versions than `held` apart.
    """

    def __init__(self) -> None:
        self.versions: dict[int, RowsIndex] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.held: int | None = None  # every version
        self.hold = asyncio.Event()
        self.hold.set()

    def serve(self, version: int, documents: Sequence[dict[str, Any]] = DOCUMENTS) -> None:
        self.versions[version] = RowsIndex(rows_of(documents), [each["document_id"] for each in documents])

    async def status(self, request: web.Request) -> web.Response:
        rows = [{"version": str(each), "state": "AVAILABLE"} for each in sorted(self.versions, reverse=True)]
        return web.json_response({"model_version_status": rows})

    async def predict(self, request: web.Request) -> web.Response:
        body = await request.json()
        inputs = body["inputs"]
        self.asked.append((body["signature_name"], inputs))
        version = int(request.match_info["version"])
        if self.held in (None, version):
            await self.hold.wait()
        index = self.versions.get(version)
        if index is None:
            said = f"Servable not found for request: Specific(index, {request.match_info['version']})"
            return web.json_response({"error": said}, status=404)
        scores, ids = await index.search(
            np.float32(inputs["queries"]),
            inputs["k"],
            version=0,
            allowed=inputs.get("allowed_document_ids") or None,
            excluded=inputs.get("excluded_document_ids"),
        )
        return web.json_response({"outputs": {"scores": scores.tolist(), "document_ids": ids}})


@asynccontextmanager
async def index_server(port: int = 0):
    """The stand-in on a socket: its address and itself."""
    server = IndexServer()
    app = web.Application()
    app.router.add_get("/v1/models/index", server.status)
    app.router.add_post("/v1/models/index/versions/{version}:predict", server.predict)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", server
    finally:
        await runner.cleanup()


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def ids(self) -> list[str]:
        return [each["document_id"] for each in self.json["results"]]


class Caller:
    """Calls an ASGI application without a socket."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def get(self, path: str) -> Answer:
        return await self.call("GET", path)

    async def post(self, path: str, **body: Any) -> Answer:
        return await self.call("POST", path, json.dumps(body).encode())

    async def call(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        content_type: str = "application/json",
        host: str = "127.0.0.1:8000",
    ) -> Answer:
        plain, _, query = path.partition("?")
        headers = [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode())]
        headers.append((b"host", host.encode()))
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
            "scheme": "http", "path": plain, "raw_path": plain.encode(), "query_string": query.encode(),
            "root_path": "", "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
        }  # fmt: skip
        given: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if not given:
                await asyncio.Event().wait()  # the client stays until it is answered
            return given.pop(0)

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await self._app(scope, receive, send)
        answer_headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return Answer(sent[0]["status"], answer_headers, b"".join(m.get("body", b"") for m in sent[1:]))


def flags_of(folder: Path, *arguments: str) -> Any:
    return parse(
        ["--model_base_path", str(folder / "models" / "index"), "--poll_seconds", "0.02", *arguments]
    )


def means_of(
    folder: Path, url: str | None = None, encoding: Callable[[], Any] = WordsEncoding, **more: Any
) -> Means:
    """Versions of FOLDER by a stand-in encoder, at an index server or in process."""

    async def opened(version: PublishedVersion) -> Any:
        return encoding()

    served = ServedIndex(url, "index") if url else None
    return Means(folder / "models" / "index", opened, served=served, **more)


@asynccontextmanager
async def gateway_of(
    folder: Path, *arguments: str, means: Means | None = None, is_loaded: bool = True, **more: Any
):
    """A gateway over FOLDER in this process, its first version loaded, and a caller of its routes."""
    flags = flags_of(folder, *(arguments or ("--in_process",)))
    gateway = Gateway(flags, means or means_of(folder), **more)
    running = asyncio.create_task(gateway.run())
    try:
        while is_loaded and gateway.pins.live is None:
            if running.done():
                await running
            await asyncio.sleep(0.005)
        yield gateway, Caller(make_app(gateway))
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await gateway.close()


async def until(is_so: Callable[[], Any], seconds: float = 10) -> None:
    """Wait for what another task does; fails when it never does."""
    end = asyncio.get_running_loop().time() + seconds
    while not is_so():
        assert asyncio.get_running_loop().time() < end, "it did not happen"
        await asyncio.sleep(0.005)


@contextmanager
def in_a_line() -> Iterator[list[str]]:
    """What the block is refused with, which must be one line."""
    said: list[str] = []
    try:
        yield said
    except PipelineError as error:
        said.append(str(error))
    assert said, "it was not refused"
    assert "\n" not in said[0]
