"""What is encoded again and what is copied: keys, plans, and the matrices that come of them."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import reuse
from pipeline.artifacts import Embeddings, writing
from pipeline.errors import ArtifactError
from pipeline.reuse import HERE, Known, Matrices, Matrix, Plan, key_of_encoder, row_keys
from pipeline.shards import UNSEEN, Encoded, Job, Shards
from pipeline.throughput import CUT, UNKNOWN

JOB = Job("model", dim=2, title="texts")


def vectors(texts: Iterable[str]) -> np.ndarray:
    """Stand in for a model: a text's angle is made of its hash, so no two texts are alike."""
    angles = np.array([hashlib.blake2b(text.encode(), digest_size=2).digest()[0] for text in texts], float)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def flags(texts: Iterable[str]) -> np.ndarray:
    """Of a model that reads three letters at most, knows no "?", and leaves capitals to the library."""
    return np.array(
        [UNSEEN if t.isupper() else CUT * (len(t) > 3) + UNKNOWN * (t == "?") for t in texts], np.uint8
    )


class Counting:
    """An engine that remembers what it was given; from shard `stops_at` on it makes none."""

    def __init__(self, stops_at: int = 1000) -> None:
        self.stops_at = stops_at
        self.texts: list[str] = []
        self.jobs: list[Job] = []

    def __call__(self, job: Job, windows: Iterable[tuple[int, list[str]]], shards: Shards) -> None:
        self.jobs.append(job)
        for number, texts in windows:
            if number >= self.stops_at:
                raise KeyboardInterrupt
            self.texts += texts
            shards.write(number, Encoded(vectors(texts), flags(texts)))


def make(
    folder: Path,
    texts: list[str],
    known: Known | None = None,
    engine: Callable | None = None,
    name: str = "embeddings",
    model_hash: str = "m",
) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    matrices = Matrices(folder, known or Known())
    planned = matrices.plan(name, lambda: iter(texts), JOB, model_hash)
    return matrices.make(planned, engine or Counting())


def version(path: Path, texts: list[str], **others: list[str]) -> Embeddings:
    """A complete artefact with embeddings.npy and further matrices."""
    with writing(Embeddings, path, config={}, inputs=[]) as draft:
        make(draft.folder, texts)
        for name, of in others.items():
            make(draft.folder, of, name=name.replace("_", "/"))
    return Embeddings.open(path)


# --- Keys --------------------------------------------------------------------------------------------


def test_a_rows_key_is_a_hash_of_its_text_under_the_encoders_key():
    keys, lengths = row_keys(["a", "한글"], b"encoder")
    wanted = hashlib.blake2b("한글".encode(), digest_size=16, key=b"encoder").digest()
    assert keys.dtype == np.uint8
    assert keys.shape == (2, 16)
    assert keys[1].tobytes() == wanted
    assert lengths.tolist() == [1, 2]


def test_no_texts_have_no_keys():
    keys, lengths = row_keys([], b"encoder")
    assert keys.shape == (0, 16)
    assert lengths.shape == (0,)


PROMPTS = {"query": "q: ", "document": "d: "}


@pytest.mark.parametrize(
    "changed",
    [
        {"task": "query"}, {"max_seq_length": 64}, {"precision": "bfloat16"}, {"dim": 3},
        {"prompts": {"query": "q: ", "document": "D: "}}, {"prompts": None},
    ],
)  # fmt: skip
def test_what_decides_a_row_changes_its_key(changed):
    job = replace(JOB, prompts=PROMPTS)
    assert key_of_encoder(job, "m") != key_of_encoder(replace(job, **changed), "m")


def test_another_model_changes_the_key():
    assert key_of_encoder(JOB, "m") != key_of_encoder(JOB, "n")


@pytest.mark.parametrize("changed", [{"rows": 2}, {"tokenizers": "0.0"}, {"transformers": "0.0"}])
def test_other_code_changes_the_key(monkeypatch, changed):
    before, by = key_of_encoder(JOB, "m"), reuse.made_by()
    assert sorted(by) == ["rows", "sentence-transformers", "tokenizers", "transformers"]
    monkeypatch.setattr(reuse, "made_by", lambda: by | changed)
    assert key_of_encoder(JOB, "m") != before


@pytest.mark.parametrize(
    "changed",
    [
        {"prompts": {"query": "Q: ", "document": "d: "}}, {"device": "cuda"}, {"model": "elsewhere"},
        {"title": "x"},
    ],
)  # fmt: skip
def test_what_decides_no_row_leaves_the_key(changed):
    job = replace(JOB, prompts=PROMPTS)
    assert key_of_encoder(job, "m") == key_of_encoder(replace(job, **changed), "m")


# --- What is known -----------------------------------------------------------------------------------


def keys_of(*numbers: int) -> np.ndarray:
    return np.array([[n] * 16 for n in numbers], np.uint8).reshape(-1, 16)


def known_of(*matrices: np.ndarray) -> Known:
    return Known(
        Matrix(keys, np.zeros((len(keys), 2), np.float32), np.zeros(len(keys), np.uint8)) for keys in matrices
    )


def test_a_row_is_found_in_the_first_matrix_that_has_it_and_there_in_the_first_row():
    known = known_of(keys_of(5, 7, 7), keys_of(7, 9))
    origin, at = known.find(keys_of(9, 7, 5, 1))
    assert origin.tolist() == [1, 0, 0, HERE]
    assert at[:3].tolist() == [1, 1, 0]


def test_keys_that_share_their_first_half_are_told_apart():
    one, other = keys_of(5), keys_of(5)
    other[0, 15] = 6
    origin, _ = known_of(one).find(other)
    assert origin.tolist() == [HERE]
    assert Plan.of(np.concatenate([one, other, one]), Known()).at.tolist() == [0, 1, 0]


def test_nothing_is_found_where_nothing_is_known():
    assert Known().find(keys_of(1))[0].tolist() == [HERE]
    assert known_of(keys_of()).find(keys_of(1))[0].tolist() == [HERE]
    assert len(known_of(keys_of(1)).find(keys_of())[0]) == 0


def test_a_plan_copies_what_is_known_and_encodes_equal_rows_once():
    plan = Plan.of(keys_of(3, 1, 3, 2, 1, 3), known_of(keys_of(2)))
    assert plan.origin.tolist() == [HERE, HERE, HERE, 0, HERE, HERE]
    assert plan.at.tolist() == [0, 1, 0, 0, 1, 0]
    assert plan.is_encoded.tolist() == [True, True, False, False, False, False]
    assert plan.counts == {"copied": 1, "equal": 3, "encoded": 2}


def test_every_matrix_of_the_version_before_is_looked_in(tmp_path):
    before = version(tmp_path / "v1", ["a"], untuned_documents=["b"], queries=["c"])
    engine = Counting()
    make(tmp_path / "next", ["c", "b", "a", "d"], Known.of(before), engine)
    assert engine.texts == ["d"]


def test_matrices_of_two_widths_are_copied_from_side_by_side(tmp_path):
    """A published model may be wider than the tuned one; the width is in the key."""
    wide = replace(JOB, dim=3)

    def write(matrices: Matrices, engine: Callable) -> tuple[np.ndarray, np.ndarray]:
        narrow = matrices.make(matrices.plan("embeddings", lambda: ["a"], JOB, "m"), engine)
        planned = matrices.plan("published/documents", lambda: ["a", "b"], wide, "p")
        return narrow, matrices.make(planned, engine)

    def engine(job: Job, windows: Iterable[tuple[int, list[str]]], shards: Shards) -> None:
        for number, texts in windows:
            shards.write(number, Encoded.unseen(np.eye(job.dim, dtype=np.float32)[: len(texts)]))

    with writing(Embeddings, tmp_path / "v1", config={}, inputs=[]) as draft:
        write(Matrices(draft.folder, Known()), engine)
    never = Counting()
    (tmp_path / "next").mkdir()
    known = Known.of(Embeddings.open(tmp_path / "v1"))
    narrow, published = write(Matrices(tmp_path / "next", known), never)
    assert never.jobs == []
    assert narrow.tolist() == [[1, 0]]
    assert published.tolist() == [[1, 0, 0], [0, 1, 0]]


# --- Matrices ----------------------------------------------------------------------------------------


def test_a_row_that_this_run_made_for_another_matrix_is_copied(tmp_path):
    engine = Counting()
    matrices = Matrices(tmp_path, Known())
    for name, texts in (("embeddings", ["a", "b", "cccc"]), ("untuned/documents", ["cccc", "d", "a"])):
        made = matrices.make(matrices.plan(name, lambda texts=texts: texts, JOB, "m"), engine)
        np.testing.assert_array_equal(made, vectors(texts))
    assert engine.texts == ["a", "b", "cccc", "d"]
    assert matrices.seen("untuned/documents") == {"cut": 1, "unknown_only": 0, "of": 3}


def test_a_row_is_copied_from_a_matrix_that_an_earlier_attempt_made(tmp_path):
    make(tmp_path / "half", ["a", "b"])
    engine = Counting()
    matrices = Matrices(tmp_path / "half", Known())
    for name, texts in (("embeddings", ["a", "b"]), ("untuned/documents", ["b"])):
        matrices.make(matrices.plan(name, lambda texts=texts: texts, JOB, "m"), engine)
    assert engine.jobs == []


def test_equal_texts_are_encoded_once(tmp_path):
    engine = Counting()
    made = make(tmp_path / "v1", ["a", "b", "a", "a"], engine=engine)
    assert engine.texts == ["a", "b"]
    np.testing.assert_array_equal(made, vectors(["a", "b", "a", "a"]))


def test_of_a_next_version_only_new_and_changed_texts_are_encoded(tmp_path):
    before = version(tmp_path / "v1", ["one", "two", "three", "four"])
    engine = Counting()
    after = ["four", "new", "one", "TWO", "one"]  # reordered, one gone, one new, one changed, one named twice
    made = make(tmp_path / "v2", after, Known.of(before), engine)
    assert engine.texts == ["new", "TWO"]
    np.testing.assert_array_equal(made, vectors(after))


def test_without_a_change_nothing_is_encoded_and_no_engine_called(tmp_path):
    before = version(tmp_path / "v1", ["one", "two"])
    engine = Counting()
    made = make(tmp_path / "v2", ["one", "two"], Known.of(before), engine)
    assert engine.jobs == []
    assert (tmp_path / "v2" / "embeddings.npy").read_bytes() == (before.path / "embeddings.npy").read_bytes()
    np.testing.assert_array_equal(made, vectors(["one", "two"]))


def test_another_model_copies_nothing(tmp_path):
    before = version(tmp_path / "v1", ["one", "two"])
    engine = Counting()
    make(tmp_path / "v2", ["one", "two"], Known.of(before), engine, model_hash="another")
    assert engine.texts == ["one", "two"]


@settings(max_examples=40)
@given(st.lists(st.sampled_from("abcdef")), st.lists(st.sampled_from("abcdefghij")))
def test_whatever_changed_each_row_is_its_texts_and_no_text_is_encoded_twice(tmp_path_factory, first, second):
    folder = tmp_path_factory.mktemp("versions")
    before = version(folder / "v1", first)
    engine = Counting()
    made = make(folder / "v2", second, Known.of(before), engine)
    np.testing.assert_array_equal(made, vectors(second).reshape(-1, 2))
    assert sorted(engine.texts) == sorted(set(second) - set(first))


def test_no_texts_make_an_empty_matrix(tmp_path):
    assert make(tmp_path / "v1", []).shape == (0, 2)
    assert make(tmp_path / "v1", []).shape == (0, 2)  # which is found again


def test_a_stopped_run_goes_on_behind_its_last_shard(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reuse, "WINDOW", 2)
    texts = list("abcde")
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "half", texts, engine=Counting(stops_at=2))
    engine = Counting()
    made = make(tmp_path / "half", texts, engine=engine)
    assert engine.texts == ["e"]
    assert (engine.jobs[0].n_texts, engine.jobs[0].n_done) == (5, 4)
    assert "encode: texts: 4 of 5 are there already" in capsys.readouterr().err
    np.testing.assert_array_equal(made, vectors(texts))
    whole = make(tmp_path / "whole", texts)
    np.testing.assert_array_equal(made, whole)


def test_a_whole_matrix_is_not_made_again(tmp_path):
    make(tmp_path / "half", ["a", "b"])
    engine = Counting()
    make(tmp_path / "half", ["a", "b"], engine=engine)
    assert engine.jobs == []


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_note_that_was_cut_is_no_note(tmp_path, content):
    make(tmp_path / "half", ["a"])
    (tmp_path / "half" / "keys" / "embeddings.json").write_text(content)
    engine = Counting()
    make(tmp_path / "half", ["a"], engine=engine)
    assert engine.texts == ["a"]


@pytest.mark.parametrize("name", ["embeddings.npy", "keys/embeddings.npy", "keys/embeddings.flags.npy"])
def test_a_finished_matrix_that_was_damaged_since_is_said_and_made_again(tmp_path, capsys, name):
    make(tmp_path / "half", ["a", "b"])
    file = tmp_path / "half" / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    engine = Counting()
    np.testing.assert_array_equal(make(tmp_path / "half", ["a", "b"], engine=engine), vectors(["a", "b"]))
    assert engine.texts == ["a", "b"]
    assert f"encode: {file}: damaged" in capsys.readouterr().err


def test_a_run_that_copies_nothing_takes_no_matrix_of_one_that_may_have(tmp_path):
    half = tmp_path / "half"
    make(half, ["a"], name="queries")
    with pytest.raises(KeyboardInterrupt):
        make(half, ["b"], engine=Counting(stops_at=0))
    reuse.start_fresh(half)
    left = sorted(path.name for path in half.iterdir())
    assert [name[:7] for name in left] == ["shards-", "shards-"]  # the folder of shards, and the note of it
    make(half, ["a"], name="queries")
    reuse.start_fresh(half)  # the same command again: what the first one made is found
    engine = Counting()
    make(half, ["a"], name="queries", engine=engine)
    assert engine.jobs == []


def test_a_half_done_folders_matrix_of_other_texts_is_made_again(tmp_path):
    make(tmp_path / "half", ["a", "b"])
    np.testing.assert_array_equal(make(tmp_path / "half", ["b", "c"]), vectors(["b", "c"]))


def test_a_matrix_in_a_folder_below_has_its_keys_beside_the_others(tmp_path):
    make(tmp_path / "v1", ["a"], name="untuned/documents")
    files = sorted(str(file.relative_to(tmp_path / "v1")) for file in (tmp_path / "v1").rglob("*.npy"))
    assert files == [
        "keys/untuned-documents.flags.npy",
        "keys/untuned-documents.npy",
        "untuned/documents.npy",
    ]


def test_shards_and_half_written_files_are_gone_when_the_matrix_is_there(tmp_path):
    make(tmp_path / "v1", ["a", "b"])
    names = sorted(path.name for path in (tmp_path / "v1").rglob("*"))
    assert names == ["embeddings.flags.npy", "embeddings.json", "embeddings.npy", "embeddings.npy", "keys"]


TEXTS = ["long", "a", "?", "B", "longer", "?"]
SEEN = {"cut": 2, "unknown_only": 2, "of": 5}  # "B" was not looked at; "?" stands twice


def seen(folder: Path) -> dict[str, int]:
    return Matrices(folder, Known()).seen("embeddings")


def test_what_was_seen_of_the_texts_is_known_after_a_kill_too(tmp_path, monkeypatch):
    monkeypatch.setattr(reuse, "WINDOW", 2)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "half", TEXTS, engine=Counting(stops_at=1))
    make(tmp_path / "half", TEXTS)
    assert seen(tmp_path / "half") == SEEN


def test_what_was_seen_of_a_text_is_copied_with_its_row(tmp_path):
    before = version(tmp_path / "v1", TEXTS[:3])
    engine = Counting()
    make(tmp_path / "v2", TEXTS, Known.of(before), engine)
    assert engine.texts == ["B", "longer"]
    assert seen(tmp_path / "v2") == SEEN


def test_an_engine_that_leaves_a_shard_out_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"texts: 1 of 1 shards did not come back"):
        make(tmp_path / "v1", ["a"], engine=lambda *_: None)


def test_a_full_disk_leaves_the_shards_and_no_half_matrix(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as small:
        small.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left") as caught:
            make(tmp_path / "v1", ["a", "b"])
    assert str(caught.value.filename).endswith("embeddings.npy")
    assert [path.name for path in (tmp_path / "v1").iterdir() if path.is_file()] == []
    engine = Counting()
    make(tmp_path / "v1", ["a", "b"], engine=engine)
    assert engine.jobs == []  # all shards are there
