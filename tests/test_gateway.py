"""The gateway over HTTP: what people ask and are told, which version answers, and what ends a start."""

import asyncio
import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import requests
import uvloop
from gateway_parts import (
    DOCUMENTS,
    OTHER_ENCODER,
    WordsEncoding,
    flags_of,
    gateway_of,
    index_server,
    means_of,
    publish,
    until,
)
from serving_parts import ROOT, export_tuned, free_port, server_process
from test_ask import MAKE_ENCODER, TEXTS

from pipeline.artifacts import encoder_sha256, file_hashes
from pipeline.errors import InputError
from serving import gateway as gateway_module
from serving import gateway_answers
from serving.__main__ import main
from serving.encoding import EncodingError, FullError, TooLongError
from serving.feedback import Feedback, Split
from serving.fresh import FreshDocuments
from serving.gateway import make_gateway
from serving.gateway_answers import Bounds, Metrics
from serving.gateway_flags import parse
from serving.index_backends import ServedIndex
from serving.pinning import EncoderMismatchError

ARK = [{"document_id": "ark", "title": "Ark", "text": "ship"}]
SPLIT = Split(0, 6, 0.5, b"0123456789abcdef")
SHIP = ["voyage", "harbour", "loaf", "sky"]


def over(folder, test, *arguments, **more):
    """Run `test(gateway, caller)` over a gateway of FOLDER."""

    async def run():
        async with gateway_of(folder, *arguments, **more) as (gateway, caller):
            return await test(gateway, caller)

    return asyncio.run(run())


def posted(folder, path, *arguments, means=None, **body):
    """One answer of a gateway of FOLDER."""

    async def ask(_, caller):
        return await caller.post(path, **body)

    return over(folder, ask, *arguments, means=means)


# --- What is answered --------------------------------------------------------------------------


def test_a_search_answers_with_documents_scores_and_reasons(tmp_path):
    publish(tmp_path)
    answer = posted(tmp_path, "/search", query=" ship ", k=2)
    assert (answer.status, answer.ids) == (200, ["voyage", "harbour"])
    assert (answer.json["version"], answer.json["query"], answer.json["hybrid"]) == (7, "ship", False)
    assert answer.json["took_ms"] > 0
    second = answer.json["results"][1]
    assert second["url"] == "https://example.org/harbour"
    assert (second["title"], second["text"], second["language"]) == ("Harbour", "sea ship", None)
    assert second["score"] == pytest.approx(0.5**0.5)
    wanted = {"dense_rank": 2, "lexical": None, "lexical_rank": None, "fresh": False, "sessions": []}
    assert second["why"] == {"dense": second["score"]} | wanted


def test_related_context_suggestions_and_hybrid_answer_from_the_same_version(tmp_path):
    publish(tmp_path)

    async def ask(_, caller):
        related = await caller.post("/related", document_ids=["harbour"], k=1)
        context = await caller.post("/context", query="ship", max_tokens=3)
        titles = await caller.get("/suggest?q=voy&k=3")
        hybrid = await caller.post("/search", query="voyage", hybrid=True, k=1)
        return related, context, titles, hybrid

    related, context, titles, hybrid = over(tmp_path, ask)
    assert related.ids == ["voyage"]
    [passage] = context.json["passages"]
    assert (passage["document_id"], passage["text"], passage["n_tokens"]) == ("voyage", "ship ship sea", 3)
    assert titles.ids == ["voyage"]
    assert (hybrid.ids, hybrid.json["hybrid"]) == (["voyage"], True)
    assert {each.json["version"] for each in (related, context, titles, hybrid)} == {7}


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/search", {"query": "  "}, "query is empty; wanted some words to search for"),
        ("/search", {"query": "x" * 2001}, "query has 2001 letters, wanted at most 2000: shorten it"),
        ("/search", {"query": "x", "k": 101}, "k is 101, wanted 1 to 100"),
        ("/search", {"query": "x", "k": 0}, "k: input should be greater than or equal to 1; see /docs"),
        ("/search", {"query": "x", "limit": 3}, "limit is not a field of this request; see /docs"),
        ("/search", {"query": "x", "filter": {"lang": "ko"}}, "filter.lang is not a field of this request"),
        ("/search", {"k": 3}, "query: field required; see /docs"),
        ("/search", {"query": "x", "k": "3"}, "k: input should be a valid integer; see /docs"),
        ("/search", {"query": "\ud800"}, "the body has half a character"),
        ("/search", {"query": "x", "y" * 200: 1}, "y" * 100 + " is not a field of this request"),
        ("/opened", {"document_id": "a" * 1001}, "document_id: string should have at most 1000 characters"),
        ("/opened", {"document_id": "a", "version": 2**63}, "version: input should be less than 9223372036"),
        ("/related", {"document_ids": ["nobody"]}, "document_ids: version 7 has no document 'nobody'"),
        ("/related", {"document_ids": []}, "document_ids: "),
        ("/context", {"query": "x", "max_tokens": 0}, "max_tokens: input should be greater"),
        ("/documents", {"add": [{"document_id": "a"}]}, "documents cannot be added: start the gateway with"),
        ("/opened", {"document_id": "a"}, "nothing is logged: start the gateway with --feedback DIR"),
        ("/items/try", {"phrase": "x"}, "there are no items: start the gateway with --items FILE"),
    ],
)
def test_what_is_asked_wrongly_is_one_line_that_a_person_understands(tmp_path, path, body, said):
    publish(tmp_path)
    answer = posted(tmp_path, path, **body)
    assert answer.status == (404 if "start the gateway" in said else 400)
    assert list(answer.json) == ["error"]
    assert answer.json["error"].startswith(said)
    assert "\n" not in answer.json["error"]


@pytest.mark.parametrize(
    ("method", "path", "body", "content_type", "status", "said"),
    [
        ("POST", "/search", b"{", "application/json", 400, "the body is no JSON object"),
        ("POST", "/search", b"[]", "application/json", 400, "the body: "),
        ("POST", "/search", b"\xff", "application/json", 400, "the body is no JSON object"),
        ("POST", "/search", b'{"query": "\xed\xa0\x80"}', "application/json", 400, "the body has half a"),
        (
            "POST",
            "/search",
            '{"query": "\ud800"}'.encode("utf-16", "surrogatepass"),
            "application/json",
            400,
            "the body has half a",
        ),
        ("POST", "/search", b"query=x", "application/x-www-form-urlencoded", 415, "wanted JSON: send the"),
        ("POST", "/search", b'"' + b"x" * 5000 + b'"', "application/json", 413, "the request is larger than"),
        ("POST", "/search/", b"{}", "application/json", 404, "there is no /search/ here"),
        ("GET", "/search", b"", "application/json", 405, "GET is not answered at /search"),
        ("GET", "/page/../gateway.py", b"", "application/json", 404, "there is no /page/../gateway.py here"),
        ("GET", "/page.css/..%2fgateway.py", b"", "application/json", 404, "there is no /page.css/"),
        ("GET", "/suggest?q=a&k=x", b"", "application/json", 400, "k: input should be a valid integer"),
    ],
)
def test_what_is_no_request_is_refused_too(tmp_path, method, path, body, content_type, status, said):
    publish(tmp_path)

    async def ask(_, caller):
        return await caller.call(method, path, body, content_type)

    answer = over(tmp_path, ask, "--in_process", "--max_body_bytes", "4000")
    assert answer.status == status
    assert answer.json["error"].startswith(said)


def test_more_requests_than_may_be_under_way_are_told_to_come_back(tmp_path):
    publish(tmp_path)

    async def ask(gateway, caller):
        async with index_server() as (url, server):
            gateway.pins.live.finder.backend = means_of(tmp_path, url).served
            server.serve(7)
            server.hold.clear()
            first = asyncio.create_task(caller.post("/search", query="ship"))
            await until(lambda: server.asked)
            second = await caller.post("/search", query="ship")
            health = await caller.get("/health")
            server.hold.set()
            status = (await first).status
            await gateway.pins.live.finder.backend.close()
            return status, second, health.status

    first, second, health = over(tmp_path, ask, "--in_process", "--max_queued", "1")
    assert (first, second.status, health) == (200, 429, 200)
    assert second.json["error"] == "too many requests are under way; ask again in a moment"


@pytest.mark.parametrize(
    ("arguments", "host", "status"),
    [
        ((), "localhost:8000", 200),
        ((), "[::1]:8000", 200),
        ((), "elsewhere.example:8000", 403),  # a name that was turned to 127.0.0.1 for a page of its own
        (("--allowed_host", "Search.example"), "search.example", 200),
        (("--host", "0.0.0.0"), "elsewhere.example", 200),
    ],
)
def test_a_gateway_of_this_machine_alone_is_asked_by_its_names_alone(tmp_path, arguments, host, status):
    publish(tmp_path)

    async def ask(_, caller):
        return await caller.call("GET", "/health", host=host)

    assert over(tmp_path, ask, "--in_process", *arguments).status == status


def test_pages_are_served_with_a_policy_and_without_another_address(tmp_path):
    publish(tmp_path)

    async def ask(_, caller):
        return [await caller.get(path) for path in ("/", "/page.css", "/page.js", "/docs", "/openapi.json")]

    page, style, script, docs, schema = over(tmp_path, ask)
    assert [each.status for each in (page, style, script, docs, schema)] == [200] * 5
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert script.headers["content-type"].startswith("text/javascript")
    assert "default-src 'none'" in docs.headers["content-security-policy"]
    assert b"http://localhost:8000/search" in docs.body
    assert b"<script" not in docs.body
    assert {"/search", "/related", "/context", "/suggest", "/documents", "/items", "/opened"} <= {
        *schema.json["paths"]
    }


def test_health_and_metrics_say_what_answers(tmp_path):
    publish(tmp_path, description="simulated readers")

    async def ask(_, caller):
        await caller.post("/search", query="ship")
        await caller.post("/search", query="")
        return await caller.get("/health"), await caller.get("/metrics")

    health, metrics = over(tmp_path, ask)
    said = health.json
    assert (health.status, said["version"], said["documents"], said["hybrid"]) == (200, 7, 4, True)
    assert (said["languages"], said["description"]) == ([], "simulated readers")
    lines = metrics.body.decode().splitlines()
    assert 'gateway_requests_total{route="/search",status="200"} 1.0' in lines
    assert 'gateway_requests_total{route="/search",status="400"} 1.0' in lines
    assert 'gateway_request_seconds_count{route="/search"} 2.0' in lines
    assert "gateway_version 7.0" in lines


# --- Fresh documents, items, feedback -----------------------------------------------------------


def test_documents_are_found_at_once_and_let_go_when_a_version_holds_them(tmp_path):
    publish(tmp_path)
    ferry = {"document_id": "ferry", "title": "Ferry", "text": "ship"}

    async def ask(gateway, caller):
        added = await caller.post("/documents", add=[ferry], remove=["voyage"])
        found = await caller.post("/search", query="ship", k=2)
        related = await caller.post("/related", document_ids=["ferry"], k=1)
        kept = [each for each in DOCUMENTS if each["document_id"] != "voyage"]
        publish(tmp_path, 8, [*kept, ferry])
        await until(lambda: gateway.pins.live.version == 8 and not gateway.pins.live.fresh.n_documents)
        return added, found, related, await caller.post("/search", query="ship", k=2), gateway.pins.live.fresh

    means = means_of(
        tmp_path, open_fresh=lambda dim, sha256: FreshDocuments.open(tmp_path / "fresh", dim, sha256)
    )
    arguments = ("--in_process", "--fresh", str(tmp_path / "fresh"))
    added, found, related, after, fresh = over(tmp_path, ask, *arguments, means=means)
    assert added.json == {"added": 1, "removed": 1, "fresh_documents": 1}
    assert found.ids == ["ferry", "harbour"]
    assert found.json["results"][0]["why"]["fresh"] is True
    assert related.ids == ["harbour"]
    assert after.ids == ["ferry", "harbour"]
    assert after.json["results"][0]["why"]["fresh"] is False
    assert not fresh.removed


ITEMS = "document_id,path,open,threshold,phrases\nhours,/hours,true,0.71,ship|sea\nold,/old,false,,ship\n"


def test_items_are_listed_tried_and_read_again_when_they_change(tmp_path):
    publish(tmp_path)
    file = tmp_path / "items.csv"
    file.write_text(ITEMS)

    async def ask(gateway, caller):
        listed = await caller.get("/items")
        tried = await caller.post("/items/try", phrase="ship")
        file.write_text("document_id,threshold\nbroken,none\n")
        await asyncio.sleep(0.1)
        kept = await caller.get("/items")
        file.write_text(ITEMS + "new,/new,true,,bread\n")
        await until(lambda: len(gateway.pins.live.items.items) == 3)
        return listed, tried, kept

    listed, tried, kept = over(tmp_path, ask, "--in_process", "--items", str(file))
    assert [each["document_id"] for each in listed.json["items"]] == ["hours", "old"]
    assert [(each["document_id"], each["verdict"]) for each in tried.json["results"]] == [
        ("hours", "match"),
        ("old", "closed"),
    ]
    assert kept.json == listed.json  # a file that cannot be read leaves what was read before


def test_a_search_answers_with_the_items_that_it_matches(tmp_path):
    publish(tmp_path)
    file = tmp_path / "items.csv"
    file.write_text(ITEMS)

    async def ask(_, caller):
        return [await caller.post("/search", query=query, k=1) for query in ("ship", "star")]

    ship, star = over(tmp_path, ask, "--in_process", "--items", str(file))
    found = {"document_id": "hours", "path": "/hours", "phrase": "ship", "score": 1.0}  # "old" is closed
    assert (ship.json["items"], ship.ids) == ([found], ["voyage"])
    assert star.json["items"] == []
    assert posted(tmp_path, "/search", query="ship").json["items"] == []


def test_items_are_by_the_encoder_of_the_version_that_answers(tmp_path):
    publish(tmp_path)
    file = tmp_path / "items.csv"
    file.write_text(ITEMS)

    async def ask(gateway, caller):
        old = gateway.pins.live
        reading, hold = asyncio.Event(), asyncio.Event()
        queries = old.encoding.queries

        async def held(texts):
            reading.set()
            await hold.wait()
            return await queries(texts)

        old.encoding.queries = held
        file.write_text(ITEMS + "new,/new,true,0.71,bread\n")
        await reading.wait()  # the old version's vectors are under way
        publish(tmp_path, 8, encoder_sha256=OTHER_ENCODER)
        await until(lambda: gateway.pins.live.version == 8)
        hold.set()
        await until(lambda: len(old.items.items) == 3)
        return await caller.post("/search", query="ship")

    given = {7: WordsEncoding(), 8: WordsEncoding(OTHER_ENCODER, turned=1)}
    answer = over(tmp_path, ask, "--in_process", "--items", str(file), means=means_by(tmp_path, None, given))
    assert (answer.json["version"], [each["score"] for each in answer.json["items"]]) == (8, [1.0])


def test_a_version_comes_without_the_items_file_and_takes_the_items_over(tmp_path):
    publish(tmp_path)
    file = tmp_path / "items.csv"
    file.write_text(ITEMS)

    async def ask(gateway, caller):
        file.unlink()
        publish(tmp_path, 8)
        await until(lambda: gateway.pins.live.version == 8)
        return await caller.post("/search", query="ship")

    answer = over(tmp_path, ask, "--in_process", "--items", str(file))
    assert [each["document_id"] for each in answer.json["items"]] == ["hours"]


def test_fresh_titles_are_suggested_beside_the_published_ones(tmp_path):
    publish(tmp_path)
    voyager = {"document_id": "voyager", "title": "Voyager", "text": "star"}

    async def ask(_, caller):
        await caller.post("/documents", add=[voyager])
        return await caller.get("/suggest?q=voyage&k=5"), await caller.get("/suggest?q=voyager&k=1")

    both, one = over(tmp_path, ask, "--in_process", "--fresh", "x", means=with_fresh(tmp_path))
    assert {*both.ids} == {"voyage", "voyager"}
    assert one.ids == ["voyager"]


def test_what_was_shown_and_opened_is_logged_for_users_who_said_who_they_are(tmp_path):
    publish(tmp_path)
    logs = tmp_path / "feedback"

    async def ask(_, caller):
        await caller.post("/search", query="ship", k=2, user_id="reader")
        await caller.post("/search", query="nobody asked")
        asked = {"query": "ship", "document_id": "voyage", "rank": 1, "version": 7}
        return await caller.post("/opened", **asked, user_id="reader"), await caller.post("/opened", **asked)

    feedback = Feedback.open(logs, user_key=b"0123456789abcdef")
    known, unknown = over(tmp_path, ask, "--in_process", feedback=feedback)
    assert (known.json, unknown.json) == ({"logged": True}, {"logged": False})
    [file] = logs.glob("searches-*.jsonl")
    search, opened = map(json.loads, file.read_text().splitlines())
    assert (search["kind"], search["document_ids"], search["version"]) == ("search", ["voyage", "harbour"], 7)
    assert (opened["kind"], opened["document_id"], opened["rank"]) == ("open", "voyage", 1)
    assert "reader" not in file.read_text()


# --- Versions -----------------------------------------------------------------------------------


def means_by(folder, url, encodings, **more):
    """Versions of FOLDER, each by its own stand-in encoder: {version: encoding}."""

    async def opened(version):
        return encodings[version.version]

    return replace(means_of(folder, url, **more), open_encoding=opened)


def with_fresh(folder, url=None, encodings=None):
    def opened(dim, sha256):
        return FreshDocuments.open(folder / "fresh", dim, sha256)

    return means_by(folder, url, encodings or {7: WordsEncoding(), 8: WordsEncoding()}, open_fresh=opened)


def with_server(folder, test, *arguments, encoding=WordsEncoding, **more):
    """Run `test(gateway, caller, server, url)` over a gateway that asks the stand-in server."""

    async def run():
        async with index_server() as (url, server):
            server.serve(7)
            means = means_of(folder, url, encoding)
            given = ("--index_url", url, *arguments)
            async with gateway_of(folder, *given, means=means, **more) as (gateway, caller):
                return await test(gateway, caller, server, url)

    return asyncio.run(run())


def test_a_newer_version_takes_over_and_a_request_under_way_keeps_the_old_one(tmp_path):
    publish(tmp_path)
    newer = [{"document_id": "ark", "title": "Ark", "text": "ship"}]

    async def ask(gateway, caller, server, url):
        old, n_before = gateway.pins.live, len(server.asked)
        server.held = 7
        server.hold.clear()
        under_way = asyncio.create_task(caller.post("/search", query="ship"))
        await until(lambda: len(server.asked) > n_before)
        publish(tmp_path, 8, newer)
        server.serve(8, newer)
        await until(lambda: gateway.pins.live.version == 8)
        server.hold.set()
        first = await under_way
        return first, await caller.post("/search", query="ship"), old

    first, second, old = with_server(tmp_path, ask)
    assert (first.json["version"], first.ids) == (7, SHIP)
    assert (second.json["version"], second.ids) == (8, ["ark"])
    assert old.is_retired
    assert old.n_using == 0


def test_when_the_server_has_let_the_version_go_the_request_is_answered_by_the_next(tmp_path):
    publish(tmp_path)

    async def ask(gateway, caller, server, url):
        publish(tmp_path, 8)
        server.serve(8)
        del server.versions[7]  # before the gateway has looked
        return await caller.post("/search", query="ship")

    answer = with_server(tmp_path, ask, "--poll_seconds", "600")
    assert (answer.status, answer.json["version"], answer.ids) == (200, 8, SHIP)


def test_where_no_version_is_left_the_answer_is_503_and_health_too(tmp_path):
    publish(tmp_path)

    async def ask(gateway, caller, server, url):
        server.versions.clear()
        return await caller.post("/search", query="ship"), await caller.get("/health")

    answer, health = with_server(tmp_path, ask, "--poll_seconds", "600")
    assert (answer.status, health.status) == (503, 503)
    assert answer.json["error"].startswith("no version is AVAILABLE at http://127.0.0.1")
    assert health.json["error"] == "the index server no longer has version 7"


def test_a_gateway_before_its_index_server_waits_and_says_so(tmp_path):
    publish(tmp_path)
    port = free_port()
    url = f"http://127.0.0.1:{port}"

    async def run():
        given = ("--index_url", url)
        means = means_of(tmp_path, url)
        async with gateway_of(tmp_path, *given, means=means, is_loaded=False) as (gateway, caller):
            await until(lambda: "no index server answers" in str(gateway.pins.waiting))
            before = await caller.get("/health"), await caller.post("/search", query="ship")
            async with index_server(port) as (_, server):
                server.serve(7)
                await until(lambda: gateway.pins.live is not None)
                after = await caller.get("/health")
            down = await caller.get("/health"), await caller.post("/search", query="ship")
            metrics = await caller.get("/metrics")
            return before, after, down, metrics

    before, after, down, metrics = asyncio.run(run())
    assert [each.status for each in (*before, after, *down)] == [503, 503, 200, 503, 503]
    assert before[1].json["error"].startswith(f"not ready: no index server answers at {url}")
    assert down[1].json["error"].startswith(f"no index server answers at {url}")
    assert 'gateway_failures_total{part="index"}' in metrics.body.decode()


def test_an_encoder_that_is_another_ends_the_start_in_a_line(tmp_path):
    publish(tmp_path)
    with pytest.raises(
        EncoderMismatchError, match=r"is cdcdcdcdcdcd, but version 7 was made with abab"
    ) as caught:
        over(tmp_path, None, means=means_of(tmp_path, encoding=lambda: WordsEncoding(OTHER_ENCODER)))
    assert caught.value.exit_code == 2


def test_a_version_by_another_encoder_is_not_served_and_the_old_one_stays(tmp_path):
    publish(tmp_path)

    async def ask(gateway, caller, server, url):
        publish(tmp_path, 8, encoder_sha256=OTHER_ENCODER)
        server.serve(8)
        await until(lambda: gateway.pins.problem)
        return await caller.get("/health"), await caller.post("/search", query="ship")

    health, answer = with_server(tmp_path, ask)
    assert (health.status, answer.json["version"]) == (200, 7)
    assert "version 8 was made with cdcdcdcdcdcd" in health.json["problem"]


def test_a_version_that_breaks_whatever_reads_it_is_refused_in_a_line_until_it_is_written_anew(tmp_path):
    publish(tmp_path)

    async def ask(gateway, caller):
        broken = publish(tmp_path, 8)
        manifest = broken.folder / "assets.extra" / "manifest.json"
        whole = manifest.read_text()
        manifest.write_text("[" * 100_000)  # RecursionError
        await until(lambda: gateway.pins.problem)
        said = await caller.get("/health")
        manifest.write_text(whole)
        await until(lambda: gateway.pins.live.version == 8)
        return said, await caller.get("/health")

    broken, mended = over(tmp_path, ask)
    assert (broken.status, broken.json["version"]) == (200, 7)
    assert broken.json["problem"].startswith("version 8 is not served: version 8 cannot be loaded (Recursion")
    assert (mended.json["version"], "problem" in mended.json) == (8, False)


def test_a_version_that_finds_nothing_replaces_none(tmp_path):
    publish(tmp_path)

    async def ask(gateway, caller, server, url):
        publish(tmp_path, 8)
        server.serve(8, ARK)  # another index than the folder's
        await until(lambda: gateway.pins.problem)
        return await caller.get("/health"), await caller.post("/search", query="ship")

    health, answer = with_server(tmp_path, ask)
    assert (answer.json["version"], answer.ids) == (7, SHIP)
    assert "version 8 does not answer: for the text of 'harbour' it finds 'ark'" in health.json["problem"]


def test_a_comparison_with_a_version_that_nobody_serves_is_said(tmp_path, caplog):
    publish(tmp_path)

    async def ask(gateway, caller, server, url):
        await until(lambda: gateway.pins.problem)
        return gateway.pins.problem

    said = with_server(tmp_path, ask, split=SPLIT)
    assert said.startswith("--compare names version 6, which is not served")
    warnings = [each.message for each in caplog.records if each.levelno >= logging.WARNING]
    assert warnings == [said]


def test_an_encoder_that_does_not_say_which_it_is_proves_itself(tmp_path):
    # Two documents with one text: each of them counts as found when the other is.
    publish(tmp_path, documents=[*DOCUMENTS, DOCUMENTS[0] | {"document_id": "twin"}])
    answer = posted(
        tmp_path, "/search", query="ship", means=means_of(tmp_path, encoding=lambda: WordsEncoding(None))
    )
    assert answer.status == 200
    means = means_of(tmp_path, encoding=lambda: WordsEncoding(None, turned=1))
    with pytest.raises(
        EncoderMismatchError, match="does not find document 'harbour' of version 7 by its own"
    ):
        over(tmp_path, None, means=means)


def test_a_comparison_serves_a_share_of_the_users_by_another_version(tmp_path):
    publish(tmp_path, 6, [{"document_id": "ark", "title": "Ark", "text": "ship"}])
    publish(tmp_path)
    split = Split(0, 6, 0.5, b"0123456789abcdef")

    async def ask(gateway, caller, server, url):
        server.serve(6, [{"document_id": "ark", "title": "Ark", "text": "ship"}])
        await until(lambda: gateway.pins.compared is not None)
        users = [f"user{n}" for n in range(20)]
        asked = [await caller.post("/search", query="ship", user_id=user) for user in users]
        nobody = await caller.post("/search", query="ship")
        return dict(zip(users, asked, strict=True)), nobody, gateway.pins.split

    asked, nobody, split = with_server(tmp_path, ask, split=split)
    assert split.live == 7
    assert nobody.json["version"] == 7
    assert {user: answer.json["version"] for user, answer in asked.items()} == {
        user: split.version_for(user) for user in asked
    }
    assert {answer.ids[0] for answer in asked.values()} == {"ark", "voyage"}


COMPARED_USER = next(f"user{n}" for n in range(100) if SPLIT.version_for(f"user{n}") == 6)


def comparing(folder, test, *arguments, means=None, **compared):
    """Run `test(gateway, caller, server, url)` where version 6, of one document, is compared with 7."""
    publish(folder, 6, ARK, **compared)
    publish(folder)

    async def run():
        async with index_server() as (url, server):
            server.serve(7)
            server.serve(6, ARK)
            made = means(url) if means else means_of(folder, url)
            given = ("--index_url", url, *arguments)
            async with gateway_of(folder, *given, means=made, split=SPLIT) as (gateway, caller):
                return await test(gateway, caller, server, url)

    return asyncio.run(run())


def test_every_route_answers_a_user_by_their_side_of_the_comparison(tmp_path):
    async def ask(gateway, caller, server, url):
        await until(lambda: gateway.pins.compared is not None)
        return [
            await caller.post("/search", query="ship", user_id=COMPARED_USER),
            await caller.post("/context", query="ship", user_id=COMPARED_USER),
            await caller.post("/related", document_ids=["ark"], user_id=COMPARED_USER),
            await caller.get(f"/suggest?q=a&user_id={COMPARED_USER}"),
        ]

    assert [each.json.get("version") for each in comparing(tmp_path, ask)] == [6, 6, 6, 6]


@pytest.mark.parametrize("polls", ["0.02", "600"], ids=["found by a look", "found by a request"])
def test_users_of_a_compared_version_that_has_gone_get_the_live_one(tmp_path, polls):
    async def ask(gateway, caller, server, url):
        await until(lambda: gateway.pins.compared is not None)
        del server.versions[6]
        before = await caller.get("/health")
        if polls == "0.02":
            await until(lambda: gateway.pins.compared is None)
        answers = [await caller.post("/search", query="ship", user_id=COMPARED_USER) for _ in range(2)]
        return before, answers, await caller.get("/health"), gateway.pins.compared

    before, answers, after, compared = comparing(tmp_path, ask, "--poll_seconds", polls)
    assert [(each.status, each.json["version"]) for each in answers] == [(200, 7), (200, 7)]
    assert [(each.status, each.json["compared"]) for each in (before, after)] == [(200, None)] * 2
    assert "version 6" in before.json["problem"]
    assert compared is None


def test_a_compared_version_that_cannot_be_loaded_stops_no_reload(tmp_path):
    async def ask(gateway, caller, server, url):
        await until(lambda: gateway.pins.problem)
        publish(tmp_path, 8)
        server.serve(8)
        await until(lambda: gateway.pins.live.version == 8)
        return (await caller.get("/health")).json, await caller.post(
            "/search", query="ship", user_id=COMPARED_USER
        )

    health, answer = comparing(tmp_path, ask, encoder_sha256=OTHER_ENCODER)
    assert (health["version"], health["compared"], answer.json["version"]) == (8, None, 8)
    assert health["problem"].startswith("version 6 is not served: ")


def test_one_encoder_server_compares_only_versions_of_one_encoder(tmp_path):
    async def ask(gateway, caller, server, url):
        await until(lambda: gateway.pins.problem)
        return gateway.pins.problem

    problem = comparing(
        tmp_path,
        ask,
        means=lambda url: means_of(tmp_path, url, has_one_encoder=True),
        encoder_sha256=OTHER_ENCODER,
    )
    assert "version 6 was made with encoder cdcdcdcdcdcd and version 7 with abababababab" in problem
    assert "--encoder_url is one encoder" in problem


def test_a_change_that_another_encoder_cannot_take_yet_is_acknowledged_and_taken_later(tmp_path, caplog):
    encodings = {6: WordsEncoding(OTHER_ENCODER), 7: WordsEncoding()}

    async def fail(texts):
        raise EncodingError("no room on the card")

    async def ask(gateway, caller, server, url):
        await until(lambda: gateway.pins.compared is not None)
        encodings[6].documents = fail
        added = await caller.post("/documents", add=[{"document_id": "ferry", "text": "ship ship"}])
        waits = len(gateway.pins.compared.fresh.stale())
        encodings[6].documents = encodings[6].queries
        await until(lambda: not gateway.pins.compared.fresh.stale())
        return added, waits, await caller.post("/search", query="ship", user_id=COMPARED_USER)

    added, waits, found = comparing(
        tmp_path, ask, "--fresh", "x",
        means=lambda url: with_fresh(tmp_path, url, encodings), encoder_sha256=OTHER_ENCODER,
    )  # fmt: skip
    assert (added.status, waits) == (200, 1)
    assert "fresh documents wait for an encoder: no room on the card" in caplog.text
    assert {*found.ids} == {"ark", "ferry"}


def test_fresh_documents_are_let_go_when_the_version_that_lacked_them_leaves(tmp_path):
    async def ask(gateway, caller, server, url):
        await until(lambda: gateway.pins.compared is not None)
        await caller.post("/documents", add=[DOCUMENTS[1]])  # version 7 has it, 6 has not
        before = gateway.pins.live.fresh.n_documents
        del server.versions[6]
        await until(lambda: gateway.pins.compared is None)
        await until(lambda: not gateway.pins.live.fresh.n_documents)
        return before

    encodings = {6: WordsEncoding(), 7: WordsEncoding()}
    assert (
        comparing(tmp_path, ask, "--fresh", "x", means=lambda url: with_fresh(tmp_path, url, encodings)) == 1
    )


def test_requests_that_meet_a_version_that_has_gone_share_one_look(tmp_path):
    publish(tmp_path)
    n_looks = 0

    async def run():
        nonlocal n_looks
        async with index_server() as (url, server):
            server.serve(7)
            given = {7: WordsEncoding(), 8: WordsEncoding(OTHER_ENCODER)}
            arguments = ("--index_url", url, "--poll_seconds", "600")
            means = means_by(tmp_path, url, given)
            async with gateway_of(tmp_path, *arguments, means=means) as (gateway, caller):
                look = gateway.pins.look

                async def counted():
                    nonlocal n_looks
                    n_looks += 1
                    await look()

                gateway.pins.look = counted
                publish(tmp_path, 8, encoder_sha256=OTHER_ENCODER)
                server.serve(8)
                del server.versions[7]
                asked = [caller.post("/search", query="ship") for _ in range(5)]
                answers = await asyncio.gather(*asked)
            return answers, given[7].is_closed

    answers, is_closed = asyncio.run(run())
    assert {each.json["version"] for each in answers} == {8}
    assert n_looks == 1
    assert is_closed  # what was let go is closed before the gateway is


def test_an_index_of_another_name_is_waited_for_aloud(tmp_path, caplog):
    publish(tmp_path)

    async def run():
        async with index_server() as (url, _):
            means = replace(means_of(tmp_path), served=ServedIndex(url, "other"))
            given = {"means": means, "is_loaded": False}
            async with gateway_of(tmp_path, "--index_url", url, **given) as (gateway, _):
                await until(lambda: "404" in str(gateway.pins.waiting))
                await asyncio.sleep(0.1)

    with caplog.at_level(logging.WARNING, "serving"):
        asyncio.run(run())
    [said] = [each.message for each in caplog.records if "waiting: " in each.message]
    assert "the index server answered 404" in said


# --- Clients that leave, and faults of an encoder ---------------------------------------------------


async def bounded(app, messages, path="/search"):
    """(messages sent, requests by status) of `app` behind Bounds: its client says these, then leaves."""
    metrics, sent = Metrics(), []
    bounds = Bounds(app, metrics, max_queued=10, max_body_bytes=1000)
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}

    async def receive():
        if messages:
            return messages.pop(0)
        await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    await asyncio.wait_for(bounds(scope, receive, send), 5)
    statuses = {
        sample.labels["status"]: sample.value
        for metric in metrics.requests.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    }
    return sent, statuses


WHOLE = {"type": "http.request", "body": b"{}", "more_body": False}
BEGUN = {"type": "http.request", "body": b"{", "more_body": True}


def test_nothing_is_searched_any_more_for_a_client_that_has_left():
    ends = []

    async def app(scope, receive, send):
        await receive()
        try:
            await asyncio.sleep(3 if scope["path"] == "/search" else 0.2)
            ends.append("done")
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise

    assert asyncio.run(bounded(app, [WHOLE])) == ([], {"499": 1})
    asyncio.run(bounded(app, [WHOLE], "/documents"))  # a change is carried out
    assert ends == ["cancelled", "done"]


def test_an_answer_that_has_begun_is_not_broken_off():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(0.2)
        await send({"type": "http.response.body", "body": b"all of it"})

    sent, statuses = asyncio.run(bounded(app, [WHOLE]))
    assert (sent[-1]["body"], statuses) == (b"all of it", {"200": 1})


def test_a_body_that_is_cut_off_reaches_no_route():
    asked = []

    async def app(scope, receive, send):
        asked.append(scope)

    assert asyncio.run(bounded(app, [BEGUN])) == ([], {"499": 1})
    assert not asked


def test_half_a_body_takes_nobody_s_place():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def run():
        bounds = Bounds(app, Metrics(), max_queued=1, max_body_bytes=1000)
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/search", "headers": headers}
        given = {"slow": [BEGUN], "quick": [WHOLE]}
        statuses = []

        async def ask(who):
            async def receive():
                if not given[who]:
                    await asyncio.Event().wait()
                return given[who].pop(0)

            async def send(message):
                statuses.append(message["status"])

            await bounds(scope, receive, send)

        slow = [asyncio.create_task(ask("slow")) for _ in range(3)]
        await asyncio.sleep(0)
        await ask("quick")
        for each in slow:
            each.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        return statuses

    assert asyncio.run(run()) == [200]


def test_a_body_that_does_not_come_gives_its_place_back(monkeypatch):
    monkeypatch.setattr(gateway_answers, "BODY_SECONDS", 0.01)
    sent, statuses = asyncio.run(bounded(None, [BEGUN]))
    assert (sent[0]["status"], statuses) == (408, {"408": 1})
    assert (b"connection", b"close") in sent[0]["headers"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(EncodingError("the model failed"), 502), (TooLongError("too long"), 502), (FullError("full"), 429)],
)
def test_a_fault_of_the_encoder_is_no_fault_of_the_asker(tmp_path, error, status):
    publish(tmp_path)

    async def ask(gateway, caller):
        async def fail(texts):
            raise error

        gateway.pins.live.encoding.queries = fail
        return await caller.post("/search", query="ship"), await caller.get("/metrics")

    answer, metrics = over(tmp_path, ask)
    assert (answer.status, answer.json) == (status, {"error": str(error)})
    assert (b'gateway_failures_total{part="encoder"} 1.0' in metrics.body) == (status == 502)


# --- The command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--in_process", "--index_url", "http://a"], "--in_process and --index_url exclude each other"),
        (["--compare", "1:0.5"], "--compare wants --user_key_file FILE"),
        (["--user_key_file", "x"], "--user_key_file hashes users for --feedback and --compare"),
        (["--encoder_key_file", "x"], "--encoder_key_file is for an encoder server: give --encoder_url"),
        (["--encoder_url", "http://a", "--encoder_model", "m"], "--encoder_model is for --encoder_url with"),
        (["--k_max", "0"], "is 0, wanted 1 to 500"),
        (["--port", "x"], "is x, wanted a port of 0 to 65535"),
    ],
)
def test_flags_that_mean_nothing_are_refused(capsys, arguments, said):
    with pytest.raises(SystemExit) as caught:
        parse(arguments)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_defaults_listen_on_this_machine_alone(tmp_path):
    flags = flags_of(tmp_path)
    assert (flags.host, flags.port, flags.index_url) == ("127.0.0.1", 8000, "http://localhost:9090")


def test_an_encoder_server_is_told_the_model_the_key_and_the_version_s_prompts(tmp_path, monkeypatch):
    version = publish(tmp_path, prompts={"query": "query: ", "document": ""})
    key = tmp_path / "key"
    key.write_text("secret\n")
    asked = {}

    async def opened(url, **more):
        asked.update(more, url=url)

    monkeypatch.setattr("serving.remote_encoding.RemoteEncoding.open", opened)
    arguments = ("--encoder_url", "http://a", "--encoder_api", "openai", "--encoder_model", "small")
    gateway = make_gateway(flags_of(tmp_path, *arguments, "--encoder_key_file", str(key)))
    asyncio.run(gateway.pins._means.open_encoding(version))
    assert asked == {
        "url": "http://a", "encoder_api": "openai", "model": "small", "api_key": "secret",
        "prompts": {"query": "query: ", "document": ""},
    }  # fmt: skip
    key.write_text("\n")
    with pytest.raises(InputError, match="wants the encoder server's key in one line"):
        make_gateway(flags_of(tmp_path, *arguments, "--encoder_key_file", str(key)))


def test_the_gateway_runs_on_uvloop(tmp_path, monkeypatch):
    loops = []

    async def serve(gateway):
        loops.append(asyncio.get_running_loop())

    monkeypatch.setattr(gateway_module, "_serve", serve)
    gateway_module.serve(flags_of(tmp_path, "--in_process"))
    assert isinstance(loops[0], uvloop.Loop)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"has_rows": False}, "version 7 has no assets.extra/rows.npy, which --in_process searches"),
        (None, "holds no version: publish one first"),
    ],
)
def test_a_start_that_cannot_succeed_ends_in_one_line(tmp_path, capsys, made, said):
    if made is not None:
        publish(tmp_path, **made)
    base = str(tmp_path / "models" / "index")
    assert main(["gateway", "--in_process", "--port", "0", "--model_base_path", base]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error


@pytest.mark.slow
def test_a_real_gateway_asks_a_real_index_server_by_a_real_encoder(tmp_path):
    vectors = tmp_path / "vectors.npy"
    made = [str(tmp_path / "made" / "encoder"), str(vectors), *TEXTS]
    subprocess.run([sys.executable, "-c", MAKE_ENCODER, *made], check=True, cwd=ROOT, capture_output=True)
    sha256 = encoder_sha256(file_hashes(tmp_path / "made" / "encoder"))
    (tmp_path / "encoders").mkdir()
    (tmp_path / "made" / "encoder").rename(tmp_path / "encoders" / sha256)
    base = tmp_path / "models" / "index"
    rows, ids_of_all = np.load(vectors), [f"d{n}" for n in range(len(TEXTS))]
    base.mkdir(parents=True)
    export_tuned(base, **{"7": (rows, ids_of_all)})
    documents = [{"document_id": d, "title": t, "text": t} for d, t in zip(ids_of_all, TEXTS, strict=True)]
    settings = {"num_leaves_to_search": 4, "num_reordering_candidates": len(TEXTS)}
    publish(tmp_path, 7, documents, has_rows=False, encoder_sha256=sha256, dim=16, settings=settings)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    index_port = free_port()
    command = [
        sys.executable,
        "-m",
        "serving",
        "gateway",
        "--port",
        str(port),
        "--model_base_path",
        str(base),
    ]
    command += ["--index_url", f"http://127.0.0.1:{index_port}", "--fresh", str(tmp_path / "fresh")]
    command += ["--poll_seconds", "0.1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    gateway = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        with server_process(base, f"--rest_api_port={index_port}") as (_, process):
            wait_for(f"{url}/health", 200)
            first = ask(url, "search", query=TEXTS[0], k=3, hybrid=True)["results"][0]
            assert (first["document_id"], first["why"]["lexical_rank"]) == ("d0", 1)
            assert first["why"]["dense"] == pytest.approx(1.0, abs=1e-3)
            wanted = {"allowed_document_ids": ["d3", "d4"]}
            assert ids(ask(url, "search", query=TEXTS[0], filter=wanted)) == {"d3", "d4"}
            assert not {"d1", "d2"} & ids(ask(url, "related", document_ids=["d1", "d2"]))
            ask(url, "documents", add=[{"document_id": "new", "text": "count the rows"}], remove=["d0"])
            every = {*ids_of_all, "new"} - {"d0"}
            assert ids(ask(url, "search", query=TEXTS[0], k=len(every))) == every
            process.kill()
            process.wait()
            wait_for(f"{url}/health", 503)
            said = requests.post(f"{url}/search", json={"query": "rows"}, timeout=10)
            assert said.status_code == 503
            assert "start it with `make serve`" in said.json()["error"]
        gateway.terminate()
        assert gateway.wait(20) == 0, gateway.stderr.read()
    finally:
        gateway.kill()
        gateway.communicate()


def ask(url: str, path: str, **body) -> dict:
    answer = requests.post(f"{url}/{path}", json=body, timeout=20)
    assert answer.status_code == 200, answer.text
    return answer.json()


def ids(answer: dict) -> set[str]:
    return {each["document_id"] for each in answer["results"]}


def wait_for(url: str, status: int, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if requests.get(url, timeout=5).status_code == status:
                return
        except requests.ConnectionError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"{url} did not answer {status} in {seconds} s")
