"""The one text encoder of training, encoding and serving: a model folder in, unit-length float32 rows out."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline import throughput
from pipeline.artifacts import file_hashes
from pipeline.errors import InputError

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Transformer
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from pipeline.throughput import Task, Window

# Two scripts that no vocabulary maps to the same ids, unless it knows neither of them.
PROBES = ("merge two tables on a key", "두 표를 하나의 키로 합친다")
MAX_UNKNOWN_SHARE = 0.2  # of the English probe's tokens: more means the wrong tokenizer
POOL_CHUNK = 512  # texts that a process gets at once: eight GPUs share a window
PACKAGE = "package:"
XLMR_FILE = "sentencepiece.bpe.model"
# One torch format is enough; the others of a hub repository are gigabytes.
OTHER_FORMATS = ("onnx/*", "openvino/*", "*.onnx", "*.h5", "*.ot", "*.msgpack", "*.tflite", "*.gguf")


class Encoder:
    """Encodes queries and documents with one Sentence Transformers model.

    Attributes:
        dim: width of a vector.
        precision: "float32"; "bfloat16", which its weights are rounded to; or "mixed", float32 weights that
            are multiplied as bfloat16. Vectors are float32 whatever it is.
        devices: several of them, each with the model in a process of its own; else none.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        batch_size: int = 32,
        precision: str | None = None,
        batch_tokens: int | Literal["auto"] = "auto",
        devices: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self.precision = precision or str(model.dtype).removeprefix("torch.")
        self.dim = int(model.get_embedding_dimension() or 0)
        self.devices = list(devices)

    @classmethod
    def open(
        cls,
        path: Path | str,
        device: str = "auto",
        precision: str = "float32",
        max_seq_length: int | None = None,
        batch_size: int = 32,
        revision: str | None = None,
        prompts: Mapping[str, str] | None = None,
        batch_tokens: int | Literal["auto"] = "auto",
    ) -> Encoder:
        """Open a model folder, a hub name or `package:NAME`, to encode with and not to train.

        Args:
            device: "cpu", "cuda", or "auto".
            precision: "float32", "mixed" or "bfloat16", as the attribute.
            max_seq_length: tokens read of a text; None for the model's own.
            batch_size: texts, where the library batches.
            revision: of a hub name.
            prompts: as in `load`.
            batch_tokens: of a batch at most, where this product batches; "auto" by the device.

        Raises:
            InputError: it cannot be found or loaded, or its tokenizer does not fit it.
        """
        model = load(
            str(path), revision=revision, device=device, max_seq_length=max_seq_length, prompts=prompts
        )
        _set_precision(model, precision)
        return cls(model, batch_size, precision, batch_tokens, _gpus(model))

    @property
    def prompts(self) -> dict[str, str]:
        """What stands before each "query" and each "document"."""
        return {kind: self.model.prompts.get(kind) or "" for kind in ("query", "document")}

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of what is searched for, float32 (n_texts, dim), unit length."""
        return self._encode(texts, "query")

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of what can be found, float32 (n_texts, dim), unit length."""
        return self._encode(texts, "document")

    def windows(
        self,
        windows: Iterable[Sequence[str]],
        task: Task,
        seen: Callable[[Window], None] = throughput.ignored,
        done: Callable[[int], object] = throughput.ignored,
    ) -> Iterator[np.ndarray]:
        """Many texts' vectors, a window at a time: float32 (n_texts, dim), unit length, rows in order.

        A window's bits hang on its own texts, not on what was done before it nor on the number of cores.

        Args:
            seen: as in `throughput.encoded`; not called where the library tokenises: a model that does not
                fit `throughput`, or several GPUs.
            done: as there; where the library tokenises, once a window.
        """
        if self.devices:
            yield from self._in_processes(windows, task, done)
        elif throughput.fits(self.model, task):
            schedule = throughput.schedule_of(self.model)
            if self.batch_tokens != "auto":
                schedule = replace(schedule, tokens=self.batch_tokens)
            for rows in throughput.encoded(self.model, windows, task, schedule, seen, done):
                yield unit_length(rows)
        else:
            for window in windows:
                yield self._by_library(window, task)
                done(len(window))

    def _encode(self, texts: Sequence[str], task: Task) -> np.ndarray:
        if len(texts) <= self.batch_size:  # one batch: threads and windows would cost more than they earn
            return self._by_library(texts, task)
        return np.concatenate(list(self.windows(throughput.windows_of(texts), task)))

    def _by_library(self, texts: Sequence[str], task: Task, **pool: Any) -> np.ndarray:
        if not len(texts):
            return np.zeros((0, self.dim), np.float32)
        encode = self.model.encode_query if task == "query" else self.model.encode_document
        vectors = encode(
            list(texts), batch_size=self.batch_size, show_progress_bar=False, convert_to_tensor=True, **pool
        )
        return unit_length(vectors.float().cpu().numpy())

    def _in_processes(
        self, windows: Iterable[Sequence[str]], task: Task, done: Callable[[int], object]
    ) -> Iterator[np.ndarray]:
        """Each window shared out among processes, one a device."""
        device = self.model.device
        pool = self.model.start_multi_process_pool(self.devices)  # moves the model to the CPU
        try:
            for window in windows:
                yield self._by_library(window, task, pool=pool, chunk_size=POOL_CHUNK)
                done(len(window))
        finally:
            self.model.stop_multi_process_pool(pool)
            self.model.to(device)


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1 in float32; bfloat16 weights leave lengths off by some thousandths."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)


def device_type(device: str) -> str:
    """What a config's device means here: "cpu" or "cuda"."""
    import torch

    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def has_bfloat16(device: str) -> bool:
    """Whether the hardware multiplies bfloat16 itself; emulated, it is slower than float32."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and bool(torch.cpu._is_avx512_bf16_supported())


def _gpus(model: SentenceTransformer) -> list[str]:
    """All GPUs that PyTorch sees, where the model is on one and there are several."""
    import torch

    n = torch.cuda.device_count() if model.device.type == "cuda" else 0
    return [f"cuda:{number}" for number in range(n)] if n > 1 else []


def _set_precision(model: SentenceTransformer, precision: str) -> None:
    """Make an opened model compute as `Encoder.precision` says."""
    import torch

    on_cpu = model.device.type == "cpu"
    # A folder may hold weights of either kind, and is loaded as it is.
    model.bfloat16() if precision == "bfloat16" else model.float()
    if on_cpu and (precision == "float32" or has_bfloat16("cpu")):
        _pack(model, torch.float32 if precision == "float32" else torch.bfloat16)
    if precision == "mixed":
        # A partial of a plain function: a process for each GPU gets it pickled.
        model.forward = functools.partial(_forward_mixed, model)  # type: ignore[method-assign]


def _forward_mixed(model: SentenceTransformer, *given: Any, **named: Any) -> dict[str, Any]:
    import torch

    with torch.autocast(model.device.type, torch.bfloat16):
        return type(model).forward(model, *given, **named)


def _pack(model: SentenceTransformer, dtype: torch.dtype) -> None:
    """Arrange each linear layer's weights once as oneDNN multiplies them, rather than at each batch.

    On one core with AVX-512 BF16 this took a tenth off 256-token passages in bfloat16 and mixed, and a
    seventh in float32; mixed no longer rounds its weights at each batch either. PyTorch's own compiler packs
    by the same two operators; without them, or where they refuse a layer, all layers stay as they are.

    A packed model can be neither deep-copied nor pickled, and holds each linear layer's weights twice.
    """
    import torch

    pack = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    if pack is None or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return
    packed = []
    try:
        with torch.no_grad():
            for layer in model.modules():
                if type(layer) is torch.nn.Linear:
                    weight = pack(layer.weight.to(dtype), throughput.CPU_TOKENS)
                    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
                    _multiplied(torch.zeros(1, layer.in_features, dtype=dtype), weight, bias)  # a trial
                    packed.append((layer, weight, bias))
    except (RuntimeError, TypeError):  # the operators are PyTorch's own affair, and may change
        return
    for layer, weight, bias in packed:
        layer.forward = functools.partial(_forward_packed, layer, weight, bias)  # type: ignore[method-assign]


def _multiplied(given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer's output by its packed weights."""
    import torch

    return torch.ops.mkldnn._linear_pointwise(given, weight, bias, "none", [], "")


def _forward_packed(layer: torch.nn.Linear, weight: Tensor, bias: Tensor | None, given: Tensor) -> Tensor:
    import torch

    dtype = weight.dtype
    if given.dtype != dtype:
        if not torch.is_autocast_enabled("cpu"):  # the model computes this layer's input exactly
            return torch.nn.functional.linear(given, layer.weight, layer.bias)
        given = given.to(dtype)
    return _multiplied(given, weight, bias)


def load(
    name: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    max_seq_length: int | None = None,
    prompts: Mapping[str, str] | None = None,
    separate_encoders: bool = False,
) -> SentenceTransformer:
    """A Sentence Transformers model that pools and normalises, with a tokenizer that was tried.

    A plain Transformers folder (Multilingual-MiniLM has neither pooling nor normalisation) gets mean
    pooling and `Normalize`; a folder with an XLM-R SentencePiece file gets the XLM-R tokenizer, and one with
    tokenizer.json that tokenizer, whatever its config's `model_type` would choose. Every tokenizer composes
    its text first (NFC), here and so in training, encoding, serving and the saved folder alike.

    Args:
        name: a folder, a hub name, or `package:NAME` for weights inside an installed package.
        revision: of a hub name.
        prompts: what stands before each "query" and each "document", in place of the model's own; saved with
            the model, so that whoever opens it encodes alike.
        separate_encoders: start two encoders from these weights, one for queries and one for documents
            (Sentence Transformers' Router). A saved Router stays one either way.

    Raises:
        InputError: as `Encoder.open`.
    """
    import torch
    import transformers
    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer

    transformers.logging.disable_progress_bar()
    folder = locate(name, revision)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda, but PyTorch sees no CUDA device; set it to auto or cpu")
    on = None if device == "auto" else device
    try:
        if (folder / "modules.json").exists():
            model = SentenceTransformer(str(folder), device=on)
        else:
            model = SentenceTransformer(modules=_modules(folder), device=on)
    # The last two: a library that reads settings which are not there, or are of another shape.
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, TypeError, AttributeError) as error:
        reason = _missing(folder) or " ".join(str(error).split())[:300]
        raise InputError(f"{name}: not a model that loads: {reason}") from error
    _append_normalize(model)
    _settle_tokenizer(model, folder)
    if separate_encoders:
        model = _separated(model)
    model.prompts = {**model.prompts, **(prompts or {})}
    if max_seq_length is not None:
        model.max_seq_length = max_seq_length
    for transformer in transformers_of(model):
        if transformer.tokenizer is not None:
            _try_tokenizer(name, transformer.tokenizer)
    return model


def transformers_of(model: SentenceTransformer) -> list[Transformer]:
    """The model's text encoders: one, or those of a Router's routes; one that routes share comes once."""
    from sentence_transformers.sentence_transformer.modules import Transformer

    return [module for module in model.modules() if isinstance(module, Transformer)]


def tokenizer_around(backend: Tokenizer, like: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that is saved and opened as it stands, with the settings and special tokens of `like`.

    A class such as XLMRobertaTokenizer is rebuilt from the vocabulary when it is opened, and so would lose
    another normaliser.
    """
    from transformers import PreTrainedTokenizerFast

    backend.no_padding()  # both are set by each call
    backend.no_truncation()
    known = {
        name: token for name, token in like.special_tokens_map.items() if isinstance(token, str)
        and backend.token_to_id(token) is not None
    }  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=like.model_max_length,
        model_input_names=like.model_input_names,
        padding_side=like.padding_side,
        truncation_side=like.truncation_side,
        clean_up_tokenization_spaces=False,
        **known,
    )


def locate(name: str, revision: str | None = None) -> Path:
    """The local folder of a model; a hub name is downloaded first.

    Raises:
        InputError: no such folder, package or hub model, or the hub cannot be reached.
    """
    if name.startswith(PACKAGE):
        return _in_package(name.removeprefix(PACKAGE))
    if Path(name).is_dir():
        if not (Path(name) / "config.json").exists() and not (Path(name) / "modules.json").exists():
            raise InputError(f"{name}: no config.json or modules.json: wanted a model's folder")
        return Path(name)
    if name.startswith((".", "/", "~")):
        raise InputError(f"{name}: no such model folder")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, ignore_patterns=list(OTHER_FORMATS)))
    except HFValidationError:
        raise InputError(f"{name}: neither a folder nor a hub name such as owner/model") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{name}: the model hub gave no such model ({reason}); check the name and the network, "
            "or give a folder or package:NAME"
        ) from None


def digest(name: str, revision: str | None = None) -> str:
    """Tells one model's files from another's; of a hub name only its name and revision are known.

    Raises:
        InputError: as `locate`.
    """
    is_local = name.startswith((PACKAGE, ".", "/", "~")) or Path(name).is_dir()
    content = sorted(file_hashes(locate(name)).items()) if is_local else [name, revision]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _in_package(name: str) -> Path:
    module = name.replace("-", "_")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{PACKAGE}{name}: no such installed package; try `pip install {name}`")
    root = Path(next(iter(spec.submodule_search_locations)))
    for marker in ("modules.json", "config.json"):
        found = sorted(root.rglob(marker), key=lambda path: (len(path.parts), str(path)))
        if found:
            return found[0].parent
    raise InputError(f"{PACKAGE}{name}: {root} holds no modules.json or config.json, so no model")


def _missing(folder: Path) -> str:
    """What a folder lacks of what its modules.json names, and what to do; "" where nothing can be told."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        named = {module["path"]: module["type"] for module in modules}
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    # Normalize has no settings, and empty folders get lost on the way from a hub.
    lacking = [
        path for path, kind in named.items()
        if not kind.endswith(".Normalize") and not any((folder / path).glob("*.json"))
    ]  # fmt: skip
    if not lacking:
        return ""
    return f"{', '.join(lacking)}, which its modules.json names, is missing or empty; copy the whole folder"


def _modules(folder: Path) -> list:
    """Transformer and mean pooling for a folder that Sentence Transformers did not write."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    if (folder / XLMR_FILE).exists():
        with tempfile.TemporaryDirectory() as with_tokenizer:
            tokenizer = _xlmr_tokenizer(folder, with_tokenizer)
            transformer = Transformer(str(folder), tokenizer_name_or_path=tokenizer)
    else:
        transformer = Transformer(str(folder))
    return [transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")]


def _xlmr_tokenizer(folder: Path, out: str) -> str:
    """Write the folder's SentencePiece model to `out` as an XLM-R tokenizer that says so."""
    from transformers import XLMRobertaTokenizer

    with tempfile.TemporaryDirectory() as alone:
        # Alone: a stray vocab.txt or tokenizer_config.json beside it would be believed.
        shutil.copy(folder / XLMR_FILE, alone)
        XLMRobertaTokenizer.from_pretrained(alone).save_pretrained(out)
    shutil.copy(folder / "config.json", out)
    return out


def _append_normalize(model: SentenceTransformer) -> None:
    from sentence_transformers.sentence_transformer.modules import Normalize

    if not any(isinstance(module, Normalize) for module in model):
        model.append(Normalize())


def _separated(model: SentenceTransformer) -> SentenceTransformer:
    """Two copies of the encoder behind a Router; what was normalised is normalised after it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Router

    if any(isinstance(module, Router) for module in model):
        return model
    modules: list[Any] = [module for module in model if not isinstance(module, Normalize)]
    router = Router.for_query_document(query_modules=copy.deepcopy(modules), document_modules=modules)
    return SentenceTransformer(
        modules=[router, Normalize()],
        device=str(model.device),
        prompts={kind: prompt or "" for kind, prompt in model.prompts.items()},
        similarity_fn_name="dot",
    )


def _settle_tokenizer(model: SentenceTransformer, folder: Path) -> None:
    """Take the tokenizer that the folder's tokenizer.json describes, and compose its text first.

    A BERT config beside XLM-R's tokenizer.json and no `tokenizer_class` (paraphrase-multilingual-MiniLM)
    is otherwise read as a BertTokenizer, which knows almost no word. NFC: XLM-R's own normalisation leaves
    decomposed Hangul, kana and Devanagari letters apart, so that a file name from macOS would be another text
    than the same name typed. A composed text has the ids that it had before.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file = _tokenizer_file(folder)
    for transformer in transformers_of(model):
        tokenizer = transformer.tokenizer
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            backend = Tokenizer.from_file(str(file)) if file else tokenizer.backend_tokenizer
            settled = tokenizer_around(backend, tokenizer)
            settled.backend_tokenizer.normalizer = _composing(backend, transformer.do_lower_case)
            transformer.processor = settled


def _tokenizer_file(folder: Path) -> Path | None:
    """The tokenizer.json of a folder with one encoder; a Router's own are read as they were saved."""
    if (folder / "modules.json").exists():
        first = json.loads((folder / "modules.json").read_text(encoding="utf-8"))[0]
        folder = folder / first.get("path", "")
    elif (folder / XLMR_FILE).exists():
        return None  # that file is the tokenizer: see `_modules`
    file = folder / "tokenizer.json"
    return file if file.exists() else None


def _composing(backend: Tokenizer, lowers: bool) -> Any:
    """The tokenizer's normaliser with NFC before it, and lower case where the model's folder asks for it."""
    from tokenizers import normalizers

    given: Any = backend.normalizer
    joined = isinstance(given, normalizers.Sequence)
    steps = [given[n] for n in range(len(given))] if joined else [given] * (given is not None)
    if lowers and not any(isinstance(step, normalizers.Lowercase) for step in steps):
        steps = [normalizers.Lowercase(), *steps]
    if not (steps and isinstance(steps[0], normalizers.NFC)):
        steps = [normalizers.NFC(), *steps]
    return normalizers.Sequence(steps)


def _try_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that reads every text alike: its vectors would all be equal."""
    # Not verbose: a model of 8 tokens would be said to get too many.
    english, korean = (tokenizer(text, verbose=False)["input_ids"] for text in PROBES)
    n_unknown = sum(token == tokenizer.unk_token_id for token in english)
    if english == korean or n_unknown > MAX_UNKNOWN_SHARE * len(english):
        raise InputError(
            f"{name}: its tokenizer ({type(tokenizer).__name__}, {len(tokenizer)} tokens) does not know "
            f"the model's vocabulary: {n_unknown} of {len(english)} tokens of {PROBES[0]!r} are unknown; "
            "put tokenizer.json or sentencepiece.bpe.model into the folder"
        )
