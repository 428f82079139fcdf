"""A port of one's own: taken at the start, listened on when there is something to answer with."""

import socket

from serving.errors import ServingError


def bind(host: str, port: int, flag: str) -> socket.socket:
    """Take a port without listening: until then connections are refused.

    Args:
        flag: that gave the port.

    Raises:
        ServingError: it cannot be taken.
    """
    try:
        [(family, kind, proto, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise not_listening(host, port, flag, error.strerror) from None
    return listener


def not_listening(host: str, port: int, flag: str, why: object) -> ServingError:
    """What is said where a port cannot be taken, or not be listened on."""
    return ServingError(f"{flag} {port}: cannot listen on {host}:{port}: {why}; choose another")
