"""Sessions: the columnar cut, a rule a test. Beam's own windows judge it in test_session_properties.py."""

from datetime import UTC, datetime, timedelta

import polars as pl
import pyarrow as pa
import pytest

from pipeline.sessions import Sessions, coded, cut, set_aside

GAP = 1800
DOCUMENTS = "abcdexy"  # a document's row is its place here
START = datetime(2026, 11, 21, tzinfo=UTC)


def events(*rows: tuple) -> pl.DataFrame:
    """(user, document, seconds[, text]) rows as they stand in a bucket."""
    full = [
        (u, DOCUMENTS.index(d), START + timedelta(seconds=s), *(text or [None])) for u, d, s, *text in rows
    ]
    schema = {
        "user_id": pl.String,
        "document": pl.Int32,
        "timestamp": pl.Datetime("us", "UTC"),
        "text": pl.String,
    }
    return coded(pl.DataFrame(full, schema, orient="row"))


def table(rows: pl.DataFrame) -> pl.DataFrame:
    """The sessions as people read them."""
    return pl.DataFrame(cut(rows, GAP)[0].table(pa.array(list(DOCUMENTS))))


def documents_of(rows: pl.DataFrame) -> list[list[str]]:
    return table(rows)["document_ids"].to_list()


@pytest.mark.parametrize(("gap", "n_sessions"), [(1799, 1), (1800, 2), (1801, 2)])
def test_a_gap_of_gap_duration_starts_a_new_session(gap, n_sessions):
    # Beam joins windows that overlap, `end > w.start` (transforms/window.py, Sessions.merge)
    assert len(documents_of(events(("u", "a", 0), ("u", "b", gap)))) == n_sessions


def test_the_gap_counts_from_the_last_event_not_from_the_first():
    assert documents_of(events(("u", "a", 0), ("u", "b", 1700), ("u", "c", 3400))) == [["a", "b", "c"]]


def test_users_are_apart_even_when_they_differ_only_in_case_or_form():
    rows = events(("user", "a", 0), ("User", "b", 1), ("us\ner", "c", 2), ("é", "d", 3), ("e\u0301", "e", 4))
    assert len(documents_of(rows)) == 5


def test_two_users_with_one_hash_stay_apart():
    rows = events(("u", "a", 0), ("v", "b", 1), ("u", "c", 2), ("v", "d", 3))
    collided = rows.with_columns(user=pl.lit(7, pl.UInt64))
    assert sorted(documents_of(collided)) == [["a", "c"], ["b", "d"]]


def test_equal_times_are_ordered_by_document():
    assert documents_of(events(("u", "b", 0), ("u", "a", 0), ("u", "c", 0))) == [["a", "b", "c"]]


def test_a_duplicate_has_the_same_user_document_time_and_text():
    rows = events(
        ("u", "a", 0, "x"), ("u", "a", 0, "x"), ("u", "a", 0, "y"), ("u", "a", 1, "x"), ("v", "a", 0, "x")
    )
    sessions, n_duplicates = cut(rows, GAP)
    assert n_duplicates == 1
    assert len(sessions.documents) == 4


def test_a_session_goes_over_midnight_and_ends_at_its_last_event():
    sessions = table(events(("u", "a", 86_390), ("u", "b", 86_410)))
    assert sessions.select("start", "end").rows() == [
        (datetime(2026, 11, 21, 23, 59, 50, tzinfo=UTC), datetime(2026, 11, 22, 0, 0, 10, tzinfo=UTC))
    ]


def test_a_session_id_depends_on_user_and_start_alone():
    one = table(events(("u", "a", 0), ("u", "b", 5)))
    other = table(events(("t", "x", 0), ("u", "a", 0), ("u", "c", 9)))
    assert one["session_id"].to_list() == other.filter(pl.col("user_id") == "u")["session_id"].to_list()


def test_a_bucket_without_sessions_can_be_handed_on():
    # all users of a bucket may have been set aside
    nothing, _ = cut(events(), GAP)
    assert len(Sessions.from_arrow(nothing.to_arrow())) == 0


def test_a_user_with_more_events_on_a_day_than_allowed_is_set_aside_with_all_days():
    many = [("crawler", "a", second) for second in (0, 1, 2)] + [("crawler", "b", 90_000)]
    spread = [("reader", "a", day * 86_400) for day in range(4)]
    rows, crowded = set_aside(events(*many, *spread), 2)
    assert set(rows["user_id"]) == {"reader"}
    # 2026-11-21 is day 20,778 since 1970
    assert crowded.rows() == [("crawler", 20_778, 3), ("crawler", 20_779, 1)]


def test_exactly_as_many_as_allowed_are_kept():
    rows, crowded = set_aside(events(("u", "a", 0), ("u", "a", 1)), 2)
    assert (len(rows), len(crowded)) == (2, 0)
