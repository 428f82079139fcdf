"""Stage `encode`, killed for real and gone on with: the same bytes as if it had never been killed."""

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_encode import TINY, Counting, make_model, make_pairs

from pipeline import encode, reuse
from pipeline.artifacts import Embeddings, Model, Pairs

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
LETTERS = "abcdefghij"
TEXTS = {f"d{a}{b}": f"{x} {y} notes" for a, x in enumerate(LETTERS) for b, y in enumerate(LETTERS)}
WINDOW = 16  # 100 texts: six shards of 16 and one of 4
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
# Where the stage kills itself, without a word: behind its k-th shard, while it writes the next one, or while
# the matrix is put together.
AFTER = f"""
write = Shards.write
def killed(self, number, encoded):
    write(self, number, encoded)
    if number == {{}}: {KILL}
Shards.write = killed
"""
WHILE_WRITING = f"""
def killed(self, content):
    if self.name == "{{:05}}.tmp":
        with self.open("wb") as file:
            file.write(content[:100])
        {KILL}
    return write_bytes(self, content)
write_bytes = pathlib.Path.write_bytes
pathlib.Path.write_bytes = killed
"""
PUTTING_TOGETHER = f"""
def killed(file, matrix):
    if file.name == "embeddings.npy": {KILL}
    return finish(file, matrix)
finish = reuse._finish
reuse._finish = killed
"""
# When all matrices are there: while they are hashed, and when only the swap is left.
HASHING = f"""
from pipeline import artifacts
def killed(*_): {KILL}
artifacts.file_hashes = killed
"""
SWAPPING = HASHING.replace("file_hashes", "_swap")
RUN = """
import os, pathlib, signal, sys
from pipeline import config, encode, errors, reuse
from pipeline.artifacts import Model, Pairs
from pipeline.shards import Shards
reuse.WINDOW = {window}
{killed}
work = pathlib.Path({work!r})
settings = config.EncodeConfig(dim=32, device="cpu", precision="float32", pool_size=1)
try:
    encode.run(settings, Model.open(pathlib.Path({model!r})), Pairs.open(pathlib.Path({pairs!r})), work / "e")
except OSError as error:
    sys.exit(str(errors.from_os_error(error)))
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory, tiny_model) -> tuple[Pairs, Model]:
    folder = tmp_path_factory.mktemp("given")
    return make_pairs(folder / "pairs", TEXTS), make_model(folder / "model", tiny_model)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, given) -> Embeddings:
    """What an unbroken run makes."""
    pairs, model = given
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reuse, "WINDOW", WINDOW)
        return encode.run(TINY, model, pairs, tmp_path_factory.mktemp("whole") / "e")


@pytest.fixture(autouse=True)
def small_windows(monkeypatch) -> None:
    monkeypatch.setattr(reuse, "WINDOW", WINDOW)


def start(work: Path, given: tuple[Pairs, Model], killed: str = "") -> subprocess.CompletedProcess:
    pairs, model = given
    code = RUN.format(
        window=WINDOW, killed=killed, work=str(work), model=str(model.path), pairs=str(pairs.path)
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT, timeout=200
    )


def kill(work: Path, given: tuple[Pairs, Model], where: str) -> None:
    done = start(work, given, where)
    assert done.returncode == -signal.SIGKILL, done.stderr


def go_on(work: Path, given: tuple[Pairs, Model]) -> list[str]:
    """Run it to its end; the texts that were encoded."""
    pairs, model = given
    engine = Counting()
    encode.run(TINY, model, pairs, work / "e", engine=engine)
    return engine.texts


def shards_on_disk(work: Path) -> list[str]:
    return sorted(path.name[:5] for path in work.glob(".e.partial-*/shards-embeddings-*/*.npy"))


def assert_same(work: Path, whole: Embeddings) -> None:
    for name in ("embeddings.npy", "keys/embeddings.json", "queries.npy", "documents.parquet"):
        assert (work / "e" / name).read_bytes() == (whole.path / name).read_bytes(), name
    made = Embeddings.open(work / "e")
    assert made.digest == whole.digest
    assert made.rows == whole.rows
    assert made.facts["seen"] == whole.facts["seen"]
    assert not list(work.glob(".e*"))


@pytest.mark.parametrize(
    ("where", "n_shards"), [(AFTER.format(0), 1), (AFTER.format(3), 4), (WHILE_WRITING.format(2), 2)]
)
def test_a_killed_run_encodes_what_is_missing_and_no_more(tmp_path, given, whole, where, n_shards, capsys):
    kill(tmp_path, given, where)
    assert len(shards_on_disk(tmp_path)) == n_shards
    assert go_on(tmp_path, given) == list(TEXTS.values())[n_shards * WINDOW :]
    assert_same(tmp_path, whole)
    said = capsys.readouterr().err
    assert f"encode: documents: {n_shards * WINDOW} of 100 are there already" in said


def test_a_run_killed_twice_ends_as_if_never_killed(tmp_path, given, whole):
    kill(tmp_path, given, AFTER.format(1))
    kill(tmp_path, given, AFTER.format(4))
    assert shards_on_disk(tmp_path) == ["00000", "00001", "00002", "00003", "00004"]
    assert go_on(tmp_path, given) == list(TEXTS.values())[5 * WINDOW :]
    assert_same(tmp_path, whole)


def test_a_run_killed_while_the_matrix_is_put_together_encodes_nothing_again(tmp_path, given, whole):
    kill(tmp_path, given, PUTTING_TOGETHER)
    assert not (tmp_path / "e").exists()
    assert not list(tmp_path.glob(".e.partial-*/embeddings.npy"))  # half-written under another name
    assert go_on(tmp_path, given) == []
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("where", [HASHING, SWAPPING])
def test_a_run_killed_in_its_last_second_encodes_nothing_again(tmp_path, given, whole, where):
    kill(tmp_path, given, where)
    assert not (tmp_path / "e").exists()
    assert go_on(tmp_path, given) == []
    assert_same(tmp_path, whole)
    kept = json.loads((tmp_path / "e" / "precision.json").read_text())
    assert kept["precision"] == whole.facts["precision"]


def test_a_finished_matrix_that_was_damaged_meanwhile_is_made_again_and_said(tmp_path, given, whole, capsys):
    kill(tmp_path, given, HASHING)
    (file,) = tmp_path.glob(".e.partial-*/embeddings.npy")
    content = bytearray(file.read_bytes())
    content[500] ^= 1
    file.write_bytes(content)
    assert go_on(tmp_path, given) == list(TEXTS.values())
    assert_same(tmp_path, whole)
    assert f"{file}: damaged, its rows are made again" in capsys.readouterr().err


def test_a_shard_that_was_damaged_meanwhile_is_encoded_again_and_said(tmp_path, given, whole, capsys):
    kill(tmp_path, given, AFTER.format(3))
    (file,) = tmp_path.glob(".e.partial-*/shards-embeddings-*/00001-*.npy")
    content = bytearray(file.read_bytes())
    content[500] ^= 1
    file.write_bytes(content)
    texts = list(TEXTS.values())
    assert go_on(tmp_path, given) == texts[WINDOW : 2 * WINDOW] + texts[4 * WINDOW :]
    assert_same(tmp_path, whole)
    assert f"{file}: damaged, it is encoded again" in capsys.readouterr().err


def test_a_run_killed_on_a_machine_of_another_number_of_cores_ends_alike(tmp_path, given, whole):
    kill(tmp_path, given, "import torch; torch.set_num_threads(1)\n" + AFTER.format(2))
    go_on(tmp_path, given)
    assert_same(tmp_path, whole)


def test_a_killed_next_version_copies_and_goes_on(tmp_path, given):
    """The version before stays until the next one is whole, so it is copied from again after the kill."""
    _, model = given
    half = make_pairs(tmp_path / "half", dict(list(TEXTS.items())[:50]))
    encode.run(TINY, model, half, tmp_path / "e")
    kill(tmp_path, given, AFTER.format(1))
    assert Embeddings.open(tmp_path / "e").rows["rows"] == 50
    assert go_on(tmp_path, given) == list(TEXTS.values())[50 + 2 * WINDOW :]
    made = Embeddings.open(tmp_path / "e")
    assert (made.rows["copied"], made.rows["encoded"]) == (50, 50)
    bits = {hashlib.sha256(row.tobytes()).digest() for row in made.matrix()}
    assert len(bits) == 100
    np.testing.assert_allclose(np.linalg.norm(made.matrix(), axis=1), 1, atol=1e-5)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=44k", "tmpfs", str(disk)], check=False, capture_output=True
    )
    if made.returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("n_kilobytes", [24, 36, 48])  # full at a shard, and at the matrix
def test_a_full_disk_is_one_line_and_the_run_goes_on_after_room_is_made(
    small_disk, given, whole, n_kilobytes
):
    subprocess.run(["mount", "-o", f"remount,size={n_kilobytes}k", str(small_disk)], check=True)
    done = start(small_disk, given)
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .endswith("the disk is full; make room and run the same command again: what is complete is kept")
    )
    assert "Traceback" not in done.stderr
    n_there = len(shards_on_disk(small_disk))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert go_on(small_disk, given) == list(TEXTS.values())[n_there * WINDOW :]
    assert_same(small_disk, whole)
