"""Stage `encode`: a row a document, of which only new ones are encoded; what is said, checked and refused."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import __main__ as cli
from pipeline import checks, config, encode, precision, reuse, shards
from pipeline.artifacts import Embeddings, Model, Pairs, key_of, writing
from pipeline.encoder import Encoder
from pipeline.errors import ArtifactError, ConfigError, InputError
from pipeline.shards import Job, Shards

TINY = config.EncodeConfig(dim=32, device="cpu", precision="float32", pool_size=1)
WORDS = {
    "d0": "wave notes", "d1": "tide notes", "d2": "flour notes",
    "d3": "oven notes", "d4": "comet notes", "d5": "violin notes",
}  # fmt: skip


def make_pairs(path: Path, documents: dict[str, str], n_parts: int = 1) -> Pairs:
    """Documents alone, in the order of their ids, as stage pairs leaves them."""
    ids = sorted(documents)
    texts = [documents[i] for i in ids]
    table = pa.table({"document_id": ids, "text": pa.array(texts, pa.large_string()), "title": ids})
    size = -(-len(table) // n_parts) or 1
    with writing(Pairs, path, config=documents, inputs=[]) as draft:
        for part in range(n_parts):
            pq.write_table(
                table[part * size : (part + 1) * size], draft.folder / f"documents-{part:05}.parquet"
            )
        draft.facts["description"] = "made"
        draft.rows["documents"] = len(table)
    return Pairs.open(path)


def make_model(path: Path, folder: Path, **facts: Any) -> Model:
    """A Sentence Transformers folder as stage train leaves it, without training."""
    with writing(Model, path, config=facts, inputs=[]) as draft:
        shutil.copytree(folder, draft.folder, dirs_exist_ok=True)
        (draft.folder / "training.jsonl").write_text("{}")
        draft.facts |= {
            "dim": 32, "trained": False, "base_model": str(folder), "revision": None,
            "max_seq_length": None, "prompts": {"query": "", "document": ""},
        } | facts  # fmt: skip
    return Model.open(path)


@pytest.fixture
def model(tmp_path, tiny_model) -> Model:
    return make_model(tmp_path / "model", tiny_model)


@pytest.fixture
def pairs(tmp_path) -> Pairs:
    return make_pairs(tmp_path / "pairs", WORDS)


class Counting:
    """This process's engine, which remembers what it was given to encode."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, job: Job, windows: Iterable[tuple[int, list[str]]], made: Shards) -> None:
        given = list(windows)
        self.texts += [text for _, texts in given for text in texts]
        shards.in_process(job, given, made)


def rows_of(embeddings: Embeddings) -> dict[str, bytes]:
    """The bits of each document's row."""
    ids = pq.read_table(embeddings.path / "documents.parquet")["document_id"].to_pylist()
    return {document_id: row.tobytes() for document_id, row in zip(ids, embeddings.matrix(), strict=True)}


# --- Rows and documents ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("n_parts", [1, 4])
def test_every_document_has_its_row(model, tmp_path, n_parts):
    pairs = make_pairs(tmp_path / "pairs", WORDS, n_parts)
    embeddings = encode.run(TINY, model, pairs, tmp_path / "embeddings")
    wanted = Encoder.open(model.path, device="cpu").documents([WORDS[i] for i in sorted(WORDS)])
    np.testing.assert_allclose(embeddings.matrix(), wanted, atol=1e-5)
    documents = pq.read_table(embeddings.path / "documents.parquet")
    assert documents["document_id"].to_pylist() == sorted(WORDS)
    assert documents["text"].to_pylist() == [WORDS[i] for i in sorted(WORDS)]


def test_documents_are_in_groups_of_which_a_client_reads_one(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "ROW_GROUP", 4)
    pairs = make_pairs(tmp_path / "pairs", WORDS, n_parts=2)
    assert encode.write_documents(pairs, tmp_path / "documents.parquet", TINY) == (6, 6)
    metadata = pq.read_metadata(tmp_path / "documents.parquet")
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [4, 2]


def test_long_documents_are_in_smaller_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "BYTES_AT_ONCE", 1000)
    pairs = make_pairs(tmp_path / "pairs", {f"d{n}": "x" * 600 for n in range(5)})
    encode.write_documents(pairs, tmp_path / "documents.parquet", TINY)
    metadata = pq.read_metadata(tmp_path / "documents.parquet")
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [2, 2, 1]


@pytest.mark.slow
def test_a_long_document_has_a_row_for_each_passage(model, tmp_path):
    words = [f"{word} notes" for word in ("wave", "tide", "ship", "sail", "reef", "salt")]
    pairs = make_pairs(tmp_path / "pairs", {"d0": " ".join(words), "d1": "oven notes"})
    cut = replace(TINY, passage_words=8, passage_overlap=4)
    embeddings = encode.run(cut, model, pairs, tmp_path / "embeddings")
    rows = pq.read_table(embeddings.path / "documents.parquet").to_pylist()
    found = [(row["document_id"], row["passage"], row["text"]) for row in rows]
    # 12 words: the first eight, then from the fifth word on
    assert found == [("d0", 0, " ".join(words[:4])), ("d0", 1, " ".join(words[2:])), ("d1", 0, "oven notes")]
    assert embeddings.matrix().shape == (3, 32)
    assert (embeddings.rows["documents"], embeddings.rows["rows"]) == (2, 3)
    wanted = Encoder.open(model.path, device="cpu").documents([text for *_, text in found])
    np.testing.assert_allclose(embeddings.matrix(), wanted, atol=1e-5)


@pytest.mark.slow
def test_what_helped_to_go_on_is_no_part_of_the_artefact(model, pairs, tmp_path):
    embeddings = encode.run(TINY, model, pairs, tmp_path / "embeddings")
    assert sorted(embeddings.manifest["files"]) == [
        "documents.parquet", "embeddings.npy", "keys/embeddings.flags.npy", "keys/embeddings.json",
        "keys/embeddings.npy", "keys/queries.flags.npy", "keys/queries.json", "keys/queries.npy",
        "queries.npy", "queries.parquet",
    ]  # fmt: skip
    on_disk = {str(path.relative_to(embeddings.path)) for path in embeddings.path.rglob("*.*")}
    assert on_disk - set(embeddings.manifest["files"]) == {"manifest.json", "precision.json"}
    assert not list(tmp_path.glob(".embeddings*"))


@pytest.mark.slow
def test_the_manifest_says_what_was_encoded_and_how(model, pairs, tmp_path):
    embeddings = encode.run(TINY, model, pairs, tmp_path / "embeddings")
    rows, facts = embeddings.rows, embeddings.facts
    assert {name: rows[name] for name in ("documents", "rows", "copied", "equal", "encoded", "deleted")} == {
        "documents": 6, "rows": 6, "copied": 0, "equal": 0, "encoded": 6, "deleted": 0,
    }  # fmt: skip
    assert facts["description"] == "made"
    assert facts["encoder_sha256"] == model.encoder_sha256
    assert facts["guard"] == {"reason": "encode.precision asks for it"}
    assert (facts["precision"], facts["device"], facts["dim"]) == ("float32", "cpu", 32)
    assert facts["seen"] == {"cut": 0, "unknown_only": 0, "of": 6}
    assert facts["checks"]["n_rows"] == 6
    assert facts["checks"]["drift"] is None
    assert facts["texts_a_second"] > 0


@pytest.mark.slow
def test_how_large_the_model_is_stands_in_the_facts(model, pairs, tmp_path):
    facts = encode.run(TINY, model, pairs, tmp_path / "embeddings").facts
    tokenizer = json.loads((model.path / "tokenizer.json").read_text(encoding="utf-8"))
    n_tokens = len(tokenizer["model"]["vocab"])
    # embeddings of tokens, 64 positions and two segments; one layer: four 32 x 32, 32 x 64 and 64 x 32, with
    # biases; three LayerNorms; the pooler
    wanted = (
        (n_tokens + 64 + 2) * 32 + 4 * (32 * 32 + 32) + (32 * 64 + 64) + (64 * 32 + 32) + 3 * 64 + 32 * 33
    )
    assert facts["n_parameters"] == wanted
    files = [path for path in model.path.rglob("*") if path.is_file()]
    said = ("manifest.json", "training.jsonl", "README.md")
    assert facts["model_bytes"] == sum(path.stat().st_size for path in files if path.name not in said)


# --- Only what changed -------------------------------------------------------------------------------


@pytest.mark.slow
def test_of_a_next_version_only_new_and_changed_texts_are_encoded(model, pairs, tmp_path, capsys):
    before = rows_of(encode.run(TINY, model, pairs, tmp_path / "embeddings"))
    after = dict(WORDS)
    del after["d1"]  # gone
    after["d2"] = "flour and oven notes"  # changed
    after["d9"] = after.pop("d5")  # renamed
    after["a0"] = "galaxy notes"  # new, and before all others
    after["d6"] = "wave notes"  # another document of the same text
    capsys.readouterr()
    engine = Counting()
    made = make_pairs(tmp_path / "pairs2", after)
    embeddings = encode.run(TINY, model, made, tmp_path / "embeddings", engine=engine)
    assert engine.texts == ["galaxy notes", "flour and oven notes"]
    rows = rows_of(embeddings)
    assert sorted(rows) == ["a0", "d0", "d2", "d3", "d4", "d6", "d9"]
    assert [rows["d0"], rows["d3"], rows["d4"]] == [before["d0"], before["d3"], before["d4"]]
    assert rows["d9"] == before["d5"]
    assert rows["d6"] == before["d0"]
    assert embeddings.rows | {"copied": 5, "equal": 0, "encoded": 2, "deleted": 2} == embeddings.rows
    assert "encode: 7 rows: 5 copied, 2 to encode; 2 documents are gone\n" in capsys.readouterr().err


@pytest.mark.slow
def test_without_a_change_all_is_copied_and_no_model_opened(model, pairs, tmp_path, monkeypatch):
    first = encode.run(TINY, model, pairs, tmp_path / "embeddings")
    bits, facts = (first.path / "embeddings.npy").read_bytes(), first.facts

    def never(*_: object) -> None:
        raise AssertionError("the model was opened")

    monkeypatch.setattr(Encoder, "open", never)
    again = encode.run(TINY, model, pairs, tmp_path / "embeddings")
    assert (again.path / "embeddings.npy").read_bytes() == bits
    assert (again.rows["copied"], again.rows["encoded"]) == (6, 0)
    assert again.digest == first.digest
    for name in ("texts_a_second", "n_parameters", "model_bytes"):  # known from the version before
        assert again.facts[name] == facts[name]


@pytest.mark.slow
def test_equal_texts_are_encoded_once(model, tmp_path, capsys):
    engine = Counting()
    pairs = make_pairs(tmp_path / "pairs", {"a": "wave notes", "b": "oven notes", "c": "wave notes"})
    embeddings = encode.run(TINY, model, pairs, tmp_path / "embeddings", engine=engine)
    assert engine.texts == ["wave notes", "oven notes"]
    rows = rows_of(embeddings)
    assert rows["a"] == rows["c"] != rows["b"]
    assert "encode: 3 rows: 0 copied, 1 equal to another, 2 to encode\n" in capsys.readouterr().err


@pytest.mark.slow
def test_another_model_encodes_all_and_says_so_and_for_how_long_beforehand(
    model, pairs, tiny_model, tmp_path, capsys
):
    first = encode.run(TINY, model, pairs, tmp_path / "embeddings")
    said: list[str] = []

    def engine(job: Job, windows: Iterable[tuple[int, list[str]]], made: Shards) -> None:
        said.append(capsys.readouterr().err)
        shards.in_process(job, windows, made)

    capsys.readouterr()
    prefixed = copy_with(tiny_model, tmp_path / "other", "sentence_bert_config.json", max_seq_length=3)
    other = make_model(tmp_path / "model", prefixed, max_seq_length=3)
    embeddings = encode.run(TINY, other, pairs, tmp_path / "embeddings", engine=engine)
    assert embeddings.rows["copied"] == 0
    rate = f"{first.facts['texts_a_second']:,g}"
    assert (
        "encode: nothing can be copied from the version before: the model changed, "
        "max_seq_length was None, is 3\n"
    ) in said[0]
    assert f"encode: 6 texts take about 0 s at the {rate} a second of the version before\n" in said[0]
    assert embeddings.facts["seen"]["cut"] == 6  # "wave notes" is [CLS], two words and [SEP]
    assert embeddings.facts["checks"]["drift"] is None  # fewer than eleven documents


@pytest.mark.slow
def test_what_is_copied_is_said_before_the_precision_is_chosen(model, pairs, tmp_path, monkeypatch, capsys):
    """Choosing it may take hours."""
    encode.run(TINY, model, pairs, tmp_path / "embeddings")
    said: list[str] = []

    def choose(*_: object) -> tuple[str, dict]:
        said.append(capsys.readouterr().err)
        return "mixed", {"reason": "a test"}

    monkeypatch.setattr(precision, "choose", choose)
    more = make_pairs(tmp_path / "more", WORDS | {"d6": "comet notes of old"})
    made = encode.run(replace(TINY, precision="auto"), model, more, tmp_path / "embeddings")
    assert "encode: 7 rows: 6 copied, 1 to encode\n" in said[0]
    assert "encode: 1 texts take about" in said[0]
    assert made.rows["copied"] == 0
    after = capsys.readouterr().err  # at another precision no row can be copied after all
    assert "encode: 7 rows: 0 copied, 7 to encode\n" in after
    assert "nothing can be copied from the version before: precision was 'float32', is 'mixed'" in after


@pytest.mark.slow
def test_a_forced_run_copies_nothing(model, pairs, tmp_path, capsys):
    before = encode.run(TINY, model, pairs, tmp_path / "embeddings")
    engine = Counting()
    again = encode.run(TINY, model, pairs, tmp_path / "embeddings", engine=engine, fresh=True)
    assert engine.texts == list(WORDS.values())
    assert again.rows["copied"] == 0
    assert again.digest == before.digest
    assert "encode: nothing is copied from the version before: --force\n" in capsys.readouterr().err


@pytest.mark.parametrize("force", [True, False])
def test_force_on_the_command_line_asks_for_that(tmp_path, monkeypatch, force):
    asked: list[dict] = []
    monkeypatch.setattr(cli, "_plan", lambda *_: ({}, [], lambda **named: asked.append(named)))
    nothing: Any = None  # the plan would read the settings
    cli.run_stage("encode", nothing, tmp_path, force)
    assert asked == [{"out": tmp_path / "embeddings", "fresh": force}]


@pytest.mark.slow
def test_a_forced_run_takes_no_matrix_of_a_killed_run_that_copied(model, pairs, tmp_path, monkeypatch):
    encode.run(TINY, model, pairs, tmp_path / "embeddings")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checks, "check", killed)
        with pytest.raises(KeyboardInterrupt):
            encode.run(TINY, model, pairs, tmp_path / "embeddings")
    assert list(tmp_path.glob(".embeddings.partial-*/embeddings.npy"))
    engine = Counting()
    encode.run(TINY, model, pairs, tmp_path / "embeddings", engine=engine, fresh=True)
    assert engine.texts == list(WORDS.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        "embeddings.npy",
        "keys/embeddings.npy",
        "documents.parquet",
        "-embeddings.npy",
        "-keys",
        "~embeddings.npy",
    ],
)
def test_a_damaged_version_before_is_said_and_counts_as_none(model, pairs, tmp_path, how, capsys):
    """Cut in half, gone ("-") or of the same size with a flipped bit ("~")."""
    whole = encode.run(TINY, model, pairs, tmp_path / "embeddings")
    bits, digest = rows_of(whole), whole.digest
    file = whole.path / how.strip("-~")
    if how == "-keys":
        shutil.rmtree(file)
    elif how.startswith("-"):
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content if how.startswith("~") else content[: len(content) // 2])
    capsys.readouterr()
    made = encode.run(TINY, model, pairs, tmp_path / "embeddings")
    assert (made.rows["copied"], made.rows["encoded"], made.rows["deleted"]) == (0, 6, 0)
    assert made.facts["checks"]["drift"] is None
    assert (rows_of(made), made.digest) == (bits, digest)
    said = capsys.readouterr().err
    assert f"encode: nothing can be copied: {file}" in said
    assert "every text changed" not in said


@pytest.mark.slow
def test_the_speed_of_a_handful_of_texts_is_not_the_speed(model, pairs, tmp_path, monkeypatch):
    first = encode.run(TINY, model, pairs, tmp_path / "embeddings").facts["texts_a_second"]
    more = make_pairs(tmp_path / "more", WORDS | {"d6": "comet notes of old"})
    assert encode.run(TINY, model, more, tmp_path / "embeddings").facts["texts_a_second"] == first
    monkeypatch.setattr(encode, "WINDOW", 7)  # all seven are one
    again = encode.run(TINY, model, more, tmp_path / "embeddings", fresh=True)
    assert again.facts["texts_a_second"] != first


@pytest.mark.slow
def test_the_speed_is_that_of_the_engine_alone(model, pairs, tmp_path, monkeypatch):
    times = iter([10.0, 12.0])
    monkeypatch.setattr(encode.time, "perf_counter", lambda: next(times, 99.0))

    def engine(job: Job, windows: Iterable[tuple[int, list[str]]], made: Shards) -> None:
        with monkeypatch.context() as real:
            real.setattr(encode.time, "perf_counter", lambda: 11.0)
            shards.in_process(job, windows, made)

    embeddings = encode.run(TINY, model, pairs, tmp_path / "embeddings", engine=engine)
    assert embeddings.facts["texts_a_second"] == 3.0  # six texts between 10 and 12


@pytest.mark.slow
def test_what_was_seen_counts_copied_rows_too(model, pairs, tmp_path):
    long = make_pairs(tmp_path / "long", WORDS | {"emoji": "🌊🌊", "long": "wave tide " * 1000})
    encode.run(TINY, model, long, tmp_path / "embeddings")
    more = make_pairs(tmp_path / "more", WORDS | {"emoji": "🌊🌊", "long": "wave tide " * 1000, "z": "🌊"})
    made = encode.run(TINY, model, more, tmp_path / "embeddings")
    assert (made.rows["copied"], made.rows["encoded"]) == (8, 1)
    assert made.facts["seen"] == {"cut": 1, "unknown_only": 2, "of": 9}


def copy_with(folder: Path, to: Path, name: str, **changed: Any) -> Path:
    shutil.copytree(folder, to)
    settings = json.loads((to / name).read_text(encoding="utf-8"))
    (to / name).write_text(json.dumps(settings | changed), encoding="utf-8")
    return to


@pytest.mark.parametrize(
    ("then", "precision", "said"),
    [
        ({"precision": "bfloat16"}, "float32", "precision was 'bfloat16', is 'float32'"),
        ({"dim": 16}, "float32", "dim was 16, is 32"),
        (
            {"encoder_sha256": "x", "prompts": {"document": "passage: "}},
            "float32",
            "the model changed, document prefix was 'passage: ', is ''",
        ),
        (
            {"made_by": reuse.made_by() | {"rows": 0, "tokenizers": "0.1"}},
            "float32",
            f"the code that makes rows changed, tokenizers was 0.1, is {reuse.made_by()['tokenizers']}",
        ),
        ({}, "float32", "every text changed"),
    ],
)
def test_what_keeps_rows_from_being_copied_is_named(model, tmp_path, then, precision, said):
    facts = {"encoder_sha256": model.encoder_sha256, "prompts": {"document": ""}, "max_seq_length": None}
    facts |= {"precision": "float32", "dim": 32, "made_by": reuse.made_by()}
    before = Embeddings(tmp_path, {"facts": facts | then})
    assert ", ".join(encode.changes(before, Job("model", dim=32, precision=precision), model)) == said


@pytest.mark.slow
def test_a_version_of_an_older_format_is_said_and_not_copied_from(model, pairs, tmp_path, capsys):
    file = encode.run(TINY, model, pairs, tmp_path / "embeddings").path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))
    embeddings = encode.run(TINY, model, pairs, tmp_path / "embeddings")
    assert embeddings.rows["copied"] == 0
    wanted = f"encode: nothing can be copied: {file.parent} has format 2, this code reads format 3\n"
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (9000, "2.5 h")]
)
def test_a_duration_is_said_as_a_person_says_it(seconds, said):
    assert encode.duration(seconds) == said


# --- The precision -----------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """What the choice of the precision was asked with; it answers float32."""
    calls: list[tuple] = []

    def choose(open_at, texts, n_rows, config, before):
        calls.append((texts(2), n_rows, before))
        return "float32", {"n_sample": 2, "tried": [], "carried": False}

    monkeypatch.setattr(precision, "choose", choose)
    return calls


@pytest.mark.slow
def test_the_precision_is_tried_on_rows_at_equal_distances_and_once_a_run(model, pairs, tmp_path, asked):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    auto = replace(TINY, precision="auto")
    with pytest.raises(KeyboardInterrupt):
        encode.run(auto, model, pairs, tmp_path / "embeddings", engine=killed)
    embeddings = encode.run(auto, model, pairs, tmp_path / "embeddings")
    assert asked == [(["wave notes", "violin notes"], 6, None)]  # the second run found the answer
    assert embeddings.facts["guard"] == {"n_sample": 2, "tried": [], "carried": False}


@pytest.mark.slow
def test_what_the_version_before_found_is_handed_on_where_the_question_is_the_same(
    model, pairs, tmp_path, asked
):
    auto = replace(TINY, precision="auto")
    facts = encode.run(auto, model, pairs, tmp_path / "embeddings").facts
    encode.run(replace(auto, pool_size=2), model, pairs, tmp_path / "embeddings")
    encode.run(replace(auto, guard_recall=0.5), model, pairs, tmp_path / "embeddings")
    first, same, stricter = (before for *_, before in asked)
    assert first is None
    assert same is not None
    assert same["encoder_sha256"] == facts["encoder_sha256"]
    assert stricter is None


@pytest.mark.slow
@pytest.mark.parametrize(("n_new", "is_carried"), [(1, True), (2, False)])
def test_a_verdict_holds_only_where_it_was_asked_of_most_texts(
    model, pairs, tmp_path, asked, n_new, is_carried
):
    """Of 7 rows 6 are copied, 86 %; of 8 rows 6 are, 75 %."""
    auto = replace(TINY, precision="auto")
    encode.run(auto, model, pairs, tmp_path / "embeddings")
    more = make_pairs(tmp_path / "more", WORDS | {f"new{n}": f"ship {n}" for n in range(n_new)})
    encode.run(auto, model, more, tmp_path / "embeddings")
    assert (asked[1][2] is not None) == is_carried


@pytest.mark.slow
def test_a_verdict_of_another_torch_does_not_hold(model, pairs, tmp_path, asked):
    auto = replace(TINY, precision="auto")
    file = encode.run(auto, model, pairs, tmp_path / "embeddings").path / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["libraries"]["torch"] = "1.0"
    file.write_text(json.dumps(manifest))
    encode.run(auto, model, pairs, tmp_path / "embeddings")
    assert asked[1][2] is None


@pytest.mark.slow
def test_half_a_note_of_the_precision_is_no_note(model, pairs, tmp_path, asked):
    def cut_and_killed(job: Job, *_: object) -> None:
        (note,) = tmp_path.glob(".embeddings.partial-*/precision.json")
        note.write_text(note.read_text()[:20])
        raise KeyboardInterrupt

    auto = replace(TINY, precision="auto")
    with pytest.raises(KeyboardInterrupt):
        encode.run(auto, model, pairs, tmp_path / "embeddings", engine=cut_and_killed)
    encode.run(auto, model, pairs, tmp_path / "embeddings")
    assert len(asked) == 2


# --- What is refused, and what is counted ------------------------------------------------------------


def test_another_width_than_the_models_is_refused(model, pairs, tmp_path):
    with pytest.raises(ConfigError, match=r"gives vectors of 32 numbers, but encode\.dim is 384"):
        encode.run(config.EncodeConfig(), model, pairs, tmp_path / "embeddings")


def test_no_documents_are_refused(model, tmp_path):
    pairs = make_pairs(tmp_path / "pairs", {})
    with pytest.raises(InputError, match=r"pairs has no documents, so there is nothing to encode"):
        encode.run(TINY, model, pairs, tmp_path / "embeddings")


@pytest.mark.slow
def test_a_text_of_emoji_and_one_of_a_megabyte_are_kept_and_counted(model, tmp_path):
    given = WORDS | {"emoji": "🌊🌊 🌊", "long": "wave tide " * 100_000}
    embeddings = encode.run(TINY, model, make_pairs(tmp_path / "pairs", given), tmp_path / "embeddings")
    assert embeddings.facts["seen"] == {"cut": 1, "unknown_only": 1, "of": 8}
    assert embeddings.matrix().shape == (8, 32)
    texts = pq.read_table(embeddings.path / "documents.parquet")["text"].to_pylist()
    assert max(map(len, texts)) == 1_000_000


@pytest.mark.slow
def test_rows_that_are_all_alike_are_refused_and_the_version_before_stays(model, tmp_path):
    texts = {f"d{n}": f"wave {n}" + " notes" * 40 for n in range(checks.MIN_JUDGED)}
    alike = make_pairs(tmp_path / "pairs", texts)
    before = encode.run(replace(TINY, max_mean_cosine=1.0), model, alike, tmp_path / "embeddings")
    with pytest.raises(ArtifactError, match=r"wanted at most encode\.max_mean_cosine = 0\.5"):
        encode.run(replace(TINY, max_mean_cosine=0.5), model, alike, tmp_path / "embeddings")
    assert Embeddings.open(tmp_path / "embeddings").digest == before.digest


ALIKE = {f"d{n:02}": f"wave {n}" + " notes" * 40 for n in range(2 * checks.MIN_JUDGED)}


@pytest.mark.slow
def test_a_collapsed_model_is_refused_by_its_first_shard_and_a_raised_limit_keeps_what_is_done(
    model, tmp_path, monkeypatch
):
    monkeypatch.setattr(reuse, "WINDOW", checks.MIN_JUDGED)
    alike, out = make_pairs(tmp_path / "pairs", ALIKE), tmp_path / "embeddings"
    rest = Counting()
    for _ in range(2):  # the same command again does not go on to the last shard
        with pytest.raises(ArtifactError, match=r"the first 10 documents' rows: .*max_mean_cosine = 0\.5"):
            encode.run(replace(TINY, max_mean_cosine=0.5), model, alike, out, engine=OneByOne())
    assert len(list(tmp_path.glob(".embeddings.partial-*/shards-embeddings-*/*.npy"))) == 1
    encode.run(replace(TINY, max_mean_cosine=1.0), model, alike, out, engine=rest)
    assert rest.texts == list(ALIKE.values())[10:]


class OneByOne(Counting):
    """Encodes a shard when the one before it is there."""

    def __call__(self, job: Job, windows: Iterable[tuple[int, list[str]]], made: Shards) -> None:
        for window in windows:
            super().__call__(job, [window], made)


@pytest.mark.slow
def test_new_documents_that_are_alike_are_judged_with_the_others(model, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(reuse, "WINDOW", checks.MIN_JUDGED)
    different = {f"a{n:02}": text for n, text in enumerate(["oven", "comet", "flour", "violin"] * 6)}
    names = iter("abcdefghijklmnopqrstuvwx")
    varied = {key: f"{text} {next(names)}" for key, text in different.items()}
    limit = replace(TINY, max_mean_cosine=1.0)
    encode.run(limit, model, make_pairs(tmp_path / "first", varied), tmp_path / "embeddings")
    looked: list[Any] = []
    monkeypatch.setattr(encode, "check_first", lambda *given: looked.append(given))
    encode.run(limit, model, make_pairs(tmp_path / "both", varied | ALIKE), tmp_path / "embeddings")
    assert looked == []


@pytest.mark.slow
def test_of_a_collection_of_emoji_it_is_said_that_the_model_knows_none(model, tmp_path):
    emoji = {f"d{n:02}": "🌊" * (n + 1) for n in range(12)}
    with pytest.raises(ArtifactError, match=r"^the model knows no token of 12 of 12 texts; embeddings\.npy"):
        encode.run(TINY, model, make_pairs(tmp_path / "pairs", emoji), tmp_path / "embeddings")


# --- The key -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "is_same"),
    [
        ({"processes": 2}, True), ({"temp_location": "/tmp/x"}, True), ({"batch_tokens": 64}, False),
        ({"precision": "mixed"}, False), ({"passage_words": 50}, False), ({"max_mean_cosine": 0.5}, True),
    ],
)  # fmt: skip
def test_who_computes_is_no_part_of_what_is_made(changed, is_same):
    assert (encode.settings_of(replace(TINY, **changed)) == encode.settings_of(TINY)) is is_same


@pytest.fixture
def korsts(tmp_path) -> str:
    lines = ["genre\tfilename\tyear\tid\tscore\tsentence1\tsentence2"]
    lines += ["main-news\tx\t2012\t1\t5.000\twave\ttide", "main-news\tx\t2012\t2\t1.000\tflour\tcomet"]
    path = tmp_path / "sts-test.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_other_sentences_under_the_same_name_are_another_input(model, pairs, korsts):
    settings = config.EncodeConfig(sts={"ko": korsts})

    def key() -> str:
        return key_of(Embeddings, encode.settings_of(settings), encode.inputs_of(settings, model, pairs))

    before = key()
    Path(korsts).write_text(Path(korsts).read_text() + "main-news\tx\t2012\t3\t0.000\ta\tb\n")
    assert key() != before


def test_a_file_of_sentences_that_is_not_there_is_named(model, pairs, tmp_path):
    settings = config.EncodeConfig(sts={"ko": str(tmp_path / "none.tsv")})
    with pytest.raises(InputError, match=r"encode\.sts: ko: .*none\.tsv: no such file"):
        encode.inputs_of(settings, model, pairs)
