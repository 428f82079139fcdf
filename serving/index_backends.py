"""Where vectors are searched: TensorFlow Serving's REST API, or a version's own rows in this process.

Both answer by document id, best first, and search what is asked at one moment together: while one request is
under way the others gather, and go as one where they ask alike. Alone, a query never waits.
"""

import asyncio
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

import numpy as np

from pipeline.errors import InputError
from serving.errors import ServingError
from serving.published import PublishedVersion

NO_SCORE = float(np.finfo(np.float32).min)  # of what is not found, as the index server says it
MAX_JOINED = 64  # queries of one request: the answer of a joined one waits for the slowest
MAX_FLYING = 2  # requests of one kind under way: one is searched while the next is written and read
MAX_ROWS = 100_000  # searched exactly in this process: 150 MB at 384 numbers, some milliseconds a query
TIMEOUT_SECONDS = 30.0  # tensorflow_model_server's own
CONNECT_SECONDS = 3.0

Found = tuple[np.ndarray, list[list[str]]]


class VersionGoneError(ServingError):
    """The index server no longer has (or never had) the version that was asked."""


class IndexBackend(Protocol):
    """What a search asks for the nearest documents."""

    def uses(self, version: PublishedVersion) -> None:
        """Learn a version's own settings before it is asked."""

    async def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        version: int,
        allowed: Sequence[str] | None = None,
        excluded: Sequence[str] | None = None,
    ) -> Found:
        """The best documents of each query.

        Args:
            queries: float32 (n, dim), unit length.
            allowed: nothing else is found; None: everything may be.

        Returns:
            scores float32 (n, k) and document ids (n, k), best first; NO_SCORE and "" where none is left.

        Raises:
            ServingError: the index cannot answer.
        """

    async def exact(self, queries: np.ndarray, k: int, *, version: int) -> Found:
        """The same by brute force over every row."""

    async def close(self) -> None: ...


@dataclass(frozen=True)
class _Asked:
    """What must be alike in queries that are searched together."""

    version: int
    k: int
    is_exact: bool = False
    allowed: tuple[str, ...] | None = None
    excluded: tuple[str, ...] = ()

    @property
    def is_filtered(self) -> bool:
        return self.allowed is not None or bool(self.excluded)


class _Joined:
    """Runs what is asked alike together: at most `max_flying` at once of a kind, the rest gathers."""

    def __init__(self, run: Callable[[Any, np.ndarray], Awaitable[Found]], max_flying: int) -> None:
        self._run, self._max_flying = run, max_flying
        self._waiting: dict[Hashable, deque[tuple[np.ndarray, asyncio.Future]]] = defaultdict(deque)
        self._n_flying: dict[Hashable, int] = defaultdict(int)
        self._tasks: set[asyncio.Task] = set()

    async def ask(self, kind: Hashable, queries: np.ndarray) -> Found:
        answer = asyncio.get_running_loop().create_future()
        self._waiting[kind].append((queries, answer))
        if self._n_flying[kind] < self._max_flying:
            self._start(kind)
        return await answer

    def _start(self, kind: Hashable) -> None:
        self._n_flying[kind] += 1
        task = asyncio.get_running_loop().create_task(self._fly(kind))
        self._tasks.add(task)  # the loop itself keeps no reference
        task.add_done_callback(self._tasks.discard)

    async def _fly(self, kind: Hashable) -> None:
        """Ask for what waits, again and again until nothing does."""
        try:
            while batch := self._next(kind):
                await self._answer(kind, batch)
        finally:
            self._n_flying[kind] -= 1
            if not self._n_flying[kind]:
                self._n_flying.pop(kind)
                self._waiting.pop(kind, None)

    def _next(self, kind: Hashable) -> list[tuple[np.ndarray, asyncio.Future]]:
        """At most MAX_JOINED queries that somebody still waits for."""
        waiting, n = self._waiting[kind], 0
        batch: list[tuple[np.ndarray, asyncio.Future]] = []
        while waiting and (not batch or n + len(waiting[0][0]) <= MAX_JOINED):
            queries, answer = waiting.popleft()
            if not answer.done():
                batch.append((queries, answer))
                n += len(queries)
        return batch

    async def _answer(self, kind: Hashable, batch: list[tuple[np.ndarray, asyncio.Future]]) -> None:
        try:
            scores, ids = await self._run(kind, np.concatenate([queries for queries, _ in batch]))
        except Exception as error:  # each of them is told; a fault of one is a fault of all
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(error)
            return
        start = 0
        for queries, answer in batch:
            end = start + len(queries)
            if not answer.done():
                answer.set_result((scores[start:end], ids[start:end]))
            start = end


class ServedIndex:
    """Any server with TensorFlow Serving's REST API: signatures `search`, `search_filtered` and `exact`.

    It is asked at /versions/N, so an answer and the documents that it names always belong together.
    """

    def __init__(self, url: str, model_name: str, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise InputError(f"--index_url {url}: not an address; wanted http://HOST:PORT")
        self.url = url.rstrip("/")
        self._path = f"{self.url}/v1/models/{quote(model_name, safe='')}"
        self._timeout = timeout_seconds
        self._settings: dict[int, dict[str, Any]] = {}
        self._joined = _Joined(self._ask_once, MAX_FLYING)
        self._opened: Any = None

    def uses(self, version: PublishedVersion) -> None:
        """Ask this version with the settings that it ships.

        Raises:
            InputError: it was built without the signatures that a gateway asks.
        """
        layer = version.manifest.get("layer")
        if layer not in (None, "tuned"):
            raise InputError(
                f"version {version.version} was built with index.layer {layer}, which has no signature "
                "`search`: build it with index.layer tuned"
            )
        self._settings[version.version] = version.manifest.get("settings") or {}

    async def available_versions(self) -> list[int]:
        """The versions that answer, newest first; [] while none does.

        Raises:
            ServingError: no server, or no such model.
        """
        status = await self._request("GET", self._path)
        rows = status.get("model_version_status", [])
        return sorted((int(row["version"]) for row in rows if row.get("state") == "AVAILABLE"), reverse=True)

    async def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        version: int,
        allowed: Sequence[str] | None = None,
        excluded: Sequence[str] | None = None,
    ) -> Found:
        """As IndexBackend has it; joined with what others ask alike."""
        if allowed is not None and not allowed:
            return _nothing(len(queries), k)  # an empty list would let everything by
        asked = _Asked(
            version,
            k,
            allowed=None if allowed is None else tuple(allowed),
            excluded=tuple(excluded or ()),
        )
        return await self._joined.ask(asked, np.ascontiguousarray(queries, np.float32))

    async def exact(self, queries: np.ndarray, k: int, *, version: int) -> Found:
        asked = _Asked(version, k, is_exact=True)
        return await self._joined.ask(asked, np.ascontiguousarray(queries, np.float32))

    async def close(self) -> None:
        if self._opened is not None:
            await self._opened.close()

    async def _ask_once(self, asked: _Asked, queries: np.ndarray) -> Found:
        answer = await self._request(
            "POST", f"{self._path}/versions/{asked.version}:predict", self._body(asked, queries)
        )
        return _padded(*_outputs(answer, self.url), asked.k)

    def _body(self, asked: _Asked, queries: np.ndarray) -> bytes:
        import orjson

        settings = self._settings.get(asked.version, {})
        inputs: dict[str, Any] = {"queries": queries, "k": asked.k}
        name = "exact" if asked.is_exact else "search_filtered" if asked.is_filtered else "search"
        if not asked.is_exact:
            # A version without a tree has neither number, and answers exactly whatever it is given.
            inputs["num_leaves_to_search"] = settings.get("num_leaves_to_search") or 1
            candidates = settings.get("num_reordering_candidates") or asked.k
            inputs["num_reordering_candidates"] = max(asked.k, candidates)
        if name == "search_filtered":
            inputs["allowed_document_ids"] = list(asked.allowed or ())
            inputs["excluded_document_ids"] = list(asked.excluded)
            inputs["minimum_score"] = -2.0  # below every dot product of unit vectors
        return orjson.dumps({"signature_name": name, "inputs": inputs}, option=orjson.OPT_SERIALIZE_NUMPY)

    async def _request(self, method: str, url: str, body: bytes | None = None) -> dict[str, Any]:
        import aiohttp

        try:
            try:
                return await self._once(method, url, body)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                if isinstance(error, aiohttp.ClientConnectorError):
                    raise  # nobody listens
                return await self._once(method, url, body)  # a kept connection that the server has left since
        except aiohttp.ClientConnectionError as error:
            raise ServingError(
                f"no index server answers at {self.url} ({_reason(error)}): start it with `make serve`, or "
                "give its address as --index_url",
                503,
            ) from None
        except TimeoutError:
            raise ServingError(
                f"the index server at {self.url} gave no answer in {self._timeout:g} s; is it overloaded?",
                503,
            ) from None
        except aiohttp.ClientError as error:
            raise ServingError(
                f"{url}: {_reason(error)}; is this TensorFlow Serving's REST API?", 502
            ) from None

    async def _once(self, method: str, url: str, body: bytes | None) -> dict[str, Any]:
        async with self._session().request(method, url, data=body, allow_redirects=False) as response:
            return _document(url, response.status, await response.read())

    def _session(self) -> Any:
        if self._opened is None:
            import aiohttp

            self._opened = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=self._timeout, sock_connect=CONNECT_SECONDS),
                connector=aiohttp.TCPConnector(limit=0),  # what may be under way is bounded above
                auto_decompress=True,
            )
        return self._opened


class RowsIndex:
    """A version's rows in this process: the exact dot product, no index server.

    Args:
        rows: float32 (n_rows, dim), unit length; not copied where a document's rows are neighbours.
        ids: the document of each row; one in several passages scores as the best of them.
        device: "cpu" for NumPy; "cuda" for PyTorch, with the rows on that device.

    Raises:
        InputError: more rows than `max_rows`.
    """

    def __init__(
        self, rows: np.ndarray, ids: Sequence[str], *, device: str = "cpu", max_rows: int = MAX_ROWS
    ) -> None:
        if len(rows) > max_rows:
            raise InputError(
                f"{len(rows)} rows are too many to search in one process, wanted at most {max_rows}: start "
                "an index server (make serve) and leave --in_process out"
            )
        numbers: dict[str, int] = {}
        owners = np.array([numbers.setdefault(each, len(numbers)) for each in ids], np.int64)
        self._numbers, self._ids = numbers, list(numbers)
        # Rows of one document side by side, so that the best of each is one pass.
        if (np.diff(owners) < 0).any():
            order = np.argsort(owners, kind="stable")
            rows, owners = rows[order], owners[order]
        near = _NearByNumPy if device == "cpu" else partial(_NearByTorch, device=device)
        self._near: _Near = near(np.ascontiguousarray(rows, np.float32), owners, len(numbers))
        self._thread = ThreadPoolExecutor(1, "rows")
        self._joined = _Joined(self._in_thread, max_flying=1)

    def uses(self, version: PublishedVersion) -> None: ...

    async def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        version: int,
        allowed: Sequence[str] | None = None,
        excluded: Sequence[str] | None = None,
    ) -> Found:
        """As IndexBackend has it; the version is the one whose rows these are."""
        asked = _Asked(
            version,
            k,
            allowed=None if allowed is None else tuple(allowed),
            excluded=tuple(excluded or ()),
        )
        return await self._joined.ask(asked, np.asarray(queries, np.float32))

    async def exact(self, queries: np.ndarray, k: int, *, version: int) -> Found:
        return await self.search(queries, k, version=version)

    async def close(self) -> None:
        self._thread.shutdown(wait=False)

    async def _in_thread(self, asked: _Asked, queries: np.ndarray) -> Found:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._best, asked, queries)

    def _best(self, asked: _Asked, queries: np.ndarray) -> Found:
        if not self._ids:
            return _nothing(len(queries), asked.k)
        k = min(asked.k, len(self._ids))
        scores, places = self._near.best(queries, k, self._passes(asked) if asked.is_filtered else None)
        ids = [
            [self._ids[n] if score > NO_SCORE else "" for n, score in zip(line, its, strict=True)]
            for line, its in zip(places.tolist(), scores.tolist(), strict=True)
        ]
        return _padded(scores, ids, asked.k)

    def _passes(self, asked: _Asked) -> np.ndarray:
        """bool (n_documents,): what the filter lets by."""
        passes = np.full(len(self._ids), asked.allowed is None)
        passes[[self._numbers[each] for each in asked.allowed or () if each in self._numbers]] = True
        passes[[self._numbers[each] for each in asked.excluded if each in self._numbers]] = False
        return passes


class _Near(Protocol):
    """Documents by the best of their rows, which are neighbours: `owners`, int64 (n_rows,), ascend."""

    def best(self, queries: np.ndarray, k: int, passes: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The k best documents of each query; of equal scores the earlier document comes first.

        Args:
            queries: float32 (n, dim).
            k: from 1 to the number of documents.
            passes: bool (n_documents,), what may be found; None: everything.

        Returns:
            scores float32 (n, k), NO_SCORE of what may not be found, and the documents' numbers int64 (n, k).
        """


class _NearByNumPy:
    def __init__(self, rows: np.ndarray, owners: np.ndarray, n_documents: int) -> None:
        from threadpoolctl import ThreadpoolController

        self._rows, self._blas = rows, ThreadpoolController()
        in_passages = n_documents < len(rows)
        self._firsts = np.searchsorted(owners, np.arange(n_documents)) if in_passages else None

    def best(self, queries: np.ndarray, k: int, passes: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """As _Near has it."""
        # On one core: for a query or two, waking the others takes many times what they save.
        with self._blas.limit(limits=1, user_api="blas"):
            scores = queries @ self._rows.T
        if self._firsts is not None:
            scores = np.maximum.reduceat(scores, self._firsts, axis=1)
        if passes is not None:
            scores[:, ~passes] = NO_SCORE
        kth = scores.shape[1] - k
        least = np.partition(scores, kth, axis=1)[:, kth]
        places = np.stack([_first(line, score, k) for line, score in zip(scores, least, strict=True)])
        return np.take_along_axis(scores, places, axis=1), places


def _first(scores: np.ndarray, least: float, k: int) -> np.ndarray:
    """Places of the k highest of scores (n,), the last of which is `least`; equal ones by place."""
    above = np.flatnonzero(scores > least)
    tied = np.flatnonzero(scores == least)[: k - len(above)]
    return np.concatenate([above[np.argsort(-scores[above], kind="stable")], tied])


class _NearByTorch:
    """The same on a device of PyTorch's: rows and scores stay there, only the k best leave it."""

    def __init__(self, rows: np.ndarray, owners: np.ndarray, n_documents: int, device: str) -> None:
        import torch

        self._device, self._n_documents = device, n_documents
        self._rows = torch.from_numpy(rows).to(device)
        self._owners = torch.from_numpy(owners).to(device) if n_documents < len(rows) else None

    def best(self, queries: np.ndarray, k: int, passes: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """As _Near has it."""
        import torch

        scores = torch.from_numpy(queries).to(self._device) @ self._rows.T
        if self._owners is not None:
            none = scores.new_full((len(scores), self._n_documents), NO_SCORE)
            scores = none.scatter_reduce(1, self._owners.expand(len(scores), -1), scores, "amax")
        if passes is not None:
            scores = scores.masked_fill(~torch.from_numpy(passes).to(self._device), NO_SCORE)
        least = scores.topk(k, dim=1).values[:, -1:]
        above, tied = scores > least, scores == least
        n_left = k - above.sum(dim=1, keepdim=True)
        chosen = above | (tied & (tied.cumsum(dim=1) <= n_left))  # topk alone takes any of those that tie
        places = chosen.nonzero()[:, 1].reshape(len(scores), k)
        found, order = scores.gather(1, places).sort(dim=1, descending=True, stable=True)
        return found.cpu().numpy(), places.gather(1, order).cpu().numpy()


def _document(url: str, status: int, body: bytes) -> dict[str, Any]:
    """An answer's JSON object.

    Raises:
        VersionGoneError: 404.
        ServingError: 502 for another refusal, or for what is no JSON object; 503 where that is the answer.
    """
    import orjson

    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        document = None
    if status != 200:
        said = document.get("error") if isinstance(document, dict) else None
        what = " ".join(str(said).split())[:300] if said else "is this TensorFlow Serving's REST API?"
        if status == 404:
            raise VersionGoneError(f"{url}: the index server answered 404: {what}", 503)
        kept = status if status in (429, 503) else 502
        raise ServingError(f"{url}: the index server answered {status}: {what}", kept)
    if not isinstance(document, dict):
        raise ServingError(f"{url}: got no JSON object; is this TensorFlow Serving's REST API?", 502)
    return document


def _outputs(answer: dict[str, Any], url: str) -> tuple[np.ndarray, list[list[str]]]:
    outputs = answer.get("outputs")
    if not isinstance(outputs, dict) or not {"scores", "document_ids"} <= outputs.keys():
        raise ServingError(f"{url}: the answer has no scores and document_ids: is this an index?", 502)
    return np.asarray(outputs["scores"], np.float32), outputs["document_ids"]


def _padded(scores: np.ndarray, ids: list[list[str]], k: int) -> Found:
    """An index of fewer than k documents answers with fewer columns."""
    missing = k - scores.shape[1]
    if missing > 0:
        scores = np.pad(scores, ((0, 0), (0, missing)), constant_values=NO_SCORE)
        ids = [[*line, *[""] * missing] for line in ids]
    return scores, ids


def _nothing(n: int, k: int) -> Found:
    return np.full((n, k), NO_SCORE, np.float32), [[""] * k for _ in range(n)]


def _reason(error: BaseException) -> str:
    cause = getattr(error, "os_error", None) or error
    return getattr(cause, "strerror", None) or " ".join(str(cause).split()) or type(error).__name__
