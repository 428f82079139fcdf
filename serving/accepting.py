"""uvicorn's server, taking every connection that waits at once.

libuv, on which uvloop stands, takes one connection in a turn of its loop (since 1.45). Under load a turn is
long, as every connection that sent something has its turn in it: of 512 clients that come at once the last
would wait for seconds, while the first are answered again and again.
"""

import asyncio
import errno
import logging
import socket
from typing import Any

import uvicorn

MAX_ACCEPTED = 256  # connections in a turn: those that are open have theirs in between
PAUSE_SECONDS = 1.0  # before the next try, where the system has nothing left for one more
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

log = logging.getLogger("serving")


class Server(uvicorn.Server):
    """A server of sockets that are bound already: `run(sockets=[...])`."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])
        self._accepting = [Accepting(self, listener) for listener in sockets or []]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for accepting in self._accepting:
            accepting.stop()
        await super().shutdown(sockets)


class Accepting:
    """One listening socket, whose connections become the server's."""

    def __init__(self, server: uvicorn.Server, listener: socket.socket) -> None:
        self._server, self._listener = server, listener
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[Any]] = set()
        self._is_stopped = False
        listener.setblocking(False)
        listener.listen(server.config.backlog)
        self._begin()

    def stop(self) -> None:
        self._is_stopped = True
        self._loop.remove_reader(self._listener)

    def _begin(self) -> None:
        if not self._is_stopped:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(MAX_ACCEPTED):
            try:
                connection, _address = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in EXHAUSTED:
                    self._pause(error)
                    return
                continue  # that client is gone again
            self._open(connection)

    def _pause(self, error: OSError) -> None:
        """The socket stays readable: without a pause the loop would do nothing but try."""
        log.error("no connection can be taken: %s; trying again in %g s", error.strerror, PAUSE_SECONDS)
        self._loop.remove_reader(self._listener)
        self._loop.call_later(PAUSE_SECONDS, self._begin)

    def _open(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        task = self._loop.create_task(self._opened(connection))
        self._opening.add(task)  # the loop itself keeps no reference
        task.add_done_callback(self._opening.discard)

    async def _opened(self, connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(self._protocol, connection)
        except OSError:  # that client is gone again
            connection.close()
        except BaseException:
            connection.close()
            raise

    def _protocol(self) -> asyncio.Protocol:
        server = self._server
        return server.config.http_protocol_class(  # type: ignore[call-arg]
            config=server.config, server_state=server.server_state, app_state=server.lifespan.state
        )
