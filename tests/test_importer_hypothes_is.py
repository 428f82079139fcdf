"""Hypothes.is annotations as JSON, hand-made in the four forms that people have."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from pipeline.errors import InputError
from pipeline.importers import hypothes_is
from pipeline.importers.tables import Document, Event, Reject, Skipped

PAGE = "https://example.com/tide"


def selectors(exact: str) -> list[dict[str, Any]]:
    return [
        {"type": "RangeSelector", "startContainer": "/p[1]", "startOffset": 0},
        {"type": "TextPositionSelector", "start": 10, "end": 20},
        {"type": "TextQuoteSelector", "exact": exact, "prefix": "and ", "suffix": "."},
    ]


def annotation(exact: str = "the moon pulls", **changed: Any) -> dict[str, Any]:
    """As the API gives it; keywords replace a value, None takes it out."""
    known = {
        "id": "A1",
        "created": "2024-08-22T18:10:53.123456+00:00",
        "updated": "2024-09-01T00:00:00.000000+00:00",
        "user": "acct:ann@hypothes.is",
        "uri": f"{PAGE}?utm_source=x#tides",
        "text": "my thoughts",
        "tags": ["sea"],
        "target": [{"source": PAGE, "selector": selectors(exact)}],
        "document": {"title": ["Tides\n and the Moon"]},
    }
    return {key: value for key, value in (known | changed).items() if value is not None}


def export(tmp_path: Path, content: Any, zone=None) -> list:
    path = tmp_path / "annotations.json"
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(content)
    return list(hypothes_is.read(path, "the-file", zone))


def events(items: list) -> list[Event]:
    return [item for item in items if isinstance(item, Event)]


ONE = [
    Document(PAGE, "Tides and the Moon", "Tides and the Moon", PAGE),
    Event("ann@hypothes.is", PAGE, datetime(2024, 8, 22, 18, 10, 53, 123456, tzinfo=UTC), "the moon pulls"),
]


@pytest.mark.parametrize(
    "content",
    [
        {"total": 1, "rows": [annotation()]},
        {"rows": [annotation()], "total": 1},
        {"export_date": "2024-09-01", "export_userid": "", "annotations": [annotation()]},
        [annotation()],
        annotation(),
        json.dumps(annotation()) + "\n",
        json.dumps([annotation()], indent=2),
        b"\xef\xbb\xbf" + json.dumps([annotation()]).encode(),
    ],
    ids=[
        "search",
        "search, rows first",
        "client export",
        "list",
        "one",
        "JSON Lines",
        "indented",
        "byte order mark",
    ],
)
def test_a_passage_is_a_document_and_an_event_in_every_form(tmp_path, content):
    assert export(tmp_path, content) == ONE


def test_annotations_and_pages_one_after_another_are_all_read(tmp_path):
    lines = "\n".join(json.dumps(annotation(f"passage {n}")) for n in range(3))
    pages = "\n".join(json.dumps({"total": 3, "rows": [annotation(f"passage {n}")]}) for n in range(3))
    for content in (lines, pages):
        assert [event.text for event in events(export(tmp_path, content))] == [
            "passage 0",
            "passage 1",
            "passage 2",
        ]


def test_each_account_is_a_reader_of_its_own(tmp_path):
    items = export(tmp_path, [annotation(), annotation(user="acct:ann@school.example")])
    assert [event.user_id for event in events(items)] == ["ann@hypothes.is", "ann@school.example"]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"references": ["A0"], "target": [{"source": PAGE}]}, "reply"),
        ({"references": ["A0"]}, "reply"),
        ({"target": [{"source": PAGE}]}, "page_note"),
        ({"target": []}, "page_note"),
        ({"target": None}, "page_note"),
        ({"target": [{"source": PAGE, "selector": selectors("  ")}]}, "page_note"),
        ({"target": [{"source": PAGE, "selector": selectors("x")[:2]}]}, "page_note"),
        ({"uri": "file:///home/ann/paper.pdf"}, "no_web_page"),
        ({"uri": "http://localhost:8000/draft"}, "no_web_page"),
    ],
)
def test_what_is_no_passage_of_a_shared_page_is_skipped(tmp_path, changed, reason):
    assert export(tmp_path, [annotation(**changed)]) == [Skipped(1, reason)]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"user": None}, "no_user"),
        ({"user": "acct:"}, "no_user"),
        ({"uri": None}, "no_uri"),
        ({"uri": 7}, "no_uri"),
        ({"created": None, "updated": None}, "no_updated"),
        ({"created": "last summer"}, "bad_timestamp"),
        ({"created": "0001-01-01T00:00:00+14:00"}, "bad_timestamp"),
        ({"created": "2024-08-22T18:10:53"}, "timestamp_without_zone"),
    ],
)
def test_an_annotation_that_lacks_something_is_rejected_by_its_number(tmp_path, changed, reason):
    items = export(tmp_path, [annotation(), annotation(**changed)])
    assert [(item.line, item.reason) for item in items if isinstance(item, Reject)] == [(2, reason)]


def test_what_is_no_annotation_is_rejected_by_its_number(tmp_path):
    assert export(tmp_path, [annotation(), "a text"])[-1] == Reject(2, "not_an_annotation", "'a text'")


@pytest.mark.parametrize(
    ("changed", "zone", "hour"),
    [
        ({"created": "2024-08-22T18:10:53Z"}, None, 18),
        ({"created": "2024-08-22T18:10:53"}, ZoneInfo("Europe/Berlin"), 16),
        ({"created": None, "updated": "2024-08-22T19:00:00+00:00"}, None, 19),
    ],
)
def test_the_time_is_when_it_was_made_or_else_changed(tmp_path, changed, zone, hour):
    [event] = events(export(tmp_path, [annotation(**changed)], zone))
    assert event.timestamp.hour == hour


@pytest.mark.parametrize(
    ("document", "title"),
    [
        ({"title": ["Tides", "Other"]}, "Tides"),
        ({"title": "Tides"}, "Tides"),
        ({"title": []}, PAGE),
        ({}, PAGE),
        (None, PAGE),
        ({"title": [None]}, PAGE),
    ],
)
def test_the_title_is_the_first_one_or_the_address(tmp_path, document, title):
    assert export(tmp_path, [annotation(document=document)])[0].title == title


def test_a_pdf_without_an_address_is_known_by_its_content(tmp_path):
    [document, event] = export(tmp_path, [annotation(uri="urn:x-pdf:0123abcd")])
    assert (document.document_id, document.title, document.url) == (
        "urn:x-pdf:0123abcd",
        "Tides and the Moon",
        None,
    )
    assert event.document_id == "urn:x-pdf:0123abcd"


def test_an_export_without_annotations_yields_nothing(tmp_path):
    assert export(tmp_path, {"total": 0, "rows": []}) == []


def test_half_a_surrogate_pair_stands_in_no_way(tmp_path):
    content = json.dumps([annotation("half \ud83d of a smile"), annotation("next")])
    assert [event.text for event in events(export(tmp_path, content))][-1] == "next"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "the file is empty"),
        ("{}", "got an object with the keys .none."),
        ("[1, 2]", "got 1;"),
        ('{"type": "FeatureCollection", "features": []}', "got an object with the keys type, features;"),
        ("Creation Date,URL,Group\n", "broken JSON after 0 annotations"),  # the client's CSV
        (json.dumps([annotation(), annotation()])[:-200], "broken JSON after 1 annotations"),
        (b'[{"uri": "caf\xe9"}]', "broken JSON"),
    ],
)
def test_a_file_that_is_no_export_is_refused(tmp_path, content, said):
    with pytest.raises(InputError, match=said) as raised:
        export(tmp_path, content)
    assert str(raised.value).startswith(str(tmp_path / "annotations.json"))
    assert "\n" not in str(raised.value)
