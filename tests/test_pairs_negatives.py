"""Stage `pairs` and its negatives: the real job against one that draws pair by pair in plain Python."""

from collections import Counter
from datetime import datetime
from itertools import combinations, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import config, pairing, pairs, storage
from pipeline.artifacts import Embeddings, Pairs, writing
from pipeline.bm25 import bm25_scores
from pipeline.errors import ArtifactError, ConfigError
from pipeline.hashing import mix
from pipeline.sessions import COUNTS, Sessions

HOUR = 3_600_000_000
SEED = 11

# --- Plain functions ------------------------------------------------------------------------------------

N = 8  # documents
HASHES = mix(np.arange(N, dtype=np.uint64))  # of their ids
# (user, documents) of each session, an hour after the one before
SESSIONS = st.lists(
    st.tuples(st.integers(1, 4), st.lists(st.integers(0, N - 1), min_size=1, max_size=7)), max_size=12
)


def sessions_of(rows: list[tuple[int, list[int]]], hours: list[int] | None = None) -> Sessions:
    start = np.array(hours or range(len(rows)), np.int64) * HOUR
    user = np.array([user for user, _ in rows], np.uint64)
    return Sessions(
        session=mix(user, start.view(np.uint64)) if rows else user,
        user=user,
        user_id=pa.array([f"reader{user}" for user, _ in rows], pa.string()),
        start=start,
        end=start,
        offsets=np.cumsum([0, *(len(documents) for _, documents in rows)]).astype(np.int32),
        documents=np.array([d for _, documents in rows for d in documents], np.int32),
    )


@given(SESSIONS)
def test_pairs_are_neighbours_in_reading_order_once_a_session(rows):
    sessions = sessions_of(rows)
    session, asked = pairing.ask(sessions, HASHES, SEED)
    plain = [(n, a, b) for n, (_, documents) in enumerate(rows) for a, b in pairwise(documents) if a != b]
    found = zip(session.tolist(), asked.anchor.tolist(), asked.positive.tolist(), strict=True)
    assert list(found) == list(dict.fromkeys(plain))
    assert asked.user.tolist() == [rows[n][0] for n in session.tolist()]
    assert pairing.giving_pairs(sessions).tolist() == sorted({n for n, _, _ in plain})


@given(SESSIONS)
def test_a_pairs_key_is_a_hash_of_seed_session_anchor_and_positive(rows):
    sessions = sessions_of(rows)
    session, asked = pairing.ask(sessions, HASHES, SEED)
    parts = zip(sessions.session[session], HASHES[asked.anchor], HASHES[asked.positive], strict=True)
    assert asked.key.tolist() == [int(mix(np.uint64(SEED), *each)[0]) for each in parts]
    assert not set(asked.key.tolist()) & set(pairing.ask(sessions, HASHES, SEED + 1)[1].key.tolist())


def in_buckets(rows: list, n_buckets: int, folder: str) -> list[str]:
    """The files of sessions that the survey reads; a user is in one bucket, and an empty one has no file."""
    paths = []
    for bucket in sorted({user % n_buckets for user, _ in rows}):
        at = [n for n, (user, _) in enumerate(rows) if user % n_buckets == bucket]
        sessions = sessions_of([rows[n] for n in at], at)
        paths.append(f"{folder}/{bucket:05d}-sessions.arrow")
        storage.write_arrow(sessions.to_arrow(), paths[-1])
    return paths


def test_a_bucket_whose_readers_were_all_set_aside_has_no_sessions_and_stops_nothing(tmp_path):
    path = str(tmp_path / "00000-sessions.arrow")
    storage.write_arrow(sessions_of([]).to_arrow(), path)
    assert len(Sessions.from_arrow(storage.read_arrow(path))) == 0
    assert pairs.held_out_spans([path], share=0.1) == (None, None)
    (_, counts), *_ = survey_of(str(tmp_path))(path)
    assert counts == {"long": 0}


def survey_of(folder: str, n_ranges: int = 3, before: int | None = None) -> pairing.Survey:
    return pairing.Survey(
        folder=folder, n_documents=N, n_ranges=n_ranges, before=before, seed=SEED, shares=(), hard=()
    )


@given(SESSIONS, st.integers(1, 3), st.none() | st.integers(0, 12))
@settings(max_examples=50, deadline=None)
def test_popularity_counts_readings_before_the_held_out_ones(rows, n_buckets, n_early):
    with TemporaryDirectory() as folder:
        survey = survey_of(folder, before=None if n_early is None else n_early * HOUR)
        for path in in_buckets(rows, n_buckets, folder):
            survey(path)
        parts = [storage.read_arrow(path) for path in storage.names(str(folder), "popularity-*")]
        found = pairing.add_popularity(parts, N)
    read = [(user, d) for user, documents in rows[:n_early] for d in documents]
    readers = [{user for user, d in read if d == document} for document in range(N)]
    times = Counter(d for _, d in read)
    assert found.n_events.tolist() == [times[document] for document in range(N)]
    assert found.only_reader.tolist() == [next(iter(r)) if len(r) == 1 else 0 for r in readers]


@given(SESSIONS, st.integers(1, 3), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_what_was_read_together_goes_through_files_and_comes_back(rows, n_buckets, n_ranges):
    with TemporaryDirectory() as folder:
        survey, in_range = survey_of(folder, n_ranges, before=0), {}
        for path in in_buckets(rows, n_buckets, folder):
            for number, found in survey(path):
                in_range.setdefault(number, []).append(found)
        in_range.pop(COUNTS, None)
        counted = [pairing.MergeRange(folder)(keyed)["co_read"] for keyed in in_range.items()]
        met = pairing.MetFiles(folder, N, n_ranges).open()
        asked = list(combinations(range(N), 2))
        a, b = np.array(asked).T
        found = {frozenset(pair) for pair, holds in zip(asked, met.holds(b, a), strict=True) if holds}
    # held-out sessions count too: what was read together, at whatever time, is no negative
    plain = {frozenset(pair) for _, documents in rows for pair in combinations(set(documents), 2)}
    assert found == plain
    assert sum(counted) == len(plain)


def test_a_merge_that_is_tried_again_gives_the_same(tmp_path):
    # a cluster computes again what a worker had in memory when it died
    (path,) = in_buckets([(1, [0, 1, 2])], 1, str(tmp_path))
    (number, keys), _ = survey_of(str(tmp_path), n_ranges=1)(path)
    merge = pairing.MergeRange(str(tmp_path))
    assert merge((number, [keys])) == {"co_read": 3}
    assert merge((number, [keys])) == {"co_read": 3}


# --- The Beam job against plain Python ------------------------------------------------------------------

MIXES: dict[str, dict[str, float]] = {
    "random": {"random": 1.0},
    "cross_user": {"cross_user": 1.0},
    "bm25": {"bm25": 1.0},
    "mined": {"mined": 1.0},
    "all four": {"cross_user": 0.3, "bm25": 0.25, "mined": 0.25, "random": 0.2},
}
N_CANDIDATES, MAX_DRAWS, MAX_POSITIVE_RATIO = 4, 3, 0.75
NEW = ("sea.0", "bread.5")  # documents that the earlier run did not have


@pytest.fixture(scope="module")
def earlier(tmp_path_factory, log) -> Path:
    """The work folder of an earlier run: other documents, in another order; a topic's are near each other."""
    work = tmp_path_factory.mktemp("earlier")
    ids = [f"{topic}.{n}" for n in range(10) for topic in ("stars", "sea", "gone", "music", "bread")]
    ids = [document_id for document_id in ids if document_id not in NEW]
    random = np.random.default_rng(7)
    centre = {topic: random.normal(size=8) for topic in sorted({i.split(".")[0] for i in ids})}
    rows = np.array([centre[i.split(".")[0]] + random.normal(size=8) for i in ids], np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    with writing(Embeddings, work / "embeddings", config={}, inputs=[]) as draft:
        np.save(draft.folder / "embeddings.npy", rows)
        pq.write_table(pa.table({"document_id": ids, "text": ids}), draft.folder / "documents.parquet")
    return work


def settings_for(shares: dict[str, float], log: Path, earlier: Path, **more) -> config.Config:
    chosen = {
        "negatives": shares,
        "mined_from": str(earlier),
        "n_candidates": N_CANDIDATES,
        "max_draws": MAX_DRAWS,
        "max_positive_ratio": MAX_POSITIVE_RATIO,
        "popularity_exponent": 1.0,
        "seed": SEED,
        "n_buckets": 3,
    }
    return config.from_dict(
        {
            "events": {"paths": [str(log / "events.jsonl")]},
            "documents": {"paths": [str(log / "documents.jsonl")]},
            "pairs": chosen,
        }
        | more
    )


def run(given: config.Config, out: Path) -> Pairs:
    return pairs.run(given.pairs, given.events, given.documents, out)


@pytest.fixture(scope="module")
def made(tmp_path_factory, log, earlier) -> dict[str, Pairs]:
    """One run for each mix of strategies."""
    return {
        name: run(settings_for(shares, log, earlier), tmp_path_factory.mktemp("made") / "pairs")
        for name, shares in MIXES.items()
    }


class Row(NamedTuple):
    """A pair as the files hold it."""

    span: str
    session_id: str
    anchor: str
    positive: str
    negative: str | None


def rows_of(made: Pairs) -> list[Row]:
    columns = ["session_id", "anchor_id", "positive_id", "negative_id"]
    return [
        Row(span, *row.values())
        for span in pairing.SPANS
        for row in made.read(span).select(columns).to_pylist()
    ]


class PlainJob:
    """Draws the negatives of finished sessions one pair at a time; all in Python's own numbers and sets."""

    def __init__(self, made: Pairs, shares: dict[str, float], earlier: Path) -> None:
        # any document is the last resort, also where `random` has no share
        order = ("cross_user", "bm25", "mined", "random")
        self.shares = {name: shares.get(name, 0.0) for name in order if name in shares or name == "random"}
        self.documents: list[str] = made.read("documents")["document_id"].to_pylist()
        self.texts: list[str] = made.read("documents")["text"].to_pylist()
        self.sessions = made.read("sessions").to_pylist()
        self.starts = [datetime.fromisoformat(made.facts[span]) for span in ("dev_start", "test_start")]
        self.together = {
            frozenset(pair) for s in self.sessions for pair in combinations(set(s["document_ids"]), 2)
        }
        early = [s for s in self.sessions if s["start"] < self.starts[0]]
        self.readers: dict[str, set[str]] = {}
        for session in early:
            for document in session["document_ids"]:
                self.readers.setdefault(document, set()).add(session["user_id"])
        times = Counter(d for s in early for d in s["document_ids"])
        self.readings = [d for d in self.documents for _ in range(times[d])]
        self.vectors = self._vectors(earlier)
        self.counts: Counter = Counter()

    def _vectors(self, earlier: Path) -> dict[str, np.ndarray]:
        ids = pq.read_table(earlier / "embeddings" / "documents.parquet")["document_id"].to_pylist()
        return dict(zip(ids, np.load(earlier / "embeddings" / "embeddings.npy").tolist(), strict=True))

    def nearness(self, a: str, b: str) -> float | None:
        if a not in self.vectors or b not in self.vectors:
            return None
        return sum(x * y for x, y in zip(self.vectors[a], self.vectors[b], strict=True))

    def rows(self) -> list[Row]:
        asked = {
            (s["session_id"], s["user_id"], a, b): self.span(s)
            for s in self.sessions
            for a, b in pairwise(s["document_ids"])
            if a != b
        }
        keys = {pair: self.key(*pair) for pair in asked}
        self.hard = {
            name: {a: self.candidates(name, a) for a in self.anchors(name, keys)}
            for name in ("bm25", "mined")
            if name in self.shares
        }
        return [
            Row(span, pair[0], pair[2], pair[3], self.negative(keys[pair], *pair[1:]))
            for pair, span in asked.items()
        ]

    def span(self, session: dict) -> str:
        return pairing.SPANS[sum(session["start"] >= start for start in self.starts)]

    def key(self, session_id: str, user_id: str, anchor: str, positive: str) -> int:
        hashes = (xxhash.xxh64_intdigest(document.encode()) for document in (anchor, positive))
        return hashed(SEED, int(session_id, 16), *hashes)

    def own(self, key: int) -> str:
        at, end = hashed(key, 0) >> 11, 0.0
        for name, share in self.shares.items():
            end += share
            if at < end * 2**53:
                return name
        return name

    def anchors(self, name: str, keys: dict[tuple, int]) -> list[str]:
        return sorted({pair[2] for pair, key in keys.items() if self.own(key) == name})

    def candidates(self, name: str, anchor: str) -> list[tuple[str, float]]:
        """Best first; of those read with the anchor it counts the ones that stand before the last."""
        if name == "bm25":
            row = bm25_scores(self.texts, self.texts)(np.array([self.documents.index(anchor)]))[0]
            scores = dict(zip(self.documents, row.tolist(), strict=True))
        else:
            scores = {d: self.nearness(anchor, d) or 0.0 for d in self.documents}
        ranked = sorted(
            (d for d in self.documents if d != anchor and scores[d] > 0), key=lambda d: -scores[d]
        )
        taken: list[tuple[str, float]] = []
        kept = 10 * N_CANDIDATES if name == "mined" else N_CANDIDATES  # those too near are passed over later
        for document in ranked[: 5 * kept]:
            if len(taken) == kept:
                break
            if frozenset((anchor, document)) in self.together:
                self.counts[f"refused:{name}"] += 1
            else:
                taken.append((document, scores[document]))
        return taken

    def negative(self, key: int, user_id: str, anchor: str, positive: str) -> str | None:
        own = self.own(key)
        for name in [own, *(name for name in self.shares if name != own)]:
            salt = hashed(*name.encode())
            for turn in range(MAX_DRAWS):
                found = self.draw(name, hashed(key, salt, turn), user_id, anchor, positive)
                if found is None:
                    continue
                if found == anchor or frozenset((anchor, found)) in self.together:
                    self.counts[f"refused:{name}"] += 1
                    continue
                self.counts[f"given:{name}"] += 1
                return found
        return None

    def draw(self, name: str, number: int, user_id: str, anchor: str, positive: str) -> str | None:
        if name == "random":
            return self.documents[number % len(self.documents)]
        if name == "cross_user":
            found = self.readings[(number >> 11) * len(self.readings) >> 53]
            return None if self.readers[found] == {user_id} else found
        eligible = self.hard[name].get(anchor, [])
        if name == "mined":
            limit = self.nearness(anchor, positive)
            eligible = [c for c in eligible if limit is not None and c[1] <= MAX_POSITIVE_RATIO * limit]
            eligible = eligible[:N_CANDIDATES]
        return eligible[number % len(eligible)][0] if eligible else None


def hashed(*parts: int) -> int:
    return int(mix(*(np.uint64(part) for part in parts))[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXES)
def test_the_job_draws_what_plain_python_draws_pair_by_pair(made, earlier, name):
    job = PlainJob(made[name], MIXES[name], earlier)
    plain = job.rows()
    with_negative = [row for row in plain if row.negative is not None]
    assert len(with_negative) > 100  # of 720 pairs: mined alone has not for all
    assert sorted(rows_of(made[name])) == sorted(with_negative)
    assert made[name].facts["negatives"] == {
        strategy: {kind: job.counts[f"{kind}:{strategy}"] for kind in ("given", "refused")}
        for strategy, share in job.shares.items()
        if share or job.counts[f"given:{strategy}"]
    }
    lost = [(row.session_id, row.anchor, row.positive) for row in plain if row.negative is None]
    assert made[name].facts["rejects"] == ({"no_negative": len(lost)} if lost else {})
    assert made[name].rows["rejects"] == len(lost)


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXES)
def test_no_negative_shares_a_session_with_its_anchor(made, name):
    of_session = [set(ids) for ids in made[name].read("sessions")["document_ids"].to_pylist()]
    found = {(row.anchor, row.negative) for row in rows_of(made[name])}
    assert found
    assert not [
        (anchor, negative) for anchor, negative in found for ids in of_session if {anchor, negative} <= ids
    ]
    assert all(anchor != negative for anchor, negative in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXES)
def test_texts_users_and_ids_belong_together(made, name):
    documents = made[name].read("documents")
    text_of = dict(zip(documents["document_id"].to_pylist(), documents["text"].to_pylist(), strict=True))
    sessions = made[name].read("sessions", ["session_id", "user_id"]).to_pylist()
    user_of = {row["session_id"]: row["user_id"] for row in sessions}
    for span in pairing.SPANS:
        for row in made[name].read(span).to_pylist():
            assert [row[role] for role in ("anchor", "positive", "negative")] == [
                text_of[row[f"{role}_id"]] for role in ("anchor", "positive", "negative")
            ]
            assert row["user_id"] == user_of[row["session_id"]]


@pytest.mark.slow
def test_a_pair_without_a_negative_is_a_reject_with_its_ids(made):
    rejects = [row for row in made["mined"].read("rejects").to_pylist() if row["reason"] == "no_negative"]
    assert len(rejects) == made["mined"].facts["rejects"]["no_negative"]
    assert all(row["file"] is None and row["line"] is None for row in rejects)
    assert all('"anchor_id":' in row["detail"] for row in rejects)


@pytest.mark.slow
def test_a_mined_negative_is_known_to_the_earlier_run_and_not_too_near(made, earlier):
    job = PlainJob(made["mined"], MIXES["mined"], earlier)
    mined = [row for row in rows_of(made["mined"]) if not set(NEW) & {row.anchor, row.positive}]
    n_near = 0
    for row in mined:
        near, limit = job.nearness(row.anchor, row.negative), job.nearness(row.anchor, row.positive)
        n_near += near is not None and 0 < near <= MAX_POSITIVE_RATIO * limit + 1e-6
    # the earlier run had no vector of the NEW documents: their pairs are among those that got any document
    assert n_near >= made["mined"].facts["negatives"]["mined"]["given"]
    assert made["mined"].facts["negatives"]["random"]["given"] >= len(rows_of(made["mined"])) - len(mined) > 0


@pytest.mark.slow
def test_rows_in_other_files_and_another_order_give_the_same_bytes(tmp_path, log, earlier, made):
    lines = (log / "events.jsonl").read_text().splitlines()[::-1]
    for n in range(3):
        (tmp_path / f"part{n}.jsonl").write_text("\n".join(lines[n::3]))
    given = settings_for(MIXES["all four"], log, earlier, events={"paths": [str(tmp_path / "part*.jsonl")]})
    again = run(given, tmp_path / "pairs")
    assert again.manifest["files"] == made["all four"].manifest["files"]
    assert again.facts == made["all four"].facts


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes_and_other_buckets_the_same_pairs(tmp_path, log, earlier, made):
    given = settings_for(MIXES["all four"], log, earlier)
    assert run(given, tmp_path / "pairs").manifest["files"] == made["all four"].manifest["files"]
    chosen = config.as_dict(given.pairs) | {"n_buckets": "auto"}
    other = run(settings_for({}, log, earlier, pairs=chosen), tmp_path / "other")
    assert len(other.tables("pairs")) > len(made["all four"].tables("pairs"))
    assert sorted(rows_of(other)) == sorted(rows_of(made["all four"]))
    assert other.facts == made["all four"].facts


def test_an_exponent_that_no_number_holds_is_refused(log, earlier):
    given = settings_for(MIXES["cross_user"], log, earlier)
    chosen = config.as_dict(given.pairs) | {"popularity_exponent": 100.0}
    with pytest.raises(ConfigError, match="popularity_exponent"):
        settings_for({}, log, earlier, pairs=chosen)


# --- Mining from an earlier run -------------------------------------------------------------------------


def test_what_was_mined_from_is_an_input_by_its_content(log, earlier):
    given = settings_for(MIXES["mined"], log, earlier)
    inputs = pairs.inputs_of(given.pairs, given.events, given.documents)
    embeddings = Embeddings.open(earlier / "embeddings")
    assert {"path": str(embeddings.path), "digest": embeddings.digest} in inputs
    # where it lies decides nothing
    assert "mined_from" not in pairs.settings_of(given.pairs, given.events, given.documents)["pairs"]


def test_without_mining_an_earlier_run_is_not_looked_at(tmp_path, log):
    given = settings_for({"random": 1.0, "mined": 0.0}, log, tmp_path / "nothing")
    assert len(pairs.inputs_of(given.pairs, given.events, given.documents)) == 2


def test_mining_without_complete_embeddings_is_refused(tmp_path, log):
    given = settings_for(MIXES["mined"], log, tmp_path)
    with pytest.raises(ArtifactError, match="run stage encode first"):
        run(given, tmp_path / "new" / "pairs")
    assert not (tmp_path / "new" / "pairs").exists()


def test_mining_from_the_runs_own_work_folder_is_refused(log, earlier):
    given = settings_for(MIXES["mined"], log, earlier)
    with pytest.raises(ConfigError, match=r"pairs\.mined_from is .*, the work folder of this run"):
        run(given, earlier / "pairs")
    assert not (earlier / "pairs").exists()
