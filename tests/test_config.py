"""Settings: what is refused, with which words, and how paths and overrides are read."""

import shlex
import subprocess
from dataclasses import FrozenInstanceError
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline import config
from pipeline.errors import ConfigError


def load(tmp_path: Path, text: str, *overrides: str) -> config.Config:
    file = tmp_path / "c.yaml"
    file.write_text(f"documents: {{paths: [d.csv]}}\n{text}", encoding="utf-8")
    return config.load(file, list(overrides))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("index: {leaves: 3}", r"index\.leaves is not a setting; known: layer, k, "),
        ("idx: {k: 3}", r"idx is not a section; known: events, documents, queries"),
        ("index: 3", r"index is 3; wanted settings below it"),
        ("index: {k: '10'}", r"index\.k is '10'; input should be a valid integer"),
        ("encode: {batch_size: 0}", r"encode\.batch_size is 0; input should be greater than or equal to 1"),
        ("train: {loss: hinge}", r"train\.loss is 'hinge'; input should be 'multiple_negatives'"),
        (
            "index: {num_leaves: 10, num_leaves_to_search: 100}",
            r"index\.num_leaves_to_search is 100, but num_leaves is 10; choose 1 to 10",
        ),
        ("index: {k: 10, num_reordering_candidates: 5}", r"choose 10 or more"),
        ("index: {num_reordering_candidates: 20000}", r"a request may ask for 10000; choose at most that"),
        ("index: {target_recall: 1.0}", r"target_recall is 1, .* raise exact_below"),
        ("pairs: {negatives: {cross_user: 0.5}}", r"pairs\.negatives: the shares .* add up to 1"),
        (
            "train: {main_similarity: cosine}",
            r"train\.main_similarity is cosine, but index\.distance_measure is dot_product",
        ),
        ("index: {k: [", "not YAML"),
        ("train: {1: 2}", "train is {1: 2}; wanted settings below it"),
        ("pairs: {seed: -1}", r"pairs\.seed is -1; input should be greater than or equal to 0"),
        ("- index", "not YAML|wanted sections"),
        ("train: {mix: {sessions: 1.5, sts: -0.5}}", r"train\.mix\.sessions is 1\.5; [^;]*equal to 1$"),
        ("train: {mix: {nli: 1.0}}", r"train\.nli names 0 files, but mix gives nli the share 1\.0; set both"),
        ("train: {margin: 1.5, loss: triplet}", r"train\.margin is 1\.5, but of 1 - dot at most 1"),
        ("train: {learning_curve: 100}", r"train\.learning_curve is 100; input should be a list"),
        ("train: {query_prefix: {query: }}", r"train\.query_prefix is .*: put it in quotes"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, text)
    assert str(tmp_path / "c.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        ("3", r" is 3; input should be a mapping$"),
        ("{ids: [a]}", r": ids is not a setting; known: document_ids, document_ids_from, columns$"),
        ("{document_ids: a}", r"\.document_ids is 'a'; input should be a list$"),
        ("{document_ids: [1]}", r"\.document_ids is 1; .*valid string: put it in quotes$"),
        ("{columns: [status]}", r"\.columns is \['status'\]; input should be a mapping$"),
        (
            "{columns: {status: draft}}",
            r"\.columns\.status is 'draft'; .*a mapping or input should be a list$",
        ),
        ("{columns: {rating: {}}}", r"\.columns\.rating: names no rule; wanted below, above or other_than$"),
        (
            "{columns: {rating: {under: 2}}}",
            r"\.columns\.rating: under is not a setting; known: below, above, ",
        ),
        (
            "{columns: {rating: {below: '2'}}}",
            r"\.columns\.rating\.below is '2'; input should be a valid number$",
        ),
        ("{columns: {rating: {below: .nan}}}", r"\.columns\.rating\.below is nan; .* finite number$"),
        ("{columns: {rating: [.nan]}}", r"\.columns\.rating is \[nan\]; .* finite number"),
        (
            "{columns: {rating: {below: 5, above: 1}}}",
            r"\.columns\.rating: keeps nothing: .* below 5 or above 1",
        ),
        ("{columns: {day: [2026-01-01]}}", r"\.columns\.day is \[.*put it in quotes$"),
    ],
)
def test_what_to_exclude_is_refused_with_the_whole_way_to_it(tmp_path, exclude, message):
    with pytest.raises(ConfigError, match=rf"c\.yaml: documents\.exclude{message}") as caught:
        load(tmp_path, "", f"documents.exclude={exclude}")
    assert "\n" not in str(caught.value)


def test_what_to_exclude_is_read_from_yaml_with_its_rules(tmp_path):
    columns = "{status: [draft, null, 3], rating: {below: 2, other_than: [x]}}"
    excluded = load(
        tmp_path, "", f"documents.exclude={{document_ids: [a], columns: {columns}}}"
    ).documents.exclude
    assert excluded.document_ids == ("a",)
    assert excluded.columns == {
        "status": ("draft", None, 3),
        "rating": config.ColumnRule(below=2.0, other_than=("x",)),
    }
    assert config.as_dict(excluded)["columns"]["rating"] == {"below": 2.0, "above": None, "other_than": ["x"]}


def test_nothing_below_exclude_excludes_nothing(tmp_path):
    assert load(tmp_path, "", "documents.exclude=").documents.exclude == config.ExcludeConfig()


def test_documents_made_from_highlights_have_no_columns_to_exclude_by():
    given = {
        "events": {"paths": ["e.csv"], "text": "passage"},
        "documents": {"exclude": {"columns": {"status": ["draft"]}}},
    }
    with pytest.raises(
        ConfigError, match=r"documents\.exclude\.columns is set, but documents\.paths is empty"
    ):
        config.from_dict(given)


def test_passages_must_go_on(tmp_path):
    with pytest.raises(ConfigError, match=r"encode\.passage_overlap is 8, but .* is 8; choose 0 to 7"):
        load(tmp_path, "encode: {passage_words: 8, passage_overlap: 8}")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nope\.yaml: no such config file"):
        config.load(tmp_path / "nope.yaml")


@pytest.mark.parametrize("section", ["queries", "synthetic"])
def test_queries_lead_to_documents_that_must_be_named(section):
    given = {"events": {"paths": ["e.csv"], "text": "passage"}, section: {"paths": ["q.csv"]}}
    with pytest.raises(ConfigError, match=rf"{section}\.paths is set, but documents\.paths is empty"):
        config.from_dict(given)


def test_without_any_input_nothing_can_run():
    with pytest.raises(ConfigError, match="both empty"):
        config.from_dict({})


def test_documents_made_from_events_need_the_text_column():
    with pytest.raises(ConfigError, match=r"set events\.text"):
        config.from_dict({"events": {"paths": ["a.csv"]}})


def test_paths_in_the_file_are_relative_to_the_file(tmp_path):
    assert load(tmp_path, "").documents.paths == (str(tmp_path / "d.csv"),)


def test_paths_in_an_override_are_relative_to_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = load(tmp_path, "", "events.paths=[log.csv]", "publish.folder=served")
    assert loaded.events.paths == (str(tmp_path / "elsewhere" / "log.csv"),)
    assert loaded.publish.folder == str(tmp_path / "elsewhere" / "served")


def test_files_of_ids_and_the_shared_folder_are_relative_to_the_file_too(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "documents: {paths: [d], exclude: {document_ids_from: [out.txt]}}\nencode: {temp_location: t}"
    )
    loaded = config.load(file)
    assert loaded.documents.exclude.document_ids_from == (str(tmp_path / "out.txt"),)
    assert loaded.encode.temp_location == str(tmp_path / "t")


def test_urls_stay_as_they_are(tmp_path):
    assert load(tmp_path, "events: {paths: ['gs://bucket/*.gz']}").events.paths == ("gs://bucket/*.gz",)


def test_a_model_is_a_path_only_where_a_folder_is_there(tmp_path):
    assert load(tmp_path, "train: {model: owner/name}").train.model == "owner/name"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert load(tmp_path, "train: {model: owner/name}").train.model == str(tmp_path / "owner" / "name")


def test_an_override_replaces_one_setting_and_keeps_its_neighbours(tmp_path):
    loaded = load(tmp_path, "index: {k: 20, seed: 3}", "index.k=15")
    assert (loaded.index.k, loaded.index.seed) == (15, 3)


@pytest.mark.parametrize("override", ["index.k", "k=3", "index=3", "=3"])
def test_an_override_that_is_none_says_how_one_looks(tmp_path, override):
    with pytest.raises(ConfigError, match=r"wanted SECTION\.KEY=VALUE"):
        load(tmp_path, "", override)


def test_settings_cannot_be_changed_after_loading():
    section = config.IndexConfig()
    with pytest.raises(FrozenInstanceError):
        section.k = 3


def test_a_section_goes_into_a_manifest_as_plain_values():
    assert config.as_dict(config.PublishConfig()) == {
        "model_name": "index", "keep_versions": 3, "folder": None, "rows_below": 100_000,
            "min_related_readers": 3, "related_per_document": 20,
    }  # fmt: skip


def test_a_number_may_be_written_without_a_point(tmp_path):
    assert load(tmp_path, "train: {learning_rate: 2e-5}").train.learning_rate == 2e-5
    assert load(tmp_path, "", "train.learning_rate=3E-5").train.learning_rate == 3e-5


@pytest.mark.parametrize("documents", ["", "DOCUMENTS=documents.csv"])
def test_the_makefiles_overrides_for_ones_own_logs_are_settings(documents):
    root = Path(__file__).parents[1]
    command = ["make", "--no-print-directory", "-n", "demo", "EVENTS=events.csv", *documents.split()]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout
    words = shlex.split(next(line for line in said.splitlines() if "pipeline all" in line))
    overrides = [value for option, value in pairwise(words) if option == "--set"]
    loaded = config.load(root / "configs" / "demo.yaml", overrides)
    assert [Path(path).name for path in loaded.events.paths] == ["events.csv"]
    assert [Path(path).name for path in loaded.documents.paths] == (["documents.csv"] if documents else [])
    assert (loaded.events.description, loaded.documents.title, loaded.train.max_pairs) == ("", None, None)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("spill: 1.5", "index.spill is 1.5,"),
        ("spill: null", "index.spill is null,"),
        ("memory_mib: 300", "index.memory_mib is 300,"),
        ("quantize_reordering: int8", 'index.quantize_reordering is "int8",'),
        ("anisotropic_quantization_threshold: 0.1", "index.anisotropic_quantization_threshold is 0.1,"),
        ("spherical: false", "index.spherical is false,"),
        ("training_sample_size: 1000", "index.training_sample_size is 1000,"),
        ("n_tuning_rows: 1000", "index.n_tuning_rows is 1000,"),
        ("max_k: 50", "index.max_k is 50,"),
        ("max_queries: 50", "index.max_queries is 50,"),
        ("max_filter_ids: 50", "index.max_filter_ids is 50,"),
    ],
)
def test_a_setting_that_tfrss_layer_does_not_know_is_refused_by_name(tmp_path, setting, said):
    load(tmp_path, f"index: {{{setting}}}")
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"index: {{layer: tfrs, {setting}}}")
    assert f"{said} but layer tfrs does not know it; take it out or set layer to tuned" in str(caught.value)


def test_all_settings_that_tfrss_layer_does_not_know_are_named_at_once(tmp_path):
    with pytest.raises(
        ConfigError, match=r"index\.memory_mib is 9 and spill is 2\.0, .* does not know them; "
    ):
        load(tmp_path, "index: {layer: tfrs, spill: 2.0, memory_mib: 9}")


def test_the_settings_of_tfrss_own_layer_are_taken(tmp_path):
    own = "k: 20, num_leaves: 30, num_leaves_to_search: 3, num_reordering_candidates: 40, seed: 3"
    more = "dimensions_per_block: 4, training_iterations: 5, n_tuning_queries: 50, spill: auto"
    text = f"index: {{layer: tfrs, {own}, {more}}}"
    assert load(tmp_path, text).index.layer == "tfrs"


def test_what_tfrs_saves_is_not_held_to_a_batchs_latency(tmp_path):
    settings = "index: {layer: tfrs, requests: batched, target_latency_ms: 2}"
    with pytest.raises(ConfigError, match=r"layer tfrs saves takes one query a request; set requests to"):
        load(tmp_path, settings)
    load(tmp_path, settings.replace("batched", "single"))
    load(tmp_path, settings.replace("tfrs", "tuned"))
