"""Agreement of dot products with people's scores, a language at a time."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.artifacts import Embeddings, writing
from pipeline.errors import ArtifactError
from pipeline.similarity import agreement, similarity_figures

# Unit vectors whose dot product with (1, 0) is their first number.
PRODUCTS = {"tuned": [0.0, 0.6, 0.8, 0.6, 0.8], "untuned": [0.8, 0.6, 0.0, 0.6, 0.8]}
LANGUAGES = ["ko", "ko", "ko", "en", "en"]
SCORES = [0.0, 0.2, 1.0, 1.0, 0.0]


def make(path, products=PRODUCTS, n=5) -> Embeddings:
    with writing(Embeddings, path, config={"n": n}, inputs=[]) as draft:
        table = {"language": LANGUAGES, "sentence1": ["a"] * 5, "sentence2": ["b"] * 5, "score": SCORES}
        pq.write_table(pa.table(table), draft.folder / "sts.parquet")
        for name, firsts in products.items():
            second = np.array([(x, np.sqrt(1 - x**2)) for x in firsts[:n]], np.float32)
            both = np.stack([np.tile(np.float32([1, 0]), (n, 1)), second], axis=1)
            np.save(draft.folder / f"sts-{name}.npy", both.reshape(2 * n, 2))
    return Embeddings.open(path)


def test_each_language_is_judged_by_its_own_sentences(tmp_path):
    figures = similarity_figures(make(tmp_path / "embeddings"))
    assert list(figures) == ["ko", "en"]
    assert (figures["ko"]["n"], figures["en"]["n"]) == (3, 2)
    # Korean: the same order as people's after tuning, the opposite before; English: the opposite both times
    assert figures["ko"]["tuned"]["spearman"] == 1.0
    assert figures["ko"]["untuned"]["spearman"] == -1.0
    assert figures["en"]["tuned"] == {"spearman": -1.0, "pearson": -1.0}


def test_pearson_is_the_linear_correlation(tmp_path):
    figures = similarity_figures(make(tmp_path / "embeddings"))
    # deviations of 0, 0.6, 0.8 are -7, 2, 5 fifteenths; of 0, 0.2, 1.0 they are -6, -3, 9 fifteenths
    wanted = (42 - 6 + 45) / np.sqrt((49 + 4 + 25) * (36 + 9 + 81))
    assert figures["ko"]["tuned"]["pearson"] == pytest.approx(wanted, abs=1e-6)


def test_only_models_that_encoded_the_sentences_are_there(tmp_path):
    assert set(similarity_figures(make(tmp_path / "two"))["ko"]) == {"n", "tuned", "untuned"}
    three = make(tmp_path / "three", PRODUCTS | {"published": PRODUCTS["tuned"]})
    assert set(similarity_figures(three)["ko"]) == {"n", "tuned", "untuned", "published"}


@pytest.mark.parametrize(("products", "scores"), [([0.1], [1.0]), ([0.5, 0.5], [0, 1]), ([0.1, 0.2], [1, 1])])
def test_where_there_is_no_order_there_is_no_correlation(products, scores):
    assert agreement(np.array(products), np.array(scores)) == {"spearman": None, "pearson": None}


def test_without_sentences_there_are_no_figures(tmp_path):
    with writing(Embeddings, tmp_path / "embeddings", config={}, inputs=[]):
        pass
    assert similarity_figures(Embeddings.open(tmp_path / "embeddings")) == {}


def test_vectors_of_other_sentences_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"sts-tuned\.npy has 8 rows, wanted 10, two for each .* encode"):
        similarity_figures(make(tmp_path / "embeddings", n=4))
