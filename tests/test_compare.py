"""`compare` and the ablation: runs over shared pairs, paired differences, and tables of what came out."""

import json
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import ablation
from pipeline import compare, work
from pipeline.__main__ import _published, main
from pipeline.artifacts import Model, Pairs, encoder_sha256, file_hashes, writing
from pipeline.compare import (
    Compared,
    judge_group,
    link_pairs,
    pairs_a_second,
    run_stages,
    same_pairs,
    slug_of,
)
from pipeline.config import Config, DocumentsConfig, EvaluateConfig, load
from pipeline.errors import ArtifactError, ConfigError

CONFIG = EvaluateConfig(n_draws=200)
AT = {"mean": 0.25, "low": 0.2, "high": 0.3}
MEASURED = {"n_pairs": 1200, "untuned": AT, "tuned": AT}


# --- Work folders --------------------------------------------------------------------------------------


def test_two_models_whose_names_end_alike_get_folders_of_their_own():
    assert slug_of("owner/model") != slug_of("other/model")
    assert slug_of("owner/model") == slug_of("owner/model")
    for name in ("package:gt-mini", "../models/my model/", "/", "intfloat/multilingual-e5-small"):
        slug = slug_of(name)
        assert slug
        assert not set(slug) & set("/ :\\")
        assert not slug.startswith(".")
    assert slug_of("intfloat/multilingual-e5-small").startswith("multilingual-e5-small-")


def make_pairs(path: Path) -> Pairs:
    with writing(Pairs, path, config={}, inputs=[]) as draft:
        draft.rows["pairs"] = 3
    return Pairs.open(path)


def test_linked_pairs_open_as_the_pairs_they_are_and_move_along(tmp_path):
    made = make_pairs(tmp_path / "work" / "pairs")
    folder = tmp_path / "work" / "compare" / "mini"
    link_pairs(folder, tmp_path / "work" / "pairs")
    link_pairs(folder, tmp_path / "work" / "pairs")  # again: it is there
    assert Pairs.open(folder / "pairs").digest == made.digest
    (tmp_path / "work").rename(tmp_path / "moved")
    assert Pairs.open(tmp_path / "moved" / "compare" / "mini" / "pairs").rows == {"pairs": 3}


def test_a_link_to_other_pairs_is_set_right_and_a_folder_is_left_alone(tmp_path):
    for name in ("one", "other"):
        make_pairs(tmp_path / name / "pairs")
    link_pairs(tmp_path / "run", tmp_path / "one" / "pairs")
    link_pairs(tmp_path / "run", tmp_path / "other" / "pairs")
    assert (tmp_path / "run" / "pairs").resolve() == tmp_path / "other" / "pairs"
    with pytest.raises(ArtifactError, match=r"one/pairs is no link to .*other/pairs: move it"):
        link_pairs(tmp_path / "one", tmp_path / "other" / "pairs")
    assert Pairs.open(tmp_path / "one" / "pairs").rows == {"pairs": 3}


def test_pairs_a_second_are_those_of_all_epochs_over_the_whole_stage(tmp_path):
    with writing(Model, tmp_path / "model", config={"epochs": 2}, inputs=[]) as draft:
        draft.rows["pairs"] = 300
    assert pairs_a_second(tmp_path) is None  # its time was not noted
    work.note(tmp_path, "train", {"seconds": 20.0})
    assert pairs_a_second(tmp_path) == 30.0  # 600 pairs in 20 seconds


def test_the_seconds_of_a_stage_that_was_killed_and_went_on_are_not_its_own(tmp_path):
    with writing(Model, tmp_path / "model", config={"epochs": 2}, inputs=[]) as draft:
        draft.rows["pairs"] = 300
    work.note(tmp_path, "train", {"seconds": 20.0, "went_on": True})
    assert pairs_a_second(tmp_path) is None


def test_a_stage_that_finds_something_half_done_is_noted_as_gone_on_with(tmp_path, monkeypatch):
    def ended(command, stage, lock):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "manifest.json").write_text("{}")
        return 0, {"seconds": 20.0}

    monkeypatch.setattr(work, "run_process", ended)
    (tmp_path / ".model.partial-0123").mkdir()
    run_stages(["train"], "c.yaml", [], tmp_path, lock=0)
    assert work.read_run(tmp_path)["train"] == {"seconds": 20.0, "went_on": True}
    (tmp_path / ".model.partial-0123").rmdir()
    (tmp_path / "model" / "manifest.json").unlink()
    run_stages(["train"], "c.yaml", [], tmp_path, lock=0)
    assert work.read_run(tmp_path)["train"] == {"seconds": 20.0, "went_on": False}


@pytest.mark.slow
def test_a_stage_that_fails_hands_on_its_line_and_leaves_no_file(tmp_path, capfd):
    config = tmp_path / "c.yaml"
    config.write_text("documents: {paths: [nope.jsonl]}\n")
    with pytest.raises(compare.StageError, match=r"^pairs: documents\.paths: .*no such file$") as raised:
        run_stages(["pairs"], str(config), [], tmp_path, lock=0)
    assert raised.value.exit_code == 2
    assert capfd.readouterr().err.count("error: ") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml"]


# --- What is best ----------------------------------------------------------------------------------------


def test_the_best_is_marked_and_another_is_behind_only_where_the_interval_says_so():
    hits = np.zeros((40, 3))
    hits[:30, 0] = 1  # 0.75
    hits[1:30, 1] = 1  # one pair less
    hits[:5, 2] = 1
    readers = np.array([f"reader{i}" for i in range(40)])
    models = [Compared(name, name, measured={"all pairs": dict(MEASURED)}) for name in ("a", "b", "c")]
    judge_group([one.measured["all pairs"] for one in models], hits, readers, CONFIG)
    best, near, far = (one.measured["all pairs"] for one in models)
    assert (best["is_best"], best["minus_best"]) == (True, None)
    assert near["minus_best"]["mean"] == pytest.approx(-1 / 40)
    assert far["minus_best"]["mean"] == pytest.approx(-25 / 40)
    cells = [line.split("|")[6].strip() for line in compare.table(models, "pipe").splitlines()[2:]]
    assert cells[0] == "best"
    assert cells[1].startswith("not told apart, -0.025 (")
    assert cells[2].startswith("behind, -0.625 (")


def test_a_model_that_failed_is_a_line_with_its_error_and_the_error_in_full_below():
    error = "train: " + "x" * 100
    lines = [Compared("good", "good", measured={"all pairs": MEASURED}), Compared("bad", "bad", error)]
    cells = [cell.strip() for cell in compare.table(lines, "pipe").splitlines()[3].split("|")[1:-1]]
    assert cells[0] == "bad"
    assert cells[1].startswith("failed: train: xxx")
    assert cells[1].endswith("…")
    assert f"- bad: {error}" in compare.notes(lines)


def test_a_language_is_a_line_below_its_model():
    one = Compared(
        "m", "m", measured={"all pairs": MEASURED, "Hangul": MEASURED | {"n_pairs": 7}},
        n_parameters=22713216, model_bytes=90 * 2**20, texts_a_second=512.4, pairs_a_second=99.6,
    )  # fmt: skip
    rows = [
        [c.strip() for c in line.split("|")[1:-1]] for line in compare.table([one], "pipe").splitlines()[2:]
    ]
    share = "0.250 (0.200 to 0.300)"
    assert rows[0] == ["m", "all pairs", "1,200", share, share, "-", "22,713,216", "90", "512", "100"]
    assert rows[1] == ["", "Hangul", "7", share, share, "-", "", "", "", ""]


def test_pairs_are_the_same_only_with_the_same_pool():
    frame = pd.DataFrame(
        {"session_id": ["s"], "user_id": ["u"], "anchor_id": ["a"], "positive_id": ["b"], "own": [0],
         "positive": [1]}
    )  # fmt: skip
    assert same_pairs(frame, frame.copy())
    assert not same_pairs(frame, frame.assign(positive=2))
    assert not same_pairs(frame, frame.assign(user_id="v"))


# --- The command -----------------------------------------------------------------------------------------


def test_a_setting_for_a_model_that_is_not_compared_is_refused(tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text("documents: {paths: [none.jsonl]}\n")
    arguments = ["compare", "a/b", "--config", str(config), "--work", str(tmp_path / "w")]
    assert main([*arguments, "--set_for", "a/c", "train.epochs=2"]) == 2
    assert "--set_for a/c: not one of the compared models: a/b" in capsys.readouterr().err
    assert main([*arguments, "--set_for", "a/b", "train.epoch=2"]) == 2
    assert "train.epoch is not a setting" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_a_revision_and_prefixes_belong_to_the_configs_own_model_alone(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "documents: {paths: [x.jsonl]}\n"
        'train: {model: a/b, revision: v1, query_prefix: "query: ", document_prefix: "p: ", scale: 100}\n'
    )
    config = load(file)
    assert compare._settings_of("a/b", ["a/b"], [], config) == ['train.model="a/b"']
    set_for = [("a/c", 'train.query_prefix="ask: "')]
    other = load(file, compare._settings_of("a/c", ["a/b", "a/c"], set_for, config)).train
    assert (other.revision, other.query_prefix, other.document_prefix) == (None, "ask: ", None)
    assert other.scale == 100  # as every other setting


@pytest.mark.parametrize("given", ["compare", "ablation"])
def test_nothing_is_trained_for_a_learning_curve_that_nobody_reads(tmp_path, monkeypatch, given):
    file = tmp_path / "c.yaml"
    file.write_text("documents: {paths: [x.jsonl]}\ntrain: {model: a/b, learning_curve: [100]}\n")
    ran = []

    def stages(names, config_file, overrides, folder, lock):
        ran.append(load(config_file, list(overrides)).train.learning_curve)
        raise compare.StageError("pairs", 2, "stop here")

    monkeypatch.setattr(compare, "run_stages", stages)
    monkeypatch.setattr(compare, "_widths", lambda models, config: {"a/b": 384})
    if given == "compare":
        assert compare.run(str(file), [], ["a/b"], [], tmp_path / "w") == 2
    else:
        assert ablation.main(["--config", str(file), "--work", str(tmp_path / "w"), "--rows", "base"]) == 1
    assert ran == [()]


class Ended:
    """A process whose answers are known; an exception is raised."""

    def __init__(self, answers):
        self.answers = answers

    def submit(self, _, model, revision):
        future = Future()
        answer = self.answers[model]
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
        return future

    def shutdown(self):
        pass


def test_a_library_that_breaks_over_one_model_stops_no_other(monkeypatch, capsys):
    answers = {"odd": AttributeError("no\nsuch thing"), "good": 384, "refused": ConfigError("refused: so")}
    monkeypatch.setattr(compare, "_process", lambda: Ended(answers))
    widths = compare._widths(list(answers), Config(documents=DocumentsConfig(paths=("x",))))
    assert widths["good"] == 384
    assert str(widths["odd"]) == "odd: loading it failed: AttributeError: no such thing"
    assert str(widths["refused"]) == "refused: so"
    assert capsys.readouterr().err.count("error: ") == 2


def test_an_error_is_left_where_the_environment_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv(compare.ERROR_FILE, str(tmp_path / "said"))
    assert main(["index", "--config", str(tmp_path / "none.yaml"), "--work", str(tmp_path)]) == 2
    assert (tmp_path / "said").read_text() == f"{tmp_path / 'none.yaml'}: no such config file\n"


def test_the_published_encoder_is_the_newest_versions(tmp_path):
    config = Config(documents=DocumentsConfig(paths=("x",)))
    assert _published(config, tmp_path) is None  # nothing was published yet
    for version, weights in (("9", "old"), ("10", "new")):  # 10 is newer than 9, though "10" < "9"
        newest = publish_encoder(tmp_path, version, weights)
    assert _published(config, tmp_path) == newest


def test_a_published_encoder_that_is_gone_or_was_changed_is_said_and_not_compared_with(tmp_path, capsys):
    config = Config(documents=DocumentsConfig(paths=("x",)))
    encoder = publish_encoder(tmp_path, "7", "weights")
    (encoder / "README.md").write_text("what is said of an encoder makes it no other")
    assert _published(config, tmp_path) == encoder
    assert capsys.readouterr().err == ""
    (encoder / "model.safetensors").write_text("other weights")
    assert _published(config, tmp_path) is None
    said = capsys.readouterr().err
    assert said.startswith("encode: no comparison with the published model (version 7): ")
    assert f"{encoder} was changed" in said
    encoder.rename(tmp_path / "elsewhere")
    assert _published(config, tmp_path) is None
    assert f"{encoder} is gone; put it back" in capsys.readouterr().err


def publish_encoder(folder: Path, version: str, weights: str) -> Path:
    """A version as far as its encoder is asked for: the encoder, and the manifest that names it."""
    made = folder / "encoders" / "made"
    made.mkdir(parents=True)
    (made / "model.safetensors").write_text(weights)
    named = made.rename(made.with_name(encoder_sha256(file_hashes(made))))
    extra = folder / "models" / "index" / version / "assets.extra"
    extra.mkdir(parents=True)
    (extra / "manifest.json").write_text(json.dumps({"encoder_sha256": named.name, "digests": {}}))
    return named


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, log, tiny_model) -> Path:
    file = tmp_path_factory.mktemp("config") / "small.yaml"
    file.write_text(
        f"""
events: {{paths: [{log / "events.jsonl"}], description: simulated readers}}
documents: {{paths: [{log / "documents.jsonl"}]}}
train:
  model: {tiny_model}
  batch_size: 16
  learning_rate: 0.001
  device: cpu
  precision: float32
  evaluations: 1
encode: {{dim: 32, device: cpu, precision: float32, max_mean_cosine: 1.0}}
evaluate: {{n_draws: 100, n_examples: 1}}
""",
        encoding="utf-8",
    )
    return file


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory, tiny_model) -> Path:
    """The tiny model's tokenizer with a body of 48 numbers a vector."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("wide")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(8)
    BertModel(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=64,
        )
    ).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    model = SentenceTransformer(modules=[Transformer(str(folder)), Pooling(48, pooling_mode="mean")])
    saved = tmp_path_factory.mktemp("wide_model")
    model.save_pretrained(str(saved), create_model_card=False)
    return saved


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_models_of_any_width_are_compared_and_one_that_fails_stops_no_other(
    tmp_path, config_file, tiny_model, wide_model, capfd
):
    nowhere = str(tmp_path / "nowhere")
    arguments = ["compare", str(tiny_model), nowhere, str(wide_model), "--config", str(config_file)]
    arguments += ["--work", str(tmp_path / "w"), "--set", "train.max_pairs=64"]
    assert main(arguments) == 2
    said = capfd.readouterr()
    assert "simulated readers" in said.out
    assert "no such model folder" in said.out
    assert "Traceback" not in said.err
    figures = json.loads((tmp_path / "w" / "compare" / "compare.json").read_text())
    tiny, missing, wide = figures["models"]
    assert (tiny["dim"], wide["dim"]) == (32, 48)
    assert "no such model folder" in missing["error"]
    assert missing["measured"] == {}
    for model in (tiny, wide):
        at = model["measured"]["all pairs"]
        assert at["n_pairs"] == 72  # as in the run of the whole pipeline over this log
        assert at["tuned"]["low"] <= at["tuned"]["mean"] <= at["tuned"]["high"]
        assert model["pairs_a_second"] > 0
        assert model["texts_a_second"] > 0
        assert list(model["measured"]) == ["all pairs"]  # all in one language: a line for it says nothing
    assert tiny["n_parameters"] < wide["n_parameters"]
    best = [m for m in (tiny, wide) if m["measured"]["all pairs"]["is_best"]]
    (other,) = [m for m in (tiny, wide) if m not in best]
    means = [m["measured"]["all pairs"]["tuned"]["mean"] for m in (other, *best)]
    behind = other["measured"]["all pairs"]["minus_best"]["mean"]
    assert behind == pytest.approx(means[0] - means[1], abs=2e-6)
    assert str(tiny_model) in (tmp_path / "w" / "compare" / "compare.md").read_text()

    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "w").rglob("manifest.json")}
    assert len(made) == 1 + 2 * 4  # one pairs/, and four stages a model
    assert main(arguments) == 2
    assert {path: path.stat().st_mtime_ns for path in made} == made
    again = json.loads((tmp_path / "w" / "compare" / "compare.json").read_text())
    assert again == figures  # what is complete keeps its times too


# --- The ablation ----------------------------------------------------------------------------------------


def rows_of(*names: str) -> list[ablation.Row]:
    config = Config(documents=DocumentsConfig(paths=("x",)))
    return [ablation._row(name, config, Path("w")) for name in names]


def test_every_default_row_changes_what_its_name_says_and_no_two_are_alike():
    rows = rows_of(*ablation.ROWS)
    assert rows[0].name == "base"
    assert len(rows) >= 8
    assert len({json.dumps(row.settings) for row in rows}) == len(rows)
    assert len({tuple(row.words.values()) for row in rows}) == len(rows)
    drawn = {}
    for row in rows:
        assert abs(sum(row.settings["pairs.negatives"].values()) - 1) < 1e-9
        how = {name: value for name, value in row.settings.items() if name.startswith("pairs.")}
        assert drawn.setdefault(row.drawn_by, how) == how  # a folder holds pairs of one kind
    assert len({json.dumps(how) for how in drawn.values()}) == len(drawn)


def test_two_choices_make_one_row():
    (row,) = rows_of("bm25+triplet")
    assert row.settings["train.loss"] == "triplet"
    assert row.settings["pairs.negatives"] == {"cross_user": 0.8, "bm25": 0.2}
    assert row.words["negatives"] == "cross_user + bm25"


@pytest.mark.parametrize(
    ("name", "message"),
    [("bm26", "bm26 is no choice; known: base"), ("gist+triplet", "two choices of the loss")],
)
def test_a_row_that_is_none_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        rows_of(name)


def test_a_row_that_failed_is_a_line_and_says_why():
    (row,) = rows_of("triplet")
    row.error = "train: the loss is nan"
    assert "failed" in ablation.table([row], "pipe")
    config = Config(documents=DocumentsConfig(paths=("x",)))
    said = ablation.notes([row], config)
    assert "- triplet failed: train: the loss is nan" in said
    assert "Rows are compared on the test span's pairs" in said
    assert "headline is the base row's setting" in said


@pytest.mark.benchmark
@pytest.mark.timeout(600)
def test_a_killed_ablation_goes_on_and_its_differences_are_those_of_its_figures(tmp_path, config_file, capfd):
    markdown = tmp_path / "table.md"
    arguments = ["--config", str(config_file), "--work", str(tmp_path / "w"), "--pairs", "64"]
    assert ablation.main([*arguments, "--rows", "base"]) == 0  # as far as a killed run came
    base = (tmp_path / "w" / "rows" / "base" / "model" / "manifest.json").stat().st_mtime_ns
    assert ablation.main([*arguments, "--rows", "mined+triplet", "--markdown", str(markdown)]) == 0
    assert (tmp_path / "w" / "rows" / "base" / "model" / "manifest.json").stat().st_mtime_ns == base
    rows = json.loads((tmp_path / "w" / "ablation.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["the model as it was", "BM25", "base", "mined+triplet"]
    of_base = rows[2]["accuracy_at_20"]["mean"]
    for row in (rows[0], rows[1], rows[3]):
        assert row["minus_base"]["mean"] == pytest.approx(row["accuracy_at_20"]["mean"] - of_base, abs=2e-6)
    assert rows[2]["minus_base"] is None
    assert rows[3]["n_pairs"] == 64
    negatives = Pairs.open(tmp_path / "w" / "rows" / "mined+triplet" / "pairs").facts["negatives"]
    assert negatives["mined"]["given"] > 0
    text = markdown.read_text()
    assert "Machine: " in text
    assert "sentence-transformers" in text
    assert "| mined+triplet" in text
    assert "Traceback" not in capfd.readouterr().err
