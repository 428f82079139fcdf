"""Access logs: the lines that Apache and nginx write, and what the world sends them."""

import bz2
import gzip
from datetime import UTC, datetime

import pytest
import zstandard

from pipeline.errors import InputError
from pipeline.importers import serverlog
from pipeline.importers.tables import Document, Event, Progress, Reject, Skipped

FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)


def line(
    request="GET /birds HTTP/1.1", status=200, host="192.0.2.1", user="-",
    time="21/Nov/2026:13:00:00 +0100", agent=FIREFOX, referer="-", before="", behind="",
):  # fmt: skip
    """One line of a combined log; without an agent of a common one."""
    common = f'{before}{host} - {user} [{time}] "{request}" {status} 512'
    return f'{common} "{referer}" "{agent}"{behind}' if agent is not None else common


def items(tmp_path, *lines):
    path = tmp_path / "access.log"
    raw = [text if isinstance(text, bytes) else text.encode() for text in lines]
    path.write_bytes(b"".join(text + b"\n" for text in raw))
    return [item for item in serverlog.read(path, "", None) if not isinstance(item, Progress)]


def only(tmp_path, text, kind):
    (found,) = [item for item in items(tmp_path, text) if isinstance(item, kind)]
    return found


def test_a_page_that_was_sent_is_a_document_and_an_event(tmp_path):
    assert items(tmp_path, line()) == [
        Document("/birds", "/birds", "birds"),
        Event(f"192.0.2.1|{FIREFOX}", "/birds", NOON, None),
    ]


@pytest.mark.parametrize(
    ("text", "user"),
    [
        (line(user="ann"), "ann"),
        (line(user="ann lee"), "ann lee"),
        (line(user='""'), f"192.0.2.1|{FIREFOX}"),  # Apache, where an empty name was given
        (line(host="2001:db8::1"), f"2001:db8::1|{FIREFOX}"),
        (line(host="2001:db8::1", user="ann lee"), "ann lee"),
        (line(host="reader.example.org"), f"reader.example.org|{FIREFOX}"),
        (line(before="birds.example:443 "), f"192.0.2.1|{FIREFOX}"),
        (line(before="birds.example:443 ", host="2001:db8::1"), f"2001:db8::1|{FIREFOX}"),
        (line(before="birds.example ", user="ann lee"), "ann lee"),
        (line(agent=None), "192.0.2.1"),
        (line(agent=FIREFOX + r" \"quoted\" \\"), f'192.0.2.1|{FIREFOX} "quoted" \\'),
        (line(agent=FIREFOX + r" \x22nginx\x22"), f'192.0.2.1|{FIREFOX} "nginx"'),
        (line(referer=r"https://example.org/?q=\"a\" \"b\""), f"192.0.2.1|{FIREFOX}"),
        (line(behind=' "198.51.100.7"'), f"192.0.2.1|{FIREFOX}"),  # nginx's default: X-Forwarded-For
        (line(behind=' "198.51.100.7" 0.004 unix:/run/app.sock'), f"192.0.2.1|{FIREFOX}"),
        (line().replace(" 512 ", " - "), f"192.0.2.1|{FIREFOX}"),  # nothing sent but the head
    ],
)
def test_the_reader_is_who_logged_in_else_address_and_browser(tmp_path, text, user):
    assert only(tmp_path, text, Event).user_id == user


@pytest.mark.parametrize(
    ("before", "target", "document_id"),
    [
        ("", "/birds", "/birds"),
        ("", "/birds?id=5&utm_source=mail", "/birds?id=5"),
        ("", "/sea%20birds", "/sea%20birds"),
        ("", "/sea birds", "/sea%20birds"),  # some servers log a target as it was sent
        ("", "/a/../birds", "/birds"),
        ("", "/caf%C3%A9", "/caf%C3%A9"),
        ("", "/café", "/caf%C3%A9"),
        ("", r"/caf\xC3\xA9", "/caf%C3%A9"),  # nginx
        ("", r"/caf\xc3\xa9", "/caf%C3%A9"),  # Apache
        ("", r"/caf\xE9", "/caf%E9"),  # another page: the server decides what E9 is
        ("", r"/say\"hello\"", "/say%22hello%22"),
        ("birds.example:80 ", "/owls", "http://birds.example/owls"),
        ("birds.example:443 ", "/owls", "https://birds.example/owls"),
        ("birds.example:8080 ", "/owls", "http://birds.example:8080/owls"),
        ("Birds.example ", "/owls", "http://birds.example/owls"),
        ("- ", "/owls", "/owls"),
        ("", "https://birds.example/owls", "https://birds.example/owls"),  # a proxy's log
        ("", "/go?to=https://birds.example/", "/go?to=https://birds.example/"),
    ],
)
def test_one_page_has_one_id_however_it_was_asked_for(tmp_path, before, target, document_id):
    found = items(tmp_path, line(f"GET {target} HTTP/1.1", before=before))
    assert [item.document_id for item in found] == [document_id, document_id]


@pytest.mark.parametrize(
    ("target", "title", "text"),
    [
        ("/wiki/Sea_birds.html?page=2", "/wiki/Sea_birds.html?page=2", "wiki Sea birds page 2"),
        ("/caf%C3%A9/%ED%95%9C%EA%B5%AD", "/café/한국", "café 한국"),
        ("/caf%E9", "/café", "café"),
        ("/%81", "/\ufffd", ""),
        ("/", "/", ""),
        ("/St._Louis", "/St._Louis", "St Louis"),
    ],
)
def test_a_page_is_called_by_its_address_made_readable(tmp_path, target, title, text):
    document = only(tmp_path, line(f"GET {target} HTTP/1.1"), Document)
    assert (document.title, document.text) == (title, text)


def test_a_page_of_a_named_host_has_a_url(tmp_path):
    document = only(tmp_path, line(before="birds.example:443 "), Document)
    assert document.url == "https://birds.example/birds"
    assert document.text == "birds example birds"


@pytest.mark.parametrize("status", [200, 304])
def test_a_page_that_was_sent_or_still_fresh_is_an_event(tmp_path, status):
    assert only(tmp_path, line(status=status), Event).document_id == "/birds"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (line(status=404), "not_successful"),
        (line(status=301), "not_successful"),
        (line(status=206), "not_successful"),
        (line(status=500), "not_successful"),
        (line("-", status=408), "not_successful"),  # the other side said nothing
        (line(r"\x16\x03\x01\x02", status=400), "not_successful"),  # TLS spoken to a plain port
        (line("POST /birds HTTP/1.1"), "not_get"),
        (line("HEAD /birds HTTP/1.1"), "not_get"),
        (line("OPTIONS * HTTP/1.0", host="::1"), "not_get"),
        (line("-"), "not_get"),
        (line("GET /style.css HTTP/1.1"), "asset"),
        (line("GET /app.JS?v=3 HTTP/2.0"), "asset"),
        (line("GET /v1.2/logo.png HTTP/1.1"), "asset"),
        (line("GET /favicon.ico HTTP/1.1"), "asset"),
        (line("GET /robots.txt HTTP/1.1"), "for_programs"),
        (line("GET /.well-known/security.txt HTTP/1.1"), "for_programs"),
        (line("GET * HTTP/1.1"), "no_web_page"),
        (line("GET http://localhost/x HTTP/1.1"), "no_web_page"),
    ],
)
def test_what_is_no_page_that_was_read_is_skipped_by_its_reason(tmp_path, text, reason):
    assert items(tmp_path, text) == [Skipped(1, reason)]


@pytest.mark.parametrize(
    "target", ["/birds.html", "/a.css/birds", "/birds?next=/a.css", "/owls.pdf", "/notes.txt"]
)
def test_what_only_looks_like_a_part_of_a_page_is_an_event(tmp_path, target):
    assert only(tmp_path, line(f"GET {target} HTTP/1.1"), Event)


def test_a_request_without_a_version_is_one_too(tmp_path):
    assert only(tmp_path, line("GET /birds"), Event).document_id == "/birds"  # HTTP/0.9


@pytest.mark.parametrize(
    "agent",
    [
        "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)",
        "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko; compatible; GPTBot/1.2; +https://openai.com/gptbot)",
        "curl/8.5.0", "python-requests/2.32.3", "kube-probe/1.31", "My-Own-Spider/0.1", "-",
    ],
)  # fmt: skip
def test_a_bot_is_no_reader(tmp_path, agent):
    assert items(tmp_path, line(agent=agent)) == [Skipped(1, "bot")]


@pytest.mark.parametrize(
    "agent",
    [
        FIREFOX,
        "Mozilla/5.0 (Linux; Android 10; CUBOT NOTE 20) AppleWebKit/537.36 (KHTML, like Gecko) "
        "Chrome/130.0.0.0 Mobile Safari/537.36",
        "Lynx/2.9.0 libwww-FM/2.14 SSL-MM/1.4.1",
    ],
)
def test_a_browser_is_no_bot(tmp_path, agent):
    assert only(tmp_path, line(agent=agent), Event)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("10/Oct/2000:13:55:36 -0700", datetime(2000, 10, 10, 20, 55, 36, tzinfo=UTC)),
        ("21/Nov/2026:17:30:00 +0530", NOON),
        ("21/Nov/2026:08:30:00 -0330", NOON),
        ("2026-11-21T12:00:00+00:00", NOON),
    ],
)
def test_a_time_is_read_with_its_offset(tmp_path, text, moment):
    assert only(tmp_path, line(time=text), Event).timestamp == moment


@pytest.mark.parametrize(
    "time", ["31/Feb/2026:12:00:00 +0000", "21/Now/2026:12:00:00 +0000", "2026-11-21T12:00:00", "21/Nov/2026"]
)
def test_a_time_that_cannot_be_is_rejected(tmp_path, time):
    reject = only(tmp_path, line(time=time), Reject)
    assert (reject.line, reject.reason) == (1, "bad_timestamp")
    assert time in reject.detail


@pytest.mark.parametrize(
    "text", ["garbage", line()[:60], "#Fields: date time c-ip", line().replace('"', "'")]
)
def test_a_line_of_another_form_is_rejected_by_its_number(tmp_path, text):
    found = items(tmp_path, line(), "", text)
    assert found[2:] == [Reject(3, "not_common_or_combined", text)]


def test_a_line_that_is_no_utf_8_is_read(tmp_path):
    raw = line("GET /caf\xe9 HTTP/1.1").encode("latin-1")
    assert only(tmp_path, raw, Event).document_id == "/caf%E9"


def test_windows_line_ends_are_read(tmp_path):
    assert only(tmp_path, line(agent=None) + "\r", Event).document_id == "/birds"


def test_a_line_without_end_is_cut_and_the_next_one_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(serverlog, "MAX_LINE", 1000)
    found = items(tmp_path, "x" * 2500, line(), "x" * 1000, line())
    assert [(item.line, len(item.detail)) for item in found if isinstance(item, Reject)] == [
        (1, 1000),
        (3, 1000),
    ]
    assert sum(isinstance(item, Event) for item in found) == 2


@pytest.mark.parametrize(
    ("name", "compress"),
    [("a.log", bytes), ("a.log.gz", gzip.compress), ("a.log.zst", zstandard.compress),
     ("a.log.bz2", bz2.compress), ("a.log.1", gzip.compress)],
)  # fmt: skip
def test_compressed_logs_are_told_by_their_first_bytes(tmp_path, name, compress):
    path = tmp_path / name
    text = (line() + "\n").encode()
    path.write_bytes(compress(text) + compress(text))  # two parts in a row, as log rotation may leave
    assert sum(isinstance(item, Event) for item in serverlog.read(path, "", None)) == 2


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_log_that_was_cut_short_is_refused(tmp_path, compress):
    path = tmp_path / "access.log"
    path.write_bytes(compress("".join(f"{line()} {i}\n" for i in range(1000)).encode())[:-20])
    with pytest.raises(InputError, match=r"access\.log: cannot be decompressed: .*; copy it again"):
        list(serverlog.read(path, "", None))


def test_progress_is_counted_in_bytes_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(serverlog, "PROGRESS_EVERY", 2)
    path = tmp_path / "access.log"
    path.write_text(f"{line()}\n" * 5)
    steps = [item.n_bytes for item in serverlog.read(path, "", None) if isinstance(item, Progress)]
    assert len(steps) == 2
    assert 0 < sum(steps) <= path.stat().st_size


def test_a_user_of_two_pages_is_one_reader(tmp_path):
    found = items(tmp_path, line(), line("GET /owls HTTP/1.1"), line(host="192.0.2.2"))
    assert len({item.user_id for item in found if isinstance(item, Event)}) == 2


@pytest.mark.timeout(10)
@pytest.mark.parametrize("part", [" [1", ' [1] "', '\\"', "a b ", '" 200 5 "'])
def test_a_line_made_to_keep_a_parser_busy_is_done_with_soon(tmp_path, part):
    text = line(f"GET /{part * 20_000}")
    assert items(tmp_path, *[text] * 10)
