"""Stage `train`: pairs -> model/, a Sentence Transformers folder, by the library's own trainer.

A killed training goes on from its last checkpoint; the best evaluation's weights are kept. Under torchrun the
first process holds the work folder and writes; the others take their part of every batch.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import encoder, learning_curve, nli_sts, processes
from pipeline.artifacts import Draft, Model, Pairs, sha256, write_json, writing
from pipeline.config import TrainConfig, as_dict
from pipeline.errors import ConfigError
from pipeline.selection import RETRIEVAL, SIMILARITIES, SIMILARITY, RetrievalEvaluator, evaluators_of
from pipeline.trainer import batch_size_of, fine_tune, is_on_cpu
from pipeline.training_data import SENTENCES, characters_read, datasets_of, loss_name

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CHECKPOINTS = "checkpoints"


def inputs_of(config: TrainConfig, pairs: Pairs) -> list[Any]:
    """The pairs, the weights that are tuned, and of gist the guide's, and the files of `nli` and `sts`.

    Other content under the same name is another input.

    Raises:
        InputError: no such model, or no such file.
    """
    given = [{"path": config.model, "digest": encoder.digest(config.model, config.revision)}]
    if config.loss == "gist" and config.guide:
        given.append({"path": config.guide, "digest": encoder.digest(config.guide)})
    for path in (*config.nli, *config.sts):
        nli_sts.check_file(path)
        given.append({"path": path, "digest": sha256(Path(path))})
    return [pairs, *given]


def run(config: TrainConfig, pairs: Pairs, out: Path, dim: int) -> Model:
    """Fine-tune, or without pairs (or with `epochs` 0) keep the weights as they are.

    Args:
        dim: the width of a vector that the later stages expect.

    Raises:
        ConfigError: the model's vectors have another width; torchrun's processes cannot share a batch.
        InputError: the model cannot be loaded.
        PipelineError: the loss is not a number.
    """
    model, commit = load(config, dim), commit_of(config)
    n_characters = characters_read(model.max_seq_length)
    tables = datasets_of(config, pairs, n_characters) if config.epochs > 0 else {}
    trim = trimmed(config, model, pairs, tables)
    if tables:
        batch_size_of(config, tables)  # what it refuses is said before the processes wait for each other
    elif processes.is_first():
        why = "no pairs to train on" if config.epochs > 0 else "train.epochs is 0"
        print(f"train: {why}: the weights stay as they are", file=sys.stderr)
    processes.meet(is_on_cpu(config))
    with _writing(config, pairs, out) as draft:
        scratch = draft.folder / CHECKPOINTS
        judges = evaluators_of(config, pairs, n_characters) if tables else None
        if config.learning_curve and judges is None and processes.is_first():
            why = "nothing held out for dev to judge by" if tables else "nothing is trained"
            print(f"train: train.learning_curve is left out: {why}", file=sys.stderr)
        curve = fine_tune(model, config, tables, judges[1] if judges else None, scratch) if tables else []
        draft.rows["pairs"] = sum(count_pairs(config, tables).values())
        draft.facts |= _facts(config, model, pairs, tables, curve) | {"commit": commit, "trim": trim}
        if processes.is_first():
            _save(model, draft, curve, pairs.facts.get("description") or "", config)
        if judges and config.learning_curve:
            _learning_curve(config, pairs, model, tables, judges, curve, draft.folder)
    return Model.open(out)


def load(config: TrainConfig, dim: int) -> SentenceTransformer:
    """The model before training, with its whole vocabulary.

    Raises:
        ConfigError: its vectors have another width.
        InputError: it cannot be loaded.
    """
    model = encoder.load(
        config.model,
        revision=config.revision,
        device=config.device,
        max_seq_length=config.max_seq_length,
        prompts=prompts_of(config),
        separate_encoders=config.separate_encoders,
    )
    width = model.get_embedding_dimension()
    if width != dim:
        raise ConfigError(
            f"train.model {config.model} gives vectors of {width} numbers, but encode.dim is {dim}; "
            "choose another model or set encode.dim"
        )
    model.similarity_fn_name = SIMILARITIES[config.main_similarity]
    return model


def commit_of(config: TrainConfig) -> str | None:
    """The commit of a hub's model that `revision`, or its main branch, names today; None of files given here.

    The hub moves on, and what is compared with the tuned model later must be what was tuned.
    """
    folder = encoder.locate(config.model, config.revision)  # of a hub's model a folder of its cache
    is_of_hub = folder.parent.name == "snapshots" and not Path(config.model).is_dir()
    return folder.name if is_of_hub else None


def trimmed(
    config: TrainConfig, model: SentenceTransformer, pairs: Pairs, tables: Mapping[str, pa.Table]
) -> dict[str, int] | None:
    """Do in place what `trim_vocabulary` asks for, and say what it left out; None where it does not.

    Texts of another kind than those trained on, such as an STS test set, lose words too: they are then spelt
    in smaller pieces.

    Raises:
        InputError: the tokenizer cannot be trimmed.
    """
    if not config.trim_vocabulary:
        return None
    from pipeline import vocabulary

    return vocabulary.trim(model, _texts_of(pairs, tables))


def prompts_of(config: TrainConfig) -> dict[str, str]:
    """The prefixes that the config sets, under Sentence Transformers' names."""
    given = {"query": config.query_prefix, "document": config.document_prefix}
    return {kind: prefix for kind, prefix in given.items() if prefix is not None}


def count_pairs(config: TrainConfig, tables: Mapping[str, pa.Table]) -> dict[str, int]:
    """Pairs of each data set; contrastive reads each of them twice, with its positive and its negative."""
    return {
        name: len(table) // (1 + (loss_name(config, name) == "contrastive")) for name, table in tables.items()
    }


@contextmanager
def _writing(config: TrainConfig, pairs: Pairs, out: Path) -> Iterator[Draft]:
    """The artefact being written by the first process; the others get a draft of which nothing is kept."""
    if processes.is_first():
        given = as_dict(config), inputs_of(config, pairs)
        with writing(Model, out, config=given[0], inputs=given[1], scratch=[CHECKPOINTS]) as draft:
            processes.from_first(draft.folder)
            yield draft
    else:
        yield Draft(processes.from_first(Path()))
    processes.from_first(None)  # the others wait until it is written
    processes.part()


def _facts(
    config: TrainConfig,
    model: SentenceTransformer,
    pairs: Pairs,
    tables: Mapping[str, pa.Table],
    curve: list[dict[str, float]],
) -> dict[str, Any]:
    similarity = [point[SIMILARITY] for point in curve if SIMILARITY in point]
    return {
        "dim": model.get_embedding_dimension(),
        "base_model": config.model,
        "revision": config.revision,
        "max_seq_length": config.max_seq_length,
        "prompts": {kind: model.prompts.get(kind) or "" for kind in ("query", "document")},
        "trained": bool(tables),
        "trained_until": pairs.facts.get("dev_start") if tables else None,
        "loss": config.loss,
        "sources": _sources(config, pairs, tables),
        "best_by": config.best_by,
        "separate_encoders": config.separate_encoders,
        "main_similarity": config.main_similarity,
        "similarity_before": similarity[0] if similarity else None,
        "similarity_after": similarity[-1] if similarity else None,
    }


def _sources(config: TrainConfig, pairs: Pairs, tables: Mapping[str, pa.Table]) -> dict[str, int]:
    """{source: pairs trained on}; of several in one sample, which takes all alike, each one's share."""
    counts = count_pairs(config, tables)
    if config.mix or not counts:
        return counts
    found = {
        row["values"]: row["counts"]
        for row in pc.value_counts(pairs.read("pairs", ["source"])["source"]).to_pylist()
    }
    share = sum(counts.values()) / sum(found.values())
    return {name: round(found[name] * share) for name in sorted(found, key=lambda name: -found[name])}


def _texts_of(pairs: Pairs, tables: Mapping[str, pa.Table]) -> Iterator[str]:
    """Every document, every pair's anchor, and the sentences of `nli` and `sts`, once or more."""
    for name, column in (("documents", "text"), ("pairs", "anchor")):
        for part in pairs.tables(name):
            texts = pq.read_table(part, columns=[column], read_dictionary=[column])[column]
            for chunk in texts.chunks:
                yield from (text.as_py() for text in chunk.dictionary)
    for column in (column for name in SENTENCES if name in tables for column in tables[name].columns):
        if pa.types.is_large_string(column.type):
            yield from (text.as_py() for text in pc.unique(column))


def _save(
    model: SentenceTransformer,
    draft: Draft,
    curve: list[dict[str, float]],
    description: str,
    config: TrainConfig,
) -> None:
    """The model, its training curve and its card."""
    from pipeline import model_card

    model.save_pretrained(str(draft.folder), create_model_card=False)
    lines = "".join(json.dumps(point) + "\n" for point in curve)
    (draft.folder / "training.jsonl").write_text(lines, encoding="utf-8")
    judged = [{k: point[k] for k in (RETRIEVAL, SIMILARITY)} for point in curve if RETRIEVAL in point]
    named = ("scale", "epochs", "batch_size", "learning_rate")
    model_card.write(
        draft.folder,
        draft.facts
        | {name: getattr(config, name) for name in named}
        | {"description": description, "n_pairs": draft.rows["pairs"], "languages": None}
        | {"dev": {"before": judged[0], "after": judged[-1]} if judged else {}},
    )


def _learning_curve(
    config: TrainConfig,
    pairs: Pairs,
    tuned: SentenceTransformer,
    tables: Mapping[str, pa.Table],
    judges: tuple[RetrievalEvaluator, Any],
    curve: list[dict[str, float]],
    folder: Path,
) -> None:
    """Write learning_curve.json. Its sizes count pairs alone; sentence pairs of a mix come on top by share.

    Args:
        tuned, tables, curve: the model that was trained, on what, and how it went.
        judges: as `selection.evaluators_of` gives them.
    """
    retrieval, judge = judges
    n_pairs = sum(n for name, n in count_pairs(config, tables).items() if name not in SENTENCES)
    share = sum(share for name, share in config.mix.items() if name not in SENTENCES) or 1
    if not n_pairs:
        if processes.is_first():
            print("train: no learning curve: train.mix has no pairs, only sentences", file=sys.stderr)
        return

    def train(size: int, checkpoints: Path) -> float:
        # the training of all pairs has left one checkpoint on the disk
        n_kept = max(1, config.keep_checkpoints - 1)
        fewer = dataclasses.replace(config, max_pairs=max(1, round(size / share)), keep_checkpoints=n_kept)
        model = load(fewer, tuned.get_embedding_dimension() or 0)
        trimmed(fewer, model, pairs, tables)  # to the same words
        n_characters = characters_read(model.max_seq_length)
        curve = fine_tune(model, fewer, datasets_of(fewer, pairs, n_characters), judge, checkpoints)
        return accuracy(curve, -1)

    def accuracy(curve: list[dict[str, float]], at: int) -> float:
        return curve[at].get(RETRIEVAL, 0.0)  # the first process alone knows it

    ends = {0: accuracy(curve, 0), n_pairs: accuracy(curve, -1)}
    found = learning_curve.run(config.learning_curve, ends, train, retrieval.bm25, folder / CHECKPOINTS)
    counts = {"n_dev_pairs": len(retrieval.anchors), "n_pool": len(retrieval.pool)}
    if processes.is_first():
        write_json(folder / learning_curve.FILE, counts | found)
