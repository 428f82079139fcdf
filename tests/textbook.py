"""The textbook form of the session cut, the tests' oracle: one element an event, Beam's own session windows.

Timestamps are read one by one with the standard library; no polars, no NumPy, no Arrow.
"""

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.transforms import window
from apache_beam.utils.timestamp import Timestamp

# Beam hands elements on with their times in milliseconds. Here its clock runs a thousand times slower than
# the log's, so that a microsecond is one of its milliseconds.
SLOWER = 1000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


class Event(NamedTuple):
    user_id: str
    document_id: str
    timestamp: int  # microseconds since 1970
    text: str | None


class Session(NamedTuple):
    user_id: str
    start: int  # microseconds since 1970, of the first event
    end: int  # of the last event; Beam's window ends one gap later
    document_ids: list[str]


def moment(written: str) -> int:
    """Microseconds since 1970 of an ISO 8601 time with a zone, or of epoch seconds or milliseconds.

    Raises:
        ValueError: it is neither.
    """
    try:
        number = Decimal(written)
    except InvalidOperation:
        return (datetime.fromisoformat(written) - EPOCH) // MICROSECOND
    return int((number * (1000 if abs(number) >= 10**11 else 10**6)).to_integral_value())


def sessions(logs: Iterable[tuple[int, Sequence[Event]]], path: Path) -> list[list[Session]]:
    """Each log's sessions, sorted. One Beam pipeline cuts them all: starting one costs more than a log.

    Args:
        logs: (gap_duration in seconds, events) of each log.
        path: a file to write.
    """
    rows: dict[int, list[tuple]] = {}
    n_logs = 0
    for number, (gap_duration, events) in enumerate(logs):
        n_logs = number + 1
        # the log is part of the user, so that no two logs meet
        rows.setdefault(gap_duration, []).extend(((number, event.user_id), *event[1:]) for event in events)
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        cut = [
            pipeline | f"{gap}: rows" >> beam.Create(found) | f"{gap}: cut" >> TextbookSessions(gap)
            for gap, found in rows.items()
        ]
        _ = cut | beam.Flatten() | beam.combiners.ToList() | beam.Map(_write, str(path))
    found: list[list[Session]] = [[] for _ in range(n_logs)]
    for (number, user_id), start, end, document_ids in json.loads(path.read_text(encoding="utf-8")):
        found[number].append(Session(user_id, start, end, document_ids))
    return [sorted(of_log) for of_log in found]


class TextbookSessions(beam.PTransform):
    """(user, document_id, timestamp, text) -> (user, start, end, document_ids); equal elements count once."""

    def __init__(self, gap_duration: int) -> None:
        super().__init__()
        self.gap_duration = gap_duration

    def expand(self, rows: Any) -> Any:
        return (
            rows
            | beam.Distinct()
            | "at its time" >> beam.Map(_at_its_time)
            | beam.WindowInto(window.Sessions(self.gap_duration * SLOWER))
            | beam.GroupByKey()
            | "session" >> beam.Map(_session, self.gap_duration)
            | "of all time" >> beam.WindowInto(window.GlobalWindows())
        )


def _at_its_time(row: tuple[Any, str, int, str | None]) -> window.TimestampedValue:
    user, document_id, timestamp, _ = row
    return window.TimestampedValue((user, (timestamp, document_id)), Timestamp(micros=timestamp * SLOWER))


def _session(keyed: tuple[Any, Iterable[tuple]], gap_duration: int, of: Any = beam.DoFn.WindowParam) -> tuple:
    user, found = keyed
    document_ids = [document_id for _, document_id in sorted(found)]  # equal times by document_id
    return user, of.start.micros // SLOWER, of.end.micros // SLOWER - gap_duration * 1_000_000, document_ids


def _write(found: list, path: str) -> None:
    Path(path).write_text(json.dumps(found), encoding="utf-8")
