"""Which precision documents are encoded at: the fastest one whose rows are found where float32's are."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import encoder
from pipeline.exact import exact_scores, exact_search, kth_scores
from pipeline.exact import recall_at_k as exact_recall
from pipeline.recall import K
from pipeline.throughput import windows_of

if TYPE_CHECKING:
    from pipeline.config import EncodeConfig
    from pipeline.encoder import Encoder

TRIED = ("bfloat16", "mixed")  # the fastest first
EXACT = "float32"
MAX_QUERIES = 5000  # of the sample: recall then varies by less than 0.001 from one sample to another
WORTH = 4  # times the sample: with fewer rows the check costs about what it can save


def choose(
    open_at: Callable[[str], Encoder],
    texts: Callable[[int], list[str]],
    n_rows: int,
    config: EncodeConfig,
    before: Mapping[str, Any] | None,
) -> tuple[str, dict[str, Any]]:
    """The precision of documents, and why; said on stderr too. One encoder is in memory at a time.

    Args:
        open_at: the tuned model at a precision.
        texts: n sampled rows' texts.
        n_rows: that are to be had in all.
        before: facts of the version before where its verdict holds for these rows: its encoder and the
            guard's settings are this run's, and most rows are its own.

    Returns:
        "float32", "mixed" or "bfloat16", and facts.guard: {n_sample, n_queries, needed, tried: [{precision,
        recall_at_10, mean_cosine, min_cosine}], texts_a_second: {precision: rate}, carried}, or {reason}
        where nothing was tried.
    """
    precision, guard = _chosen(open_at, texts, n_rows, config, before)
    print(f"encode: precision {precision}: {_why(guard)}", file=sys.stderr, flush=True)
    return precision, guard


def _chosen(
    open_at: Callable[[str], Encoder],
    texts: Callable[[int], list[str]],
    n_rows: int,
    config: EncodeConfig,
    before: Mapping[str, Any] | None,
) -> tuple[str, dict[str, Any]]:
    if config.precision != "auto":
        return config.precision, {"reason": "encode.precision asks for it"}
    device = encoder.device_type(config.device)
    if not encoder.has_bfloat16(device):
        return EXACT, {"reason": f"this machine's {device} does not multiply bfloat16 itself"}
    if before is not None and (before.get("guard") or {}).get("tried"):
        return before["precision"], {**before["guard"], "carried": True}
    if n_rows < WORTH * config.guard_sample:
        limit = f"{WORTH} x encode.guard_sample = {WORTH * config.guard_sample:,}"
        return EXACT, {"reason": f"{n_rows:,} rows are fewer than {limit}: a check would cost what it saves"}
    return guarded(open_at, texts(config.guard_sample), config.guard_recall)


def guarded(
    open_at: Callable[[str], Encoder], texts: Sequence[str], needed: float
) -> tuple[str, dict[str, Any]]:
    """Try each precision on the same texts until one is good enough.

    Args:
        needed: recall@10 against float32, 0.0 to 1.0.

    Returns:
        As `choose`.
    """
    rates: dict[str, float] = {}
    exact, rates[EXACT] = _rows(open_at, EXACT, texts)
    queries = np.linspace(0, len(texts) - 1, min(len(texts), MAX_QUERIES)).astype(np.int64)
    guard: dict[str, Any] = {"n_sample": len(texts), "n_queries": len(queries), "needed": needed}
    guard |= {"tried": [], "texts_a_second": rates, "carried": False}
    for precision in TRIED:
        rows, rates[precision] = _rows(open_at, precision, texts)
        cosine = np.einsum("ij,ij->i", exact, rows)
        recall = recall_at_k(exact, rows, queries)
        guard["tried"].append(
            {
                "precision": precision,
                "recall_at_10": recall,
                "mean_cosine": float(cosine.mean()),
                "min_cosine": float(cosine.min()),
            }
        )
        if recall >= needed:
            return precision, guard
    return EXACT, guard


def recall_at_k(exact: np.ndarray, rows: np.ndarray, queries: np.ndarray, k: int = K) -> float:
    """Share of what exact search finds over `rows` that it would rightly have found over `exact`.

    Queries are rows of `exact`, their own row left out on both sides. What was found is right when its exact
    score reaches that of the exact k-th: of rows that tie for the last place any may be found.

    Args:
        exact: float32 (n, dim), unit length.
        rows: the same texts' rows to be judged, float32 (n, dim), unit length.
        queries: row numbers, int (n_queries,).

    Returns:
        Mean over the queries, 0.0 to 1.0.
    """
    k = min(k, len(exact) - 1)
    if k < 1:
        return 1.0
    asked = exact[queries]
    found, _ = exact_search(rows, asked, k, queries)
    kth = kth_scores(exact, asked, k, queries)
    return float(exact_recall(found, exact_scores(exact, asked, found), kth, k).mean())


def _rows(
    open_at: Callable[[str], Encoder], precision: str, texts: Sequence[str]
) -> tuple[np.ndarray, float]:
    """The texts' rows at a precision, and how many texts it encoded a second."""
    from tqdm import tqdm

    opened = open_at(precision)
    started = time.perf_counter()
    with tqdm(total=len(texts), desc=f"encode: try {precision}", unit="text", leave=False) as bar:
        rows = list(opened.windows(windows_of(texts), "document", done=bar.update))
    return np.concatenate(rows), round(len(texts) / (time.perf_counter() - started), 1)


def _why(guard: Mapping[str, Any]) -> str:
    if "reason" in guard:
        return str(guard["reason"])
    tried = ", ".join(f"{one['precision']} {one['recall_at_10']:.4f}" for one in guard["tried"])
    said = f"recall@10 against float32 over {guard['n_sample']:,} documents: {tried}"
    return f"{said}; {guard['needed']:g} is needed" + ", as the version before found" * guard["carried"]
