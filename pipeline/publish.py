"""Stage `publish`: model + index + report -> the folder that TF Serving watches, or a refusal.

    FOLDER/encoders/<sha256>/                 the encoder first: a version names the one it was made with
    FOLDER/models/<model_name>/<version>/     then the version, in one rename: whole or not there

A version's assets.extra/ holds documents.parquet (row number -> document), related.parquet (what was read in
one session, and by how many), rows.npy (of small versions: the rows, float32, to search them without
TensorFlow), manifest.json (lineage and settings), report.json, and publication.json (when and as what; the
others are the same whatever the number).
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.artifacts import (
    SAID_OF_A_MODEL,
    Artifact,
    Embeddings,
    Index,
    Model,
    Pairs,
    Report,
    belong_together,
    encoder_sha256,
    file_hashes,
    fsync,
    locked,
    write_json,
)
from pipeline.config import PublishConfig
from pipeline.errors import ArtifactError, RefusedError
from pipeline.recall import shortfalls

LOCK = ".publish.lock"  # several work folders may publish into one place
STAGING = ".staging-"  # no whole number, so TF Serving does not look at it
MANIFEST, REPORT, PUBLICATION = "manifest.json", "report.json", "publication.json"
RELATED, ROWS = "related.parquet", "rows.npy"
ENCODER_LEFT_OUT = {"manifest.json", *SAID_OF_A_MODEL} - {"README.md"}  # the card goes along
INDEX_LEFT_OUT = {"manifest.json", "found.parquet"}
# What a version's manifest repeats of the report: what it keeps to, and what else a request may ask for.
CONTRACT_FIGURES = ("contract", "frontier", "builds", "by_language", "by_popularity", "not_reproducible")
# What single readers opened or asked; clients can read a version's folder.
PRIVATE_FIGURES = {"examples", "lost", "map"}


@dataclass(frozen=True)
class Beside:
    """What a version is given beside its index, for servers that search or recommend without TensorFlow.

    Attributes:
        embeddings: whose rows the index has; None: no rows.npy.
        pairs: whose sessions are counted; None: no related.parquet.
    """

    embeddings: Embeddings | None = None
    pairs: Pairs | None = None

    def made_of(self) -> list[Artifact]:
        return [made for made in (self.embeddings, self.pairs) if made is not None]


def run(
    config: PublishConfig,
    model: Model,
    index: Index,
    report: Report,
    folder: Path,
    beside: Beside | None = None,
) -> Path:
    """Publish a new version.

    Args:
        folder: holds encoders/ and models/; one mount, so that a rename is possible.

    Returns:
        The version's folder; the standing one where it already holds this index and model, and what was read
        together comes from the same sessions.

    Raises:
        ArtifactError: the report is of another index, model, pairs or embeddings.
        BusyError: another publication into this folder is under way.
        RefusedError: the index is below its contract or was not measured, or the model is worse than the
            one it was tuned from or the one it would replace, or was not compared with that one.
    """
    beside = beside or Beside()
    belong_together(report, model, index, *beside.made_of())
    with locked(Path(folder), LOCK):
        return _publish(config, model, index, report, Path(folder), beside)


def _publish(
    config: PublishConfig, model: Model, index: Index, report: Report, folder: Path, beside: Beside
) -> Path:
    served = folder / "models" / config.model_name
    served.mkdir(parents=True, exist_ok=True)
    _remove_staging(served)
    live = newest(served)
    if live and manifest_of(live)["digests"] == digests_of(model, index, beside):
        print(f"publish: version {live.name} holds this index already", file=sys.stderr)
        return live
    standing = Standing.of(live, folder / "encoders") if live else None
    check(report.figures(), standing, index.manifest["config"], model.encoder_sha256)
    copy_encoder(model, folder / "encoders")
    version = place(model, index, report, served, config, beside)
    retire(served, folder / "encoders", config.keep_versions)
    return version


@dataclass(frozen=True)
class Standing:
    """The version being served, as far as a new one is compared with it.

    Attributes:
        version: its number.
        report: its report.json.
        encoder_sha256: what its vectors were made with.
        has_encoder: whether that encoder is still there, as it was published.
    """

    version: str
    report: Mapping[str, Any]
    encoder_sha256: str
    has_encoder: bool

    @classmethod
    def of(cls, version: Path, encoders: Path) -> "Standing":
        sha256 = manifest_of(version)["encoder_sha256"]
        report = json.loads((version / "assets.extra" / REPORT).read_text(encoding="utf-8"))
        return cls(version.name, report, sha256, _damage(encoders / sha256) is None)


def check(
    figures: Mapping[str, Any], standing: Standing | None, wanted: Mapping[str, Any], encoder_sha256: str
) -> None:
    """Raise unless this version is good enough to be served.

    Args:
        figures: report.json of the new version.
        standing: the version being served, if any.
        wanted: what the index was built to reach: k, target_recall, target_latency_ms and memory_mib.
        encoder_sha256: the new version's encoder.

    Raises:
        RefusedError: a line for each figure that fell short: what it is, what was wanted, what to do.
    """
    short = [str(shortfall) for shortfall in shortfalls(figures["index"], wanted)]
    short += _against_untuned(figures["retrieval"])
    if standing and standing.encoder_sha256 != encoder_sha256:  # the same weights are no worse
        short += _against_standing(figures, standing)
    if short:
        raise RefusedError("not published: " + "\n  ".join(short))


def _against_untuned(retrieval: Mapping[str, Any]) -> Iterator[str]:
    ahead = retrieval.get("tuned_minus_untuned_at_20")
    if ahead and ahead["high"] < 0:
        yield f"retrieval.tuned_minus_untuned_at_20 is {_said(ahead)}: tuning made the model worse"


def _against_standing(figures: Mapping[str, Any], standing: Standing) -> Iterator[str]:
    """Where the new model is worse than the one being served: over the same pairs, by the encoder that is
    served now. Only where that cannot be had do the two reports' own figures count, of two sets of pairs.
    """
    new, old = _at_20(figures), _at_20(standing.report)
    if not new:
        if old:
            yield (
                "retrieval.tuned.accuracy_at_20 was not measured, and the served version's was "
                f"{old['mean']:.4f}: give an event log with later sessions"
            )
        return
    model = figures.get("model") or {}
    ahead = figures["retrieval"].get("tuned_minus_published_at_20")
    if ahead and model.get("published") == standing.encoder_sha256:
        if ahead["high"] < 0:
            yield (
                f"retrieval.tuned_minus_published_at_20 is {_said(ahead)}: the new model is worse than the "
                f"published one (version {standing.version})"
            )
        return
    does_not_load = (model.get("published_left_out") or {}).get("encoder") == standing.encoder_sha256
    if standing.has_encoder and not does_not_load:
        yield (
            f"the report compares with {_named(model.get('published'))}, but version {standing.version}, "
            f"which is served, has {_named(standing.encoder_sha256)}: run encode --force, and the stages "
            "behind it again"
        )
        return
    yield from _unpaired(new, old, figures, standing)


def _unpaired(
    new: Mapping[str, float],
    old: Mapping[str, float] | None,
    figures: Mapping[str, Any],
    standing: Standing,
) -> Iterator[str]:
    """By the two reports' intervals, where both asked the same kind of queries."""
    of = f"version {standing.version}, which is served,"
    gone = f"publish: the encoder of {of} is gone, was changed or does not load"
    if old is None or _asked(figures) != _asked(standing.report):
        print(f"{gone}, and its report asked something else: not compared", file=sys.stderr)
        return
    print(f"{gone}: compared by the figures of the two reports", file=sys.stderr)
    if new["high"] < old["low"]:
        yield (
            f"retrieval.tuned.accuracy_at_20 is {new['mean']:.4f} (at most {new['high']:.4f}), the served "
            f"version's was {old['mean']:.4f} (at least {old['low']:.4f}): the new model is worse"
        )


def _at_20(figures: Mapping[str, Any]) -> dict[str, float] | None:
    return ((figures.get("retrieval") or {}).get("intervals") or {}).get("tuned_at_20")


def _asked(figures: Mapping[str, Any]) -> str:
    """What the main figures' queries are; documents in reports that do not say."""
    return (figures.get("retrieval") or {}).get("asked") or "documents"


def _said(difference: Mapping[str, float]) -> str:
    mean, low, high = (f"{difference[end]:.4f}" for end in ("mean", "low", "high"))
    return f"{mean} (95 % interval {low} to {high})"


def _named(encoder_sha256: str | None) -> str:
    return f"encoder {encoder_sha256[:12]}" if encoder_sha256 else "no published encoder"


def digests_of(model: Model, index: Index, beside: Beside) -> dict[str, str]:
    """What tells one version from the next: a kept model's index may be the same while people read on."""
    return {made.kind: made.digest for made in (model, index, *beside.made_of())}


def copy_encoder(model: Model, encoders: Path) -> Path:
    """Copy the model to encoders/<sha256>/ unless it is there, whole or not at all.

    Raises:
        ArtifactError: it is there, and was changed.
    """
    target = encoders / model.encoder_sha256
    if target.exists():
        if damage := _damage(target):
            raise ArtifactError(damage)
        return target
    encoders.mkdir(parents=True, exist_ok=True)
    _remove_staging(encoders)
    staging = encoders / f"{STAGING}{model.encoder_sha256}"
    shutil.copytree(model.path, staging, ignore=lambda _, names: ENCODER_LEFT_OUT & set(names))
    _sync(staging)
    staging.rename(target)
    fsync(encoders)
    return target


def place(
    model: Model, index: Index, report: Report, served: Path, config: PublishConfig, beside: Beside
) -> Path:
    """Copy the index beside the served versions, complete it, and rename it to its number."""
    version = next_version(served)
    staging = served / f"{STAGING}{version}"
    shutil.copytree(index.path, staging, ignore=_only_at_top(index.path, INDEX_LEFT_OUT))
    extra = staging / "assets.extra"
    extra.mkdir(exist_ok=True)
    write_json(extra / REPORT, {n: v for n, v in report.figures().items() if n not in PRIVATE_FIGURES})
    related = write_beside(config, beside, extra)
    write_json(extra / MANIFEST, lineage(model, index, report, staging, beside, related))
    published = {
        "version": version,
        "model_name": config.model_name,
        "published": _now().isoformat(timespec="seconds"),
    }
    write_json(extra / PUBLICATION, published)
    _sync(staging)
    target = served / str(version)
    if target.exists():
        raise ArtifactError(f"{target} is there already: another publication runs; try again")
    staging.rename(target)
    fsync(served)
    print(f"publish: {target}", file=sys.stderr)
    return target


def write_beside(config: PublishConfig, beside: Beside, extra: Path) -> dict[str, int] | None:
    """Write rows.npy and related.parquet, as far as they are wanted.

    Args:
        extra: holds documents.parquet, whose rows are the index's and the embeddings'.

    Returns:
        What related.parquet holds: rows, documents, min_readers, per_document.
    """
    rows_below, bounds = _limits_of(config)
    if beside.embeddings is not None and 0 < len(beside.embeddings.matrix()) <= rows_below:
        shutil.copyfile(beside.embeddings.path / "embeddings.npy", extra / ROWS)
    if beside.pairs is None:
        return None
    from pipeline import related  # polars: only where there is something to count

    document_ids = pq.read_table(extra / "documents.parquet", columns=["document_id"])["document_id"]
    return related.write(beside.pairs, document_ids, extra / RELATED, **bounds) | bounds


def _limits_of(config: PublishConfig) -> tuple[int, dict[str, int]]:
    """The most rows of a version that gets rows.npy, and what `related.write` keeps to."""
    bounds = {
        "min_readers": config.min_related_readers,
        "per_document": config.related_per_document,
    }
    return config.rows_below, bounds


def lineage(
    model: Model, index: Index, report: Report, staging: Path, beside: Beside, related: dict[str, int] | None
) -> dict[str, Any]:
    """What a version says of itself: where it came from, how it is searched, what it measured."""
    figures = report.figures()
    measured = figures["index"]
    return {
        "format": 1,
        "encoder_sha256": model.encoder_sha256,
        "base_model": model.facts["base_model"],
        "trained": model.facts["trained"],
        "prompts": model.facts["prompts"],
        "description": figures["description"],
        "dim": index.facts["dim"],
        "k": index.facts["settings"]["k"],
        "layer": index.facts["layer"],
        "settings": index.facts["settings"],
        "recall_at_10": measured["recall_at_10"],
        **{name: measured.get(name) for name in CONTRACT_FIGURES},
        "related": related,
        "digests": digests_of(model, index, beside),
        "inputs": {a.kind: a.manifest["inputs"] for a in (model, index, report)},
        "rows": index.rows,
        "libraries": index.manifest["libraries"] | model.manifest["libraries"],
        "files": file_hashes(staging),
    }


def next_version(served: Path) -> int:
    """UTC time as an integer, always larger than every version there."""
    now = int(_now().strftime("%Y%m%d%H%M%S"))
    return max([now, *(int(path.name) + 1 for path in versions(served))])


def versions(served: Path) -> list[Path]:
    """Version folders, oldest first: those whose whole name is a number."""
    found = [path for path in served.iterdir() if path.is_dir() and path.name.isdecimal()]
    return sorted(found, key=lambda path: int(path.name))


def newest(served: Path) -> Path | None:
    found = versions(served)
    return found[-1] if found else None


def manifest_of(version: Path) -> dict[str, Any]:
    """Lineage of a version that this stage published.

    Raises:
        ArtifactError: something else wrote it.
    """
    try:
        manifest = json.loads((version / "assets.extra" / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        manifest = None
    if not _is_ours(manifest):
        raise ArtifactError(
            f"{version} has no assets.extra/{MANIFEST} that names its encoder_sha256 and digests: it was not "
            "published by this pipeline; set publish.folder or publish.model_name to a place of its own"
        )
    return manifest


def _is_ours(manifest: Any) -> bool:
    return (
        isinstance(manifest, dict)
        and isinstance(manifest.get("digests"), dict)
        and re.fullmatch("[0-9a-f]{64}", str(manifest.get("encoder_sha256"))) is not None
    )


def served_encoder(folder: Path, model_name: str) -> Path | None:
    """The encoder of the newest version, which a new one is compared with.

    Args:
        folder: as in `run`.

    Returns:
        None where nothing was published yet; an encoder that is gone or was changed is left out too, and
        this is said.

    Raises:
        ArtifactError: something else wrote that version.
    """
    served = folder / "models" / model_name
    version = newest(served) if served.is_dir() else None
    if version is None:
        return None
    encoder = folder / "encoders" / manifest_of(version)["encoder_sha256"]
    damage = _damage(encoder)
    if damage:
        print(
            f"encode: no comparison with the published model (version {version.name}): {damage}",
            file=sys.stderr,
        )
        return None
    return encoder


def _damage(encoder: Path) -> str | None:
    """Why a folder is not the encoder that it is named after; None where it is."""
    if not encoder.is_dir():
        return f"{encoder} is gone; put it back"
    found = encoder_sha256(file_hashes(encoder))
    if found != encoder.name:
        return f"{encoder} was changed (its files' hash is {found[:12]}); put it back as it was published"
    return None


def retire(served: Path, encoders: Path, keep_versions: int) -> None:
    """Remove versions beyond the newest `keep_versions`, then encoders that none of the kept names."""
    for old in versions(served)[:-keep_versions]:
        # Renamed first: a half-deleted version must not be looked at.
        leaving = served / f"{STAGING}old-{old.name}"
        old.rename(leaving)
        shutil.rmtree(leaving)
    named = {
        manifest_of(version)["encoder_sha256"]
        for model in served.parent.iterdir()
        if model.is_dir()
        for version in versions(model)
        if (version / "assets.extra" / MANIFEST).exists()  # another model's versions may be foreign
    }
    for encoder in encoders.iterdir():
        if encoder.is_dir() and encoder.name not in named and not encoder.name.startswith(STAGING):
            shutil.rmtree(encoder)


def _now() -> datetime:
    return datetime.now(UTC)


def _remove_staging(folder: Path) -> None:
    """What a killed publication left; nobody reads it."""
    for left in folder.glob(f"{STAGING}*"):
        shutil.rmtree(left)


def _only_at_top(top: Path, names: set[str]) -> Any:
    return lambda folder, there: names & set(there) if Path(folder) == top else set()


def _sync(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            fsync(Path(root) / name)
        fsync(Path(root))
