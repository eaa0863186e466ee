"""The routes of routers, with HEAD for each GET that changes nothing: proxies, monitors and `curl -I` use it."""

from collections.abc import Iterator, Sequence

from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

from headwater.http_api.sites import CHANGING_BY_GET


def all_routes(routers: Sequence[APIRouter]) -> tuple[BaseRoute, ...]:
    """The routes in their order, those for HEAD last.

    Apps share them. `include_router` would make each one again for every app, at its first request: 0.1 s of CPU.
    """
    return tuple(route for router in (*routers, _head_routes(routers)) for route in router.routes)


def _head_routes(routers: Sequence[APIRouter]) -> APIRouter:
    router = APIRouter()
    for route in _reading_routes(routers):
        router.add_api_route(
            route.path, route.endpoint, methods=["HEAD"], include_in_schema=False, route_class_override=type(route)
        )
    return router


def _reading_routes(routers: Sequence[APIRouter]) -> Iterator[APIRoute]:
    for router in routers:
        for route in router.routes:
            if isinstance(route, APIRoute) and "GET" in (route.methods or ()) and route.path not in CHANGING_BY_GET:
                yield route
