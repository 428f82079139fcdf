"""Asking in words: the version's own encoder, a running server, and the version's own documents."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serving_parts import ROOT, K, export, publish_rows, rows_server, server_process, unit_rows

from pipeline.artifacts import encoder_sha256, file_hashes
from pipeline.errors import ArtifactError, InputError
from serving.__main__ import main
from serving.ask import _table, ask, inputs_of, request_body, title
from serving.client import Client, Found
from serving.published import PublishedVersion

VERBS, NOUNS = ("sort", "read", "draw", "count"), ("rows", "files", "lines", "words", "days")
# ScaNN's codebooks want at least sixteen rows
TEXTS = ("merge two tables on a key", *(f"{verb} the {noun}" for verb in VERBS for noun in NOUNS))
TITLES = ("Merge", None, "", *["Other"] * (len(TEXTS) - 3))
ENCODER = "ab" * 32

# Runs in its own process: a tiny model of the usual make-up, then the texts' vectors by it.
MAKE_ENCODER = """
import sys
from pathlib import Path
import numpy as np, torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
folder, out, texts = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
torch.manual_seed(7)
words = sorted({word for text in texts for word in text.split()})
body = folder.parent / "body"
body.mkdir(parents=True)
tokens = ["[PAD]", "[UNK]", *words]
by_word = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
by_word.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=by_word, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(body)
config = BertConfig(vocab_size=len(tokens), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                    intermediate_size=16, max_position_embeddings=32)
BertModel(config).save_pretrained(body)
transformer = modules.Transformer(str(body), max_seq_length=32)
SentenceTransformer(modules=[transformer, modules.Pooling(16), modules.Normalize()]).save(str(folder))
from pipeline.encoder import Encoder
np.save(out, Encoder.open(folder).documents(texts))
"""


def publish(
    folder: Path,
    version: int = 7,
    row_group_size: int = 2,
    thresholds: list | None = None,
    **manifest: object,
) -> PublishedVersion:
    """assets.extra/ of a version, as `publish` leaves it, in FOLDER/models/index/<version>/."""
    assets = folder / "models" / "index" / str(version) / "assets.extra"
    assets.mkdir(parents=True, exist_ok=True)
    ids = [f"d{i}" for i in range(len(TEXTS))]
    table = pa.table({"document_id": ids, "text": TEXTS, "title": TITLES})
    if thresholds:
        table = table.append_column("threshold", pa.array(thresholds, pa.float64()))
    pq.write_table(table, assets / "documents.parquet", row_group_size=row_group_size)
    files = file_hashes(assets.parent, left_out=[assets / "manifest.json"])
    written = {
        "encoder_sha256": ENCODER,
        "k": K,
        "dim": 8,
        "description": "simulated readers",
        "files": files,
    }
    written |= manifest
    (assets / "manifest.json").write_text(json.dumps(written))
    return PublishedVersion(folder / "models" / "index", version)


def test_a_document_cannot_write_elsewhere_on_the_terminal():
    assert title({"title": "ship \u202e\x1b[31m red\nbelow"}) == "ship [31m red below"
    assert title({"title": "x" * 100}) == "x" * 71 + "…"
    shown = _table(Found([0.5], [0]), [{"document_id": "a\nb\x07", "title": "t", "text": "t"}])
    assert "a b  " in shown.splitlines()[-1]


@pytest.mark.parametrize("row_group_size", [1, 2, 100])
def test_rows_become_documents_in_the_order_found(tmp_path, row_group_size):
    version = publish(tmp_path, row_group_size=row_group_size)
    found = version.documents([3, 0, 3, 1])
    assert [document["document_id"] for document in found] == ["d3", "d0", "d3", "d1"]
    assert found[1] == {"document_id": "d0", "title": "Merge", "text": TEXTS[0]}


def test_a_row_beyond_the_table_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"documents\.parquet has 21 rows, the index found row 21$"):
        publish(tmp_path).documents([0, 21])


def test_a_document_without_a_title_shows_its_first_line():
    assert title({"title": "A \n title"}) == "A title"
    assert title({"title": None, "text": " one\ttwo\nthree"}) == "one two"
    assert title({}) == ""


THRESHOLDS = [0.9, 0.5, None] + [-1.0] * (len(TEXTS) - 3)


@pytest.mark.parametrize(
    ("scores", "rows", "shown"),
    [
        ((0.91, 0.51), (0, 1), ["d0", "d1"]),
        ((0.89, 0.51), (0, 1), ["d1"]),
        ((0.5, 0.4999), (1, 1), ["d1"]),  # at its threshold a document is a match
        ((-0.99, -0.99), (2, 3), ["d2", "d3"]),  # without one it always is
    ],
)
def test_below_its_threshold_a_document_is_no_match(tmp_path, scores, rows, shown):
    documents = publish(tmp_path, thresholds=THRESHOLDS).documents(rows)
    lines = _table(Found(scores, rows), documents).splitlines()[2:]
    assert [line.split()[0] for line in lines] == [str(rank) for rank in range(1, len(shown) + 1)]
    assert [line.split()[2] for line in lines] == shown


def test_where_nothing_matches_the_best_score_and_its_threshold_are_said(tmp_path):
    documents = publish(tmp_path, thresholds=THRESHOLDS).documents([1, 0])
    said = _table(Found((0.49, 0.47), (1, 0)), documents)
    assert said == "no match: the nearest, d1, scores 0.4900, and its threshold is 0.5000"


def in_passages(*passages: tuple[str, int, float | None]) -> list[dict]:
    """A row of (document_id, number of the passage, threshold) each."""
    return [
        {"document_id": d, "title": d.upper(), "text": f"part {n}\nof {d}", "threshold": t, "passage": n}
        for d, n, t in passages
    ]


def test_a_document_in_passages_is_shown_once_by_the_best_of_them():
    rows = in_passages(("a", 2, None), ("b", 0, None), ("a", 0, None), ("c", 1, None))
    lines = _table(Found((0.9, 0.8, 0.7, 0.6), (2, 7, 0, 9)), rows, k=4).splitlines()
    assert lines[0].split() == ["rank", "score", "document_id", "title", "passage"]
    shown = [line.split(maxsplit=4) for line in lines[2:]]
    assert shown == [
        ["1", "0.9000", "a", "A", "part 2 of a"],
        ["2", "0.8000", "b", "B", "part 0 of b"],
        ["3", "0.6000", "c", "C", "part 1 of c"],
    ]
    assert len(_table(Found((0.9, 0.8, 0.7, 0.6), (2, 7, 0, 9)), rows, k=2).splitlines()) == 4


def test_a_threshold_is_asked_of_the_best_passage():
    rows = in_passages(("a", 1, 0.85), ("a", 0, 0.85), ("b", 0, 0.85))
    (line,) = _table(Found((0.9, 0.8, 0.7), (1, 0, 4)), rows).splitlines()[2:]
    assert line.split()[:3] == ["1", "0.9000", "a"]
    assert _table(Found((0.84, 0.8, 0.7), (1, 0, 4)), rows).startswith(
        "no match: the nearest, a, scores 0.8400"
    )


def encoder_of(folder: Path) -> tuple[PublishedVersion, Path]:
    """A version, and its encoder of two files, a card and a log of the training among them."""
    made = folder / "made"
    (made / "1_Pooling").mkdir(parents=True)
    for name in ("prompts.json", "1_Pooling/config.json", "README.md", "training.jsonl"):
        (made / name).write_text(name)
    encoder = folder / "encoders" / encoder_sha256(file_hashes(made))
    encoder.parent.mkdir()
    return publish(folder, encoder_sha256=encoder.name), made.rename(encoder)


def test_an_encoder_as_it_was_published_is_taken_whatever_is_said_of_it(tmp_path):
    version, encoder = encoder_of(tmp_path)
    assert version.checked_encoder() == encoder
    (encoder / "README.md").write_text("a better card")
    assert version.checked_encoder() == encoder


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "prompts.json").write_text("another prefix"),
        lambda folder: (folder / "1_Pooling" / "config.json").unlink(),
        lambda folder: (folder / "tokens.json").write_text("more"),
    ],
)
def test_an_encoder_that_was_changed_after_publication_is_refused_in_a_line(tmp_path, change):
    version, encoder = encoder_of(tmp_path)
    change(encoder)
    with pytest.raises(ArtifactError, match="was changed after version 7 was made with it") as caught:
        version.checked_encoder()
    assert str(encoder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda assets: (assets / "manifest.json").unlink(), "is not there: give the folder that the server"),
        (lambda assets: (assets / "manifest.json").write_text("{"), "cannot be read"),
        (lambda assets: (assets / "manifest.json").write_text("{}"), "names no encoder_sha256"),
        (lambda assets: None, f"encoders/{ENCODER} is not there: version 7 was encoded with it"),
    ],
)
def test_what_is_missing_from_a_version_is_named(tmp_path, spoil, said):
    publish(tmp_path)
    base = tmp_path / "models" / "index"
    spoil(base / "7" / "assets.extra")
    publish_rows(tmp_path / "watched", 7, unit_rows(4, 8))
    with (
        rows_server(tmp_path / "watched") as (url, _),
        Client(url) as client,
        pytest.raises(ArtifactError) as caught,
    ):
        ask(client, base, "words", k=1)
    assert said in str(caught.value)


def test_more_than_the_version_answers_and_no_words_are_refused(tmp_path):
    publish(tmp_path)
    publish_rows(tmp_path / "watched", 7, unit_rows(4, 8))
    with rows_server(tmp_path / "watched") as (url, _), Client(url) as client:
        with pytest.raises(InputError, match=rf"^-k 4: version 7 answers with {K}; choose 1 to {K}$"):
            ask(client, tmp_path / "models" / "index", "words", k=K + 1)
        with pytest.raises(InputError, match="the text is empty"):
            ask(client, tmp_path / "models" / "index", "  ", k=1)


SETTINGS = {"num_leaves": 40, "num_leaves_to_search": 6, "num_reordering_candidates": 100}
WITHOUT_TREE = dict.fromkeys(SETTINGS)


@pytest.mark.parametrize(
    ("settings", "signature_name", "k", "wanted"),
    [
        (SETTINGS, "exact", None, {"k": K}),
        (SETTINGS, "search", None, {"k": K, "num_leaves_to_search": 6, "num_reordering_candidates": 100}),
        # fewer candidates than results would be no request that anybody means
        (SETTINGS, "search", 300, {"k": 300, "num_leaves_to_search": 6, "num_reordering_candidates": 300}),
        (WITHOUT_TREE, "search", 5, {"k": 5, "num_leaves_to_search": 1, "num_reordering_candidates": 5}),
    ],
)
def test_a_request_is_made_with_the_settings_that_the_version_ships(
    tmp_path, settings, signature_name, k, wanted
):
    version = publish(tmp_path, settings=settings)
    inputs = inputs_of(version, signature_name, np.float32([0.1, 0.25]), k)
    assert inputs == {"queries": [[0.100000001, 0.25]]} | wanted  # float32's 0.1 in nine digits


def test_a_filter_to_edit_lets_every_document_by(tmp_path):
    inputs = inputs_of(publish(tmp_path), "search_filtered", [1.0])
    assert (inputs["allowed_document_ids"], inputs["excluded_document_ids"]) == ([], [])
    assert inputs["minimum_score"] == -1.0  # of unit vectors none scores less


def test_a_k_that_serving_default_cannot_take_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"^-k 5: serving_default takes no k; choose --signature_name"):
        request_body(publish(tmp_path), "words", "serving_default", k=5)


def test_a_signature_without_body_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["ask", "words", "--signature_name", "search"])
    assert "--signature_name search wants --body" in capsys.readouterr().err


def test_asking_nobody_is_one_line(capsys):
    assert main(["ask", "words", "--url", "localhost"]) == 1
    assert capsys.readouterr().err == "error: localhost: not an address; wanted http://HOST:PORT\n"


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "serving", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_words_find_the_document_that_says_the_same(tmp_path):
    base = tmp_path / "models" / "index"
    vectors = tmp_path / "vectors.npy"
    arguments = [str(tmp_path / "made" / "encoder"), str(vectors), *TEXTS]
    subprocess.run(
        [sys.executable, "-c", MAKE_ENCODER, *arguments], check=True, cwd=ROOT, capture_output=True
    )
    export(np.load(vectors), base / "7")
    sha256 = encoder_sha256(file_hashes(tmp_path / "made" / "encoder"))
    (tmp_path / "encoders").mkdir()
    (tmp_path / "made" / "encoder").rename(tmp_path / "encoders" / sha256)
    publish(tmp_path, thresholds=[None] + [1.0] * (len(TEXTS) - 1), encoder_sha256=sha256)
    with server_process(base) as (url, _):
        with Client(url) as client:
            client.wait_until_ready(deadline=60)
        where = ("--url", url, "--model_base_path", str(base))
        lines = run("ask", TEXTS[0], "-k", "2", *where).splitlines()
        assert lines[0] == "version 7, simulated readers"
        assert lines[1].split() == ["rank", "score", "document_id", "title"]
        assert lines[3].split() == ["1", "1.0000", "d0", "Merge"]
        assert len(lines) == 4  # the second of two is another text, and below its threshold
        query = json.loads(run("ask", TEXTS[0], "--body", *where))
        np.testing.assert_allclose(query["inputs"], np.load(vectors)[0], atol=1e-6)
        (tmp_path / "query.json").write_text(json.dumps(query))
        curl = subprocess.run(
            ["curl", "-sS", "-d", f"@{tmp_path}/query.json", "-X", "POST", f"{url}/v1/models/index:predict"],
            check=True,
            capture_output=True,
        )
        assert json.loads(curl.stdout)["outputs"]["output_2"][0] == 0
        assert "ready: version 7" in run("probe", "--url", url, "--query", str(tmp_path / "query.json"))
