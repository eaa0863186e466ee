"""The operating page at `/dashboard`: its files, which need no key, and its data, which needs the admin key."""

from importlib.resources import files
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import FileResponse, JSONResponse, Response

from headwater.client.engine_client import new_call_id
from headwater.generation.answer_fields import Json
from headwater.generation.errors import ApiError
from headwater.http_api.auth import control_router
from headwater.http_api.json_body import JsonRoute
from headwater.http_api.services import CALL_TIMEOUT_S, InjectedServices, Services
from headwater.http_api.sse import EventStream
from headwater.messages.base import unpack_ids
from headwater.messages.snapshot import GetMapNode, MapNodePath

MEDIA_TYPES = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "html": "text/html"}
FILE_HEADERS = {
    # our own files and nothing else: no inline script or style, no other server, no frame around the page
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a browser asks whether its copy is current: a new version is seen at once
}
STREAM_RESPONSES: dict[int | str, Json] = {
    200: {"description": "Events without end.", "content": {"text/event-stream": {}}},
    503: {"description": "Too many pages are open."},
}
PAGE = files("headwater.http_api.dashboard").joinpath("page")

router = control_router("dashboard")
page_router = APIRouter(route_class=JsonRoute, tags=["dashboard"])


@page_router.get("/dashboard", include_in_schema=False)
async def dashboard(services: InjectedServices) -> Response:
    return _file("index.html", services)


@page_router.get("/dashboard/files/{path:path}", include_in_schema=False)
async def dashboard_file(path: str, services: InjectedServices) -> Response:
    return _file(path, services)


@router.get("/dashboard/events", summary="Watch the server", response_class=Response, responses=STREAM_RESPONSES)
async def dashboard_events(services: InjectedServices) -> Response:
    """Server-sent events, one a second: `whole` with a snapshot and its history, then `patch` (RFC 7386).

    docs/dashboard.md describes the members.
    """
    _require_page(services)
    return EventStream(services.watching.broadcast.watch(), close=lambda: None)


@router.get("/dashboard/snapshot", summary="See the server as it is now")
async def dashboard_snapshot(services: InjectedServices) -> Response:
    """The snapshot of `/dashboard/events`, once."""
    _require_page(services)
    return JSONResponse(await services.watching.take())


@router.get("/dashboard/node", summary="Where a node of the map lies")
async def dashboard_node(
    services: InjectedServices,
    number: Annotated[int, Query(ge=1, lt=2**63, description="Of the node, from the snapshot's map.")],
    dp_rank: Annotated[int, Query(ge=0, description="The engine whose map it is.")] = 0,
) -> Response:
    """The tokens of a node. `/flush_cache` with `flush_ids` as `prefix_ids` cuts it and everything below it.

    404 if it is not in the tree any more.
    """
    _require_page(services)
    message = GetMapNode(call_id=new_call_id(), number=number)
    try:
        found = await services.state.client.call(message, engine=dp_rank, timeout_s=CALL_TIMEOUT_S)
    except IndexError:
        raise ApiError(404, f"there is no engine {dp_rank}", param="dp_rank", code="not_found") from None
    assert isinstance(found, MapNodePath)
    facts: Json = {
        "cache_salt": found.cache_salt,
        "extra_key": found.extra_key,
        "flush_ids": unpack_ids(found.flush_ids).tolist(),
        "path_ids": unpack_ids(found.path_ids).tolist(),
    }
    return JSONResponse(facts)


def _require_page(services: Services) -> None:
    if services.state.dashboard is None:
        raise ApiError(404, "this server was started with --disable-dashboard", code="not_found")


def _file(path: str, services: Services) -> Response:
    _require_page(services)
    kind = MEDIA_TYPES.get(path.rpartition(".")[2])
    found = PAGE.joinpath(path)
    if kind is None or ".." in path or "\\" in path or path.startswith("/") or not found.is_file():
        raise ApiError(404, "there is no such file; see /dashboard", code="not_found")
    return FileResponse(str(found), media_type=kind, headers=FILE_HEADERS)
