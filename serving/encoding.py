"""Texts to vectors for serving, computed in this process: together, by one thread, and remembered.

Encoding             what a searcher needs
 ├── LocalEncoding   a model in this process: one thread computes, a cache stands in front
 └── RemoteEncoding  another server, in remote_encoding.py
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast

import numpy as np

from serving.errors import ServingError

if TYPE_CHECKING:
    from pipeline.encoder import Encoder

log = logging.getLogger("serving")

TASKS: tuple[Literal["query"], Literal["document"]] = ("query", "document")
PRECISIONS = ("float32", "mixed", "bfloat16")
ENCODER_HEADER = "x-encoder-sha256"  # of an encoder server's answers: which model they are by

BATCH_TOKENS = {"cpu": 2048, "cuda": 32_768}  # padding included: the encode stage's own
ROUND_SECONDS = 0.1  # of what is computed at one go: so long a typed query waits for others' documents
LEAST_ROUND = 512  # tokens, guessed: with fewer at one go, calling the model costs more than the texts do
LEARNED = 0.3  # of the speed of the last full round, in what is remembered of it
LEAST_TOKENS = 256  # of a batch on a core: with fewer, calling the layers costs more than they do
MAX_QUEUED = 1000  # texts
PART_TEXTS = 256  # of those that are asked for in this process, which wait at once
CACHE_BYTES = 64 * 2**20
ENTRY_BYTES = 600  # of a cached vector beside its numbers and its text: objects, table, order
LETTERS_A_TOKEN = 4  # in most languages; a guess, for how texts are shared out before they are tokenised
LETTERS_READ = 100  # a token; what stands behind them is not tokenised: a word of millions takes seconds
NO_LIMIT = 2**20  # tokens of a text, where the model has none of its own
FEW_LETTERS = 2000  # of a lone text that is encoded at once; of a longer one only the beginning is read
STUCK_SECONDS = 60.0  # of one round: whoever takes longer will not come back
GRACE_SECONDS = 20.0  # for what waits when the server ends


class EncodingError(ServingError):
    """A text that got no vector.

    Attributes:
        status: of the HTTP answer that says so.
        kind: Text Embeddings Inference's word for it, its `error_type`.
    """

    kind = "backend"
    default_status = 424

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message, status or self.default_status)


class FullError(EncodingError):
    """Too many texts wait already."""

    kind, default_status = "overloaded", 429


class TooLongError(EncodingError):
    """More tokens than the model reads, or more texts than one request may hold."""

    kind, default_status = "validation", 413


class WrongRequestError(EncodingError):
    """Something was asked for that there is not, such as a prompt of another name."""

    kind, default_status = "validation", 422


class UnavailableError(EncodingError):
    """Nobody is there to encode, or not any more."""

    kind, default_status = "unhealthy", 503


class OtherEncoderError(EncodingError):
    """The server now answers by another model than the one it was opened with."""

    kind, default_status = "unhealthy", 409


class Encoding(Protocol):
    """Vectors of texts, by one model.

    Attributes:
        encoder_sha256: of that model's files, as a version's manifest names it; None where a server does not
            say.
        dim: width of a vector.
    """

    encoder_sha256: str | None
    dim: int

    async def queries(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of what is searched for, float32 (n_texts, dim), unit length.

        Raises:
            EncodingError: its `status` and message are those to answer with.
        """

    async def documents(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of what can be found; else as `queries`."""

    def tokens(self, text: str) -> int | None:
        """Tokens of a text alone, uncut: no prompt, no special tokens. Any thread may ask.

        None where a server keeps the tokenizer.
        """

    async def close(self) -> None:
        """Finish what waits, take nothing more."""


class Row(NamedTuple):
    """One text's vector, float32 (dim,), its tokens that were read, and whether it has more."""

    vector: np.ndarray
    n_tokens: int
    is_cut: bool


class Rows(NamedTuple):
    """Vectors float32 (n, dim), unit length; tokens read of each text, int (n,); is_cut bool (n,)."""

    vectors: np.ndarray
    n_tokens: np.ndarray
    is_cut: np.ndarray


class Round(NamedTuple):
    """What was encoded at one go, for whoever counts: `seconds` of computing, `waited` of each request."""

    n_texts: int
    n_tokens: int
    seconds: float
    waited: list[float]


class Computing(Protocol):
    """What turns texts into vectors; used by one thread at a time, but for `tokens` and `text_of`.

    Attributes:
        ways: prompt name -> key of how texts are encoded with it: equal keys, equal vectors; None: no name.
        max_tokens: that are read of a text.
        round_tokens: that may be computed at one go.
        described: what a client may know of the model, as JSON holds it.
    """

    dim: int
    ways: Mapping[str | None, str]
    max_tokens: int
    round_tokens: int
    described: Mapping[str, Any]

    def rows(self, texts: Sequence[str], way: str) -> Rows:
        """The texts' vectors; a text that is too long is cut."""

    def tokens(self, text: str) -> int | None:
        """As `Encoding.tokens`."""

    def text_of(self, ids: Sequence[int]) -> str:
        """The text that these tokens of the model's are of."""


class LocalEncoding:
    """A model in this process, for the coroutines of one event loop.

    Requests that come while the thread computes are encoded together as soon as it is free: load itself
    makes the batches, and a lone request waits for nobody. What is taken at one go is shared out among the
    requests and is as much as takes about ROUND_SECONDS, which is learned, and queries and documents take
    turns: a typed query never waits until somebody's thousand documents are done.

    Attributes:
        computing: the model.
        on_round: told of every round, on the event loop.
    """

    def __init__(
        self,
        computing: Computing,
        *,
        encoder_sha256: str | None = None,
        max_queued: int = MAX_QUEUED,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Start the thread.

        Args:
            max_queued: texts that wait; a request with more than there is room for is refused, unless
                nothing waits.
            cache_bytes: of memory for vectors of texts that were asked for before; 0: none.
        """
        self.computing, self.encoder_sha256, self.dim = computing, encoder_sha256, computing.dim
        self.max_queued = max_queued
        self.cache = VectorCache(cache_bytes)
        self.on_round: Callable[[Round], None] = lambda _: None
        self._changed = threading.Condition()  # of all below
        self._lines: OrderedDict[str, deque[_Request]] = OrderedDict()  # by way, the next one first
        self._n_queued = 0
        self._room = min(LEAST_ROUND, computing.round_tokens)  # guessed tokens of a round
        self._is_closed = False
        self._computing_since: float | None = None
        self._thread = threading.Thread(target=self._work, name="encode", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        device: str = "auto",
        precision: str = "auto",
        batch_tokens: int | None = None,
        max_queued: int = MAX_QUEUED,
        cache_bytes: int = CACHE_BYTES,
    ) -> LocalEncoding:
        """Load a model folder, and compute once with it.

        Args:
            device: "cpu", "cuda" or "auto".
            precision: "float32", "mixed", "bfloat16", or "auto": what the newest version beside the folder
                (`encoders/<sha256>` and `models/*/*`) was encoded at, where this machine is made for it.
            batch_tokens: of a batch at most, padding included; None: by the device.

        Raises:
            InputError: it is no model that loads.
        """
        from pipeline.artifacts import encoder_sha256, file_hashes
        from pipeline.encoder import Encoder, locate  # loads PyTorch when it opens: seconds

        folder = locate(str(folder))
        chosen = chosen_precision(folder, device) if precision == "auto" else precision
        computing = EncoderComputing(Encoder.open(folder, device, chosen), batch_tokens)
        computing.warm_up()
        sha256 = encoder_sha256(file_hashes(folder))
        return cls(computing, encoder_sha256=sha256, max_queued=max_queued, cache_bytes=cache_bytes)

    async def queries(self, texts: Sequence[str]) -> np.ndarray:
        """As `Encoding.queries`; a text that is too long is cut, as in the pipeline."""
        return await self._in_parts(texts, "query")

    async def documents(self, texts: Sequence[str]) -> np.ndarray:
        """As `Encoding.documents`; a text that is too long is cut, as in the pipeline."""
        return await self._in_parts(texts, "document")

    async def encoded(
        self, texts: Sequence[str], prompt_name: str | None = None, *, truncate: bool = True
    ) -> Rows:
        """The texts' vectors. When the caller is cancelled, what has not begun is not encoded.

        Args:
            prompt_name: "query", "document" or another of the model's prompts; None: its default one.
            truncate: cut a text that is too long; False: refuse it.

        Raises:
            EncodingError: FullError, TooLongError, WrongRequestError, UnavailableError, or a fault.
        """
        way = self._way(prompt_name)
        rows = [self.cache.get((way, text)) for text in texts]
        missing = [n for n, row in enumerate(rows) if row is None]
        if missing:
            for n, row in zip(missing, await self._ask([texts[n] for n in missing], way), strict=True):
                rows[n] = row
        found = cast("list[Row]", rows)
        if not truncate:
            self._refuse_cut(found)
        vectors = np.stack([row.vector for row in found]) if found else np.zeros((0, self.dim), np.float32)
        return Rows(vectors, np.array([row.n_tokens for row in found], int), _flags(found))

    def tokens(self, text: str) -> int | None:
        """As `Encoding.tokens`."""
        return self.computing.tokens(text)

    @property
    def n_queued(self) -> int:
        """Texts that wait."""
        return self._n_queued

    @property
    def is_healthy(self) -> bool:
        """Whether the thread runs, takes texts and comes back from them."""
        since = self._computing_since
        is_stuck = since is not None and time.monotonic() - since > STUCK_SECONDS
        return self._thread.is_alive() and not self._is_closed and not is_stuck

    async def close(self) -> None:
        """Finish what waits, refuse what comes and what is not done in time."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join, GRACE_SECONDS)
        with self._changed:
            left = [request for line in self._lines.values() for request in line]
            self._lines.clear()
            self._n_queued = 0
        for request in left:
            request.fail(UnavailableError(_CLOSED))

    # On the event loop

    async def _in_parts(self, texts: Sequence[str], prompt_name: str) -> np.ndarray:
        """Vectors of any number of texts: ten thousand at once would find the queue full."""
        starts = range(0, max(1, len(texts)), PART_TEXTS)
        parts = [await self.encoded(texts[n : n + PART_TEXTS], prompt_name) for n in starts]
        return np.concatenate([part.vectors for part in parts])

    def _way(self, prompt_name: str | None) -> str:
        ways = self.computing.ways
        if prompt_name not in ways:
            known = ", ".join(sorted(name for name in ways if name is not None))
            raise WrongRequestError(f"prompt_name is {prompt_name!r}, wanted one of the model's: {known}")
        return ways[prompt_name]

    def _refuse_cut(self, rows: Sequence[Row]) -> None:
        cut = [n for n, row in enumerate(rows) if row.is_cut]
        if cut:
            raise TooLongError(
                f"text {cut[0] + 1} of {len(rows)} has more than the {self.computing.max_tokens} tokens that "
                "the model reads: shorten it, or leave truncate out to have its beginning encoded"
            )

    async def _ask(self, texts: list[str], way: str) -> list[Row]:
        refuse_half_letters(texts)
        request = _Request(texts, way, asyncio.get_running_loop())
        with self._changed:
            self._refuse_if_full(len(texts))
            self._lines.setdefault(way, deque()).append(request)
            self._n_queued += len(texts)
            self._changed.notify()
        try:
            return await request.future
        except asyncio.CancelledError:
            self._forget(request)
            raise

    def _refuse_if_full(self, n_texts: int) -> None:
        if self._is_closed:
            raise UnavailableError(_CLOSED)
        if not self._thread.is_alive():
            raise UnavailableError("the thread that encodes has ended: start the server again")
        if self._n_queued and self._n_queued + n_texts > self.max_queued:
            raise FullError(
                f"{self._n_queued} texts wait to be encoded, at most {self.max_queued} may: ask again later"
            )

    def _forget(self, request: _Request) -> None:
        with self._changed:
            line = self._lines.get(request.way)
            if line is not None and request in line:
                line.remove(request)
                self._n_queued -= request.n_left
                if not line:
                    del self._lines[request.way]

    def _deliver(self, parts: Sequence[_Part], outcomes: Sequence[_Outcome], done: Round) -> None:
        for (request, start, stop), outcome in zip(parts, outcomes, strict=True):
            if isinstance(outcome, Exception):
                self._forget(request)
                request.fail(outcome)
                continue
            for text, row in zip(request.texts[start:stop], outcome, strict=True):
                self.cache.put((request.way, text), row)
            request.add(outcome)
        self.on_round(done)

    # On the thread

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._lines and not self._is_closed:
                    self._changed.wait()
                if not self._lines:
                    return
                parts, cost = self._take()
                self._computing_since = time.monotonic()
            self._encode(parts)
            self._learn(cost, time.monotonic() - self._computing_since)
            self._computing_since = None
            parts.clear()  # else an idle thread keeps its last texts

    def _take(self) -> tuple[list[_Part], int]:
        """What is encoded next, of each request its share, and the guessed tokens; all of one way."""
        way, line = self._lines.popitem(last=False)
        parts, room = [], self._room
        share = room // len(line)
        for request in list(line):
            start, cost = request.n_taken, 0
            while request.n_left and (cost == 0 or cost < share):
                cost += self._cost(request.texts[request.n_taken])
                request.n_taken += 1
            parts.append(_Part(request, start, request.n_taken))
            if not request.n_left:
                line.remove(request)
            room -= cost
            if room <= 0:
                break
        self._n_queued -= sum(part.stop - part.start for part in parts)
        if line:
            self._lines[way] = line  # behind the other ways
        return parts, self._room - room

    def _learn(self, cost: int, seconds: float) -> None:
        """How much is computed in ROUND_SECONDS, from a round that was not much less than that."""
        if 2 * cost >= self._room:
            room = (1 - LEARNED) * self._room + LEARNED * cost * ROUND_SECONDS / max(seconds, 1e-6)
            self._room = int(min(max(room, LEAST_ROUND), self.computing.round_tokens))

    def _cost(self, text: str) -> int:
        """Tokens, guessed; rather too many, so that a round is rather too short."""
        return min(2 * len(text) // LETTERS_A_TOKEN + LETTERS_A_TOKEN, self.computing.max_tokens)

    def _encode(self, parts: list[_Part]) -> None:
        started = time.monotonic()
        outcomes = self._outcomes(parts)
        seconds = time.monotonic() - started
        n_tokens = sum(row.n_tokens for rows in outcomes if isinstance(rows, list) for row in rows)
        waited = [started - part.request.asked for part in parts if not part.start]
        done = Round(sum(part.stop - part.start for part in parts), n_tokens, seconds, waited)
        # RuntimeError: the loop has ended, and with it whoever asked.
        with contextlib.suppress(RuntimeError):
            parts[0].request.loop.call_soon_threadsafe(self._deliver, list(parts), outcomes, done)

    def _outcomes(self, parts: Sequence[_Part]) -> list[_Outcome]:
        texts = [text for part in parts for text in part.request.texts[part.start : part.stop]]
        try:
            rows = iter(_split(self.computing.rows(texts, parts[0].request.way)))
            return [[next(rows) for _ in range(part.start, part.stop)] for part in parts]
        except Exception as error:
            if len(parts) > 1:  # one request's text must not spoil the others'
                return [outcome for part in parts for outcome in self._outcomes([part])]
            log.warning("texts could not be encoded", exc_info=not isinstance(error, EncodingError))
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            return [error if isinstance(error, EncodingError) else EncodingError(f"not encoded: {reason}")]


_CLOSED = "the server is ending and takes no more texts: ask another one, or again later"


class _Request:
    """The texts that one caller waits for."""

    def __init__(self, texts: list[str], way: str, loop: asyncio.AbstractEventLoop) -> None:
        self.texts, self.way, self.loop = texts, way, loop
        self.future: asyncio.Future[list[Row]] = loop.create_future()
        self.asked = time.monotonic()
        self.n_taken = 0
        self._rows: list[Row] = []

    @property
    def n_left(self) -> int:
        return len(self.texts) - self.n_taken

    def add(self, rows: list[Row]) -> None:
        """Rows come in the order of the texts: one round after the other."""
        self._rows += rows
        if len(self._rows) == len(self.texts) and not self.future.done():
            self.future.set_result(self._rows)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class _Part(NamedTuple):
    """Texts of a request that are encoded in one round: from `start` to `stop`."""

    request: _Request
    start: int
    stop: int


_Outcome = list[Row] | Exception


def _split(rows: Rows) -> list[Row]:
    """A row each; a vector is a copy, so that one that is kept does not keep the others.

    Raises:
        EncodingError: a vector with something else than numbers in it.
    """
    if not np.isfinite(rows.vectors).all():
        raise EncodingError("the model gave a vector that is not finite: it computes wrongly on this machine")
    each = zip(rows.vectors, rows.n_tokens.tolist(), rows.is_cut.tolist(), strict=True)
    return [Row(vector.copy(), n_tokens, is_cut) for vector, n_tokens, is_cut in each]


def _flags(rows: Sequence[Row]) -> np.ndarray:
    return np.array([row.is_cut for row in rows], bool)


def refuse_half_letters(texts: Iterable[str]) -> None:
    """JSON's \\ud800 alone is half a letter, which no tokenizer reads."""
    for text in texts:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                half = f"U+{ord(text[error.start]):04X}"
                raise WrongRequestError(
                    f"letter {error.start + 1} of a text is {half}, half of a surrogate pair: send UTF-8"
                ) from None


class VectorCache:
    """Rows of texts by (way, text), the least lately used forgotten first. For one thread.

    Attributes:
        max_bytes: that all entries together may take.
        n_bytes: that they take.
        n_hits, n_misses: look-ups that found a row, and that found none.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.n_bytes = self.n_hits = self.n_misses = 0
        self._rows: OrderedDict[tuple[str, str], Row] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: tuple[str, str]) -> Row | None:
        """The row, which is now the latest used."""
        row = self._rows.get(key)
        if row is None:
            self.n_misses += 1
            return None
        self.n_hits += 1
        self._rows.move_to_end(key)
        return row

    def put(self, key: tuple[str, str], row: Row) -> None:
        """Keep a row; one that is larger than the cache is not kept."""
        if key in self._rows or self._bytes(key, row) > self.max_bytes:
            return
        self._rows[key] = row
        self.n_bytes += self._bytes(key, row)
        while self.n_bytes > self.max_bytes:
            self.n_bytes -= self._bytes(*self._rows.popitem(last=False))

    @staticmethod
    def _bytes(key: tuple[str, str], row: Row) -> int:
        return ENTRY_BYTES + sys.getsizeof(key[1]) + row.vector.nbytes


class EncoderComputing:
    """The pipeline's own encoder. Texts are batched by tokens, and on a CPU each core has a batch."""

    def __init__(self, encoder: Encoder, batch_tokens: int | None = None) -> None:
        model = encoder.model
        self.dim = encoder.dim
        self.device = model.device.type
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(self.device, BATCH_TOKENS["cpu"])
        self.n_cores = len(os.sched_getaffinity(0)) if self.device == "cpu" else 1
        self.round_tokens = self.n_cores * self.batch_tokens
        self.max_tokens = int(min(model.max_seq_length or NO_LIMIT, NO_LIMIT))
        encoder.devices = []  # a process for each GPU is for millions of texts
        self._encoder = encoder
        self._prompts: dict[str, str] = {name: prompt or "" for name, prompt in model.prompts.items()}
        self._default = model.default_prompt_name
        self._counting: Any = None
        names = (*TASKS, *self._prompts, None)
        self.ways: Mapping[str | None, str] = {name: self._way(name) for name in names}
        self.described: Mapping[str, Any] = self._described()

    def warm_up(self) -> None:
        """Pay for the first call of each kind now: memory, kernels, the second tokenizer."""
        self.rows(["a"], "query")
        self.rows(["a", "b c"], "query")

    def rows(self, texts: Sequence[str], way: str) -> Rows:
        """As `Computing.rows`."""
        n_letters = self.max_tokens * LETTERS_READ
        found = self._rows([text[:n_letters] for text in texts], way)
        return found._replace(is_cut=found.is_cut | np.array([len(text) > n_letters for text in texts]))

    def _rows(self, texts: Sequence[str], way: str) -> Rows:
        if way not in TASKS:
            return self._by_library(texts, way)
        task = cast("Literal['query', 'document']", way)
        if len(texts) == 1 and len(texts[0]) <= FEW_LETTERS:
            encode = self._encoder.queries if task == "query" else self._encoder.documents
            return self._counted(encode(texts), texts, self._prompt(way))
        seen: list[Any] = []
        self._encoder.batch_tokens = self._tokens_of_a_batch(texts)
        vectors = np.concatenate(list(self._encoder.windows([texts], task, seen.append)))
        if not seen:  # a model whose texts the library tokenises
            return self._counted(vectors, texts, self._prompt(way))
        return Rows(vectors, seen[0].lengths[seen[0].texts], seen[0].is_cut[seen[0].texts])

    def tokens(self, text: str) -> int | None:
        """As `Encoding.tokens`; safe beside `rows`, as the counter is made by `warm_up` and never changed."""
        return self._count(text, special=False)

    def text_of(self, ids: Sequence[int]) -> str:
        """As `Computing.text_of`, without special tokens.

        Raises:
            WrongRequestError: a number that is no token.
        """
        counting = self._counter()
        if counting is None:
            raise WrongRequestError("this model takes no tokens: send texts")
        size = counting.get_vocab_size()
        wrong = [number for number in ids if not 0 <= number < size]
        if wrong:
            raise WrongRequestError(f"token {wrong[0]}: the model has tokens 0 to {size - 1}: send texts")
        return str(counting.decode(list(ids), skip_special_tokens=True))

    def _way(self, name: str | None) -> str:
        """The task that encodes alike, because its prompt is the same; else the name itself."""
        if name in TASKS:
            return str(name)
        shown = self._default if name is None else name
        prompt = self._prompts.get(shown or "", "")
        if not self._is_routed():  # else each task has a model of its own
            for task in TASKS:
                if self._prompts.get(task) == prompt:
                    return task
        return f"prompt {name}" if name else "prompt"

    def _is_routed(self) -> bool:
        from pipeline.encoder import transformers_of

        return len(transformers_of(self._encoder.model)) > 1

    def _prompt(self, way: str) -> str:
        names = [way] if way in TASKS else [way.removeprefix("prompt").removeprefix(" ")]
        if names == [""] or names[0] not in self._prompts:
            names = [self._default or ""]
        return self._prompts.get(names[0], "")

    def _by_library(self, texts: Sequence[str], way: str) -> Rows:
        """With a prompt that neither queries nor documents have."""
        from pipeline.encoder import unit_length

        name = way.removeprefix("prompt").removeprefix(" ") or None
        vectors: Any = self._encoder.model.encode(list(texts), prompt_name=name, show_progress_bar=False)
        return self._counted(unit_length(np.asarray(vectors, np.float32)), texts, self._prompt(way))

    def _counted(self, vectors: np.ndarray, texts: Sequence[str], prompt: str) -> Rows:
        counts = np.array([self._count(prompt + text) or 0 for text in texts])
        return Rows(vectors, np.minimum(counts, self.max_tokens), counts > self.max_tokens)

    def _count(self, text: str, *, special: bool = True) -> int | None:
        counting = self._counter()
        return None if counting is None else len(counting.encode(text, add_special_tokens=special).ids)

    def _counter(self) -> Any:
        """A copy of the model's tokenizer that never cuts: the thread sets the other anew at each call."""
        if self._counting is None:
            tokenizer = self._encoder.model.tokenizer
            backend: Any = getattr(tokenizer, "backend_tokenizer", tokenizer)
            if not hasattr(backend, "to_str"):
                return None
            copy = type(backend).from_str(backend.to_str())
            copy.no_truncation()
            copy.no_padding()
            self._counting = copy
        return self._counting

    def _tokens_of_a_batch(self, texts: Sequence[str]) -> int:
        """So many that every core gets a batch, where that is worth a call of its own."""
        guessed = sum(min(len(text) // LETTERS_A_TOKEN + LETTERS_A_TOKEN, self.max_tokens) for text in texts)
        return min(self.batch_tokens, max(LEAST_TOKENS, math.ceil(guessed / self.n_cores)))

    def _described(self) -> dict[str, Any]:
        return {
            "prompts": self._prompts,
            "default_prompt_name": self._default,
            "precision": self._encoder.precision,
            "device": self.device,
            "max_batch_tokens": self.batch_tokens,
            "pooling": _pooling(self._encoder.model),
        }


def _pooling(model: Any) -> str | None:
    """The pooling of a model that has one, "mean" as a rule."""
    modes = [getattr(module, "pooling_mode", None) for module in model.modules()]
    named = [mode for mode in modes if mode]
    return str(named[0]) if named else None


def chosen_precision(folder: Path, device: str) -> str:
    """What the encode stage chose for the newest version by the encoder in `folder`; else "float32".

    Float32 too where this machine does not multiply bfloat16 itself: what is faster there is slower here.

    Args:
        folder: `encoders/<sha256>`, beside `models/<model_name>/<version>`.
        device: "cpu", "cuda" or "auto".
    """
    from pipeline.encoder import device_type, has_bfloat16

    versions = [path for path in folder.parent.parent.glob("models/*/*") if path.name.isdecimal()]
    for version in sorted(versions, key=lambda path: int(path.name), reverse=True):
        extra = version / "assets.extra"
        try:
            manifest = json.loads((extra / "manifest.json").read_text(encoding="utf-8"))
            if manifest["encoder_sha256"] != folder.name:
                continue
            report = json.loads((extra / "report.json").read_text(encoding="utf-8"))
            found = report["encoding"]["precision"]
        except (OSError, ValueError, KeyError, TypeError):  # of an earlier format, or no version of ours
            continue
        if found in PRECISIONS and found != "float32" and has_bfloat16(device_type(device)):
            return str(found)
        return "float32"
    return "float32"
