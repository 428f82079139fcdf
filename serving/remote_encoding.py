"""Texts to vectors by another server: this project's, Text Embeddings Inference, or one of OpenAI's shape."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from serving.encoding import (
    ENCODER_HEADER,
    EncodingError,
    FullError,
    OtherEncoderError,
    TooLongError,
    UnavailableError,
    WrongRequestError,
    refuse_half_letters,
)

if TYPE_CHECKING:
    import aiohttp

DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # names that models give what stands before a document
TEI_BATCH = 32  # texts that Text Embeddings Inference takes at once, where it does not say
OPENAI_BATCH = 128  # theirs takes 2,048; servers of its shape often less
RETRY_SECONDS = 0.1  # until a server that was not reached is tried once more
APIS = ("embed", "openai")
LENGTHS = {"embed": (0.5, 2.0), "openai": (1e-3, 1e3)}  # of a vector; the first is asked for unit length
NUMBER_BYTES = 32  # of JSON, at most
MOST_DIM = 16_384  # of a server whose width is not known yet
ENVELOPE_BYTES = 2**16  # of an answer beside its numbers


class RemoteEncoding:
    """Asks an encoder server. Made by `open`, for the coroutines of one event loop.

    Attributes:
        encoder_sha256: as the server says it; None: it does not.
        dim: width of its vectors.
        url: its address, without a path.
    """

    encoder_sha256: str | None
    dim: int

    def __init__(
        self, session: aiohttp.ClientSession, url: str, api: str, model: str, timeout_seconds: float
    ) -> None:
        self.url = url.rstrip("/")
        self.encoder_sha256, self.dim = None, 0
        self._session, self._api, self._model, self._timeout = session, api, model, timeout_seconds
        self._max_texts = OPENAI_BATCH if api == "openai" else TEI_BATCH
        self._prompts: dict[str, str | None] = {"query": None, "document": None}  # names that it knows
        self._in_front = {"query": "", "document": ""}  # of a text, where it knows no name

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        encoder_api: str = "embed",
        model: str | None = None,
        api_key: str | None = None,
        timeout_seconds: float = 30.0,
        dim: int | None = None,
        prompts: Mapping[str, str] | None = None,
    ) -> RemoteEncoding:
        """Ask the server who it is, and for one vector.

        Args:
            url: http://HOST:PORT, or what stands before /embed or /v1/embeddings.
            encoder_api: "embed" (Text Embeddings Inference's, and this project's) or "openai".
            model: the name that an OpenAI-shaped server wants.
            api_key: sent as Authorization: Bearer.
            dim: the width that its vectors must have; None: any.
            prompts: what the index's model has before a "query" and a "document"; sent with the text where
                the server knows no prompt of that name, as those of OpenAI's shape never do.

        Raises:
            EncodingError: it cannot be reached, answers something else, or has another width.
        """
        import aiohttp

        if encoder_api not in APIS:
            raise WrongRequestError(f"--encoder_api is {encoder_api}, wanted one of {', '.join(APIS)}")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        session = aiohttp.ClientSession(
            headers={"Content-Type": "application/json", **headers},
            timeout=aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=min(5.0, timeout_seconds)),
            connector=aiohttp.TCPConnector(limit=0),  # whoever calls bounds how many there are
        )
        self = cls(session, url, encoder_api, model or "default", timeout_seconds)
        try:
            await self._introduce(prompts or {})
            if dim not in (None, self.dim):
                raise EncodingError(
                    f"{self.url}: its vectors have {self.dim} numbers, wanted {dim}: it runs another model "
                    "than the index was made with; start it with the version's own encoder",
                    502,
                )
        except BaseException:
            await session.close()
            raise
        return self

    async def queries(self, texts: Sequence[str]) -> np.ndarray:
        """As `Encoding.queries`."""
        return await self._encoded(texts, "query")

    async def documents(self, texts: Sequence[str]) -> np.ndarray:
        """As `Encoding.documents`."""
        return await self._encoded(texts, "document")

    def tokens(self, text: str) -> int | None:
        """Not known: the server keeps the tokenizer."""
        return None

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    # Getting to know it

    async def _introduce(self, prompts: Mapping[str, str]) -> None:
        info = await self._info() if self._api == "embed" else {}
        self.encoder_sha256 = info.get("encoder_sha256")
        self._max_texts = int(info.get("max_client_batch_size") or self._max_texts)
        if "prompts" in info:  # this project's: it has both
            self._prompts = {"query": "query", "document": "document"}
        elif self._api == "embed":
            self._prompts = {
                "query": await self._known_prompt(["query"]),
                "document": await self._known_prompt(DOCUMENT_PROMPTS),
            }
        for task, name in self._prompts.items():
            self._in_front[task] = (prompts.get(task) or "") if name is None else ""
        self.dim = (await self._vectors(["a"], self._prompts["query"])).shape[1]

    async def _info(self) -> Mapping[str, Any]:
        status, _, body = await self._send("GET", "/info")
        info = _json(body)
        if status != 200 or not isinstance(info, dict):
            raise EncodingError(
                f"{self.url}/info answered {status}, wanted 200 and a model's description: give the address "
                "of `python -m serving encoder` or of Text Embeddings Inference, or --encoder_api openai",
                502,
            )
        kinds = info.get("model_type") or {"embedding": {}}
        if "embedding" not in kinds:
            kind = next(iter(kinds), "unknown")
            raise EncodingError(f"{self.url}: its model is a {kind}, wanted one that gives embeddings", 502)
        return info

    async def _known_prompt(self, names: Sequence[str]) -> str | None:
        """The first prompt name that the server's model knows; TEI refuses others, and lists none."""
        for name in names:
            with contextlib.suppress(WrongRequestError, TooLongError):  # 422, in older releases 413
                await self._vectors(["a"], name)
                return name
        return None

    # Asking it

    async def _encoded(self, texts: Sequence[str], task: str) -> np.ndarray:
        prompt_name, in_front = self._prompts[task], self._in_front[task]
        if not len(texts):
            return np.zeros((0, self.dim), np.float32)
        refuse_half_letters(texts)
        texts = [in_front + text for text in texts]
        starts = range(0, len(texts), self._max_texts)
        parts = [await self._vectors(texts[n : n + self._max_texts], prompt_name) for n in starts]
        vectors = np.concatenate(parts)
        if vectors.shape[1] != self.dim:
            raise OtherEncoderError(
                f"{self.url}: its vectors have {vectors.shape[1]} numbers and had {self.dim}: it runs "
                "another model now; start it with the one before, or start this server again"
            )
        return vectors

    async def _vectors(self, texts: Sequence[str], prompt_name: str | None) -> np.ndarray:
        """One request's vectors, float32 (n_texts, width), unit length."""
        is_openai = self._api == "openai"
        path = "/v1/embeddings" if is_openai else "/embed"
        asked: dict[str, Any] = {"inputs": list(texts), "truncate": True, "normalize": True}
        if is_openai:
            asked = {"input": list(texts), "model": self._model, "encoding_format": "float"}
        elif prompt_name is not None:
            asked["prompt_name"] = prompt_name
        most = ENVELOPE_BYTES + len(texts) * ((self.dim or MOST_DIM) * NUMBER_BYTES + 1024)
        status, headers, body = await self._send("POST", path, orjson.dumps(asked), most)
        if status != 200:
            raise self._refusal(path, status, body)
        self._refuse_another(headers.get(ENCODER_HEADER))
        return self._checked(path, _of_openai(_json(body)) if is_openai else _json(body), len(texts))

    async def _send(
        self, method: str, path: str, body: bytes | None = None, most: int = 2**20
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of an answer; one more try where no connection was had.

        Args:
            most: bytes of the body.
        """
        import aiohttp

        url = self.url + path
        for is_last in (False, True):
            try:
                async with self._session.request(method, url, data=body) as answer:
                    return answer.status, answer.headers, await self._read(answer, url, most)
            except aiohttp.ConnectionTimeoutError as error:
                raise self._not_reached(url, error) from None
            except TimeoutError:
                raise UnavailableError(
                    f"{url}: no answer within {self._timeout:g} seconds: the encoder server is overloaded or "
                    "hangs; see its log"
                ) from None
            except (aiohttp.ClientConnectionError, aiohttp.ClientOSError) as error:
                if is_last:
                    raise self._not_reached(url, error) from None
                await asyncio.sleep(RETRY_SECONDS)
            except (aiohttp.ClientError, ValueError) as error:
                raise self._not_reached(url, error) from None
        raise AssertionError("unreachable")

    async def _read(self, answer: aiohttp.ClientResponse, url: str, most: int) -> bytes:
        parts, room = [], most
        async for part in answer.content.iter_chunked(2**16):
            room -= len(part)
            if room < 0:
                raise EncodingError(
                    f"{url}: its answer has more than the {most} bytes that the vectors take: is this an "
                    "encoder server, and of this model?",
                    502,
                )
            parts.append(part)
        return b"".join(parts)

    def _not_reached(self, url: str, error: Exception) -> UnavailableError:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return UnavailableError(
            f"{url}: the encoder server cannot be reached ({reason}); start it with `python -m serving "
            "encoder`, or check --encoder_url"
        )

    def _refusal(self, path: str, status: int, body: bytes) -> EncodingError:
        said = _message(body)
        where = f"{self.url}{path} answered {status}: {said}"
        if status == 429:
            return FullError(f"{where}: the encoder server is full, ask again later")
        if status == 413:
            return TooLongError(where)
        if status in (400, 422):
            return WrongRequestError(where)
        if status in (401, 403):
            return EncodingError(f"{where}: give the encoder server's key", 502)
        if status == 503:
            return UnavailableError(where)
        return EncodingError(f"{where}: wanted vectors; see the encoder server's log", 502)

    def _refuse_another(self, sha256: str | None) -> None:
        if sha256 and self.encoder_sha256 and sha256 != self.encoder_sha256:
            raise OtherEncoderError(
                f"{self.url} answers by encoder {sha256[:12]} now and did by {self.encoder_sha256[:12]}: "
                "start it with the encoder of the served version, or start this server again"
            )

    def _checked(self, path: str, given: Any, n_texts: int) -> np.ndarray:
        """The vectors of an answer, scaled to unit length."""
        try:
            vectors: np.ndarray = np.array(given, np.float32)
        except (TypeError, ValueError):
            vectors = np.zeros(0)
        if vectors.ndim != 2 or len(vectors) != n_texts or not vectors.shape[1]:
            raise EncodingError(
                f"{self.url}{path}: got something of shape {vectors.shape}, wanted {n_texts} vectors of one "
                "width: is this an encoder server?",
                502,
            )
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
        low, high = LENGTHS[self._api]
        wrong = lengths[~((lengths >= low) & (lengths <= high))]
        if len(wrong):
            raise EncodingError(
                f"{self.url}{path}: got a vector of length {float(wrong[0]):g}, wanted {low:g} to {high:g}: "
                "its model computes wrongly",
                502,
            )
        return (vectors / lengths).astype(np.float32)


def _json(body: bytes) -> Any:
    """What a body holds; None where it is no JSON."""
    try:
        return orjson.loads(body)
    except ValueError:
        return None


def _of_openai(answer: Any) -> Any:
    """The vectors of `{"data": [{"index", "embedding"}]}` in the texts' order; None where it is none."""
    try:
        data = sorted(answer["data"], key=lambda one: one["index"])
        return [_numbers(one["embedding"]) for one in data]
    except (KeyError, TypeError, ValueError):
        return None


def _numbers(embedding: Any) -> Any:
    """A list of numbers as it is; base64, which some servers send unasked, as float32."""
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), "<f4")
    return embedding


def _message(body: bytes) -> str:
    """What an error body says: TEI's {"error"}, OpenAI's {"error": {"message"}}, or its first letters."""
    said = _json(body)
    if isinstance(said, dict):
        inner = said.get("error", said.get("message", ""))
        said = inner.get("message", "") if isinstance(inner, dict) else inner
    text = said if isinstance(said, str) and said else body.decode(errors="replace")
    return " ".join(text.split())[:200] or "nothing"
