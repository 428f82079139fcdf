"""The versions of one model: which folder is served, and what became of the others.

Follows tensorflow/serving's file system source with its default policy: the highest number is served;
a newer one is loaded beside the old one, which answers until the switch.
"""

import gc
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from serving.protocol import RequestError, Route, Signature, Tensor, VersionStatus

log = logging.getLogger("serving")


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


class Versions:
    """Looks for numbered folders and keeps the newest one loaded. `poll` belongs to one thread at a time."""

    def __init__(self, model_name: str, base_path: Path, open_version: Callable[[Path], Servable]) -> None:
        self.model_name = model_name
        self.base_path = base_path
        self._open = open_version
        self._lock = threading.Lock()
        self._rows: dict[int, VersionStatus] = {}
        self._serving: tuple[int, Servable] | None = None
        self._failed: dict[int, object] = {}  # version: its files when it failed
        self._was_empty = False

    def poll(self) -> None:
        """Look once: load a version that should be served and is not, drop what should not be."""
        folders = self._folders()
        self._failed = {v: files for v, files in self._failed.items() if v in folders}
        serving = self._serving[0] if self._serving else None
        if not folders:
            self._say_empty()
            self._switch(None)
            return
        self._was_empty = False
        newest = max(folders)
        if newest != serving and self._may_load(newest, folders[newest]):
            self._load(newest, folders[newest])

    def find(self, route: Route) -> tuple[int, Servable]:
        """The version number and the servable that a request means.

        Raises:
            RequestError: it is not served, in the real server's words.
        """
        if route.label:
            raise RequestError("INVALID_ARGUMENT", f"Unrecognized servable version label: {route.label}")
        serving = self._serving  # one read: `poll` may switch at any moment
        wanted = (None, serving[0]) if serving else ()
        if serving is None or route.model_name != self.model_name or route.version not in wanted:
            raise RequestError("NOT_FOUND", f"Servable not found for request: {route.servable}")
        return serving

    def status(self, route: Route) -> list[VersionStatus]:
        """The rows a status request means, newest version first; labels are ignored, as there.

        Raises:
            RequestError: there are none.
        """
        with self._lock:
            rows = sorted(self._rows.values(), key=lambda row: -row.version)
        if route.model_name != self.model_name or not rows:
            raise RequestError("NOT_FOUND", f"Could not find any versions of model {route.model_name}")
        if route.version is None:
            return rows
        rows = [row for row in rows if row.version == route.version]
        if not rows:
            raise RequestError(
                "NOT_FOUND", f"Could not find version {route.version} of model {route.model_name}"
            )
        return rows

    def failure(self) -> VersionStatus | None:
        """The newest version's row, where it could not be loaded."""
        with self._lock:
            rows = [row for row in self._rows.values() if row.error_code != "OK"]
        return max(rows, key=lambda row: row.version, default=None)

    @property
    def serving_version(self) -> int | None:
        return self._serving[0] if self._serving else None

    def _folders(self) -> dict[int, Path]:
        """Numbered folders by version; other names are skipped, as there."""
        try:
            children = [child for child in self.base_path.iterdir() if child.is_dir()]
        except OSError:
            return {}
        names = [(child.name, child) for child in children if child.name.isascii() and child.name.isdigit()]
        return {int(name): child for name, child in names if int(name) < 2**63}

    def _may_load(self, version: int, folder: Path) -> bool:
        """A version that failed is tried again when its files change: it may have been half copied."""
        return version not in self._failed or self._failed[version] != _files(folder)

    def _load(self, version: int, folder: Path) -> None:
        files = _files(folder)
        self._set(version, "LOADING")
        started = time.monotonic()
        try:
            servable = self._open(folder)
        except LoadError as error:
            self._failed[version] = files
            self._set(version, "END", error.code, error.message)
            log.error("version %d cannot be served: %s: %s", version, folder, error.message)
            return
        self._failed.pop(version, None)
        log.info("version %d loaded in %.1f s", version, time.monotonic() - started)
        self._switch((version, servable))

    def _switch(self, new: tuple[int, Servable] | None) -> None:
        """Serve `new`; requests that hold the old one finish with it, then its memory goes."""
        old = self._serving[0] if self._serving else None
        self._serving = new
        if new is not None:
            self._set(new[0], "AVAILABLE")
        if old is not None:
            self._set(old, "UNLOADING")
            gc.collect()  # a TensorFlow graph refers to itself
            self._set(old, "END")
            log.info("version %d unloaded", old)

    def _set(self, version: int, state: str, code: str = "OK", message: str = "") -> None:
        with self._lock:
            self._rows[version] = VersionStatus(version, state, code, message)

    def _say_empty(self) -> None:
        if not self._was_empty:
            log.warning("%s holds no numbered folder: waiting for a version", self.base_path)
        self._was_empty = True


def _files(folder: Path) -> object:
    """What tells one state of a folder from another: names, sizes, times of writing."""
    found = []
    for file in sorted(folder.rglob("*")):
        try:
            stat = file.stat()
        except OSError:
            continue  # vanished while looking
        found.append((str(file), stat.st_size, stat.st_mtime_ns))
    return found
