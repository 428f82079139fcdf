"""Ask a running index in words: encode a text as the served version's documents were, show what it found.

The served folder is FOLDER/models/<model_name>/<version>/; that version's encoder is
FOLDER/encoders/<sha256>/, named by `encoder_sha256` in the version's assets.extra/manifest.json. A document
with a `threshold` is a match from that score on only. One that was encoded in passages is shown once, at the
place of the passage found first.
"""

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from pipeline.errors import InputError
from serving.client import Client, Found, body_of, call_body, numbers
from serving.errors import ServingError
from serving.published import PASSAGE, PublishedVersion

TITLE_WIDTH = 72  # of a table that fits a terminal


def ask(client: Client, model_base_path: Path, text: str, k: int | None = None) -> str:
    """What the served index finds for a text, as a table for people.

    Args:
        k: documents to show; None for as many as the version answers with. The index answers with rows: fewer
            documents remain where several of them are one document's passages.

    Raises:
        ServingError: no server, or it refuses.
        ArtifactError: the version's folder, encoder or documents are missing.
        InputError: the text is empty, or k is more than the version answers with.
    """
    version = served_version(client, model_base_path)
    most = version.manifest.get("k")
    if k is not None and isinstance(most, int) and k > most:
        raise InputError(f"-k {k}: version {version.folder.name} answers with {most}; choose 1 to {most}")
    found = client.predict(encode(version, text), int(version.folder.name))
    return _heading(version) + _table(found, version.documents(found.rows), k)


def is_match(score: float, document: dict[str, Any]) -> bool:
    """Whether a score reaches the document's threshold; without one every score does."""
    threshold = document.get("threshold")
    return threshold is None or score >= threshold


def served_version(client: Client, model_base_path: Path) -> PublishedVersion:
    """The folder of the version that the server answers with; raises as `ask`."""
    return PublishedVersion(model_base_path, client.available_version())


def encode(version: PublishedVersion, text: str) -> list[float]:
    """The text's vector, unit length, by the version's own model; raises as `ask`."""
    if not text.strip():
        raise InputError("the text is empty; wanted some words to search for")
    folder = version.checked_encoder()
    from pipeline.encoder import Encoder  # loads PyTorch: seconds

    return Encoder.open(folder).queries([text])[0].tolist()


def request_body(version: PublishedVersion, text: str, signature_name: str, k: int | None = None) -> str:
    """The request that asks one signature for a text, with the settings that the version ships.

    Args:
        k: None for as many results as the version's `serving_default` gives.

    Raises:
        InputError: the text is empty, or `serving_default`, whose k is the version's, is given one.
        ArtifactError: as `encode`.
    """
    if signature_name == "serving_default":
        if k is not None:
            raise InputError(f"-k {k}: serving_default takes no k; choose --signature_name search or exact")
        return body_of(encode(version, text))
    return call_body(signature_name, inputs_of(version, signature_name, encode(version, text), k))


def inputs_of(
    version: PublishedVersion, signature_name: str, vector: Sequence[float], k: int | None = None
) -> dict[str, Any]:
    """What `search`, `exact` or `search_filtered` takes, at the version's settings; the filter keeps all."""
    settings = version.manifest.get("settings") or {}
    k = k or version.manifest.get("k") or 10
    inputs: dict[str, Any] = {"queries": [numbers(vector)], "k": k}
    if signature_name != "exact":
        # A version without a tree has neither number, and answers exactly whatever it is given.
        inputs["num_leaves_to_search"] = settings.get("num_leaves_to_search") or 1
        inputs["num_reordering_candidates"] = max(k, settings.get("num_reordering_candidates") or k)
    if signature_name == "search_filtered":
        inputs |= {"allowed_document_ids": [], "excluded_document_ids": [], "minimum_score": -1.0}
    return inputs


def _heading(version: PublishedVersion) -> str:
    description = version.manifest.get("description")
    return f"version {version.folder.name}" + (f", {description}" if description else "") + "\n"


def _table(found: Found, documents: list[dict[str, Any]], k: int | None = None) -> str:
    """The first `k` matches: what stays below its own threshold takes nobody's place."""
    from tabulate import tabulate

    if not documents:
        raise ServingError("the index found no document")
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    for score, document in zip(found.scores, documents, strict=True):  # best first
        best.setdefault(document["document_id"], (score, document))
    matches = [(score, document) for score, document in best.values() if is_match(score, document)]
    if not matches:
        return _no_match(*max(best.values(), key=lambda each: each[0]))
    has_passages = any(isinstance(document.get(PASSAGE), int) for document in documents)
    headers = ["rank", "score", "document_id", "title"] + ["passage"] * has_passages
    width = TITLE_WIDTH // 2 if has_passages else TITLE_WIDTH
    lines = [
        [str(rank), f"{score:.4f}", _on_a_line(document["document_id"], width), title(document, width)]
        + [_on_a_line(document["text"], width)] * has_passages
        for rank, (score, document) in enumerate(matches[:k], start=1)
    ]
    align = ("right", "right", *["left"] * (len(headers) - 2))
    return tabulate(lines, headers, colalign=align, disable_numparse=True)


def _no_match(score: float, document: dict[str, Any]) -> str:
    nearest = _on_a_line(document["document_id"], TITLE_WIDTH)
    return (
        f"no match: the nearest, {nearest}, scores {score:.4f}, and its threshold is "
        f"{document['threshold']:.4f}"
    )


def title(document: dict[str, Any], width: int = TITLE_WIDTH) -> str:
    """A document's title on one line, or its text's first line; the end of a long one is left out."""
    return _on_a_line(document.get("title") or (document.get("text") or "").strip().partition("\n")[0], width)


def _on_a_line(text: str, width: int) -> str:
    """A text as a terminal shows it in one line: its control and direction marks could write elsewhere."""
    words = " ".join(text.split())
    shown = "".join(letter for letter in words if letter.isprintable())
    if len(shown) > width and " " not in shown[:width]:
        return f"{shown[: width - 1]}…"  # `shorten` would leave out the one word that there is
    return shorten(shown, width, placeholder=" …")
