"""Shards: whole or not there, found again, told from damaged ones; and the worker that fills them."""

import errno
import hashlib
import io
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline import shards
from pipeline.errors import ArtifactError, from_os_error
from pipeline.shards import UNSEEN, Encoded, Job, Shards
from pipeline.throughput import CUT, UNKNOWN

JOB = Job("model", dim=2)


def rows(*angles: float) -> np.ndarray:
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


class Lengths:
    """Stands in for an encoder: the angle of a text's vector is its length. Reads one window ahead."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def windows(
        self, windows: Iterable[list[str]], task: str, seen: Callable, done: Callable
    ) -> Iterator[np.ndarray]:
        assert task == "document"
        before = None
        for window in windows:
            done(len(window))
            if before is not None:
                yield rows(*map(len, before))
            before = window
            self.asked.append(window)
            flags = [CUT * (len(text) > 2) + UNKNOWN * ("?" in text) for text in window]
            seen(SimpleNamespace(flags=np.array(flags, np.uint8)))
        if before is not None:
            yield rows(*map(len, before))


@pytest.fixture
def encoder(monkeypatch) -> Lengths:
    lengths = Lengths()
    monkeypatch.setattr(shards, "opened", lambda job: lengths)
    return lengths


# --- Files -------------------------------------------------------------------------------------------


def test_a_shard_is_named_by_its_number_and_the_hash_of_its_bytes(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, rows(0.0, 1.0))
    np.save(buffer, np.array([1, 0], np.uint8))
    wanted = f"00012-{hashlib.sha256(buffer.getvalue()).hexdigest()[:16]}.npy"
    encoded = Encoded(rows(0.0, 1.0), np.array([CUT, 0]))
    made = Shards(tmp_path / "shards", [2] * 13, dim=2)
    made.write(12, encoded)
    assert [file.name for file in made.folder.iterdir()] == [wanted]


def test_what_an_earlier_attempt_left_is_found_again(tmp_path):
    Shards(tmp_path, [2, 2, 1], dim=2).write(1, Encoded.unseen(rows(0.5, 0.6)))
    again = Shards(tmp_path, [2, 2, 1], dim=2)
    assert again.missing() == [0, 2]
    np.testing.assert_array_equal(again.read(1), rows(0.5, 0.6))


def test_a_shard_with_a_flipped_bit_is_said_and_missing(tmp_path, capsys):
    made = Shards(tmp_path, [1, 1], dim=2)
    made.write(0, Encoded.unseen(rows(0.5)))
    made.write(1, Encoded.unseen(rows(0.6)))
    (file,) = tmp_path.glob("00001-*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert Shards(tmp_path, [1, 1], dim=2).missing() == [1]
    assert not file.exists()
    assert f"encode: {file}: damaged, it is encoded again" in capsys.readouterr().err


@pytest.mark.parametrize("n_bytes", [0, 6, 130])
def test_a_shard_that_is_cut_short_is_missing(tmp_path, n_bytes):
    Shards(tmp_path, [1], dim=2).write(0, Encoded.unseen(rows(1)))
    (file,) = tmp_path.iterdir()
    os.truncate(file, n_bytes)
    assert Shards(tmp_path, [1], dim=2).missing() == [0]


def test_a_shard_of_other_windows_is_missing(tmp_path):
    Shards(tmp_path, [3], dim=2).write(0, Encoded.unseen(rows(1, 2, 3)))
    assert Shards(tmp_path, [2, 1], dim=2).missing() == [0, 1]


def test_what_a_kill_left_half_written_is_no_shard(tmp_path):
    (tmp_path / "00000.tmp").write_bytes(shards.npy(Encoded.unseen(rows(1)))[:50])
    made = Shards(tmp_path, [1], dim=2)
    assert made.missing() == [0]
    made.write(0, Encoded.unseen(rows(1)))
    assert names(tmp_path) == [shards.name_of(0, shards.npy(Encoded.unseen(rows(1))))]


def test_a_shard_without_flags_of_its_texts_is_missing(tmp_path):
    """As an older version of the pipeline left it: three counts behind the rows."""
    buffer = io.BytesIO()
    np.save(buffer, rows(1, 2))
    np.save(buffer, np.array([0, 0, 2]))
    (tmp_path / shards.name_of(0, buffer.getvalue())).write_bytes(buffer.getvalue())
    assert Shards(tmp_path, [2], dim=2).missing() == [0]


def test_the_first_shard_is_looked_at_when_it_comes_and_again_by_the_run_that_goes_on(tmp_path):
    def refuse(first: Encoded) -> None:
        np.testing.assert_array_equal(first.rows, rows(1))
        raise ArtifactError("all alike")

    made = Shards(tmp_path, [1, 1], dim=2)
    made.watch_first(refuse)
    made.write(1, Encoded.unseen(rows(2)))  # another one is not looked at
    with pytest.raises(ArtifactError, match="all alike"):
        made.write(0, Encoded.unseen(rows(1)))
    again = Shards(tmp_path, [1, 1], dim=2)
    assert again.missing() == []
    with pytest.raises(ArtifactError, match="all alike"):
        again.watch_first(refuse)


@pytest.mark.parametrize("name", ["a-b.npy", "00000-short.npy", "notes.npy"])
def test_somebody_elses_file_is_left_alone(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    assert Shards(tmp_path, [1], dim=2).missing() == [0]
    assert names(tmp_path) == [name]


def test_rows_of_another_shape_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"shard 0 came as float32 \(2, 2\), wanted float32 \(1, 2\)"):
        Shards(tmp_path, [1], dim=2).write(0, Encoded.unseen(rows(1, 2)))


def test_a_full_disk_leaves_nothing_and_says_where(tmp_path, monkeypatch):
    def half(file: Path, content: bytes) -> None:
        with file.open("wb") as opened:
            opened.write(content[:50])
        raise OSError(errno.ENOSPC, "No space left on device")

    made = Shards(tmp_path, [1], dim=2)
    with monkeypatch.context() as small:
        small.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="No space") as caught:
            made.write(0, Encoded.unseen(rows(1)))
    assert "00000-" in str(from_os_error(caught.value))
    assert "the disk is full; make room" in str(from_os_error(caught.value))
    assert not list(tmp_path.iterdir())
    assert made.missing() == [0]
    made.write(0, Encoded.unseen(rows(1)))  # room was made
    assert made.missing() == []


# --- Windows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "wanted"),
    [
        ([1, 1, 1, 1, 1], [2, 2, 1]),  # two texts at most
        ([6, 6, 1], [1, 2]),  # ten characters at most
        ([99, 1, 1], [1, 2]),  # a longer text is alone
        ([5, 5, 11], [2, 1]),
        ([], []),
    ],
)
def test_a_window_takes_so_many_texts_and_characters(lengths, wanted):
    assert shards.sizes(np.array(lengths, np.uint32), n_texts=2, n_characters=10) == wanted


def test_only_wanted_windows_are_given_and_the_others_passed_over():
    texts = iter("abcdef")
    assert list(shards.windows(texts, [2, 1, 2, 1], [1, 3])) == [(1, ["c"]), (3, ["f"])]


# --- The worker --------------------------------------------------------------------------------------


def test_a_job_can_be_sent_to_another_process():
    job = Job("model", dim=2, prompts={"query": "query: "})
    assert pickle.loads(pickle.dumps(job)) == job  # noqa: S301  what Beam does


def test_this_process_puts_each_window_into_its_shard(tmp_path, encoder):
    made = Shards(tmp_path, [2, 1, 1], dim=2)
    shards.in_process(JOB, iter([(0, ["a", "bb"]), (2, ["ccc"])]), made)
    assert made.missing() == [1]
    np.testing.assert_array_equal(made.read(0), rows(1, 2))
    np.testing.assert_array_equal(made.read(2), rows(3))


def test_a_worker_elsewhere_makes_the_same_bytes(tmp_path, encoder):
    here, there = Shards(tmp_path / "here", [2], dim=2), Shards(tmp_path / "there", [2], dim=2)
    shards.in_process(JOB, [(0, ["a", "bb"])], here)
    worker: Any = encoder
    there.write_bytes(0, shards.npy(shards.encode_shard(JOB, ["a", "bb"], worker)))
    assert names(here.folder) == names(there.folder)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_what_was_seen_of_each_text_lies_in_its_shard(tmp_path, encoder):
    given = [(0, ["a", "bbb"]), (1, ["?"])]
    shards.in_process(JOB, given, Shards(tmp_path, [2, 1], dim=2))
    made = Shards(tmp_path, [2, 1], dim=2)
    assert made.encoded(0).flags.tolist() == [0, CUT]
    assert made.encoded(1).flags.tolist() == [UNKNOWN]


def test_of_texts_that_the_library_tokenised_nothing_is_known(tmp_path):
    made = Shards(tmp_path, [2], dim=2)
    made.write(0, Encoded.unseen(rows(1, 2)))
    assert made.encoded(0).flags.tolist() == [UNSEEN, UNSEEN]


def test_progress_counts_the_texts_that_were_there(tmp_path, encoder, capsys):
    job = Job("model", dim=2, title="documents", n_texts=3, n_done=2)
    shards.in_process(job, [(1, ["ccc"])], Shards(tmp_path, [2, 1], dim=2))
    said = capsys.readouterr().err
    assert "encode: documents" in said
    assert "3/3" in said
    assert "texts/s" in said


def test_vectors_of_another_width_are_refused():
    with pytest.raises(ArtifactError, match=r"shape \(1, 2\) for 1 texts; encode\.dim = 3 needs \(1, 3\)"):
        shards.checked(Job("model", dim=3), ["a"], rows(1))


@pytest.mark.parametrize(
    ("value", "what"), [(0.0, "has length 0"), (np.nan, "holds NaN or infinity"), (2.0, "has length 2.828")]
)
def test_a_row_that_is_no_unit_vector_is_named_by_its_text(value, what):
    broken = rows(1, 2, 3)
    broken[1] = value
    with pytest.raises(
        ArtifactError, match=rf"model: the vector of the text 'bb' {what}, wanted unit length"
    ):
        shards.checked(JOB, ["a", "bb", "ccc"], broken)
