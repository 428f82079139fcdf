"""Sessions: the columnar cut against Beam's own windows, one element an event."""

from datetime import UTC, datetime, timedelta

import apache_beam as beam
import polars as pl
import pytest
from apache_beam.testing.test_pipeline import TestPipeline as BeamPipeline
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms import window
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError, PipelineError
from pipeline.sessions import SumCounts, add_counts, by_bucket, cut, failure, raise_failure, stable_hash

GAP = 1800
SCHEMA = {
    "user_id": pl.String,
    "document_id": pl.String,
    "timestamp": pl.Datetime("us", "UTC"),
    "text": pl.String,
}


def events(*rows: tuple) -> pl.DataFrame:
    """(user, document, seconds[, text]) rows as the reader gives them."""
    start = datetime(2026, 11, 21, tzinfo=UTC)
    full = [(u, d, start + timedelta(seconds=s), *(text or [None])) for u, d, s, *text in rows]
    return pl.DataFrame(full, SCHEMA, orient="row")


def documents_of(rows: pl.DataFrame) -> list[list[str]]:
    return cut(rows, GAP)[0]["document_ids"].to_list()


@pytest.mark.parametrize(("gap", "n_sessions"), [(1799, 1), (1800, 2), (1801, 2)])
def test_a_gap_of_gap_duration_starts_a_new_session(gap, n_sessions):
    # Beam joins windows that overlap, `end > w.start` (transforms/window.py, Sessions.merge)
    assert len(documents_of(events(("u", "a", 0), ("u", "b", gap)))) == n_sessions


def test_the_gap_counts_from_the_last_event_not_from_the_first():
    assert documents_of(events(("u", "a", 0), ("u", "b", 1700), ("u", "c", 3400))) == [["a", "b", "c"]]


def test_users_are_apart_even_when_they_differ_only_in_case_or_form():
    rows = events(("user", "a", 0), ("User", "b", 1), ("us\ner", "c", 2), ("é", "d", 3), ("e\u0301", "e", 4))
    assert len(documents_of(rows)) == 5


def test_equal_times_are_ordered_by_document():
    assert documents_of(events(("u", "b", 0), ("u", "a", 0), ("u", "c", 0))) == [["a", "b", "c"]]


def test_a_duplicate_has_the_same_user_document_time_and_text():
    rows = events(
        ("u", "a", 0, "x"), ("u", "a", 0, "x"), ("u", "a", 0, "y"), ("u", "a", 1, "x"), ("v", "a", 0, "x")
    )
    sessions, n_duplicates = cut(rows, GAP)
    assert n_duplicates == 1
    assert sessions["document_ids"].list.len().sum() == 4


def test_a_session_goes_over_midnight_and_ends_at_its_last_event():
    sessions, _ = cut(events(("u", "a", 86_390), ("u", "b", 86_410)), GAP)
    assert sessions.select("start", "end").rows() == [
        (datetime(2026, 11, 21, 23, 59, 50, tzinfo=UTC), datetime(2026, 11, 22, 0, 0, 10, tzinfo=UTC))
    ]


def test_a_session_id_depends_on_user_and_start_alone():
    one, _ = cut(events(("u", "a", 0), ("u", "b", 5)), GAP)
    other, _ = cut(events(("t", "x", 0), ("u", "a", 0), ("u", "c", 9)), GAP)
    assert one["session_id"].to_list() == other.filter(pl.col("user_id") == "u")["session_id"].to_list()


class TextbookSessions(beam.PTransform):
    """The oracle: one element an event, Beam's `Sessions` windows, a list a window."""

    def expand(self, rows):
        return (
            rows
            | beam.Distinct()
            | beam.Map(lambda row: window.TimestampedValue((row[0], (row[2], row[1], row[3])), row[2]))
            | beam.WindowInto(window.Sessions(GAP))
            | beam.GroupByKey()
            | beam.MapTuple(lambda user, found: (user, [d for _, d, _ in sorted(found, key=_order)]))
        )


def _order(found: tuple) -> tuple:
    timestamp, document_id, text = found
    return timestamp, document_id, text is not None, text or ""


ROWS = st.lists(
    st.tuples(
        st.sampled_from(["u", "U", "v\n", "é"]),
        st.sampled_from(["a", "b", "c"]),
        st.one_of(
            st.integers(0, 4).map(lambda n: n * GAP), st.integers(-20, 4 * GAP), st.integers(86_000, 87_000)
        ),
        st.sampled_from([None, "x"]),
    ),
    min_size=1,
    max_size=25,
)


@pytest.mark.slow
@given(ROWS)
@settings(max_examples=20, deadline=None)
def test_the_columnar_cut_equals_beams_session_windows(rows):
    found = cut(events(*rows), GAP)[0]
    pairs = sorted(zip(found["user_id"].to_list(), found["document_ids"].to_list(), strict=True))
    with BeamPipeline() as pipeline:
        oracle = pipeline | beam.Create(rows) | TextbookSessions()
        assert_that(oracle, equal_to(pairs))


@given(ROWS, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_changes_nothing(rows, random):
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert cut(events(*shuffled), GAP)[0].rows() == cut(events(*rows), GAP)[0].rows()


@given(ROWS, st.integers(1, 5))
def test_every_row_is_in_one_bucket_and_a_user_in_one_bucket(rows, n_buckets):
    table = events(*rows)
    parts = dict(by_bucket(table, "user_id", n_buckets))
    assert sum(len(part) for part in parts.values()) == len(table)
    users = [user for part in parts.values() for user in part["user_id"].unique()]
    assert len(users) == len(set(users))
    assert all(0 <= bucket < n_buckets for bucket in parts)


def test_the_hash_is_the_same_in_every_release():
    # BLAKE2b of "user" cut to 8 bytes, as `b2sum -l 64` prints it
    assert stable_hash("user").to_bytes(8, "little").hex() == "afdf5c9a7bd48d63"


def test_counts_add_up_and_the_first_failure_stays():
    assert add_counts([{"read": 1}, {"read": 2, "rejected": 1}]) == {"read": 3, "rejected": 1}
    first = failure(InputError("first"))
    total = add_counts([first, failure(PipelineError("second"))])
    with pytest.raises(InputError, match="first"):
        raise_failure(total)


@pytest.mark.slow
def test_counts_combine_in_beam():
    with BeamPipeline() as pipeline:
        total = pipeline | beam.Create([{"read": n} for n in range(10)]) | beam.CombineGlobally(SumCounts())
        assert_that(total, equal_to([{"read": 45}]))


def test_a_full_disk_in_a_worker_is_bad_input_not_a_fault():
    with pytest.raises(InputError, match="the disk is full"):
        raise_failure(failure(OSError(28, "No space left on device")))
