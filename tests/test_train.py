"""Stage `train`: the real trainer on a tiny model, what it keeps, what it refuses, and several processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from training_parts import N_PAIRS, STEPS, command_of, curve_of, make_pairs, settings

from pipeline import batches, learning_curve, selection, train, trainer
from pipeline.artifacts import Model, Pairs
from pipeline.encoder import Encoder, load
from pipeline.errors import ConfigError, InputError, PipelineError
from pipeline.training_data import datasets_of

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
TEXTS = ["sea wave", "oven notes", "comet notes"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Pairs:
    return make_pairs(tmp_path_factory.mktemp("pairs") / "pairs")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, made, tiny_model) -> Model:
    return train.run(settings(tiny_model), made, tmp_path_factory.mktemp("trained") / "model", dim=32)


def accuracies(curve: list[dict[str, float]]) -> list[float]:
    return [point["accuracy_at_20"] for point in curve if "accuracy_at_20" in point]


def losses_of(model: Model) -> list[float]:
    return [point["loss"] for point in curve_of(model) if "loss" in point]


# --- What comes out -------------------------------------------------------------------------------------


def test_training_brings_documents_of_one_topic_nearer(trained):
    accuracy = accuracies(curve_of(trained))
    # four topics of ten documents each: the untrained model guesses, 20 of 39
    assert accuracy[0] < 0.8
    assert accuracy[-1] == max(accuracy) > 0.9
    assert trained.facts["similarity_after"] > trained.facts["similarity_before"]


def test_the_folder_opens_as_a_sentence_transformers_model_that_compares_by_dot_product(trained):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(trained.path), device="cpu")
    assert model.similarity_fn_name == "dot"
    np.testing.assert_allclose(np.linalg.norm(model.encode(["sea wave"]), axis=1), 1, atol=1e-5)
    assert not (trained.path / train.CHECKPOINTS).exists()


def test_the_manifest_and_the_card_say_what_it_was_trained_on(trained):
    assert trained.rows == {"pairs": N_PAIRS}
    assert trained.facts["sources"] == {"sessions": N_PAIRS}
    assert (trained.facts["best_by"], trained.facts["trim"]) == ("retrieval", None)
    card = (trained.path / "README.md").read_text(encoding="utf-8")
    assert "made readers" in card
    assert "wave notes" not in card


def test_the_encoders_name_changes_with_its_weights_alone(trained, made, tiny_model, tmp_path):
    untrained = train.run(settings(tiny_model, epochs=0), made, tmp_path / "model", dim=32)
    assert untrained.facts["trained"] is False
    assert untrained.encoder_sha256 != trained.encoder_sha256


def test_prefixes_are_trained_with_and_saved_for_whoever_encodes(made, tiny_model, tmp_path):
    from sentence_transformers import SentenceTransformer

    prefixes = {"query_prefix": "sea ", "document_prefix": "bread "}
    model = train.run(settings(tiny_model, **prefixes, epochs=0.2), made, tmp_path / "model", dim=32)
    assert model.facts["prompts"] == {"query": "sea ", "document": "bread "}
    encoder = Encoder.open(model.path, device="cpu")
    plain = SentenceTransformer(str(model.path), device="cpu")
    for encode, prefix in ((encoder.queries, "sea "), (encoder.documents, "bread ")):
        wanted = plain.encode([prefix + "wave"], prompt="", normalize_embeddings=True)
        np.testing.assert_allclose(encode(["wave"]), wanted, atol=1e-5)
    # the same log, rows and seed, but other texts: training saw the prefixes
    bare = train.run(settings(tiny_model, epochs=0.2), made, tmp_path / "bare", dim=32)
    assert losses_of(model) != losses_of(bare)


@pytest.mark.parametrize("loss", ["triplet", "contrastive", "cached_multiple_negatives", "gist"])
def test_the_other_losses_train_too(loss, made, tiny_model, tmp_path):
    model = train.run(settings(tiny_model, loss=loss), made, tmp_path / "model", dim=32)
    found = losses_of(model)
    assert found[-1] < found[0]
    assert model.rows == {"pairs": N_PAIRS}


def test_sources_in_a_mix_take_turns_each_with_its_prefixes(tiny_model, tmp_path):
    pairs = make_pairs(tmp_path / "pairs", source=lambda n: "queries" if n % 4 == 0 else "sessions")
    config = settings(
        tiny_model, mix={"sessions": 0.75, "queries": 0.25}, query_prefix="sea ", evaluations=1, epochs=1
    )
    model = train.run(config, pairs, tmp_path / "model", dim=32)
    # 264 and 88 of 352 pairs: 17 batches (the last of 8) and 6 (the last of 8)
    assert model.facts["sources"] == {"sessions": 264, "queries": 88}
    assert curve_of(model)[-1]["step"] == 17 + 6


def test_two_encoders_learn_apart_from_one_start(made, tiny_model, tmp_path):
    model = train.run(settings(tiny_model, separate_encoders=True), made, tmp_path / "model", dim=32)
    encoder = Encoder.open(model.path, device="cpu")
    assert model.facts["separate_encoders"] is True
    assert np.abs(encoder.queries(TEXTS) - encoder.documents(TEXTS)).max() > 0.01
    accuracy = accuracies(curve_of(model))
    assert accuracy[-1] > accuracy[0] + 0.1


def test_an_encoder_for_documents_learns_nothing_from_sentences(made, tiny_model, tmp_path):
    (tmp_path / "sts.tsv").write_text("score\tsentence1\tsentence2\n5\tsea wave\toven bread\n0\tsea\ttide\n")
    config = settings(tiny_model, mix={"sts": 1.0}, sts=(str(tmp_path / "sts.tsv"),), separate_encoders=True,
                      batch_size=2)  # fmt: skip
    model = load(str(tiny_model), device="cpu", separate_encoders=True)
    before = Encoder(model).queries(TEXTS), Encoder(model).documents(TEXTS)
    trainer.fine_tune(model, config, datasets_of(config, made), None, tmp_path / "checkpoints")
    assert np.abs(Encoder(model).queries(TEXTS) - before[0]).max() > 1e-3
    np.testing.assert_array_equal(Encoder(model).documents(TEXTS), before[1])


def test_a_trimmed_model_keeps_the_words_of_its_sentences(made, tiny_model, tmp_path):
    found = {}
    words = "bread music"  # of no document
    for name, text in (("with", words), ("without", "wave")):
        file, mix = tmp_path / f"{name}.tsv", {"sessions": 0.5, "sts": 0.5}
        file.write_text(f"score\tsentence1\tsentence2\n2\t{text}\twave\n")
        config = settings(tiny_model, mix=mix, sts=(str(file),), trim_vocabulary=True)
        model = load(str(tiny_model), device="cpu")
        train.trimmed(config, model, made, datasets_of(config, made))
        found[name] = model.tokenizer.tokenize(words)
    whole = load(str(tiny_model), device="cpu").tokenizer.tokenize(words)
    assert found["with"] == whole != found["without"]


def test_other_files_under_the_same_names_are_other_inputs(made, tiny_model, tmp_path):
    nli, sts, guide = tmp_path / "nli.tsv", tmp_path / "sts.tsv", tmp_path / "guide"
    for file in (nli, sts):
        file.write_text("one")
    shutil.copytree(tiny_model, guide)
    config = settings(tiny_model, nli=(str(nli),), sts=(str(sts),), mix={"nli": 0.5, "sts": 0.5},
                      loss="gist", guide=str(guide))  # fmt: skip
    seen = [train.inputs_of(config, made)[1:]]
    assert [given["path"] for given in seen[0]] == [str(tiny_model), str(guide), str(nli), str(sts)]
    for file in (nli, sts, guide / "config.json"):
        file.write_text("{}" if file == guide / "config.json" else "other")
        seen.append(train.inputs_of(config, made)[1:])
        assert seen[-1] not in seen[:-1]
    nli.unlink()
    with pytest.raises(InputError, match=r"nli\.tsv: no such file; correct the path"):
        train.inputs_of(config, made)


def test_a_trimmed_model_trains_and_says_what_it_left_out(made, tiny_model, tmp_path):
    model = train.run(settings(tiny_model, trim_vocabulary=True), made, tmp_path / "model", dim=32)
    trim = model.facts["trim"]
    assert trim["tokens_after"] < trim["tokens_before"]
    assert accuracies(curve_of(model))[-1] > 0.9


# --- The best weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("best_by", ["retrieval", "similarity"])
def test_the_best_weights_are_kept_where_the_last_are_worse(best_by, made, tiny_model, tmp_path):
    # The learning rate rises to the end, to one that breaks what was learnt at lower ones.
    config = settings(tiny_model, learning_rate=0.3, warmup_ratio=1.0, evaluations=8, best_by=best_by,
                      early_stopping_patience=8, keep_checkpoints=8)  # fmt: skip
    model = load(str(tiny_model), device="cpu")
    judges = selection.evaluators_of(config, made)
    assert judges is not None
    curve = trainer.fine_tune(model, config, datasets_of(config, made), judges[1], tmp_path)
    metric = selection.BEST_BY[best_by]
    evaluated = {int(point["step"]): point[metric] for point in curve[1:-1] if metric in point}
    best = max(evaluated, key=lambda step: (evaluated[step], -step))
    assert evaluated[best] - evaluated[max(evaluated)] > 0.01
    assert curve[-1][metric] == pytest.approx(evaluated[best])
    kept, wanted = Encoder(model), Encoder.open(tmp_path / f"checkpoint-{best}", device="cpu")
    np.testing.assert_array_equal(kept.documents(TEXTS), wanted.documents(TEXTS))


def test_vectors_that_are_no_numbers_are_never_the_best(made, tiny_model):
    import torch

    model = load(str(tiny_model), device="cpu")
    judges = selection.evaluators_of(settings(tiny_model), made)
    assert judges is not None
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(PipelineError, match="vectors that are no numbers after step 5; lower"):
        judges[1](model, steps=5)


class Letters:
    """Stands in for a model: a text's vector counts its letters a, b and c."""

    dtype = "float32"

    def get_embedding_dimension(self) -> int:
        return 3

    def encode_query(self, texts: list[str], **_: Any) -> Any:
        import torch

        return torch.tensor([[t.count(letter) for letter in "abc"] for t in texts], dtype=torch.float32)

    encode_document = encode_query


def test_the_anchors_own_document_is_not_counted_as_found():
    row = {"anchor_id": "1", "anchor": "a", "positive_id": "2", "positive": "ab"}
    others = {"document_id": ["1", *map(str, range(10, 29))], "text": ["a"] + ["aac"] * 19}
    evaluator = selection.RetrievalEvaluator(pa.Table.from_pylist([row]), pa.table(others), batch_size=32)
    # 19 documents are nearer than the positive; the anchor's own would be the twentieth
    assert evaluator(Letters()) == {"accuracy_at_20": 1.0}  # type: ignore[arg-type]


def test_bm25_is_judged_over_the_same_pairs_and_finds_nothing_where_no_word_is_shared():
    rows = [
        {"anchor_id": None, "anchor": "oven", "positive_id": "x", "positive": "hot oven"},
        {"anchor_id": "0", "anchor": "tide", "positive_id": "y", "positive": "moon"},
    ]
    others = {"document_id": [str(n) for n in range(39)], "text": ["tide"] + ["nothing"] * 38}
    evaluator = selection.RetrievalEvaluator(pa.Table.from_pylist(rows), pa.table(others), batch_size=8)
    # "hot oven" alone has the first word. Of the second, its own document aside, all 40 score 0
    assert evaluator.bm25() == pytest.approx((1 + 0) / 2)


def test_bm25_finds_by_chance_what_it_scores_alike():
    row = {"anchor_id": None, "anchor": "oven", "positive_id": "x", "positive": "hot oven"}
    others = {"document_id": [str(n) for n in range(49)], "text": ["new oven"] * 24 + ["bread"] * 25}
    evaluator = selection.RetrievalEvaluator(pa.Table.from_pylist([row]), pa.table(others), batch_size=8)
    assert evaluator.bm25() == pytest.approx(20 / 25)


# --- Steps, batches and the optimiser -----------------------------------------------------------------------


def test_of_a_huge_text_the_judges_read_what_the_model_does_and_bm25_all():
    huge = "cat " * 1000 + "rare"
    row = {"anchor": "rare", "positive": huge, "anchor_id": "q", "positive_id": "p"}
    others = {"document_id": ["a"], "text": ["rat"]}
    evaluator = selection.RetrievalEvaluator(
        pa.Table.from_pylist([row]), pa.table(others), batch_size=8, n_characters=400
    )
    read = []

    class Watched(Letters):
        def encode_document(self, texts, **named):
            read.extend(texts)
            return super().encode_document(texts, **named)

    evaluator(Watched())
    assert sorted(map(len, read)) == [3, 400]
    assert evaluator.bm25() == 1.0  # the word at the end is found


def test_no_bias_and_no_layer_norm_decays(made, tiny_model, tmp_path):
    config = settings(tiny_model, weight_decay=0.02, adam_epsilon=1e-7)
    model = load(str(tiny_model), device="cpu")
    built = trainer.trainer_of(model, config, datasets_of(config, made), None, tmp_path)
    optimiser = built.create_optimizer()
    decay = {
        id(weights): group["weight_decay"] for group in optimiser.param_groups for weights in group["params"]
    }
    found = {name: decay[id(weights)] for name, weights in model.named_parameters()}
    spared = {name for name in found if name.endswith("bias") or "LayerNorm" in name}
    assert 0 < len(spared) < len(found)
    assert {name for name, share in found.items() if share == 0} == spared
    assert {share for name, share in found.items() if name not in spared} == {0.02}
    assert {group["eps"] for group in optimiser.param_groups} == {1e-7}


@pytest.mark.parametrize(("n_pairs", "accumulated", "steps"), [(352, 4, 6), (353, 1, 23), (1, 1, 1)])
def test_steps_count_what_the_optimiser_does(n_pairs, accumulated, steps, tiny_model, tmp_path):
    # 352 pairs are 22 batches, so 5.5 steps of 4; 353 have a last batch of one pair
    pairs = make_pairs(tmp_path / "pairs", n_pairs, n_dev=4)
    config = settings(tiny_model, epochs=1, gradient_accumulation_steps=accumulated)
    model = train.run(config, pairs, tmp_path / "model", dim=32)
    assert curve_of(model)[-1]["step"] == steps
    assert model.rows == {"pairs": n_pairs}


def test_a_batch_size_above_the_data_is_said_and_lowered(tiny_model, tmp_path, capfd):
    pairs = make_pairs(tmp_path / "pairs", n_pairs=20, n_dev=0)
    model = train.run(settings(tiny_model, batch_size=64), pairs, tmp_path / "model", dim=32)
    assert "train: batch_size is 64, but there are 20 rows: batches of 20\n" in capfd.readouterr().err
    assert model.rows == {"pairs": 20}


def test_without_pairs_the_weights_stay_as_they_are(tiny_model, tmp_path, capfd):
    pairs = make_pairs(tmp_path / "pairs", n_pairs=0, n_dev=0)
    model = train.run(settings(tiny_model), pairs, tmp_path / "model", dim=32)
    assert model.facts["trained"] is False
    assert "no pairs to train on" in capfd.readouterr().err


@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_hold_every_row_once_with_texts_of_like_length(drop_last):
    from datasets import Dataset

    texts = ["x" * (1 + n * 7 % 100) for n in range(1000)]  # 62 batches of 16, and 8 rows
    table = pa.table({"anchor": texts, "positive": texts, "negative": texts, "label": range(1000)})
    given = {"batch_size": 16, "drop_last": drop_last, "seed": 7}
    sampler = batches.length_grouped(Dataset(table), **given)
    found = list(sampler)
    assert len(found) == len(sampler) == 62 + (not drop_last)
    rows = [row for batch in found for row in batch]
    assert len(set(rows)) == len(rows) == 992 + 8 * (not drop_last)
    assert {len(batch) for batch in found} == ({16} if drop_last else {16, 8})
    spread = [
        max(len(texts[row]) for row in batch) - min(len(texts[row]) for row in batch) for batch in found
    ]
    assert np.mean(spread) < 10  # shuffled rows would spread over about 90
    assert list(batches.length_grouped(Dataset(table), **given)) == found
    sampler.set_epoch(1)
    assert list(sampler) != found


@pytest.mark.parametrize(
    ("prompts", "read"), [({}, [3]), ({"query": "sea "}, [2, 2])], ids=["alike", "with a prefix"]
)
def test_a_text_is_read_once_in_a_batch_wherever_it_stands(prompts, read, tiny_model, monkeypatch):
    model = load(str(tiny_model), device="cpu", prompts=prompts).eval()
    # three different texts; with a prefix two before it and two without it
    texts = [["wave", "oven", "wave"], ["tide notes", "wave", "wave"], ["wave", "tide notes", "wave"]]
    columns = [
        model.preprocess(column, prompt=prompts.get("query") if n == 0 else None)
        for n, column in enumerate(texts)
    ]
    seen, forward = [], model.forward

    def count(features: Any) -> Any:
        seen.append(len(features["input_ids"]))
        return forward(features)

    monkeypatch.setattr(model, "forward", count)
    found = batches.embed_once(model, columns, [trainer.losses.text_codes(column) for column in columns])
    assert seen == read
    for n, column in enumerate(texts):
        encode = model.encode_query if n == 0 else model.encode_document
        monkeypatch.setattr(model, "forward", forward)
        np.testing.assert_allclose(found[n].detach(), encode(column), atol=1e-6)


# --- What is refused ----------------------------------------------------------------------------------------


def test_a_model_of_another_width_is_refused_before_training(made, tiny_model, tmp_path):
    with pytest.raises(ConfigError, match=r"vectors of 32 numbers, but encode\.dim is 384"):
        train.run(settings(tiny_model), made, tmp_path / "model", dim=384)
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_is_not_there_is_refused(made, tiny_model, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(InputError, match="device is cuda, but PyTorch sees no CUDA device"):
        train.run(settings(tiny_model, device="cuda"), made, tmp_path / "model", dim=32)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_folder_that_lacks_a_file_is_refused_by_name(missing, made, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "broken")
    (tmp_path / "broken" / missing).unlink()
    with pytest.raises(InputError, match=r"broken: "):
        train.run(settings(tmp_path / "broken"), made, tmp_path / "model", dim=32)


def test_a_loss_that_is_no_number_stops_at_its_step_and_keeps_the_last_good_checkpoint(
    made, tiny_model, tmp_path, monkeypatch, capfd
):
    make, calls = trainer.losses.losses_of, []

    def broken(*given: Any) -> Any:
        found = make(*given)
        forward = found["pairs"].forward

        def nan_at_13(*columns: Any) -> Any:
            calls.append(1)
            return forward(*columns) * (float("nan") if len(calls) == 13 else 1)

        found["pairs"].forward = nan_at_13
        return found

    monkeypatch.setattr(trainer.losses, "losses_of", broken)
    said = r"the loss is nan at step 13; lower train\.learning_rate .* weights of step 11 are in (\S+)"
    with pytest.raises(PipelineError, match=said) as raised:
        train.run(settings(tiny_model), made, tmp_path / "model", dim=32)
    assert capfd.readouterr().err.endswith("\n")  # the bar's line ends, and what is said next has its own
    assert not (tmp_path / "model").exists()
    kept = str(raised.value).rpartition(" ")[2]
    assert np.isfinite(Encoder.open(kept, device="cpu").documents(TEXTS)).all()


# --- How much log is enough -------------------------------------------------------------------------------


def test_the_learning_curve_is_trained_size_by_size_beside_bm25(made, tiny_model, tmp_path, capfd):
    config = settings(tiny_model, learning_curve=[400, 160, 32], evaluations=1)
    model = train.run(config, made, tmp_path / "model", dim=32)
    said = capfd.readouterr().err
    assert "learning curve, 1 of 2: 32 of 352 pairs" in said
    found = json.loads((model.path / "learning_curve.json").read_text())
    whole = accuracies(curve_of(model))
    assert [point["pairs"] for point in found["points"]] == [0, 32, 160, 352]  # 400 is more than there are
    assert found["points"][0]["accuracy_at_20"] == whole[0]
    assert found["points"][-1]["accuracy_at_20"] == whole[-1]
    assert (found["n_dev_pairs"], found["n_pool"]) == (40, 40)
    assert not (model.path / train.CHECKPOINTS).exists()


@pytest.mark.parametrize(
    ("changed", "n_dev", "said"),
    [
        ({}, 0, "train.learning_curve is left out: nothing held out for dev to judge by"),
        ({"epochs": 0}, 40, "train.epochs is 0: the weights stay as they are"),
        ({"epochs": 0}, 40, "train.learning_curve is left out: nothing is trained"),
    ],
)
def test_a_learning_curve_that_cannot_be_drawn_is_said(changed, n_dev, said, tiny_model, tmp_path, capfd):
    pairs = make_pairs(tmp_path / "pairs", n_pairs=32, n_dev=n_dev)
    config = settings(tiny_model, learning_curve=[16], **({"epochs": 1} | changed))
    model = train.run(config, pairs, tmp_path / "model", dim=32)
    assert said in capfd.readouterr().err
    assert not (model.path / "learning_curve.json").exists()


def test_a_learning_curve_goes_on_behind_the_sizes_that_are_done(tmp_path):
    asked = []

    def stop_at_20(n_pairs: int, _: Path) -> float:
        asked.append(n_pairs)
        if n_pairs == 20 and asked.count(20) == 1:
            raise KeyboardInterrupt
        return n_pairs / 100

    given: Any = ([20, 10], {0: 0.05, 40: 0.4}, stop_at_20, lambda: 0.15, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        learning_curve.run(*given)
    found = learning_curve.run(*given)
    assert asked == [10, 20, 20]
    assert [point["accuracy_at_20"] for point in found["points"]] == [0.05, 0.1, 0.2, 0.4]
    assert (found["bm25"], found["passes_bm25_at"]) == (0.15, 20)


@pytest.mark.parametrize(("last", "passes"), [(0.4, 20), (0.1, None)])
def test_bm25_is_passed_where_no_larger_training_falls_behind_it_again(tmp_path, last, passes):
    reached = {10: 0.1, 20: 0.3, 30: 0.2}
    found = learning_curve.run(
        [10, 20, 30], {0: 0.16, 40: last}, lambda size, _: reached[size], lambda: 0.15, tmp_path
    )
    assert found["passes_bm25_at"] == passes


def test_sizes_of_a_learning_curve_count_pairs_and_no_sentences(tiny_model, tmp_path, monkeypatch):
    asked = []

    def count(_: Any, config: Any, tables: Any, judge: Any, checkpoints: Path) -> list[dict[str, float]]:
        checkpoints.mkdir(parents=True)  # as the trainer does
        asked.append({name: len(table) for name, table in tables.items()})
        return [{"step": 0, "epoch": 0.0, "accuracy_at_20": 0.5, "spearman_dot": 0.5}] * 2

    monkeypatch.setattr(train, "fine_tune", count)
    pairs = make_pairs(tmp_path / "pairs", n_pairs=300)
    rows = "".join(f"{n / 10}\tsea wave\tbread\n" for n in range(10))
    (tmp_path / "sts.tsv").write_text("score\tsentence1\tsentence2\n" + rows)
    config = settings(
        tiny_model, mix={"sessions": 0.75, "sts": 0.25}, sts=(str(tmp_path / "sts.tsv"),), learning_curve=[60]
    )
    model = train.run(config, pairs, tmp_path / "model", dim=32)
    assert asked == [{"sessions": 300, "sts": 100}, {"sessions": 60, "sts": 20}]
    points = json.loads((model.path / "learning_curve.json").read_text())["points"]
    assert [point["pairs"] for point in points] == [0, 60, 300]


# --- Several processes --------------------------------------------------------------------------------------


def torchrun(work: Path, model: Path, **changed: Any) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "pipeline", *command_of(work, model, **changed)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=250
    )


def test_two_processes_train_the_model_that_one_trains(made, tiny_model, tmp_path):
    # Without dropout, which each process draws for itself, only rounding is left between them.
    still = tmp_path / "still"
    shutil.copytree(tiny_model, still)
    given = json.loads((still / "config.json").read_text())
    given |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (still / "config.json").write_text(json.dumps(given))
    alone = train.run(settings(still), made, tmp_path / "alone", dim=32)
    (tmp_path / "pairs").symlink_to(made.path)
    done = torchrun(tmp_path, still)
    assert done.returncode == 0, done.stderr
    together = Model.open(tmp_path / "model")
    assert curve_of(together)[-1]["step"] == STEPS
    assert losses_of(together) == pytest.approx(losses_of(alone), abs=1e-3)
    assert accuracies(curve_of(together)) == pytest.approx(accuracies(curve_of(alone)), abs=0.03)


def test_processes_that_cannot_share_a_batch_are_refused_in_one_line(made, tiny_model, tmp_path):
    (tmp_path / "pairs").symlink_to(made.path)
    done = torchrun(tmp_path, tiny_model, batch_size=15)
    assert done.returncode != 0
    line = "error: train.batch_size is 15, which 2 processes cannot share evenly; choose a multiple of 2"
    assert line in done.stderr


# --- The benchmark ------------------------------------------------------------------------------------------


@pytest.mark.benchmark
def test_the_benchmark_trains_each_engine_on_the_same_pairs(made, tiny_model, tmp_path):
    script, file = ROOT / "benchmarks" / "train.py", tmp_path / "table.md"
    given = ["--pairs", str(made.path), "--model", str(tiny_model), "--n_pairs", "64", "--repeats", "1",
             "--batch_size", "16", "--device", "cpu", "--markdown", str(file)]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(script), *given],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = file.read_text(encoding="utf-8").splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:6]] == [
        "no training", "the library's defaults", "defaults, our batch size", "this stage"
    ]  # fmt: skip
    assert [line.split("|")[2].strip() for line in lines[2:6]] == ["-", "8", "16", "16"]


def test_the_benchmarks_table_counts_the_median_run():
    from benchmarks.train import Outcome, table

    def run(seconds: float, size: int, reached: float) -> dict[str, Any]:
        return {"seconds": seconds, "n_pairs": 100, "batch_size": size, "precision": "float32",
                "accuracy_at_20": reached}  # fmt: skip

    defaults = Outcome("defaults", [run(20, 8, 0.5), run(10, 8, 0.25), run(50, 8, 0.75)])
    stage = Outcome("stage", [run(8, 128, 0.5)])
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in table([defaults, stage], "pipe").splitlines()
    ]
    assert cells[2][3:] == ["20.0 (10.0 to 50.0)", "5", "1.00", "0.500 (0.250 to 0.750)"]
    assert cells[3][3:] == ["8.0", "12", "2.50", "0.500"]
