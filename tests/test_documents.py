"""Documents: read and checked, or made from what several readers highlighted."""

import io
import json

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import ColumnRule, ExcludeConfig
from pipeline.documents import counts_of, exclude, make, read, read_ids, unique
from pipeline.errors import InputError


def read_csv(body: str, **named) -> pl.DataFrame:
    settings = {"document_id": "document_id", "text": ["text"], "separator": " - ", "title": None}
    return read(io.BytesIO(body.encode()), "docs.csv", "csv", **(settings | named))


def test_text_is_joined_from_the_filled_columns():
    rows = read_csv("document_id,title,topic\na,Cat,animal\nb,Dog,\n", text=["title", "topic"])
    assert rows["text"].to_list() == ["Cat - animal", "Dog"]
    assert rows["topic"].to_list() == ["animal", None]


def test_a_title_is_the_named_column_or_the_first_line():
    assert read_csv("document_id,text,name\na,long text,Cat\n", title="name")["title"].to_list() == ["Cat"]
    assert read_csv('document_id,text\na,"first\nsecond"\n')["title"].to_list() == ["first"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("document_id,text\na,x\nb,\n", r"docs\.csv: row 3 \(document_id 'b'\) has no text"),
        ("document_id,text\n,x\n", r"docs\.csv: row 2 has no document_id"),
        ("id,text\na,x\n", r"docs\.csv: no column 'document_id'; it has: id, text"),
        ("", r"docs\.csv: empty"),
        ("document_id,text\na,x\nb,\u200b \u2060\n", r"row 3 \(document_id 'b'\) has no text; every"),
        ("document_id,text\n\na,x\n\nb,\nc,\n", r"row 5 \(document_id 'b'\) has no text, nor have 1 others"),
        ('document_id,text\na,"one\ntwo"\nb,y,z\n', r"row 3 has 3 fields, but the header names 2"),
        ('document_id,text\na,"x\nb,y\n', r"row 2 is not CSV: unexpected end of data; a quote"),
    ],
)
def test_a_document_that_cannot_be_found_by_is_refused(body, message):
    with pytest.raises(InputError, match=message):
        read_csv(body)


def test_a_threshold_is_kept_as_a_number_and_may_be_missing():
    rows = read_csv("document_id,text,threshold\na,x,0.5\nb,y,\nc,z, -1 \nd,w,1\n")
    assert rows["threshold"].to_list() == [0.5, None, -1.0, 1.0]
    with_one = read_csv("document_id,text,threshold\na,x,0.5\n")
    both = unique([("one", with_one), ("two", read_csv("document_id,text\nb,y\n"))])
    assert both["threshold"].to_list() == [0.5, None]


@pytest.mark.parametrize("value", ["1.01", "-2", "high", "nan", "inf", "0,5"])
def test_a_threshold_that_is_no_score_names_file_row_and_value(value):
    body = f'document_id,text,threshold\na,x,0.5\nb,y,"{value}"\nc,z,7\n'
    message = rf"docs\.csv: row 3 \(document_id 'b'\) has the threshold '{value}', and 1 others are wrong too"
    with pytest.raises(InputError, match=message):
        read_csv(body)


def test_a_list_is_no_threshold():
    line = b'{"document_id": "a", "text": "x", "threshold": [0.5]}'
    with pytest.raises(InputError, match=r"docs: column 'threshold' holds lists or objects"):
        read(
            io.BytesIO(line), "docs", "jsonl",
            document_id="document_id", text=["text"], separator="", title=None,
        )  # fmt: skip


def test_a_document_id_that_stands_twice_names_both_rows():
    one, other = read_csv("document_id,text\na,x\nb,y\n"), read_csv("document_id,text\nc,x\na,z\n")
    with pytest.raises(InputError, match=r"'a' stands twice: one\.csv row 2 and other\.csv row 3 \(1 ids"):
        unique([("one.csv", one), ("other.csv", other)])


def test_documents_come_in_the_order_of_their_ids_however_files_are_cut():
    one, other = read_csv("document_id,text\nb,y\n"), read_csv("document_id,text\nc,x\na,z\n")
    assert unique([("1", one), ("2", other)]).rows() == unique([("2", other), ("1", one)]).rows()


def test_no_documents_at_all_is_said():
    with pytest.raises(InputError, match="no documents in it"):
        unique([("docs.csv", read_csv("document_id,text\n"))])


def read_bytes(body: bytes, kind: str) -> pl.DataFrame:
    return read(io.BytesIO(body), "docs", kind, document_id="id", text=["text"], separator=" ", title=None)


def parquet(texts: pa.Array) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"id": [str(n) for n in range(len(texts))], "text": texts}), file)
    return file.getvalue()


LATIN_1 = "café".encode("latin-1")
INVALID = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", LATIN_1]).buffers())


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (
            b'id,text\na,"x\ny"\nb,' + LATIN_1,
            "csv",
            r"row 3 is not UTF-8 \(b'b,caf\\xe9'\): save the file as",
        ),
        (b'\n{"id":"a"}\n{"id":"' + LATIN_1, "jsonl", r"row 3 is not UTF-8 \(b'\{\"id\":\"caf\\xe9'\)"),
        (parquet(pa.array([b"ok", LATIN_1])), "parquet", r"row 2 \(b'caf\\xe9'\) of column 'text' is not"),
        (parquet(INVALID), "parquet", r"row 2 \(b'caf\\xe9'\) of column 'text' is not UTF-8"),
        ("id,text\na,x\n".encode("utf-16"), "csv", r"docs: not UTF-8; it seems to be UTF-16: save it as"),
        (b"\x1f\x8b\x08", "jsonl", r"it seems to be compressed: let its name end in \.gz"),
        (b'{"id":"a","text":"x"}\n\n{"id":', "jsonl", r"row 3 is not JSON: Expecting value at character 7;"),
        (b'[{"id":"a","text":"x"}]', "jsonl", r"row 1 is b'\[.*', wanted an object a line"),
        (
            b'{"id":"a","text":"x \\ud83d"}',
            "jsonl",
            r"row 1 holds half a character \(the lone surrogate \\ud83d",
        ),
        (b'{"id":"a","text":"x"}\n\n{"id":"b"}', "jsonl", r"row 3 \(document_id 'b'\) has no text; every"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_names_the_row(body, kind, message):
    with pytest.raises(InputError, match=message) as caught:
        read_bytes(body, kind)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["🙂🙂", "👩\u200d👧", "nul \0 byte", "x" * 1_000_000, '"\\ud83d" in a lesson']
)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_odd_texts_are_texts(text, kind):
    if kind == "parquet":
        body = parquet(pa.array([text]))
    elif kind == "csv":
        body = ('id,text\n0,"' + text.replace('"', '""') + '"\n').encode()
    else:
        body = json.dumps({"id": "0", "text": text}, ensure_ascii=False).encode()
    assert read_bytes(body, kind)["text"].to_list() == [text]


def test_a_byte_order_mark_and_blank_lines_are_no_rows():
    for kind, body in (("csv", b"id,text\n\na,x\n\n"), ("jsonl", b'\n{"id":"a","text":"x"}\n\n')):
        assert read_bytes(b"\xef\xbb\xbf" + body, kind)["document_id"].to_list() == ["a"]


def test_rows_that_stand_twice_in_one_file_are_numbered_as_a_spreadsheet_numbers_them():
    one = read_csv('document_id,text\na,"one\ntwo"\n\nb,y\na,z\n')
    with pytest.raises(InputError, match=r"'a' stands twice: docs row 2 and docs row 5 "):
        unique([("docs", one)])


# --- Keeping out -----------------------------------------------------------------------------------------

GIVEN = pl.DataFrame(
    {
        "document_id": ["a", "b", "c", "d"],
        "status": ["draft", " final ", "", None],
        "rating": ["1", "2.50", "", None],
        "stars": [1.0, 2.5, float("nan"), None],
        "is_public": [True, False, None, True],
        "tags": [["x"], [], [], None],
    }
)


@pytest.mark.parametrize(
    ("columns", "out"),
    [
        ({"status": ("draft",)}, "a"),
        ({"status": (None,)}, "cd"),  # empty text says nothing
        ({"status": ("draft", None)}, "acd"),
        ({"status": ColumnRule(other_than=("final",))}, "acd"),  # null is another value too
        ({"status": ColumnRule(other_than=("final", None))}, "a"),
        ({"rating": ColumnRule(below=2.5)}, "a"),  # of a CSV, where numbers are text
        ({"rating": ColumnRule(above=1)}, "b"),
        ({"rating": (2.5,)}, "b"),
        ({"stars": ColumnRule(above=1)}, "b"),  # not a number is not above either
        ({"stars": ColumnRule(below=2, other_than=(1, 2.5, None))}, "ac"),
        ({"is_public": (True,)}, "ad"),
        ({"status": ("draft",), "is_public": (False,)}, "ab"),
    ],
)
def test_a_column_rule_keeps_out_what_it_names(columns, out):
    kept, without = exclude(GIVEN, ExcludeConfig(columns=columns))
    assert "".join(without["document_id"]) == out
    assert kept["document_id"].to_list() == [i for i in "abcd" if i not in out]
    assert kept.columns == GIVEN.columns


def test_a_document_that_several_rules_keep_out_counts_once_and_ids_come_first():
    columns = {"status": ("draft", None), "is_public": (False, True)}
    last = GIVEN.tail(1).with_columns(
        document_id=pl.lit("e"), status=pl.lit("final"), is_public=pl.lit(None, pl.Boolean)
    )
    rules = ExcludeConfig(document_ids=("a",), columns=columns)
    kept, out = exclude(pl.concat([GIVEN, last]), rules, listed=["c", "nobody"])
    assert counts_of(out) == {"document_ids": 2, "columns.status": 1, "columns.is_public": 1}
    assert kept["document_id"].to_list() == ["e"]


def test_without_rules_nothing_is_kept_out():
    kept, out = exclude(GIVEN, ExcludeConfig())
    assert kept.equals(GIVEN)
    assert counts_of(out) == {}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"state": ("x",)}, r"columns\.state: no file has this column; there are: document_id, status, "),
        ({"status": ColumnRule(below=1)}, r"document_id 'a' has 'draft', and 1 others are no numbers either"),
        (
            {"stars": ("high",)},
            r"columns\.stars: 'high' is compared with a column of Float64; wanted numbers",
        ),
        ({"is_public": (1,)}, r"columns\.is_public: 1 is compared with a column of Boolean; wanted true, "),
        ({"tags": ("x",)}, r"columns\.tags: the column holds lists or objects"),
        ({"status": ("draft", "final", None)}, r"no documents left of 4 \(columns\.status 4\)"),
    ],
)
def test_a_rule_that_cannot_be_used_is_refused(columns, message):
    with pytest.raises(InputError, match=rf"^documents\.exclude.*{message}"):
        exclude(GIVEN, ExcludeConfig(columns=columns))


def test_ids_stand_one_a_line():
    assert read_ids(io.BytesIO(b"\xef\xbb\xbfa\r\n\n b \n\xea\xb0\x80"), "ids") == ["a", "b", "가"]
    with pytest.raises(InputError, match=r"ids: line 2 is not UTF-8: b'caf\\xe9'"):
        read_ids(io.BytesIO(b"a\n" + LATIN_1), "ids")


# --- Making ----------------------------------------------------------------------------------------------


def passages(*rows: tuple[str, str, str | None]) -> pl.DataFrame:
    return pl.DataFrame(
        rows, {"user_id": pl.String, "document_id": pl.String, "text": pl.String}, orient="row"
    )


def test_one_readers_highlights_never_become_a_document():
    made, left_out = make(
        passages(
            ("u", "a", "mine"), ("u", "a", "mine too"), ("u", "b", "x"), ("v", "b", "y"), ("v", "a", None)
        ),
        2,
    )
    assert made["document_id"].to_list() == ["b"]
    assert left_out.rows() == [("a", 1)]


def test_the_most_highlighted_passage_comes_first_and_ties_do_not_depend_on_order():
    rows = [("u", "a", "once b"), ("v", "a", "twice"), ("u", "a", "twice"), ("w", "a", "once a")]
    made, _ = make(passages(*rows), 2)
    assert made["text"].to_list() == ["twice once a once b"]
    assert make(passages(*reversed(rows)), 2)[0].rows() == made.rows()


def test_a_made_document_ends_at_200_words():
    made, _ = make(passages(("u", "a", "w " * 150), ("v", "a", "x " * 150)), 2)
    assert len(made["text"][0].split()) == 200
