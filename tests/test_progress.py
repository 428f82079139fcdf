"""How far a line is, said in file names: what workers leave, and what the driver draws of it."""

import time

import pytest

from pipeline import progress
from pipeline.progress import mark, read_marks, shown


@pytest.fixture
def often(monkeypatch):
    """A driver that looks every hundredth of a second."""
    monkeypatch.setattr(progress, "EVERY", 0.01)


def wait_for(text: str, capsys) -> str:
    """What was drawn until `text` was; gives up after ten seconds."""
    drawn, end = "", time.monotonic() + 10
    while text not in drawn and time.monotonic() < end:
        time.sleep(0.01)
        drawn += capsys.readouterr().err
    return drawn


def test_marks_of_all_parts_add_up(tmp_path):
    mark(str(tmp_path), "000000-000000", 100, {"read": 5, "rejected": 0})
    mark(str(tmp_path), "000001-000000", 20, {"read": 7})
    assert read_marks(str(tmp_path)) == {"done": 120, "read": 12, "rejected": 0}


def test_a_part_that_is_tried_again_counts_once(tmp_path):
    for _ in range(2):
        mark(str(tmp_path), "00003", 10, {"sessions": 4})
    assert read_marks(str(tmp_path)) == {"done": 10, "sessions": 4}


def test_only_counts_with_a_plain_name_are_shown(tmp_path):
    # a colon is no part of a file's name on every file system
    mark(str(tmp_path), "00001", 1, {"rejected": 2, "rejected:not_json": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["00001.done=1.rejected=2"]


def test_no_marks_are_no_progress(tmp_path):
    assert read_marks(str(tmp_path)) == {}


def test_the_bar_shows_what_is_done_and_the_counts(tmp_path, often, capsys):
    folder = str(tmp_path / "marks")
    with shown("pairs: sessions", 200, "B", folder):
        mark(folder, "000000", 50, {"read": 1234})
        drawn = wait_for("read=1,234", capsys)
    assert "pairs: sessions:  25%" in drawn
    assert not (tmp_path / "marks").exists()


def test_a_look_that_fails_stops_nothing(tmp_path, often, capsys, monkeypatch):
    looks = []

    def fails_at_first(folder: str) -> dict[str, int]:
        looks.append(folder)
        if len(looks) == 1:
            raise OSError("the network is away")
        return {"done": 1}

    monkeypatch.setattr(progress, "read_marks", fails_at_first)
    with shown("pairs", 2, "session", str(tmp_path / "marks")):
        drawn = wait_for("50%", capsys)
    assert "50%" in drawn


def test_a_failed_line_is_not_hidden_by_its_bar(tmp_path, often):
    with pytest.raises(ValueError, match="of the line"), shown("pairs", 2, "B", str(tmp_path / "marks")):
        raise ValueError("of the line")
