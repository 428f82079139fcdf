"""Readwise's CSV export, hand-made: today's columns, older ones, and what people put into them."""

from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from pipeline.errors import InputError
from pipeline.importers import kindle, readwise
from pipeline.importers.tables import Document, Event, Reject, Skipped

TODAY = (
    "Highlight,Book Title,Book Author,Amazon Book ID,Note,Color,Tags,Location Type,Location,Highlighted at,"
    "Document tags\n"
)
AT = "2024-08-22 18:10:53+00:00"


def export(tmp_path: Path, content: str | bytes, zone=None) -> list:
    path = tmp_path / "readwise-data.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(readwise.read(path, "ann", zone))


def row(highlight="a passage", title="The Ebb", note="", tags="", at=AT) -> str:
    return f'"{highlight}",{title},Vera Tidewell,B000,{note},yellow,{tags},location,12,{at},fiction\n'


def events(items: list) -> list[Event]:
    return [item for item in items if isinstance(item, Event)]


def test_a_row_is_a_highlight_and_its_book_comes_before(tmp_path):
    assert export(tmp_path, TODAY + row() + row("another")) == [
        Document("book:the ebb|tidewell vera", "The Ebb", "The Ebb - Vera Tidewell"),
        Event(
            "ann", "book:the ebb|tidewell vera", datetime(2024, 8, 22, 18, 10, 53, tzinfo=UTC), "a passage"
        ),
        Event("ann", "book:the ebb|tidewell vera", datetime(2024, 8, 22, 18, 10, 53, tzinfo=UTC), "another"),
    ]


def test_readers_on_readwise_meet_those_with_a_kindle(tmp_path):
    [document] = [item for item in export(tmp_path, TODAY + row()) if isinstance(item, Document)]
    assert document.document_id == kindle.book("The Ebb", "Tidewell, Vera").document_id


@pytest.mark.parametrize(
    ("at", "zone", "wanted"),
    [
        ("2024-08-22 18:10:53+00:00", None, (18, 10, 53)),
        ("2024-08-22T18:10:53.250000+00:00", None, (18, 10, 53, 250_000)),
        ("2024-08-22T18:10:53Z", None, (18, 10, 53)),
        ("2024-08-22 20:10:53+02:00", ZoneInfo("Asia/Tokyo"), (18, 10, 53)),  # what is written counts
        ("2024-08-22 18:10:53", ZoneInfo("Europe/Berlin"), (16, 10, 53)),
        ("2024-08-22 18:10", UTC, (18, 10)),
    ],
)
def test_times_are_read_with_and_without_a_zone(tmp_path, at, zone, wanted):
    [event] = events(export(tmp_path, TODAY + row(at=at), zone))
    assert event.timestamp == datetime(2024, 8, 22, *wanted, tzinfo=UTC)


def test_a_time_without_a_zone_is_rejected_where_none_is_given(tmp_path):
    assert export(tmp_path, TODAY + row(at="2024-08-22 18:10:53")) == [
        Reject(2, "timestamp_without_zone", "2024-08-22 18:10:53")
    ]


@pytest.mark.parametrize("at", ["yesterday", "2024-02-31 10:00:00+00:00", "0001-01-01 00:00:00+14:00"])
def test_a_time_that_cannot_be_is_rejected(tmp_path, at):
    assert export(tmp_path, TODAY + row(at=at)) == [Reject(2, "bad_timestamp", at)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (row("", note="mine alone"), "note_only"),
        (row(""), "empty_row"),
        (row("Chapter One", note=".h1"), "heading"),
        (row("A section", note=".h2 .c1"), "heading"),
        (row("Chapter One", tags='"favourite, h1"'), "heading"),
        (row("![](https://example.com/page.png)"), "image"),
        (row(at=""), "no_time"),
        (row(at="2024-08-22"), "date_without_time"),
    ],
)
def test_what_is_no_passage_at_a_time_is_skipped(tmp_path, line, reason):
    assert export(tmp_path, TODAY + line) == [Skipped(2, reason)]


def test_a_note_beside_a_highlight_is_left_out(tmp_path):
    [event] = events(export(tmp_path, TODAY + row(note="h1 is a tag only after a dot")))
    assert event.text == "a passage"


def test_a_row_without_a_title_is_rejected(tmp_path):
    assert export(tmp_path, TODAY + row(title="  ")) == [Reject(2, "no_title", "a passage")]


def test_a_highlight_of_several_lines_is_one_and_lines_are_counted_on(tmp_path):
    # the first row is lines 2 to 4, so that the rejected one begins on line 5
    content = TODAY + row('She said ""no"",\n\nand left') + row("next", at="never")
    items = export(tmp_path, content)
    assert events(items)[0].text == 'She said "no",\n\nand left'
    assert items[-1] == Reject(5, "bad_timestamp", "never")


def test_older_columns_in_another_order_are_enough(tmp_path):
    [event] = events(export(tmp_path, f"Book Title,Highlighted at,Highlight\nThe Ebb,{AT},a passage\n"))
    assert (event.document_id, event.text) == ("book:the ebb", "a passage")


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path):
    plain = export(tmp_path, TODAY + row())
    assert export(tmp_path, b"\xef\xbb\xbf" + (TODAY + row()).replace("\n", "\r\n").encode()) == plain


def test_a_row_with_too_many_values_is_rejected_and_the_next_one_read(tmp_path):
    items = export(tmp_path, TODAY + row().replace("fiction", "fiction,more") + row("next"))
    assert (items[0].line, items[0].reason) == (2, "too_many_values")
    assert events(items)[0].text == "next"


def test_a_row_that_ends_early_lacks_the_rest(tmp_path):
    assert export(tmp_path, TODAY + "a passage,The Ebb\n") == [Skipped(2, "no_time")]


def test_a_highlight_longer_than_pythons_limit_is_read(tmp_path):
    [event] = events(export(tmp_path, TODAY + row("a" * 200_000)))
    assert len(event.text) == 200_000


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no column 'highlight'.*got nothing"),
        ("Highlight;Book Title;Highlighted at\n", "no column 'highlight'"),  # saved by a spreadsheet
        ("Highlight,Book Title\na,b\n", "no column 'highlighted at'"),
        (TODAY + '"never closed,The Ebb\n' + row(), r":\d+: .*mend this line"),
        ((TODAY + row("café")).encode("latin-1"), "not UTF-8"),
    ],
)
def test_a_file_that_is_no_export_is_refused(tmp_path, content, said):
    with pytest.raises(InputError, match=said) as raised:
        export(tmp_path, content)
    assert str(raised.value).startswith(str(tmp_path / "readwise-data.csv"))
    assert "\n" not in str(raised.value)
