"""Which engine runs the Beam lines: Beam's own options, checked, and what each runner needs besides."""

import argparse
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import create_runner

from pipeline.errors import ConfigError, PipelineError

DEFAULT_RUNNER = "FnApiRunner"  # DirectRunner first fetches a binary from the network
DASK_RUNNER = "apache_beam.runners.dask.dask_runner.DaskRunner"
MAX_THREADS = 8  # of the default runner; each holds a bucket or a piece of a log in memory


@dataclass(frozen=True)
class Options:
    """Beam's own options, checked."""

    beam: PipelineOptions
    runner: str


def parse_options(flags: Sequence[str]) -> Options:
    """Beam's options out of a command line.

    Raises:
        ConfigError: Beam knows no such option or runner, or what the runner needs is not installed.
    """
    flags = list(flags)
    only_runner = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_runner.add_argument("--runner", default=DEFAULT_RUNNER)
    known: Any = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    try:
        # First of all: the Dask runner brings its options when it is imported.
        runner = _load_runner(only_runner.parse_known_args(flags)[0].runner)
        for owner in PipelineOptions.__subclasses__():
            owner._add_argparse_args(known)
        given, unknown = known.parse_known_args(flags)
    except SystemExit:
        raise ConfigError(f"{' '.join(flags)}: Beam cannot read these options") from None
    if runner in (DEFAULT_RUNNER, DASK_RUNNER):
        # What goes wrong reaches the driver as a count or an exception; Beam would print it first.
        logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    if unknown:
        raise ConfigError(f"{' '.join(unknown)}: neither an option of this command nor one of Beam's")
    if runner == DASK_RUNNER and not (given.npartitions or given.partition_size):
        # Beam's 128 elements a task would leave a short list to one worker, and one element a task would make
        # a shuffle of very many tasks out of a long list.
        flags.append("--dask_npartitions=256")
    threads = {}
    if runner == DEFAULT_RUNNER and not any(flag.startswith("--direct_") for flag in flags):
        # Beam's default is one worker. Threads do: columns are worked on outside Python's lock.
        threads = {"direct_num_workers": _n_cores(), "direct_running_mode": "multi_threading"}
    return Options(PipelineOptions(flags, runner=runner, **threads), runner)


def _load_runner(name: str) -> str:
    """Import a runner; returns the name by which Beam finds it.

    Raises:
        ConfigError: there is none, or what it needs is not installed.
    """
    if name.lower() in ("dask", "daskrunner"):  # the one runner that Beam knows by its path alone
        name = DASK_RUNNER
    if name == DASK_RUNNER and find_spec("distributed") is None:
        raise ConfigError(
            "--runner dask: distributed is not installed: pip install '.[cluster]' in this repository"
        )
    try:
        create_runner(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise ConfigError(f"--runner {name}: {' '.join(str(error).split())}") from None
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # its level counts from its import on
    return name


@contextmanager
def engine_faults_in_a_line(runner: str) -> Iterator[None]:
    """Raise in one line that the Dask cluster cannot be reached or gave a task up; other errors pass.

    Raises:
        PipelineError: one of the two.
    """
    try:
        yield
    except Exception as error:
        gave_up = type(error).__name__ == "KilledWorker"  # a task whose workers died, one after another
        if runner == DASK_RUNNER and (gave_up or "trying to connect" in str(error)):
            raise PipelineError(f"--runner dask: {' '.join(str(error).split())}") from None
        raise


def _n_cores() -> int:
    """As many as this process may use; in a container OMP_NUM_THREADS says so, the affinity does not."""
    return min(len(os.sched_getaffinity(0)), int(os.environ.get("OMP_NUM_THREADS", MAX_THREADS)), MAX_THREADS)
