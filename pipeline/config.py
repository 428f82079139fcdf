"""The settings of every stage: frozen dataclasses, each default once, and the only reader of YAML."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from pipeline.errors import ConfigError

STRICT = ConfigDict(extra="forbid", strict=True)

Format = Literal["auto", "jsonl", "csv", "parquet"]
Similarity = Literal["dot_product", "cosine", "euclidean", "manhattan"]
Auto = Literal["auto"]
Strategy = Literal["cross_user", "bm25", "mined", "random"]
PairSource = Literal["sessions", "queries", "synthetic", "bm25_top"]  # column `source` of the pairs
Loss = Literal["multiple_negatives", "cached_multiple_negatives", "triplet", "contrastive", "gist"]
Source = Literal[PairSource, "nli", "sts"]
Storage = Literal["float32", "float16", "bfloat16", "int8"]  # of an index's rows
STORAGES: tuple[Storage, ...] = get_args(Storage)  # the most exact first
Paths = Annotated[tuple[str, ...], Field(strict=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Value = str | int | Finite | bool | None  # of a documents' column
Values = Annotated[tuple[Value, ...], Field(strict=False)]


def from_mapping(kind: Any) -> BeforeValidator:
    """Settings below a setting, as YAML has them: pydantic's strict mode takes instances alone."""

    def made(given: Any) -> Any:
        if given is None:  # `exclude:` with nothing below it
            return kind()
        if not isinstance(given, dict):
            return given
        known = [field.name for field in dataclasses.fields(kind)]
        for key in given:
            if key not in known:
                raise ValueError(f"{key} is not a setting; known: {', '.join(known)}")
        return kind(**given)

    return BeforeValidator(made)


@dataclass(frozen=True, config=STRICT)
class EventsConfig:
    """Where the highlight logs are, and what their columns are called."""

    paths: Paths = ()  # files or globs, local or on any Beam file system; none: documents alone
    format: Format = "auto"  # by the file's ending
    user_id: str = "user_id"
    document_id: str = "document_id"
    timestamp: str = "timestamp"  # ISO 8601 with a zone, or epoch seconds or milliseconds
    text: str | None = None  # the highlighted passage; needed where there is no documents file
    max_rejected_share: Share = 0.01  # more rows than this in the rejects: the log is not what we think
    description: str = ""  # said in every output, such as "simulated readers"


@dataclass(frozen=True, config=STRICT)
class ColumnRule:
    """What of a column keeps a document out; a row that meets one of these is out."""

    below: Finite | None = None  # null, and text that says nothing, is neither below nor above
    above: Finite | None = None
    other_than: Values | None = None  # null is another value too

    def __post_init__(self) -> None:
        if (self.below, self.above, self.other_than) == (None, None, None):
            raise ValueError("names no rule; wanted below, above or other_than")
        if self.below is not None and self.above is not None and self.below > self.above:
            raise ValueError(
                f"keeps nothing: all numbers are below {self.below:g} or above {self.above:g}; change one"
            )


@dataclass(frozen=True, config=STRICT)
class ExcludeConfig:
    """Which given documents are kept out of everything: not trained on, not found, counted by reason."""

    document_ids: Paths = ()
    document_ids_from: Paths = ()  # files or globs with one document_id a line
    # By column: values, such as {status: [draft, withdrawn]}, or a rule, such as {rating: {below: 2}}
    columns: dict[str, Annotated[ColumnRule | Values, from_mapping(ColumnRule)]] = dataclasses.field(
        default_factory=dict
    )


@dataclass(frozen=True, config=STRICT)
class DocumentsConfig:
    """Where the documents are, and which columns make their text."""

    paths: Paths = ()  # none: made from the events' texts
    format: Format = "auto"
    document_id: str = "document_id"
    text: str | Paths = "text"  # several columns are joined, empty ones left out
    separator: str = " - "
    title: str | None = None  # shown to people; the text's first line where there is none
    min_readers: Positive = 2  # made documents only: one reader's highlights never become public
    exclude: Annotated[ExcludeConfig, from_mapping(ExcludeConfig)] = ExcludeConfig()


@dataclass(frozen=True, config=STRICT)
class QueriesConfig:
    """Logged queries and what answered each: a click, a highlight, the question that was meant."""

    paths: Paths = ()  # none: pairs come from sessions alone
    format: Format = "auto"
    query: str = "query"
    document_id: str = "document_id"
    user_id: str | None = None  # without one, each query text stands for its reader
    timestamp: str | None = None  # without one, queries are held out by a hash of their text
    answers: str | None = None  # a list of texts: a document that contains one is right too
    max_rejected_share: Share = 0.01


@dataclass(frozen=True, config=STRICT)
class SyntheticConfig:
    """(query, document_id) from a generator, for training alone: never held out, never judged by."""

    paths: Paths = ()
    format: Format = "auto"
    query: str = "query"
    document_id: str = "document_id"
    max_rejected_share: Share = 0.01


@dataclass(frozen=True, config=STRICT)
class PairsConfig:
    """How events become sessions, and sessions (anchor, positive, negative)."""

    # seconds, at most a year; a gap of exactly this starts a new session
    gap_duration: Annotated[int, Field(ge=1, le=31_536_000)] = 1800
    holdout_share: Annotated[float, Field(ge=0, lt=0.5)] = 0.1  # of the sessions, for dev, and again for test
    seed: Seed = 7
    # A share for each strategy; hard negatives (bm25, mined) help in small doses.
    negatives: dict[Strategy, Share] = dataclasses.field(default_factory=lambda: {"cross_user": 1.0})
    popularity_exponent: Annotated[float, Field(ge=0, le=8)] = (
        1.0  # cross_user: 1 as often as read, 0 all alike
    )
    mined_from: str | None = None  # mined: the work folder of a complete run, whose embeddings are used
    # mined: what scores above this share of the positive is left out; 0.95: NV-Retriever (Moreira 2024)
    max_positive_ratio: Share = 0.95
    n_candidates: Positive = 20  # bm25, mined: the best of an anchor, among which a pair's hash chooses
    # Before there are sessions: so many of the best BM25 documents of each title and each logged query are
    # taken as its weak positives. 0: none
    bm25_top: Annotated[int, Field(ge=0, le=100)] = 0
    max_draws: Positive = (
        20  # a strategy; then `random` is asked, and then the pair is rejected as no_negative
    )
    max_events_per_user: Positive = 10_000  # a day; who has more is no reader, and is set aside
    n_buckets: Positive | Auto = (
        "auto"  # files that users are hashed into; auto: about half a million events each
    )
    temp_location: str | None = None  # shared by all workers; default: beside the artefact

    def __post_init__(self) -> None:
        if abs(sum(self.negatives.values()) - 1) > 1e-9:
            raise ValueError(f"negatives: the shares are {self.negatives}, but must add up to 1")
        if self.negatives.get("mined") and not self.mined_from:
            raise ValueError(
                f"negatives: mined has the share {self.negatives['mined']}, but pairs.mined_from is not set; "
                "name the work folder of a complete run whose embeddings find the nearest documents"
            )


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """Fine-tuning; the names are those of Sentence Transformers and its trainer."""

    # A folder, a hub name or package:NAME. Multilingual-MiniLM's card names neither Korean nor Japanese.
    model: str = "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2"
    revision: str | None = None  # of a hub name
    query_prefix: str | None = None  # stands before each query, such as E5's "query: "; None: the model's own
    document_prefix: str | None = None  # before each document, such as "passage: "; saved in the model folder
    loss: Loss = "multiple_negatives"  # of pairs; cached: batches larger than memory; gist: a guide model
    scale: Annotated[float, Field(gt=0)] = 20.0  # multiple negatives, gist, sts: 1 / temperature
    mini_batch_size: Positive = 32  # cached_multiple_negatives: rows of a batch in memory at once
    guide: str | None = None  # gist: the model that tells false negatives; None: the weights before tuning
    distance: Literal["dot", "euclidean"] = "dot"  # triplet: 1 - dot on unit rows, or Euclidean
    margin: Annotated[float, Field(gt=0, le=2)] = 0.5  # triplet, contrastive: of that distance
    # What an epoch is made of, by share, such as {sessions: 0.8, nli: 0.1, sts: 0.1}; empty: the pairs as
    # they are. The largest share is seen once, a smaller source begins again when it has run out.
    mix: dict[Source, Share] = dataclasses.field(default_factory=dict)
    nli: Paths = ()  # KorNLI (.tsv) or AllNLI files: premise, hypothesis, label
    nli_loss: Literal["multiple_negatives", "softmax"] = "multiple_negatives"
    sts: Paths = ()  # KorSTS (.tsv) or STS-B files: two sentences and a score; for training
    main_similarity: Similarity = "dot_product"  # must be the index's distance_measure
    epochs: Annotated[float, Field(ge=0)] = 1  # 0: the weights as they are
    batch_size: Positive = 128
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    gradient_accumulation_steps: Positive = 1  # batches a step of the optimiser
    weight_decay: Annotated[float, Field(ge=0)] = 0.01  # not of biases and LayerNorm
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    warmup_ratio: Share = 0.1
    max_seq_length: Positive | None = None  # tokens; default: the model's own
    seed: Seed = 7
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the hardware has it
    max_pairs: Positive | None = None  # train on a seeded sample of the pairs
    evaluations: Positive = 4  # during training, at equal distances
    n_dev_pairs: Positive = 500  # for these evaluations
    best_by: Literal["retrieval", "similarity"] = "retrieval"  # which dev figure chooses the weights
    early_stopping_patience: Positive = 3  # evaluations without a better one
    keep_checkpoints: Positive = 2  # on the disk at once; the best is one of them
    separate_encoders: bool = False  # one for queries and one for documents: Sentence Transformers' Router
    trim_vocabulary: bool = False  # keep only the tokens that the texts use: a smaller model
    learning_curve: Annotated[tuple[Positive, ...], Field(strict=False)] = ()  # sizes to train on beside all

    def __post_init__(self) -> None:
        if self.mix and abs(sum(self.mix.values()) - 1) > 1e-9:
            raise ValueError(f"mix: the shares are {self.mix}, but must add up to 1")
        for source, paths in (("nli", self.nli), ("sts", self.sts)):
            if bool(self.mix.get(source)) != bool(paths):  # type: ignore[call-overload]
                raise ValueError(
                    f"{source} names {len(paths)} files, but mix gives {source} the share "
                    f"{self.mix.get(source, 0)}; set both or neither"  # type: ignore[call-overload]
                )
        if self.distance == "dot" and self.loss == "triplet" and self.margin > 1:
            raise ValueError(f"margin is {self.margin}, but of 1 - dot at most 1 can be asked for")


@dataclass(frozen=True, config=STRICT)
class EncodeConfig:
    """Texts to unit-length float32 rows."""

    dim: Positive = 384
    # Of documents; queries are always float32, as servers encode them. mixed: float32 weights, multiplied as
    # bfloat16 (PyTorch's autocast). auto: the fastest that the hardware multiplies itself and whose rows are
    # found, on a sample, where float32's are
    precision: Literal["auto", "float32", "mixed", "bfloat16"] = "auto"
    guard_sample: Annotated[int, Field(ge=100)] = 20_000  # documents of that sample
    guard_recall: Share = 0.99  # recall@10 of exact search over it, against float32 vectors
    device: Literal["auto", "cpu", "cuda"] = "auto"  # cuda: all GPUs that PyTorch sees
    batch_tokens: Positive | Auto = "auto"  # of a batch at most, padding included; auto: by the device
    batch_size: Positive = 128  # texts, where the library batches: models that read no padded rows of tokens
    processes: Positive | Auto = "auto"  # on this machine, each with a model; auto: one for eight cores
    temp_location: str | None = None  # with --runner: shared by all workers; default: beside the artefact
    # A longer document is cut into overlapping passages, a row each; None: one row, cut at max_seq_length
    passage_words: Annotated[int, Field(ge=8)] | None = None
    passage_overlap: Annotated[int, Field(ge=0)] = 40  # words that a passage shares with the one before
    # A model whose rows are all alike finds nothing: refused above this mean cosine of random pairs
    max_mean_cosine: Share = 0.95
    max_queries: Positive = 20_000  # held-out anchors, of dev and of test each
    # Documents that all models are compared over, beside the held-out positives.
    pool_size: Positive = 50_000
    # A test set of sentence similarity for each language, such as {ko: sts-test.tsv}: it shows forgetting.
    sts: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.passage_words is not None and self.passage_overlap >= self.passage_words:
            raise ValueError(
                f"passage_overlap is {self.passage_overlap}, but passage_words is {self.passage_words}; "
                f"choose 0 to {self.passage_words - 1}"
            )


@dataclass(frozen=True, config=STRICT)
class IndexConfig:
    """How the ScaNN index is built, and the contract it is held to; the names are those of the tfrs layer.

    `auto` is tuned: build settings on a sample of the documents, then search settings on the built index.
    """

    layer: Literal["tuned", "tfrs"] = "tuned"  # tfrs: its own ScaNN layer, `serving_default` alone
    k: Positive = 10  # results of a request that names no k, and the k of the contract
    distance_measure: Literal["dot_product"] = "dot_product"
    target_recall: Share = 0.95  # recall@k against exact search over float32; publication refuses less
    target_latency_ms: Annotated[Finite, Field(gt=0)] | None = None  # of a request, p95; the same
    memory_mib: Positive | None = None  # of the index when served; the same
    requests: Literal["single", "batched"] = "single"  # how queries come: the mode that is judged
    exact_below: Annotated[int, Field(ge=0)] = 5_000  # fewer documents: exact search. 0: always a tree
    num_leaves: Positive | Auto = "auto"
    num_leaves_to_search: Positive | Auto = "auto"
    num_reordering_candidates: Positive | Auto = "auto"  # rescored by the stored rows
    training_iterations: Positive = 8  # k-means rounds; 12 gave the same recall within 0.001
    training_sample_size: Positive = 250_000  # rows that k-means sees; 120 a leaf lost 0.006 of recall@10
    dimensions_per_block: Positive = 2  # advised by ScaNN docs/algorithms.md
    spherical: bool = True  # leaves by direction
    anisotropic_quantization_threshold: Annotated[float, Field(gt=0, lt=1)] | Auto | None = "auto"
    spill: Annotated[float, Field(gt=0)] | Auto | None = "auto"  # SOAR's lambda; null: a row lies in one leaf
    quantize_reordering: Storage | Auto = "auto"  # the stored rows
    n_tuning_rows: Positive = 100_000  # the largest sample that build settings are tried on
    n_tuning_queries: Positive = 1000  # dev queries of each kind
    max_queries: Positive = 4096  # of a request; these four bound what one request may ask for
    max_k: Positive = 1000
    max_num_reordering_candidates: Positive = 10_000
    max_filter_ids: Positive = 100_000
    seed: Seed = 7

    def __post_init__(self) -> None:
        leaves, searched = self.num_leaves, self.num_leaves_to_search
        if isinstance(leaves, int) and isinstance(searched, int) and searched > leaves:
            raise ValueError(
                f"num_leaves_to_search is {searched}, but num_leaves is {leaves}; choose 1 to {leaves}"
            )
        candidates = self.num_reordering_candidates
        if isinstance(candidates, int) and candidates < self.k:
            raise ValueError(
                f"num_reordering_candidates is {candidates}, but k is {self.k}; choose {self.k} or more"
            )
        most = max(self.k, self.max_num_reordering_candidates)
        if isinstance(candidates, int) and candidates > most:
            raise ValueError(
                f"num_reordering_candidates is {candidates}, but a request may ask for {most}; choose at "
                "most that or raise max_num_reordering_candidates"
            )
        if self.target_recall == 1:
            raise ValueError(
                "target_recall is 1, which no number of queries can prove; choose less, or for exact answers "
                "raise exact_below above the number of documents"
            )
        if self.layer == "tfrs" and self.requests == "batched" and self.target_latency_ms is not None:
            raise ValueError(
                f"target_latency_ms is {self.target_latency_ms:g} of batched requests, but what layer tfrs "
                "saves takes one query a request; set requests to single or layer to tuned"
            )
        if self.layer == "tfrs":
            self._refuse_unknown_to_tfrs()

    def _refuse_unknown_to_tfrs(self) -> None:
        """What would change nothing that tfrs's layer builds or saves is no setting of it."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        given = {name: getattr(self, name) for name in UNKNOWN_TO_TFRS}
        foreign = {name: value for name, value in given.items() if value != defaults[name]}
        if foreign:
            said = " and ".join(f"{name} is {_in_yaml(value)}" for name, value in foreign.items())
            them = "it" if len(foreign) == 1 else "them"
            raise ValueError(
                f"{said}, but layer tfrs does not know {them}; take {them} out or set layer to tuned"
            )


# Settings of section index that layer tfrs has not: what TunedScaNN is built with beyond it, the memory that
# builds are chosen by, and the bounds of requests to signatures that tfrs's layer does not save.
UNKNOWN_TO_TFRS = (
    "memory_mib", "training_sample_size", "spherical", "anisotropic_quantization_threshold", "spill",
    "quantize_reordering", "n_tuning_rows", "max_queries", "max_k", "max_filter_ids",
)  # fmt: skip


def _in_yaml(value: Any) -> str:
    """A setting's value as a config file has it."""
    return json.dumps(value)


@dataclass(frozen=True, config=STRICT)
class EvaluateConfig:
    """What the report measures."""

    n_queries: Positive = 2000  # test anchors for the index's recall
    n_draws: Positive = 10_000  # of the bootstrap over readers
    n_examples: Positive = 10  # held-out queries shown with what each system found
    n_lost: Annotated[int, Field(ge=0)] = 30  # queries shown that lost most by tuning
    rrf_k: Positive = 60  # of reciprocal rank fusion, as in Cormack et al. 2009
    seed: Seed = 7


@dataclass(frozen=True, config=STRICT)
class PublishConfig:
    """Where versions go, and how many stay."""

    model_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = "index"
    keep_versions: Positive = 3
    folder: str | None = None  # holds models/ and encoders/; default: the work folder
    rows_below: Annotated[int, Field(ge=0)] = 100_000  # at most so many rows: rows.npy goes along; 0: never
    min_related_readers: Positive = 3  # of a pair in related.parquet; fewer could tell what one of them read
    related_per_document: Positive = 20  # kept of each document in related.parquet


@dataclass(frozen=True, config=STRICT)
class Config:
    """One section a stage, and one for each input."""

    events: EventsConfig = EventsConfig()
    documents: DocumentsConfig = DocumentsConfig()
    queries: QueriesConfig = QueriesConfig()
    synthetic: SyntheticConfig = SyntheticConfig()
    pairs: PairsConfig = PairsConfig()
    train: TrainConfig = TrainConfig()
    encode: EncodeConfig = EncodeConfig()
    index: IndexConfig = IndexConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    publish: PublishConfig = PublishConfig()

    def __post_init__(self) -> None:
        if self.train.main_similarity != self.index.distance_measure:
            raise ValueError(
                f"train.main_similarity is {self.train.main_similarity}, but index.distance_measure is "
                f"{self.index.distance_measure}: the model would be judged by another order than the one "
                f"that is served; set train.main_similarity to {self.index.distance_measure}"
            )
        if self.index.k < 10:
            raise ValueError(f"index.k is {self.index.k}, but recall@10 is measured; choose 10 or more")
        if not self.events.paths and not self.documents.paths:
            raise ValueError("events.paths and documents.paths are both empty; name the one or the other")
        for section, given in (("queries", self.queries.paths), ("synthetic", self.synthetic.paths)):
            if given and not self.documents.paths:
                raise ValueError(
                    f"{section}.paths is set, but documents.paths is empty: name what they lead to"
                )
        if not self.documents.paths and self.documents.exclude.columns:
            raise ValueError(
                "documents.exclude.columns is set, but documents.paths is empty: documents made from "
                "highlights have no columns; name documents.exclude.document_ids"
            )
        if not self.documents.paths and self.events.text is None:
            raise ValueError(
                "documents.paths is empty, so documents are made from the events' texts: "
                "set events.text to the column that holds them"
            )


SECTIONS: dict[str, type] = {
    "events": EventsConfig,
    "documents": DocumentsConfig,
    "queries": QueriesConfig,
    "synthetic": SyntheticConfig,
    "pairs": PairsConfig,
    "train": TrainConfig,
    "encode": EncodeConfig,
    "index": IndexConfig,
    "evaluate": EvaluateConfig,
    "publish": PublishConfig,
}


SINGLE_PATHS = (
    ("pairs", "temp_location"), ("pairs", "mined_from"), ("encode", "temp_location"), ("publish", "folder"),
)  # fmt: skip


class Loader(yaml.SafeLoader):
    """Safe YAML, in which 2e-5 is a number: YAML 1.1 would want 2.0e-5."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789")
)


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML config and apply `SECTION.KEY=VALUE` overrides.

    Paths in the file are relative to the file, paths in an override to the current folder.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, a value has the wrong type, or
            settings contradict each other; the message names file, key, value and what is wanted.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        settings = yaml.load(text, Loader) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: got a {type(settings).__name__}, wanted sections such as `events:`")
    _resolve_paths(settings, path.parent)
    for override in overrides or []:
        section, key, value = _parse_override(override)
        patch = {section: {key: value}}
        _resolve_paths(patch, Path.cwd())
        existing = settings.setdefault(section, {})
        if existing is None:
            existing = settings[section] = {}
        if not isinstance(existing, dict):
            raise ConfigError(f"{path}: {section} is {existing!r}, wanted settings below it")
        existing[key] = patch[section][key]
    try:
        return from_dict(settings)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def from_dict(settings: dict[str, Any]) -> Config:
    """The same as `load`, from a mapping of sections to settings.

    Raises:
        ConfigError: as `load`, without the file's name.
    """
    sections = {}
    for name, values in settings.items():
        if name not in SECTIONS:
            raise ConfigError(f"{name} is not a section; known: {', '.join(SECTIONS)}")
        if values is None:  # `events:` with nothing below it
            values = {}
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise ConfigError(f"{name} is {values!r}; wanted settings below it, such as `{name}: {{...}}`")
        try:
            sections[name] = SECTIONS[name](**values)
        except ValidationError as error:
            raise ConfigError(_say(name, error)) from None
    try:
        return Config(**sections)
    except ValidationError as error:
        raise ConfigError(str(error.errors()[0]["ctx"]["error"])) from None


def as_dict(section: Any) -> dict[str, Any]:
    """One section's settings as plain JSON-ready values, for a manifest."""
    return TypeAdapter(type(section)).dump_python(section, mode="json")


def _parse_override(override: str) -> tuple[str, str, Any]:
    name, equals, value = override.partition("=")
    section, dot, key = name.partition(".")
    if not (equals and dot and section and key):
        raise ConfigError(f"--set {override}: wanted SECTION.KEY=VALUE, such as encode.batch_size=64")
    try:
        parsed = yaml.load(value, Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: not a YAML value: {' '.join(str(error).split())}") from None
    return section, key, parsed


def _resolve_paths(settings: dict[str, Any], folder: Path) -> None:
    """Make relative paths absolute, in place; URLs such as gs:// stay as they are."""

    def resolve(value: Any) -> Any:
        if isinstance(value, str) and "://" not in value and value:
            return str((folder / Path(value).expanduser()).resolve())
        return value

    many = [(settings.get(s), "paths") for s in ("events", "documents", "queries", "synthetic")]
    many += [(settings.get("train"), "nli"), (settings.get("train"), "sts")]
    documents = settings.get("documents")
    if isinstance(documents, dict):
        many.append((documents.get("exclude"), "document_ids_from"))
    for below, key in many:
        if isinstance(below, dict) and key in below:
            paths = [below[key]] if isinstance(below[key], str) else below[key]
            below[key] = [resolve(p) for p in paths] if isinstance(paths, list) else paths
    encode = settings.get("encode")
    if isinstance(encode, dict) and isinstance(encode.get("sts"), dict):
        encode["sts"] = {language: resolve(path) for language, path in encode["sts"].items()}
    for section, key in SINGLE_PATHS:
        if isinstance(settings.get(section), dict) and key in settings[section]:
            settings[section][key] = resolve(settings[section][key])
    train = settings.get("train")
    for key in ("model", "guide"):
        if isinstance(train, dict) and isinstance(train.get(key), str):
            # A hub name such as a/b looks like a relative path: only a folder that is there, or one
            # written as a path (./, ../, /, ~), is taken as one.
            model = train[key]
            if model.startswith((".", "/", "~")) or (folder / model).is_dir():
                train[key] = resolve(model)


def _say(section: str, error: ValidationError) -> str:
    """pydantic's complaint in our words: key, value, what is wanted."""
    first = error.errors()[0]
    place = _place(SECTIONS[section], first["loc"])
    if first["type"] == "value_error":  # ours, of a whole section or of settings below a setting
        return f"{'.'.join([section, *map(str, place)])}{': ' if place else '.'}{first['ctx']['error']}"
    if first["type"] == "unexpected_keyword_argument":
        known = ", ".join(field.name for field in dataclasses.fields(SECTIONS[section]))
        return f"{section}.{first['loc'][0]} is not a setting; known: {known}"
    # A union's complaints stand beside each other; those of another entry of a mapping do not belong here.
    of_this_key = [
        e["msg"][0].lower() + e["msg"][1:] for e in error.errors() if e["loc"][: len(place)] == place
    ]
    wanted = " or ".join(dict.fromkeys(of_this_key)).replace("valid tuple", "list")
    wanted = re.sub(r"an instance of \w+|a valid dictionary", "a mapping", wanted)
    if first["type"] == "string_type" and isinstance(first["input"], dict):
        wanted += ": put it in quotes, a colon makes it a mapping"
    elif (first["type"] == "string_type" and isinstance(first["input"], int | float)) or (
        "datetime.date" in repr(first["input"])  # YAML makes dates of what looks like one
    ):
        wanted += ": put it in quotes"
    return f"{'.'.join([section, *map(str, place)])} is {first['input']!r}; {wanted}"


def _place(kind: Any, loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The settings that a complaint's place names; a list's numbers and a union's choices are none."""
    if not loc:
        return ()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        types = {field.name: field.type for field in dataclasses.fields(kind)}
        return loc[:1] + _place(types[loc[0]], loc[1:]) if loc[0] in types else ()
    if get_origin(kind) is dict:
        return loc[:1] + _place(get_args(kind)[1], loc[1:])
    return next((found for inner in get_args(kind) if (found := _place(inner, loc))), ())
