"""Two places to search vectors: the version's own rows, and an index server over REST; both answer alike."""

import asyncio
import contextlib
import socket
import struct
from contextlib import asynccontextmanager

import numpy as np
import pytest
from aiohttp import web
from gateway_parts import DOCUMENTS, index_server, publish, rows_of, until, vector_of
from serving_parts import free_port

from pipeline.errors import InputError
from serving.errors import ServingError
from serving.index_backends import (
    NO_SCORE,
    RowsIndex,
    ServedIndex,
    VersionGoneError,
    _NearByNumPy,
    _NearByTorch,
)

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


@pytest.mark.parametrize("device", ["cpu", pytest.param("torch on the cpu", marks=pytest.mark.slow)])
def test_of_many_that_tie_with_the_last_the_earliest_are_taken(device):
    scores = np.full(2000, 0.5, np.float32)
    scores[[700, 1500]] = 0.9, 1.0
    scores[[3, 10]] = 0.1
    owners = np.arange(2000)
    near = (
        _NearByNumPy(scores[:, np.newaxis], owners, 2000)
        if device == "cpu"
        else _NearByTorch(scores[:, np.newaxis], owners, 2000, "cpu")
    )
    found, places = near.best(np.ones((1, 1), np.float32), 7, None)
    assert places.tolist() == [[1500, 700, 0, 1, 2, 4, 5]]
    np.testing.assert_allclose(found, [[1.0, 0.9, *[0.5] * 5]])


@pytest.mark.slow
@pytest.mark.parametrize("in_passages", [False, True])
@pytest.mark.parametrize("is_filtered", [False, True])
def test_a_device_answers_as_numpy_does(in_passages, is_filtered):
    made = np.random.default_rng(5)
    rows = made.integers(-2, 3, (60, 4)).astype(np.float32)  # small whole numbers: many ties, no rounding
    owners = np.sort(np.r_[np.arange(20), made.integers(0, 20, 40)]) if in_passages else np.arange(60)
    n = int(owners[-1]) + 1
    queries = made.integers(-2, 3, (5, 4)).astype(np.float32)
    passes = made.random(n) < 0.5 if is_filtered else None
    for k in (1, 7, n):
        wanted = _NearByNumPy(rows, owners, n).best(queries, k, passes)
        for got, want in zip(
            _NearByTorch(rows, owners, n, "cpu").best(queries, k, passes), wanted, strict=True
        ):
            np.testing.assert_array_equal(got, want)


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


def test_rows_are_held_once_where_their_order_stays():
    rows = rows_of(DOCUMENTS)
    assert RowsIndex(rows, IDS)._near._rows is rows
    assert RowsIndex(rows, ["a", "a", "b", "b"])._near._rows is rows


def test_a_product_keeps_to_one_core():
    index = RowsIndex(rows_of(DOCUMENTS), IDS)
    seen = []

    class Watched(np.ndarray):
        def __rmatmul__(self, queries):
            seen.extend(
                pool["num_threads"] for pool in index._near._blas.info() if pool["user_api"] == "blas"
            )
            return queries @ np.asarray(self)

        __array_priority__ = 1
        __array_ufunc__ = None

    index._near._rows = index._near._rows.view(Watched)
    assert searched(index)[1] == [["voyage", "harbour"]]
    assert set(seen) == {1}


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


def test_a_kept_connection_that_is_reset_is_made_anew_once():
    body = b'{"outputs": {"scores": [[1.0]], "document_ids": [["voyage"]]}}'
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    n_asked = []  # on each connection

    async def serve(reader, writer):
        n_asked.append(0)
        number = len(n_asked) - 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            while asked := await reader.readuntil(b"\r\n\r\n"):
                length = next(line for line in asked.lower().split(b"\r\n") if b"content-length" in line)
                await reader.readexactly(int(length.partition(b":")[2]))
                n_asked[number] += 1
                if n_asked == [2]:  # the index server is started anew
                    reset = struct.pack("ii", 1, 0)  # close by a reset, and not by an end
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                    break
                writer.write(head.encode() + body)
        writer.close()

    async def ask():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        index = ServedIndex(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "index")
        try:
            return [(await index.search(SHIP, 1, version=7))[1] for _ in range(2)]
        finally:
            await index.close()
            server.close()

    assert asyncio.run(ask()) == [[["voyage"]], [["voyage"]]]
    assert n_asked == [2, 1]


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
