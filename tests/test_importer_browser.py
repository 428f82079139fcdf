"""Firefox's places.sqlite and Chromium's History, made here with the browsers' own tables."""

import sqlite3
from collections import Counter
from contextlib import closing
from datetime import UTC, datetime

import pytest

from pipeline.errors import InputError
from pipeline.importers import browser
from pipeline.importers.tables import Document, Event, Reject, Skipped

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
FIREFOX_NOON = 1_795_262_400_000_000  # microseconds since 1970
CHROMIUM_NOON = FIREFOX_NOON + 11_644_473_600_000_000  # since 1601, 134,774 days earlier
PAGE = "https://example.org/"

# the columns that Firefox makes
FIREFOX_TABLES = """
CREATE TABLE moz_origins (id INTEGER PRIMARY KEY, prefix TEXT NOT NULL, host TEXT NOT NULL,
    frecency INTEGER NOT NULL, recalc_frecency INTEGER NOT NULL DEFAULT 0, UNIQUE (prefix, host));
CREATE TABLE moz_places (id INTEGER PRIMARY KEY, url LONGVARCHAR, title LONGVARCHAR, rev_host LONGVARCHAR,
    visit_count INTEGER DEFAULT 0, hidden INTEGER DEFAULT 0 NOT NULL, typed INTEGER DEFAULT 0 NOT NULL,
    frecency INTEGER DEFAULT -1 NOT NULL, last_visit_date INTEGER, guid TEXT, foreign_count INTEGER DEFAULT 0
    NOT NULL, url_hash INTEGER DEFAULT 0 NOT NULL, description TEXT, preview_image_url TEXT, site_name TEXT,
    origin_id INTEGER REFERENCES moz_origins(id), recalc_frecency INTEGER NOT NULL DEFAULT 0);
CREATE TABLE moz_historyvisits (id INTEGER PRIMARY KEY, from_visit INTEGER, place_id INTEGER,
    visit_date INTEGER, visit_type INTEGER, session INTEGER, source INTEGER DEFAULT 0 NOT NULL,
    triggeringPlaceId INTEGER);
CREATE INDEX moz_historyvisits_placedateindex ON moz_historyvisits (place_id, visit_date);
CREATE INDEX moz_historyvisits_fromindex ON moz_historyvisits (from_visit);
CREATE INDEX moz_historyvisits_dateindex ON moz_historyvisits (visit_date);
"""
# as Chromium's history database version 70 makes them
CHROMIUM_TABLES = """
CREATE TABLE meta(key LONGVARCHAR NOT NULL UNIQUE PRIMARY KEY, value LONGVARCHAR);
CREATE TABLE urls(id INTEGER PRIMARY KEY AUTOINCREMENT,url LONGVARCHAR,title LONGVARCHAR,
    visit_count INTEGER DEFAULT 0 NOT NULL,typed_count INTEGER DEFAULT 0 NOT NULL,
    last_visit_time INTEGER NOT NULL,hidden INTEGER DEFAULT 0 NOT NULL);
CREATE TABLE visits(id INTEGER PRIMARY KEY AUTOINCREMENT,url INTEGER NOT NULL,visit_time INTEGER NOT NULL,
    from_visit INTEGER,external_referrer_url TEXT,transition INTEGER DEFAULT 0 NOT NULL,segment_id INTEGER,
    visit_duration INTEGER DEFAULT 0 NOT NULL,incremented_omnibox_typed_score BOOLEAN DEFAULT FALSE NOT NULL,
    opener_visit INTEGER,originator_cache_guid TEXT,originator_visit_id INTEGER,originator_from_visit INTEGER,
    originator_opener_visit INTEGER,is_known_to_sync BOOLEAN DEFAULT FALSE NOT NULL,
    consider_for_ntp_most_visited BOOLEAN DEFAULT FALSE NOT NULL,visited_link_id INTEGER DEFAULT 0 NOT NULL,
    app_id TEXT);
CREATE INDEX visits_url_index ON visits (url);
CREATE INDEX visits_from_index ON visits (from_visit);
CREATE INDEX visits_time_index ON visits (visit_time);
CREATE INDEX urls_url_index ON urls (url);
"""
LINK, TYPED, EMBED, PERMANENT, TEMPORARY, DOWNLOAD, FRAMED, RELOAD = 1, 2, 4, 5, 6, 7, 8, 9
CHAIN = 0x3000_0000  # Chromium: start and end of a chain of redirects, so a chain of one page
CHAIN_START, CHAIN_END = 0x1000_0000, 0x2000_0000


def firefox(path, places, visits):
    """A places.sqlite: places of (id, url, title, hidden), visits of (id, from, place, date, type)."""
    with closing(sqlite3.connect(path)) as database, database:
        database.executescript(FIREFOX_TABLES)
        database.executemany("INSERT INTO moz_places (id, url, title, hidden) VALUES (?, ?, ?, ?)", places)
        database.executemany(
            "INSERT INTO moz_historyvisits (id, from_visit, place_id, visit_date, visit_type) "
            "VALUES (?, ?, ?, ?, ?)",
            visits,
        )
    return path


def chromium(path, urls, visits):
    """A History: urls of (id, url, title, hidden), visits of (id, url, time, transition)."""
    with closing(sqlite3.connect(path)) as database, database:
        database.executescript(CHROMIUM_TABLES)
        database.executemany(
            "INSERT INTO urls (id, url, title, last_visit_time, hidden) VALUES (?, ?, ?, 0, ?)", urls
        )
        database.executemany(
            "INSERT INTO visits (id, url, visit_time, transition) VALUES (?, ?, ?, ?)", visits
        )
    return path


def one_firefox_visit(
    path, url="https://example.org/", title="Birds", hidden=0, date=FIREFOX_NOON, kind=LINK
):
    return firefox(path, [(1, url, title, hidden)], [(1, 0, 1, date, kind)])


def one_chromium_visit(path, url=PAGE, title="Birds", hidden=0, core=0, flags=CHAIN):
    return chromium(path, [(1, url, title, hidden)], [(1, 1, CHROMIUM_NOON, core | flags)])


READ = {"firefox": browser.read_firefox, "chromium": browser.read_chromium}
ONE = {"firefox": one_firefox_visit, "chromium": one_chromium_visit}


@pytest.fixture(params=["firefox", "chromium"])
def kind(request):
    return request.param


def items(kind, path):
    return list(READ[kind](path, "ann", None))


def pages(kind, path):
    return [item.document_id for item in items(kind, path) if isinstance(item, Event)]


def skipped(kind, path):
    return Counter(item.reason for item in items(kind, path) if isinstance(item, Skipped))


def test_a_visit_is_a_document_and_an_event_at_its_time(tmp_path, kind):
    assert items(kind, ONE[kind](tmp_path / "history")) == [
        Document("https://example.org/", "Birds", "Birds", "https://example.org/"),
        Event("ann", "https://example.org/", NOON, None),
    ]


def test_a_page_without_a_title_is_called_by_its_url(tmp_path, kind):
    (document, _) = items(kind, ONE[kind](tmp_path / "history", title=None))
    assert (document.title, document.text) == ("https://example.org/", "https://example.org/")


def test_addresses_are_made_alike(tmp_path, kind):
    path = ONE[kind](tmp_path / "history", url="https://EXAMPLE.org/?utm_source=mail#top")
    assert pages(kind, path) == ["https://example.org/"]


@pytest.mark.parametrize("url", ["about:newtab", "chrome://settings/", "file:///home/a.html", "data:,hello"])
def test_what_is_no_web_page_is_skipped(tmp_path, kind, url):
    assert items(kind, ONE[kind](tmp_path / "history", url=url)) == [Skipped(1, "no_web_page")]


def test_what_the_browser_hides_is_skipped(tmp_path, kind):
    assert items(kind, ONE[kind](tmp_path / "history", hidden=1)) == [Skipped(1, "hidden")]


@pytest.mark.parametrize(
    ("visit_type", "reason"),
    [(EMBED, "frame"), (FRAMED, "frame"), (DOWNLOAD, "download"), (RELOAD, "reload")],
)
def test_firefox_visits_that_show_no_new_page_are_skipped(tmp_path, visit_type, reason):
    assert items("firefox", one_firefox_visit(tmp_path / "p", kind=visit_type)) == [Skipped(1, reason)]


@pytest.mark.parametrize(
    ("core", "reason"), [(3, "frame"), (4, "frame"), (8, "reload"), (10, "keyword_generated")]
)
def test_chromium_visits_that_show_no_new_page_are_skipped(tmp_path, core, reason):
    assert items("chromium", one_chromium_visit(tmp_path / "h", core=core)) == [Skipped(1, reason)]


@pytest.mark.parametrize("core", [0, 1, 2, 5, 6, 7, 9])
def test_chromium_visits_that_a_person_made_are_events(tmp_path, core):
    assert pages("chromium", one_chromium_visit(tmp_path / "h", core=core)) == ["https://example.org/"]


def test_firefox_counts_where_a_redirect_led_and_not_where_it_came_from(tmp_path):
    # http -> https -> https://www, as Firefox writes it: the type of a visit says how its page was reached
    path = firefox(
        tmp_path / "places.sqlite",
        [(1, "http://example.org/", None, 1), (2, "https://example.org/", None, 0),
         (3, "https://www.example.org/", "Birds", 0)],
        [(10, 0, 1, FIREFOX_NOON, TYPED), (11, 10, 2, FIREFOX_NOON + 1, PERMANENT),
         (12, 11, 3, FIREFOX_NOON + 2, TEMPORARY)],
    )  # fmt: skip
    assert pages("firefox", path) == ["https://www.example.org/"]
    assert skipped("firefox", path) == {"redirect": 2}


def test_chromium_counts_the_end_of_a_chain_of_redirects(tmp_path):
    # the numbers that Chrome stores for a typed google.com: negative, as 32 bits with a sign
    typed_start, through, end = 268435457, -2147483647, -1610612735
    path = chromium(
        tmp_path / "History",
        [(1, "http://example.org/", "Birds", 0), (2, "http://www.example.org/", "Birds", 0),
         (3, "https://www.example.org/", "Birds", 0)],
        [(1, 1, CHROMIUM_NOON, typed_start), (2, 2, CHROMIUM_NOON, through), (3, 3, CHROMIUM_NOON, end)],
    )  # fmt: skip
    assert pages("chromium", path) == ["https://www.example.org/"]
    assert skipped("chromium", path) == {"redirect": 2}


@pytest.mark.parametrize("date", [0, None, -5, 2**63 - 1, "yesterday"])
def test_a_time_that_cannot_be_is_rejected_by_the_visits_number(tmp_path, date):
    (reject,) = items("firefox", one_firefox_visit(tmp_path / "p", date=date))
    assert reject == Reject(1, "bad_timestamp", f"{date!r} https://example.org/")


def test_a_visit_of_a_page_that_was_deleted_is_rejected(tmp_path):
    path = firefox(tmp_path / "p", [], [(7, 0, 99, FIREFOX_NOON, LINK)])
    assert [(item.line, item.reason) for item in items("firefox", path)] == [(7, "no_page")]


def test_a_title_that_is_no_utf_8_is_read_as_far_as_it_goes(tmp_path, kind):
    path = ONE[kind](tmp_path / "history")
    table = {"firefox": "moz_places", "chromium": "urls"}[kind]
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(f"UPDATE {table} SET title = CAST(x'42ff64' AS TEXT)")
    assert items(kind, path)[0].title == "B\ufffdd"


def test_a_running_browsers_history_is_read_with_what_is_still_in_its_log(tmp_path, kind):
    path = ONE[kind](tmp_path / "history")
    table = {"firefox": "moz_places", "chromium": "urls"}[kind]
    with closing(sqlite3.connect(path, isolation_level=None)) as running:
        running.execute("PRAGMA journal_mode = WAL")
        running.execute("PRAGMA locking_mode = EXCLUSIVE")
        running.execute(f"UPDATE {table} SET title = 'Sea birds'")
        other = sqlite3.connect(path, timeout=0)
        with closing(other), pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute(f"SELECT * FROM {table}")  # to open the file itself would not do
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        assert items(kind, path)[0].title == "Sea birds"
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_a_browser_has_not_committed_is_not_read(tmp_path, kind):
    path = ONE[kind](tmp_path / "history")
    table = {"firefox": "moz_places", "chromium": "urls"}[kind]
    with closing(sqlite3.connect(path, isolation_level=None)) as running:
        running.execute("PRAGMA cache_spill = 1")
        running.execute("PRAGMA cache_size = 1")  # pages go into the file before the end of the transaction
        running.execute("BEGIN EXCLUSIVE")
        running.execute(f"UPDATE {table} SET title = 'not yet'")
        running.execute(
            "CREATE TABLE filler AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n "
            "WHERE i < 5000) SELECT i, hex(randomblob(100)) AS h FROM n"
        )
        assert b"not yet" in path.read_bytes()
        assert items(kind, path)[0].title == "Birds"


def test_a_file_that_is_written_into_all_the_time_is_refused(tmp_path, monkeypatch):
    path = one_firefox_visit(tmp_path / "places.sqlite")
    states = iter(range(100))
    monkeypatch.setattr(browser, "_state", lambda path: next(states))
    with pytest.raises(InputError, match=r"places\.sqlite: is being written into .* close the browser"):
        items("firefox", path)


@pytest.mark.parametrize(("kind", "other"), [("firefox", "chromium"), ("chromium", "firefox")])
def test_another_browsers_history_is_named(tmp_path, kind, other):
    with pytest.raises(InputError, match=rf"it is {other}'s: import it as {other}"):
        items(kind, ONE[other](tmp_path / "history"))


def test_another_database_is_refused_with_its_tables(tmp_path, kind):
    with closing(sqlite3.connect(tmp_path / "cookies.sqlite")) as database:
        database.execute("CREATE TABLE moz_cookies (id INTEGER)")
    with pytest.raises(InputError, match=r"cookies\.sqlite: has the tables moz_cookies; wanted"):
        items(kind, tmp_path / "cookies.sqlite")


@pytest.mark.parametrize("content", [b"no database, but as long as one. " * 99, b""])
def test_what_is_no_database_is_refused(tmp_path, kind, content):
    (tmp_path / "history").write_bytes(content)
    with pytest.raises(InputError, match=r"history: (cannot be read as SQLite|has the tables none)"):
        items(kind, tmp_path / "history")


def test_a_damaged_database_is_refused(tmp_path):
    places = [(i, f"https://example.org/{i}", "x" * 500, 0) for i in range(1, 500)]
    path = firefox(tmp_path / "places.sqlite", places, [(i, 0, i, FIREFOX_NOON, LINK) for i in range(1, 500)])
    content = bytearray(path.read_bytes())
    content[len(content) // 4 : -4096] = b"\xa5" * (len(content) - 4096 - len(content) // 4)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"places\.sqlite: cannot be read as SQLite"):
        items("firefox", path)


def test_a_file_that_is_not_there_is_no_matter_of_its_format(tmp_path, kind):
    with pytest.raises(FileNotFoundError):
        items(kind, tmp_path / "gone")
