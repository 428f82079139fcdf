"""One HTTP/1 connection: shows a client what libevent 2.1.8 shows it, under the real server, and is bounded.

httptools (llhttp) parses, uvicorn listens, stops and knows the date. uvicorn's own protocol is not used: it
bounds neither a request's head nor the requests that are sent ahead, and its status lines, its answers to
HTTP/1.0 and HEAD and its error pages are others.

The real server waits 50 s between two pieces of a request and has no other limit. Here whole phases have a
deadline and what a request takes is bounded; beyond, it is refused in one line of JSON and the connection
closed. Requests that are sent ahead are answered in turn, where the real server ends itself.
"""

import asyncio
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httptools

from serving.protocol import JSON_TYPE, error_body

log = logging.getLogger("serving")

HTML_TYPE = "text/html"
ERROR_PAGE = (  # http.c, evhttp_send_error
    "<HTML><HEAD>\n<TITLE>{status} {reason}</TITLE>\n</HEAD><BODY>\n<H1>{reason}</H1>\n</BODY></HTML>\n"
)
REASONS = {  # http.c, response_classes; of a status that it does not know it says the class
    200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 409: "Conflict",
    413: "Request Entity Too Large", 414: "Request-URI Too Large", 417: "Expectation Failed",
    429: "Client Error", 431: "Client Error", 499: "Client Error", 500: "Internal Server Error",
    501: "Not Implemented", 503: "Service Unavailable", 504: "Gateway Time-out",
}  # fmt: skip
BODY_METHODS = ("POST", "PUT", "PATCH")  # http.c, evhttp_method_may_have_body
CHUNK_BYTES = 32  # of framing that each chunk of a body may have
LARGE = 2**16  # bytes of an answer that are not copied to stand behind its head


@dataclass(frozen=True)
class Limits:
    """What one connection, and all together, may take.

    Attributes:
        max_pipelined: requests sent ahead on one connection.
        max_held_bytes: of the bodies, as they were sent and unpacked, that all connections hold at once.
        idle_seconds: without a request; libevent's, as that of the head.
        head_seconds: from the first byte of a request to the end of its headers.
        transfer_seconds: for a body to come, and for an answer to be taken.
        linger_seconds: for what a refused client still sends, so that it comes to read why.
    """

    max_body_bytes: int = 32 * 2**20
    max_connections: int = 4096
    max_target_bytes: int = 8 * 2**10
    max_head_bytes: int = 64 * 2**10
    max_headers: int = 100
    max_pipelined: int = 100
    max_held_bytes: int = 256 * 2**20
    idle_seconds: float = 50.0
    head_seconds: float = 50.0
    transfer_seconds: float = 100.0
    linger_seconds: float = 2.0


class Response:
    """An answer; `headers` are whole lines, `closes` ends the connection after it."""

    __slots__ = ("body", "closes", "content_type", "headers", "status")

    def __init__(
        self, status: int, body: bytes, content_type: str = JSON_TYPE, headers: str = "", closes: bool = False
    ) -> None:
        self.status = status
        self.body = body
        self.content_type = content_type
        self.headers = headers
        self.closes = closes


class RefusalError(Exception):
    """A request that is refused before it is answered; `response` closes the connection."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status)
        self.response = response


class Request:
    """What a client asks.

    Attributes:
        target: as in the request line.
        headers: by lower-case name; the first of equal ones, as there.
        minor: of the HTTP version: 0 or 1.
    """

    __slots__ = (
        "_held_bytes", "_is_left", "_n_users", "_shared",
        "body", "headers", "keep_alive", "method", "minor", "target",
    )  # fmt: skip

    def __init__(self, shared: "Connections") -> None:
        self.method = ""
        self.target = b""
        self.headers: dict[bytes, bytes] = {}
        self.minor = 1
        self.keep_alive = True
        self.body = b""
        self._shared = shared
        self._held_bytes = self._n_users = 0
        self._is_left = False

    def hold(self, n_bytes: int) -> None:
        """Count bytes that the request takes until it is answered and no thread uses them.

        Raises:
            RefusalError: all requests together take too many.
        """
        shared, most = self._shared, self._shared.limits.max_held_bytes
        if shared.held_bytes + n_bytes > most:
            raise refusal(503, f"Requests of {most} bytes are held, which is the most; try again later")
        shared.held_bytes += n_bytes
        self._held_bytes += n_bytes

    def use(self) -> None:
        """A thread begins to use the body; it ends with `unuse`, even where the client has left before."""
        self._n_users += 1

    def unuse(self) -> None:
        self._n_users -= 1
        self._free()

    def release(self) -> None:
        """It is answered, or nobody waits for the answer."""
        self._is_left = True
        self._free()

    def _free(self) -> None:
        if self._is_left and not self._n_users:
            self._shared.held_bytes -= self._held_bytes
            self._held_bytes = 0


def page(status: int) -> Response:
    """libevent's own answer to what does not reach the REST API."""
    text = ERROR_PAGE.format(status=status, reason=REASONS[status])
    return Response(status, text.encode(), HTML_TYPE, closes=True)


def refusal(status: int, why: str) -> RefusalError:
    return RefusalError(Response(status, error_body(why), closes=True))


class Connections:
    """What the connections of a server share; `uvicorn.Config(http=connections.accept)`."""

    def __init__(self, handler: Callable[[Request], Awaitable[Response]], limits: Limits) -> None:
        self.handler = handler
        self.limits = limits
        self.held_bytes = 0
        self._is_sweeping = False
        shortest = min(
            limits.idle_seconds, limits.head_seconds, limits.transfer_seconds, limits.linger_seconds
        )
        self._interval = min(1.0, shortest / 4)

    def accept(
        self, config: Any, server_state: Any, app_state: Any, _loop: asyncio.AbstractEventLoop | None = None
    ) -> "Connection":
        """The protocol of one more connection; the parameters are uvicorn's."""
        loop = _loop or asyncio.get_running_loop()
        if not self._is_sweeping:
            self._is_sweeping = True
            self._sweep(loop, server_state.connections)
        return Connection(self, server_state, loop)

    def _sweep(self, loop: asyncio.AbstractEventLoop, connections: "set[Connection]") -> None:
        """End what is too slow. A look at all, once a second, is cheaper than a timer a request."""
        now = loop.time()
        for connection in [c for c in connections if c.deadline < now]:
            connection.expire()
        loop.call_later(self._interval, self._sweep, loop, connections)


class Connection(asyncio.Protocol):
    """Reads requests, has them answered one after the other, writes the answers in that order.

    Attributes:
        deadline: the loop's time at which what is awaited from the client is too late.
    """

    def __init__(self, shared: Connections, server_state: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.deadline = math.inf
        self._shared, self._limits = shared, shared.limits
        self._server, self._loop = server_state, loop
        self._transport: Any = None
        self._parser: Any = httptools.HttpRequestParser(self)
        self._queue: deque[Request | Response] = deque()
        self._answering: Request | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_paused = False  # nothing is read: a request waits for others to be answered
        self._is_blocked = False  # nothing is answered: the client does not take what was written
        self._is_ended = False  # what comes is dropped
        self._is_stopping = False  # the last answer closes the connection
        self._begin(None)

    def _begin(self, request: Request | None) -> None:
        self._request = request
        self._is_body = False
        self._parts: list[bytes] = []
        self._n_headers = self._n_chunks = 0
        self._head_bytes = self._header_bytes = self._wire_bytes = self._body_bytes = 0

    # Called by asyncio and uvicorn

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._wait(self._limits.idle_seconds)
        self._server.connections.add(self)
        n_open, n_most = len(self._server.connections), self._limits.max_connections
        if n_open > n_most + n_most // 10 + 1:
            self._transport.abort()  # too many even to be told so
        elif n_open > n_most:
            self._refuse(refusal(503, f"{n_most} connections are open, which is the most; try again later"))

    def data_received(self, data: bytes) -> None:
        if self._is_ended:
            return
        if self._is_body:
            self._wire_bytes += len(data)
        else:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
            self._check_framing()
        except httptools.HttpParserUpgrade:
            # As there, a wish to upgrade is not heard. What follows may be meant for another protocol.
            self._is_stopping = self._is_ended = True
        except httptools.HttpParserError as error:
            self._refuse(self._refusal_of(error))
        except RefusalError as error:
            self._refuse(error)
        if self._queue and not self._is_paused and not self._transport.is_closing():
            self._is_paused = True
            self._transport.pause_reading()

    def eof_received(self) -> None:
        """Who sends no more is taken for gone; asyncio closes the connection."""

    def connection_lost(self, error: Exception | None) -> None:
        self._server.connections.discard(self)
        self.deadline = math.inf
        self._is_ended = True
        if self._task is not None:
            self._task.cancel()
        for request in (self._request, self._answering):
            if request is not None:
                request.release()
        self._drop_queue()
        self._parser = None  # it refers to this object

    def pause_writing(self) -> None:
        self._is_blocked = True
        self._wait(self._limits.transfer_seconds)

    def resume_writing(self) -> None:
        self._is_blocked = False
        self._wait_for_client()
        self._advance()

    def shutdown(self) -> None:
        """The server stops: what was asked is answered, what is idle is closed."""
        self._is_stopping = True
        if self._task is None and self._request is None and not self._queue:
            self._transport.close()

    def expire(self) -> None:
        """The client is too slow: libevent says nothing and closes."""
        if self._is_blocked or self._transport.is_closing():
            self._transport.abort()
        else:
            self._transport.close()
        self._wait(self._limits.linger_seconds)

    # Called by httptools

    def on_message_begin(self) -> None:
        if len(self._queue) >= self._limits.max_pipelined:
            raise refusal(
                503,
                f"{self._limits.max_pipelined} requests were sent ahead, which is the most; wait for answers",
            )
        self._begin(Request(self._shared))
        if self._task is None:
            self._wait(self._limits.head_seconds)

    def on_url(self, url: bytes) -> None:
        request = self._reading()
        request.target += url
        most = self._limits.max_target_bytes
        if len(request.target) > most:
            raise refusal(414, f"The path is longer than {most} bytes, which is the most")

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer after the body: those only count."""
        self._n_headers += 1
        if self._n_headers > self._limits.max_headers:
            raise refusal(431, f"There are more than {self._limits.max_headers} headers, which is the most")
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > self._limits.max_head_bytes:
            raise self._head_too_large()
        if not self._is_body:
            self._reading().headers.setdefault(name.lower(), value)

    def on_headers_complete(self) -> None:
        request, parser = self._reading(), self._parser
        version = parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise RefusalError(page(400))
        request.minor = int(version[2])
        request.method = parser.get_method().decode()
        request.keep_alive = parser.should_keep_alive()
        self._is_body = True
        if self._task is None:
            self._wait(self._limits.transfer_seconds)
        if request.method in BODY_METHODS:
            self._check_body(request)

    def on_chunk_header(self) -> None:
        self._n_chunks += 1

    def on_body(self, part: bytes) -> None:
        self._body_bytes += len(part)
        if self._body_bytes > self._limits.max_body_bytes:
            raise self._body_too_large()
        request = self._reading()
        if request.method in BODY_METHODS:  # the body of another would be the next request there
            request.hold(len(part))
            self._parts.append(part)

    def on_message_complete(self) -> None:
        request = self._reading()
        request.body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._begin(None)
        self._queue.append(request)
        self._advance()

    # Bounds

    def _reading(self) -> Request:
        assert self._request is not None
        return self._request

    def _check_body(self, request: Request) -> None:
        """What libevent's evhttp_get_body asks before it reads a body, and the body's size."""
        headers, is_chunked = request.headers, b"transfer-encoding" in request.headers
        n_bytes = int(headers.get(b"content-length", b"0"))  # llhttp lets no other text through
        if not is_chunked and b"content-length" not in headers:
            if headers.get(b"connection", b"close").lower() != b"close":
                raise RefusalError(page(400))  # it is not known where the body ends
            return
        if n_bytes > self._limits.max_body_bytes:
            raise self._body_too_large()
        expect = headers.get(b"expect")
        if expect is None or not request.minor or not (is_chunked or n_bytes):
            return
        if expect.lower() != b"100-continue":
            raise RefusalError(page(417))
        if self._task is None and not self._queue:  # else it would stand before another's answer
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _check_framing(self) -> None:
        """Bound what httptools keeps to itself: a header that does not end, and what frames chunks."""
        if not self._is_body:
            if self._request is not None and self._head_bytes > self._limits.max_head_bytes:
                raise self._head_too_large()
        elif self._wire_bytes - self._body_bytes > self._limits.max_head_bytes + CHUNK_BYTES * self._n_chunks:
            raise RefusalError(page(413))  # as libevent's to chunks that are none

    def _head_too_large(self) -> RefusalError:
        most = self._limits.max_head_bytes
        return refusal(431, f"The headers are larger than {most} bytes, which is the most")

    def _body_too_large(self) -> RefusalError:
        most = self._limits.max_body_bytes
        return refusal(413, f"The body is larger than {most} bytes, which is the most")

    def _refusal_of(self, error: httptools.HttpParserError) -> RefusalError:
        """What a request that is none is answered: libevent's pages."""
        if isinstance(error, httptools.HttpParserCallbackError):
            if isinstance(error.__context__, RefusalError):
                return error.__context__
            log.error("reading a request failed", exc_info=error.__context__ or error)
            return refusal(500, f"Internal error: {type(error.__context__).__name__}")
        if isinstance(error, httptools.HttpParserInvalidMethodError):
            return RefusalError(page(501))  # there: a status 0, which is no HTTP
        return RefusalError(page(413 if self._is_body else 400))

    # Answers

    def _refuse(self, error: RefusalError) -> None:
        """The last answer on this connection, after those to what was asked before."""
        self._is_ended = True
        self._queue.append(error.response)
        self._advance()

    def _advance(self) -> None:
        """Answer what comes next, where nothing stands in its way."""
        if self._task is not None or self._is_blocked or self._transport.is_closing():
            return
        if not self._queue:
            return self._resume_reading()
        first = self._queue.popleft()
        if isinstance(first, Response):
            self._write(Request(self._shared), first)
        else:
            self.deadline = math.inf
            self._answering = first
            self._task = self._loop.create_task(self._answer(first))

    async def _answer(self, request: Request) -> None:
        try:
            response = await self._shared.handler(request)
        except RefusalError as error:
            response = error.response
        except Exception as error:  # a fault of ours: the traceback is for the log, a line for the client
            log.exception("answering %s %r failed", request.method, request.target)
            response = Response(500, error_body(f"Internal error: {type(error).__name__}"))
        self._task = self._answering = None
        request.release()
        if not self._transport.is_closing():
            self._write(request, response)
            self._advance()

    def _write(self, request: Request, response: Response) -> None:
        closes = response.closes or not request.keep_alive or (self._is_stopping and not self._queue)
        head = _head(request, response, self._server.default_headers, closes)
        self._wait_for_client()
        if len(response.body) < LARGE:
            self._transport.write(head + response.body)
        else:
            self._transport.write(head)
            self._transport.write(response.body)
        if closes:
            self._close()

    def _close(self) -> None:
        if self._is_ended and not self._is_stopping:
            # Closing at once would reset the connection, as more came than was read, and lose the answer.
            self._drop_queue()
            self._transport.write_eof()
            self._resume_reading()
            self._wait(self._limits.transfer_seconds if self._is_blocked else self._limits.linger_seconds)
        else:
            self._is_ended = True
            self._wait(self._limits.transfer_seconds)
            self._transport.close()

    def _drop_queue(self) -> None:
        for waiting in self._queue:
            if isinstance(waiting, Request):
                waiting.release()
        self._queue.clear()

    def _resume_reading(self) -> None:
        if self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()

    def _wait_for_client(self) -> None:
        """For its next request, or the rest of the one that has begun."""
        if self._task is None:
            is_idle = self._request is None
            self._wait(self._limits.idle_seconds if is_idle else self._limits.transfer_seconds)

    def _wait(self, seconds: float) -> None:
        self.deadline = self._loop.time() + seconds


def _head(request: Request, response: Response, dated: list[tuple[bytes, bytes]], closes: bool) -> bytes:
    """Status line and headers, by http.c, evhttp_make_header_response.

    HTTP/1.0 is told no date, and no length where the connection ends with the answer; nor is HEAD a length,
    though the body follows it.
    """
    minor, status = request.minor, response.status
    head = f"HTTP/1.{minor} {status} {REASONS[status]}\r\nContent-Type: {response.content_type}\r\n"
    if response.headers:
        head += response.headers
    if minor and dated:
        head += f"Date: {dated[0][1].decode()}\r\n"
    if (minor or request.keep_alive) and request.method != "HEAD":
        head += f"Content-Length: {len(response.body)}\r\n"
    if response.closes or (closes and minor):
        head += "Connection: close\r\n"
    elif not minor and not closes:
        head += "Connection: keep-alive\r\n"
    return (head + "\r\n").encode("latin-1")
