"""Connections that come at once: all have their turn, and none is lost where the system has nothing left."""

import errno
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import uvicorn

from serving import accepting

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def slow(scope, receive, send):
    """An answer that holds the event loop for a while, as a search there does."""
    time.sleep(0.002)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@contextmanager
def serving(listener: socket.socket) -> Iterator[None]:
    config = uvicorn.Config(slow, loop="uvloop", lifespan="off", log_config=None, access_log=False)
    server = accepting.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(10)
    assert not thread.is_alive()


def listening(kind: type[socket.socket] = socket.socket) -> socket.socket:
    listener = kind(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    listener.listen(200)
    return listener


def test_who_came_last_is_answered_as_often_as_who_came_first():
    n_clients, answered, end = 60, Counter(), threading.Event()
    listener = listening()
    clients = [socket.create_connection(listener.getsockname(), timeout=10) for _ in range(n_clients)]

    def ask(number: int) -> None:
        with suppress(OSError):
            while not end.is_set():
                clients[number].sendall(REQUEST)
                if not clients[number].recv(1000).endswith(b"ok"):
                    return
                answered[number] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(n_clients)]
    with serving(listener):
        for thread in threads:
            thread.start()
        while sum(answered.values()) < 5 * n_clients:
            time.sleep(0.01)
        seen = [answered[number] for number in range(n_clients)]
        end.set()
        for thread in threads:
            thread.join(10)
    for client in clients:
        client.close()
    # One connection a turn would have answered the first some thirty times before the last one once.
    assert min(seen) >= 2


class Exhausted(socket.socket):
    """A listener of a process that has no file left, for the first two tries."""

    tries = 0

    def accept(self):
        Exhausted.tries += 1
        if Exhausted.tries <= 2:
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def test_a_connection_waits_where_no_file_is_left(monkeypatch, caplog):
    monkeypatch.setattr(accepting, "PAUSE_SECONDS", 0.05)
    listener = listening(Exhausted)
    address = listener.getsockname()
    with serving(listener), socket.create_connection(address, timeout=10) as client:
        client.sendall(REQUEST)
        assert client.recv(1000).endswith(b"ok")
    assert "no connection can be taken: Too many open files; trying again in 0.05 s" in caplog.text


def test_a_socket_that_is_only_bound_is_listened_on():
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    with serving(listener):
        client = connected(listener.getsockname())
        client.sendall(REQUEST)
        assert client.recv(1000).endswith(b"ok")
        client.close()


def connected(address: tuple[str, int]) -> socket.socket:
    end = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(address, timeout=10)
        except ConnectionRefusedError:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_after_the_end_nobody_is_let_in():
    listener = listening()
    address = listener.getsockname()
    with serving(listener), socket.create_connection(address, timeout=10) as client:
        client.sendall(REQUEST)
        assert client.recv(1000).endswith(b"ok")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=10)
