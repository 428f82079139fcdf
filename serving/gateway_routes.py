"""The gateway's routes: what each is asked, and what it answers."""

import argparse
import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from pipeline.errors import InputError
from serving import __version__
from serving.docs_page import docs_page
from serving.errors import ServingError
from serving.feedback import MAX_ID
from serving.finding import MAX_FILTER_IDS, MAX_SEEDS, Filter, Hit, title_of
from serving.gateway import Gateway
from serving.gateway_answers import Bounds, add_errors, json_answer, refusals
from serving.pinning import Pinned

if TYPE_CHECKING:
    from serving.items import Items

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
CSP = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
PAGE_HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
LOOPBACK = ("localhost", "127.0.0.1", "::1")
MAX_ADDED = 1000  # documents of one request
MAX_CONTEXT_TOKENS = 100_000
MAX_ITEMS = 3  # canned answers above the results
TITLE_CHARS = 200  # of a suggestion: no terminal and no page shows more


class Body(BaseModel):
    """A JSON object; a field that is not known is refused, as it would do nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)


Ids = Annotated[list[str], Field(max_length=MAX_FILTER_IDS)]
Score = Annotated[float, Field(ge=-1, le=1)]
UserId = Annotated[str, Field(min_length=1, max_length=200)]
K = Annotated[int, Field(ge=1)]


class FilterBody(Body):
    allowed_document_ids: Ids | None = None
    excluded_document_ids: Ids = []
    minimum_score: Score | None = None
    language: str | None = None


class SearchBody(Body):
    query: str
    k: K = 10
    filter: FilterBody = FilterBody()
    hybrid: bool = False
    user_id: UserId | None = None

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"query": "merge two tables on a key", "k": 3, "hybrid": True}]}
    )


class RelatedBody(Body):
    document_ids: Annotated[list[str], Field(min_length=1, max_length=MAX_SEEDS)]
    k: K = 10
    user_id: UserId | None = None

    model_config = ConfigDict(json_schema_extra={"examples": [{"document_ids": ["d1", "d2"], "k": 5}]})


class ContextBody(Body):
    query: str
    max_tokens: Annotated[int, Field(ge=1, le=MAX_CONTEXT_TOKENS)] = 2000
    hybrid: bool = True
    user_id: UserId | None = None

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"query": "merge two tables on a key", "max_tokens": 500}]}
    )


class DocumentsBody(Body):
    add: Annotated[list[dict[str, Any]], Field(max_length=MAX_ADDED)] = []
    remove: Ids = []

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"add": [{"document_id": "n1", "title": "News", "text": "News of today"}], "remove": ["d9"]}
            ]
        }
    )


class TryBody(Body):
    phrase: str
    k: K = 10

    model_config = ConfigDict(json_schema_extra={"examples": [{"phrase": "opening hours"}]})


class OpenedBody(Body):
    document_id: Annotated[str, Field(max_length=MAX_ID)]
    query: str | None = None
    rank: Annotated[int, Field(ge=1)] | None = None
    version: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    user_id: UserId | None = None

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"query": "tables", "document_id": "d1", "rank": 1, "user_id": "a3f0"}]
        }
    )


def make_app(gateway: Gateway) -> FastAPI:
    """Every route over one gateway."""
    app = FastAPI(
        title="Search gateway",
        version=__version__,
        description='Typed text in, documents out. An error is {"error": "one line"}.',
        docs_url=None,  # FastAPI's own page loads its script from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_search(app, gateway)
    _add_documents(app, gateway)
    _add_items(app, gateway)
    _add_watching(app, gateway)
    _add_pages(app)
    add_errors(app)
    app.add_middleware(
        Bounds,
        metrics=gateway.metrics,
        max_queued=gateway.flags.max_queued,
        max_body_bytes=gateway.flags.max_body_bytes,
        hosts=_hosts(gateway.flags),
    )
    return app


def _add_search(app: FastAPI, gateway: Gateway) -> None:
    @app.post("/search", summary="Documents for a text", responses=refusals(400, 409, 429, 502, 503))
    async def search(body: SearchBody) -> Any:
        began = time.perf_counter()
        query = _query(body.query, gateway)
        wanted = _filter(body.filter)
        k = _bounded(body.k, gateway)

        async def ask(pinned: Pinned) -> tuple[list[Hit], list[dict[str, Any]]]:
            hits = await pinned.finder.search(query, k, wanted, hybrid=body.hybrid)
            return hits, await _items_for(pinned, query)

        pinned, (hits, items) = await gateway.answered(body.user_id, ask)
        if gateway.feedback is not None:
            shown = [hit.document_id for hit in hits]
            gateway.feedback.searched(body.user_id, query, shown, pinned.version)
        is_hybrid = body.hybrid and pinned.finder.has_lexical
        said = {"query": query, "hybrid": is_hybrid, "took_ms": _ms(began)}
        return json_answer(_results(pinned, hits) | said | {"items": items})

    @app.post(
        "/related", summary="What to read after some documents, latest first", responses=refusals(400, 503)
    )
    async def related(body: RelatedBody) -> Any:
        began = time.perf_counter()
        k = _bounded(body.k, gateway)
        pinned, hits = await gateway.answered(
            body.user_id, lambda pinned: pinned.finder.related(body.document_ids, k)
        )
        return json_answer(_results(pinned, hits) | {"took_ms": _ms(began)})

    @app.post("/context", summary="The best passages within a budget of tokens", responses=refusals(400, 503))
    async def context(body: ContextBody) -> Any:
        began = time.perf_counter()
        query = _query(body.query, gateway)
        pinned, (passages, counted_by) = await gateway.answered(
            body.user_id, lambda pinned: pinned.finder.context(query, body.max_tokens, hybrid=body.hybrid)
        )
        shown = [vars(each) for each in passages]
        return json_answer(
            {
                "version": pinned.version, "query": query, "passages": shown,
                "n_tokens": sum(each.n_tokens for each in passages), "counted_by": counted_by,
                "took_ms": _ms(began),
            }
        )  # fmt: skip

    @app.get("/suggest", summary="Titles as one types", responses=refusals(400, 503))
    async def suggest(
        q: Annotated[str, Query(max_length=1000)] = "",
        k: Annotated[int, Query(ge=1)] = 10,
        user_id: Annotated[str | None, Query(min_length=1, max_length=200)] = None,
    ) -> Any:
        began = time.perf_counter()
        k = _bounded(k, gateway)
        with gateway.pins.using(user_id) as pinned:
            loop = asyncio.get_running_loop()
            # Of a document in passages every row has the title, and a removed one is left out.
            n_rows = k * (5 if pinned.catalogue.has_passages else 1) + 10
            rows = await loop.run_in_executor(gateway.threads, pinned.titles.find, q, n_rows)
            found = _suggested(pinned, rows)
            if pinned.fresh is not None:
                fresh = await loop.run_in_executor(gateway.threads, pinned.fresh.titled, q, k)
                found += [_suggestion(document, score) for score, document in fresh]
            found.sort(key=lambda each: -each["score"])  # of equal ones the published stays first
        return json_answer(
            {"version": pinned.version, "query": q, "results": found[:k], "took_ms": _ms(began)}
        )


def _add_documents(app: FastAPI, gateway: Gateway) -> None:
    @app.post("/documents", summary="Add or remove documents at once", responses=refusals(400, 404, 503, 507))
    async def documents(body: DocumentsBody) -> Any:
        if gateway.flags.fresh is None:
            raise ServingError("documents cannot be added: start the gateway with --fresh DIR", 404)
        with gateway.pins.using() as pinned:
            fresh = pinned.fresh
            assert fresh is not None
            fresh.check(body.add, body.remove)  # before anything is encoded
            vectors = await pinned.encoding.documents([document["text"] for document in body.add])
            await asyncio.to_thread(fresh.change, body.add, vectors, body.remove)
            await gateway.pins.encode_stale()  # what fails there is tried again at the next look
            return json_answer(
                {"added": len(body.add), "removed": len(body.remove), "fresh_documents": fresh.n_documents}
            )

    @app.post("/opened", summary="That somebody opened a result: feedback", responses=refusals(400, 404))
    async def opened(body: OpenedBody) -> Any:
        if gateway.feedback is None:
            raise ServingError("nothing is logged: start the gateway with --feedback DIR", 404)
        if not body.document_id.strip():
            raise InputError("document_id is empty; wanted the id of the result that was opened")
        if body.query is not None and body.query.strip():
            _query(body.query, gateway)
        version = gateway.pins.ready().version if body.version is None else body.version
        gateway.feedback.opened(body.user_id, body.document_id, body.query, body.rank, version)
        return json_answer({"logged": body.user_id is not None})


def _add_items(app: FastAPI, gateway: Gateway) -> None:
    def items(pinned: Pinned) -> "Items":
        if pinned.items is None:
            raise ServingError("there are no items: start the gateway with --items FILE", 404)
        return pinned.items

    @app.get("/items", summary="Canned answers, closed ones too", responses=refusals(404))
    async def listed() -> Any:
        return json_answer({"items": items(gateway.pins.ready()).listed()})

    @app.post("/items/try", summary="What a phrase finds, and why not more", responses=refusals(400, 404))
    async def tried(body: TryBody) -> Any:
        phrase = _query(body.phrase, gateway, "phrase")
        k = _bounded(body.k, gateway)
        with gateway.pins.using() as pinned:
            known = items(pinned)
            [vector] = await pinned.encoding.queries([phrase])
        found = [
            {
                "document_id": each.item.document_id, "path": each.item.path, "phrase": each.phrase,
                "score": each.score, "threshold": each.item.threshold, "verdict": each.verdict,
            }
            for each in known.tried(vector, k)
        ]  # fmt: skip
        return json_answer({"phrase": phrase, "results": found})


def _add_watching(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/health", summary="200 only while a search can be answered", responses=refusals(503))
    async def health() -> Any:
        return json_answer(await gateway.health())

    @app.get("/metrics", summary="For Prometheus")
    async def metrics() -> Response:
        shown, live = gateway.metrics, gateway.pins.live
        shown.version.set(live.version if live else 0)
        shown.documents.set(live.catalogue.n_rows if live else 0)
        shown.fresh.set(live.fresh.n_documents if live and live.fresh is not None else 0)
        shown.reloads.set(gateway.pins.n_reloads)
        shown.lost.set(gateway.feedback.lost if gateway.feedback else 0)
        return Response(shown.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_pages(app: FastAPI) -> None:
    for path, (name, media_type) in PAGE_FILES.items():
        app.add_api_route(path, _page(name, media_type), include_in_schema=False)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        page, policy = docs_page(app.openapi())
        return Response(
            page, media_type="text/html", headers=PAGE_HEADERS | {"Content-Security-Policy": policy}
        )


def _hosts(flags: argparse.Namespace) -> frozenset[str] | None:
    """Names that a gateway of this machine alone is asked by; None: it listens for others, too.

    A page of elsewhere whose name is turned to 127.0.0.1 is of the gateway's origin for a browser.
    """
    if flags.host not in LOOPBACK:
        return None
    return frozenset(name.lower() for name in (*LOOPBACK, *flags.allowed_host))


def _page(name: str, media_type: str) -> Callable[[], Any]:
    async def page() -> Response:
        try:
            content = await asyncio.to_thread((PAGE / name).read_bytes)
        except OSError:
            raise ServingError(
                f"the page's file {name} is not there: install the package again", 500
            ) from None
        return Response(content, media_type=media_type, headers=PAGE_HEADERS)

    return page


def _query(text: str, gateway: Gateway, name: str = "query") -> str:
    """A text to search for, without what stands around it.

    Raises:
        InputError: it is empty, or too long.
    """
    most = gateway.flags.max_query_chars
    if len(text) > most:
        raise InputError(f"{name} has {len(text)} letters, wanted at most {most}: shorten it")
    if not text.strip():
        raise InputError(f"{name} is empty; wanted some words to search for")
    return text.strip()


def _bounded(k: int, gateway: Gateway) -> int:
    if k > gateway.flags.k_max:
        raise InputError(f"k is {k}, wanted 1 to {gateway.flags.k_max}")
    return k


def _filter(body: FilterBody) -> Filter:
    allowed = body.allowed_document_ids
    return Filter(
        None if allowed is None else tuple(allowed),
        tuple(body.excluded_document_ids),
        body.minimum_score,
        body.language,
    )


def _ms(began: float) -> float:
    return round(1000 * (time.perf_counter() - began), 2)


def _results(pinned: Pinned, hits: Sequence[Hit]) -> dict[str, Any]:
    return {"version": pinned.version, "results": [_result(hit) for hit in hits]}


def _result(hit: Hit) -> dict[str, Any]:
    document = hit.document
    shown = {
        "document_id": hit.document_id,
        "title": title_of(document),
        "text": document.get("text"),
        "url": document.get("url"),
        "language": document.get("language"),
        "score": hit.score,
        "why": {
            "dense": hit.dense,
            "dense_rank": hit.dense_rank,
            "lexical": hit.lexical,
            "lexical_rank": hit.lexical_rank,
            "fresh": hit.row is None,
            "sessions": hit.sessions,
        },
    }
    passage = document.get("passage")
    return shown | ({"passage": passage} if isinstance(passage, int) else {})


async def _items_for(pinned: Pinned, query: str) -> list[dict[str, Any]]:
    """The canned answers that a query matches, by the version's own encoder."""
    if pinned.items is None:
        return []
    known = pinned.items  # before anything is waited for: its vectors go with it
    [vector] = await pinned.encoding.queries([query])
    return [
        {
            "document_id": each.item.document_id, "path": each.item.path, "phrase": each.phrase,
            "score": each.score,
        }
        for each in known.matches(vector, MAX_ITEMS)
    ]  # fmt: skip


def _suggested(pinned: Pinned, rows: Sequence[tuple[int, float]]) -> list[dict[str, Any]]:
    hidden = pinned.fresh.hides if pinned.fresh is not None else frozenset()
    found: dict[str, dict[str, Any]] = {}
    for row, score in rows:
        name = pinned.catalogue.id_of(row)
        if name not in hidden and name not in found:
            [document] = pinned.catalogue.documents([row])
            found[name] = _suggestion(document, score)
    return list(found.values())


def _suggestion(document: Mapping[str, Any], score: float) -> dict[str, Any]:
    title = title_of(document)[:TITLE_CHARS]
    return {
        "document_id": document["document_id"], "title": title, "url": document.get("url"), "score": score
    }  # fmt: skip
