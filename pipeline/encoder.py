"""The one text encoder of training, encoding and serving: a model folder in, unit-length float32 rows out."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.artifacts import file_hashes
from pipeline.errors import InputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Two scripts that no vocabulary maps to the same ids, unless it knows neither of them.
PROBES = ("merge two tables on a key", "두 표를 하나의 키로 합친다")
MAX_UNKNOWN_SHARE = 0.2  # of the English probe's tokens: more means the wrong tokenizer
PACKAGE = "package:"
# One torch format is enough; the others of a hub repository are gigabytes.
OTHER_FORMATS = ("onnx/*", "openvino/*", "*.onnx", "*.h5", "*.ot", "*.msgpack", "*.tflite", "*.gguf")


class Encoder:
    """Encodes queries and documents with one Sentence Transformers model.

    Attributes:
        dim: width of a vector.
        precision: of the weights; vectors are float32 whatever it is.
    """

    def __init__(self, model: SentenceTransformer, batch_size: int = 32) -> None:
        self.model = model
        self.batch_size = batch_size
        self.precision = str(model.dtype).removeprefix("torch.")
        self.dim = int(model.get_embedding_dimension() or 0)

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
    ) -> Encoder:
        """Open a model folder, a hub name or `package:NAME`.

        Args:
            device: "cpu", "cuda", or "auto".
            precision: of the weights: "float32", "bfloat16", or "auto" for bfloat16 where the
                hardware multiplies it. Vectors are float32 either way.
            max_seq_length: tokens read of a text; None for the model's own.
            revision: of a hub name.
            prompts: as in `load`.

        Raises:
            InputError: it cannot be found or loaded, or its tokenizer does not fit it.
        """
        model = load(
            str(path), revision=revision, device=device, max_seq_length=max_seq_length, prompts=prompts
        )
        if precision == "bfloat16" or (precision == "auto" and has_bfloat16(model.device.type)):
            model = model.bfloat16()
        return cls(model, batch_size)

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of what is searched for, float32 (n_texts, dim), unit length."""
        return self._encode(self.model.encode_query, texts)

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of what can be found, float32 (n_texts, dim), unit length."""
        return self._encode(self.model.encode_document, texts)

    def _encode(self, encode: Callable, texts: Sequence[str]) -> np.ndarray:
        if not len(texts):
            return np.zeros((0, self.dim), np.float32)
        vectors = encode(
            list(texts), batch_size=self.batch_size, show_progress_bar=False, convert_to_tensor=True
        )
        return unit_length(vectors.float().cpu().numpy())


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1 in float32; bfloat16 weights leave lengths off by some thousandths."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)


def has_bfloat16(device: str) -> bool:
    """Whether the hardware multiplies bfloat16 itself; emulated, it is slower than float32."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and bool(torch.cpu._is_avx512_bf16_supported())


def load(
    name: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    max_seq_length: int | None = None,
    prompts: Mapping[str, str] | None = None,
) -> SentenceTransformer:
    """A Sentence Transformers model that pools and normalises, with a tokenizer that was tried.

    A plain Transformers folder (Multilingual-MiniLM has neither pooling nor normalisation) gets mean
    pooling and `Normalize`; a folder with an XLM-R SentencePiece file gets the XLM-R tokenizer, whatever
    its config's `model_type` would choose.

    Args:
        name: a folder, a hub name, or `package:NAME` for weights inside an installed package.
        revision: of a hub name.
        prompts: what stands before each "query" and each "document", in place of the model's own; saved with
            the model, so that whoever opens it encodes alike.

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
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{name}: not a model that loads: {reason}") from error
    _append_normalize(model)
    model.prompts = {**model.prompts, **(prompts or {})}
    if max_seq_length is not None:
        model.max_seq_length = max_seq_length
    _try_tokenizer(name, model)
    return model


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


def _modules(folder: Path) -> list:
    """Transformer and mean pooling for a folder that Sentence Transformers did not write."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    if (folder / "sentencepiece.bpe.model").exists():
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
        shutil.copy(folder / "sentencepiece.bpe.model", alone)
        XLMRobertaTokenizer.from_pretrained(alone).save_pretrained(out)
    shutil.copy(folder / "config.json", out)
    return out


def _append_normalize(model: SentenceTransformer) -> None:
    from sentence_transformers.sentence_transformer.modules import Normalize

    if not any(isinstance(module, Normalize) for module in model):
        model.append(Normalize())


def _try_tokenizer(name: str, model: SentenceTransformer) -> None:
    """Refuse a tokenizer that reads every text alike: its vectors would all be equal."""
    tokenizer = model.tokenizer
    english, korean = (tokenizer(text)["input_ids"] for text in PROBES)
    n_unknown = sum(token == tokenizer.unk_token_id for token in english)
    if english == korean or n_unknown > MAX_UNKNOWN_SHARE * len(english):
        raise InputError(
            f"{name}: its tokenizer ({type(tokenizer).__name__}, {len(tokenizer)} tokens) does not know "
            f"the model's vocabulary: {n_unknown} of {len(english)} tokens of {PROBES[0]!r} are unknown; "
            "put tokenizer.json or sentencepiece.bpe.model into the folder"
        )
