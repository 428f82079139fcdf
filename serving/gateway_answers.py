"""How the gateway answers: JSON, errors of one line, bounds on what is asked, and counts of all of it."""

import asyncio
import json
import logging
import time
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.errors import InputError, PipelineError
from serving.encoding import EncodingError
from serving.leaving import GONE, GoneError, while_there

log = logging.getLogger("serving")

BODY_SECONDS = 10.0  # that a body may take
NAME_LETTERS = 100  # of what was asked wrongly, in a message
ENCODER_STATUSES = (409, 429, 503)  # that mean the same here; others speak of a request that we made
CARRIED_OUT = ("/documents", "/opened")  # to their end, also where nobody waits for the answer
LATENCY_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """What Prometheus reads; one registry a gateway."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        self.requests = Counter(
            "gateway_requests", "Requests by route and status", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "gateway_request_seconds", "From the request's head to the answer's end", ["route"],
            buckets=LATENCY_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.failures = Counter(
            "gateway_failures",
            "Answers of 500 and more, by the part that failed",
            ["part"],
            registry=self.registry,
        )
        self.version = Gauge("gateway_version", "The version that answers; 0: none", registry=self.registry)
        self.documents = Gauge("gateway_rows", "Rows of that version", registry=self.registry)
        self.fresh = Gauge("gateway_fresh_documents", "Documents beside it", registry=self.registry)
        self.reloads = Gauge("gateway_reloads", "Versions swapped in since the start", registry=self.registry)
        self.lost = Gauge("gateway_feedback_lost", "Lines of feedback not written", registry=self.registry)
        self.busy = Gauge("gateway_requests_under_way", "Requests under way", registry=self.registry)

    def page(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


def add_errors(app: FastAPI) -> None:
    """Whatever goes wrong is answered as {"error": "one line"}."""
    app.add_exception_handler(PipelineError, _said)
    app.add_exception_handler(RequestValidationError, _wrong_body)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _fault)


def json_answer(answer: dict[str, Any], status: int = 200) -> Response:
    import orjson

    # A row's numbers may be NumPy's, and a text may hold half a character: neither fails an answer.
    try:
        content = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:
        content = json.dumps(answer, ensure_ascii=True, default=str).encode()
    return Response(
        content, status, media_type="application/json", headers={"X-Content-Type-Options": "nosniff"}
    )


def _error(message: str, status: int) -> Response:
    return json_answer({"error": " ".join(message.split())}, status)


async def _said(request: Request, error: Exception) -> Response:
    """An error that a person should read: its own status; 400 for what was asked wrongly."""
    status = getattr(error, "status", None) or (400 if isinstance(error, InputError) else 500)
    if isinstance(error, EncodingError) and status not in ENCODER_STATUSES:
        status = 502
    if status >= 500:
        request.scope["gateway_part"] = _part_of(error)
        if request.url.path != "/health":  # asked every second, and its asker reads the answer
            log.warning("%s: %s", request.url.path, error)
    return _error(str(error), status)


def _part_of(error: Exception) -> str:
    if isinstance(error, EncodingError):
        return "encoder"
    is_of_index = type(error).__module__.endswith("index_backends") or "index server" in str(error)
    return "index" if is_of_index else "gateway"


async def _wrong_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(each) for each in first["loc"][1:])[:NAME_LETTERS] or "the body"
    if first["type"] == "json_invalid":
        return _error('the body is no JSON object; wanted one such as {"query": "words"}', 400)
    if first["type"] == "extra_forbidden":
        return _error(f"{where} is not a field of this request; see /docs", 400)
    return _error(f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}; see /docs", 400)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _error(f"there is no {request.url.path[:200]} here; see /docs", 404)
    if error.status_code == 405:
        return _error(f"{request.method} is not answered at {request.url.path}; see /docs", 405)
    if error.status_code == 400:  # FastAPI's, where a body cannot be decoded
        return _error('the body is no JSON object; wanted one such as {"query": "words"}', 400)
    return _error(str(error.detail), error.status_code)


async def _fault(request: Request, error: Exception) -> Response:
    log.error("%s failed", request.url.path, exc_info=error)
    request.scope["gateway_part"] = "gateway"
    return _error("a fault in the gateway; its log says more", 500)


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What the OpenAPI document says of refusals."""
    means = {
        400: "asked wrongly: empty, too long, an unknown document or field",
        404: "not configured",
        409: "the encoder is another one than the version's",
        429: "too many requests are under way",
        502: "the index server or the encoder answered with something else than was asked for",
        503: "the index server, the encoder or the first version is not there",
        507: "no more room for fresh documents",
    }
    example = {"application/json": {"example": {"error": "one line that says what to do"}}}
    return {status: {"description": means[status], "content": example} for status in statuses}


class Bounds:
    """Refuses what is too large, no JSON, or too much at once; counts and times every answer."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        max_queued: int,
        max_body_bytes: int,
        hosts: frozenset[str] | None = None,
    ) -> None:
        self._app, self._metrics, self._hosts = app, metrics, hosts
        self._max_queued, self._max_body_bytes = max_queued, max_body_bytes
        self._n_busy = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def there() -> Message:
            message = await receive()
            if status:  # the answer has begun: its end looks like the client's leaving
                await asyncio.Event().wait()
            return message

        try:
            # Whoever sends a body slowly holds nobody's place, so that it may be full only after it.
            body = self._refusal(scope) or await self._body(receive)
            if isinstance(body, bytes) and self._is_full(scope):
                body = _full()
            if isinstance(body, Response):
                await body(scope, receive, sent)
            else:
                await self._answer(scope, _again(body, receive), there, sent)
        except GoneError:
            status = GONE
        finally:
            self._count(scope, status or 500, time.perf_counter() - began)

    async def _answer(self, scope: Scope, given: Receive, there: Receive, sent: Send) -> None:
        self._n_busy += 1
        try:
            answer = self._app(scope, given, sent)
            await (answer if scope["path"] in CARRIED_OUT else while_there(there, answer))
        finally:
            self._n_busy -= 1

    def _is_full(self, scope: Scope) -> bool:
        return self._n_busy >= self._max_queued and scope["path"] not in ("/health", "/metrics")

    def _refusal(self, scope: Scope) -> Response | None:
        headers = dict(scope["headers"])
        if self._is_full(scope):
            return _full()
        if self._hosts is not None and _host_of(headers.get(b"host", b"")) not in self._hosts:
            return _error(
                "this gateway listens for its own machine alone, and was asked by another name: give it as "
                "--allowed_host",
                403,
            )
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return None
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        # A page of another origin can send a form without asking, but no JSON.
        if kind != b"application/json":
            return _error("wanted JSON: send the header Content-Type: application/json", 415)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            return self._too_large()
        return None

    async def _body(self, receive: Receive) -> bytes | Response:
        """The body, or why it is not taken.

        Raises:
            GoneError: the client has left before its end.
        """
        try:
            body = await asyncio.wait_for(self._read(receive), BODY_SECONDS)
        except TimeoutError:
            refusal = _error(f"the request's body did not come within {BODY_SECONDS:g} s: send it again", 408)
            refusal.headers["Connection"] = "close"  # the rest of it would be taken for the next request
            return refusal
        if body is None:
            return self._too_large()
        if _has_half_a_letter(body):
            return _error("the body has half a character (a lone \\ud800 to \\udfff): leave it out", 400)
        return body

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; None where it is larger than allowed, whatever its head said."""
        size = 0
        parts: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise GoneError
            part = message.get("body", b"")
            size += len(part)
            if size > self._max_body_bytes:
                return None
            parts.append(part)
            if not message.get("more_body"):
                return b"".join(parts)

    def _too_large(self) -> Response:
        most = self._max_body_bytes
        return _error(f"the request is larger than {most} bytes (--max_body_bytes): send less at once", 413)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        metrics = self._metrics
        route = getattr(scope.get("route"), "path", "(other)")
        metrics.requests.labels(route, str(status)).inc()
        metrics.seconds.labels(route).observe(seconds)
        metrics.busy.set(self._n_busy)
        if status >= 500:
            metrics.failures.labels(scope.get("gateway_part", "gateway")).inc()


def _full() -> Response:
    return _error("too many requests are under way; ask again in a moment", 429)


def _host_of(header: bytes) -> str:
    """The name in a Host header, without its port; empty where it is none."""
    try:
        return urlsplit("//" + header.decode("latin-1")).hostname or ""
    except ValueError:
        return ""


def _has_half_a_letter(body: bytes) -> bool:
    """Whether a string of the JSON cannot be written as UTF-8; no tokenizer and no log could take it."""
    try:
        # Python's reader takes UTF-16, too, which is full of zero bytes, and halves of UTF-8.
        if b"\\ud" not in body.lower() and "\0" not in body.decode():
            return False
    except UnicodeDecodeError:
        pass
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    except (ValueError, RecursionError):  # said where the body is read
        return False
    return False


def _again(body: bytes, receive: Receive) -> Receive:
    """Hand out a body that was read already, then what comes after it."""
    is_given = False

    async def given() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return given
