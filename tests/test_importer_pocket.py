"""Pocket's exports, hand-made: the page of links, the later tables, the highlights, and the zip of all."""

import json
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.importers import pocket
from pipeline.importers.tables import Document, Event, Reject, Skipped
from pipeline.importers.urls import TRACKING, document_id

NEW_YEAR = 1_704_067_200  # 2024-01-01T00:00:00Z
PAGE = f"""<!DOCTYPE html>
<html>
\t<head>
\t\t<meta http-equiv="Content-Type" content="text/html; charset=UTF-8" />
\t\t<title>Pocket Export</title>
\t</head>
\t<body>
\t\t<h1>Unread</h1>
\t\t<ul>
\t\t\t<li><a href="https://example.com/tide?a=1&amp;utm_source=x" time_added="{NEW_YEAR}" tags="sea">Tides
 &amp; the Moon</a></li>
\t\t</ul>
\t\t<h1>Read Archive</h1>
\t\t<ul>
\t\t\t<li><a href="https://example.com/bread" time_added="{NEW_YEAR + 60}" tags="">https://example.com/bread</a></li>
\t\t</ul>
\t</ul>
</body>
</html>
"""
TABLE = "title,url,time_added,tags,status\n"
HIGHLIGHTS = [
    {
        "url": "https://example.com/tide?a=1",
        "title": "Tides & the Moon",
        "highlights": [
            {"quote": "The moon pulls. ", "created_at": NEW_YEAR + 120},
            {"quote": "The sun pulls too.", "created_at": NEW_YEAR + 180},
        ],
    }
]
TIDE = "https://example.com/tide?a=1"


def when(seconds: int) -> datetime:
    return datetime(2024, 1, 1, 0, seconds // 60, seconds % 60, tzinfo=UTC)


def export(tmp_path: Path, content: str | bytes, name: str = "ril_export.html") -> list:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(pocket.read(path, "ann", None))


def zipped(tmp_path: Path, **members: str) -> Path:
    path = tmp_path / "pocket.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_the_page_of_links_gives_a_document_and_an_event_for_each(tmp_path):
    assert export(tmp_path, PAGE) == [
        Document(TIDE, "Tides & the Moon", "Tides & the Moon", TIDE),
        Event("ann", TIDE, when(0), None),
        # where Pocket knew no title it put the URL
        Document(*["https://example.com/bread"] * 4),
        Event("ann", "https://example.com/bread", when(60), None),
    ]


def test_a_link_of_the_page_without_a_time_is_rejected_at_its_line(tmp_path):
    page = PAGE.replace(f' time_added="{NEW_YEAR + 60}"', "")
    assert [item for item in export(tmp_path, page) if isinstance(item, Reject)] == [
        Reject(15, "bad_timestamp", " https://example.com/bread")
    ]


def test_links_that_are_never_closed_are_told_apart(tmp_path):
    page = PAGE.replace("</a></li>", "").replace("</ul>", "")
    titles = [item.title for item in export(tmp_path, page) if isinstance(item, Document)]
    assert titles == ["Tides & the Moon", "https://example.com/bread"]


def test_a_page_larger_than_one_reading_loses_nothing(tmp_path):
    links = "".join(
        f'<li><a href="https://example.com/{n}" time_added="{NEW_YEAR}" tags="">Page {n}</a></li>\n'
        for n in range(3_000)  # 230 kB; it is read in pieces of 64 kB
    )
    items = export(tmp_path, f"<title>Pocket Export</title><ul>{links}</ul>")
    assert [item.title for item in items if isinstance(item, Document)] == [f"Page {n}" for n in range(3_000)]


@pytest.mark.parametrize(
    "header",
    [TABLE, "title,url,time_added,cursor,tags,status\n", "\ufefftitle,url,time_added,tags,status\r\n"],
)
def test_the_table_gives_the_same_as_the_page(tmp_path, header):
    cursor = "7187," if "cursor" in header else ""
    table = (
        f'{header}"Tides & the Moon",{TIDE}&utm_source=x,{NEW_YEAR},{cursor}sea|moon,unread\n'
        f"https://example.com/bread,https://example.com/bread,{NEW_YEAR + 60},{cursor},archive\n"
    )
    assert export(tmp_path, table, "part_000000.csv") == export(tmp_path, PAGE)


def test_an_address_given_for_a_title_is_shown_without_what_follows_the_reader(tmp_path):
    url = "https://example.com/a?fbclid=1"
    items = export(tmp_path, f"{TABLE}{url},{url},{NEW_YEAR},,unread\n", "part_000000.csv")
    assert items[0].title == "https://example.com/a"


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (f"A chapter,,{NEW_YEAR},,unread", Reject(2, "no_url", "A chapter")),
        (f"A song,spotify:track:1,{NEW_YEAR},,unread", Skipped(2, "no_web_page")),
        ("Old,https://example.com/,0,,archive", Skipped(2, "no_time")),
        (
            "Odd,https://example.com/,yesterday,,archive",
            Reject(2, "bad_timestamp", "yesterday https://example.com/"),
        ),
        (
            "Odd,https://example.com/,99999999999999999999,,archive",
            Reject(2, "bad_timestamp", "99999999999999999999 https://example.com/"),
        ),
    ],
)
def test_a_row_that_is_no_link_at_a_time_is_no_event(tmp_path, row, wanted):
    assert export(tmp_path, f"{TABLE}{row}\n", "part_000000.csv") == [wanted]


def test_the_highlights_are_events_with_their_passages(tmp_path):
    items = export(tmp_path, json.dumps(HIGHLIGHTS), "part_000000.json")
    assert [item for item in items if isinstance(item, Event)] == [
        Event("ann", TIDE, when(120), "The moon pulls."),
        Event("ann", TIDE, when(180), "The sun pulls too."),
    ]


@pytest.mark.parametrize(
    ("link", "reason"),
    [
        ("a text", "not_a_link_with_highlights"),
        ({"url": TIDE}, "not_a_link_with_highlights"),
        ({"url": TIDE, "highlights": [{"quote": " ", "created_at": NEW_YEAR}]}, "no_quote"),
        ({"url": TIDE, "highlights": [None]}, "no_quote"),
        ({"url": None, "highlights": [{"quote": "a", "created_at": NEW_YEAR}]}, "no_url"),
        ({"url": TIDE, "highlights": [{"quote": "a", "created_at": [1]}]}, "bad_timestamp"),
    ],
)
def test_a_highlight_that_lacks_something_is_rejected_by_its_place(tmp_path, link, reason):
    items = export(tmp_path, json.dumps([*HIGHLIGHTS, link]), "part_000000.json")
    assert [(item.line, item.reason) for item in items if isinstance(item, Reject)] == [(2, reason)]


def test_the_zip_gives_links_and_highlights_of_one_reader(tmp_path):
    path = zipped(
        tmp_path,
        **{
            "part_000000.csv": f"{TABLE}Tides,{TIDE},{NEW_YEAR},,unread\n",
            "part_000001.csv": f"{TABLE}Bread,https://example.com/bread,{NEW_YEAR + 60},,unread\n",
            "annotations/part_000000.json": json.dumps(HIGHLIGHTS),
            "collections/list.json": "{}",  # what readers published, not what they read
            "__MACOSX/._part_000000.csv": "\x00",
        },
    )
    events = [item for item in pocket.read(path, "ann", None) if isinstance(item, Event)]
    # sorted by name: annotations before the parts
    assert [(event.user_id, event.text) for event in events] == [
        ("ann", "The moon pulls."),
        ("ann", "The sun pulls too."),
        ("ann", None),
        ("ann", None),
    ]


def test_a_reject_names_its_part_of_the_zip(tmp_path):
    path = zipped(tmp_path, **{"part_000001.csv": f"{TABLE}A,,1,,unread\n"})
    assert list(pocket.read(path, "ann", None)) == [Reject(2, "no_url", "part_000001.csv: A")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "got nothing"),
        ("<html><title>Bookmarks</title></html>", "neither Pocket Export nor time_added"),
        ("url,title\nhttps://example.com,A\n", "no column 'time_added'"),
        ('[{"url": ', "no whole JSON"),
        (f"{TABLE}café,{TIDE},1,,unread\n".encode("latin-1"), "not UTF-8"),
        (b"PK\x03\x04 cut short", "no column 'url'"),
    ],
)
def test_a_file_that_is_no_export_is_refused(tmp_path, content, said):
    with pytest.raises(InputError, match=said) as raised:
        export(tmp_path, content, "export")
    assert str(raised.value).startswith(str(tmp_path / "export"))
    assert "\n" not in str(raised.value)


def test_a_zip_of_something_else_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no part_"):
        list(pocket.read(zipped(tmp_path, **{"photo.jpg": "x"}), "ann", None))


def test_a_damaged_zip_is_refused(tmp_path):
    path = zipped(tmp_path, **{"part_000000.csv": f"{TABLE}Tides,{TIDE},{NEW_YEAR},,unread\n"})
    path.write_bytes(path.read_bytes().replace(b"Tides", b"TIDES"))  # the checksum no longer agrees
    with pytest.raises(InputError, match="the zip is damaged"):
        list(pocket.read(path, "ann", None))


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("HTTPS://Example.COM", "https://example.com/"),
        ("https://example.com:443/a#part", "https://example.com/a"),
        ("https://example.com:8443/a", "https://example.com:8443/a"),
        ("https://example.com/a/../b/./c", "https://example.com/b/c"),
        ("https://example.com/%7ejoe/%c3%a9", "https://example.com/~joe/%C3%A9"),
        ("https://example.com/Case?Q=Case", "https://example.com/Case?Q=Case"),
        ("https://example.com/?b=2&a=1&a=3", "https://example.com/?b=2&a=1&a=3"),  # the order may matter
        ("https://example.com/?utm_source=x", "https://example.com/"),
        ("https://example.com/?id=7&UTM_Medium=y&fbclid=z", "https://example.com/?id=7"),
        ("https://example.com/?autm_source=x&ref=y", "https://example.com/?autm_source=x&ref=y"),
        ("https://ann:secret@example.com/a", "https://example.com/a"),
        ("https://münchen.de/straße", "https://xn--mnchen-3ya.de/stra%C3%9Fe"),
        ("https://[2001:db8::1]/a", "https://[2001:db8::1]/a"),
        ("  https://example.com/a\n", "https://example.com/a"),
    ],
)
def test_the_ways_to_write_an_address_are_one_document(url, wanted):
    assert document_id(url) == wanted
    assert document_id(wanted) == wanted


@pytest.mark.parametrize("name", sorted(TRACKING))
def test_a_parameter_that_follows_the_reader_is_no_other_page(name):
    assert document_id(f"https://example.com/a?{name}=1&page=2") == "https://example.com/a?page=2"


@pytest.mark.parametrize(
    "url",
    [
        "", "about:blank", "chrome://settings", "moz-extension://a/b.html", "file:///home/ann/a.pdf",
        "mailto:ann@example.com", "javascript:alert(1)", "view-source:https://example.com/",
        "//example.com/a", "example.com/a", "https:///a", "https://exam ple.com/", "https://[half/a",
        "https://example.com:99999/",
        f"https://{'a' * 64}.com/", "https://example.com/\ud800", "http://localhost/a", "http://app.localhost/",
        "http://127.0.0.1:8888/tree", "http://[::1]/",
    ],
)  # fmt: skip
def test_what_no_other_reader_can_open_is_no_document(url):
    assert document_id(url) is None
