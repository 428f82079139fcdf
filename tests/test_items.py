"""Items: what a CSV must say and where it is wrong, and which of them a query finds."""

import csv
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from serving.items import BELOW, CLOSED, MATCH, Item, Items

HEADER = "document_id,path,open,threshold,memo,phrase\n"
AXES = {"east": [1, 0], "north": [0, 1], "between": [0.6, 0.8], "west": [-1, 0]}


def read(tmp_path, content: str | bytes) -> Items:
    path = tmp_path / "items.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Items.read(path)


def fault(tmp_path, content: str | bytes) -> str:
    with pytest.raises(InputError) as raised:
        read(tmp_path, content)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def embedded(*items: Item) -> Items:
    """Stands in for an encoder: a phrase is a direction of the compass."""
    made = Items(items)
    made.embedded(np.array([AXES[phrase] for phrase in made.phrases], np.float32))
    return made


def vector(direction: str) -> np.ndarray:
    return np.array(AXES[direction], np.float32)


# --- Reading ---------------------------------------------------------------------------------------------


def test_one_row_a_phrase_makes_one_item_of_rows_with_one_id(tmp_path):
    items = read(
        tmp_path,
        HEADER
        + "refund,Shop > Returns,yes,0.71,since spring,I want my money back\n"
        + "hours,/hours,no,,,when are you open\n"
        + "refund,,,,,return a parcel\n",
    )
    phrases = ("I want my money back", "return a parcel")
    assert items.items == (
        Item("refund", phrases, "Shop > Returns", True, 0.71, "since spring"),
        Item("hours", ("when are you open",), "/hours", False, None, ""),
    )
    assert items.phrases == ["I want my money back", "return a parcel", "when are you open"]


def test_phrases_can_share_a_cell_and_the_other_columns_can_be_missing(tmp_path):
    items = read(tmp_path, "phrases,document_id\nhello | good day||hello,greeting\n")
    assert items.items == (Item("greeting", ("hello", "good day"), "", True, None, ""),)


@pytest.mark.parametrize(
    ("word", "is_open"),
    [("true", True), ("1", True), ("Yes", True), ("FALSE", False), ("0", False), ("no", False)],
)
def test_open_has_six_words(tmp_path, word, is_open):
    assert read(tmp_path, f"document_id,open,phrase\na,{word},hello\n").items[0].open is is_open


def test_a_byte_order_mark_and_any_line_ends_are_read(tmp_path):
    content = "\ufeffdocument_id,phrase\r\na,한국어\r\n\r\nb,नमस्ते\r\n"
    assert read(tmp_path, content).phrases == ["한국어", "नमस्ते"]
    assert read(tmp_path, "document_id,phrase\ra,🙂\r").phrases == ["🙂"]


def test_a_cell_in_quotes_holds_commas_quotes_and_lines(tmp_path):
    assert read(tmp_path, 'document_id,phrase\na,"one, ""two""\nthree"\n').phrases == ['one, "two"\nthree']


def test_a_header_alone_is_a_file_without_items(tmp_path):
    items = read(tmp_path, HEADER)
    items.embedded(np.empty((0, 2), np.float32))
    assert items.listed() == []
    assert items.matches(vector("east"), 5) == []


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (",/x,yes,0.5,,hello\n", r"line 2 has no document_id"),
        ("\u200b,/x,yes,0.5,,hello\n", r"line 2 has no document_id"),
        ("a,/x,yes,0.5,, \n", r"line 2: 'a' has no phrase"),
        ("a,/x,open,0.5,,hello\n", r"line 2: open is 'open', wanted true, yes, 1, false, no, 0"),
        ("a,/x,,0.5,,hello\n", r"line 2: open is empty, wanted true"),
        ("a,/x,yes,71,,hello\n", r"line 2: threshold is '71', wanted a score from -1 to 1"),
        ("a,/x,yes,nan,,hello\n", r"line 2: threshold is 'nan'"),
        ('a,/x,yes,"0,71",,hello\n', r"line 2: threshold is '0,71', .*; write a point, not a comma"),
        ("a,/x,yes,0.5,,hello, you\n", r"line 2 has 7 cells, the header has 6"),
        ("a,/x,yes\n", r"line 2 has 3 cells, the header has 6"),
        ('a,/x,yes,0.5,,"hello\n', r"line 2: .*; check the quotes"),
        ('a,/x,yes,0.5,"two\nlines",hello\nb,/x,perhaps,,,hi\n', r"line 4: open is 'perhaps'"),
    ],
)
def test_a_fault_names_its_file_and_line(tmp_path, rows, said):
    message = fault(tmp_path, HEADER + rows)
    assert message.startswith(f"{tmp_path / 'items.csv'}: ")
    with pytest.raises(InputError, match=said):
        raise InputError(message)


@pytest.mark.parametrize(
    ("column", "first", "second"), [("path", "/x", "/y"), ("open", "yes", "0"), ("threshold", "0.5", "0.6")]
)
def test_rows_of_one_item_must_agree(tmp_path, column, first, second):
    message = fault(tmp_path, f"document_id,{column},phrase\na,{first},hello\nb,{second},x\na,{second},hi\n")
    assert f"line 4: the {column} of 'a' is '{second}', and line 2 says '{first}'" in message


def test_rows_that_say_the_same_in_other_words_agree(tmp_path):
    rows = (
        "document_id,open,threshold,memo,phrase\na,yes,0.5,one,hello\na,1,.50,two,hi\na,TRUE,5e-1,one,hey\n"
    )
    assert read(tmp_path, rows).items == (Item("a", ("hello", "hi", "hey"), "", True, 0.5, "one; two"),)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("document_id,phrase,treshold", "line 1: 'treshold' is no column of items; known: document_id, path"),
        ("id,phrase", "'id' is no column of items"),
        ("path,phrase", "there is no column document_id"),
        ("document_id,path", "it has neither"),
        ("document_id,phrase,phrases", "it has both"),
        ("document_id,phrase,phrase", "the column phrase is there twice"),
        ("document_id;phrase", "save it with commas between the cells"),
    ],
)
def test_a_header_is_refused_by_what_is_wrong_with_it(tmp_path, header, said):
    assert said in fault(tmp_path, f"{header}\na,b\n")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("document_id,phrase\na,hello\n".encode("utf-16"), "this is UTF-16, wanted UTF-8; save it as UTF-8"),
        ("document_id,phrase\na,안녕\n".encode("cp949"), "line 2 is not UTF-8"),
        (b"document_id,phrase\na,b\0\n", "line 2 holds a zero byte"),
        (b"", "it is empty, wanted a CSV"),
        (b"\n \n", "it is empty"),
    ],
)
def test_another_encoding_is_refused_with_what_to_do(tmp_path, content, said):
    assert said in fault(tmp_path, content)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"none\.csv: No such file or directory; check the path"):
        Items.read(tmp_path / "none.csv")


CELLS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12
).map(str.strip)
SHOWN_CELLS = CELLS.filter(lambda cell: any(c.isprintable() and not c.isspace() for c in cell))
ITEMS = st.builds(
    Item,
    document_id=SHOWN_CELLS,
    phrases=st.lists(SHOWN_CELLS, min_size=1, max_size=4, unique=True).map(tuple),
    path=CELLS | st.just(""),
    open=st.booleans(),
    threshold=st.none() | st.floats(-1, 1),
    memo=CELLS | st.sampled_from(["", "=1+1", 'a "b", c | d\r\ne']),
)


def as_csv(items) -> bytes:
    """A row for each phrase."""
    file = io.StringIO(newline="")
    write = csv.writer(file)
    write.writerow(["document_id", "path", "open", "threshold", "memo", "phrase"])
    for item in items:
        threshold = "" if item.threshold is None else repr(item.threshold)
        given = [item.document_id, item.path, str(item.open).lower(), threshold, item.memo]
        write.writerows([*given, phrase] for phrase in item.phrases)
    return file.getvalue().encode()


@settings(max_examples=80)
@given(st.lists(ITEMS, max_size=5, unique_by=lambda item: item.document_id))
def test_what_is_written_is_read_as_the_same_items(tmp_path_factory, items):
    path = tmp_path_factory.getbasetemp() / "round_trip.csv"
    path.write_bytes(as_csv(items))
    assert Items.read(path).items == tuple(items)


@settings(max_examples=80)
@given(
    st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: f"{HEADER}{text}".encode("utf-8", "replace"))
)
def test_any_bytes_are_items_or_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(content)
    try:
        items, said = Items.read(path).items, ""
    except InputError as error:
        items, said = (), str(error)
    assert "\n" not in said
    assert all(item.document_id and item.phrases for item in items)


# --- Finding ---------------------------------------------------------------------------------------------


def test_an_item_comes_once_and_by_its_best_phrase():
    items = embedded(Item("a", ("west", "between", "north")), Item("b", ("east",)))
    found = items.matches(vector("north"), 10)
    assert [(each.item.document_id, each.phrase, each.score) for each in found] == [
        ("a", "north", 1.0),
        ("b", "east", 0.0),
    ]


def test_a_closed_item_is_never_a_match_and_takes_nobody_s_place():
    items = embedded(Item("closed", ("east",), open=False), Item("b", ("between",)))
    assert [each.item.document_id for each in items.matches(vector("east"), 1)] == ["b"]


@pytest.mark.parametrize(("threshold", "n_found"), [(0.59, 1), (0.61, 0), (None, 1), (-1.0, 1)])
def test_an_item_is_no_match_below_its_own_threshold(threshold, n_found):
    # (1, 0) times (0.6, 0.8) is 0.6
    items = embedded(Item("a", ("between",), threshold=threshold))
    assert len(items.matches(vector("east"), 1)) == n_found


def test_a_score_that_is_the_threshold_is_a_match():
    assert embedded(Item("a", ("north",), threshold=1.0)).matches(vector("north"), 1)


def test_trying_a_phrase_shows_why_an_item_is_no_match():
    items = embedded(
        Item("low", ("between",), threshold=0.9),
        Item("shut", ("east",), open=False),
        Item("fine", ("north",)),
    )
    tried = items.tried(vector("east"), 10)
    assert [(each.item.document_id, each.verdict) for each in tried] == [
        ("shut", CLOSED),
        ("low", BELOW),
        ("fine", MATCH),
    ]
    assert [each.item.document_id for each in items.tried(vector("east"), 1)] == ["shut"]


def test_equal_items_come_in_the_file_s_order():
    items = embedded(Item("z", ("east",)), Item("a", ("east",)), Item("m", ("east",)))
    assert [each.item.document_id for each in items.matches(vector("east"), 2)] == ["z", "a"]


def test_every_item_is_listed_closed_ones_too():
    items = Items([Item("a", ("hello", "hi"), "/a", False, 0.71, "a memo")])
    assert items.listed() == [
        {
            "document_id": "a",
            "path": "/a",
            "open": False,
            "threshold": 0.71,
            "memo": "a memo",
            "phrases": ["hello", "hi"],
        }
    ]


@pytest.mark.parametrize("vectors", [[[1, 0]], [[1, 0], [0, np.nan]], [1, 0]])
def test_vectors_that_are_not_the_phrases_are_refused(vectors):
    with pytest.raises(ValueError, match="each of 2 phrases"):
        Items([Item("a", ("hello", "hi"))]).embedded(np.array(vectors, np.float32))


def test_items_without_vectors_say_so():
    with pytest.raises(ValueError, match="no vectors yet"):
        Items([Item("a", ("hello",))]).matches(vector("east"), 1)


SIXTHS = st.integers(-6, 6).map(lambda n: n / 6)


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(SIXTHS, SIXTHS), min_size=1, max_size=3), st.booleans(), st.none() | SIXTHS
        ),
        max_size=6,
    ),
    st.integers(0, 4),
)
def test_the_matches_are_those_of_the_definition(given_items, k):
    # by definition: score of the best phrase, open, at its threshold or above, best first, then file order
    items = Items(
        [
            Item(f"{n}", tuple(f"{n}.{p}" for p in range(len(rows))), "", is_open, threshold)
            for n, (rows, is_open, threshold) in enumerate(given_items)
        ]
    )
    vectors = np.array([row for rows, _, _ in given_items for row in rows], np.float32).reshape(-1, 2)
    items.embedded(vectors)
    scores = [max(float(np.float32(x)) for x, _ in rows) for rows, _, _ in given_items]
    wanted = sorted(
        (-scores[n], n)
        for n, (_, is_open, threshold) in enumerate(given_items)
        if is_open and (threshold is None or scores[n] >= threshold)
    )
    found = items.matches(np.array([1, 0], np.float32), k)
    assert [(each.item.document_id, each.score) for each in found] == [(f"{n}", -s) for s, n in wanted[:k]]
