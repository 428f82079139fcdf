"""Many texts through a model: the library's rows in the given order, the same bits whatever came before."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.encode import Bare, joined, padding_of_library
from pipeline import throughput
from pipeline.encoder import load
from pipeline.throughput import (
    CUT,
    UNKNOWN,
    Schedule,
    Window,
    batches_of,
    beginning,
    encoded,
    fits,
    padded,
    tokenise,
    windows_of,
)

pytestmark = pytest.mark.slow  # loads PyTorch

TEXTS = [
    "wave", "flour oven dough yeast crust grain", "comet notes", "", "violin chord rhythm song piano",
    "wave", "a text of letters 123", "salt", "moon galaxy light gravity dust night " * 20, "harbour ship",
]  # fmt: skip
TWO_CORES = Schedule(tokens=16, n_threads=2, one_core_each=True)


@pytest.fixture(scope="module")
def model(tiny_model):
    return load(str(tiny_model), device="cpu")


def all_of(windows, model, task="document", schedule=TWO_CORES) -> np.ndarray:
    return np.concatenate(list(encoded(model, windows, task, schedule)))


class Tokenizer:
    """As much of a tokenizer as a batch needs."""

    pad_token_id, pad_token_type_id = 9, 7

    def __init__(self, padding_side: str) -> None:
        self.padding_side = padding_side


# --- What is batched together --------------------------------------------------------------------------


def test_texts_of_like_length_share_a_batch_the_longest_first():
    batches = batches_of(np.array([3, 1, 2, 2]), tokens=4)
    assert [batch.tolist() for batch in batches] == [[0], [2, 3], [1]]


def test_a_batch_is_as_wide_as_its_longest_text():
    # 4 + 3 + 1 tokens are 8, but three texts padded to 4 would be 12
    batches = batches_of(np.array([1, 4, 3]), tokens=8)
    assert [batch.tolist() for batch in batches] == [[1, 2], [0]]


def test_a_text_above_the_budget_is_a_batch_of_its_own():
    assert [batch.tolist() for batch in batches_of(np.array([2, 50, 2]), tokens=4)] == [[1], [0, 2]]


def test_no_texts_are_no_batches():
    assert batches_of(np.zeros(0, np.int64), tokens=4) == []


def test_windows_are_runs_of_the_texts():
    assert list(windows_of("abcde", size=2)) == [["a", "b"], ["c", "d"], ["e"]]


def test_a_window_has_room_for_so_many_letters():
    windows = windows_of(["abc", "de", "f", "ghijklm", "n"], size=9, characters=5)
    assert list(windows) == [["abc", "de"], ["f"], ["ghijklm"], ["n"]]


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [
        ("right", [[5, 6, 9, 9], [1, 2, 3, 9]], [[1, 1, 0, 0], [1, 1, 1, 0]]),
        ("left", [[9, 9, 5, 6], [9, 1, 2, 3]], [[0, 0, 1, 1], [0, 1, 1, 1]]),
    ],
)
def test_a_batch_is_padded_on_the_tokenizers_side_to_a_multiple(side, ids, mask):
    tokens = np.array([1, 2, 3, 4, 5, 6])  # three texts: 1 2 3, 4, and 5 6
    types = np.zeros(6, np.int64)
    window = Window(
        {"input_ids": tokens, "token_type_ids": types, "attention_mask": np.ones(6, np.int64)},
        lengths=np.array([3, 1, 2]), texts=np.arange(3), is_cut=np.zeros(3, bool),
        is_unknown=np.zeros(3, bool), given={},
    )  # fmt: skip
    batch = padded(window, np.array([2, 0]), Tokenizer(side), multiple=4)
    assert batch["input_ids"].tolist() == ids
    assert batch["attention_mask"].tolist() == mask
    assert (batch["token_type_ids"] == np.where(np.array(mask) == 1, 0, 7)).all()


def test_a_text_that_stands_twice_in_a_window_is_computed_once(model):
    window = tokenise(model, ["wave", "salt", "wave"], "document")
    assert window.texts.tolist() == [0, 1, 0]
    assert window.lengths.tolist() == [3, 3]  # [CLS] word [SEP]


def test_texts_longer_than_the_model_reads_are_told(tiny_model):
    model = load(str(tiny_model), device="cpu", max_seq_length=4)  # [CLS] and [SEP] are two of them
    texts = ["wave salt", "wave salt moon", "wave", "wave salt moon"]
    assert tokenise(model, texts, "document").flags.tolist() == [0, CUT, 0, CUT]
    assert tokenise(model, ["wave salt", "wave"], "document").flags.tolist() == [0, 0]  # just as long


@pytest.mark.parametrize("prompts", [None, {"document": "bread "}])
def test_texts_without_a_word_that_the_model_knows_are_told(tiny_model, prompts):
    model = load(str(tiny_model), device="cpu", prompts=prompts)
    window = tokenise(model, ["wave", "🙂🙂", "", "🙂 wave", "🙂🙂"], "document")
    assert window.flags.tolist() == [0, UNKNOWN, UNKNOWN, 0, UNKNOWN]


def test_a_text_can_be_both_and_flags_take_a_byte(tiny_model):
    model = load(str(tiny_model), device="cpu", max_seq_length=3)
    flags = tokenise(model, ["🙂 🙂", "wave"], "document").flags
    assert (flags.tolist(), flags.dtype) == ([3, 0], np.uint8)
    assert tokenise(model, [], "document").flags.shape == (0,)


def test_many_letters_are_tokenised_a_part_at_a_time(model, monkeypatch):
    whole = tokenise(model, TEXTS, "document")
    monkeypatch.setattr(throughput, "TOKENISED_CHARACTERS", 20)
    parts = tokenise(model, TEXTS, "document")
    assert parts.tokens.keys() == whole.tokens.keys()
    for name, tokens in whole.tokens.items():
        np.testing.assert_array_equal(parts.tokens[name], tokens)
    np.testing.assert_array_equal(parts.lengths, whole.lengths)
    np.testing.assert_array_equal(parts.texts, whole.texts)
    # the empty text has no word, and the one of 121 words and two more tokens is longer than the model reads
    wanted = [0, 0, 0, UNKNOWN, 0, 0, 0, 0, CUT, 0]
    assert parts.flags.tolist() == whole.flags.tolist() == wanted


def test_each_window_is_seen_before_its_rows(model):
    seen = []
    for n, _ in enumerate(encoded(model, [TEXTS[:2], TEXTS[2:5]], "document", TWO_CORES, seen.append), 1):
        assert len(seen) >= n
    assert [len(window.texts) for window in seen] == [2, 3]


# --- The rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["query", "document"])
def test_rows_are_the_librarys_in_the_given_order(model, task):
    library = model.encode_query(TEXTS) if task == "query" else model.encode_document(TEXTS)
    rows = all_of([TEXTS[:4], [], TEXTS[4:]], model, task)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, library, atol=1e-6)


def test_each_task_has_its_prompt(tiny_model):
    model = load(str(tiny_model), device="cpu", prompts={"query": "sea ", "document": "bread "})
    queries, documents = (all_of([TEXTS], model, task) for task in ("query", "document"))
    np.testing.assert_allclose(queries, model.encode_query(TEXTS), atol=1e-6)
    np.testing.assert_allclose(documents, model.encode_document(TEXTS), atol=1e-6)
    assert np.abs(queries - documents).max() > 1e-3


def test_a_model_that_does_not_pool_its_prompt_is_asked_so(tiny_model):
    model = load(str(tiny_model), device="cpu", prompts={"document": "bread oven "})
    pooled = all_of([TEXTS], model)
    model[1].include_prompt = False
    rows = all_of([TEXTS], model)
    np.testing.assert_allclose(rows, model.encode_document(TEXTS), atol=1e-6)
    assert np.abs(rows - pooled).max() > 1e-3


def test_a_model_with_an_encoder_for_each_side_uses_the_right_one(tiny_model):
    import torch

    model = load(str(tiny_model), device="cpu", separate_encoders=True)
    with torch.no_grad():
        weights = next(model[0].sub_modules["query"].parameters())
        weights.add_(torch.randn(weights.shape, generator=torch.Generator().manual_seed(7)))
    queries, documents = (all_of([TEXTS], model, task) for task in ("query", "document"))
    np.testing.assert_allclose(queries, model.encode_query(TEXTS), atol=1e-6)
    np.testing.assert_allclose(documents, model.encode_document(TEXTS), atol=1e-6)
    assert np.abs(queries - documents).max() > 1e-3


def test_rows_are_as_short_as_the_model_truncates_them(tiny_model):
    model = load(str(tiny_model), device="cpu")
    model.truncate_dim = 8
    rows = all_of([TEXTS], model)
    assert rows.shape == (len(TEXTS), 8)
    np.testing.assert_allclose(rows, model.encode_document(TEXTS), atol=1e-6)


@pytest.mark.parametrize("mode", ["cls", "max", "mean"])
def test_rows_are_pooled_as_the_model_says(tiny_model, mode):
    from sentence_transformers.sentence_transformer.modules import Pooling

    model = load(str(tiny_model), device="cpu")
    model[1] = Pooling(32, pooling_mode=mode)
    np.testing.assert_allclose(all_of([TEXTS], model), model.encode_document(TEXTS), atol=1e-6)


def test_a_decoder_padded_on_the_left_gives_its_last_tokens_row(tiny_model, tmp_path):
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import AutoTokenizer, Qwen2Config, Qwen2Model

    torch.manual_seed(7)
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_model), padding_side="left")
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=32, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    Qwen2Model(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    modules = [Transformer(str(tmp_path)), Pooling(16, pooling_mode="lasttoken"), Normalize()]
    model = SentenceTransformer(modules=modules, device="cpu")
    assert fits(model, "document")
    assert model.tokenizer.padding_side == "left"
    np.testing.assert_allclose(all_of([TEXTS], model), model.encode_document(TEXTS), atol=1e-5)


def test_bfloat16_weights_give_float32_rows_near_the_exact_ones(tiny_model, model):
    rounded = all_of([TEXTS], load(str(tiny_model), device="cpu").bfloat16())
    assert rounded.dtype == np.float32
    lengths = np.linalg.norm(rounded, axis=1)
    assert ((rounded * all_of([TEXTS], model)).sum(axis=1) / lengths).min() > 0.999


# --- The same bits -------------------------------------------------------------------------------------


def test_a_window_has_the_same_bits_when_the_run_begins_with_it(model):
    windows = [TEXTS[:4], TEXTS[4:7], TEXTS[7:]]
    unbroken = list(encoded(model, windows, "document", TWO_CORES))
    resumed = list(encoded(model, windows[1:], "document", TWO_CORES))
    assert [rows.tobytes() for rows in unbroken[1:]] == [rows.tobytes() for rows in resumed]


def test_a_window_has_the_same_bits_on_any_number_of_cores(model):
    texts = [f"{text} {n}" for n in range(20) for text in TEXTS]
    rows = {
        n: all_of([texts], model, schedule=Schedule(64, n_threads=n, one_core_each=True)).tobytes()
        for n in (1, 2, 5)
    }
    assert len(set(rows.values())) == 1


# --- Threads and memory --------------------------------------------------------------------------------


def test_windows_are_read_only_as_they_are_needed(model):
    read = []

    def windows():
        for n in range(10):
            read.append(n)
            yield [f"wave {n}"]

    rows = encoded(model, windows(), "document", TWO_CORES)
    next(rows)
    assert len(read) == 3  # one given, one computed, one tokenised
    rows.close()


def test_pytorch_keeps_its_threads_for_others(model):
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        rows = encoded(model, [TEXTS, TEXTS, TEXTS], "document", TWO_CORES)
        next(rows)
        rows.close()  # given up half-way
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_batch_reaches_the_caller(model, monkeypatch):
    def fails(*_, **__):
        raise MemoryError("no room for this batch")

    monkeypatch.setattr(model, "forward", fails)
    with pytest.raises(MemoryError, match="no room"):
        all_of([TEXTS], model)


def test_a_model_without_a_tokenizer_of_its_kind_is_left_to_the_library(model, tiny_model: Path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    assert fits(model, "document")
    assert fits(model, "query")
    static = SentenceTransformer(modules=[StaticEmbedding(model.tokenizer, embedding_dim=8)], device="cpu")
    assert not fits(static, "document")


# --- The benchmark -------------------------------------------------------------------------------------


def test_a_passage_is_the_first_whole_sentences_to_reach_the_words():
    sentences = ["one two", "three", "four five six seven", "eight"]
    assert joined(sentences, 3) == ["one two three", "four five six seven"]  # "eight" is too short alone


def test_the_model_alone_gives_the_same_rows(model):
    bare = Bare(model)
    bare.prepare(TEXTS)
    np.testing.assert_allclose(bare.run(TEXTS), model.encode_document(TEXTS), atol=1e-6)


def test_padding_is_counted_for_each_token_that_is_read(model):
    # [CLS] and [SEP] make 3 and 5 tokens: in batches of two 3 + 5 are padded to 5 + 5, alone not at all
    texts = ["wave", "wave salt salt"]
    assert padding_of_library(model, texts, 2) == pytest.approx(2 / 8)
    assert padding_of_library(model, texts, 1) == 0


# --- Long texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("one two", "one two"),
        ("one two three", "one two"),  # of 10 letters the last is of a word that may go on
        ("  one\n\ttwo three", "  one"),  # spaces stay as they are: some tokenizers read them
        ("one     " + " " * 100 + "two", "one     " + " " * 100 + "two"),  # one word may be too few
        ("onetwothreefour", "onetwothreefour"),
        (" " * 99, " " * 99),
    ],
)
def test_the_beginning_of_a_text_is_whole_words_as_they_stand(text, kept):
    assert beginning(text, 10) == kept


def test_of_a_long_text_only_the_beginning_is_tokenised(tiny_model, monkeypatch):
    model = load(str(tiny_model), device="cpu", max_seq_length=4)
    n_letters, read = 4 * throughput.LETTERS_A_TOKEN, []
    own = model.preprocess
    monkeypatch.setattr(model, "preprocess", lambda texts, **how: read.extend(texts) or own(texts, **how))
    window = tokenise(model, ["wave salt " * 100_000], "document")
    assert read == [("wave salt " * 40)[: n_letters - len(" salt ")]]
    assert window.flags.tolist() == [CUT]


def byte_level(model, truncation_side: str = "right"):
    """The model with a tokenizer that gives each byte a token, spaces too, as those of code models do."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate([*alphabet, "[PAD]"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model[0].processor = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", model_max_length=8, truncation_side=truncation_side
    )
    return model


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "text",
    [
        "def f():\n" + "\n    return 1" * 500,
        "if a:" + " " * 2000 + "b",
        " " * 2000 + "b c",
        "\n\n" + "abc" * 2000,
        "a  b" * 300 + " end",
    ],
)
def test_a_long_text_has_the_tokens_of_its_whole_whatever_a_tokenizer_reads(tiny_model, text, side):
    model = byte_level(load(str(tiny_model), device="cpu", max_seq_length=8), side)
    whole = model.tokenizer(text)["input_ids"]
    assert len(whole) == len(text) > 8 * throughput.LETTERS_A_TOKEN  # a byte is a token
    window = tokenise(model, [text, "a b"], "document")
    assert window.lengths.tolist() == [8, 3]
    assert window.tokens["input_ids"][:8].tolist() == (whole[:8] if side == "right" else whole[-8:])
    assert window.flags.tolist() == [CUT, 0]


def test_letters_that_a_tokenizer_drops_hide_no_word(tiny_model):
    model = load(str(tiny_model), device="cpu", max_seq_length=4)
    dropped = "\u200b " * 1000  # words to Python, but nothing to BERT, which drops zero-width spaces
    hidden, plain = (tokenise(model, [text], "document") for text in (dropped + "wave", "wave"))
    assert hidden.tokens["input_ids"].tolist() == plain.tokens["input_ids"].tolist()


def test_a_text_of_a_megabyte_has_the_vector_of_its_beginning(tiny_model):
    model = load(str(tiny_model), device="cpu", max_seq_length=8)
    text = "merge two tables on a key " * 40
    long, short = next(encoded(model, [[text * 1000, text]], "document"))
    assert (long == short).all()
