"""The versions of every model: loaded, served, drained and closed; their states.

Follows tensorflow/serving r2.11 with its availability preserving policy: core/aspired_versions_manager.cc,
basic_manager.cc, loader_harness.cc and servable_state_monitor.cc say how versions come and go, and what their
states are meanwhile, model_servers/server_core.cc what a label means and when a start has failed.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from serving.handles import Handle, Loaded, LoadError, Servable, Use
from serving.protocol import RequestError, Route, VersionStatus
from serving.wanted import (
    Model,
    ModelConfig,
    Version,
    missing,
    next_action,
    wanted_folders,
)

log = logging.getLogger("serving")

INITIAL_LOADS = 4 * (os.cpu_count() or 1)  # side by side before the ports open; one at a time after that
UNLOAD_WAIT = 1.0  # seconds that `poll` stands by for the last requests of an old version


@dataclass(frozen=True)
class Failure:
    """A model that did not become available at the start."""

    model_name: str
    version: int
    error_code: str
    error_message: str

    def __str__(self) -> str:
        error = f" due to error: {self.error_code}: {self.error_message}" if self.error_code != "OK" else ""
        return f"{{name: {self.model_name} version: {self.version}}}{error}"


class Models:
    """Keeps the wanted versions of every model loaded.

    `poll` belongs to one thread at a time, everything else may be called from any.
    """

    def __init__(
        self,
        configs: Sequence[ModelConfig],
        open_version: Callable[[Path], Servable],
        *,
        max_num_load_retries: int = 5,
        load_retry_interval_seconds: float = 60.0,
        warm_up: Callable[[Servable, Path], None] | None = None,
        verify: Callable[[Path], None] | None = None,
        on_load: Callable[[Loaded, float], None] | None = None,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            open_version: version folder -> its servable; raises LoadError.
            max_num_load_retries: further tries of a load that failed.
            verify: called with the folder before it is opened, and again at each try; raises LoadError.
            warm_up: called with what was opened before anybody else may use it; raises LoadError.
            on_load: told of each version that became AVAILABLE, and of the seconds its last try took.
        """
        self._models = {config.name: Model(config) for config in configs}
        self._open = open_version
        self._tries = 1 + max(0, max_num_load_retries)
        self._retry_interval = load_retry_interval_seconds
        self._warm_up, self._verify = warm_up, verify
        self._on_load = on_load
        self._lock = threading.RLock()  # of all below
        self._serving: dict[tuple[str, int | None], Handle] = {}  # replaced, never changed
        self._jobs: list[_Job] = []
        self._initial_loads = threading.Semaphore(INITIAL_LOADS)
        self._is_starting, self._is_at_rest = True, False
        self._outcome: list[Failure] | None = None  # of the start; none: every model is available
        self._closed = threading.Event()
        self._said: dict[str, str] = {}
        self._judge_start()

    # What requests ask

    def use(self, route: Route) -> AbstractContextManager[Loaded]:
        """The version that a request means, kept until the block ends.

        Raises:
            RequestError: it is not served, in the real server's words; raised when the block is entered.
        """
        return Use(self._find, route)

    def status(self, route: Route) -> list[VersionStatus]:
        """The rows a status request means, newest version first; labels are ignored, as there.

        Raises:
            RequestError: there are none.
        """
        model = self._models.get(route.model_name)
        rows = model.rows if model else {}
        if not rows:
            raise RequestError("NOT_FOUND", f"Could not find any versions of model {route.model_name}")
        if route.version is None:
            with self._lock:
                return sorted(rows.values(), key=lambda row: -row.version)
        row = rows.get(route.version)
        if row is None:
            raise RequestError(
                "NOT_FOUND", f"Could not find version {route.version} of model {route.model_name}"
            )
        return [row]

    def states(self) -> dict[str, list[VersionStatus]]:
        """Every row of every model that has any, newest version first."""
        with self._lock:
            return {
                name: sorted(model.rows.values(), key=lambda row: -row.version)
                for name, model in self._models.items()
                if model.rows
            }

    def available(self, model_name: str) -> list[int]:
        """The versions that can be asked, newest first."""
        served = (handle.loaded for handle in self._serving.values())
        return sorted({one.version for one in served if one.model_name == model_name}, reverse=True)

    def _find(self, route: Route) -> Handle:
        """The handle of the version that a request means; `use` keeps it."""
        version = route.version
        if route.label is not None:
            model = self._models.get(route.model_name)
            if model is None or route.label not in model.config.labels:
                raise RequestError("INVALID_ARGUMENT", f"Unrecognized servable version label: {route.label}")
            version = model.config.labels[route.label]
        handle = self._serving.get((route.model_name, version))
        if handle is None:
            servable = Route(route.action, route.model_name, version).servable
            raise RequestError("NOT_FOUND", f"Servable not found for request: {servable}")
        return handle

    # The start

    def ready(self) -> bool:
        """Whether every model has a version AVAILABLE, and at the start: whether no load is under way.

        The real server opens its ports only when all loads of the start have ended, retries included.
        """
        self._end_start()
        if self._is_starting:
            return False
        return all((name, None) in self._serving for name in self._models)

    def failure(self) -> Failure | None:
        """The first model that did not become available at the start; the real server exits then.

        None until every model has a version that is AVAILABLE or END, as there.
        """
        return self._outcome[0] if self._outcome else None

    def failure_text(self) -> str:
        """All of them, as the real server's log says before it exits; empty without any."""
        if not self._outcome:
            return ""
        each = "".join("{" + str(failure) + "}, " for failure in self._outcome)
        return f"UNKNOWN: {len(self._outcome)} servable(s) did not become available: {{{each}}}"

    # Coming and going

    def poll(self) -> None:
        """Look once at every model's folder, and load and unload what that asks for.

        Comes back when nothing is left to do now: a load that waits for its next try, or a version that
        still answers a request, goes on without the caller. Until it ends nothing else is loaded or
        unloaded, as in the real server, whose one thread it holds; but at the start loads go side by side.
        """
        if self._closed.is_set():
            return
        wanted = self._look()
        if wanted is not None:
            with self._lock:
                for name, folders in wanted.items():
                    self._models[name].pending = folders
        self._manage()

    def close(self, grace_seconds: float = 5.0) -> None:
        """Close every version; one that still answers a request then is left to the end of the process."""
        self._closed.set()
        end = time.monotonic() + grace_seconds
        with self._lock:
            handles = {id(handle): handle for handle in self._serving.values()}
            self._serving = {}
        for handle in handles.values():
            handle.retire()
        for handle in handles.values():
            if handle.drained.wait(max(0.0, end - time.monotonic())):
                _close_quietly(handle.loaded.servable)

    def _look(self) -> dict[str, dict[int, Path]] | None:
        """The folders that every model wants; None where one cannot be looked at: then none is, as there."""
        wanted = {}
        for name, model in self._models.items():
            try:
                children = [child.name for child in model.config.base_path.iterdir()]
            except OSError as error:
                self._say(name, f"{model.config.base_path}: {error.strerror}: waiting for it")
                return None
            wanted[name] = folders = wanted_folders(model.config, children)
            if not folders:
                self._say(name, f"{model.config.base_path} holds no version that is wanted: waiting for one")
            else:
                self._say(name, missing(model.config.policy, folders))
        return wanted

    def _manage(self) -> None:
        """Do one thing after another until nothing is to be done, or one is at work on its own."""
        while not self._closed.is_set():
            self._end_start()
            self._jobs = [job for job in self._jobs if not job.is_done]
            if self._jobs and not self._is_starting:
                if not self._stand_by():
                    return
                continue
            action = self._next()
            self._is_at_rest = action is None
            if action is not None:
                self._jobs.append(self._start(*action))
            elif not self._stand_by():
                return

    def _stand_by(self) -> bool:
        """Wait for what is at work; whether any of it ended."""
        for job in self._jobs:
            job.settled.wait(UNLOAD_WAIT if job.is_unload else None)
        return any(job.is_done for job in self._jobs)

    def _next(self) -> tuple[str, Version] | None:
        """The next thing to do: an unload of any model before a load."""
        with self._lock:
            actions = []
            for model in self._models.values():
                model.flush()
                model.take_pending()
                self._announce(model)
                actions.append(next_action(model.versions.values()))
            found = [action for action in actions if action is not None]
            return min(found, key=lambda action: action[0] == "load", default=None)

    def _announce(self, model: Model) -> None:
        for version in model.versions.values():
            if version.state == "new" and not version.is_announced:
                version.is_announced = True
                self._set(version, "START")

    def _start(self, action: str, version: Version) -> "_Job":
        job = _Job(is_unload=action == "unload")
        version.state = "loading" if action == "load" else "unloading"
        work = self._load if action == "load" else self._unload
        name = f"{action} {version.model_name} {version.number}"
        threading.Thread(target=_run, args=(work, version, job), name=name, daemon=True).start()
        return job

    def _load(self, version: Version, job: "_Job") -> None:
        with self._initial_loads:
            self._set(version, "LOADING")
            servable, seconds, error = self._try(version, job)
        if servable is None:
            version.state = "ended"
            self._set(version, "END", error.code, error.message)
        elif version.is_cancelled or self._closed.is_set():
            # Its folder went away meanwhile. No state is published for this: the row stays LOADING, as there.
            version.state = "ended"
            _close_quietly(servable)
        else:
            loaded = Loaded(version.model_name, version.number, servable)
            with self._lock:
                version.handle, version.state = Handle(loaded), "ready"
                self._serve()
                self._set(version, "AVAILABLE")
            log.info("%s: loaded in %.1f s", version, seconds)
            _tell(self._on_load, loaded, seconds)

    def _try(self, version: Version, job: "_Job") -> tuple[Servable | None, float, LoadError]:
        """Open a version; again after a pause where that fails, until the tries are used up."""
        servable, error = None, LoadError("CANCELLED", "The server is being closed")
        started = time.monotonic()
        for n in range(self._tries):
            if n:
                if self._retry_interval > 0:
                    job.settled.set()
                if self._closed.wait(self._retry_interval):
                    break
                log.info("%s: try %d of %d", version, n + 1, self._tries)
            started = time.monotonic()
            try:
                servable = self._open_whole(version.folder)
            except LoadError as refusal:
                error = refusal
                log.error("%s cannot be served: %s: %s", version, error.code, error.message)
            if servable is not None or version.is_cancelled:
                break
        return servable, time.monotonic() - started, error

    def _open_whole(self, folder: Path) -> Servable:
        """Verify, open and warm up.

        Raises:
            LoadError: whatever went wrong.
        """
        servable = None
        try:
            if self._verify is not None:
                self._verify(folder)
            servable = self._open(folder)
            if self._warm_up is not None:
                self._warm_up(servable, folder)
            return servable
        except Exception as error:
            if servable is not None:
                _close_quietly(servable)
            if isinstance(error, LoadError):
                raise
            log.exception("loading %s failed", folder)  # a fault: the version is refused, the process lives
            raise LoadError("INTERNAL", f"{folder}: {type(error).__name__}: {error}") from error

    def _unload(self, version: Version, job: "_Job") -> None:
        """Requests that hold the old version finish with it, then its memory goes."""
        handle = version.handle
        assert handle is not None
        with self._lock:
            self._set(version, "UNLOADING")
            self._serve()
        handle.retire()
        handle.drained.wait()
        version.handle = None
        _close_quietly(handle.loaded.servable)
        version.state = "ended"
        self._set(version, "END")
        log.info("%s: unloaded", version)

    def _serve(self) -> None:
        """Let requests find what is ready: by number, and the highest without one. In one assignment."""
        serving: dict[tuple[str, int | None], Handle] = {}
        for name, model in self._models.items():
            ready = {n: v.handle for n, v in model.versions.items() if v.state == "ready" and v.handle}
            serving |= {(name, number): handle for number, handle in ready.items()}
            if ready:
                serving[name, None] = ready[max(ready)]
        self._serving = serving

    def _set(self, version: Version, state: str, code: str = "OK", message: str = "") -> None:
        row = VersionStatus(version.number, state, code, message)
        with self._lock:
            rows = self._models[version.model_name].rows
            self._models[version.model_name].rows = rows | {version.number: row}
            if self._outcome is None:
                self._judge_start()

    def _judge_start(self) -> None:
        """Once every model has a row that is AVAILABLE or END, the newest such row of each decides."""
        reached = []
        for name, model in sorted(self._models.items()):
            rows = [row for row in model.rows.values() if row.state in ("AVAILABLE", "END")]
            if not rows:
                return
            row = max(rows, key=lambda row: row.version)
            if row.state == "END":
                reached.append(Failure(name, row.version, row.error_code, row.error_message))
        self._outcome = reached

    def _end_start(self) -> None:
        with self._lock:
            if self._is_at_rest and self._outcome == [] and all(job.is_done for job in self._jobs):
                self._is_starting = False

    def _say(self, name: str, what: str) -> None:
        """Log a model's trouble once, not at every look."""
        if what and self._said.get(name) != what:
            log.warning("model %s: %s", name, what)
        self._said[name] = what


class _Job:
    """A load or unload on a thread of its own; `settled` when it ended or waits for its next try."""

    def __init__(self, is_unload: bool) -> None:
        self.is_unload = is_unload
        self.settled = threading.Event()
        self.is_done = False


def _run(work: Callable[[Version, _Job], None], version: Version, job: _Job) -> None:
    try:
        work(version, job)
    except Exception:
        log.exception("%s: a fault", version)
        version.state = "ended"
    finally:
        job.is_done = True
        job.settled.set()


def _close_quietly(servable: Servable) -> None:
    try:
        servable.close()
    except Exception:  # nothing more can be done with it
        log.exception("closing a version failed")


def _tell(listener: Callable[..., None] | None, *what: object) -> None:
    if listener is None:
        return
    try:
        listener(*what)
    except Exception:  # who listens must not stop what is listened to
        log.exception("telling of a version failed")
