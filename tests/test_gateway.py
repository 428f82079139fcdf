"""The gateway over HTTP: what people ask and are told, which version answers, and what ends a start."""

import asyncio
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import requests
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
from serving.__main__ import main
from serving.feedback import Feedback, Split
from serving.fresh import FreshDocuments
from serving.gateway_flags import parse
from serving.pinning import EncoderMismatchError

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
        ("POST", "/search", b"query=x", "application/x-www-form-urlencoded", 415, "wanted JSON: send the"),
        ("POST", "/search", b'"' + b"x" * 5000 + b'"', "application/json", 413, "the request is larger than"),
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
        await until(lambda: len(gateway.items.items) == 3)
        return listed, tried, kept

    listed, tried, kept = over(tmp_path, ask, "--in_process", "--items", str(file))
    assert [each["document_id"] for each in listed.json["items"]] == ["hours", "old"]
    assert [(each["document_id"], each["verdict"]) for each in tried.json["results"]] == [
        ("hours", "match"),
        ("old", "closed"),
    ]
    assert kept.json == listed.json  # a file that cannot be read leaves what was read before


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
        old = gateway.pins.live
        server.hold.clear()
        under_way = asyncio.create_task(caller.post("/search", query="ship"))
        await until(lambda: server.asked)
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


# --- The command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--in_process", "--index_url", "http://a"], "--in_process and --index_url exclude each other"),
        (["--compare", "1:0.5"], "--compare wants --user_key_file FILE"),
        (["--user_key_file", "x"], "--user_key_file hashes users for --feedback and --compare"),
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
