"""A client that leaves before its answer is there: what it asked for is cancelled, to make room."""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from starlette.types import Receive

GONE = 499  # nginx's: in no answer, as nobody is there to read it, but in the counts

Answer = TypeVar("Answer")


class GoneError(Exception):
    """The client has left before its answer was there."""


async def while_there(receive: Receive, answer: Awaitable[Answer]) -> Answer:
    """Wait for an answer, but no longer than the client: after a body, all that can come is its leaving.

    Args:
        receive: the request's own, its body read already.

    Raises:
        GoneError: it has left; what it asked for is cancelled.
    """
    asking = asyncio.current_task()
    assert asking is not None
    has_left = False

    def leave(received: asyncio.Future[Any]) -> None:
        nonlocal has_left
        if not received.cancelled() and received.result()["type"] == "http.disconnect":
            has_left = True
            asking.cancel()

    receiving = asyncio.ensure_future(receive())
    receiving.add_done_callback(leave)
    try:
        return await answer
    except asyncio.CancelledError:
        if has_left and asking.uncancel() == 0:
            raise GoneError from None
        raise
    finally:
        receiving.remove_done_callback(leave)
        receiving.cancel()
