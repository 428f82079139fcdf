"""Which version answers: loaded whole beside the old one, swapped in at once, let go after its last request.

A `Pinned` holds all that a request touches: index, documents, encoder, BM25, titles, fresh documents. It is
asked by its own number, so that an answer and the documents it names are always of one version.
"""

import asyncio
import importlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import InputError, PipelineError
from serving.errors import ServingError
from serving.finding import Finder
from serving.index_backends import IndexBackend, RowsIndex, ServedIndex
from serving.lexical import Lexical
from serving.published import ASSETS, Catalogue, PublishedVersion, newest_version

if TYPE_CHECKING:
    from serving.encoding import Encoding
    from serving.feedback import Split
    from serving.fresh import FreshDocuments
    from serving.items import Items
    from serving.titles import Titles

log = logging.getLogger("serving")

N_PROVED = 8  # documents that an encoder must find again where it does not say which one it is
PROVED_SCORE = 0.99  # of each with itself: rounding takes less, another model far more
PROVED_K = 5  # documents with equal texts share the first places
REFUSED_SECONDS = 60.0  # until a version that could not be loaded is tried again
RELOAD_SECONDS = 20.0  # that a request waits for the version after the one that is gone


class EncoderMismatchError(ServingError):
    """The encoder is not the one that the version was made with: its answers would be nonsense."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(message, 409)


@dataclass(eq=False)
class Pinned:
    """One version as requests see it; none of it changes while it is used, but for fresh documents and items.

    Attributes:
        items: canned answers with the vectors of this version's encoder; None: none are configured.
        items_state: of the file that they were read from, as its reader knows it.
        n_using: requests under way.
        is_retired: another version has taken its place.
    """

    version: int
    published: PublishedVersion
    catalogue: Catalogue
    encoding: "Encoding"
    titles: "Titles"
    backend: IndexBackend
    finder: Finder
    fresh: "FreshDocuments | None" = None
    items: "Items | None" = None
    items_state: tuple[int, int] | None = None
    n_using: int = 0
    is_retired: bool = False


@dataclass(frozen=True)
class _Refused:
    """Why a version could not be loaded, at which of the loop's seconds, and of which state of its files."""

    at: float
    why: str
    written: list[int]


@dataclass(frozen=True)
class Means:
    """What versions are loaded with; the same for each of them.

    Attributes:
        served: the index server; None: each version's own rows are searched in this process.
        open_encoding: makes the encoding for a version: by its checked encoder, or by a server.
        has_one_encoder: a server's, which is the same whatever version asks.
        device: where rows are searched, "cpu" or "cuda"; a call, as finding out loads PyTorch.
        open_fresh: makes the side index for the first version; None: none is kept.
        threads: where searching by words and titles runs.
    """

    model_base_path: Path
    open_encoding: "Callable[[PublishedVersion], Awaitable[Encoding]]"
    served: ServedIndex | None = None
    has_one_encoder: bool = False
    device: Callable[[], str] = lambda: "cpu"
    has_lexical: bool = True
    open_fresh: "Callable[[int, str], FreshDocuments] | None" = None
    threads: Executor | None = None


class Pins:
    """The live version, and the compared one; looks for newer ones and swaps them in.

    Attributes:
        live: None until the first version is loaded.
        compared: the other version of a comparison, else None.
        waiting: why there is no live version yet, in a line.
        problem: why the newest version is not the live one, or the index cannot be asked; None: all is well.
    """

    def __init__(
        self,
        means: Means,
        compare: int | None = None,
        on_swap: Callable[[Pinned], Awaitable[None]] | None = None,
    ) -> None:
        self._means, self._compare, self._on_swap = means, compare, on_swap
        self.live: Pinned | None = None
        self.compared: Pinned | None = None
        self.waiting: str | None = "the first version is being loaded"
        self.problem: str | None = None
        self.split: Split | None = None
        self.n_reloads = 0
        self._fresh: FreshDocuments | None = None
        self._refused: dict[int, _Refused] = {}
        self._has_said_absent = False
        self._let_go_for: list[Pinned] = []
        self._has_compared_left = False
        self._said_stale: str | None = None
        self._lock = asyncio.Lock()
        self._look: asyncio.Task | None = None
        self._closing: set[asyncio.Task] = set()

    def ready(self) -> Pinned:
        """The live version; raises ServingError while there is none."""
        if self.live is None:
            raise ServingError(f"not ready: {self.waiting}", 503)
        return self.live

    @contextmanager
    def using(self, user_id: str | None = None) -> Iterator[Pinned]:
        """The version that a user is served by, kept open until the block ends; raises as `ready`."""
        pinned = self.ready()
        if self.compared is not None and self.split is not None:
            is_compared = self.split.version_for(user_id) == self.compared.version
            pinned = self.compared if is_compared else pinned
        pinned.n_using += 1
        try:
            yield pinned
        finally:
            pinned.n_using -= 1
            self._close_if_done(pinned)

    async def first(self, poll_seconds: float) -> None:
        """Wait for the index server, then load the version it serves.

        Raises:
            PipelineError: what is there cannot be served: another encoder, a broken folder.
        """
        while self.live is None:
            try:
                await self.look()
            except EncoderMismatchError:
                raise
            except ServingError as error:  # nobody is there yet, or not by this name
                if str(error) != self.waiting:
                    log.warning("waiting: %s", error)
                self.waiting = str(error)
            if self.live is None:
                await asyncio.sleep(poll_seconds)

    async def keep(self, poll_seconds: float) -> None:
        """Look again and again, for ever."""
        while True:
            await asyncio.sleep(poll_seconds)
            try:
                await self.look()
            except PipelineError as error:
                if str(error) != self.problem:
                    log.warning("%s", error)
                self.problem = str(error)
            except Exception:
                log.exception("looking for a newer version failed")

    async def look(self) -> None:
        """Serve the newest version that answers, if it is not served already.

        Raises:
            PipelineError: the index cannot be asked, or the first version cannot be loaded; where a later one
                cannot, the old one stays, and `problem` says why.
        """
        async with self._lock:
            available = await self._available()
            self._refused = {each: why for each, why in self._refused.items() if each in available}
            newest = next((each for each in available if each != self._compare), None)
            if newest is None:
                raise ServingError(self._none_serves(available), 503)
            if self.compared is not None and self.compared.version not in available:
                self._drop_compared()
            if self.live is None or self.live.version != newest:
                await self._swap(newest)
            if self.compared is None and self._compare in available:
                await self._load_compared(self._compare)
            elif self.compared is None and self._compare is not None and not self._has_said_absent:
                log.warning("%s", self._refusal())
                self._has_said_absent = True
            await self.encode_stale()
            if self.served != self._let_go_for:
                await self._let_go_of_published()
                self._let_go_for = self.served
            self.problem = self._refusal()

    async def after(self, gone: int) -> None:
        """Return once no user is served by version `gone`, where the index server has another.

        Raises:
            ServingError: there is none, or it is not loaded in time.
        """
        if self.compared is not None and self.compared.version == gone:
            self._drop_compared()
        if self.live is not None and self.live.version != gone:
            return
        if self._look is None or self._look.done():  # one for all who wait
            self._look = asyncio.get_running_loop().create_task(self.look())
            self._look.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, if alone
        try:
            await asyncio.wait_for(asyncio.shield(self._look), RELOAD_SECONDS)
        except TimeoutError:
            raise ServingError(
                f"version {gone} is no longer served and the next one is still being loaded: ask again", 503
            ) from None
        if self.live is None or self.live.version == gone:
            why = self._refusal() or "nor another"
            raise ServingError(f"the index server no longer has version {gone}: {why}", 503)

    @property
    def served(self) -> list[Pinned]:
        """The versions that answer, the live one first."""
        return [pinned for pinned in (self.live, self.compared) if pinned is not None]

    async def close(self) -> None:
        if self._look is not None:
            self._look.cancel()
            await asyncio.gather(self._look, return_exceptions=True)
        await asyncio.gather(*self._closing, return_exceptions=True)
        for backend in {pinned.backend for pinned in self.served} - {self._means.served}:
            await backend.close()
        for encoding in {id(pinned.encoding): pinned.encoding for pinned in self.served}.values():
            await encoding.close()
        if self._fresh is not None:
            self._fresh.close()
        if self._means.served is not None:
            await self._means.served.close()

    # --- Loading --------------------------------------------------------------------------------------

    async def _available(self) -> list[int]:
        if self._means.served is not None:
            return await self._means.served.available_versions()
        return [await asyncio.to_thread(newest_version, self._means.model_base_path)]

    def _none_serves(self, available: list[int]) -> str:
        if self._compare in available:
            return (
                f"--compare names version {self._compare}, which is the only one that is served: let the "
                "index server serve the live one too"
            )
        where = self._means.served.url if self._means.served is not None else self._means.model_base_path
        return f"no version is AVAILABLE at {where} yet"

    async def _swap(self, version: int) -> None:
        """Load a version and let it answer; a version that was refused lately is left alone."""
        if self._is_refused(version):
            return
        try:
            pinned = await self._load(version)
        except PipelineError as error:
            if self.live is None:
                raise
            self._refuse(version, error)
            log.warning("version %d is not served, %d stays: %s", version, self.live.version, error)
            return
        self._refused = {each: why for each, why in self._refused.items() if each == self._compare}
        old, self.live = self.live, pinned  # the one moment
        self.waiting = None
        self.n_reloads += old is not None
        log.info("version %d answers, %d rows", version, pinned.catalogue.n_rows)
        if old is not None:
            self._retire(old)

    async def _load_compared(self, version: int) -> None:
        """Load the other version of a comparison, if it was not refused lately: a fault of it is logged."""
        if self._is_refused(version):
            return
        try:
            self.compared = await self._load(version)
        except PipelineError as error:
            self._refuse(version, error)
            log.warning("version %d is not compared, every user gets the live one: %s", version, error)
            return
        self._refused.pop(version, None)
        log.info("version %d is compared", version)

    async def encode_stale(self) -> None:
        """Have every version's encoder find what was added through another one's.

        A fault is logged, and mended by the next look: what was added is on the disk whatever happens here.
        """
        try:
            for pinned in self.served:
                if pinned.fresh is not None:
                    await _encode_stale(pinned.fresh, pinned.encoding)
        except PipelineError as error:
            if str(error) != self._said_stale:
                log.warning("fresh documents wait for an encoder: %s", error)
            self._said_stale = str(error)
        else:
            self._said_stale = None

    async def _let_go_of_published(self) -> None:
        """Fresh documents that every served version holds by now need no side index."""
        # A compared version that is still to come may lack some of them.
        is_whole = self._compare is None or self.compared is not None or self._has_compared_left
        if self._fresh is not None and is_whole:
            texts_of = [_texts_of(each.catalogue) for each in self.served]
            await asyncio.to_thread(self._fresh.published, *texts_of)

    def _refuse(self, version: int, error: PipelineError) -> None:
        now = asyncio.get_running_loop().time()
        self._refused[version] = _Refused(now, str(error), self._written(version))

    def _is_refused(self, version: int) -> bool:
        """Whether a version was refused lately, and nobody has published it anew since."""
        refused = self._refused.get(version)
        if refused is None or refused.written != self._written(version):
            return False
        return asyncio.get_running_loop().time() - refused.at < REFUSED_SECONDS

    def _written(self, version: int) -> list[int]:
        """When the files beside a version's index were written last."""
        assets = self._means.model_base_path / str(version) / ASSETS
        try:
            return [assets.stat().st_mtime_ns, *sorted(each.stat().st_mtime_ns for each in assets.iterdir())]
        except OSError:
            return []

    def _refusal(self) -> str | None:
        said = [f"version {version} is not served: {each.why}" for version, each in self._refused.items()]
        if self._compare is not None and self.compared is None:
            said.append(f"--compare names version {self._compare}, which is not served: all get the live one")
        return said[0] if said else None

    async def _load(self, version: int) -> Pinned:
        """All of a version, made off the event loop while the old one answers; raises PipelineError."""
        try:
            return await self._loaded(version)
        except PipelineError:
            raise
        except Exception as error:  # whatever its files hold, the version before it goes on
            log.debug("version %d cannot be loaded", version, exc_info=True)
            said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise InputError(f"version {version} cannot be loaded ({said}): publish it again") from None

    async def _loaded(self, version: int) -> Pinned:
        means = self._means
        published = await asyncio.to_thread(PublishedVersion, means.model_base_path, version)
        catalogue = await asyncio.to_thread(Catalogue.open, published)
        backend = await asyncio.to_thread(_backend_of, means, published, catalogue)
        encoding = await self._encoding_for(published, catalogue, backend)
        try:
            fresh = await self._fresh_for(encoding, published)
            lexical = await asyncio.to_thread(Lexical.of, catalogue.texts()) if means.has_lexical else None
            titles = await asyncio.to_thread(_titles_of, catalogue)
            finder = Finder(version, catalogue, encoding, backend, lexical, fresh, means.threads)
            pinned = Pinned(version, published, catalogue, encoding, titles, backend, finder, fresh)
            await asyncio.to_thread(importlib.import_module, "scipy.stats")  # fusion's: not at a first search
            await _try(pinned)
            if self._on_swap is not None:
                await self._on_swap(pinned)
            return pinned
        except BaseException:
            await self._close_encoding(encoding)
            raise

    async def _encoding_for(
        self, published: PublishedVersion, catalogue: Catalogue, backend: IndexBackend
    ) -> "Encoding":
        """The version's own encoder: the one that is loaded, where it is the same, else another.

        Raises:
            EncoderMismatchError: what is there is another one.
        """
        wanted = published.encoder_sha256
        for pinned in self.served:
            if pinned.encoding.encoder_sha256 == wanted:
                return pinned.encoding
        if self._means.has_one_encoder and self.live is not None and published.version == self._compare:
            live = self.live.published
            if live.encoder_sha256 != wanted:
                raise EncoderMismatchError(
                    f"--compare: version {published.version} was made with encoder {wanted[:12]} and version "
                    f"{live.version} with {live.encoder_sha256[:12]}, but --encoder_url is one encoder: "
                    "leave it out, or compare versions of one encoder"
                )
        encoding = await self._means.open_encoding(published)
        try:
            if encoding.encoder_sha256 is None:
                await prove(encoding, published, catalogue, backend)
            elif encoding.encoder_sha256 != wanted:
                raise EncoderMismatchError(
                    f"the encoder at --encoder_url is {encoding.encoder_sha256[:12]}, but version "
                    f"{published.version} was made with {wanted[:12]}: start it with --model "
                    f"encoders/{wanted[:12]}..."
                )
        except BaseException:
            await encoding.close()
            raise
        return encoding

    async def _fresh_for(self, encoding: "Encoding", published: PublishedVersion) -> "FreshDocuments | None":
        """The fresh documents as this encoder sees them, all of them encoded."""
        if self._means.open_fresh is None:
            return None
        sha256 = published.encoder_sha256
        if self._fresh is None:
            self._fresh = await asyncio.to_thread(self._means.open_fresh, encoding.dim, sha256)
        fresh = await asyncio.to_thread(self._fresh.under, encoding.dim, sha256)
        await _encode_stale(fresh, encoding)
        return fresh

    # --- Letting go -----------------------------------------------------------------------------------

    def _drop_compared(self) -> None:
        assert self.compared is not None
        log.warning(
            "version %d of the comparison is no longer served: every user gets the live one",
            self.compared.version,
        )
        retired, self.compared = self.compared, None
        self._has_compared_left = True
        self._retire(retired)

    def _retire(self, pinned: Pinned) -> None:
        pinned.is_retired = True
        self._close_if_done(pinned)

    def _close_if_done(self, pinned: Pinned) -> None:
        if pinned.is_retired and not pinned.n_using:
            task = asyncio.get_running_loop().create_task(self._close(pinned))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _close(self, pinned: Pinned) -> None:
        async with self._lock:  # a version that is being loaded may have taken the encoder over
            if pinned.backend is not self._means.served:
                await pinned.backend.close()
            await self._close_encoding(pinned.encoding)

    async def _close_encoding(self, encoding: "Encoding") -> None:
        """Unless another version answers by it."""
        if all(each.encoding is not encoding for each in self.served):
            await encoding.close()


async def prove(
    encoding: "Encoding", published: PublishedVersion, catalogue: Catalogue, backend: IndexBackend
) -> None:
    """Have an encoder that does not say which one it is find some of the version's documents again.

    Each document's text, encoded now, must be nearest to that very document, at a score that only the encoder
    which the index was made with reaches. Documents with equal texts count alike.

    Raises:
        EncoderMismatchError: it does not.
    """
    rows = sorted(
        {int(row) for row in np.linspace(0, catalogue.n_rows - 1, N_PROVED)} if catalogue.n_rows else []
    )
    documents = catalogue.documents(rows)
    if not documents:
        return
    vectors = await encoding.documents([document["text"] or "" for document in documents])
    if vectors.shape[1] != published.manifest.get("dim"):
        raise EncoderMismatchError(
            f"the encoder at --encoder_url gives {vectors.shape[1]} numbers, but version {published.version} "
            f"has {published.manifest.get('dim')}: start it with encoder {published.encoder_sha256[:12]}"
        )
    scores, ids = await backend.exact(vectors, PROVED_K, version=published.version)
    for document, its_scores, its_ids in zip(documents, scores, ids, strict=True):
        found = [
            float(score)
            for score, name in zip(its_scores, its_ids, strict=True)
            if name and _is_same(document, name, catalogue)
        ]
        if not found or found[0] < PROVED_SCORE or found[0] < float(its_scores[0]) - 1e-3:
            raise EncoderMismatchError(
                f"the encoder at --encoder_url does not find document {document['document_id']!r} of version "
                f"{published.version} by its own text (score {found[0] if found else 0:.3f}, wanted "
                f"{PROVED_SCORE} or more): start it with encoder {published.encoder_sha256[:12]}"
            )


async def _try(pinned: Pinned) -> None:
    """Search for one of a version's documents, before anybody else does.

    Raises:
        PipelineError: it does not find any.
    """
    [document] = pinned.catalogue.documents([0]) if pinned.catalogue.n_rows else [None]
    if document is None:
        return
    vectors = await pinned.encoding.queries([document["text"] or "a"])
    scores, [[name]] = await pinned.backend.search(vectors, 1, version=pinned.version)
    if not np.isfinite(scores).all() or pinned.catalogue.row_of(name) is None:
        raise InputError(
            f"version {pinned.version} does not answer: for the text of {document['document_id']!r} it finds "
            f"{name!r} at score {scores[0, 0]:g}, wanted one of its documents: publish it again, or give the "
            "folder that the index server watches as --model_base_path"
        )


async def _encode_stale(fresh: "FreshDocuments", encoding: "Encoding") -> None:
    stale = fresh.stale()
    if stale:
        vectors = await encoding.documents([document["text"] for document in stale])
        await asyncio.to_thread(fresh.encoded, stale, vectors)


def _is_same(document: dict[str, Any], document_id: str, catalogue: Catalogue) -> bool:
    if document_id == document["document_id"]:
        return True
    return any(
        each["text"] == document["text"] for each in catalogue.documents(catalogue.rows_of(document_id))
    )


def _backend_of(means: Means, published: PublishedVersion, catalogue: Catalogue) -> IndexBackend:
    if means.served is not None:
        means.served.uses(published)
        return means.served
    if catalogue.rows is None:
        raise InputError(
            f"version {published.version} has no assets.extra/rows.npy, which --in_process searches: publish "
            "it again with publish.rows_below above its number of documents, or start an index server "
            "(make serve) and leave --in_process out"
        )
    return RowsIndex(catalogue.rows, list(catalogue.ids), device=means.device())


def _titles_of(catalogue: Catalogue) -> "Titles":
    from serving.titles import Titles

    return Titles.of(catalogue.titles())


def _texts_of(catalogue: Catalogue) -> Callable[[str], list[str]]:
    return lambda name: [each["text"] or "" for each in catalogue.documents(catalogue.rows_of(name))]
