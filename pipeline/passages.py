"""Long documents in overlapping passages: what a word is in any script, and a row a passage.

A word is a run of letters without spaces. Scripts that put none between their words are counted by letters:
two of Han and Kana, four of Thai, Lao, Burmese and Khmer, about what their words have. A run that goes on
for longer than any word does (an address, base64) counts again every MAX_LETTERS.
"""

import itertools
import re
import sys
import unicodedata
from collections.abc import Iterator
from functools import cache

import numpy as np
import pyarrow as pa

from pipeline.config import EncodeConfig
from pipeline.errors import InputError

PASSAGE = "passage"  # column: number of the passage in its document, from 0
MAX_LETTERS = 100
HAN_AND_KANA = (
    "\u3001-\u30ff\u31f0-\u31ff\uff01-\uff9f"  # with their punctuation, which stands where spaces would
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
PLAIN = re.compile(rf"\S{{1,{MAX_LETTERS}}}")
SOUTH_EAST_ASIAN = "\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff"


def cut(text: str, n_words: int, overlap: int) -> list[str]:
    """The passages of a text, slices of it as it stands; together they hold every word.

    Takes time and memory in proportion to the text, whatever is in it.

    Args:
        n_words: of a passage, fewer in the last one.
        overlap: words that a passage shares with the one before, fewer than `n_words`.

    Returns:
        At least one; a text of at most `n_words` words is one passage and unchanged.
    """
    step = n_words - overlap
    starts: list[int] = []
    ends: list[int] = []
    end = 0
    for n, word in enumerate(words(text)):
        end = word.end()
        if n % step == 0:
            starts.append(word.start())
        if n >= n_words - 1 and (n - n_words + 1) % step == 0:
            ends.append(end)
    if not ends or ends == [end]:
        return [text]
    if ends[-1] < end:  # what is left behind the last whole passage
        ends.append(end)
    return [text[start:stop] for start, stop in zip(starts, ends, strict=False)]


def rows_of(batch: pa.RecordBatch | pa.Table, config: EncodeConfig) -> pa.Table:
    """The rows to encode of some documents: the documents themselves, or their passages.

    Args:
        batch: document_id, text and any further columns, which each passage gets too.

    Returns:
        The same columns, and with `passage_words` a column `passage`, int32; a document's rows follow each
        other.

    Raises:
        InputError: the documents have such a column of their own.
    """
    documents = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
    if config.passage_words is None:
        return documents
    if PASSAGE in documents.column_names:
        raise InputError(
            f"the documents have a column {PASSAGE!r}, which encode.passage_words makes: rename it in the "
            "documents file, or take encode.passage_words out"
        )
    texts = documents["text"]
    found = [cut(text.as_py(), config.passage_words, config.passage_overlap) for text in texts]
    counts = np.array([len(passages) for passages in found], np.int64)
    column = documents.schema.get_field_index("text")
    rest = documents.drop_columns(["text"]).take(np.repeat(np.arange(len(documents)), counts))
    passages = pa.chunked_array([pa.array([text for some in found for text in some], texts.type)], texts.type)
    numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = rest.add_column(column, documents.schema.field(column), passages)
    return rows.append_column(PASSAGE, pa.array(numbers, pa.int32()))


def words(text: str) -> Iterator[re.Match[str]]:
    """One word after the other; none ends inside what a reader sees as one letter."""
    special, any_script = patterns()
    return (any_script if special.search(text) else PLAIN).finditer(text)


@cache
def patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Finds a sign that `PLAIN` might cut wrongly; finds words of any script, about ten times slower."""
    characters = map(chr, range(sys.maxunicode + 1))
    is_mark = itertools.groupby(characters, lambda c: unicodedata.category(c).startswith("M"))
    runs = [list(run) for found, run in is_mark if found]
    marks = "".join(f"{run[0]}-{run[-1]}" for run in runs)
    joined = f"{marks}\U0001f3fb-\U0001f3ff\u200d"  # and what emoji of several signs are joined by
    further = f"(?:[{joined}]|(?<=\u200d)\\S)*+"
    without_spaces = HAN_AND_KANA + SOUTH_EAST_ASIAN
    kinds = ((f"[{HAN_AND_KANA}]", 2), (f"[{SOUTH_EAST_ASIAN}]", 4), (f"[^\\s{without_spaces}]", MAX_LETTERS))
    any_script = "|".join(f"(?:{letter}{further}){{1,{most}}}+" for letter, most in kinds)
    # All signs beyond 16 bits as one range: `re` looks up each range of those after the other.
    special = re.sub("[\U00010000-\U0010ffff]-.", "", without_spaces + joined) + "\U00010000-\U0010ffff"
    return re.compile(f"[{special}]"), re.compile(any_script)
