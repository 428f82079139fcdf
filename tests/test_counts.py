"""Counts and failures as data: summed in any grouping, written by a worker, raised by the driver."""

import apache_beam as beam
import pytest
from apache_beam.testing.test_pipeline import TestPipeline as BeamPipeline
from apache_beam.testing.util import assert_that, equal_to
from hypothesis import given
from hypothesis import strategies as st

from pipeline.counts import (
    SumCounts,
    add_counts,
    by_prefix,
    failure,
    raise_failure,
    read_counts,
    write_counts,
)
from pipeline.errors import ArtifactError, InputError, PipelineError

COUNTS = st.lists(
    st.dictionaries(st.sampled_from(["read", "rejected", "rejected:not_json"]), st.integers(0, 9))
)


def test_counts_add_up_by_name():
    assert add_counts([{"read": 1}, {"read": 2, "rejected": 1}]) == {"read": 3, "rejected": 1}


@given(COUNTS, st.integers(1, 4))
def test_counts_add_up_alike_in_any_grouping(parts, n_groups):
    groups = [add_counts(parts[n::n_groups]) for n in range(n_groups)]
    assert add_counts(groups) == add_counts(parts)


def test_the_first_failure_stays():
    total = add_counts([{"read": 1}, failure(InputError("first")), failure(PipelineError("second"))])
    with pytest.raises(InputError, match="first"):
        raise_failure(total)


def test_counts_without_a_failure_raise_nothing():
    raise_failure({"read": 3})


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (InputError("log.csv line 3"), 2, "log.csv line 3"),
        (ArtifactError("work/x: run stage encode first"), 2, "work/x: run stage encode first"),
        (PipelineError("the counts do not add up"), 1, "the counts do not add up"),
        (OSError(28, "No space left on device"), 2, "the disk is full; make room"),
        (PermissionError(13, "Permission denied", "out/x"), 2, "out/x: Permission denied; give this user"),
    ],
)
def test_a_workers_failure_keeps_its_message_and_whose_fault_it_is(tmp_path, error, exit_code, message):
    write_counts(failure(error), str(tmp_path / "counts.parquet"))
    with pytest.raises(PipelineError, match=message) as raised:
        raise_failure(read_counts(str(tmp_path / "counts.parquet")))
    assert raised.value.exit_code == exit_code


def test_what_nobody_can_mend_is_raised_so_that_the_runner_tries_again():
    with pytest.raises(OSError, match="Input/output error"):
        failure(OSError(5, "Input/output error"))


def test_counts_that_had_no_room_are_said_by_the_driver_not_by_a_worker(tmp_path):
    (tmp_path / "file").touch()
    path = str(tmp_path / "file" / "counts.parquet")
    write_counts({"read": 1}, path)  # a place below a file: nobody can write there
    with pytest.raises(OSError, match="file"):
        read_counts(path)
    with pytest.raises(PipelineError, match="run the same command again"):
        read_counts(str(tmp_path / "counts.parquet"))


def test_counts_come_back_from_a_file_as_they_were(tmp_path):
    path = str(tmp_path / "counts.parquet")
    counts = {"read": 2**40, "rejected:not_json": 0, "failure": [2, "a: failure: of two\nlines"]}
    write_counts(counts, path)
    assert read_counts(path) == counts
    write_counts({}, path)
    assert read_counts(path) == {}


def test_counts_of_one_kind_are_found_by_their_prefix():
    counts = {"rejected": 3, "rejected:not_json": 2, "rejected:bad_timestamp": 1, "read": 9}
    assert list(by_prefix(counts, "rejected:").items()) == [("bad_timestamp", 1), ("not_json", 2)]


@pytest.mark.slow
def test_counts_combine_in_beam():
    parts = [{"read": n, f"length:{n % 2}": 1} for n in range(10)]
    with BeamPipeline() as pipeline:
        total = pipeline | beam.Create(parts) | beam.CombineGlobally(SumCounts())
        assert_that(total, equal_to([{"read": 45, "length:0": 5, "length:1": 5}]))
