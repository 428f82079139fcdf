"""How well dot products agree with people on how alike two sentences are: what tuning made a model forget."""

from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.artifacts import Embeddings
from pipeline.bootstrap import number
from pipeline.errors import ArtifactError

MODELS = ("tuned", "untuned", "published")


def similarity_figures(embeddings: Embeddings) -> dict[str, Any]:
    """Spearman and Pearson of every model for every language of sts.parquet; {} where there is none.

    Returns:
        {language: {"n": pairs, "tuned": {"spearman", "pearson"}, ...}}, the languages in the file's order.

    Raises:
        ArtifactError: the vectors are not those of the sentences.
    """
    path = embeddings.path / "sts.parquet"
    if not path.exists():
        return {}
    table = pq.read_table(path, columns=["language", "score"])
    language, score = table["language"].to_numpy(), table["score"].to_numpy()
    products = dot_products(embeddings, len(table))
    return {
        name: {
            "n": int((language == name).sum()),
            **{model: agreement(of[language == name], score[language == name]) for model, of in products},
        }
        for name in dict.fromkeys(language.tolist())
    }


def dot_products(embeddings: Embeddings, n: int) -> list[tuple[str, np.ndarray]]:
    """(model, float32 (n,)) of every model that encoded the sentences."""
    products = []
    for model in MODELS:
        path = embeddings.path / f"sts-{model}.npy"
        if not path.exists():
            continue
        vectors = np.load(path)
        if len(vectors) != 2 * n:
            raise ArtifactError(
                f"{path} has {len(vectors)} rows, wanted {2 * n}, two for each of sts.parquet: "
                "run stage encode again"
            )
        products.append((model, (vectors[::2] * vectors[1::2]).sum(axis=1)))
    return products


def agreement(products: np.ndarray, scores: np.ndarray) -> dict[str, float | None]:
    """Rank and linear correlation; null where all values of a side are equal, which no order agrees with."""
    from scipy.stats import pearsonr, spearmanr

    if len(scores) < 2 or np.ptp(products) == 0 or np.ptp(scores) == 0:
        return {"spearman": None, "pearson": None}
    return {
        "spearman": number(spearmanr(products, scores).statistic),
        "pearson": number(pearsonr(products, scores).statistic),
    }
