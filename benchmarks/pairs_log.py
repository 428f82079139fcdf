"""The made log of benchmarks/pairs.py: skewed, shuffled, with duplicates; the same for the same settings.

It is made block by block, so that 50 million events need no more memory than two million.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

SEED = 7

# Of the sessions every second one goes to the users by turns, so that nearly every user has one, and the
# others by Zipf's law. A session stays in one topic but for its strays: were all documents drawn alike,
# any two popular ones would have been read together by somebody.
EVENTS_A_USER = 10
N_DOCUMENTS = 100_000  # fewer than events at any rate
DOCUMENTS_A_TOPIC = 100
EXPONENT = 0.8  # of Zipf's law, for users, for topics and for the documents of a topic
STRAYS = 0.1  # share of a session's events that are of any topic
MEAN_LENGTH = 5  # events a session before neighbours merge; geometric
MEAN_GAP = 240  # seconds between a session's events; exponential, whole seconds, so some are equal
EDGE_GAPS = 0.01  # share of gaps that are exactly 1,800 seconds, where engines could differ
DAYS = 365
SESSIONS_A_DAY = 10  # no user has more drawn by Zipf's law: the log holds readers, not crawlers
DUPLICATES = 0.01
N_FILES = 16
BLOCK = 2_000_000  # events held in memory at once while the log is made
START = 1_750_000_000  # epoch seconds


def make(n_events: int, texts: bool, folder: Path) -> Path:
    """Write events-*.parquet and documents.parquet into `folder`, unless they are there already.

    Raises:
        ValueError: what is there was made in another way.
    """
    settings = {
        "events": n_events, "texts": texts, "users": n_users(n_events), "topics": n_topics(n_events),
        "documents_a_topic": DOCUMENTS_A_TOPIC, "exponent": EXPONENT, "strays": STRAYS,
        "mean_length": MEAN_LENGTH, "mean_gap": MEAN_GAP, "edge_gaps": EDGE_GAPS, "days": DAYS,
        "sessions_a_day": SESSIONS_A_DAY, "duplicates": DUPLICATES, "files": N_FILES, "block": BLOCK,
        "seed": SEED,
    }  # fmt: skip
    note = folder / "made.json"
    if note.exists():
        if json.loads(note.read_text(encoding="utf-8")) != settings:
            raise ValueError(f"{folder}: the log in it was made with other settings; remove it")
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_documents(n_topics(n_events) * DOCUMENTS_A_TOPIC, partial / "documents.parquet")
    _write_events(n_events, texts, partial)
    (partial / note.name).write_text(json.dumps(settings, indent=1), encoding="utf-8")
    partial.rename(folder)
    return folder


def n_users(n_events: int) -> int:
    return max(1, n_events // EVENTS_A_USER)


def n_topics(n_events: int) -> int:
    return max(1, min(N_DOCUMENTS, n_events) // DOCUMENTS_A_TOPIC)


def _write_documents(n_documents: int, path: Path) -> None:
    """Documents of eight made-up words, some 60 characters."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    syllables = ("ka", "mo", "ri", "te"), ("lan", "mer", "sol", "vin"), ("dor", "eth", "ir", "us")
    words = np.array([a + b + c for a in syllables[0] for b in syllables[1] for c in syllables[2]])
    picked = words[np.random.default_rng(SEED).integers(0, len(words), (n_documents, 8))]
    ids = [f"document{n}" for n in range(n_documents)]
    table = pa.table({"document_id": ids, "text": [" ".join(row) for row in picked]})
    pq.write_table(table, path, compression="zstd")


def _write_events(n_events: int, texts: bool, folder: Path) -> None:
    """Shuffle each block of events and deal it to all files: a session is spread over them."""
    import pyarrow.parquet as pq

    with ExitStack() as stack:
        writers: list[pq.ParquetWriter] = []
        for block in _blocks(n_events, texts):
            for n in range(N_FILES):
                if len(writers) == n:
                    path = folder / f"events-{n:05d}.parquet"
                    writer = pq.ParquetWriter(path, block.schema, compression="zstd")
                    writers.append(stack.enter_context(writer))
                first, last = len(block) * n // N_FILES, len(block) * (n + 1) // N_FILES
                writers[n].write_table(block.slice(first, last - first))


def _blocks(n_events: int, texts: bool) -> Iterator[Any]:
    """Arrow tables of at most BLOCK events: user_id, document_id, timestamp[, text]."""
    import numpy as np

    rng = np.random.default_rng(SEED)
    n_by_law = n_events / MEAN_LENGTH / 2  # sessions
    users = _zipf(n_users(n_events), largest=SESSIONS_A_DAY * DAYS / n_by_law)
    topics, turn = _zipf(n_topics(n_events)), 0
    for done in range(0, n_events, BLOCK):
        n = min(BLOCK, n_events - done)
        n_distinct = n - int(n * DUPLICATES)
        lengths = rng.geometric(1 / MEAN_LENGTH, n_distinct)
        n_sessions = int(np.searchsorted(np.cumsum(lengths), n_distinct)) + 1
        session = np.repeat(np.arange(n_sessions), lengths[:n_sessions])[:n_distinct]
        user = _draw(rng, users, n_sessions)
        user[::2] = (turn + np.arange(len(user[::2]))) % len(users)
        turn += len(user[::2])
        document = _documents(rng, topics, session, n_sessions)
        seconds = _times(rng, session, n_sessions)
        twice = rng.choice(n_distinct, n - n_distinct, replace=False)
        order = rng.permutation(np.concatenate([np.arange(n_distinct), twice]))
        yield _table(user[session][order], document[order], seconds[order], texts)


def _documents(rng: Any, topics: Any, session: Any, n_sessions: int) -> Any:
    """Each event's document, a number: of its session's topic, or of any where it strays."""
    of_topic = _zipf(DOCUMENTS_A_TOPIC)
    topic = _draw(rng, topics, n_sessions)[session]
    strays = rng.random(len(session)) < STRAYS
    topic[strays] = _draw(rng, topics, int(strays.sum()))
    return topic * len(of_topic) + _draw(rng, of_topic, len(session))


def _times(rng: Any, session: Any, n_sessions: int) -> Any:
    """Epoch seconds of each event: sessions start at any moment of the year, gaps are exponential."""
    import numpy as np

    gaps = rng.exponential(MEAN_GAP, len(session)).astype(np.int64)
    gaps[rng.random(len(session)) < EDGE_GAPS] = 1800
    elapsed = np.cumsum(gaps)
    first = np.searchsorted(session, np.arange(n_sessions))
    starts = START + rng.integers(0, DAYS * 86_400, n_sessions)
    return starts[session] + elapsed - elapsed[first][session]


def _table(user: Any, document: Any, seconds: Any, texts: bool) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    def named(prefix: str, numbers: Any) -> Any:
        return pc.binary_join_element_wise(prefix, pa.array(numbers).cast(pa.string()), "")

    columns = {
        "user_id": named("user", user),
        "document_id": named("document", document),
        "timestamp": pa.array(seconds * 1_000_000).cast(pa.timestamp("us", tz="UTC")),
    }
    if texts:  # decided by the other columns, so that duplicates stay exact
        marked = pc.binary_join_element_wise(
            columns["user_id"], columns["document_id"], " marked a passage of "
        )
        columns["text"] = marked
    return pa.table(columns)


def _zipf(n: int, largest: float = 1.0) -> Any:
    """Cumulative shares of ranks 1 to n, in proportion to rank ** -EXPONENT but none above `largest`."""
    import numpy as np

    weights = np.arange(1, n + 1) ** -EXPONENT
    weights = np.minimum(weights / weights.sum(), largest)
    return np.cumsum(weights / weights.sum())


def _draw(rng: Any, cumulative: Any, n: int) -> Any:
    import numpy as np

    return np.minimum(np.searchsorted(cumulative, rng.random(n), side="right"), len(cumulative) - 1)
