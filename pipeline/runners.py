"""Which engine runs the Beam lines: Beam's own options, checked, and what each runner needs besides."""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import ConfigError, PipelineError

if TYPE_CHECKING:  # Beam takes a second to import, and stage encode asks it only where it must
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.runner import PipelineRunner

DEFAULT_RUNNER = "FnApiRunner"  # DirectRunner first fetches a binary from the network
DASK_RUNNER = "apache_beam.runners.dask.dask_runner.DaskRunner"
MAX_THREADS = 8  # of the default runner; each holds a bucket or a piece of a log in memory
CORES_A_PROCESS = 8  # that encode: more threads wait for Python's lock, more processes hold more models
PR_SET_PDEATHSIG = 1  # prctl, <linux/prctl.h>
# It ends when its driver is killed, rather than say by tracebacks that nobody answers it any more.
QUIET_WORKER = f"""
import ctypes, logging, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, signal.SIGKILL)
logging.disable()
from apache_beam.runners.worker import sdk_worker_main
sdk_worker_main.main(sys.argv)
"""


@dataclass(frozen=True)
class Options:
    """Beam's own options, checked."""

    beam: PipelineOptions
    runner: str | PipelineRunner
    cores_a_worker: int | None = None  # of this machine's; None: the runner's workers know better


def parse_options(flags: Sequence[str]) -> Options:
    """Beam's options out of a command line.

    Raises:
        ConfigError: Beam knows no such option or runner, or what the runner needs is not installed.
    """
    from apache_beam.options.pipeline_options import PipelineOptions

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
        n_threads = min(n_cores(), MAX_THREADS)
        threads = {"direct_num_workers": n_threads, "direct_running_mode": "multi_threading"}
    cores = _cores_a_worker(given) if runner == DEFAULT_RUNNER else None
    return Options(PipelineOptions(flags, runner=runner, **threads), runner, cores)


def n_processes(wanted: int | Literal["auto"], device: Callable[[], str]) -> int:
    """How many processes encode on this machine; "auto" is one for eight cores, and one for all its GPUs.

    Args:
        device: says "cpu" or "cuda"; PyTorch is loaded to know, so it is asked only where it decides.
    """
    if wanted != "auto":
        return wanted
    n = n_cores() // CORES_A_PROCESS
    return n if n > 1 and device() == "cpu" else 1


def on_processes(n: int) -> Options:
    """The default runner with this many worker processes on this machine.

    They keep Beam's log off the screen. They must be told so as they start, which --direct_running_mode
    multi_processing cannot.
    """
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    from apache_beam.transforms.environments import SubprocessSDKEnvironment

    # Beam gives it to a shell; exec puts the worker in the shell's place, so that the driver is its parent.
    command = "exec " + shlex.join([sys.executable, "-W", "ignore", "-c", QUIET_WORKER])
    runner = FnApiRunner(default_environment=SubprocessSDKEnvironment.from_command_string(command))
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)  # of these options it says that they clash
    return Options(PipelineOptions(direct_num_workers=n), runner, max(1, n_cores() // n))


def _cores_a_worker(given: argparse.Namespace) -> int:
    """Of the default runner: its threads share all cores, its processes have a part each."""
    n_processes = given.direct_num_workers if given.direct_running_mode == "multi_processing" else 1
    return max(1, n_cores() // (n_processes or n_cores()))  # Beam takes 0 for a worker a core


def _load_runner(name: str) -> str:
    """Import a runner; returns the name by which Beam finds it.

    Raises:
        ConfigError: there is none, or what it needs is not installed.
    """
    from apache_beam.runners.runner import create_runner

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
def engine_faults_in_a_line(runner: str | PipelineRunner) -> Iterator[None]:
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


def n_cores() -> int:
    """As many as this process may use; in a container OMP_NUM_THREADS says so, the affinity does not.

    OpenMP takes one number a level of nested loops, as in "4,2": the first is that of the outermost.
    """
    said = re.match(r"\s*0*([1-9]\d*)", os.environ.get("OMP_NUM_THREADS", ""))
    seen = len(os.sched_getaffinity(0))
    return min(seen, int(said[1])) if said else seen
