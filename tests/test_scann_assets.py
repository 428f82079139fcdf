"""`scann_assets`: what is taken apart answers as ScaNN's own searcher does."""

import errno

import numpy as np
import pytest
from scann_parts import brute_force, built, clustered_rows, recall, unit_rows

from pipeline import scann_assets
from pipeline.scann_assets import build, take_apart
from pipeline.scann_layer import TunedScaNN

pytestmark = pytest.mark.slow


def test_of_one_build_spilled_answers_are_scanns_own(tmp_path):
    """The same tree and codes by both: the same rows, wherever no candidate was cut off."""
    from scann.scann_ops.py import scann_ops_pybind

    rows, queries = clustered_rows(3000), clustered_rows(100, seed=3)
    own = (
        scann_ops_pybind.builder(rows, 10, "dot_product")
        .tree(54, 3, training_sample_size=3000, spherical=True, soar_lambda=1.5, overretrieve_factor=2.0)
        .score_ah(2, anisotropic_quantization_threshold=0.088)
        .reorder(3000)
        .build()
    )
    own.serialize(str(tmp_path))
    layer = TunedScaNN().index(rows, assets=take_apart(tmp_path, len(rows)))
    scores, found = layer.ask(queries, 10, 3, 2999)  # not 3,000: that would be every entry
    expected, expected_scores = own.search_batched(queries)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
    assert (found == expected).mean() > 0.999  # ties


def test_rows_in_two_leaves_are_found_by_fewer_leaves():
    rows, queries = clustered_rows(4000), clustered_rows(200, seed=3)
    truth = brute_force(rows, queries, 10)
    spilled, plain = (
        built(rows, ids=False, spill=spill, num_leaves=63).ask(queries, 10, 2, 800)[1]
        for spill in (1.5, None)
    )
    assert recall(spilled, truth) > recall(plain, truth) + 0.01


def test_owners_are_every_row_and_then_those_in_a_second_leaf():
    assets = build(clustered_rows(600), num_leaves=24)
    assert assets.owners[:600].tolist() == list(range(600))
    second = assets.owners[600:]
    assert 0 < len(second) == len(np.unique(second)) <= 600
    assert (assets.tokens[600:] != assets.tokens[second]).all()
    assert assets.codes.shape == (len(assets.owners), 8)  # 16 dimensions in blocks of 2


def test_plain_codes_one_entry_a_row():
    assets = build(clustered_rows(600), num_leaves=24, spill=None, anisotropic_quantization_threshold=None)
    assert assets.owners.tolist() == list(range(600))


def test_the_same_seed_builds_the_same_index_and_another_seed_another():
    def tokens(seed):
        return build(unit_rows(600), num_leaves=24, seed=seed).tokens.tolist()

    assert tokens(7) == tokens(7) != tokens(8)


@pytest.mark.parametrize(
    ("num_leaves", "n_training_rows", "at_random"),
    [(224, 44_642, False), (224, 44_643, True), (1, 10_000_000, False)],  # 224 * 44,642 = 9,999,808
)
def test_kmeans_starts_at_random_rows_where_a_seeded_start_costs_too_much(
    num_leaves, n_training_rows, at_random
):
    assert scann_assets.starts_at_random(num_leaves, n_training_rows) == at_random


@pytest.mark.parametrize(
    ("given", "compared", "expected"),
    [
        ({}, 10_000, "DEFAULT_KMEANS_PLUS_PLUS"),
        ({}, 9_999, "RANDOM_INITIALIZATION"),  # 100 leaves, 100 rows: one comparison too many
        ({"training_sample_size": 99}, 9_999, "DEFAULT_KMEANS_PLUS_PLUS"),
        ({"random_init": False}, 9_999, "DEFAULT_KMEANS_PLUS_PLUS"),
        ({"random_init": True}, 10_000, "RANDOM_INITIALIZATION"),
    ],
)
def test_what_is_trained_on_decides_how_kmeans_starts(monkeypatch, given, compared, expected):
    def stop(rows, config, threads):
        raise InterruptedError(config)

    monkeypatch.setattr(scann_assets, "MOST_COMPARED", compared)
    monkeypatch.setattr(scann_assets, "_train", stop)
    with pytest.raises(InterruptedError, match=f"single_machine_center_initialization: {expected}"):
        build(unit_rows(100), num_leaves=100, **given)


def test_a_random_start_finds_about_as_much():
    rows, queries = clustered_rows(4000), clustered_rows(200, seed=3)
    truth = brute_force(rows, queries, 10)
    seeded, at_random = (
        recall(built(rows, ids=False, num_leaves=63, random_init=start).ask(queries, 10, 4, 200)[1], truth)
        for start in (False, True)
    )
    assert at_random > 0.9
    assert abs(at_random - seeded) < 0.03


def test_more_leaves_than_rows_are_refused():
    with pytest.raises(ValueError, match="num_leaves is 21, but there are 20 rows: choose 1 to 20"):
        build(unit_rows(20), num_leaves=21)


@pytest.mark.parametrize(("free", "code"), [(3, errno.ENOSPC), (1 << 20, errno.EIO)])
def test_a_disk_that_takes_no_more_is_said_with_its_folder(tmp_path, monkeypatch, free, code):
    class Searcher:
        def serialize(self, folder):
            raise RuntimeError("Failed to extract SingleMachineFactoryOptions")

    class Usage:
        free = 0

    Usage.free = free << 20
    monkeypatch.setattr(scann_assets, "_train", lambda *_: Searcher())
    monkeypatch.setattr(scann_assets.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(OSError, match=f"where {free:,} MiB are free .*set TMPDIR") as error:
        build(unit_rows(60), num_leaves=4, scratch=tmp_path)
    assert (error.value.errno, error.value.filename) == (code, str(tmp_path))


def test_what_is_written_in_between_lies_where_it_is_told_to(tmp_path, monkeypatch):
    monkeypatch.setattr(scann_assets.tempfile, "tempdir", str(tmp_path / "missing"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    layer = TunedScaNN(num_leaves=4, num_leaves_to_search=2).index(unit_rows(60), scratch=scratch)
    layer.save(tmp_path / "saved")
    assert list(scratch.iterdir()) == []
