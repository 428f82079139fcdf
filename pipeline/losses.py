"""What training minimises: the losses by their names in the config, over dot products of unit rows.

`scale` is 1 / temperature: the default 20 is a temperature of 0.05.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.batches import embed_once
from pipeline.config import TrainConfig
from pipeline.training_data import SENTENCES, loss_name

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from sentence_transformers import SentenceTransformer

N_NLI_LABELS = 3
# gist: a text that the guide puts this near the positive, or nearer, is no wrong answer. Above 0, so that the
# positive's own text, met again in the batch, is none either, whatever the rounding.
GUIDE_MARGIN = 0.01
# Short texts that no tokenizer reads alike: where their tokens part, the prompt has ended.
PROBES = ("a", "b", "7", "가")


class PromptTokens(NamedTuple):
    """What stands before the texts of a data set, and so what is left of a long text behind it.

    Attributes:
        query: tokens before each text of the first column that are no part of it.
        document: the same of the other columns.
        n_read: tokens of a text that fit behind the longer of the two; None: as many as there are. Behind the
            shorter, more of it is read: by these alone it is known to be the same.
    """

    query: int = 0
    document: int = 0
    n_read: int | None = None


def losses_of(
    config: TrainConfig,
    model: SentenceTransformer,
    datasets: Mapping[str, pa.Table],
    guide: SentenceTransformer | None = None,
) -> dict[str, torch.nn.Module]:
    """A loss for each data set, by its name in the config.

    Args:
        datasets: as `training_data.datasets_of` gives them.
        guide: of gist: a model of its own, not the one in training. It is frozen here.
    """
    return {name: _make(name, config, model, guide) for name in datasets}


def heads_of(losses: Mapping[str, torch.nn.Module]) -> torch.nn.ModuleDict:
    """What losses learn beside the model, {data set: layer}: the trainer puts it into no checkpoint.

    A training that goes on would begin with another softmax head than the one it was stopped with.
    """
    import torch

    heads = torch.nn.ModuleDict()
    for name, loss in losses.items():
        if isinstance(head := getattr(loss, "classifier", None), torch.nn.Module):
            heads[name] = head
    return heads


def _make(
    data_set: str,
    config: TrainConfig,
    model: SentenceTransformer,
    guide: SentenceTransformer | None,
) -> torch.nn.Module:
    """The loss of one data set.

    multiple_negatives: every other document of the batch is a negative too, but for those that are the
        anchor's or the positive's own text again; cross-entropy of scale * dot.
    cached_multiple_negatives: the same loss and gradients with `mini_batch_size` rows in memory at once.
    gist: the same again, without what the guide puts as near the anchor as the positive; anchors and
        positives are wrong answers to each other too.
    triplet: the anchor must be nearer to the positive than to the negative by `margin`, in 1 - dot (half the
        squared Euclidean distance of unit rows) or in Euclidean distance.
    contrastive: positives are drawn together, negatives pushed `margin` apart, in 1 - dot.
    softmax: NLI labels by a linear layer over (u, v, |u - v|), which is thrown away after training.
    cosent: pairs in the order of their scores; log(1 + sum of exp(scale * (dot of lower - dot of higher))).
    """
    name = loss_name(config, data_set)
    if name == "multiple_negatives":
        return _ranking_loss(model, config.scale, _prompts_of(model, data_set))
    if name == "cached_multiple_negatives":
        prompts = _prompts_of(model, data_set)
        return _cached_ranking_loss(model, config.scale, config.mini_batch_size, prompts)
    if name == "gist":
        if guide is None or guide is model:
            raise ValueError("gist needs a guide: a model of its own")
        return _gist_loss(model, guide, config.scale)
    if name == "softmax":
        return _softmax_loss(model, config.seed)
    return _pairwise_loss(name, config, model)


def _pairwise_loss(name: str, config: TrainConfig, model: SentenceTransformer) -> torch.nn.Module:
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.util import pairwise_dot_score

    def one_minus_dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 1 - pairwise_dot_score(x, y)

    if name == "triplet":
        euclidean = losses.TripletDistanceMetric.EUCLIDEAN
        distance = one_minus_dot if config.distance == "dot" else euclidean
        return losses.TripletLoss(model, distance_metric=distance, triplet_margin=config.margin)
    if name == "contrastive":
        return losses.ContrastiveLoss(model, distance_metric=one_minus_dot, margin=config.margin)
    return losses.CoSENTLoss(model, scale=config.scale, similarity_fct=pairwise_dot_score)


def _softmax_loss(model: SentenceTransformer, seed: int) -> torch.nn.Module:
    import torch
    from sentence_transformers.sentence_transformer.losses import SoftmaxLoss

    with torch.random.fork_rng():  # its head's first weights, whatever was drawn before
        torch.manual_seed(seed)
        return SoftmaxLoss(model, model.get_embedding_dimension() or 0, num_labels=N_NLI_LABELS)


def _ranking_loss(model: SentenceTransformer, scale: float, prompts: PromptTokens) -> torch.nn.Module:
    """The library's MultipleNegativesRankingLoss, in which a text is never a wrong answer to itself.

    A much read document stands in most batches more than once. Batches without duplicates would leave a third
    of Wikispeedia's pairs out, or be ten times as many: one article in every thirty pairs is the same.
    """
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.util import dot_score

    class DistinctRankingLoss(MultipleNegativesRankingLoss):
        def forward(self, sentence_features: Any, labels: torch.Tensor) -> torch.Tensor:
            features = list(sentence_features)
            codes = _column_codes(features, prompts)
            self.gather_across_devices = _in_step(codes[0])
            own = own_texts(codes, self.gather_across_devices, rows=len(codes[0]))
            self.similarity_fct = _dot_without(own)
            vectors = embed_once(self.model, features, [text_codes(column) for column in features])
            return self.compute_loss_from_embeddings(vectors, labels)

    return DistinctRankingLoss(model, scale=scale, similarity_fct=dot_score)


def _cached_ranking_loss(
    model: SentenceTransformer, scale: float, mini_batch_size: int, prompts: PromptTokens
) -> torch.nn.Module:
    """`_ranking_loss` by gradient caching (Gao et al. 2021): batches larger than memory."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.util import dot_score

    class DistinctCachedRankingLoss(CachedMultipleNegativesRankingLoss):
        def forward(self, sentence_features: Any, labels: torch.Tensor) -> torch.Tensor:
            features = list(sentence_features)
            codes = _column_codes(features, prompts)
            self.loss.gather_across_devices = _in_step(codes[0])
            # the library scores mini_batch_size anchors at a time, in their order
            own = own_texts(codes, self.gather_across_devices, rows=self.mini_batch_size)
            self.loss.similarity_fct = _dot_without(own)
            return super().forward(features, labels)

    return DistinctCachedRankingLoss(
        model, scale=scale, similarity_fct=dot_score, mini_batch_size=mini_batch_size
    )


def _gist_loss(model: SentenceTransformer, guide: SentenceTransformer, scale: float) -> torch.nn.Module:
    """The library's GISTEmbedLoss with dot products; its cosine holds a (n, n, dim) array in memory."""
    from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss
    from sentence_transformers.util import dot_score

    class DotGISTEmbedLoss(GISTEmbedLoss):
        def sim_matrix(self, embed1: torch.Tensor, embed2: torch.Tensor) -> torch.Tensor:
            return dot_score(embed1, embed2)

        def forward(self, sentence_features: Any, labels: torch.Tensor) -> torch.Tensor:
            features = list(sentence_features)
            self.gather_across_devices = _in_step(features[0]["input_ids"])
            return super().forward(features, labels)

    guide.requires_grad_(False).eval()  # the trainer gives the optimiser whatever a loss holds
    return DotGISTEmbedLoss(model, guide, temperature=1 / scale, margin=GUIDE_MARGIN)


def own_texts(codes: Sequence[torch.Tensor], gathered: bool, rows: int) -> Iterator[torch.Tensor]:
    """Where a document of the batch has the anchor's or the positive's own text, and is not the right answer.

    Args:
        codes: of each column, int64 (n,): anchors, positives, then any negatives.
        gathered: the documents are those of all processes, as `gather_across_devices` joins them: column by
            column, each in the order of the processes.
        rows: anchors at a time.

    Yields:
        bool (rows or fewer, n_documents), anchors in their order.
    """
    import torch
    from sentence_transformers.util import all_gather, get_rank

    anchors, positives = codes[:2]
    documents = torch.cat([all_gather(column) if gathered else column for column in codes[1:]])
    first = get_rank() * len(anchors) if gathered else 0
    right = torch.arange(first, first + len(anchors), device=anchors.device)
    for anchor, positive, answer in zip(
        anchors.split(rows), positives.split(rows), right.split(rows), strict=True
    ):
        own = (documents == anchor[:, None]) | (documents == positive[:, None])
        own[torch.arange(len(answer), device=own.device), answer] = False
        yield own


def text_codes(
    features: Mapping[str, torch.Tensor], prompt_length: int = 0, n_read: int | None = None
) -> torch.Tensor:
    """A number for each text of a batch, the same for the same tokens whatever the padding, int64 (n,).

    Args:
        prompt_length: tokens at the start of each text that are no part of it.
        n_read: tokens of each text that count, from its first.
    """
    import torch

    mask = features["attention_mask"].long()
    # counted from the text's first token, wherever padding and prompt stand
    place = (mask.cumsum(dim=1) - prompt_length).clamp(min=0)
    # powers of an odd number (Knuth's for MMIX), modulo 2^64
    weights = torch.full((int(place.max()) + 1,), 6364136223846793005, device=mask.device).cumprod(dim=0)
    counts = (place > 0) if n_read is None else (place > 0) & (place <= n_read)
    return (features["input_ids"] * weights[place] * mask * counts).sum(dim=1)


def _column_codes(
    features: Sequence[Mapping[str, torch.Tensor]], prompts: PromptTokens
) -> list[torch.Tensor]:
    """`text_codes` of each column: the first is asked, the others are found."""
    return [
        text_codes(column, prompts.document if n else prompts.query, prompts.n_read)
        for n, column in enumerate(features)
    ]


def _prompts_of(model: SentenceTransformer, data_set: str) -> PromptTokens:
    """What to look behind, so that "query: a" and "passage: a" are one text."""
    prompts = [(model.prompts or {}).get(kind) or "" for kind in ("query", "document")]
    if prompts[0] == prompts[1] or data_set in SENTENCES:
        return PromptTokens()
    tokens = [
        [model.tokenizer(prompt + probe, verbose=False)["input_ids"] for probe in PROBES]
        for prompt in prompts
    ]
    query, document = (_n_common(read) for read in tokens)
    longest = model.max_seq_length
    # one token of the longest stands behind the text
    n_read = max(1, longest - max(query, document) - 1) if longest else None
    return PromptTokens(query, document, n_read)


def _n_common(read: Sequence[Sequence[int]]) -> int:
    """Tokens at the start that all have."""
    return sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*read, strict=False)))


def _dot_without(own: Iterator[torch.Tensor]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Dot products of the next anchors with all documents, -inf where the next mask says so."""
    import torch
    from sentence_transformers.util import dot_score

    return lambda anchors, documents: dot_score(anchors, documents).masked_fill(next(own), -torch.inf)


def _in_step(column: torch.Tensor) -> bool:
    """Whether there are several processes, and each holds as many rows: then their batches can be joined.

    The last batch can be shorter in one of them; each of them then keeps to its own.
    """
    import torch
    from sentence_transformers.util import all_gather, get_world_size

    if get_world_size() == 1:
        return False
    n = torch.tensor([len(column)], device=column.device)
    return bool((all_gather(n) == n).all())
