"""Ready or not: a version is AVAILABLE, and a known query is answered.

The status code of `GET /v1/models/M` is no sign of it: it is 200 in any state.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import InputError
from serving.client import Client, Found
from serving.errors import ServingError


def probe(client: Client, vector: Sequence[float], version: int | None = None) -> str:
    """Check a server once.

    Args:
        vector: a query that the index must answer.
        version: must be the one that is served; None takes the newest that is AVAILABLE.

    Returns:
        One line that says what answered.

    Raises:
        ServingError: not ready, and why.
    """
    available = client.available_version()
    if version is not None and available != version:
        raise ServingError(f"{client.url}: version {available} is served, wanted {version}")
    found = _search(client, vector, available)
    _check(found)
    newer = _broken(client, available)
    return f"ready: version {available} answered a query with {len(found.rows)} documents{newer}"


def unit_vector(dim: int) -> list[float]:
    """A query for an index of which only the width is known."""
    return [1 / math.sqrt(dim)] * dim


def read_query(path: Path) -> list[float]:
    """A query from a request body such as `python -m serving ask --body` prints: {"inputs": [...]}.

    Raises:
        InputError: no such file, or something else in it.
    """
    try:
        vector = json.loads(path.read_text(encoding="utf-8"))["inputs"]
        if not isinstance(vector, list) or not vector:
            raise TypeError
        return [float(value) for value in vector]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f'{path}: wanted {{"inputs": [numbers]}}') from None


def _search(client: Client, vector: Sequence[float], version: int) -> Found:
    try:
        return client.predict(vector, version)
    except ServingError as error:
        if error.status != 400:
            raise
        raise ServingError(
            f"{error}; the query has {len(vector)} numbers: set --dim or --query", 400
        ) from None


def _check(found: Found) -> None:
    if not found.rows:
        raise ServingError("a query was answered with no document")
    if not all(isinstance(score, float) and math.isfinite(score) for score in found.scores):
        raise ServingError(f"a query was answered with scores that are no numbers: {found.scores[:3]}")


def _broken(client: Client, available: int) -> str:
    """A newer version that failed is no reason to stop sending queries, but somebody should know."""
    for row in client.status():
        if int(row["version"]) > available and row["status"]["error_code"] != "OK":
            said = " ".join(row["status"]["error_message"].split())
            return f"; but version {row['version']} could not be loaded: {said}"
    return ""
