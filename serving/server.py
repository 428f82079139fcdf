"""A local server that answers as TensorFlow Serving does: REST here, gRPC in rpc.py, flags in flags.py.

    GET  /v1/models/M[/versions/N]            which versions there are, and their states
    GET  /v1/models/M[/versions/N]/metadata   the signatures; 200 exactly while a version is served
    POST /v1/models/M[/versions/N]:predict    {"inputs": [...]} -> {"outputs": {...}}

Ports open when every model has been loaded.
"""

import asyncio
import gc
import logging
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import uvicorn

from serving import accepting, protocol
from serving.batching import Batching
from serving.coalescing import Searches
from serving.errors import ServingError
from serving.flags import Flags
from serving.handles import Servable
from serving.http_limits import HTML_TYPE, Connections, Limits, Request, Response, page, refusal
from serving.listening import bind, not_listening
from serving.monitoring import Monitoring
from serving.protocol import RequestError, Route
from serving.rpc import RpcServer, make_rpc_server
from serving.shadow import Shadow
from serving.verification import verify_manifest
from serving.versions import Models
from serving.warmup import warm_up

log = logging.getLogger("serving")

T = TypeVar("T")

METHODS = {"GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"}  # evhttp_server.cc allows no others
UNNAMED_TYPE = f"{HTML_TYPE}; charset=ISO-8859-1"  # libevent's, where an answer names none
CORS = (  # http_rest_api_util.cc, AddCORSHeaders
    "Access-Control-Allow-Origin: *\r\nAccess-Control-Allow-Methods: POST, GET\r\n"
    "Access-Control-Allow-Headers: Content-Type\r\n"
)
SMALL_BODY = 2**16  # bytes that are read between two other requests: a vector of 384 numbers is 5,000
SMALL_ANSWER = 10_000  # values that are printed between two other requests
LARGE_THREADS = 2  # that read and print what is larger
DRAIN_SECONDS = 20  # for requests that are being answered at a SIGTERM; Kubernetes kills after 30
BACKLOG = 2048  # connections that wait to be accepted
SPARE_FILES = 256  # beside a connection's: TensorFlow's, the versions', Python's


class StartError(ServingError):
    """No model, or not every model, can be served; tensorflow_model_server ends with the same code."""

    exit_code = 255


class IndexApp:
    """Answers the requests of the REST port."""

    def __init__(self, models: Models, searches: Searches, monitoring: Monitoring, flags: Flags) -> None:
        self.limits = Limits(
            max_body_bytes=flags.max_body_bytes,
            max_connections=flags.max_connections,
            max_held_bytes=max(Limits.max_held_bytes, 4 * flags.max_body_bytes),
        )
        self._models, self._searches, self._monitoring = models, searches, monitoring
        self._timeout = flags.rest_api_timeout_in_ms / 1000 if flags.rest_api_timeout_in_ms > 0 else None
        self._metrics_path = flags.monitoring
        self._headers = CORS if flags.rest_api_enable_cors_support else ""
        self._turns = asyncio.Semaphore(LARGE_THREADS)

    async def respond(self, request: Request) -> Response:
        """Answer a request as evhttp_server.cc hands it on: the metrics' very path, then the API's."""
        if request.method not in METHODS:
            return page(501)
        path = protocol.path_of(request.target)
        if path is None:
            return page(400)
        if self._metrics_path is not None and re.split("[?#]", path, maxsplit=1)[0] == self._metrics_path:
            return self._metrics(path)
        if not protocol.is_api(path):
            return page(404)
        response = await self._counted(request, path)
        response.headers = self._headers
        return response

    def _metrics(self, path: str) -> Response:
        if path != self._metrics_path:
            said = f"Unexpected path: {path}. Should be {self._metrics_path}"
            return Response(400, said.encode(), "text/plain")
        return Response(200, self._monitoring.exposition(), "text/plain")

    async def _counted(self, request: Request, path: str) -> Response:
        """An answer of the API, which is in the metrics; RequestProcessor in http_server.cc."""
        started = time.perf_counter()
        model_name = api = ""
        try:
            if request.method == "OPTIONS":
                return self._preflight(request, started)
            route = protocol.route(request.method, path)
            model_name, api = route.model_name, route.action if request.method == "POST" else ""
            response, code = Response(200, await self._body(route, request)), "OK"
        except RequestError as error:
            response, code = Response(error.http_status, error.body()), error.code
            model_name = model_name or error.model_name
        except RecursionError:
            # The real server reads by recursion too; its stack is larger, and has an end as well.
            said = "JSON Parse error: Nested too deeply."
            response, code = Response(400, protocol.error_body(said)), "INVALID_ARGUMENT"
        except Exception:
            self._count(model_name, "INTERNAL", api, started)
            raise
        self._count(model_name, code, api, started)
        return response

    def _count(self, model_name: str, code: str, api: str, started: float) -> None:
        self._monitoring.request(model_name, code, api, "REST", time.perf_counter() - started)

    def _preflight(self, request: Request, started: float) -> Response:
        is_known = re.search(rb"https?://", request.headers.get(b"origin", b"")) is not None
        self._count("", "OK" if is_known else "FAILED_PRECONDITION", "", started)
        return Response(200 if is_known else 400, b"", UNNAMED_TYPE)

    async def _body(self, route: Route, request: Request) -> bytes:
        if route.action == "status":
            return protocol.status_body(self._models.status(route))
        if route.action == "metadata":
            with self._models.use(route) as loaded:
                return protocol.metadata_body(route.model_name, loaded.version, loaded.servable.signatures)
        return await self._answer(route, request)

    async def _answer(self, route: Route, request: Request) -> bytes:
        """The body of a predict, classify or regress request; checks come in the real server's order.

        What is large is read and printed in threads, so that the others' requests come in between the steps.
        Not within one: orjson and json keep Python's lock, and 8 MB stop the event loop for 0.1 to 0.3 s.
        """
        body = request.body
        is_packed = b"gzip" in request.headers.get(b"content-encoding", b"")
        turn = await self._turn(request, is_packed or len(body) > SMALL_BODY)
        try:
            if is_packed:
                body = await turn.run(unpack, body, self.limits.max_body_bytes)
                request.hold(len(body))
            document = await turn.run(protocol.read_json, body)
            name = protocol.signature_name(document)
            if route.action != "predict":
                await turn.run(protocol.check_examples, document)
            with self._models.use(route) as loaded:
                signatures = loaded.servable.signatures
                if route.action != "predict":
                    protocol.refuse_examples(route.action, document, signatures)
                signature = protocol.find_signature(signatures, document)
                inputs = await turn.run(protocol.read_inputs, document, signature.inputs)
                document = dict.fromkeys(document)  # lists of numbers take eight times what the tensors take
                turn.end()
                deadline = None if self._timeout is None else time.monotonic() + self._timeout
                outputs = await self._searches.ask(loaded, name, inputs, deadline=deadline)
        finally:
            turn.end()
        turn = await self._turn(request, sum(len(one.values) for one in outputs.values()) > SMALL_ANSWER)
        try:
            return await turn.run(protocol.predict_body, outputs, document)
        finally:
            turn.end()

    async def _turn(self, request: Request, is_large: bool) -> "Here | Turn":
        """Where a request is read or printed. Few turns at once are few documents in memory at once."""
        if not is_large:
            return HERE
        await self._turns.acquire()  # whose client leaves waits no longer, and its body is dropped
        return Turn(self._turns, request)


class Here:
    """A turn that small requests have: on the event loop."""

    async def run(self, call: Callable[..., T], *arguments: Any) -> T:
        return call(*arguments)

    def end(self) -> None: ...


HERE = Here()


class Turn:
    """A large request's turn to have threads of its own, one after the other.

    It lasts until its last thread has ended, even where the client has left: that long the request's bytes
    are held. The end of Python waits for none of these threads.
    """

    def __init__(self, turns: asyncio.Semaphore, request: Request) -> None:
        self._turns, self._request = turns, request
        self._loop = asyncio.get_running_loop()
        self._job: Future[Any] | None = None
        self._is_ended = False
        request.use()

    async def run(self, call: Callable[..., T], *arguments: Any) -> T:
        job: Future[T] = Future()
        job.set_running_or_notify_cancel()  # from here on it ends with its thread, and never before
        self._job = job
        threading.Thread(target=_do, args=(job, call, *arguments), name="large", daemon=True).start()
        return await asyncio.wrap_future(job)

    def end(self) -> None:
        if self._is_ended:
            return
        self._is_ended = True
        if self._job is None or self._job.done():
            self._free()
        else:
            self._job.add_done_callback(self._free_on_loop)

    def _free_on_loop(self, _: Future[Any]) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has stopped
            self._loop.call_soon_threadsafe(self._free)

    def _free(self) -> None:
        self._job = None
        self._turns.release()
        self._request.unuse()


def _do(job: Future[T], call: Callable[..., T], *arguments: Any) -> None:
    try:
        job.set_result(call(*arguments))
    except BaseException as error:
        job.set_exception(error)


def unpack(body: bytes, max_bytes: int) -> bytes:
    """Gzip undone; what claims to be gzip and is not wholly so becomes an empty document, as there.

    Raises:
        RefusalError: it is larger than `max_bytes`; from 100 MB on the real server takes it for empty.
    """
    gzip = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        plain = gzip.decompress(body, max_bytes + 1)
    except zlib.error:
        return b""
    if len(plain) > max_bytes:
        raise refusal(413, f"The unpacked body is larger than {max_bytes} bytes, which is the most")
    return plain if gzip.eof and not gzip.unused_data else b""


class Server(accepting.Server):
    """A server, which stops another one with itself, and at once at a second signal."""

    def __init__(self, config: uvicorn.Config, stop_others: Callable[[], None]) -> None:
        super().__init__(config)
        self._stop_others = stop_others

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            _die(sig)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        others = asyncio.get_running_loop().run_in_executor(None, self._stop_others)
        await super().shutdown(sockets)
        await others


def make_server(app: IndexApp, stop_others: Callable[[], None] = lambda: None) -> Server:
    """The REST server; it is run on a socket that is bound already.

    Args:
        stop_others: called when it is told to stop, beside its own stopping.
    """
    connections = Connections(app.respond, app.limits)
    config = uvicorn.Config(
        app.respond,  # not called by uvicorn, as `connections` are in between
        http=connections.accept,  # type: ignore[arg-type]
        interface="asgi3",
        loop="uvloop",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    return Server(config, stop_others)


def serve(flags: Flags) -> None:
    """Load every model, open the ports, answer until SIGTERM or SIGINT.

    Raises:
        ServingError: a port is taken; StartError: a model's first version cannot be served.
    """
    _on_signals(_leave)
    monitoring = Monitoring()
    models = make_models(flags, monitoring)
    searches = make_searches(flags, monitoring)
    # Before the load: a taken port is known at once.
    listener = bind(flags.host, flags.rest_api_port, "--rest_api_port") if flags.rest_api_port else None
    rpc = make_rpc(flags, models, searches, monitoring) if flags.port else None
    stop = threading.Event()
    stop_rpc = cache(lambda: rpc.stop(DRAIN_SECONDS) if rpc is not None else None)  # once
    try:
        wait_for_models(models, flags.file_system_poll_wait_seconds)
        _on_signals(_exit)
        seconds = flags.file_system_poll_wait_seconds
        threading.Thread(target=watch, args=(models, seconds, stop), daemon=True).start()
        if rpc is not None:
            rpc.start()
            log.info("serving gRPC at %s:%d", flags.host, rpc.port)
        answer(IndexApp(models, searches, monitoring, flags), listener, stop_rpc)
    finally:
        stop.set()
        stop_rpc()
        searches.close()
        models.close()
        log.info("stopped")
        gc.freeze()  # else Python's end would look through all that TensorFlow has made: seconds


def make_models(flags: Flags, monitoring: Monitoring) -> Models:
    """The models of the flags; nothing is loaded yet."""
    from serving.searcher import Searcher

    def warm(servable: Servable, folder: Path) -> None:
        warm_up(servable, folder, num_request_iterations=flags.num_request_iterations_for_warmup)

    models = Models(
        flags.models,
        monitoring.timing_loads(Searcher.open),
        max_num_load_retries=flags.max_num_load_retries,
        load_retry_interval_seconds=flags.load_retry_interval_micros / 1e6,
        warm_up=warm if flags.enable_model_warmup else None,
        verify=verify_manifest if flags.verify_manifest else None,
        on_load=monitoring.loaded,
    )
    monitoring.watch_versions(models.states)
    return models


def make_searches(flags: Flags, monitoring: Monitoring) -> Searches:
    return Searches(
        monitoring,
        max_queued=flags.max_queued,
        max_batch=flags.max_batch,
        coalesce=flags.coalesce,
        shadow=Shadow(monitoring, flags.shadow_exact_rate),
        enable_batching=flags.enable_batching,
        batching=flags.batching or Batching(),
    )


def make_rpc(flags: Flags, models: Models, searches: Searches, monitoring: Monitoring) -> RpcServer:
    return make_rpc_server(
        models,
        searches,
        monitoring,
        flags.host,
        flags.port,
        max_threads=flags.grpc_max_threads,
        max_message_bytes=flags.max_body_bytes,
    )


def wait_for_models(models: Models, poll_seconds: float) -> None:
    """Look until every model is served.

    Args:
        poll_seconds: between two looks; 0: only one; less: none.

    Raises:
        StartError: a model cannot be served.
        ServingError: there is nothing to load and nobody would look again; the real server waits for ever.
    """
    if poll_seconds >= 0:
        models.poll()
    looked_at = time.monotonic()
    while not models.ready():
        if models.failure() is not None:
            raise StartError(
                f"Failed to start server. Error: {models.failure_text()}; remove or replace the version"
            )
        if poll_seconds <= 0 and not models.states():
            raise ServingError(
                f"--file_system_poll_wait_seconds={poll_seconds:g} looks "
                f"{'never' if poll_seconds else 'only once'}, and no version is there: publish one first"
            )
        if 0 < poll_seconds <= time.monotonic() - looked_at:
            models.poll()
            looked_at = time.monotonic()
        else:
            time.sleep(min(0.05, poll_seconds) if poll_seconds > 0 else 0.05)


def watch(models: Models, poll_seconds: float, stop: threading.Event) -> None:
    """Look every `poll_seconds`; 0 or less: never again."""
    while poll_seconds > 0 and not stop.wait(poll_seconds):
        try:
            models.poll()
        except Exception:  # a fault here must not end the looking
            log.exception("looking for new versions failed")


def answer(app: IndexApp, listener: socket.socket | None, stop_others: Callable[[], None]) -> None:
    """Answer REST on a bound socket, or only wait, until a signal.

    Args:
        stop_others: called at the signal, beside the draining of REST.

    Raises:
        ServingError: another process began to listen on the port meanwhile.
    """
    if listener is None:
        threading.Event().wait()  # `_exit` ends it
        return
    allow_connections(app.limits.max_connections)
    server = make_server(app, stop_others)
    host, port = listener.getsockname()[:2]
    try:
        listener.listen(BACKLOG)  # uvloop would say nothing where it fails
    except OSError as error:
        raise not_listening(host, port, "--rest_api_port", error.strerror) from None
    log.info("serving REST at http://%s:%d/v1/models", host, port)
    server.run(sockets=[listener])


def allow_connections(n: int) -> None:
    """Have the system allow as many open files, as far as this user may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n + SPARE_FILES
    if hard != resource.RLIM_INFINITY and wanted > hard:
        log.warning("--max_connections=%d: the system allows %d open files (ulimit -Hn)", n, hard)
        wanted = hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _leave(number: int, _: FrameType | None) -> None:
    """Nothing is served yet. Python's own end could meet TensorFlow amid a load, which then aborts."""
    log.info("stopped")
    logging.shutdown()
    os._exit(_exit_code(number))


def _exit(number: int, _: FrameType | None) -> None:
    """uvicorn has drained by now; the next signal ends what is left."""
    _on_signals(signal.SIG_DFL)
    sys.exit(_exit_code(number))


def _exit_code(number: int) -> int:
    return 0 if number == signal.SIGTERM else 130


def _die(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
