"""An opened version, and who uses it: once retired nobody new gets it; its last user lets it be closed."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from serving.protocol import Route, Signature, Tensor


class LoadError(Exception):
    """A version that cannot be served; `code` is TensorFlow's name of the error."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Servable(Protocol):
    """An opened version."""

    @property
    def signatures(self) -> Mapping[str, Signature]: ...

    def run(self, signature_name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, eq=False)
class Loaded:
    """One opened version; hashable by identity."""

    model_name: str
    version: int
    servable: Servable


class Handle:
    """Counts who uses a version; once retired nobody new may."""

    __slots__ = ("_is_retired", "_lock", "_n_users", "drained", "loaded")

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self.drained = threading.Event()
        self._lock = threading.Lock()
        self._n_users = 0
        self._is_retired = False

    def enter(self) -> bool:
        """Whether it could still be taken."""
        with self._lock:
            if self._is_retired:
                return False
            self._n_users += 1
            return True

    def leave(self) -> None:
        with self._lock:
            self._n_users -= 1
            if self._is_retired and not self._n_users:
                self.drained.set()

    def retire(self) -> None:
        with self._lock:
            self._is_retired = True
            if not self._n_users:
                self.drained.set()


class Use:
    """One request's hold of a version."""

    __slots__ = ("_find", "_handle", "_route")

    def __init__(self, find: Callable[[Route], Handle], route: Route) -> None:
        self._find, self._route = find, route

    def __enter__(self) -> Loaded:
        while True:
            handle = self._find(self._route)
            if handle.enter():  # else it was retired since; what took its place is there already
                self._handle = handle
                return handle.loaded

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.leave()
