"""Two places to search vectors: the version's own rows, and an index server over REST; both answer alike."""

import asyncio
from contextlib import asynccontextmanager

import numpy as np
import pytest
from aiohttp import web
from gateway_parts import DOCUMENTS, index_server, publish, rows_of, until, vector_of
from serving_parts import free_port

from pipeline.errors import InputError
from serving.errors import ServingError
from serving.index_backends import NO_SCORE, RowsIndex, ServedIndex, VersionGoneError

IDS = [each["document_id"] for each in DOCUMENTS]
SHIP = vector_of("ship")[np.newaxis]
ROOT2, ROOT5 = 2**0.5, 5**0.5


def searched(index, queries=SHIP, k=2, **more):
    return asyncio.run(index.search(queries, k, version=7, **more))


def test_rows_answer_with_the_dot_product_best_first():
    scores, ids = searched(RowsIndex(rows_of(DOCUMENTS), IDS))
    assert ids == [["voyage", "harbour"]]
    np.testing.assert_allclose(scores, [[2 / ROOT5, 1 / ROOT2]], rtol=1e-6)


def test_of_equal_scores_the_earlier_document_comes_first():
    _, ids = searched(RowsIndex(rows_of(DOCUMENTS), IDS), k=4)
    assert ids == [["voyage", "harbour", "loaf", "sky"]]


def test_what_is_not_there_has_no_id():
    scores, ids = searched(RowsIndex(rows_of(DOCUMENTS), IDS), k=6)
    assert ids[0][4:] == ["", ""]
    assert scores[0, 4:].tolist() == [NO_SCORE, NO_SCORE]


@pytest.mark.parametrize(
    ("filtered", "found"),
    [
        ({"allowed": ["harbour", "sky", "stranger"]}, ["harbour", "sky", ""]),
        ({"allowed": []}, ["", "", ""]),
        ({"excluded": ["voyage"]}, ["harbour", "loaf", "sky"]),
        ({"allowed": ["voyage", "sky"], "excluded": ["voyage"]}, ["sky", "", ""]),
        ({"minimum_score": 0.8}, ["voyage", "", ""]),
    ],
)
def test_a_filter_lets_through_what_it_allows(filtered, found):
    _, ids = searched(RowsIndex(rows_of(DOCUMENTS), IDS), k=3, **filtered)
    assert ids == [found]


def test_a_document_in_passages_scores_as_its_best_one_and_comes_once():
    rows = np.stack([vector_of(text) for text in ("sea", "ship", "bread", "sea ship")])
    index = RowsIndex(rows, ["book", "note", "book", "book"])  # its rows need not be neighbours
    scores, ids = searched(index, np.stack([vector_of("sea"), vector_of("bread")]), k=2)
    assert ids == [["book", "note"], ["book", "note"]]
    np.testing.assert_allclose(scores, [[1, 0], [1, 0]])


def test_too_many_rows_are_refused_with_what_to_do():
    with pytest.raises(InputError, match=r"^4 rows are too many .* at most 3: start an index server"):
        RowsIndex(rows_of(DOCUMENTS), IDS, max_rows=3)


def served(test):
    """Run a test over the stand-in server: `test(index, server)`."""

    async def run():
        async with index_server() as (url, server):
            index = ServedIndex(url, "index")
            server.serve(7)
            try:
                return await test(index, server)
            finally:
                await index.close()

    return asyncio.run(run())


def test_a_server_and_the_rows_answer_alike():
    async def both(index, server):
        return await index.search(SHIP, 6, version=7), await server.versions[7].search(SHIP, 6, version=7)

    (scores, ids), (wanted_scores, wanted_ids) = served(both)
    assert ids == wanted_ids
    np.testing.assert_allclose(scores, wanted_scores)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"num_leaves_to_search": 6, "num_reordering_candidates": 100}, (6, 100)),
        ({"num_leaves_to_search": 6, "num_reordering_candidates": 2}, (6, 3)),  # never fewer than results
        (
            {"num_leaves_to_search": None, "num_reordering_candidates": None},
            (1, 3),
        ),  # a version without a tree
    ],
)
def test_a_version_is_asked_at_the_settings_that_it_ships(tmp_path, settings, wanted):
    async def ask(index, server):
        index.uses(publish(tmp_path, settings=settings))
        await index.search(SHIP, 3, version=7)
        return server.asked

    [(name, inputs)] = served(ask)
    assert (name, inputs["k"]) == ("search", 3)
    assert (inputs["num_leaves_to_search"], inputs["num_reordering_candidates"]) == wanted


def test_a_filter_asks_search_filtered_and_brute_force_asks_exact():
    async def ask(index, server):
        await index.search(SHIP, 2, version=7, excluded=["voyage"])
        await index.exact(SHIP, 2, version=7)
        await index.search(SHIP, 2, version=7, allowed=[])  # nothing may be found: nobody is asked
        return server.asked

    (name, inputs), (other, _) = served(ask)
    assert (name, other) == ("search_filtered", "exact")
    assert inputs["excluded_document_ids"] == ["voyage"]
    assert inputs["minimum_score"] == -2.0  # below every dot product of unit vectors


async def two_under_way(index, server) -> list[asyncio.Task]:
    """As many requests of a kind as may be under way, held by the server."""
    server.hold.clear()
    asking = []
    for n, word in enumerate(("sea", "ship"), 1):
        asking.append(asyncio.create_task(index.search(vector_of(word)[np.newaxis], 1, version=7)))
        await until(lambda n=n: len(server.asked) == n)
    return asking


def test_what_is_asked_while_requests_are_under_way_goes_together():
    async def ask(index, server):
        asking = await two_under_way(index, server)
        for word in ("bread", "star", "oven"):
            asking.append(asyncio.create_task(index.search(vector_of(word)[np.newaxis], 1, version=7)))
        await asyncio.sleep(0.01)
        server.hold.set()
        found = [ids[0][0] for _, ids in await asyncio.gather(*asking)]
        return found, [len(inputs["queries"]) for _, inputs in server.asked]

    found, sizes = served(ask)
    assert found == ["harbour", "voyage", "loaf", "sky", "loaf"]
    assert sizes == [1, 1, 3]


def test_what_is_asked_at_one_moment_goes_together():
    async def ask(index, server):
        await asyncio.gather(*(index.search(SHIP, 1, version=7) for _ in range(3)))
        return [len(inputs["queries"]) for _, inputs in server.asked]

    assert served(ask) == [3]


def test_who_has_gone_away_is_not_searched_for():
    async def ask(index, server):
        first = await two_under_way(index, server)
        gone = asyncio.create_task(index.search(SHIP, 1, version=7))
        await asyncio.sleep(0.01)
        gone.cancel()
        server.hold.set()
        await asyncio.gather(*first)
        await asyncio.sleep(0.01)
        return len(server.asked)

    assert served(ask) == 2


def test_a_version_that_is_gone_is_told_from_other_errors():
    async def ask(index, server):
        with pytest.raises(VersionGoneError, match="Servable not found for request"):
            await index.search(SHIP, 1, version=8)

    served(ask)


def test_available_versions_come_newest_first():
    async def ask(index, server):
        server.serve(10)
        server.serve(9)
        return await index.available_versions()

    assert served(ask) == [10, 9, 7]


def test_where_nobody_listens_one_line_says_where_and_what_to_do():
    url = f"http://127.0.0.1:{free_port()}"

    async def ask():
        index = ServedIndex(url, "index")
        try:
            await index.search(SHIP, 1, version=7)
        finally:
            await index.close()

    with pytest.raises(ServingError) as caught:
        asyncio.run(ask())
    assert caught.value.status == 503
    assert str(caught.value).startswith(f"no index server answers at {url} (")
    assert "start it with `make serve`" in str(caught.value)


@asynccontextmanager
async def answering(body: str, status: int = 200):
    """A server that gives one answer to everything."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=body, status=status)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield ServedIndex(f"http://127.0.0.1:{runner.addresses[0][1]}", "index")
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("body", "status", "said", "wanted"),
    [
        ("<html>", 200, "got no JSON object; is this TensorFlow Serving", 502),
        ("{}", 200, "the answer has no scores and document_ids", 502),
        (
            '{"error": "k is 2000,\\n wanted 1 to 1000"}',
            400,
            "answered 400: k is 2000, wanted 1 to 1000",
            502,
        ),
        ('{"error": "no thread is free"}', 503, "answered 503: no thread is free", 503),
        ("Bad Gateway", 502, "answered 502: is this TensorFlow Serving", 502),
    ],
)
def test_an_answer_that_is_none_of_an_index_is_one_line(body, status, said, wanted):
    async def ask():
        async with answering(body, status) as index:
            try:
                await index.search(SHIP, 1, version=7)
            finally:
                await index.close()

    with pytest.raises(ServingError) as caught:
        asyncio.run(ask())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.status == wanted


def test_a_version_without_search_and_an_address_that_is_none_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"--index_url localhost:9090: not an address"):
        ServedIndex("localhost:9090", "index")
    with pytest.raises(InputError, match=r"index\.layer tfrs, which has no signature `search`"):
        ServedIndex("http://localhost:9090", "index").uses(publish(tmp_path, layer="tfrs"))
