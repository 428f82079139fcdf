"""What a Beam line found, summed: counts and failures travel as data, and come back to the driver in a file.

A runner's own exceptions lose the type and the message, and not every runner has metrics.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import apache_beam as beam
import polars as pl

from pipeline.errors import InputError, PipelineError, from_os_error
from pipeline.storage import names, read_parquet, write_parquet

COUNTS = -1  # the key under which counts travel beside numbered files


def add_counts(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum counts by name; the first failure stays a failure."""
    total: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, value) if name == "failure" else total.get(name, 0) + value
    return total


def failure(error: PipelineError | OSError) -> dict[str, Any]:
    """What a worker could not do, in one line, and whether the input is to blame.

    Raises:
        OSError: the error itself, where nobody can mend it: the runner may try again.
    """
    readable = error if isinstance(error, PipelineError) else from_os_error(error)
    if readable is None:
        raise error
    return {"failure": [readable.exit_code, str(readable)]}


def counted(work: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """What `work` counts, or its failure."""
    try:
        return work(*given)
    except (PipelineError, OSError) as error:
        return failure(error)


def keyed(found: Iterable[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """All of a step's (number, file) and (COUNTS, counts), or its failure."""
    try:
        return list(found)
    except (PipelineError, OSError) as error:
        return [(COUNTS, failure(error))]


def raise_failure(counts: Mapping[str, Any]) -> None:
    """Raise in the driver what `failure` recorded in a worker."""
    if "failure" in counts:
        exit_code, message = counts["failure"]
        raise InputError(message) if exit_code == 2 else PipelineError(message)


def by_prefix(counts: Mapping[str, Any], prefix: str) -> dict[str, int]:
    """Counts whose names begin with `prefix`, without it, by name."""
    return {name.removeprefix(prefix): n for name, n in sorted(counts.items()) if name.startswith(prefix)}


class SumCounts(beam.CombineFn):
    """`add_counts` as a Beam combiner."""

    def create_accumulator(self) -> dict[str, Any]:
        return {}

    def add_input(self, accumulator: dict[str, Any], counts: dict[str, Any]) -> dict[str, Any]:
        return add_counts([accumulator, counts])

    def merge_accumulators(self, accumulators: Iterable[dict[str, Any]]) -> dict[str, Any]:
        return add_counts(accumulators)

    def extract_output(self, accumulator: dict[str, Any]) -> dict[str, Any]:
        return accumulator


def write_counts(counts: dict[str, Any], path: str) -> None:
    """Write what a line found; a failure becomes a name.

    Where people can mend why it cannot be written, nothing is: the driver finds no file, and says why. A
    worker's own exception would come with Beam's traceback.
    """
    try:
        _write(counts, path)
    except OSError as error:
        if from_os_error(error) is None:
            raise  # the runner may try again


def _write(counts: dict[str, Any], path: str) -> None:
    counts = dict(counts)
    exit_code, message = counts.pop("failure", (0, ""))
    if message:
        counts[f"failure:{message}"] = exit_code
    table = {"name": list(counts), "count": list(counts.values())}
    write_parquet(pl.DataFrame(table, {"name": pl.String, "count": pl.Int64}), path)


def read_counts(path: str) -> dict[str, Any]:
    """What `write_counts` wrote.

    Raises:
        OSError: it could not write, and nor can the driver: the disk is full, or the like.
        PipelineError: it could not, but now there is room.
    """
    folder, _, name = path.rpartition("/")
    if not names(folder, name):
        _write({}, path)
        raise PipelineError(f"{path} could not be written, but now it can: run the same command again")
    counts: dict[str, Any] = dict(read_parquet(path).iter_rows())
    for name in [name for name in counts if name.startswith("failure:")]:
        counts["failure"] = [counts.pop(name), name.removeprefix("failure:")]
    return counts
