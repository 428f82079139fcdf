"""R@1, R@10 and MRR among given candidates, on rows whose ranks can be counted by hand."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import candidates as candidates_
from pipeline.__main__ import main
from pipeline.artifacts import Embeddings, Model, Pairs, writing
from pipeline.candidates import Question, bm25_scores, dense_scores, measure, placed, read
from pipeline.config import Config, DocumentsConfig, EncodeConfig, EvaluateConfig
from pipeline.errors import InputError
from tests.conftest import write_jsonl
from tests.test_imports import STAGES, imports

CONFIG = EvaluateConfig(n_draws=200)
ROW = {"query": "wave", "candidates": ["tide", "oven", "moon"], "positive": 0}


def make_pairs(path) -> Pairs:
    with writing(Pairs, path, config={}, inputs=[]) as draft:
        table = pa.table({"document_id": ["d0", "d1", "d2"], "text": ["red fox", "blue hen", "old owl"]})
        pq.write_table(table, draft.folder / "documents-00000.parquet")
        draft.rows["documents"] = 3
        draft.facts["description"] = "made readers"
    return Pairs.open(path)


# --- Reading -------------------------------------------------------------------------------------------


def test_the_positive_is_a_number_from_0_or_the_candidate_itself(tmp_path):
    file = write_jsonl(tmp_path / "q.jsonl", [ROW | {"positive": 1}, ROW | {"positive": "oven"}])
    assert [one.positive for one in read(file, tmp_path / "pairs")] == [1, 1]


def test_document_ids_become_their_documents_texts(tmp_path):
    make_pairs(tmp_path / "pairs")
    row = {"query": "fox", "candidates": ["d2", "d0"], "positive": "d0"}
    (one,) = read(write_jsonl(tmp_path / "q.jsonl", [row]), tmp_path / "pairs")
    assert one == Question("fox", ["old owl", "red fox"], 1)


def test_parquet_rows_and_compressed_lines_are_the_same_questions(tmp_path):
    file = write_jsonl(tmp_path / "q.jsonl", [ROW, ROW | {"query": "flour", "positive": 1}])
    with pa.output_stream(str(tmp_path / "q.jsonl.gz"), compression="gzip") as packed:
        packed.write(file.read_bytes())
    pq.write_table(pa.Table.from_pylist([json.loads(x) for x in file.open()]), tmp_path / "q.parquet")
    questions = read(file, tmp_path / "pairs")
    assert [one.query for one in questions] == ["wave", "flour"]
    for name in ("q.jsonl.gz", "q.parquet"):
        assert read(tmp_path / name, tmp_path / "pairs") == questions


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[1]", r"line 2: got \[1\], wanted an object with query, candidates, positive"),
        ("{", "line 2: not JSON that can be read: .* at character 2; wanted JSON Lines or Parquet"),
        (ROW | {"query": " "}, "line 2: query is ' ', wanted a text"),
        (ROW | {"candidates": "tide"}, "line 2: candidates is 'tide', wanted a list of two or more"),
        (ROW | {"candidates": ["tide"]}, "line 2: candidates is .*, wanted a list of two or more"),
        (ROW | {"candidates": ["tide", None]}, "line 2: a candidate is None, wanted a text or document_id"),
        (ROW | {"positive": 3}, "line 2: positive is 3, but there are 3 candidates; choose 0 to 2"),
        (ROW | {"positive": -1}, "line 2: positive is -1, but"),
        (ROW | {"positive": 10**4000}, r"line 2: positive is 1000*…, but there are 3 candidates"),
        (
            # 5,000 digits: more than Python turns into a number
            json.dumps(ROW).replace("0}", "9" * 5000 + "}"),
            "line 2: not JSON that can be read: .*; wanted JSON Lines or Parquet",
        ),
        ("[" * 100_000, "line 2: not JSON that can be read: .*; wanted JSON Lines or Parquet"),
        (ROW | {"query": "\ud800"}, r"line 2: '\\ud800' holds half a character \(a lone surrogate\)"),
        (ROW | {"candidates": ["a", "a \ud800"]}, r"line 2: 'a \\ud800' holds half a character"),
        (ROW | {"positive": True}, "line 2: positive is True, wanted a candidate or its number"),
        (ROW | {"positive": "sail"}, "line 2: positive 'sail' is none of its 3 candidates"),
    ],
)
def test_a_row_that_cannot_be_used_is_one_line_with_its_number(tmp_path, row, message):
    make_pairs(tmp_path / "pairs")
    file = tmp_path / "q.jsonl"
    file.write_text(f"{json.dumps(ROW)}\n{row if isinstance(row, str) else json.dumps(row)}\n")
    with pytest.raises(InputError, match=message) as raised:
        read(file, tmp_path / "pairs")
    assert str(raised.value).startswith(f"{file}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["d0", "d7"]], "line 1: candidate 'd7' is no document_id of the pairs, but 'd0' is one; give"),
        # all of the second row's ids are misspelt
        ([["d0", "d1"], ["D0", "D1"]], r"line 2: candidate 'D0' is no .*, but 'd0' \(line 1\) is one; give"),
        ([["tide", "oven"], ["d0", "d1"]], r"line 1: candidate 'tide' is no .*, but 'd0' \(line 2\) is one"),
    ],
)
def test_a_misspelt_document_id_is_never_taken_for_a_text(tmp_path, rows, message):
    make_pairs(tmp_path / "pairs")
    file = write_jsonl(tmp_path / "q.jsonl", [ROW | {"candidates": row} for row in rows])
    with pytest.raises(InputError, match=message):
        read(file, tmp_path / "pairs")


def test_texts_stay_texts_beside_pairs_that_know_none_of_them(tmp_path):
    make_pairs(tmp_path / "pairs")
    (one,) = read(write_jsonl(tmp_path / "q.jsonl", [ROW]), tmp_path / "pairs")
    assert one.candidates == ["tide", "oven", "moon"]


def test_a_folder_and_a_csv_file_are_told_what_is_wanted(tmp_path):
    with pytest.raises(InputError, match="is a folder, wanted a file: JSON Lines or Parquet"):
        read(tmp_path, tmp_path)
    (tmp_path / "q.csv").write_text("query,candidates,positive\nwave,tide|oven,0\n")
    with pytest.raises(InputError, match=r"line 1: not JSON that can be read: .*; wanted JSON Lines"):
        read(tmp_path / "q.csv", tmp_path)


def test_a_file_that_is_missing_empty_or_of_other_columns_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "none.jsonl", tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="no rows; wanted one a query"):
        read(tmp_path / "empty.jsonl", tmp_path)
    pq.write_table(pa.table({"query": ["a"]}), tmp_path / "q.parquet")
    with pytest.raises(InputError, match="has no column candidates, positive"):
        read(tmp_path / "q.parquet", tmp_path)
    (tmp_path / "broken.parquet").write_text("PAR1")
    with pytest.raises(InputError, match=r"broken\.parquet: cannot be read"):
        read(tmp_path / "broken.parquet", tmp_path)


# --- Ranking -------------------------------------------------------------------------------------------


def questions_of(n_candidates: int, n: int = 1) -> list[Question]:
    return [Question(f"q{i}", [f"t{j}" for j in range(n_candidates)], 0) for i in range(n)]


def test_a_positive_at_the_third_place_counts_a_third():
    questions = questions_of(12)
    scores = [np.array([5.0, 9.0, 7.0, *range(-9, 0)])]
    figures = measure(questions, iter([("tuned", scores)]), CONFIG)
    assert figures["tuned"]["recall_at_1"]["mean"] == 0
    assert figures["tuned"]["recall_at_10"]["mean"] == 1
    assert figures["tuned"]["mrr"]["mean"] == pytest.approx(1 / 3, abs=1e-6)


def test_the_twelfth_place_is_not_among_ten_but_counts_in_mrr():
    figures = measure(questions_of(12), iter([("tuned", [np.arange(12.0)])]), CONFIG)
    assert figures["tuned"]["recall_at_10"]["mean"] == 0
    assert figures["tuned"]["mrr"]["mean"] == pytest.approx(1 / 12, abs=1e-6)


def test_candidates_scored_alike_share_their_ranks():
    at = placed(questions_of(4), [np.array([1.0, 1.0, 2.0, 1.0])])
    assert (at.higher.tolist(), at.tied.tolist()) == ([1], [2])  # ranks 2, 3 or 4
    figures = measure(questions_of(4), iter([("tuned", [np.zeros(4)])]), CONFIG)
    assert figures["tuned"]["recall_at_1"]["mean"] == 0.25
    assert figures["tuned"]["mrr"]["mean"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4, abs=1e-6)


def test_the_lead_is_paired_by_query():
    questions = questions_of(2, n=20)
    right, wrong = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    tuned = [right if i % 2 else wrong for i in range(20)]
    figures = measure(questions, iter([("tuned", tuned), ("bm25", [wrong] * 20)]), CONFIG)
    assert figures["tuned_minus_bm25"]["recall_at_1"]["mean"] == 0.5
    same = measure(questions, iter([("tuned", tuned), ("bm25", tuned)]), CONFIG)
    # both vary from query to query, their difference never does
    assert same["tuned_minus_bm25"]["recall_at_1"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert same["tuned"]["recall_at_1"]["high"] > 0.5


def test_rows_of_one_query_come_and_go_together():
    one_query = [Question("q", ["a", "b"], 0)] * 10
    figures = measure(one_query, iter([("tuned", [np.array([1.0, 0.0])] * 10)]), CONFIG)
    assert (figures["n_rows"], figures["n_queries"]) == (10, 1)
    # one query alone gives no interval: nothing is ruled out
    assert (figures["tuned"]["recall_at_1"]["low"], figures["tuned"]["recall_at_1"]["high"]) == (0.0, 1.0)


def test_bm25_ranks_by_words_and_a_rare_word_counts_more():
    questions = [
        Question("red fox", ["red hen", "a fox", "an owl"], 1),
        Question("owl", ["red owl", "red"], 0),
    ]
    texts = ["red hen", "a fox", "an owl", "red owl", "red"]
    first, second = bm25_scores(questions, texts)
    assert first[1] > first[0] > first[2] == 0  # red stands in three candidates of the file, fox in one
    assert second[0] > second[1] == 0


def test_a_text_given_twice_is_encoded_once_and_scored_alike():
    asked = []

    def documents(texts):
        asked.extend(texts)
        return np.random.default_rng(7).normal(size=(len(texts), 384)).astype(np.float32)

    question = Question("q", ["a", "b", "a", "c", "a"], 0)
    (scores,) = dense_scores([question], ["a", "b", "c"], lambda texts: documents(["q"]), documents)
    assert scores[0] == scores[2] == scores[4]
    assert asked == ["a", "b", "c", "q"]


# --- The untuned model's prefixes ------------------------------------------------------------------------


def make_model(path) -> Model:
    with writing(Model, path, config={}, inputs=[]) as draft:
        (draft.folder / "config.json").write_text("{}")
        draft.facts |= {
            "base_model": "base", "revision": None, "max_seq_length": None, "trained": True,
            "prompts": {"query": "query: ", "document": "passage: "},
        }  # fmt: skip
    return Model.open(path)


def test_the_untuned_model_has_the_prefixes_that_were_better_on_dev_pairs(tmp_path):
    model = make_model(tmp_path / "model")
    assert candidates_.untuned_prompts(tmp_path, model) is None  # stage encode has not run
    better = {"query": "", "document": ""}
    with writing(Embeddings, tmp_path / "embeddings", config={}, inputs=[model]) as draft:
        draft.facts["untuned_prompts"] = better
    assert candidates_.untuned_prompts(tmp_path, model) == better
    (tmp_path / "other").mkdir()
    with writing(Model, tmp_path / "other" / "model", config={"other": 1}, inputs=[]):
        pass
    assert candidates_.untuned_prompts(tmp_path, Model.open(tmp_path / "other" / "model")) is None


@pytest.mark.parametrize("prompts", [None, {"query": "", "document": ""}])
def test_the_tuned_models_prefixes_are_not_the_untuned_ones(tmp_path, monkeypatch, prompts):
    opened = []

    class Encoder:
        @classmethod
        def open(cls, *given, **_):
            opened.append(given)
            return cls()

        def queries(self, texts):
            return np.ones((len(texts), 2), np.float32)

        documents = queries

    monkeypatch.setattr("pipeline.encoder.Encoder", Encoder)
    ranked = candidates_.systems(make_model(tmp_path / "model"), EncodeConfig(), questions_of(2), prompts)
    assert [name for name, _ in ranked] == ["tuned", "untuned", "bm25"]
    _, untuned = opened
    assert (untuned[0], untuned[-1]) == ("base", prompts)


def test_nothing_is_taken_from_a_stage():
    found = imports(Path(str(candidates_.__file__)))
    assert not found & {f"pipeline.{stage}" for stage in STAGES}


# --- The command ---------------------------------------------------------------------------------------


@pytest.fixture
def work(tmp_path, tiny_model):
    import shutil

    make_pairs(tmp_path / "work" / "pairs")
    with writing(Model, tmp_path / "work" / "model", config={}, inputs=[]) as draft:
        shutil.copytree(tiny_model, draft.folder, dirs_exist_ok=True)
        draft.facts |= {
            "dim": 32, "base_model": str(tiny_model), "revision": None, "max_seq_length": None,
            "prompts": {"query": "", "document": ""}, "trained": True,
        }  # fmt: skip
    return tmp_path / "work"


@pytest.mark.slow
def test_the_command_prints_a_line_a_system_and_stores_the_figures(work, tmp_path, capsys):
    rows = [
        {"query": "wave", "candidates": ["wave", "oven", "moon"], "positive": "wave"},
        {"query": "oven", "candidates": ["tide", "oven", "moon"], "positive": 1},
    ]
    file = write_jsonl(tmp_path / "q.jsonl", rows)
    config = tmp_path / "c.yaml"
    config.write_text(
        "documents: {paths: [none.jsonl]}\nencode: {dim: 32, device: cpu, precision: float32}\n"
        "evaluate: {n_draws: 100}\n"
    )
    before = sorted(path for path in work.rglob("*") if path.is_file())
    arguments = ["evaluate", "--config", str(config), "--work", str(work), "--candidates", str(file)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "2 rows, 2 different queries, 3 candidates" in said
    for words in ("Tuned model", "Untuned model", "BM25", "tuned minus untuned", "tuned minus bm25"):
        assert words in said
    figures = json.loads((work / "candidates.json").read_text())
    # a text is nearest to itself, whatever the weights, and shares its word with itself alone
    for system in ("tuned", "untuned", "bm25"):
        assert figures[system]["recall_at_1"]["mean"] == 1.0
    assert figures["tuned_minus_untuned"]["mrr"]["mean"] == 0.0
    assert figures["description"] == "made readers"
    written = sorted(path for path in work.rglob("*") if path.is_file() and path.name != ".lock")
    assert set(written) - set(before) == {work / "candidates.json"}


def test_without_a_model_the_stage_to_run_is_named(tmp_path):
    file = write_jsonl(tmp_path / "q.jsonl", [ROW])
    config = Config(documents=DocumentsConfig(paths=("none",)), encode=EncodeConfig(dim=32))
    with pytest.raises(Exception, match="run stage train first"):
        candidates_.run(config, tmp_path, file)
