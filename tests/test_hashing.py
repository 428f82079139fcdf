"""The hashes of `pairs` against their published outputs: whoever has the papers gets the same pairs."""

import numpy as np
import polars as pl
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from pipeline.hashing import mix, stable_hash

GOLDEN = 0x9E3779B97F4A7C15  # what SplitMix64 adds to its state before each output
MASK = 2**64 - 1
NUMBERS = st.integers(0, MASK)


def hashes(texts: list[str | None]) -> list[int | None]:
    return (
        pl.DataFrame({"text": pl.Series(texts, dtype=pl.String)})
        .select(stable_hash("text"))["text"]
        .to_list()
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", 0xEF46DB3751D8E999), ("a", 0xD24EC4F1A98C6E5B), ("abc", 0x44BC2CF5AD770999)],
)
def test_a_text_has_its_published_xxh64(text, expected):
    assert hashes([text]) == [expected]


@given(st.lists(st.text(max_size=100), min_size=1))
def test_any_text_hashes_as_the_reference_library_hashes_its_utf8(texts):
    # more than 32 bytes take another way through XXH64 than fewer
    assert hashes(texts) == [xxhash.xxh64_intdigest(text.encode(), seed=0) for text in texts]


def test_no_text_is_not_an_empty_text():
    assert hashes([None, ""]) == [None, 0xEF46DB3751D8E999]


def test_texts_of_another_unicode_form_or_case_are_others():
    assert len(set(hashes(["é", "e\u0301", "É", "é "]))) == 4


@pytest.mark.parametrize(
    ("seed", "outputs"),
    [
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]),
        (
            1234567,
            [
                6457827717110365317,
                3203168211198807973,
                9817491932198370423,
                4593380528125082431,
                16408922859458223821,
            ],
        ),
    ],
)
def test_one_number_is_mixed_as_splitmix64_makes_its_outputs(seed, outputs):
    states = [(seed + n * GOLDEN) & MASK for n in range(len(outputs))]
    assert mix(np.array(states, np.uint64)).tolist() == outputs


def plain_mix(*parts: int) -> int:
    """SplitMix64's step, with each part folded into the state before it."""
    mixed = 0
    for part in parts:
        mixed = ((mixed ^ part) + GOLDEN) & MASK
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
        mixed ^= mixed >> 31
    return mixed


@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=5), NUMBERS)
def test_columns_and_single_numbers_mix_row_by_row(rows, seed):
    columns = [np.array(column, np.uint64) for column in zip(*rows, strict=True)]
    before = [column.copy() for column in columns]
    assert mix(np.uint64(seed), *columns).tolist() == [plain_mix(seed, *row) for row in rows]
    assert all((now == then).all() for now, then in zip(columns, before, strict=True))


def test_the_order_of_the_parts_matters():
    assert mix(np.uint64(1), np.uint64(2)) != mix(np.uint64(2), np.uint64(1))


def test_no_rows_mix_to_no_rows():
    assert mix(np.uint64(7), np.empty(0, np.uint64)).shape == (0,)
