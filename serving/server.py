"""A local server with TensorFlow Serving's REST API: same paths, bodies, errors, versions and flags.

    GET  /v1/models/M[/versions/N]            which versions there are, and their states
    GET  /v1/models/M[/versions/N]/metadata   the signatures; 200 exactly while a version is served
    POST /v1/models/M[/versions/N]:predict    {"inputs": [...]} -> {"outputs": {...}}

The port opens when the first version has been loaded.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
import zlib
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute
from starlette.types import Receive, Scope, Send

from serving import protocol
from serving.errors import ServingError
from serving.protocol import RequestError, Route
from serving.versions import Versions

log = logging.getLogger("serving")

MAX_BODY_BYTES = 64 * 2**20  # the real server has no limit; 2,000 queries of 384 numbers are 16 MB
KEEP_ALIVE = 50  # seconds; libevent's default
METHODS = {"GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"}  # libevent knows no others
HTML_ERROR = (  # libevent 2.1.8, http.c, evhttp_send_page_
    "<HTML><HEAD>\n<TITLE>{code} {reason}</TITLE>\n</HEAD><BODY>\n<H1>{reason}</H1>\n</BODY></HTML>\n"
)


class IndexApp:
    """The ASGI endpoint behind every path: Starlette's own routing forgives what the real server refuses."""

    def __init__(self, versions: Versions, threads: Executor) -> None:
        self.versions = versions
        self.threads = threads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            response = await self.respond(request)
        except ClientDisconnect:
            return
        await response(scope, receive, send)

    async def respond(self, request: Request) -> Response:
        path = raw_path(request.scope)
        if request.method not in METHODS:
            return _html(501, "Not Implemented")
        if not protocol.is_api(path):
            return _html(404, "Not Found")
        if request.method == "OPTIONS":
            return _preflight(request)
        try:
            body = await read_body(request)
            route = protocol.route(request.method, path)
            if route.action in ("status", "metadata"):
                return _json(200, describe(self.versions, route))
            loop = asyncio.get_running_loop()
            return _json(200, await loop.run_in_executor(self.threads, answer, self.versions, route, body))
        except RequestError as error:
            return _json(error.http_status, error.body())
        except BodyTooLargeError as error:
            return _json(413, protocol.error_body(str(error)))


class BodyTooLargeError(Exception):
    """A request that would take more memory than a request may."""


def describe(versions: Versions, route: Route) -> bytes:
    """The body of a status or metadata request."""
    if route.action == "status":
        return protocol.status_body(versions.status(route))
    version, servable = versions.find(route)
    return protocol.metadata_body(route.model_name, version, servable.signatures)


def answer(versions: Versions, route: Route, body: bytes) -> bytes:
    """The body of a predict request; checks come in the real server's order."""
    document = protocol.read_json(body)
    name = protocol.signature_name(document)
    _, servable = versions.find(route)
    if route.action != "predict":
        protocol.refuse_examples(route.action, document, servable.signatures)
    signature = protocol.find_signature(servable.signatures, document)
    inputs = protocol.read_inputs(document, signature.inputs)
    return protocol.predict_body(servable.run(name, inputs), document)


def raw_path(scope: Scope) -> str:
    """The path as it was sent, query string included: the real server matches all of it."""
    path = scope["raw_path"]
    if scope["query_string"]:
        path += b"?" + scope["query_string"]
    return path.decode("utf-8", "surrogateescape")


async def read_body(request: Request) -> bytes:
    """A request's body, gzip undone; what claims to be gzip and is not becomes an empty document.

    Raises:
        BodyTooLargeError: it is larger than MAX_BODY_BYTES, packed or unpacked.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise BodyTooLargeError(f"The body is larger than {MAX_BODY_BYTES} bytes")
        parts.append(part)
    body = b"".join(parts)
    if "gzip" in request.headers.get("content-encoding", "").lower():
        return _gunzip(body)
    return body


def _gunzip(body: bytes) -> bytes:
    unpack = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        plain = unpack.decompress(body, MAX_BODY_BYTES)
    except zlib.error:
        return b""
    if unpack.unconsumed_tail:
        raise BodyTooLargeError(f"The unpacked body is larger than {MAX_BODY_BYTES} bytes")
    return plain if unpack.eof else b""


def _json(status: int, body: bytes) -> Response:
    return Response(body, status, media_type=protocol.JSON_TYPE)


def _html(status: int, reason: str) -> Response:
    headers = {"content-type": "text/html", "connection": "close"}
    return Response(HTML_ERROR.format(code=status, reason=reason), status, headers)


def _preflight(request: Request) -> Response:
    origin = request.headers.get("origin", "")
    known = "http://" in origin or "https://" in origin
    headers = {"content-type": "text/html; charset=ISO-8859-1"}  # libevent's, where none is set
    return Response(b"", 200 if known else 400, headers)


async def _fault(_: Request, error: Exception) -> Response:
    """Ours, never the client's: the traceback goes to the log, the client gets one line."""
    return _json(500, protocol.error_body(f"Internal error: {type(error).__name__}"))


def make_app(versions: Versions, n_threads: int | None = None) -> Starlette:
    """The ASGI application.

    Args:
        n_threads: requests searched at once; default: one a core, at least four.
    """
    threads = ThreadPoolExecutor(n_threads or max(4, os.cpu_count() or 1), thread_name_prefix="predict")
    endpoint = StarletteRoute("/{path:path}", IndexApp(versions, threads))
    return Starlette(routes=[endpoint], exception_handlers={Exception: _fault})


def serve(
    model_name: str,
    model_base_path: Path,
    rest_api_port: int,
    host: str,
    file_system_poll_wait_seconds: float,
) -> None:
    """Load the newest version, open the port, answer until SIGTERM or SIGINT.

    Raises:
        ServingError: the port is taken, or the first version cannot be served.
    """
    from serving.searcher import Searcher

    signal.signal(signal.SIGTERM, _exit)
    signal.signal(signal.SIGINT, _exit)
    listener = _bind(host, rest_api_port)  # before the load: a taken port is known at once
    versions = Versions(model_name, model_base_path.absolute(), Searcher.open)
    wait_for_first(versions, file_system_poll_wait_seconds)
    stop = threading.Event()
    watcher = threading.Thread(
        target=watch, args=(versions, file_system_poll_wait_seconds, stop), daemon=True
    )
    watcher.start()
    address = f"http://{host}:{rest_api_port}/v1/models/{model_name}"
    log.info("serving version %s at %s", versions.serving_version, address)
    try:
        run(make_app(versions), listener)
    finally:
        stop.set()
        log.info("stopped")


def wait_for_first(versions: Versions, poll_seconds: float) -> None:
    """Look until a version is served.

    Raises:
        ServingError: the newest version cannot be served, or nobody would ever look again.
    """
    while True:
        versions.poll()
        if versions.serving_version is not None:
            return
        failed = versions.failure()
        if failed:
            raise ServingError(
                f"{versions.base_path}/{failed.version} cannot be served: {failed.error_message}; "
                "remove or replace that version"
            )
        if poll_seconds == 0:
            raise ServingError(
                f"{versions.base_path} holds no numbered folder, and --file_system_poll_wait_seconds=0 "
                "looks only once: publish a version first"
            )
        time.sleep(poll_seconds)


def watch(versions: Versions, poll_seconds: float, stop: threading.Event) -> None:
    """Look every `poll_seconds`; 0: never again."""
    while poll_seconds and not stop.wait(poll_seconds):
        try:
            versions.poll()
        except Exception:  # a fault here must not end the looking
            log.exception("looking for new versions failed")


def run(app: Starlette, listener: socket.socket) -> None:
    """Answer on a bound socket until a signal.

    Raises:
        ServingError: another process began to listen on the port meanwhile.
    """
    try:
        make_server(app).run(sockets=[listener])
    except OSError as error:
        raise ServingError(f"cannot listen on {listener.getsockname()}: {error.strerror}") from error


def make_server(app: Starlette) -> uvicorn.Server:
    """uvicorn, set to send the real server's headers and no others."""
    config = uvicorn.Config(
        app,
        http="httptools",
        loop="uvloop",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=30,
    )
    return uvicorn.Server(config)


def _bind(host: str, port: int) -> socket.socket:
    """Take the port without listening yet: until then connections are refused."""
    try:
        [(family, kind, proto, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ServingError(
            f"--rest_api_port {port}: cannot listen on {host}:{port}: {error.strerror}; choose another"
        ) from None
    return listener


def _exit(number: int, _: FrameType | None) -> None:
    """uvicorn has drained by now, or nothing was being served yet."""
    sys.exit(0 if number == signal.SIGTERM else 130)
