"""Artefact folders: complete or not there, whatever interrupts the writing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import artifacts
from pipeline.artifacts import Index, Pairs, belong_together, is_complete, key_of, writing
from pipeline.errors import ArtifactError

GIVEN = {"path": "log.csv", "digest": "1"}


def write(out: Path, content: str, config: dict | None = None) -> Pairs:
    with writing(Pairs, out, config=config or {"seed": 7}, inputs=[GIVEN], scratch=["scratch"]) as draft:
        (draft.folder / "a.txt").write_text(content)
        (draft.folder / "scratch").mkdir(exist_ok=True)
        draft.rows["pairs"] = 3
    return Pairs.open(out)


def test_a_written_artefact_opens_with_its_counts(tmp_path):
    artifact = write(tmp_path / "pairs", "x")
    assert artifact.rows == {"pairs": 3}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pairs"]
    assert sorted(p.name for p in artifact.path.iterdir()) == ["a.txt", "manifest.json"]


def fail_half_way(out: Path, config: dict) -> None:
    with writing(Pairs, out, config=config, inputs=[]) as draft:
        (draft.folder / "b.txt").write_text("half")
        raise RuntimeError


def test_a_failure_leaves_the_old_artefact_and_the_half_done_work(tmp_path):
    write(tmp_path / "pairs", "old")
    with pytest.raises(RuntimeError):
        fail_half_way(tmp_path / "pairs", {})
    assert (tmp_path / "pairs" / "a.txt").read_text() == "old"
    with writing(Pairs, tmp_path / "pairs", config={}, inputs=[]) as draft:
        assert (draft.folder / "b.txt").read_text() == "half"


def test_half_done_work_of_other_settings_is_not_taken_up(tmp_path):
    with pytest.raises(RuntimeError):
        fail_half_way(tmp_path / "pairs", {"seed": 1})
    with writing(Pairs, tmp_path / "pairs", config={"seed": 2}, inputs=[]) as draft:
        assert list(draft.folder.iterdir()) == []
    assert [p.name for p in tmp_path.iterdir()] == ["pairs"]


@pytest.mark.parametrize(("config", "digest", "complete"), [(7, "1", True), (8, "1", False), (7, "2", False)])
def test_complete_means_the_same_config_and_inputs(tmp_path, config, digest, complete):
    write(tmp_path / "pairs", "x")
    key = key_of(Pairs, {"seed": config}, [{"path": "elsewhere.csv", "digest": digest}])
    assert is_complete(Pairs, tmp_path / "pairs", key) is complete


def test_equal_content_has_an_equal_digest_whenever_it_was_made(tmp_path):
    one, other = write(tmp_path / "one", "x"), write(tmp_path / "other", "x")
    assert one.digest == other.digest
    assert write(tmp_path / "other", "y").digest != one.digest


def test_a_swap_cut_after_the_first_rename_is_finished_with_the_new(tmp_path):
    out = tmp_path / "pairs"
    write(out, "old")
    out.rename(tmp_path / ".pairs.old")  # the kill comes here: the new is complete, not yet in place
    write(tmp_path / "elsewhere", "new").path.rename(tmp_path / ".pairs.partial-0123")
    assert (Pairs.open(out).path / "a.txt").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["pairs"]


def test_a_swap_cut_with_nothing_new_complete_goes_back_to_the_old(tmp_path):
    out = tmp_path / "pairs"
    write(out, "old")
    out.rename(tmp_path / ".pairs.old")
    (tmp_path / ".pairs.partial-0123").mkdir()  # no manifest: not complete
    assert (Pairs.open(out).path / "a.txt").read_text() == "old"


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"pairs"'])
def test_a_damaged_manifest_is_said(tmp_path, content):
    out = write(tmp_path / "pairs", "x").path
    (out / "manifest.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged: run stage pairs --force"):
        Pairs.open(out)


def write_with_notes(out: Path) -> Pairs:
    """What saves work, and what a later attempt cannot do without, are left beside the result."""
    with writing(
        Pairs, out, config={}, inputs=[], scratch=["scratch-*", "**/.*.tmp"], notes=["chosen.json"]
    ) as draft:
        if not (draft.folder / "chosen.json").exists():
            (draft.folder / "chosen.json").write_text("drawn by chance: " + os.urandom(8).hex())
        (draft.folder / "scratch-1").mkdir(exist_ok=True)
        (draft.folder / "scratch-1" / "part").write_text("hours of work")
        (draft.folder / ".a.tmp").write_text("half")
        (draft.folder / "a.txt").write_text("x")
    return Pairs.open(out)


def test_scratch_is_gone_notes_stay_and_neither_is_part_of_the_result(tmp_path):
    one, other = write_with_notes(tmp_path / "one"), write_with_notes(tmp_path / "other")
    assert list(one.manifest["files"]) == ["a.txt"]
    assert one.digest == other.digest
    assert sorted(p.name for p in one.path.iterdir()) == ["a.txt", "chosen.json", "manifest.json"]


@pytest.mark.parametrize(
    ("at", "has_scratch"), [("file_hashes", True), ("write_json", True), ("_swap", False)]
)
def test_a_kill_at_the_end_leaves_what_a_later_attempt_needs(tmp_path, monkeypatch, at, has_scratch):
    """No `finally` may be needed: what is there at the moment of the kill is what the next attempt finds."""

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, at, killed)
        with pytest.raises(KeyboardInterrupt):
            write_with_notes(tmp_path / "pairs")
    (folder,) = tmp_path.glob(".pairs.partial-*")
    chosen = (folder / "chosen.json").read_text()
    assert (folder / "a.txt").exists()
    assert (folder / "scratch-1" / "part").exists() == has_scratch
    again = write_with_notes(tmp_path / "pairs")
    assert (again.path / "chosen.json").read_text() == chosen


def test_a_missing_artefact_says_which_stage_to_run(tmp_path):
    with pytest.raises(ArtifactError, match=r"no manifest\.json: run stage index first"):
        Index.open(tmp_path / "index")


def test_another_kind_and_an_unknown_format_are_refused(tmp_path):
    out = write(tmp_path / "pairs", "x").path
    with pytest.raises(ArtifactError, match="holds 'pairs', wanted 'index'"):
        Index.open(out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ArtifactError, match=f"has format 99, this code reads format {Pairs.format}"):
        Pairs.open(out)


@pytest.mark.slow
def test_a_process_killed_while_writing_leaves_nothing_that_opens(tmp_path):
    script = (
        "import sys, time, pathlib\n"
        "from pipeline.artifacts import Pairs, writing\n"
        "with writing(Pairs, pathlib.Path(sys.argv[1]), config={}, inputs=[]) as draft:\n"
        "    (draft.folder / 'a.txt').write_text('x')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "pairs")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with pytest.raises(ArtifactError, match="run stage pairs first"):
        Pairs.open(tmp_path / "pairs")


def test_a_folder_of_somebody_elses_is_not_replaced(tmp_path):
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="is there and no pairs of ours: move it"):
        write(tmp_path / "pairs", "x")
    assert (tmp_path / "pairs" / "thesis.txt").read_text() == "years of work"


def test_what_was_made_from_other_inputs_does_not_belong(tmp_path):
    one, other = write(tmp_path / "one", "x"), write(tmp_path / "other", "y")
    with writing(Index, tmp_path / "index", config={}, inputs=[one]):
        pass
    index = Index.open(tmp_path / "index")
    belong_together(index, one)
    with pytest.raises(ArtifactError, match=r"was made from another .*other: run stage index again"):
        belong_together(index, other)
