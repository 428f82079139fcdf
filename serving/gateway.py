"""The search gateway: what its routes share, and its process. The routes are in `gateway_routes`.

One asyncio process. It never imports TensorFlow; PyTorch only where the encoder runs here.
"""

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError, PipelineError, from_os_error
from serving.errors import ServingError
from serving.gateway_answers import Metrics
from serving.index_backends import ServedIndex, VersionGoneError
from serving.pinning import Means, Pinned, Pins
from serving.published import PublishedVersion

if TYPE_CHECKING:
    import uvicorn

    from serving.encoding import Encoding
    from serving.feedback import Feedback
    from serving.items import Items

log = logging.getLogger("serving")

DRAIN_SECONDS = 20  # for requests under way when the process is told to end
HEALTH_SECONDS = 3.0  # that the index and a remote encoder may take to show that they answer


class Gateway:
    """What the routes share: flags, the pinned versions, feedback, metrics.

    Attributes:
        pins: which version answers.
    """

    def __init__(
        self, flags: argparse.Namespace, means: Means, feedback: "Feedback | None" = None, split: Any = None
    ) -> None:
        self.flags, self.feedback, self._means = flags, feedback, means
        self.pins = Pins(means, split.compared if split else None, self._prepare)
        self.pins.split = split
        self.metrics = Metrics()
        self._remote = bool(flags.encoder_url)

    @property
    def threads(self) -> Executor | None:
        return self._means.threads

    async def answered(self, user_id: str | None, ask: Callable[[Pinned], Any]) -> tuple[Pinned, Any]:
        """What a pinned version answers; where the index server no longer has it, what the next one does.

        Raises:
            PipelineError: as `ask` does.
        """
        with self.pins.using(user_id) as pinned:
            try:
                return pinned, await ask(pinned)
            except VersionGoneError:
                gone = pinned.version
        await self.pins.after(gone)
        with self.pins.using(user_id) as pinned:
            return pinned, await ask(pinned)

    async def run(self) -> None:
        """Load the first version, then look for newer ones until cancelled; raises as `Pins.first`."""
        await self.pins.first(self.flags.poll_seconds)
        watching = asyncio.create_task(self._watch_items())
        try:
            await self.pins.keep(self.flags.poll_seconds)
        finally:
            watching.cancel()

    async def close(self) -> None:
        await self.pins.close()
        if self.feedback is not None:
            await asyncio.to_thread(self.feedback.close)

    async def health(self) -> dict[str, Any]:
        """What /health says; raises ServingError while a search could not be answered."""
        pinned, compared, problem = self.pins.ready(), self.pins.compared, self.pins.problem
        try:
            available = await asyncio.wait_for(self._answering(), HEALTH_SECONDS)
        except TimeoutError:
            raise ServingError(
                f"the index server or the encoder server gave no answer within {HEALTH_SECONDS:g} s", 503
            ) from None
        if pinned.version not in available:
            raise ServingError(f"the index server no longer has version {pinned.version}", 503)
        if compared is not None and compared.version not in available:  # its users are answered, too
            problem = f"the index server no longer has version {compared.version}: all get the live one"
            compared = None
        said = {
            "status": "ok",
            "version": pinned.version,
            "compared": compared.version if compared else None,
            "documents": pinned.catalogue.n_rows,
            "fresh_documents": pinned.fresh.n_documents if pinned.fresh is not None else None,
            "languages": pinned.catalogue.languages,
            "hybrid": pinned.finder.has_lexical,
            "description": pinned.published.manifest.get("description"),
        }
        return said | ({"problem": problem} if problem else {})

    async def _answering(self) -> list[int]:
        """The versions that the index has; raises ServingError where it or an encoder does not answer."""
        encodings = {id(each.encoding): each.encoding for each in self.pins.served}.values()
        if not all(getattr(encoding, "is_healthy", True) for encoding in encodings):
            raise ServingError("the encoder in this process hangs or has ended: start the gateway again", 503)
        asked = [encoding.queries(["health"]) for encoding in encodings] if self._remote else []
        served = self._means.served
        if served is None:
            await asyncio.gather(*asked)
            return [each.version for each in self.pins.served]
        available, *_ = await asyncio.gather(served.available_versions(), *asked)
        return available

    async def _prepare(self, pinned: Pinned) -> None:
        """Before a version answers: the items by its encoder, the comparison with its number."""
        if self.flags.items is not None:
            try:
                await self._read_items(pinned)
            except (InputError, OSError) as error:
                await self._inherit_items(pinned, error)
        split = self.pins.split
        if split is not None and pinned.version != split.compared:
            self.pins.split = replace(split, live=pinned.version)
        if self.feedback is not None:
            self.feedback.split = self.pins.split

    async def _read_items(self, pinned: Pinned) -> None:
        """Give a version the items of the file, by its own encoder.

        Raises:
            PipelineError, OSError: the version keeps the items it has, and the fault is said once.
        """
        from serving.items import Items

        pinned.items_state = _state_of(self.flags.items)
        await self._take_items(pinned, await asyncio.to_thread(Items.read, self.flags.items))

    async def _take_items(self, pinned: Pinned, items: "Items") -> None:
        items.embedded(await pinned.encoding.queries(items.phrases))
        pinned.items = items

    async def _inherit_items(self, pinned: Pinned, error: Exception) -> None:
        """Where the file cannot be used any more: what the live version has, by the new one's encoder."""
        from serving.items import Items

        live = self.pins.live
        if live is None or live.items is None:
            raise InputError(f"--items {self.flags.items}: {error}") from None
        log.warning("%s; version %d takes the items read before", error, pinned.version)
        await self._take_items(pinned, Items(live.items.items))

    async def _watch_items(self) -> None:
        """Read a changed items file again; one that cannot be used leaves what was read before."""
        while self.flags.items is not None:
            await asyncio.sleep(self.flags.poll_seconds)
            for pinned in self.pins.served:
                try:
                    if _state_of(self.flags.items) != pinned.items_state:
                        await self._read_items(pinned)
                        log.info("%s read again for version %d", self.flags.items, pinned.version)
                except (PipelineError, OSError) as error:
                    log.warning("%s; the items read before stay", error)


def make_gateway(flags: argparse.Namespace) -> Gateway:
    """The gateway that the flags describe; nothing is loaded yet.

    Raises:
        PipelineError: a flag's file, folder or address cannot be used.
    """
    from serving.feedback import Feedback, Split, parse_compare, user_key

    key = user_key(flags.user_key_file) if flags.user_key_file else None
    feedback = Feedback.open(flags.feedback, user_key=key) if flags.feedback else None
    split = None
    if flags.compare:
        assert key is not None  # the flags say so
        split = Split(0, *parse_compare(flags.compare), key)
    threads = ThreadPoolExecutor(2, "words")
    if flags.items is not None:
        from serving.items import Items

        Items.read(flags.items)  # a fault is said before anything is loaded
    means = Means(
        flags.model_base_path,
        _opener(flags),
        served=None if flags.in_process else ServedIndex(flags.index_url, flags.model_name),
        has_one_encoder=bool(flags.encoder_url),
        device=lambda: _device(flags),
        has_lexical=not flags.no_hybrid,
        open_fresh=_fresh_opener(flags.fresh) if flags.fresh else None,
        threads=threads,
    )
    return Gateway(flags, means, feedback, split)


def _opener(flags: argparse.Namespace) -> Callable[[PublishedVersion], Any]:
    """Makes the encoding for a version; raises InputError where the key's file cannot be used."""
    api = "embed" if flags.encoder_api == "tei" else flags.encoder_api
    key = _key(flags.encoder_key_file) if flags.encoder_key_file else None

    async def remote(version: PublishedVersion) -> "Encoding":
        from serving.remote_encoding import RemoteEncoding

        return await RemoteEncoding.open(
            flags.encoder_url,
            encoder_api=api,
            model=flags.encoder_model,
            api_key=key,
            prompts=version.manifest.get("prompts"),
        )

    async def local(version: PublishedVersion) -> "Encoding":
        from serving.encoding import LocalEncoding

        folder = await asyncio.to_thread(version.checked_encoder)
        return await asyncio.to_thread(lambda: LocalEncoding.open(folder, device=flags.device))

    return remote if flags.encoder_url else local


def _key(path: Path) -> str:
    """A key for a header: the file's one line."""
    try:
        key = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise from_os_error(error) or InputError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        key = ""
    if not key.isprintable() or not key:
        raise InputError(f"{path}: --encoder_key_file wants the encoder server's key in one line of ASCII")
    return key


def _fresh_opener(folder: Path) -> Callable[[int, str], Any]:
    def opened(dim: int, encoder_sha256: str) -> Any:
        from serving.fresh import FreshDocuments

        return FreshDocuments.open(folder, dim, encoder_sha256)

    return opened


def _device(flags: argparse.Namespace) -> str:
    """Where rows are searched: beside the encoder, where it runs in this process."""
    if flags.encoder_url or flags.device == "cpu":
        return "cpu"
    from pipeline.encoder import device_type

    return device_type(flags.device)


def _state_of(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_mtime_ns, state.st_size


def serve(flags: argparse.Namespace) -> None:
    """Listen until a signal.

    Raises:
        PipelineError: what it was started with cannot be used; found while the first version loads, too.
    """
    import uvloop

    gateway = make_gateway(flags)
    uvloop.run(_serve(gateway))


async def _serve(gateway: Gateway) -> None:
    flags = gateway.flags
    try:
        listener = socket.create_server((flags.host, flags.port), family=_family(flags.host))
    except OSError as error:
        raise InputError(
            f"--host {flags.host} --port {flags.port}: {error.strerror}; choose another"
        ) from None
    async with serving(gateway, listener) as server:
        log.info("http://%s:%d waits for its first version", *listener.getsockname()[:2])
        loading = asyncio.create_task(gateway.run())
        # Not `serve`: it would raise the signal again after a clean end.
        listening = asyncio.create_task(server._serve(sockets=[listener]))
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, _stop, server)
        try:
            await asyncio.wait({loading, listening}, return_when=asyncio.FIRST_COMPLETED)
            server.should_exit = True
            await listening
            if loading.done():
                await loading  # raises what the first version was refused for
        finally:
            loading.cancel()
            with contextlib.suppress(asyncio.CancelledError, PipelineError):
                await loading


@asynccontextmanager
async def serving(gateway: Gateway, listener: socket.socket) -> "AsyncIterator[uvicorn.Server]":
    """A server for the gateway, not yet started; the gateway is closed after it."""
    import uvicorn

    from serving import accepting
    from serving.gateway_routes import make_app

    config = uvicorn.Config(
        make_app(gateway), log_config=None, access_log=False, lifespan="off", server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS, timeout_keep_alive=75,
    )  # fmt: skip
    try:
        yield accepting.Server(config)
    finally:
        listener.close()
        await gateway.close()


def _stop(server: "uvicorn.Server") -> None:
    """Let requests under way end; at a second signal do not wait for them."""
    server.force_exit = server.should_exit
    server.should_exit = True


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
