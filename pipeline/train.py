"""Stage `train`: pairs -> model/, a Sentence Transformers folder, by the library's own trainer.

A killed training goes on from its last checkpoint; the best evaluation's weights are kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import encoder
from pipeline.artifacts import Model, Pairs, writing
from pipeline.config import TrainConfig, as_dict
from pipeline.errors import ConfigError, PipelineError

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

CHECKPOINTS = "checkpoints"
POOL_SIZE = 1000  # documents that a dev pair's positive is looked for among, beside the positives
WINDOW = 32  # batches whose rows are sorted by length together
LOG_STEPS = 10  # steps between two points of the loss curve
# Our names of similarities, and Sentence Transformers'.
SIMILARITIES: dict[str, Any] = {
    "dot_product": "dot",
    "cosine": "cosine",
    "euclidean": "euclidean",
    "manhattan": "manhattan",
}
RETRIEVAL = "accuracy_at_20"
CURVE = {"loss": "loss", "eval_accuracy_at_20": RETRIEVAL, "eval_spearman_dot": "spearman_dot"}


def inputs_of(config: TrainConfig, pairs: Pairs) -> list[Any]:
    """The pairs, and the weights that are tuned: other weights under the same name are another input.

    Raises:
        InputError: no such model.
    """
    weights = {"path": config.model, "digest": encoder.digest(config.model, config.revision)}
    return [pairs, weights]


def run(config: TrainConfig, pairs: Pairs, out: Path, dim: int) -> Model:
    """Fine-tune, or without pairs (or with `epochs` 0) keep the weights as they are.

    Args:
        dim: the width of a vector that the later stages expect.

    Raises:
        ConfigError: the model's vectors have another width.
        InputError: the model cannot be loaded.
        PipelineError: the loss is not a number.
    """
    model = encoder.load(
        config.model,
        revision=config.revision,
        device=config.device,
        max_seq_length=config.max_seq_length,
        prompts=prompts_of(config),
    )
    width = model.get_embedding_dimension()
    if width != dim:
        raise ConfigError(
            f"train.model {config.model} gives vectors of {width} numbers, but encode.dim is {dim}; "
            "choose another model or set encode.dim"
        )
    model.similarity_fn_name = SIMILARITIES[config.main_similarity]
    model.model_card_data.generate_widget_examples = False  # readers' texts in a model card: no
    inputs = inputs_of(config, pairs)
    trained = config.epochs > 0 and pairs.rows.get("pairs", 0) > 0
    with writing(Model, out, config=as_dict(config), inputs=inputs, scratch=[CHECKPOINTS]) as draft:
        curve = fine_tune(model, config, pairs, draft.folder / CHECKPOINTS) if trained else []
        model.save_pretrained(str(draft.folder), create_model_card=False)
        lines = "".join(json.dumps(point) + "\n" for point in curve)
        (draft.folder / "training.jsonl").write_text(lines, encoding="utf-8")
        similarity = [point["spearman_dot"] for point in curve if "spearman_dot" in point]
        draft.rows["pairs"] = min(pairs.rows.get("pairs", 0), config.max_pairs or sys.maxsize) * trained
        draft.facts |= {
            "dim": width,
            "base_model": config.model,
            "revision": config.revision,
            "max_seq_length": config.max_seq_length,
            "prompts": {kind: model.prompts.get(kind) or "" for kind in ("query", "document")},
            "trained": trained,
            "main_similarity": config.main_similarity,
            "similarity_before": similarity[0] if similarity else None,
            "similarity_after": similarity[-1] if similarity else None,
        }
        if not trained:
            print("train: no pairs to train on: the weights stay as they are", file=sys.stderr)
    return Model.open(out)


def prompts_of(config: TrainConfig) -> dict[str, str]:
    """The prefixes that the config sets, under Sentence Transformers' names."""
    given = {"query": config.query_prefix, "document": config.document_prefix}
    return {kind: prefix for kind, prefix in given.items() if prefix is not None}


def fine_tune(
    model: SentenceTransformer, config: TrainConfig, pairs: Pairs, checkpoints: Path
) -> list[dict[str, float]]:
    """Train `model` in place; the best evaluation's weights stay in it.

    Args:
        checkpoints: where the trainer saves, and goes on from when there is one.

    Returns:
        The training curve: points of step, epoch and any of loss, accuracy_at_20, spearman_dot; the
        first is the model before training, the last the one kept.
    """
    from datasets import Dataset
    from transformers import EarlyStoppingCallback
    from transformers.trainer_callback import ProgressCallback

    table = _sample(pairs.read("pairs", ["anchor", "positive", "negative"]), config.max_pairs, config.seed)
    columns = columns_for(config.loss, table)
    evaluators = evaluators_of(config, pairs, model.prompts)
    trainer = _length_grouping_trainer(columns)(
        model=model,
        args=_arguments(config, columns, model.prompts, checkpoints, evaluates=evaluators is not None),
        train_dataset=Dataset(columns),
        loss=loss_of(config, model),
        evaluator=evaluators,
    )
    trainer.remove_callback(ProgressCallback)
    for callback in _progress(), _stop_at_nan():
        trainer.add_callback(callback)
    if evaluators is not None:
        trainer.add_callback(EarlyStoppingCallback(config.early_stopping_patience))
        before = {"step": 0, "epoch": 0.0, **_figures(evaluators(model))}
    last = last_checkpoint(checkpoints)
    if last:
        print(f"train: going on from {last.name}", file=sys.stderr)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    curve = [point for entry in trainer.state.log_history if len(point := _point(entry)) > 2]
    if evaluators is None:
        return curve
    kept = {"step": trainer.state.global_step, "epoch": trainer.state.epoch, **_figures(evaluators(model))}
    return [before, *curve, kept]


def loss_of(config: TrainConfig, model: SentenceTransformer) -> torch.nn.Module:
    """The loss by its name in the config, over dot products of unit rows.

    multiple_negatives: every other text of the batch is a negative too, but for those that are the anchor's
    or the positive's own text again. triplet: dot(anchor, positive) must beat dot(anchor, negative) by
    `margin`. contrastive: positives are drawn together, negatives pushed `margin` apart, in 1 - dot.
    """
    from sentence_transformers.sentence_transformer import losses

    def one_minus_dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 1 - (x * y).sum(dim=-1)

    if config.loss == "multiple_negatives":
        return _ranking_loss(model, config.scale)
    if config.loss == "triplet":
        return losses.TripletLoss(model, distance_metric=one_minus_dot, triplet_margin=config.margin)
    return losses.ContrastiveLoss(model, distance_metric=one_minus_dot, margin=config.margin)


def _ranking_loss(model: SentenceTransformer, scale: float) -> torch.nn.Module:
    """The library's MultipleNegativesRankingLoss, in which a text is never a wrong answer to itself.

    A much read document stands in most batches more than once. Batches without duplicates would leave a third
    of Wikispeedia's pairs out, or be ten times as many: one article in every thirty pairs is the same.
    """
    import torch
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.util import dot_score

    class DistinctRankingLoss(MultipleNegativesRankingLoss):
        def forward(self, sentence_features: Any, labels: torch.Tensor) -> torch.Tensor:
            features = list(sentence_features)
            anchors, positives, *_ = codes = [text_codes(column) for column in features]
            documents = torch.cat(codes[1:])
            same = (documents == anchors[:, None]) | (documents == positives[:, None])
            same[range(len(positives)), range(len(positives))] = False  # the right answer
            self.similarity_fct = lambda a, b: dot_score(a, b).masked_fill(same, -torch.inf)
            return super().forward(features, labels)

    return DistinctRankingLoss(model, scale=scale, similarity_fct=dot_score)


def text_codes(features: dict[str, torch.Tensor]) -> torch.Tensor:
    """A number for each text of a batch, the same for the same tokens whatever the padding, int64 (n,)."""
    import torch

    mask = features["attention_mask"].long()
    place = mask.cumsum(dim=1)  # counted from the text's first token, wherever padding stands
    # powers of an odd number (Knuth's for MMIX), modulo 2^64
    weights = torch.full((int(place.max()) + 1,), 6364136223846793005, device=mask.device).cumprod(dim=0)
    return (features["input_ids"] * weights[place] * mask).sum(dim=1)


def columns_for(loss: str, table: pa.Table) -> pa.Table:
    """The pairs in the form a loss reads: triplets, or for contrastive (text, text, label)."""
    if loss != "contrastive":
        return table
    anchors, n = table["anchor"], len(table)
    return pa.table(
        {
            "sentence1": pa.chunked_array([*anchors.chunks, *anchors.chunks]),
            "sentence2": pa.chunked_array([*table["positive"].chunks, *table["negative"].chunks]),
            "label": np.repeat([1, 0], n),
        }
    )


class RetrievalEvaluator:
    """Share of dev pairs whose positive is among the 20 nearest documents to the anchor.

    The documents are the pairs' positives and up to POOL_SIZE others; the anchor's own is left out.
    """

    primary_metric = RETRIEVAL
    greater_is_better = True

    def __init__(self, dev: pa.Table, documents: pa.Table, batch_size: int) -> None:
        self.batch_size = batch_size
        texts = dict(zip(dev["positive_id"].to_pylist(), dev["positive"].to_pylist(), strict=True))
        for document_id, text in zip(
            *(documents[c].to_pylist() for c in ("document_id", "text")), strict=True
        ):
            texts.setdefault(document_id, text)
        row_of = {document_id: row for row, document_id in enumerate(texts)}
        self.pool = list(texts.values())
        self.anchors = dev["anchor"].to_pylist()
        self.positives = np.array([row_of[i] for i in dev["positive_id"].to_pylist()])
        self.own = np.array([row_of.get(i, -1) for i in dev["anchor_id"].to_pylist()])

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        encoding = encoder.Encoder(model, self.batch_size)
        scores = encoding.queries(self.anchors) @ encoding.documents(self.pool).T
        rows = np.arange(len(scores))
        own = self.own >= 0
        scores[rows[own], self.own[own]] = -np.inf
        n_above = (scores > scores[rows, self.positives][:, None]).sum(axis=1)
        return {RETRIEVAL: float((n_above < 20).mean())}


def evaluators_of(config: TrainConfig, pairs: Pairs, prompts: Mapping[str, str | None]) -> Any | None:
    """Retrieval accuracy first (it chooses the best weights), then similarity; None without dev pairs.

    `EmbeddingSimilarityEvaluator` gets the label 1 for positives and 0 for negatives, and compares by
    `main_similarity`, which is the index's `distance_measure`.
    """
    from sentence_transformers.base.evaluation import SequentialEvaluator
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    if not pairs.rows.get("dev"):
        return None
    dev = _sample(pairs.read("dev"), config.n_dev_pairs, config.seed)
    documents = _sample(pairs.read("documents", ["document_id", "text"]), POOL_SIZE, config.seed)
    anchors, positives, negatives = (
        [(prompts.get(kind) or "") + text for text in dev[name].to_pylist()]
        for name, kind in (("anchor", "query"), ("positive", "document"), ("negative", "document"))
    )
    similarity = EmbeddingSimilarityEvaluator(
        anchors + anchors,
        positives + negatives,
        [1.0] * len(dev) + [0.0] * len(dev),
        batch_size=config.batch_size,
        main_similarity=SIMILARITIES[config.main_similarity],
        similarity_fn_names=[SIMILARITIES[config.main_similarity]],
        write_csv=False,
    )
    retrieval: Any = RetrievalEvaluator(dev, documents, config.batch_size)
    return SequentialEvaluator([retrieval, similarity], main_score_function=lambda scores: scores[0])


def last_checkpoint(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint; a kill can leave one half-written."""
    # The trainer writes trainer_state.json last.
    complete = [path.parent for path in checkpoints.glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def length_grouped(columns: pa.Table) -> Callable[..., Any]:
    """A batch sampler for the trainer: random batches of rows whose longest texts are of like length.

    A batch is padded to its longest text, so mixed lengths are mostly padding. Rows are shuffled, sorted
    inside windows of WINDOW batches, cut into batches, and the batches shuffled: by seed and epoch alone.
    """
    import torch
    from sentence_transformers.base.sampler import DefaultBatchSampler

    texts = [
        column for name, column in zip(columns.column_names, columns.columns, strict=True) if name != "label"
    ]
    lengths = torch.from_numpy(np.max([pc.utf8_length(text).to_numpy() for text in texts], axis=0))

    class LengthGroupedBatchSampler(DefaultBatchSampler):
        def __iter__(self) -> Iterator[list[int]]:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            shuffled = torch.randperm(len(lengths), generator=generator)
            batches = [
                batch.tolist()
                for window in shuffled.split(WINDOW * self.batch_size)
                for batch in window[lengths[window].argsort(stable=True)].split(self.batch_size)
            ]
            for at in torch.randperm(len(batches), generator=generator).tolist():
                yield batches[at]

    return LengthGroupedBatchSampler


def _length_grouping_trainer(columns: pa.Table) -> Callable[..., Any]:
    """The library's trainer with `length_grouped` batches.

    Given as an argument, the sampler would have to be pickled into every checkpoint.
    """
    from sentence_transformers import SentenceTransformerTrainer

    class LengthGroupingTrainer(SentenceTransformerTrainer):
        def get_batch_sampler(self, *given: Any, **named: Any) -> Any:
            return length_grouped(columns)(*given, **named)

    return LengthGroupingTrainer


def _arguments(
    config: TrainConfig,
    columns: pa.Table,
    prompts: Mapping[str, str | None],
    checkpoints: Path,
    evaluates: bool,
) -> Any:
    from sentence_transformers import SentenceTransformerTrainingArguments

    n_steps = max(1, math.ceil(math.ceil(len(columns) / config.batch_size) * config.epochs))
    every = max(1, math.ceil(n_steps / config.evaluations))
    on_cpu = config.device == "cpu" or (config.device == "auto" and not _has_cuda())
    bfloat16 = config.precision == "bfloat16" or (
        config.precision == "auto" and encoder.has_bfloat16("cpu" if on_cpu else "cuda")
    )
    best: dict[str, Any] = {
        "load_best_model_at_end": True,
        "metric_for_best_model": RETRIEVAL,
        "greater_is_better": True,
    }
    return SentenceTransformerTrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup_ratio if config.warmup_ratio < 1 else n_steps,
        seed=config.seed,
        use_cpu=on_cpu,
        bf16=bfloat16,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        logging_steps=min(LOG_STEPS, every),
        logging_nan_inf_filter=False,  # it would show the last good loss in place of NaN
        report_to="none",
        prompts=_prompts_by_column(columns, prompts),
        **(best if evaluates else {}),
    )


def _prompts_by_column(columns: pa.Table, prompts: Mapping[str, str | None]) -> dict[str, str] | None:
    """The first column is asked, the others are found; None where nothing stands before either."""
    texts = [name for name in columns.column_names if name != "label"]
    by_column = {name: prompts.get("document") or "" for name in texts}
    by_column[texts[0]] = prompts.get("query") or ""
    return by_column if any(by_column.values()) else None


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _sample(table: pa.Table, n: int | None, seed: int) -> pa.Table:
    """At most `n` rows, by a hash of their content: the same ones whatever their order."""
    if n is None or len(table) <= n:
        return table
    ids = zip(*(table[name].to_pylist() for name in table.column_names[:2]), strict=True)
    keys = [hashlib.blake2b(f"{seed}\0{a}\0{b}".encode(), digest_size=8).digest() for a, b in ids]
    order = pc.array_sort_indices(pa.array(keys, pa.binary()))
    return table.take(order[:n])


def _point(entry: dict[str, Any]) -> dict[str, float]:
    """One line of the trainer's log in the names of the curve."""
    named = {ours: entry[theirs] for theirs, ours in CURVE.items() if theirs in entry}
    return {"step": entry["step"], "epoch": entry.get("epoch", 0.0), **named}


def _figures(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name in CURVE.values()}


def _progress() -> Any:
    from transformers.trainer_callback import ProgressCallback

    class Progress(ProgressCallback):
        """The trainer's bar with the last figures behind it, in place of a line of them each time."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            shown = {ours: f"{logs[theirs]:.3f}" for theirs, ours in CURVE.items() if theirs in (logs or {})}
            if self.training_bar is not None and shown:
                self.training_bar.set_description("train: " + ", ".join(map(" ".join, shown.items())))

    return Progress()


def _stop_at_nan() -> Any:
    from transformers import TrainerCallback

    class StopAtNan(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            loss = (logs or {}).get("loss")
            if loss is not None and not math.isfinite(loss):
                raise PipelineError(
                    f"train: the loss is {loss} at step {state.global_step}; "
                    "lower train.learning_rate or set train.precision to float32"
                )

    return StopAtNan()
