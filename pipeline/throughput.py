"""Many texts through one Sentence Transformers model: what is batched with what, and which core computes it.

A batch depends on the texts of its window alone, never on what was done before it, and on a CPU one core
computes it from end to end. So a window has the same bits whether its run was unbroken or resumed before it,
and however many cores there are.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer
    from torch import Tensor

Task = Literal["query", "document"]

# oneDNN keeps what it made for each shape of a batch, a thousand of them by default: hundreds of megabytes
# after a million texts. It reads this when PyTorch multiplies for the first time.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

WINDOW = 4096  # texts that are sorted together: in more of them more are of one length
WINDOW_CHARACTERS = 16_000_000  # of a window, so that texts of a megabyte do not fill the memory
LETTERS_A_TOKEN = 100  # that are tried first, far more than a token has as a rule
MORE_LETTERS = 8  # times as many, where they do not fill the model
NO_LIMIT = 1 << 40
TOKENISED_CHARACTERS = 1_000_000  # at once: until it is cut, a tokenised text takes 50 bytes a character
WORD_START = "\u2581"  # a token of SentencePiece's vocabularies; alone it says nothing of a text
PROMPTS: dict[Task, tuple[str, ...]] = {"query": ("query",), "document": ("document", "passage", "corpus")}
CPU_TOKENS = 2048  # 1,024 to 4,096 cost the same; fewer pay for each call, more leave the core's cache
CUDA_TOKENS = 32_768
CUDA_STREAMS = 2  # one is computed while the other's rows come back and its next batch is sent
CUDA_MULTIPLE = 8  # widths that tensor cores take whole
CUT, UNKNOWN = 1, 2  # of `Window.flags`


@dataclass(frozen=True)
class Schedule:
    """How a model's batches are cut and computed.

    Attributes:
        tokens: of a batch at most, padding included; a text that is longer is a batch of its own.
        n_threads: batches that are computed at once.
        multiple: a batch is padded to a multiple of this many tokens.
        one_core_each: PyTorch computes a batch on one core. Two cores that share each batch wait for one
            another at the end of every layer's every step, and the longer, the busier the machine.
    """

    tokens: int = CPU_TOKENS
    n_threads: int = 1
    multiple: int = 1
    one_core_each: bool = False


@dataclass(frozen=True)
class Window:
    """A window's texts as tokens.

    Attributes:
        tokens: {"input_ids", ...: int64 (sum of lengths,)}, all texts' one after the other.
        lengths: tokens of each different text, int64 (n_different,).
        texts: which of those each given text is, int64 (n_texts,).
        is_cut: which of the different texts are longer than the model reads, bool (n_different,).
        is_unknown: which have not one token that the model knows, such as emoji alone, bool (n_different,).
        given: what the model wants to know of every batch, such as its prompt's length.
    """

    tokens: dict[str, np.ndarray]
    lengths: np.ndarray
    texts: np.ndarray
    is_cut: np.ndarray
    is_unknown: np.ndarray
    given: dict[str, Any]

    @property
    def flags(self) -> np.ndarray:
        """What was seen of each given text: CUT, UNKNOWN, both (3) or neither (0), uint8 (n_texts,)."""
        return (self.is_cut * np.uint8(CUT) + self.is_unknown * np.uint8(UNKNOWN))[self.texts]


def schedule_of(model: SentenceTransformer) -> Schedule:
    """The schedule for the model's device: on a CPU a batch for each core that PyTorch may use."""
    import torch

    if model.device.type == "cuda":
        return Schedule(CUDA_TOKENS, CUDA_STREAMS, CUDA_MULTIPLE)
    if model.device.type == "cpu" and model.get_backend() == "torch":
        return Schedule(n_threads=torch.get_num_threads(), one_core_each=True)
    return Schedule()  # ONNX Runtime and OpenVINO share a batch out among the cores themselves


def fits(model: SentenceTransformer, task: Task) -> bool:
    """Whether the model's texts become rows of tokens that can be batched here.

    Not so for static embeddings and images; nor need it be where flash attention computes texts without
    padding: `model.encode` does all of these well.
    """
    transformer = _text_module(model, task)
    tokenizer = getattr(transformer, "tokenizer", None)
    return bool(
        getattr(tokenizer, "is_fast", False)
        and getattr(tokenizer, "pad_token_id", None) is not None
        and set(getattr(transformer, "modality_config", ())) == {"text"}
        and not getattr(transformer, "unpad_inputs", False)
        and not (task == "query" and getattr(transformer, "query_expansion", None))
    )


def windows_of(
    texts: Iterable[str], size: int = WINDOW, characters: int = WINDOW_CHARACTERS
) -> Iterator[list[str]]:
    """The texts in runs of at most `size` and `characters`; a text that is longer is a window of its own."""
    window: list[str] = []
    room = characters
    for text in texts:
        if window and (len(window) == size or len(text) > room):
            yield window
            window, room = [], characters
        window.append(text)
        room -= len(text)
    if window:
        yield window


def ignored(_: Any) -> None:
    """What nobody asked to be told."""


def encoded(
    model: SentenceTransformer,
    windows: Iterable[Sequence[str]],
    task: Task,
    schedule: Schedule | None = None,
    seen: Callable[[Window], None] = ignored,
    done: Callable[[int], object] = ignored,
) -> Iterator[np.ndarray]:
    """The texts' vectors, a window at a time.

    While one window is computed, the next is tokenised and its batches queue up behind: no core waits for
    the end of a window. At most three windows are held.

    Args:
        model: one that `fits`.
        windows: texts that may be batched together; what stands in a window decides its rows' last bits.
        schedule: default: `schedule_of(model)`.
        seen: is given each window as tokens, in order, before its rows come.
        done: is told of each batch how many different texts it had: a window of passages takes minutes.

    Yields:
        float32 (n_texts, dim), rows in the order of the window's texts, as the model gives them: of unit
        length only if it normalises, and with bfloat16 weights then within some thousandths.
    """
    schedule = schedule or schedule_of(model)
    model.eval()
    with _compute_threads(schedule, model.device.type) as threads, _pool(1) as ahead:
        pending: deque[_Pending] = deque()
        for window in _one_ahead(ahead, lambda texts: tokenise(model, texts, task), windows):
            seen(window)
            batches = batches_of(window.lengths, schedule.tokens)
            vectors = [
                threads.submit(_vectors, model, window, rows, task, schedule.multiple) for rows in batches
            ]
            pending.append(_Pending(window.texts, batches, vectors))
            if len(pending) > 1:
                yield pending.popleft().rows(model, done)
        while pending:
            yield pending.popleft().rows(model, done)


def batches_of(lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Texts of like length together, the longest first, so that memory runs out at once or never.

    Args:
        lengths: tokens of each text, int (n_texts,).
        tokens: of a batch at most, padding included.

    Returns:
        Indices into `lengths`, each in one batch.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        n = max(1, tokens // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + n])
        start += n
    return batches


def tokenise(model: SentenceTransformer, texts: Sequence[str], task: Task) -> Window:
    """A window's texts as tokens, each different text once, with the task's prompt before it."""
    distinct = {text: n for n, text in enumerate(dict.fromkeys(texts))}
    at = np.fromiter((distinct[text] for text in texts), np.int64, len(texts))
    prompt, tokenizer = _prompt(model, task), _text_module(model, task).tokenizer
    parts = [
        _tokenised(model, part, task, prompt)
        for part in windows_of(distinct, len(distinct), TOKENISED_CHARACTERS)
    ]
    if not parts:
        return Window({}, np.zeros(0, np.int64), at, np.zeros(0, bool), np.zeros(0, bool), {})
    tokens = {name: np.concatenate([part.tokens[name] for part in parts]) for name in parts[0].tokens}
    lengths = np.concatenate([part.lengths for part in parts])
    is_unknown = _known(tokenizer, tokens["input_ids"], lengths) <= _known_of_prompt(tokenizer, prompt)
    is_cut = np.concatenate([part.is_cut for part in parts])
    return Window(tokens, lengths, at, is_cut, is_unknown, parts[0].given)


@dataclass(frozen=True)
class _Part:
    """Some of a window's different texts; its fields are those of `Window`."""

    tokens: dict[str, np.ndarray]
    lengths: np.ndarray
    is_cut: np.ndarray
    given: dict[str, Any]


def beginning(text: str, n_letters: int) -> str:
    """The whole words among a text's first letters, as they stand; all of it where there is but one."""
    if len(text) <= n_letters:
        return text
    words_and_last = text[:n_letters].rsplit(maxsplit=1)  # the last one may be cut
    return words_and_last[0] if len(words_and_last) == 2 else text


def _tokenised(model: SentenceTransformer, texts: list[str], task: Task, prompt: str | None) -> _Part:
    tokenizer = _text_module(model, task).tokenizer
    features = _features(model, texts, task, prompt)
    names = [name for name in tokenizer.model_input_names if name in features]
    lengths = np.fromiter(map(len, features["input_ids"]), np.int64, len(texts))
    tokens = {
        name: np.fromiter(itertools.chain.from_iterable(features[name]), np.int64, int(lengths.sum()))
        for name in names
    }
    is_cut = np.zeros(len(texts), bool)
    for row in np.flatnonzero(lengths == lengths.max()):  # what is cut is as long as texts can be
        is_cut[row] = _is_cut(features, int(row))
    return _Part(tokens, lengths, is_cut, {k: v for k, v in features.items() if k not in names})


def _features(model: SentenceTransformer, texts: list[str], task: Task, prompt: str | None) -> Any:
    """The tokens that the model reads of each text, without tokenising much more of it.

    Tokenising a text of 16 million letters takes gigabytes and minutes, for its first 256 tokens. So its
    beginning is tokenised, and more of it until the model is full or the text at its end: a thousand spaces,
    or letters that the tokenizer drops, may be no token at all.
    """

    def read(texts: list[str]) -> Any:
        return model.preprocess(
            texts,
            prompt=prompt,
            task=task,
            processing_kwargs={"text": {"padding": False}, "common": {"return_tensors": None}},
        )

    keeps_beginning = _text_module(model, task).tokenizer.truncation_side == "right"
    n_tokens = model.max_seq_length if keeps_beginning and model.max_seq_length else NO_LIMIT
    n_letters = n_tokens * LETTERS_A_TOKEN
    while True:
        begun = [beginning(text, n_letters) for text in texts]
        features = read(begun)
        if all(len(begun[n]) == len(text) or _is_cut(features, n) for n, text in enumerate(texts)):
            return features
        n_letters *= MORE_LETTERS


def _is_cut(features: Any, row: int) -> bool:
    """Whether the tokenizer gave fewer tokens of a text than it found."""
    return bool(features.encodings[row].overflowing)


def _known(tokenizer: Any, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Tokens of each text that stand for something, int (n_texts,).

    Args:
        ids: all texts' tokens, one after the other.
    """
    nothing = [*tokenizer.all_special_ids, tokenizer.convert_tokens_to_ids(WORD_START)]
    is_known = ~np.isin(ids, [number for number in nothing if number is not None])
    return np.bincount(np.repeat(np.arange(len(lengths)), lengths), is_known, minlength=len(lengths))


def _known_of_prompt(tokenizer: Any, prompt: str | None) -> int:
    if not prompt:
        return 0
    ids = np.array(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"], np.int64)
    return int(_known(tokenizer, ids, np.array([len(ids)]))[0])


def padded(window: Window, rows: np.ndarray, tokenizer: Any, multiple: int = 1) -> dict[str, np.ndarray]:
    """One batch: {"input_ids", "attention_mask", ...: int64 (n_rows, width)}.

    Args:
        rows: which of the window's different texts.
        multiple: the width is one of this.
    """
    lengths = window.lengths[rows]
    width = max(1, -(-int(lengths.max()) // multiple) * multiple)
    places = np.arange(width)
    is_left = tokenizer.padding_side == "left"
    is_token = places >= width - lengths[:, None] if is_left else places < lengths[:, None]
    starts = np.cumsum(window.lengths) - window.lengths
    chosen = np.concatenate([np.arange(starts[row], starts[row] + window.lengths[row]) for row in rows])
    fill = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    batch = {}
    for name, tokens in window.tokens.items():
        batch[name] = np.full(is_token.shape, fill.get(name, 0), np.int64)
        batch[name][is_token] = tokens[chosen]
    return batch


@dataclass(frozen=True)
class _Pending:
    """A window that is being computed."""

    texts: np.ndarray
    batches: list[np.ndarray]
    vectors: list[Future[np.ndarray]]

    def rows(self, model: SentenceTransformer, done: Callable[[int], object]) -> np.ndarray:
        """Its vectors in the given texts' order, when they are all there."""
        if not self.batches:
            return np.zeros((0, model.get_embedding_dimension() or 0), np.float32)
        parts = []
        for future in self.vectors:
            parts.append(future.result())
            done(len(parts[-1]))
        vectors = np.concatenate(parts)
        place = np.empty(len(vectors), np.int64)
        place[np.concatenate(self.batches)] = np.arange(len(vectors))
        return vectors[place[self.texts]]


def _vectors(
    model: SentenceTransformer, window: Window, rows: np.ndarray, task: Task, multiple: int
) -> np.ndarray:
    """One batch's vectors, float32 (n_rows, dim)."""
    import torch

    batch = padded(window, rows, _text_module(model, task).tokenizer, multiple)
    with torch.inference_mode(), torch.cuda.stream(getattr(_stream, "mine", None)):
        features = {name: _sent(torch.from_numpy(tokens), model.device) for name, tokens in batch.items()}
        vectors = model({**window.given, **features}, task=task)["sentence_embedding"]
        return vectors[:, : model.truncate_dim].float().cpu().numpy()


def _sent(tokens: Tensor, device: torch.device) -> Tensor:
    """On the model's device; from pinned memory the copy does not hold up the GPU."""
    return tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens.to(device)


def _prompt(model: SentenceTransformer, task: Task) -> str | None:
    """What stands before each text, chosen as `encode_query` and `encode_document` choose it."""
    named = [name for name in PROMPTS[task] if name in model.prompts]
    name = named[0] if named else model.default_prompt_name
    return None if name is None else model.prompts.get(name)


def _text_module(model: SentenceTransformer, task: Task) -> Any:
    """The module that reads the task's texts: of a Router the first one of its route."""
    from sentence_transformers.base.modules import Router

    first: Any = model[0]
    routes: Any = first.sub_modules if isinstance(first, Router) else {}
    return routes[task][0] if task in routes else first


def _one_ahead(
    pool: ThreadPoolExecutor, make: Callable[[Sequence[str]], Window], windows: Iterable[Sequence[str]]
) -> Iterator[Window]:
    """`make` of each window, the next one under way while the last one is used."""
    before: Future[Window] | None = None
    for window in windows:
        after = pool.submit(make, window)
        if before is not None:
            yield before.result()
        before = after
    if before is not None:
        yield before.result()


_stream = threading.local()


@contextmanager
def _compute_threads(schedule: Schedule, device: str) -> Iterator[ThreadPoolExecutor]:
    """Threads that compute batches, each with a core or a CUDA stream of its own."""
    import torch

    def begin() -> None:
        if schedule.one_core_each:
            torch.set_num_threads(1)  # of this thread, and of those that begin after it
        if device == "cuda":
            _stream.mine = torch.cuda.Stream()
            _stream.mine.wait_stream(torch.cuda.default_stream())  # where the weights were written

    n_before = torch.get_num_threads()
    with _pool(schedule.n_threads, begin) as pool:
        try:
            yield pool
        finally:
            if schedule.one_core_each:
                torch.set_num_threads(n_before)


@contextmanager
def _pool(n_threads: int, begin: Callable[[], None] | None = None) -> Iterator[ThreadPoolExecutor]:
    """Threads that drop what is still queued when the work is given up."""
    pool = ThreadPoolExecutor(n_threads, "throughput", begin)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
