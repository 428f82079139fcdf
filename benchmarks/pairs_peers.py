"""The peers of benchmarks/pairs.py: the same job as an expert of each library would write it.

Each reads DATA/events-*.parquet and DATA/documents.parquet, and writes sessions*.parquet and pairs*.parquet
into OUT. Libraries are imported inside: a peer pays for its own only.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from random import choices
from typing import Any

GAP_DURATION = 1800  # seconds, the stage's default
SEED = 7
EVENT_COLUMNS = ["user_id", "document_id", "timestamp"]
PAIR_COLUMNS = [
    "anchor", "positive", "negative", "anchor_id", "positive_id", "negative_id", "session_id", "user_id",
]  # fmt: skip


def polars_alone(data: Path, out: Path) -> None:
    """Documents as numbers and users as categories, one sort, and what is written streams."""
    import numpy as np
    import polars as pl

    documents = pl.read_parquet(data / "documents.parquet").sort("document_id").with_row_index("document")
    events = _polars_cut(data, documents)
    (
        events.lazy()
        .with_columns(document_id=documents["document_id"].gather(events["document"]))
        .group_by("session_id", maintain_order=True)
        .agg(
            pl.col("user_id").first().cast(pl.String),
            start=pl.col("timestamp").first(),
            end=pl.col("timestamp").last(),
            document_ids=pl.col("document_id"),
        )
        .sink_parquet(out / "sessions.parquet", compression="zstd", engine="streaming")
    )
    pairs = (
        events.lazy()
        .select("session_id", "user_id", a="document", b=pl.col("document").shift(-1),
                same=pl.col("session_id") == pl.col("session_id").shift(-1))
        .filter(pl.col("same") & (pl.col("a") != pl.col("b")))
        .unique(["session_id", "a", "b"])
        .collect()
    )  # fmt: skip
    drawn = np.random.default_rng(SEED).integers(0, len(events), len(pairs))
    rows = pairs.lazy().with_columns(
        n=events["document"].gather(drawn), user_id=pl.col("user_id").cast(pl.String)
    )
    for number, name in (("a", "anchor"), ("b", "positive"), ("n", "negative")):
        known = {"document": number, "document_id": f"{name}_id", "text": name}
        rows = rows.join(documents.lazy().rename(known), on=number)
    rows.select(PAIR_COLUMNS).sink_parquet(out / "pairs.parquet", compression="zstd", engine="streaming")


def _polars_cut(data: Path, documents: Any) -> Any:
    """user_id, timestamp, document (row of `documents`), session_id: sorted, without duplicates."""
    import polars as pl

    key = ["user", "timestamp", "document"]
    events = (
        pl.scan_parquet(data / "events-*.parquet")
        .join(documents.lazy().select("document_id", "document"), on="document_id")
        .select(pl.col("user_id").cast(pl.Categorical), "timestamp", "document")
        .with_columns(user=pl.col("user_id").to_physical())
        .sort(key)
        .collect(engine="streaming")
    )

    def changes(name: str) -> pl.Expr:
        return pl.col(name).ne_missing(pl.col(name).shift(1))

    starts = changes("user") | (pl.col("timestamp").diff() >= pl.duration(seconds=GAP_DURATION))
    return (
        events.filter(pl.any_horizontal(changes(name) for name in key))  # in order, duplicates are neighbours
        .with_columns(session_id=starts.cum_sum())
        .select("user_id", "timestamp", "document", pl.col("session_id").set_sorted())
    )


DUCKDB = (
    "SET preserve_insertion_order = false",
    """CREATE TEMP TABLE documents AS
    SELECT document_id, text, (row_number() OVER (ORDER BY document_id))::INTEGER AS document
    FROM read_parquet('{data}/documents.parquet')""",
    """CREATE TEMP TABLE events AS
    SELECT DISTINCT user_id, document, epoch_us("timestamp") AS us
    FROM read_parquet('{data}/events-*.parquet') JOIN documents USING (document_id)""",
    """CREATE TEMP TABLE cut AS
    WITH marked AS (
        SELECT user_id, document, us,
            coalesce(us - lag(us) OVER by_user >= {gap}, true) AS starts,
            CASE WHEN lead(us) OVER by_user - us < {gap} THEN lead(document) OVER by_user END AS next
        FROM events
        WINDOW by_user AS (PARTITION BY user_id ORDER BY us, document)
    )
    SELECT user_id, document, us, next, max(CASE WHEN starts THEN us END) OVER (
        PARTITION BY user_id ORDER BY us, document ROWS UNBOUNDED PRECEDING) AS start
    FROM marked""",
    """COPY (
        SELECT hash(user_id, start) AS session_id, user_id, make_timestamptz(start) AS start,
            make_timestamptz(max(us)) AS "end", list(document_id ORDER BY us, document) AS document_ids
        FROM cut JOIN documents USING (document) GROUP BY user_id, cut.start
    ) TO '{out}/sessions.parquet' (FORMAT parquet, COMPRESSION zstd)""",
    # To draw an event uniformly is to draw a document by its events.
    """CREATE TEMP TABLE popularity AS
    SELECT document, (sum(n) OVER (ORDER BY document) - n)::BIGINT AS below
    FROM (SELECT document, count(*) AS n FROM cut GROUP BY document)""",
    """CREATE TEMP TABLE pairs AS
    SELECT *, floor(random() * (SELECT count(*) FROM cut))::BIGINT AS drawn
    FROM (SELECT DISTINCT user_id, start, document AS a, next AS b FROM cut WHERE next <> document)""",
    """COPY (
        SELECT a.text AS anchor, b.text AS positive, n.text AS negative, a.document_id AS anchor_id,
            b.document_id AS positive_id, n.document_id AS negative_id,
            hash(user_id, start) AS session_id, user_id
        FROM pairs ASOF JOIN popularity ON drawn >= below
            JOIN documents a ON a.document = pairs.a
            JOIN documents b ON b.document = pairs.b
            JOIN documents n ON n.document = popularity.document
    ) TO '{out}/pairs.parquet' (FORMAT parquet, COMPRESSION zstd)""",
)


def duckdb_alone(data: Path, out: Path) -> None:
    """SQL with window functions; its memory limit as it comes, what does not fit spills beside the output."""
    import duckdb

    with duckdb.connect(config={"temp_directory": str(out / "spill")}) as connection:
        for statement in DUCKDB:
            connection.execute(statement.format(data=data, out=out, gap=GAP_DURATION * 1_000_000))


def pandas_alone(data: Path, out: Path) -> None:
    """Users and documents as numbers, one NumPy lexsort, boolean masks; lists by Arrow offsets."""
    import numpy as np
    import pandas as pd

    documents = pd.read_parquet(data / "documents.parquet").sort_values("document_id", ignore_index=True)
    events, users = _pandas_events(data, documents)
    user, time_, document = (events[name].to_numpy() for name in ("user", "timestamp", "document"))
    new_user = np.append(True, user[1:] != user[:-1])
    starts = new_user | np.append(True, np.diff(time_) >= np.timedelta64(GAP_DURATION, "s"))
    session = np.cumsum(starts) - 1
    _pandas_sessions(events, users, documents, np.flatnonzero(starts), out / "sessions.parquet")

    at = np.flatnonzero(~starts[1:] & (document[1:] != document[:-1]))
    pairs = pd.DataFrame(
        {"session_id": session[at], "a": document[at], "b": document[at + 1], "user": user[at]}
    )
    pairs = pairs.drop_duplicates(["session_id", "a", "b"])
    pairs["n"] = document[np.random.default_rng(SEED).integers(0, len(document), len(pairs))]
    rows = pd.DataFrame({"session_id": pairs["session_id"].to_numpy(), "user_id": users.take(pairs["user"])})
    for number, name in (("a", "anchor"), ("b", "positive"), ("n", "negative")):
        rows[name] = documents["text"].array.take(pairs[number])
        rows[f"{name}_id"] = documents["document_id"].array.take(pairs[number])
    rows[PAIR_COLUMNS].to_parquet(out / "pairs.parquet", compression="zstd", index=False)


def _pandas_events(data: Path, documents: Any) -> tuple[Any, Any]:
    """Events as numbers (user, timestamp, document), sorted, without duplicates; and the users' ids."""
    import numpy as np
    import pandas as pd

    files = sorted(data.glob("events-*.parquet"))
    events = pd.concat([pd.read_parquet(path, columns=EVENT_COLUMNS) for path in files], ignore_index=True)
    document = pd.Index(documents["document_id"]).get_indexer(events["document_id"]).astype(np.int32)
    user, users = pd.factorize(events["user_id"])
    timestamp = events["timestamp"].dt.tz_localize(None).to_numpy()
    order = np.lexsort((document, timestamp, user))
    order = order[document[order] >= 0]
    events = pd.DataFrame(
        {"user": user[order].astype(np.int32), "timestamp": timestamp[order], "document": document[order]}
    )
    is_new = (events != events.shift()).any(axis=1)  # in order, duplicates are neighbours
    return events[is_new], users


def _pandas_sessions(events: Any, users: Any, documents: Any, first: Any, path: Path) -> None:
    import numpy as np
    import pandas as pd
    import pyarrow as pa

    last = np.append(first[1:], len(events)) - 1
    timestamps = events["timestamp"].dt.tz_localize("UTC").array
    ids = pa.array(documents["document_id"].array.take(events["document"]))
    lists = pa.LargeListArray.from_arrays(np.append(first, len(events)), ids)
    sessions = {
        "session_id": np.arange(len(first)),
        "user_id": users.take(events["user"].to_numpy()[first]),
        "start": timestamps[first],
        "end": timestamps[last],
        "document_ids": pd.arrays.ArrowExtensionArray(lists),
    }
    pd.DataFrame(sessions).to_parquet(path, compression="zstd", index=False)


def textbook_beam(data: Path, out: Path) -> None:
    """One element an event, Beam's own session windows, documents and popularity as side inputs.

    As Beam's guide would have it, on the stage's default runner, one worker.
    """
    import apache_beam as beam
    import pyarrow as pa
    from apache_beam.io.parquetio import ReadFromParquet, WriteToParquet
    from apache_beam.transforms import window

    moment = pa.timestamp("us", tz="UTC")
    session_schema = {
        "session_id": pa.string(), "user_id": pa.string(), "start": moment, "end": moment,
        "document_ids": pa.list_(pa.string()),
    }  # fmt: skip
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        documents = pipeline | "documents" >> ReadFromParquet(str(data / "documents.parquet"))
        texts = beam.pvalue.AsDict(documents | beam.Map(lambda row: (row["document_id"], row["text"])))
        sessions = (
            pipeline
            | "events" >> ReadFromParquet(str(data / "events-*.parquet"), columns=EVENT_COLUMNS)
            | "known" >> beam.Filter(lambda row, texts: row["document_id"] in texts, texts)
            | "tuples" >> beam.Map(_textbook_tuple)
            | beam.Distinct()
            | "times" >> beam.Map(lambda row: window.TimestampedValue((row[0], row[1:]), row[1] / 1e6))
            | beam.WindowInto(window.Sessions(GAP_DURATION))
            | beam.GroupByKey()
            | "sessions" >> beam.MapTuple(_textbook_session)
            | "forget windows" >> beam.WindowInto(window.GlobalWindows())
        )
        popularity = (
            sessions
            | "read documents" >> beam.FlatMap(lambda session: session["document_ids"])
            | beam.combiners.Count.PerElement()
            | beam.combiners.ToList()
            | "cumulative" >> beam.Map(_textbook_cumulative)
        )
        pairs = (
            sessions
            | "neighbours" >> beam.FlatMap(_textbook_neighbours)
            | "negatives" >> beam.Map(_textbook_pair, beam.pvalue.AsSingleton(popularity), texts)
        )
        _ = sessions | "write sessions" >> WriteToParquet(
            str(out / "sessions"), pa.schema(session_schema), codec="zstd", file_name_suffix=".parquet"
        )
        _ = pairs | "write pairs" >> WriteToParquet(
            str(out / "pairs"), pa.schema(dict.fromkeys(PAIR_COLUMNS, pa.string())), codec="zstd",
            file_name_suffix=".parquet",
        )  # fmt: skip


def _textbook_tuple(row: Mapping[str, Any]) -> tuple[str, int, str]:
    return row["user_id"], round(row["timestamp"].timestamp() * 1e6), row["document_id"]


def _textbook_session(user_id: str, found: Iterable[tuple[int, str]]) -> dict[str, Any]:
    events = sorted(found)
    start, end = events[0][0], events[-1][0]
    return {
        "session_id": f"{user_id} {start}", "user_id": user_id, "start": start, "end": end,
        "document_ids": [document_id for _, document_id in events],
    }  # fmt: skip


def _textbook_neighbours(session: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    ids = session["document_ids"]
    for a, b in sorted({(a, b) for a, b in pairwise(ids) if a != b}):
        yield a, b, session["session_id"], session["user_id"]


def _textbook_cumulative(counts: Sequence[tuple[str, int]]) -> tuple[list[str], list[int]]:
    return [name for name, _ in counts], list(accumulate(n for _, n in counts))


def _textbook_pair(pair: tuple, popularity: tuple, texts: Mapping[str, str]) -> dict[str, str]:
    a, b, session_id, user_id = pair
    (n,) = choices(popularity[0], cum_weights=popularity[1])
    return {
        "anchor": texts[a], "positive": texts[b], "negative": texts[n], "anchor_id": a, "positive_id": b,
        "negative_id": n, "session_id": session_id, "user_id": user_id,
    }  # fmt: skip


PEERS: dict[str, Callable[[Path, Path], None]] = {
    "textbook": textbook_beam,
    "polars": polars_alone,
    "duckdb": duckdb_alone,
    "pandas": pandas_alone,
}
