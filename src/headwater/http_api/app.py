"""The web application: routes, middleware and error handlers."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, Mount
from starlette.types import ASGIApp

from headwater.generation.model_facts import RequestLimits
from headwater.http_api import page_routes
from headwater.http_api.anthropic import routes as anthropic_routes
from headwater.http_api.auth import Accounts, AdminRoute, Authentication, Keys
from headwater.http_api.compressed_body import CompressedBody
from headwater.http_api.control import (
    adapter_routes,
    cache_routes,
    control_routes,
    flush_routes,
    memory_routes,
    replica_routes,
    storage_routes,
    weight_routes,
)
from headwater.http_api.control.vllm import rpc_routes, sleep_routes, transfer_routes
from headwater.http_api.control.weights import group_routes
from headwater.http_api.control.weights import routes as tensor_routes
from headwater.http_api.control.weights.routes import RAW_TYPES
from headwater.http_api.dashboard import routes as dashboard_routes
from headwater.http_api.error_handlers import install_error_handlers
from headwater.http_api.head_routes import all_routes
from headwater.http_api.middleware import BodyLimit, OnEnded, RequestId, SiteGuard
from headwater.http_api.monitoring import info_routes, kv_event_routes
from headwater.http_api.native import routes as native_routes
from headwater.http_api.ollama import routes as ollama_routes
from headwater.http_api.openai import routes as openai_routes
from headwater.http_api.openapi.document import install_document
from headwater.http_api.pooling import routes as pooling_routes
from headwater.http_api.responses import routes as responses_routes
from headwater.http_api.services import Services
from headwater.http_api.sites import SitePolicy
from headwater.http_api.state import ApiState
from headwater.version import version

ROUTERS = (
    openai_routes.router,
    responses_routes.router,
    anthropic_routes.router,
    ollama_routes.router,
    native_routes.router,
    pooling_routes.router,
    flush_routes.router,
    control_routes.router,
    weight_routes.router,
    tensor_routes.router,
    group_routes.router,
    transfer_routes.router,
    rpc_routes.router,
    adapter_routes.router,
    memory_routes.router,
    sleep_routes.router,
    cache_routes.router,
    cache_routes.view_router,
    cache_routes.report_router,
    storage_routes.router,
    replica_routes.router,
    dashboard_routes.router,
    dashboard_routes.page_router,
    info_routes.router,
    kv_event_routes.router,
    page_routes.router,
)

# of a fleet's front: what concerns all replicas, without what computes on an engine or names one
FRONT_ROUTERS = (
    flush_routes.router,
    control_routes.router,
    weight_routes.router,
    tensor_routes.router,
    adapter_routes.router,
    memory_routes.router,
    cache_routes.view_router,
    cache_routes.report_router,
    storage_routes.router,
    dashboard_routes.router,
    dashboard_routes.page_router,
    info_routes.router,
)
ROUTES, FRONT_ROUTES = all_routes(ROUTERS), all_routes(FRONT_ROUTERS)

Ending = Callable[[], Awaitable[None]]

# bodies that are staged as they arrive, within a limit; pieces of such
UNBOUNDED = {"/update_weights_from_tensor": RAW_TYPES, replica_routes.STAGED: RAW_TYPES}

DESCRIPTION = """
LLM inference with a KV cache that can be operated: OpenAI's API under `/v1`, SGLang's native API beside it.

Every error is `{"error": {"message", "type", "param", "code"}}`.
With keys set, send `Authorization: Bearer <key>`.
"""


def create_app(
    state: ApiState, *, routes: Sequence[BaseRoute] = ROUTES, rest: ASGIApp | None = None, is_guarded: bool = True
) -> FastAPI:
    """The application for one state. Its lifespan starts the client, unless it has started, and closes it.

    `rest` answers what `routes` do not, behind the same middleware. Without `is_guarded` there is none: the application
    stands behind one of `guarded`.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await state.client.start()
        yield
        await app.state.services.weights.close()
        await state.client.close()

    app = FastAPI(
        title="Headwater",
        version=version(),
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # in page_routes, without a CDN
        redoc_url=None,
    )
    app.state.keys = Keys(state.api_key, state.admin_api_key)
    accounts = Accounts(app.state.keys, max_running=state.limits.max_concurrency_per_key)
    app.state.services = Services(state, accounts)
    install_error_handlers(app, routes)
    app.router.routes.extend(routes)
    if rest is None:
        install_document(app)
    else:
        app.mount("/", rest)
    if is_guarded:
        _add_middleware(
            app, keys=app.state.keys, limits=state.limits, sites=state.sites, on_ended=state.on_request_ended
        )
    return app


def guarded(
    app: ASGIApp,
    *,
    keys: Keys,
    limits: RequestLimits,
    sites: SitePolicy,
    end: Ending,
    on_ended: Sequence[OnEnded] = (),
) -> ASGIApp:
    """`app` behind the middleware of every server. `end` runs when the server ends, `on_ended` after each request."""

    @asynccontextmanager
    async def lifespan(outer: Starlette) -> AsyncIterator[None]:
        yield
        await end()

    outer = Starlette(routes=[Mount("/", app)], lifespan=lifespan)
    _add_middleware(outer, keys=keys, limits=limits, sites=sites, on_ended=on_ended)
    return outer


def _add_middleware(
    app: Starlette, *, keys: Keys, limits: RequestLimits, sites: SitePolicy, on_ended: Sequence[OnEnded]
) -> None:
    # The last one added sees a request first, so even a refused request has its id.
    app.add_middleware(CompressedBody, max_body_bytes=limits.max_body_bytes)
    app.add_middleware(BodyLimit, max_body_bytes=limits.max_body_bytes, unbounded=UNBOUNDED)
    app.add_middleware(Authentication, keys=keys)
    app.add_middleware(SiteGuard, policy=sites)
    if sites.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(sites.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    app.add_middleware(RequestId, on_ended=on_ended)


def control_paths(routers: Sequence[APIRouter]) -> set[str]:
    """The paths of all control routes, up to their first parameter."""
    routes = [route for router in routers for route in router.routes]
    return {route.path.partition("{")[0] for route in routes if isinstance(route, AdminRoute)}
