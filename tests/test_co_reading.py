"""Which documents were ever read together: the keys on disk against a plain set of frozensets."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import co_reading
from pipeline.co_reading import CoReading

N = 12  # documents
SESSIONS = st.lists(st.lists(st.integers(0, N - 1), min_size=1, max_size=9), max_size=12)


def columns(sessions: list[list[int]], first_name: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(session, offsets, documents) as a bucket holds them; names count down from the largest there is."""
    names = np.uint64(2**64 - 1) - np.arange(first_name, first_name + len(sessions), dtype=np.uint64)
    offsets = np.cumsum([0, *(len(session) for session in sessions)]).astype(np.int32)
    return names, offsets, np.array([d for session in sessions for d in session], np.int32)


def built(buckets: list[list[list[int]]], n_ranges: int, n_documents: int = N) -> CoReading:
    """As the stage builds it: buckets expand by themselves, ranges are merged over all of them."""
    limits = co_reading.bounds(n_ranges, n_documents)
    parts: list[list[np.ndarray]] = [[] for _ in range(n_ranges)]
    long, n_before = [np.empty(0, co_reading.LONG)], 0
    for sessions in buckets:
        keys, of_long = co_reading.expand(*columns(sessions, n_before))
        n_before += len(sessions)
        long.append(of_long)
        for held, part in zip(parts, co_reading.by_range(keys, limits), strict=True):
            held.append(part)
    ranges = [co_reading.merge(held) for held in parts]
    return CoReading.of(ranges, limits, np.concatenate(long), n_documents)


def read_together(sessions: list[list[int]]) -> set[frozenset[int]]:
    return {frozenset(pair) for session in sessions for pair in combinations(set(session), 2)}


@given(
    sessions=SESSIONS,
    n_ranges=st.integers(1, 40),
    n_buckets=st.integers(1, 4),
    max_expanded=st.integers(0, 9),
    random=st.randoms(use_true_random=False),
)
def test_every_question_is_answered_as_by_a_set(sessions, n_ranges, n_buckets, max_expanded, random):
    buckets = [sessions[n::n_buckets] for n in range(n_buckets)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(co_reading, "MAX_EXPANDED", max_expanded)  # 0: every session is a long one
        met = built(buckets, n_ranges)
    asked = [(a, b) for a in range(N) for b in range(N) if a != b] * 2
    random.shuffle(asked)
    a, b = np.array(asked, np.int32).T
    together = read_together(sessions)
    assert met.holds(a, b).tolist() == [frozenset(pair) in together for pair in asked]


@given(SESSIONS, st.integers(1, 40), st.integers(0, 9))
def test_each_pair_of_a_short_session_is_kept_once(sessions, n_ranges, max_expanded):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(co_reading, "MAX_EXPANDED", max_expanded)
        met = built([sessions[::2], sessions[1::2]], n_ranges)
    short = [session for session in sessions if len(session) <= max_expanded]
    assert len(met) == len(read_together(short))
    assert all((np.diff(keys.astype(object)) > 0).all() for keys in met.ranges)


@given(SESSIONS, st.integers(1, 40), st.randoms(use_true_random=False))
def test_how_sessions_lie_in_buckets_changes_no_key(sessions, n_ranges, random):
    shuffled = list(sessions)
    random.shuffle(shuffled)
    one, other = built([sessions], n_ranges), built([shuffled[::3], shuffled[1::3], shuffled[2::3]], n_ranges)
    assert [keys.tolist() for keys in one.ranges] == [keys.tolist() for keys in other.ranges]


def test_a_key_is_both_rows_the_smaller_first():
    last = 2**31 - 1  # the largest row that an int32 holds
    a, b = np.array([2, 1, last], np.int32), np.array([1, 2, 0], np.int32)
    assert co_reading.pair_keys(a, b).tolist() == [(1 << 32) + 2, (1 << 32) + 2, last]


def test_a_document_read_twice_was_not_read_with_itself():
    keys, long = co_reading.expand(*columns([[4, 4, 4]]))
    assert (len(keys), len(long)) == (0, 0)


@pytest.mark.parametrize(("length", "n_pairs", "n_long"), [(64, 64 * 63 // 2, 0), (65, 0, 65)])
def test_a_session_of_more_than_64_events_is_kept_as_a_list(length, n_pairs, n_long):
    keys, long = co_reading.expand(*columns([list(range(length))]))
    assert (len(keys), len(long)) == (n_pairs, n_long)


def test_a_reader_of_everything_costs_a_list_and_not_its_square():
    met = built([[list(range(5000))], [[5001, 5002]]], n_ranges=16, n_documents=6000)
    a, b = np.array([0, 4999, 0, 5001], np.int32), np.array([4999, 1, 5001, 5002], np.int32)
    assert met.holds(a, b).tolist() == [True, True, False, True]
    assert (len(met), len(met.long_keys)) == (1, 5000)


def test_two_long_sessions_do_not_make_their_documents_meet():
    met = built([[list(range(300)), list(range(200, 500))]], n_ranges=4, n_documents=600)
    a, b = np.array([0, 0, 250, 250, 599]), np.array([299, 499, 0, 499, 0])
    assert met.holds(a, b).tolist() == [True, False, True, True, False]


def test_ranges_hold_about_equally_many_keys():
    # all of 1,000 documents were read together: 499,500 keys
    low, high = np.triu_indices(1000, k=1)
    keys = co_reading.distinct(co_reading.pair_keys(low, high))
    parts = co_reading.by_range(keys, co_reading.bounds(8, 1000))
    assert sum(map(len, parts)) == 499_500
    assert all(abs(len(part) - 499_500 / 8) < 1000 for part in parts)  # less than a row's keys


def test_ranges_may_be_mapped_from_disk(tmp_path):
    made = built([[[0, 1, 2], [3, 4]]], n_ranges=3)
    for number, keys in enumerate(made.ranges):
        np.save(tmp_path / f"{number}.npy", keys)
    mapped = [np.load(tmp_path / f"{number}.npy", mmap_mode="r") for number in range(3)]
    met = CoReading.of(mapped, made.limits, np.empty(0, co_reading.LONG), N)
    assert met.holds(np.array([2, 3, 2]), np.array([0, 4, 3])).tolist() == [True, True, False]


def test_nothing_read_and_nothing_asked():
    met = built([], n_ranges=5)
    assert met.holds(np.array([0, 1]), np.array([1, 2])).tolist() == [False, False]
    assert met.holds(np.empty(0, np.int32), np.empty(0, np.int32)).tolist() == []
