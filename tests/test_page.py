"""The search page in a real browser: many scripts, keyboard, aids to readers, errors, and what it keeps."""

import asyncio
import json
import shutil
import socket
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
import uvicorn
from gateway_parts import ENCODER, gateway_of, means_of, publish
from starlette.responses import JSONResponse

from serving.feedback import Feedback
from serving.gateway_routes import make_app

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PAGE = Path(__file__).parents[1] / "serving" / "page"
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
EVIL = '<img src="x" onerror="window.harmed = true"><script>window.harmed = true</script>'
DOCUMENTS = [
    {"document_id": name, "language": language, "title": title, "text": text, "url": url}
    for name, language, title, text, url in [
        ("ko", "ko", "한국어 문법", "조사와 어미", "https://example.org/ko"),
        ("hi", "hi", "हिन्दी व्याकरण", "संज्ञा और क्रिया", None),
        ("ja", "ja", "日本語の文法", "助詞と動詞", None),
        ("zh", "zh", "中文语法", "量词和语序", None),
        ("party", "en", "🎉 Party planning", "Music and cake 🎂", None),
        ("violin", "en", "Violin for beginners", "A violin, a bow", "https://example.org/v"),
        ("viola", "en", "Viola parts", "Lower than its sister, the violin", "http://example.org/"),
        ("evil", "en", EVIL, f"harm {EVIL}", "javascript:window.harmed=true"),
        ("long", "en", "wide" * 40, "wide " + "w" * 400, None),
        ("here", "en", "Zephyr", "zephyr", "/news/17"),
    ]
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: apt-get install chromium"),
]


class LettersEncoding:
    """Stands in for an encoder: a text's vector counts its letter pairs, hashed to axes, at unit length."""

    encoder_sha256, dim = ENCODER, 512

    async def queries(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([_vector(text) for text in texts], np.float32).reshape(-1, self.dim)

    documents = queries

    def tokens(self, text: str) -> int | None:
        return len(text)

    async def close(self) -> None:
        pass


def _vector(text: str) -> np.ndarray:
    text, counts = f" {text.casefold()} ", np.zeros(LettersEncoding.dim, np.float32)
    for at in range(len(text) - 1):
        counts[zlib.crc32(text[at : at + 2].encode()) % len(counts)] += 1
    return counts / np.linalg.norm(counts)


class Watched:
    """The gateway's routes, with what was asked of them; may be slow, or refuse, as the real ones may.

    Attributes:
        asked: path and body of every POST.
        delays: seconds that a query's answer takes longer.
        error: status and body of every answer to a POST; None: the gateway's own.
    """

    def __init__(self, app: Any, address: str) -> None:
        self._app, self.address = app, address
        self.asked: list[tuple[str, dict]] = []
        self.delays: dict[str, float] = {}
        self.error: tuple[int, str] | None = None

    def of(self, path: str) -> list[dict]:
        return [body for asked, body in self.asked if asked == path]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        message = await receive()
        body = json.loads(message["body"])
        self.asked.append((scope["path"], body))
        await asyncio.sleep(self.delays.get(body.get("query"), 0))
        if self.error:
            return await JSONResponse({"error": self.error[1]}, self.error[0])(scope, receive, send)
        first = [message]

        async def again() -> Any:
            return first.pop() if first else await receive()

        return await self._app(scope, again, send)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    """The real gateway over DOCUMENTS in one process, served from a thread: its routes and its address."""
    folder = tmp_path_factory.mktemp("gateway")
    version = publish(folder, 7, DOCUMENTS, dim=LettersEncoding.dim)
    rows = np.stack([_vector(f"{each['title']} {each['text']}") for each in DOCUMENTS])
    np.save(version.folder / "assets.extra" / "rows.npy", rows)
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    feedback = Feedback.open(folder / "log", user_key=b"k" * 32)
    started: Queue = Queue()

    async def serve() -> None:
        means = means_of(folder, encoding=LettersEncoding)
        async with gateway_of(folder, means=means, feedback=feedback) as (running, _):
            watched = Watched(make_app(running), address)
            server = uvicorn.Server(uvicorn.Config(watched, log_level="error", lifespan="off"))
            started.put((watched, server))
            await server.serve(sockets=[listener])

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    watched, server = started.get(timeout=60)
    yield watched
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


class Tab:
    """One tab for all tests, and what was asked and complained of in it."""

    def __init__(self, browser) -> None:
        self.page = browser.new_page()
        self.page.set_default_timeout(5_000)
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda said: said.type == "error" and self.complaints.append(said.text))

    def begin(self, address: str) -> None:
        self.page.unroute_all()
        self.page.set_viewport_size({"width": 1200, "height": 900})
        self.page.emulate_media(color_scheme="light")
        self.page.goto(address)
        if self.page.evaluate("localStorage.length"):
            self.page.evaluate("localStorage.clear()")
            self.page.reload()
        self.asked.clear()
        self.complaints.clear()


@pytest.fixture(scope="module")
def tab(browser):
    return Tab(browser)


@pytest.fixture
def page(tab, gateway):
    """The page, just opened; at the end it must have asked no other host, and complained of nothing."""
    gateway.asked, gateway.delays, gateway.error = [], {}, None
    tab.begin(gateway.address)
    yield tab.page
    assert tab.page.evaluate("window.harmed") is None
    assert all(url.startswith(gateway.address) for url in tab.asked)
    # a refusal is told by the page itself; the browser names it too
    assert [text for text in tab.complaints if not text.startswith("Failed to load resource")] == []


def results(page) -> list[str]:
    return page.locator("#results .open").all_inner_texts()


def wait_for_first(page, title: str) -> None:
    page.wait_for_function(
        "title => document.querySelector('#results .open')?.textContent === title", arg=title, polling=20
    )


def wait_for_title(page, title: str) -> None:
    page.wait_for_function(
        "title => document.querySelector('#titles .title')?.textContent === title", arg=title, polling=20
    )


def test_titles_and_results_come_while_one_types(page, gateway):
    page.keyboard.type("violin", delay=5)  # the box has the focus from the start
    wait_for_title(page, "Violin for beginners")
    wait_for_first(page, "Violin for beginners")
    assert page.locator("#said").inner_text() == f"{len(results(page))} results"
    assert [body["query"] for body in gateway.of("/search")] == ["violin"]  # not once a letter


def test_a_slow_answer_never_replaces_a_later_one(page, gateway):
    gateway.delays = {"viola": 0.5}
    page.fill("#query", "viola")
    with page.expect_request("**/search"):
        pass
    page.fill("#query", "문법")
    wait_for_first(page, "한국어 문법")
    page.wait_for_timeout(600)
    assert results(page)[0] == "한국어 문법"
    assert [body["query"] for body in gateway.of("/search")] == ["viola", "문법"]


def test_hangul_is_found_before_its_syllable_is_complete(page):
    keyboard = page.context.new_cdp_session(page)
    for shown in ("ㅎ", "하", "한"):
        keyboard.send("Input.imeSetComposition", {"text": shown, "selectionStart": 1, "selectionEnd": 1})
        wait_for_title(page, "한국어 문법")
        assert page.input_value("#query") == shown
    keyboard.send("Input.insertText", {"text": "한"})  # the next letter begins a new syllable
    for shown in ("ㄱ", "구", "국"):
        keyboard.send("Input.imeSetComposition", {"text": shown, "selectionStart": 1, "selectionEnd": 1})
        page.wait_for_timeout(150)  # a search in the midst of a composition leaves the box alone
        wait_for_title(page, "한국어 문법")
        assert page.input_value("#query") == "한" + shown
    keyboard.send("Input.insertText", {"text": "국"})
    assert page.input_value("#query") == "한국"
    wait_for_first(page, "한국어 문법")


def test_a_slip_in_typing_is_forgiven(page):
    for typed, title in (
        ("함국어", "한국어 문법"),
        ("voilin", "Violin for beginners"),
        ("भिन्दी", "हिन्दी व्याकरण"),
    ):
        page.fill("#query", typed)
        wait_for_title(page, title)


def test_hindi_japanese_chinese_and_emoji_find_their_documents(page):
    for typed, title in (
        ("हिन्दी", "हिन्दी व्याकरण"),
        ("日本語", "日本語の文法"),
        ("语法", "中文语法"),
        ("🎉", "🎉 Party planning"),
    ):
        page.fill("#query", "")
        page.keyboard.insert_text(typed)
        wait_for_title(page, title)
        wait_for_first(page, title)


def test_arrows_move_through_the_results_and_enter_opens(page):
    page.fill("#query", "violin")
    wait_for_first(page, "Violin for beginners")
    focused = "document.activeElement.textContent"
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.className") == "title stop"
    while page.evaluate("document.activeElement.className") == "title stop":
        page.keyboard.press("ArrowDown")
    assert page.evaluate(focused) == "Violin for beginners"
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused) == results(page)[1]
    page.keyboard.press("ArrowUp")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "query"
    assert page.input_value("#query") == "violin"
    page.keyboard.press("Escape")
    assert page.input_value("#query") == ""
    assert results(page) == []
    assert page.locator("#empty").is_visible()


def test_enter_on_a_result_follows_its_link(page):
    page.fill("#query", "violin")
    wait_for_first(page, "Violin for beginners")
    page.locator("#results .open").first.focus()
    # the browser's answer to a link that is followed, without leaving this machine
    page.evaluate(
        "addEventListener('click', (e) => { e.preventDefault(); window.followed = e.target.href; })"
    )
    page.keyboard.press("Enter")
    assert page.evaluate("window.followed") == "https://example.org/v"


def test_a_document_without_an_address_unfolds(page):
    page.fill("#query", "日本語")
    wait_for_first(page, "日本語の文法")
    opener = page.locator("#results .open").first
    assert opener.get_attribute("aria-expanded") == "false"
    opener.press("Enter")
    assert opener.get_attribute("aria-expanded") == "true"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_that_shuts_people_out(page, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page.emulate_media(color_scheme=scheme)
    page.fill("#query", "violin")
    wait_for_first(page, "Violin for beginners")
    page.locator("#results .open").first.focus()
    found = Axe().run(page).response["violations"]
    assert [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found] == []


def test_dark_follows_the_system_until_one_chooses(page):
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(250, 248, 244)"
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(ground) == "rgb(21, 24, 27)"
    assert page.get_attribute("#theme", "aria-pressed") == "true"
    page.click("#theme")
    assert page.evaluate(ground) == "rgb(250, 248, 244)"
    page.reload()
    assert page.evaluate(ground) == "rgb(250, 248, 244)"


def test_markup_in_a_document_is_shown_as_text_and_only_web_addresses_are_links(page):
    page.fill("#query", "harm")
    wait_for_first(page, EVIL)
    assert page.locator("#results a[href^='javascript']").count() == 0
    assert page.locator("#results img, #titles img, #results script").count() == 0
    page.locator("#results .open").first.click()
    page.fill("#query", "<img")
    wait_for_title(page, EVIL)


def test_related_documents_and_the_way_back(page, gateway):
    page.fill("#query", "violin")
    wait_for_first(page, "Violin for beginners")
    before = results(page)
    page.get_by_role("button", name="Related to Violin for beginners").click()
    wait_for_first(page, "Viola parts")  # "the violin"
    assert gateway.of("/related") == [{"document_ids": ["violin"], "k": 10}]
    assert "Violin for beginners" not in results(page)
    assert page.locator("#results-heading").inner_text() == "Related to “Violin for beginners”"
    page.click("#back")
    assert results(page) == before


def test_an_error_is_one_sentence_and_goes_with_the_next_answer(page, gateway):
    gateway.error = (503, "no index server answers at http://localhost:9090: start it")
    page.fill("#query", "violin")
    page.get_by_role("alert").wait_for()
    assert page.get_by_role("alert").inner_text() == gateway.error[1]
    gateway.error = None
    page.fill("#query", "viola")
    wait_for_first(page, "Viola parts")
    assert page.get_by_role("alert").count() == 0


def test_a_server_that_is_gone_is_told_in_plain_words(page):
    page.route("**/search", lambda route: route.abort())
    page.fill("#query", "violin")
    page.get_by_role("alert").wait_for()
    assert page.get_by_role("alert").inner_text().startswith("The search does not answer.")


def test_nothing_found_is_told(page):
    page.press("#least", "End")  # 0.95
    page.fill("#query", "qqqq")
    page.locator("#empty", has_text="Nothing found").wait_for()
    assert page.locator("#said").inner_text() == "No results"


def test_language_score_and_words_go_with_the_search(page, gateway):
    page.fill("#query", "violin")
    wait_for_first(page, "Violin for beginners")
    page.locator("#language option[value=en]").wait_for(state="attached")
    page.select_option("#language", "en")
    page.uncheck("#hybrid")
    page.focus("#least")
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.querySelectorAll('#results li').length === 2", polling=20)
    assert results(page) == ["Violin for beginners", "Viola parts"]
    assert page.locator("#least-shown").inner_text() == "0.30"
    assert gateway.of("/search")[-1] == {
        "query": "violin",
        "k": 10,
        "hybrid": False,
        "filter": {"language": "en", "minimum_score": 0.3},
    }


def test_nothing_is_remembered_unless_one_allows_it(page, gateway):
    page.fill("#query", "日本語")
    wait_for_first(page, "日本語の文法")
    page.locator("#results .open").first.click()
    assert page.evaluate("localStorage.length") == 0
    page.check("#remember")
    page.locator("#results .open").first.click()  # folded again: nothing is opened
    with page.expect_request("**/opened"):
        page.locator("#results .open").first.click()
    reader = page.evaluate("localStorage.reader")
    assert len(reader) == 32
    page.wait_for_timeout(50)
    assert gateway.of("/opened") == [
        {"query": "日本語", "document_id": "ja", "rank": 1, "version": 7, "user_id": reader}
    ]
    page.reload()
    assert page.is_checked("#remember")
    page.uncheck("#remember")
    assert page.evaluate("localStorage.length") == 0
    assert [list(body) for body in gateway.of("/search")] == [["query", "k", "hybrid"]]


def test_who_allows_it_is_known_to_every_question_that_a_comparison_splits(page, tab, gateway):
    page.check("#remember")
    reader = page.evaluate("localStorage.reader")
    page.fill("#query", "violin")
    wait_for_first(page, "Violin for beginners")
    page.get_by_role("button", name="Related to Violin for beginners").click()
    wait_for_first(page, "Viola parts")
    asked = gateway.of("/search") + gateway.of("/related")
    assert [body["user_id"] for body in asked] == [reader, reader]
    [suggest] = [url for url in tab.asked if "/suggest" in url]
    assert suggest.endswith(f"/suggest?q=violin&k=8&user_id={reader}")
    page.uncheck("#remember")


def test_what_was_not_found_by_the_query_is_logged_without_one(page, gateway):
    page.check("#remember")
    reader = page.evaluate("localStorage.reader")
    # links that are followed would leave the page
    page.evaluate("addEventListener('click', (e) => e.target.closest('a') && e.preventDefault())")
    page.fill("#query", "violin")
    wait_for_title(page, "Violin for beginners")
    wait_for_first(page, "Violin for beginners")
    page.locator("#titles .title").first.click()
    page.get_by_role("button", name="Related to Violin for beginners").click()
    wait_for_first(page, "Viola parts")
    page.locator("#results .open").first.click()
    page.click("#back")
    with page.expect_response("**/opened"):
        page.locator("#results .open").first.click()
    found = {"document_id": "violin", "version": 7, "user_id": reader}
    logged = sorted(gateway.of("/opened"), key=lambda body: (body["document_id"], len(body)))
    assert logged == [found | {"document_id": "viola"}, found, found | {"query": "violin", "rank": 1}]
    page.uncheck("#remember")


def test_an_open_is_logged_with_the_query_that_found_it_not_with_what_was_typed_since(page, gateway):
    page.check("#remember")
    page.fill("#query", "日本語")
    wait_for_first(page, "日本語の文法")
    gateway.delays = {"violin": 0.5}
    page.fill("#query", "violin")
    with page.expect_response("**/opened"):
        page.locator("#results .open").first.click()
    assert gateway.of("/opened")[0]["query"] == "日本語"
    page.uncheck("#remember")


def test_canned_answers_stand_above_the_results_and_lead_only_where_one_may_go(page):
    paths = ["/help/hours", "https://example.org/h", "javascript:window.harmed=true", f"Desk {EVIL}"]
    items = [{"document_id": f"i{n}", "path": path, "phrase": f"hours {n}", "score": 0.9}
             for n, path in enumerate(paths)]  # fmt: skip
    answer = {"version": 7, "query": "hours", "results": [], "items": items, "took_ms": 1}
    page.route("**/search", lambda route: route.fulfill(json=answer))
    page.fill("#query", "hours")
    page.locator("#items li").first.wait_for()
    links = page.locator("#items a")
    assert links.all_inner_texts() == ["hours 0", "hours 1"]
    assert links.evaluate_all("links => links.map((a) => a.getAttribute('href'))") == [
        f"{page.url}help/hours",
        "https://example.org/h",
    ]
    assert page.locator("#items .place").all_inner_texts() == paths
    assert page.locator("#said").inner_text() == "4 answers. No results"
    assert page.evaluate(
        "document.getElementById('items').getBoundingClientRect().bottom"
        " <= document.getElementById('results').getBoundingClientRect().top"
    )
    page.unroute("**/search")
    page.fill("#query", "violin")
    wait_for_first(page, "Violin for beginners")
    assert page.locator("#items").is_hidden()


def test_an_address_without_a_host_is_this_site_s(page):
    page.fill("#query", "zephyr")
    wait_for_first(page, "Zephyr")
    assert page.locator("#results a.open").first.get_attribute("href") == f"{page.url}news/17"


def test_going_back_forgets_related_documents_that_are_under_way(page, gateway):
    page.fill("#query", "violin")
    wait_for_first(page, "Violin for beginners")
    before = results(page)
    page.get_by_role("button", name="Related to Violin for beginners").click()
    wait_for_first(page, "Viola parts")
    gateway.delays = {None: 0.3}  # of what has no query
    with page.expect_request("**/related"):
        page.locator("#results .related").first.click()
    page.click("#back")
    page.wait_for_timeout(400)
    assert results(page) == before
    assert page.locator("#progress").is_hidden()


def test_no_language_is_offered_before_it_is_known_which_there_are(page):
    refused = {"error": "not ready"}
    page.route("**/health", lambda route: route.fulfill(status=503, json=refused))
    with page.expect_response("**/health"):
        page.reload()
    page.wait_for_timeout(50)
    assert page.locator("#language-control").is_hidden()
    assert page.locator("#language option").count() == 1  # any
    page.unroute("**/health")
    page.fill("#query", "violin")
    page.locator("#language-control").wait_for()
    assert page.locator("#language option").count() == 1 + 5  # en, hi, ja, ko, zh


def test_a_phone_of_360_pixels_needs_no_scrolling_aside(page):
    page.set_viewport_size({"width": 360, "height": 700})
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) <= 360
    page.fill("#query", "wide")
    wait_for_first(page, "wide" * 40)
    assert page.evaluate(width) <= 360


@pytest.mark.parametrize("name", ["index.html", "page.css", "page.js"])
def test_the_page_s_files_name_no_host_and_put_no_data_into_markup(name):
    text = (PAGE / name).read_text(encoding="utf-8")
    assert "://" not in text
    assert not any(
        unsafe in text for unsafe in ("innerHTML", "insertAdjacentHTML", "eval(", " style=", " onclick")
    )
