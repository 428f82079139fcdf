"""Command `evaluate --candidates FILE`: how high each query's right candidate stands among those given.

FILE has a row a query, JSON Lines or Parquet: `query` str, `candidates` list of texts or of document_ids,
`positive` the right one: its number in the list from 0, or itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.accuracy import Placed
from pipeline.artifacts import Embeddings, Model, Pairs, belong_together, write_json
from pipeline.bm25 import Bm25
from pipeline.bootstrap import bootstrap, estimate
from pipeline.config import Config, EncodeConfig, EvaluateConfig
from pipeline.errors import ArtifactError, InputError

OUT = "candidates.json"
COLUMNS = ("query", "candidates", "positive")
TITLES = {"tuned": "Tuned model", "untuned": "Untuned model", "bm25": "BM25"}
WANTED = "JSON Lines or Parquet"
MEASURES = {"recall_at_1": "R@1", "recall_at_10": "R@10", "mrr": "MRR"}
QUERIES_AT_ONCE = 256  # of BM25: a block of their scores is sparse, but of all distinct candidates

Encode = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Question:
    """A query, the texts to choose from, and the place of the right one."""

    query: str
    candidates: Sequence[str]
    positive: int


def run(config: Config, work: Path, file: Path) -> dict[str, Any]:
    """Measure, print the table and write WORK/candidates.json.

    Returns:
        The figures: n_rows, n_queries, n_candidates ({least, median, most}); tuned, untuned, bm25:
        {recall_at_1, recall_at_10, mrr}; tuned_minus_untuned and tuned_minus_bm25: the same. All are
        estimates: a bootstrap over different queries, paired. untuned_prompts: what stood before the untuned
        model's queries and documents, null for its folder's own.

    Raises:
        InputError: a row cannot be used; its line is named.
        ArtifactError: the train stage is not complete, or with document_ids the pairs stage.
    """
    model = Model.open(work / "model")
    questions = read(file, work / "pairs")
    prompts = untuned_prompts(work, model)
    if prompts is None and any((model.facts.get("prompts") or {}).values()):
        print(
            "evaluate: the untuned model has its own folder's prefixes: run encode to choose", file=sys.stderr
        )
    figures = measure(questions, systems(model, config.encode, questions, prompts), config.evaluate)
    figures["untuned_prompts"] = prompts
    write_json(work / OUT, {"description": _description(work / "pairs"), **figures})
    print(table(figures))
    print(f"evaluate: {OUT}: {work / OUT}", file=sys.stderr)
    return figures


# --- Reading -------------------------------------------------------------------------------------------


def read(file: Path, pairs: Path) -> list[Question]:
    """The questions of a file; candidates that are document_ids of `pairs` become those documents' texts.

    Raises:
        InputError: names the line (JSON Lines) or row (Parquet) that cannot be used.
        ArtifactError: the pairs' manifest is there and damaged.
    """
    rows = list(_rows(file))
    if not rows:
        raise InputError(f"{file}: no rows; wanted one a query, with {', '.join(COLUMNS)}")
    questions = [_checked(where, row) for where, row in rows]
    text_of = _texts({candidate for one in questions for candidate in one.candidates}, pairs)
    if not text_of:
        return questions
    _refuse_mixed([where for where, _ in rows], questions, text_of)
    return [_with_texts(one, text_of) for one in questions]


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, the row) for each row of the file."""
    if file.is_dir():
        raise InputError(f"{file} is a folder, wanted a file: {WANTED}")
    if not file.exists():
        raise InputError(f"{file}: no such file")
    try:
        if file.suffix in (".parquet", ".pq"):
            table = pq.read_table(file)
            missing = [name for name in COLUMNS if name not in table.column_names]
            if missing:
                raise InputError(f"{file}: has no column {', '.join(missing)}; wanted {', '.join(COLUMNS)}")
            lines: list[Any] = table.select(COLUMNS).to_pylist()
            yield from ((f"{file}: row {number}", row) for number, row in enumerate(lines, 1))
            return
        with pa.input_stream(str(file), compression="detect") as opened:  # by the ending: .gz, .zst, .bz2
            text = opened.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8: {error}; wanted {WANTED}") from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{file}: line {number}", _parsed(f"{file}: line {number}", line)


def _parsed(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos + 1}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or as many brackets
        reason = str(error)
    raise InputError(f"{where}: not JSON that can be read: {reason}; wanted {WANTED}")


def _checked(where: str, row: Any) -> Question:
    if not isinstance(row, dict):
        raise InputError(f"{where}: got {_shown(row)}, wanted an object with {', '.join(COLUMNS)}")
    query, candidates, positive = (row.get(name) for name in COLUMNS)
    if not isinstance(query, str) or not query.strip():
        raise InputError(f"{where}: query is {_shown(query)}, wanted a text")
    if not isinstance(candidates, list) or len(candidates) < 2:
        raise InputError(f"{where}: candidates is {_shown(candidates)}, wanted a list of two or more")
    for candidate in candidates:
        if not isinstance(candidate, str) or not candidate.strip():
            raise InputError(f"{where}: a candidate is {_shown(candidate)}, wanted a text or document_id")
    for text in (query, *candidates):
        if not _is_unicode(text):
            raise InputError(
                f"{where}: {_shown(text)} holds half a character (a lone surrogate), wanted Unicode; "
                "correct the row"
            )
    return Question(query, candidates, _place(where, candidates, positive))


def _place(where: str, candidates: Sequence[str], positive: Any) -> int:
    """Where the positive stands in the list."""
    if isinstance(positive, str):
        if positive in candidates:
            return candidates.index(positive)
        raise InputError(f"{where}: positive {_shown(positive)} is none of its {len(candidates)} candidates")
    if isinstance(positive, int) and not isinstance(positive, bool):
        if 0 <= positive < len(candidates):
            return positive
        raise InputError(
            f"{where}: positive is {_shown(positive)}, but there are {len(candidates)} candidates; "
            f"choose 0 to {len(candidates) - 1}"
        )
    raise InputError(f"{where}: positive is {_shown(positive)}, wanted a candidate or its number from 0")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _texts(wanted: set[str], pairs: Path) -> dict[str, str]:
    """Texts of those that are document_ids; none without a pairs folder."""
    if not pairs.exists():
        return {}
    documents = Pairs.open(pairs).read("documents", ["document_id", "text"])
    if not len(documents):
        return {}
    found = documents.filter(pc.is_in(documents["document_id"], pa.array(sorted(wanted), pa.string())))
    return dict(zip(found["document_id"].to_pylist(), found["text"].to_pylist(), strict=True))


def _refuse_mixed(wheres: Sequence[str], questions: Sequence[Question], text_of: Mapping[str, str]) -> None:
    """A file's candidates are all document_ids or all texts: else a misspelt id would be taken for a text.

    Args:
        text_of: of those that are document_ids, at least one.
    """
    rows = zip(wheres, questions, strict=True)
    named = [(where, candidate) for where, question in rows for candidate in question.candidates]
    known_at, known = next(pair for pair in named if pair[1] in text_of)
    for where, candidate in named:
        if candidate not in text_of:
            also = "" if known_at == where else f" ({known_at.rpartition(': ')[2]})"
            raise InputError(
                f"{where}: candidate {_shown(candidate)} is no document_id of the pairs, but "
                f"{_shown(known)}{also} is one; give document_ids everywhere, or texts"
            )


def _with_texts(question: Question, text_of: Mapping[str, str]) -> Question:
    return Question(question.query, [text_of[one] for one in question.candidates], question.positive)


def _shown(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 60 else f"{said[:59]}…"


def _description(pairs: Path) -> str:
    return Pairs.open(pairs).facts.get("description") or "" if pairs.exists() else ""


# --- Ranking -------------------------------------------------------------------------------------------


def untuned_prompts(work: Path, model: Model) -> dict[str, str] | None:
    """With which prefixes stage encode found the untuned model better on dev pairs; None where it has not run
    on this model: then the untuned model is asked as its own folder has it.
    """
    try:
        embeddings = Embeddings.open(work / "embeddings")
        belong_together(embeddings, model)
    except ArtifactError:
        return None
    return embeddings.facts.get("untuned_prompts")


def systems(
    model: Model,
    config: EncodeConfig,
    questions: Sequence[Question],
    untuned_prompts: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Each system and its scores of each question's candidates, float (n_candidates,), higher is better.

    One encoder is in memory at a time.

    Args:
        untuned_prompts: what stands before the untuned model's texts; None for its folder's own.
    """
    from pipeline.encoder import Encoder

    texts = list(dict.fromkeys(text for one in questions for text in one.candidates))
    encoder = Encoder.open(model.path, config.device, batch_size=config.batch_size)
    tuned = dense_scores(questions, texts, encoder.queries, encoder.documents)
    yield "tuned", tuned
    if model.facts["trained"]:
        facts = model.facts
        encoder = Encoder.open(
            facts["base_model"], config.device, "float32", facts["max_seq_length"], config.batch_size,
            facts.get("commit") or facts["revision"], untuned_prompts,
        )  # fmt: skip
        yield "untuned", dense_scores(questions, texts, encoder.queries, encoder.documents)
    else:  # the same weights
        yield "untuned", tuned
    yield "bm25", bm25_scores(questions, texts)


def dense_scores(
    questions: Sequence[Question], texts: Sequence[str], queries: Encode, documents: Encode
) -> list[np.ndarray]:
    """Dot products; each different text is encoded once.

    Args:
        texts: the different candidates.
    """
    column = {text: number for number, text in enumerate(texts)}
    rows = documents(texts)
    asked = list(dict.fromkeys(one.query for one in questions))
    vectors = dict(zip(asked, queries(asked), strict=True))
    found = []
    for one in questions:
        # A text given twice is scored once: a product's last bit can depend on where its row stands.
        columns, place = np.unique([column[text] for text in one.candidates], return_inverse=True)
        found.append((rows[columns] @ vectors[one.query])[place])
    return found


def bm25_scores(questions: Sequence[Question], texts: Sequence[str]) -> list[np.ndarray]:
    """BM25 of each question's candidates; how rare a word is, all candidates of the file tell."""
    index = Bm25.of(texts)
    column = {text: number for number, text in enumerate(texts)}
    found = []
    for start in range(0, len(questions), QUERIES_AT_ONCE):
        block = questions[start : start + QUERIES_AT_ONCE]
        scores = (index.counts([one.query for one in block]) @ index.scores).tocsr()
        for row, one in enumerate(block):
            line = scores[[row]].toarray()[0]
            found.append(line[[column[text] for text in one.candidates]])
    return found


def placed(questions: Sequence[Question], scores: Sequence[np.ndarray]) -> Placed:
    """Where a system puts each positive; what is scored alike shares its ranks."""
    reached = [of[one.positive] for one, of in zip(questions, scores, strict=True)]
    higher = [int((of > at).sum()) for of, at in zip(scores, reached, strict=True)]
    tied = [int((of == at).sum()) - 1 for of, at in zip(scores, reached, strict=True)]
    return Placed(np.array(higher, np.int64), np.array(tied, np.int64))


def measure(
    questions: Sequence[Question],
    ranked: Iterator[tuple[str, list[np.ndarray]]],
    config: EvaluateConfig,
) -> dict[str, Any]:
    """The figures as in `run`, of the systems in their order."""
    sizes = [len(one.candidates) for one in questions]
    gains = {"recall_at_1": np.ones(1), "recall_at_10": np.ones(10), "mrr": 1 / np.arange(1, max(sizes) + 1)}
    counted = {}
    for name, scores in ranked:
        at = placed(questions, scores)
        counted[name] = np.stack([at.expected(gains[measure]) for measure in MEASURES], axis=1)
    for other in [name for name in counted if name != "tuned"]:
        counted[f"tuned_minus_{other}"] = counted["tuned"] - counted[other]
    clusters = np.unique([one.query for one in questions], return_inverse=True)[1]
    mean, low, high = bootstrap(
        np.concatenate([*counted.values()], axis=1), clusters, config.n_draws, config.seed
    )
    figures: dict[str, Any] = {
        "n_rows": len(questions),
        "n_queries": int(clusters.max()) + 1,
        "n_candidates": {"least": min(sizes), "median": float(np.median(sizes)), "most": max(sizes)},
    }
    for start, name in zip(range(0, len(mean), len(MEASURES)), counted, strict=True):
        lowest = -1.0 if "_minus_" in name else 0.0
        figures[name] = {
            measure: estimate(mean[column], low[column], high[column], lowest)
            for column, measure in enumerate(MEASURES, start)
        }
    return figures


# --- The table -----------------------------------------------------------------------------------------


def table(figures: Mapping[str, Any]) -> str:
    """A line a system and a line a difference, under what was asked."""
    from tabulate import tabulate

    sizes = figures["n_candidates"]
    among = f"{sizes['least']}" if sizes["least"] == sizes["most"] else f"{sizes['least']} to {sizes['most']}"
    heading = f"{figures['n_rows']:,} rows, {figures['n_queries']:,} different queries, {among} candidates"
    names = [*TITLES, *(name for name in figures if name.startswith("tuned_minus_"))]
    lines = [[_title(name), *(_cell(name, figures[name][measure]) for measure in MEASURES)] for name in names]
    headers = ["among given candidates", *(f"{title} (95 %)" for title in MEASURES.values())]
    align = ("left", *["right"] * len(MEASURES))
    return f"{heading}\n{tabulate(lines, headers, disable_numparse=True, colalign=align)}"


def _title(name: str) -> str:
    return TITLES.get(name) or name.replace("_", " ")


def _cell(name: str, at: Mapping[str, float]) -> str:
    form = "{:+.3f}" if "_minus_" in name else "{:.3f}"
    mean, low, high = (form.format(at[part]) for part in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"
