"""HTTP server of texts' vectors: Text Embeddings Inference's routes and OpenAI's, over one LocalEncoding."""

from __future__ import annotations

import argparse
import base64
import logging
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import orjson
from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serving import __version__, accepting
from serving.docs_page import docs_page
from serving.encoding import (
    CACHE_BYTES,
    ENCODER_HEADER,
    MAX_QUEUED,
    PRECISIONS,
    EncodingError,
    LocalEncoding,
    Round,
    Rows,
    TooLongError,
    WrongRequestError,
)
from serving.leaving import GONE, GoneError, while_there
from serving.listening import bind

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

log = logging.getLogger("serving")

MAX_CLIENT_BATCH_SIZE = 256  # texts of one request
MAX_BODY_BYTES = 8 * 2**20
DRAIN_SECONDS = 20  # for requests that are being answered at a SIGTERM; Kubernetes kills after 30
BACKLOG = 2048  # connections that wait to be accepted
JSON = "application/json"
OWN = "encoder_"  # of the metrics that Text Embeddings Inference lacks
# Text Embeddings Inference's buckets
SECONDS = [1e-5 * 1.5**n for n in range(1, 36)]
SIZES = [2.0**n for n in range(13)]
TOKENS = [2.0**n for n in range(21)]
# OpenAI's word for a status, and the status that its clients know
OPENAI_ERRORS = {
    413: (400, "invalid_request_error"),
    422: (400, "invalid_request_error"),
    424: (500, "server_error"),
    429: (429, "rate_limit_error"),
    503: (503, "server_error"),
}
EXAMPLES = """
examples:
  python -m serving encoder --model_base_path work/demo/models/index --port 8080
  python -m serving encoder --model work/demo/encoders/SHA256 --precision float32
  curl -d '{"inputs": "merge two tables", "prompt_name": "query"}' localhost:8080/embed
  curl -d '{"input": ["merge two tables"], "model": "any"}' localhost:8080/v1/embeddings
"""

TokenIds = list[Annotated[int, Field(ge=0, strict=True)]]


class EmbedRequest(BaseModel):
    """Body of POST /embed, as Text Embeddings Inference takes it."""

    inputs: str | TokenIds | list[str | TokenIds]
    truncate: bool | None = True
    truncation_direction: Literal["right", "Right"] = "right"
    normalize: Literal[True] = True
    prompt_name: str | None = None
    dimensions: int | None = Field(None, ge=1)

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"inputs": ["merge two tables"], "prompt_name": "query"}]}
    )


class OpenAIRequest(BaseModel):
    """Body of POST /v1/embeddings, as OpenAI takes it; token ids are the served model's."""

    model_config = ConfigDict(
        protected_namespaces=(),
        json_schema_extra={"examples": [{"input": ["merge two tables"], "model": "any"}]},
    )

    input: str | TokenIds | list[str | TokenIds]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = Field(None, ge=1)
    user: str | None = None


# --- The application -----------------------------------------------------------------------------------


def make_app(
    encoding: LocalEncoding,
    *,
    model_id: str = "model",
    max_client_batch_size: int = MAX_CLIENT_BATCH_SIZE,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:
    """The routes over an opened encoding, which is closed when the application ends.

    Args:
        model_id: what /info and OpenAI's answers call the model.
        max_client_batch_size: texts of one request.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await encoding.close()

    app = FastAPI(
        title="Encoder",
        version=__version__,
        description="Vectors of texts: Text Embeddings Inference's /embed and OpenAI's /v1/embeddings.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own page loads its script from elsewhere
        redoc_url=None,
    )
    answers = _Answers(encoding, model_id, max_client_batch_size, max_body_bytes)
    embed, openai = _body_of(EmbedRequest), _body_of(OpenAIRequest)
    app.post("/embed", summary="Vectors of texts", openapi_extra=embed)(answers.embed)
    app.post("/v1/embeddings", summary="Vectors as OpenAI's clients want them", openapi_extra=openai)(
        answers.openai
    )
    app.post("/embeddings", include_in_schema=False)(answers.openai)  # as TEI has it too
    app.get("/health", summary="200 while texts are encoded")(answers.health)
    app.get("/info", summary="What is served")(answers.info)
    app.get("/metrics", summary="For Prometheus")(answers.metrics)
    app.add_exception_handler(HTTPException, _no_route)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        page, policy = docs_page(app.openapi(), 8080)
        return Response(page, media_type="text/html", headers={"Content-Security-Policy": policy})

    bodies = {body.__name__: body.model_json_schema() for body in (EmbedRequest, OpenAIRequest)}
    # Last, as each new route makes the document anew. FastAPI names no body that it does not read itself.
    app.openapi()["components"] = {"schemas": bodies}
    return app


class _Answers:
    """The routes' functions. Bodies are read by pydantic and written by orjson: a vector is 384 numbers."""

    def __init__(self, encoding: LocalEncoding, model_id: str, max_texts: int, max_body_bytes: int) -> None:
        self._encoding, self._model_id = encoding, model_id
        self._max_texts, self._max_body_bytes = max_texts, max_body_bytes
        self._metrics = _Metrics(encoding)
        self._headers = {ENCODER_HEADER: encoding.encoder_sha256} if encoding.encoder_sha256 else {}

    async def embed(self, request: Request) -> Response:
        """Vectors of texts: a list of numbers for each. Without `prompt_name` the model's default prompt."""
        return await self._answered(request, self._embed, _tei_error)

    async def openai(self, request: Request) -> Response:
        """Vectors of texts as OpenAI's clients want them, with the model's default prompt."""
        return await self._answered(request, self._openai, _openai_error)

    async def health(self) -> Response:
        """200 while texts are encoded."""
        if self._encoding.is_healthy:
            return Response()
        return _tei_error(503, "unhealthy", "the thread that encodes hangs, or the server is ending")

    async def info(self) -> Response:
        """What is served."""
        return _json_response(self._info())

    async def metrics(self) -> Response:
        """Prometheus metrics."""
        return Response(self._metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _answered(
        self,
        request: Request,
        answer: Callable[[bytes], Awaitable[Response]],
        refuse: Callable[[int, str, str], Response],
    ) -> Response:
        """An answer, or in one line why there is none; nothing is encoded for a client that has left."""
        started = time.perf_counter()
        try:
            body = await self._body(request)
            response = await while_there(request.receive, answer(body))
        except (GoneError, ClientDisconnect):
            self._metrics.failed("dropped")
            return Response(status_code=GONE)
        except ValidationError as error:
            self._metrics.failed("validation")
            return refuse(422, "validation", _what_is_wrong(error))
        except EncodingError as error:
            self._metrics.failed(error.kind)
            return refuse(error.status or 424, error.kind, str(error))
        self._metrics.answered(time.perf_counter() - started)
        return response

    async def _body(self, request: Request) -> bytes:
        parts, room = [], self._max_body_bytes
        async for part in request.stream():
            room -= len(part)
            if room < 0:
                raise TooLongError(
                    f"the body has more than {self._max_body_bytes} bytes (--max_body_bytes): send fewer "
                    "texts at once"
                )
            parts.append(part)
        return b"".join(parts)

    async def _embed(self, body: bytes) -> Response:
        given = EmbedRequest.model_validate_json(body)
        texts = self._texts("inputs", given.inputs)
        rows = await self._encoding.encoded(texts, given.prompt_name, truncate=given.truncate is not False)
        headers = self._headers | {
            "x-compute-characters": str(sum(map(len, texts))),
            "x-compute-tokens": str(int(rows.n_tokens.sum())),
        }
        return _json_response(self._cut(rows, given.dimensions), headers)

    async def _openai(self, body: bytes) -> Response:
        given = OpenAIRequest.model_validate_json(body)
        rows = await self._encoding.encoded(self._texts("input", given.input))
        vectors: Any = self._cut(rows, given.dimensions)
        if given.encoding_format == "base64":
            vectors = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
        data = [{"object": "embedding", "index": n, "embedding": one} for n, one in enumerate(vectors)]
        n_tokens = int(rows.n_tokens.sum())
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        answer = {"object": "list", "data": data, "model": self._model_id, "usage": usage}
        return _json_response(answer, self._headers)

    def _texts(self, field: str, given: str | Sequence[int] | Sequence[str | Sequence[int]]) -> list[str]:
        """The texts of a request, tokens as the text that they are of; their number is bounded."""
        is_single = isinstance(given, str) or (len(given) > 0 and isinstance(given[0], int))
        self._metrics.asked("single" if is_single else "batch")
        inputs: Sequence[Any] = [given] if is_single else given
        if not inputs:
            raise _EmptyError(f"`{field}` is empty: send at least one text")
        if len(inputs) > self._max_texts:
            raise TooLongError(
                f"`{field}` has {len(inputs)} texts, at most {self._max_texts} may be sent at once "
                "(--max_client_batch_size): send them in several requests"
            )
        text_of = self._encoding.computing.text_of
        return [one if isinstance(one, str) else text_of(one) for one in inputs]

    def _cut(self, rows: Rows, dimensions: int | None) -> np.ndarray:
        """The vectors, or their first numbers scaled to unit length: for Matryoshka models."""
        if dimensions is None or dimensions == self._encoding.dim:
            return rows.vectors
        if dimensions > self._encoding.dim:
            raise WrongRequestError(
                f"dimensions is {dimensions}, wanted 1 to {self._encoding.dim}, the width of the model"
            )
        first = rows.vectors[:, :dimensions]
        return first / np.maximum(np.linalg.norm(first, axis=1, keepdims=True), 1e-12).astype(np.float32)

    def _info(self) -> dict[str, Any]:
        encoding, known = self._encoding, dict(self._encoding.computing.described)
        return {
            "model_id": self._model_id,
            "model_sha": encoding.encoder_sha256,
            "model_dtype": "bfloat16" if known.get("precision") == "bfloat16" else "float32",
            "served_model_name": self._model_id,
            "model_type": {"embedding": {"pooling": known.pop("pooling", None) or "unknown"}},
            "max_concurrent_requests": encoding.max_queued,
            "max_input_length": encoding.computing.max_tokens,
            "max_batch_tokens": known.pop("max_batch_tokens", encoding.computing.round_tokens),
            "max_batch_requests": None,
            "max_client_batch_size": self._max_texts,
            "auto_truncate": True,
            "tokenization_workers": 1,
            "version": __version__,
            "sha": None,
            "docker_label": None,
            # this server's own
            "encoder_sha256": encoding.encoder_sha256,
            "dim": encoding.dim,
            **known,
        }


class _EmptyError(EncodingError):
    kind, default_status = "empty", 400


def _json_response(content: Any, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, status, headers=dict(headers or {}), media_type=JSON)


def _tei_error(status: int, kind: str, message: str) -> Response:
    return _json_response({"error": message, "error_type": kind}, status=status)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = f"{request.method} {request.url.path[:200]} is not answered here; see /docs"
    return _tei_error(error.status_code, "validation", said)


def _openai_error(status: int, kind: str, message: str) -> Response:
    status, type_ = OPENAI_ERRORS.get(status, (status, "invalid_request_error"))
    error = {"message": message, "type": type_, "param": None, "code": None}
    return _json_response({"error": error}, status=status)


def _what_is_wrong(error: ValidationError) -> str:
    """pydantic's first complaint in one line; of a union's several branches the field alone is told."""
    first, *_ = errors = error.errors(include_url=False, include_context=False, include_input=False)
    field = str(first["loc"][0]) if first["loc"] else ""
    if field in ("inputs", "input"):
        missing = first["type"] == "missing"
        return f"`{field}` is {'missing' if missing else 'of another kind'}: wanted a text or a list of texts"
    if field == "normalize":
        return "`normalize` is not true: this server gives vectors of unit length alone; leave it out"
    said = f"`{field}`: {first['msg']}" if field else f"the body is no JSON of this route: {first['msg']}"
    return said + (f" (and {len(errors) - 1} more)" if len(errors) > 1 else "")


def _body_of(model: type[BaseModel]) -> dict[str, Any]:
    """The body for the OpenAPI page; FastAPI itself would read it several times as slowly."""
    content = {JSON: {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
    return {"requestBody": {"required": True, "content": content}}


# --- Metrics -------------------------------------------------------------------------------------------


class _Metrics:
    """Text Embeddings Inference's metrics as far as they fit, and the cache's."""

    def __init__(self, encoding: LocalEncoding) -> None:
        disable_created_metrics()  # a line more for each series, which nobody asks for
        registry = self._registry = CollectorRegistry()
        self._encoding = encoding
        asked = Counter("te_request_count", "Requests.", ["method"], registry=registry)
        self._asked = {method: asked.labels(method) for method in ("single", "batch")}
        self._succeeded = Counter("te_request_success", "Requests answered.", registry=registry)
        self._failed = Counter("te_request_failure", "Requests not answered.", ["err"], registry=registry)

        def histogram(name: str, text: str, limits: Sequence[float]) -> Histogram:
            return Histogram(name, text, registry=registry, buckets=limits)

        self._seconds = histogram("te_request_duration", "Seconds of a request.", SECONDS)
        self._waited = histogram("te_request_queue_duration", "Seconds that it waited.", SECONDS)
        self._computed = histogram("te_request_inference_duration", "Seconds of computing.", SECONDS)
        self._sizes = histogram("te_batch_next_size", "Texts that were encoded together.", SIZES)
        self._tokens = histogram("te_batch_next_tokens", "Their tokens.", TOKENS)
        registry.register(_Now(encoding))
        encoding.on_round = self._round

    def asked(self, method: str) -> None:
        self._asked[method].inc()

    def failed(self, reason: str) -> None:
        self._failed.labels(reason).inc()

    def answered(self, seconds: float) -> None:
        self._succeeded.inc()
        self._seconds.observe(seconds)

    def page(self) -> bytes:
        """The exposition; TEI's counters do not end in _total, which prometheus_client appends."""
        return re.sub(rb"\b(te_\w+?)_total\b", rb"\1", generate_latest(self._registry))

    def _round(self, done: Round) -> None:
        self._sizes.observe(done.n_texts)
        self._tokens.observe(done.n_tokens)
        self._computed.observe(done.seconds)
        for seconds in done.waited:
            self._waited.observe(seconds)


class _Now:
    """What is read when somebody looks; the collector's form that prometheus_client asks for."""

    def __init__(self, encoding: LocalEncoding) -> None:
        self._encoding = encoding

    def describe(self) -> list[Metric]:
        return []  # else the registry would collect once just to learn the names

    def collect(self) -> Iterator[Metric]:
        cache = self._encoding.cache
        yield GaugeMetricFamily("te_queue_size", "Texts that wait.", self._encoding.n_queued)
        yield CounterMetricFamily(f"{OWN}cache_hits", "Texts whose vector was remembered.", cache.n_hits)
        yield CounterMetricFamily(f"{OWN}cache_misses", "Texts whose vector was not.", cache.n_misses)
        yield GaugeMetricFamily(f"{OWN}cache_entries", "Vectors that are remembered.", len(cache))
        yield GaugeMetricFamily(f"{OWN}cache_bytes", "Memory that they take.", cache.n_bytes)


# --- The command ---------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The flags of `python -m serving encoder`."""
    made = argparse.ArgumentParser(
        prog="python -m serving encoder",
        description="Texts in, vectors out: /embed as Text Embeddings Inference, /v1/embeddings as OpenAI.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    which = made.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="FOLDER", help="a Sentence Transformers folder, or package:NAME")
    which.add_argument(
        "--model_base_path",
        type=Path,
        help="the folder that holds the numbered versions: the newest one's encoder; default "
        "work/models/<model_name>",
    )
    made.add_argument("--model_name", default="index", help="default %(default)s")
    made.add_argument("--host", default="127.0.0.1", help="address to listen on; default %(default)s")
    made.add_argument("--port", type=_port, default=8080, help="default %(default)s")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="auto: what the newest version's documents were encoded at, where this machine is made for it",
    )
    made.add_argument(
        "--max_batch_tokens", type=_positive, help="of a batch, padding included; default: by the device"
    )
    made.add_argument(
        "--max_client_batch_size",
        type=_positive,
        default=MAX_CLIENT_BATCH_SIZE,
        help="texts of one request; default %(default)s",
    )
    made.add_argument(
        "--max_queued", type=_positive, default=MAX_QUEUED, help="texts that may wait; default %(default)s"
    )
    made.add_argument(
        "--cache_mib",
        type=_whole,
        default=CACHE_BYTES // 2**20,
        help="MiB of vectors that are remembered; 0: none; default %(default)s",
    )
    made.add_argument(
        "--max_body_bytes", type=_positive, default=MAX_BODY_BYTES, help="of a request; default %(default)s"
    )
    return made


def serve(flags: argparse.Namespace) -> None:
    """Load the model, open the port, answer until SIGTERM or SIGINT; what was taken is answered first.

    Raises:
        InputError: the model does not load.
        ArtifactError: no version, or its encoder was changed after it was published.
        ServingError: the port is taken.
    """
    # While it loads; later uvicorn drains at the signal, and then raises it once more, for these.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    listener = bind(flags.host, flags.port, "--port")  # before the load: a taken port is known at once
    folder = model_folder(flags)
    encoding = LocalEncoding.open(
        folder,
        device=flags.device,
        precision=flags.precision,
        batch_tokens=flags.max_batch_tokens,
        max_queued=flags.max_queued,
        cache_bytes=flags.cache_mib * 2**20,
    )
    app = make_app(
        encoding,
        model_id=folder.name,
        max_client_batch_size=flags.max_client_batch_size,
        max_body_bytes=flags.max_body_bytes,
    )
    known = encoding.computing.described
    log.info(
        "encoder %s (%s, %s) at http://%s:%d",
        folder.name,
        known["device"],
        known["precision"],
        *listener.getsockname()[:2],
    )
    _run(app, listener)


def model_folder(flags: argparse.Namespace) -> Path:
    """The folder of `--model`, or of the newest published version's encoder, its files checked.

    Raises:
        ArtifactError: there is no version, or its encoder is missing or was changed.
    """
    if flags.model:
        return Path(flags.model)
    from serving.published import PublishedVersion, newest_version

    base = flags.model_base_path or Path("work/models") / flags.model_name
    return PublishedVersion(base, newest_version(base)).checked_encoder()


def _run(app: FastAPI, listener: socket.socket) -> None:
    import uvicorn

    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    accepting.Server(config).run(sockets=[listener])


def _positive(text: str) -> int:
    return _number(text, 1, "a whole number of 1 or more")


def _whole(text: str) -> int:
    return _number(text, 0, "a whole number of 0 or more")


def _port(text: str) -> int:
    number = _number(text, 0, "a port of 0 to 65535")
    if number > 65535:
        raise argparse.ArgumentTypeError(f"is {text}, wanted a port of 0 to 65535")
    return number


def _number(text: str, low: int, wanted: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < low:
        raise argparse.ArgumentTypeError(f"is {text}, wanted {wanted}")
    return int(text)
