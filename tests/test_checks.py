"""What is refused before an index is built, and how neighbours that changed are counted: small matrices."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import checks
from pipeline.artifacts import Embeddings, writing
from pipeline.checks import Findings, check, drift, equal_rows, first_bad_row, in_both, mean_cosine
from pipeline.errors import ArtifactError

DIM = 8
DIFFERENT = 0.95


def unit_rows(n: int, dim: int = DIM, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def keys_of(*names: object) -> np.ndarray:
    """The key of a row is its name in 16 bytes: what differs may stand in the first or the second eight."""
    return np.array([list(str(name).ljust(16).encode()) for name in names], np.uint8)


def ids(row: int) -> str:
    return f"id-{row}"


def test_honest_rows_pass_and_are_counted():
    rows = np.eye(4, dtype=np.float32)[[0, 1, 2, 0]]
    keys = keys_of("a", "b", "c", "a")
    assert check(rows, keys, 4, DIFFERENT, ids) == Findings(n_rows=4, n_distinct=3, mean_cosine=0.0)


def test_a_single_document_has_nobody_to_be_compared_with():
    assert check(np.eye(1, 4, dtype=np.float32), keys_of("a"), 4, DIFFERENT, ids).mean_cosine is None


@pytest.mark.parametrize(
    ("rows", "got"),
    [
        (np.eye(4, dtype=np.float32)[:2], r"float32 \(2, 4\)"),
        (np.eye(3, 5, dtype=np.float32), r"float32 \(3, 5\)"),
        (np.eye(3, 4), r"float64 \(3, 4\)"),
        (np.zeros(3, np.float32), r"float32 \(3,\)"),
    ],
)
def test_another_shape_or_type_is_refused(rows, got):
    with pytest.raises(ArtifactError, match=rf"embeddings\.npy holds {got}, wanted float32 \(3, 4\)"):
        check(rows, keys_of("a", "b", "c"), 4, DIFFERENT, ids)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (np.nan, "holds NaN or infinity"),
        (np.inf, "holds NaN or infinity"),
        (0.0, "has length 0"),
        (1.002, "has length 1.002"),
        (0.998, "has length 0.998"),
        (3e38, "has length 3e+38"),  # a number, although its square is none in float32
    ],
)
def test_a_row_that_is_no_unit_vector_is_named(value, what):
    rows = np.eye(6, dtype=np.float32)
    rows[4, 4] = value
    with pytest.raises(ArtifactError, match=rf"row 4 \(document_id id-4\) {re.escape(what)}, wanted unit"):
        check(rows, keys_of(*range(6)), 6, DIFFERENT, ids)


@pytest.mark.parametrize("length", [1.0009, 0.9991])
def test_a_length_within_a_thousandth_of_one_passes(length):
    assert first_bad_row(length * np.eye(3, dtype=np.float32)) is None


def test_of_many_bad_rows_the_first_is_named_and_the_others_are_counted():
    rows = unit_rows(10)
    rows[[3, 5, 9]] = 0
    assert first_bad_row(rows) == (3, "has length 0 (the first of 3 bad rows)")


@pytest.mark.parametrize("n_rows", [1, 3, 7])
def test_bad_rows_are_found_in_any_block(monkeypatch, n_rows):
    monkeypatch.setattr(checks, "BLOCK_BYTES", n_rows * DIM * 4)
    rows = unit_rows(10)
    rows[7:9] = np.nan
    assert first_bad_row(rows) == (7, "holds NaN or infinity (the first of 2 bad rows)")


def test_equal_keys_with_different_rows_are_refused_and_both_are_named():
    rows = unit_rows(6)
    rows[5] = rows[2]
    # "x" stands at 1, 3 and 4, "y" at 2 and 5
    said = r"rows 1 \(document_id id-1\) and 3 \(.*id-3\).*\(2 such rows\).*run stage encode --force"
    with pytest.raises(ArtifactError, match=said):
        check(rows, keys_of("a", "x", "y", "x", "x", "y"), DIM, DIFFERENT, ids)


def test_equal_keys_with_different_rows_are_found_in_any_block(monkeypatch):
    monkeypatch.setattr(checks, "BLOCK_BYTES", DIM * 4)
    rows = np.repeat(unit_rows(1), 5, axis=0)
    rows[4] = unit_rows(1, seed=1)
    with pytest.raises(ArtifactError, match=r"rows 0 .* and 4 .*\(1 such rows\)"):
        check(rows, keys_of(*"xxxxx"), DIM, 1.0, ids)


def test_keys_that_differ_in_either_half_are_different():
    keys = keys_of("left", "left    right", "other   right", "left", "left    right", "left")
    again, first = equal_rows(keys)
    assert sorted(zip(first.tolist(), again.tolist(), strict=True)) == [(0, 3), (0, 5), (1, 4)]


@pytest.mark.parametrize("n", [0, 1])
def test_no_row_is_equal_to_none(n):
    again, first = equal_rows(np.zeros((n, 16), np.uint8))
    assert again.tolist() == first.tolist() == []


def test_the_mean_cosine_is_that_of_all_pairs():
    # pairs of the three: 0 (first, second), 0.6 (first, third), 0.8 (second, third)
    rows = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    assert mean_cosine(rows, np.ones(3, bool)) == pytest.approx(1.4 / 3)
    assert mean_cosine(rows, np.array([True, False, True])) == pytest.approx(0.6)


def test_equal_texts_do_not_make_a_model_look_collapsed(monkeypatch):
    monkeypatch.setattr(checks, "BLOCK_BYTES", 3 * 2 * 4)
    rows = np.array([[1, 0]] * 99 + [[0, 1]], np.float32)
    keys = keys_of(*["the same"] * 99, "another")
    assert check(rows, keys, 2, DIFFERENT, ids) == Findings(100, 2, 0.0)


def around_one_direction(cosine: float, n: int = 500, dim: int = 64) -> np.ndarray:
    """Unit rows that share the first axis: two of them have `cosine` on average."""
    rows = unit_rows(n, dim - 1)
    shared = np.full((n, 1), np.sqrt(cosine), np.float32)
    return np.hstack([shared, np.sqrt(1 - cosine) * rows]).astype(np.float32)


def test_a_collapsed_model_is_refused():
    said = r"a cosine of 0\.9[89]\d on average, wanted at most encode\.max_mean_cosine = 0\.95"
    with pytest.raises(ArtifactError, match=said):
        check(around_one_direction(0.99), keys_of(*range(500)), 64, DIFFERENT, ids)


@pytest.mark.parametrize(("n_unknown", "is_why"), [(12, True), (6, True), (5, False)])
def test_where_the_model_knows_no_token_the_message_says_that_first(n_unknown, is_why):
    rows, keys = around_one_direction(0.99)[:12], keys_of(*range(12))
    said = f"^the model knows no token of {n_unknown} of 12 texts; embeddings" if is_why else "^embeddings"
    with pytest.raises(ArtifactError, match=said):
        check(rows, keys, 64, DIFFERENT, ids, n_unknown)


@pytest.mark.parametrize(("n", "is_refused"), [(9, False), (10, True)])
def test_a_handful_of_documents_that_are_alike_says_nothing_of_the_model(n, is_refused):
    rows, keys = around_one_direction(0.99)[:n], keys_of(*range(n))
    if is_refused:
        with pytest.raises(ArtifactError, match="raise the limit where the documents really are nearly the"):
            check(rows, keys, 64, DIFFERENT, ids)
    else:
        assert check(rows, keys, 64, DIFFERENT, ids).mean_cosine > DIFFERENT


def test_an_honest_model_whose_vectors_lie_in_a_narrow_cone_passes():
    """E5 is trained at temperature 0.01: its cosines lie between 0.7 and 1 says its model card."""
    found = check(around_one_direction(0.8), keys_of(*range(500)), 64, DIFFERENT, ids)
    assert found.mean_cosine == pytest.approx(0.8, abs=0.01)


# --- against the version before ---------------------------------------------------------------------------


def documents_at(path, texts):
    pq.write_table(pa.table({"document_id": [f"d{n}" for n in range(len(texts))], "text": texts}), path)
    return path


def earlier_version(folder, rows, keys, texts) -> Embeddings:
    with writing(Embeddings, folder / "embeddings", config={}, inputs=[]) as draft:
        (draft.folder / "keys").mkdir()
        np.save(draft.folder / "embeddings.npy", rows)
        np.save(draft.folder / "keys" / "embeddings.npy", keys)
        documents_at(draft.folder / "documents.parquet", texts)
    return Embeddings.open(folder / "embeddings")


def names(prefix: str, numbers) -> list[str]:
    return [f"{prefix}{n}" for n in numbers]


def test_without_a_version_before_nothing_can_drift(tmp_path):
    assert drift(unit_rows(20), keys_of(*range(20)), tmp_path / "documents.parquet", None) is None


def test_the_same_rows_in_another_order_keep_all_neighbours(tmp_path, capsys):
    rows, keys, texts = unit_rows(40), keys_of(*range(40)), names("text ", range(40))
    order = np.random.default_rng(1).permutation(40)[:30]  # ten are deleted
    earlier = earlier_version(tmp_path, rows, keys, texts)
    found = drift(rows[order], keys[order], tmp_path / "is not read", earlier)
    assert found == {"neighbours_kept": 1.0, "n_documents": 30, "n_queries": 30, "same_encoder": True}
    assert capsys.readouterr().err == ""


def test_rows_that_changed_under_the_same_keys_are_said(tmp_path, capsys):
    keys, texts = keys_of(*range(40)), names("text ", range(40))
    earlier = earlier_version(tmp_path, unit_rows(40), keys, texts)
    found = drift(unit_rows(40, seed=1), keys, tmp_path / "is not read", earlier)
    assert found["same_encoder"]
    assert found["neighbours_kept"] < 0.5
    assert "one of the two is damaged" in capsys.readouterr().err


def test_another_model_is_compared_over_the_texts_that_both_versions_hold(tmp_path, capsys):
    # Now 12 of the 20 texts are left, in another order, and 5 are new; the model turned every vector round
    # by the same angle and is wider, which moves no neighbour.
    rows, texts = unit_rows(20), names("text ", range(20))
    earlier = earlier_version(tmp_path, rows, keys_of(*names("old ", range(20))), texts)
    kept = [19, *range(1, 12)]
    now = np.zeros((17, 2 * DIM), np.float32)
    now[:12, ::2] = -rows[kept]
    now[12:] = unit_rows(5, 2 * DIM)
    documents = documents_at(tmp_path / "now.parquet", [texts[n] for n in kept] + names("new ", range(5)))
    found = drift(now, keys_of(*names("new ", range(17))), documents, earlier)
    assert found == {"neighbours_kept": 1.0, "n_documents": 12, "n_queries": 12, "same_encoder": False}
    assert capsys.readouterr().err == ""


def test_another_model_that_sees_everything_otherwise_is_said(tmp_path, capsys):
    texts = names("text ", range(60))
    earlier = earlier_version(tmp_path, unit_rows(60), keys_of(*names("old ", range(60))), texts)
    documents = documents_at(tmp_path / "now.parquet", texts)
    found = drift(unit_rows(60, seed=1), keys_of(*names("new ", range(60))), documents, earlier)
    assert found["neighbours_kept"] < 0.5  # ten of 59 by chance: 0.17
    said = f"only {100 * found['neighbours_kept']:.1f} % of the ten nearest neighbours among 60 unchanged"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("n", "asked"), [(10, None), (11, 11)])
def test_ten_texts_have_no_ten_neighbours(tmp_path, n, asked):
    rows, keys, texts = unit_rows(n), keys_of(*range(n)), names("text ", range(n))
    found = drift(rows, keys, tmp_path / "is not read", earlier_version(tmp_path, rows, keys, texts))
    assert (found and found["n_queries"]) == asked


def test_at_most_some_are_asked_among_at_most_some_more(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "DRIFT_DOCUMENTS", 25)
    monkeypatch.setattr(checks, "DRIFT_QUERIES", 5)
    rows, keys, texts = unit_rows(40), keys_of(*range(40)), names("text ", range(40))
    found = drift(rows, keys, tmp_path / "is not read", earlier_version(tmp_path, rows, keys, texts))
    assert found == {"neighbours_kept": 1.0, "n_documents": 25, "n_queries": 5, "same_encoder": True}


@pytest.mark.parametrize("n_rows", [1, 4, 100])
def test_one_new_neighbour_in_ten_is_a_tenth(monkeypatch, n_rows):
    # Row 0 is asked. Before, row r lies at an angle of r degrees from it, so 1 to 10 are the nearest of
    # thirteen; now 10 and 12 have changed places.
    monkeypatch.setattr(checks, "BLOCK_BYTES", n_rows * 16 * 13)
    angles = np.radians(np.arange(13))
    before = np.column_stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
    now = before[[*range(10), 12, 11, 10]]
    asked = np.array([0, 0])
    nearest = checks.neighbours_of(asked, now)
    assert sorted(nearest[1]) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 12]
    assert checks.share_kept(nearest, asked, before) == 0.9


def test_a_neighbour_that_ties_with_the_tenth_counts_as_kept():
    # Before, rows 10 and 11 were one vector, so which of the two was the tenth is chance.
    angles = np.radians([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 30])
    before = np.column_stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
    asked = np.array([0])
    for tenth, share in ((10, 1.0), (11, 1.0), (12, 0.9)):
        assert checks.share_kept(np.array([[*range(1, 10), tenth]]), asked, before) == share


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_what_both_hold_is_found_once_whatever_the_parts(parts):
    now, before = np.array([7, 3, 9, 7, 5, 3], np.uint64), np.array([5, 1, 3, 5, 7], np.uint64)
    rows, rows_before = in_both(np.array_split(now, parts), np.array_split(before, 2))
    assert (rows.tolist(), rows_before.tolist()) == ([0, 1, 4], [4, 2, 0])


@pytest.mark.parametrize(("now", "before"), [([1], []), ([], [1]), ([], []), ([2**64 - 1], [0])])
def test_nothing_is_in_both_where_one_is_empty_or_all_differ(now, before):
    rows, rows_before = in_both([np.array(now, np.uint64)], [np.array(before, np.uint64)])
    assert len(rows) == len(rows_before) == 0
