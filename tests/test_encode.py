"""Stage `encode`: rows in order, checked, gone on with after a kill; and the held-out queries."""

import json

import numpy as np
import pyarrow as pa
import pytest

from pipeline import config, encode, pairs, train
from pipeline.artifacts import Embeddings, Model, Pairs
from pipeline.errors import ArtifactError, ConfigError

CONFIG = config.EncodeConfig(dim=2, device="cpu", precision="float32")


def fake_encode(texts):
    """Stands in for a model: the angle of a text's vector is its length."""
    angles = np.array([len(text) for text in texts], dtype=np.float32)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def test_rows_are_written_in_the_order_of_the_texts():
    matrix = encode.fill(np.zeros((3, 2), np.float32), ["a", "bb", "ccc"], fake_encode, "documents")
    np.testing.assert_array_equal(matrix, fake_encode(["a", "bb", "ccc"]))


def test_rows_that_are_done_are_not_encoded_again():
    asked = []

    def remember(texts):
        asked.extend(texts)
        return fake_encode(texts)

    encode.fill(np.zeros((3, 2), np.float32), ["a", "bb", "ccc"], remember, "documents", done=2)
    assert asked == ["ccc"]


def test_a_model_of_another_width_is_refused():
    with pytest.raises(ArtifactError, match=r"encode\.dim = 3 needs \(1, 3\)"):
        encode.fill(np.zeros((1, 3), np.float32), ["a"], fake_encode, "documents")


@pytest.mark.parametrize("value", [0.0, np.nan, 2.0])
def test_a_row_that_is_no_unit_vector_is_named_with_its_text(value):
    def broken(texts):
        rows = fake_encode(texts)
        rows[1] = value
        return rows

    with pytest.raises(ArtifactError, match=r"document row 1 a vector of length .*its text is 'bb'"):
        encode.fill(np.zeros((3, 2), np.float32), ["a", "bb", "ccc"], broken, "documents")


def test_a_killed_run_goes_on_behind_its_last_whole_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "CHUNK", 2)
    texts = pa.chunked_array([["a", "bb", "ccc", "dddd", "eeeee"]])
    asked = []

    def killed_at_the_third_chunk(chunk):
        asked.append(chunk)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return fake_encode(chunk)

    file = tmp_path / "embeddings.npy"
    with pytest.raises(KeyboardInterrupt):
        encode._encode_to(file, texts, killed_at_the_third_chunk, "documents", CONFIG)
    asked.clear()
    encode._encode_to(
        file, texts, lambda chunk: asked.append(chunk) or fake_encode(chunk), "documents", CONFIG
    )
    assert asked == [["eeeee"]]
    np.testing.assert_array_equal(np.load(file), fake_encode(texts.to_pylist()))


@pytest.mark.parametrize(
    ("text", "expected"), [("one two three", "one two"), ("word", "wo"), ("한글", "한"), ("x", "x")]
)
def test_half_a_text_stands_for_a_typed_query(text, expected):
    assert encode.half(text) == expected


@pytest.fixture(scope="module")
def stages(tmp_path_factory, log, tiny_model) -> tuple[Pairs, Model, Embeddings]:
    work = tmp_path_factory.mktemp("encode")
    given = config.from_dict(
        {
            "events": {"paths": [str(log / "events.jsonl")], "description": "simulated readers"},
            "documents": {"paths": [str(log / "documents.jsonl")]},
        }
    )
    made = pairs.run(given.pairs, given.events, given.documents, work / "pairs")
    settings = config.TrainConfig(model=str(tiny_model), batch_size=32, device="cpu", precision="float32")
    model = train.run(settings, made, work / "model", dim=32)
    encoding = config.EncodeConfig(dim=32, device="cpu", precision="float32", pool_size=5)
    return made, model, encode.run(encoding, model, made, work / "embeddings")


@pytest.mark.slow
def test_every_document_has_its_row(stages):
    made, model, embeddings = stages
    from pipeline.encoder import Encoder

    documents = made.read("documents")
    assert embeddings.matrix().shape == (40, 32)
    rows = Encoder.open(model.path, device="cpu").documents(documents["text"].to_pylist())
    np.testing.assert_allclose(embeddings.matrix(), rows, atol=1e-5)


@pytest.mark.slow
def test_the_pool_holds_every_held_out_positive_and_is_the_same_for_both_models(stages):
    import pyarrow.parquet as pq

    made, _, embeddings = stages
    ids = made.read("documents")["document_id"].to_pylist()
    pool = {ids[row] for row in pq.read_table(embeddings.path / "pool.parquet")["document_row"].to_pylist()}
    positives = {i for span in ("dev", "test") for i in made.read(span)["positive_id"].to_pylist()}
    assert positives <= pool
    assert np.load(embeddings.path / "untuned" / "documents.npy").shape == (len(pool), 32)


@pytest.mark.slow
def test_queries_are_the_held_out_anchors_once_and_their_halves(stages):
    import pyarrow.parquet as pq

    made, _, embeddings = stages
    rows = pq.read_table(embeddings.path / "queries.parquet").to_pylist()
    ids = made.read("documents")["document_id"].to_pylist()
    for span in ("dev", "test"):
        anchors = [row["document_id"] for row in rows if (row["span"], row["kind"]) == (span, "document")]
        assert sorted(anchors) == sorted(set(made.read(span)["anchor_id"].to_pylist()))
    assert all(ids[row["document_row"]] == row["document_id"] for row in rows)
    assert np.load(embeddings.path / "queries.npy").shape == (len(rows), 32)
    assert np.load(embeddings.path / "untuned" / "queries.npy").shape == (len(rows), 32)


@pytest.mark.slow
def test_what_helped_to_go_on_is_no_part_of_the_artefact(stages):
    *_, embeddings = stages
    assert not [path for path in embeddings.path.rglob("*") if "progress" in path.name]
    assert (
        json.loads((embeddings.path / "manifest.json").read_text())["facts"]["description"]
        == "simulated readers"
    )


@pytest.mark.slow
def test_another_width_than_the_models_is_refused(stages, tmp_path):
    made, model, _ = stages
    with pytest.raises(ConfigError, match=r"gives vectors of 32 numbers, but encode\.dim is 384"):
        encode.run(config.EncodeConfig(), model, made, tmp_path / "embeddings")


@pytest.mark.slow
def test_without_sessions_documents_stand_for_queries(tmp_path, log, tiny_model):
    import pyarrow.parquet as pq

    given = config.from_dict({"documents": {"paths": [str(log / "documents.jsonl")]}})
    made = pairs.run(given.pairs, given.events, given.documents, tmp_path / "pairs")
    model = train.run(
        config.TrainConfig(model=str(tiny_model), device="cpu"), made, tmp_path / "model", dim=32
    )
    assert model.facts["trained"] is False
    settings = config.EncodeConfig(dim=32, device="cpu", precision="float32")
    embeddings = encode.run(settings, model, made, tmp_path / "embeddings")
    rows = pq.read_table(embeddings.path / "queries.parquet").to_pylist()
    dev, test = ({row["document_id"] for row in rows if row["span"] == span} for span in ("dev", "test"))
    assert dev
    assert test
    assert not dev & test
    assert not (embeddings.path / "untuned").exists()
