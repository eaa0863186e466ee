"""`/flush_cache`: the contract of docs/design.md, section 6."""

import asyncio
from typing import Annotated, Any

from fastapi import Depends, Query, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from headwater.generation.errors import bad_request
from headwater.http_api.auth import control_router
from headwater.http_api.control.flush_answer import FlushAnswer
from headwater.http_api.control.flush_request import client_parameters, flush_message
from headwater.http_api.control.query_types import FLAG, MODE, SECONDS
from headwater.http_api.engine_answers import EngineAnswers
from headwater.http_api.services import InjectedServices, Services
from headwater.http_api.sse import while_connected
from headwater.messages.control import FlushCache

router = control_router("control")

_VLLM_QUERY = ("reset_running_requests", "reset_external")
_BODIES = ("text/plain", "application/json")
FLUSH_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "Flushed.", "content": {kind: {} for kind in _BODIES}},
    202: {
        "description": "Nothing old can match any more, but not every page is back yet.",
        "content": {kind: {} for kind in _BODIES},
    },
    400: {
        "description": "Not idle within the timeout (nothing was flushed), or a bad parameter.",
        "content": {kind: {} for kind in _BODIES},
    },
    503: {"description": "An engine is gone or still loading; the answer names it, and since when."},
}


def _flush_query(
    timeout: Annotated[
        str | None, SECONDS, Query(description="Seconds to wait for the outcome; default 0 (--flush-default-timeout).")
    ] = None,
    mode: Annotated[
        str | None,
        MODE,
        Query(description="`idle`: at an idle moment. `now`: under load. `drain`: until all pages are back."),
    ] = None,
    tiers: Annotated[str | None, Query(description="Any of `device,host,storage`; default `device,host`.")] = None,
    cache_salt: Annotated[str | None, Query(description="Only namespaces with this salt.")] = None,
    extra_key: Annotated[str | None, Query(description="Only namespaces with this key.")] = None,
    lora_path: Annotated[
        str | None, Query(description="Only what this LoRA adapter computed; empty: only the model itself.")
    ] = None,
    prefix: Annotated[str | None, Query(description="Only what begins with this text.")] = None,
    prefix_ids: Annotated[str | None, Query(description="Only what begins with these token ids.")] = None,
    hold: Annotated[str | None, FLAG, Query(description="With `idle`: let no new request start meanwhile.")] = None,
    dry_run: Annotated[str | None, FLAG, Query(description="Report what would be freed, change nothing.")] = None,
    model: Annotated[str | None, Query(description="Of a fleet with several models: only this one.")] = None,
) -> None:
    """Declares the parameters for the documentation; `client_parameters` reads them."""


_flush = {
    "summary": "Retire cached KV",
    "responses": FLUSH_RESPONSES,
    "dependencies": [Depends(_flush_query)],
}


@router.get("/flush_cache", operation_id="flush_cache", **_flush)
@router.post("/flush_cache", operation_id="flush_cache_post", **_flush)
async def flush_cache(request: Request, services: InjectedServices) -> Response:
    """Make cached KV unmatchable and give its pages back.

    Parameters come in the query, or by the same names in a JSON body. A client that disconnects cancels its
    pending flush. The answer is text that begins as SGLang's, or JSON with `Accept: application/json`.
    """
    answer = await _flushed(request, services, request.query_params.multi_items())
    if "application/json" in request.headers.get("accept", ""):
        return JSONResponse(answer.as_json(), answer.status)
    return PlainTextResponse(answer.as_text(), answer.status)


async def _flushed(request: Request, services: Services, query: list[tuple[str, str]]) -> FlushAnswer:
    arrived_s = asyncio.get_running_loop().time()
    parameters = client_parameters(query, await request.body())
    if "model" in parameters:  # a scope that must not be overheard
        services.model.require(parameters.pop("model"))
    defaults = services.state.flush_defaults
    if defaults.timeout_s:
        parameters.setdefault("timeout", defaults.timeout_s)
    parameters.setdefault("mode", defaults.mode)
    max_timeout_s = services.state.limits.max_control_timeout_s
    message = await flush_message(parameters, services.generator, max_timeout_s=max_timeout_s)
    calls = services.flush_all(message, arrived_s=arrived_s, has_timeout="timeout" in parameters)
    answer = FlushAnswer(EngineAnswers(await while_connected(calls, request.receive)))
    if answer.is_success and _is_whole(message):
        services.state.client.forget_prefixes()
    return answer


@router.post("/reset_prefix_cache", **_flush)
async def reset_prefix_cache(
    request: Request,
    services: InjectedServices,
    reset_running_requests: Annotated[bool, Query(description="Only false.")] = False,
    reset_external: Annotated[bool, Query(description="Only false.")] = False,
) -> Response:
    """`/flush_cache` by vLLM's name, with its parameters. The answer is always JSON."""
    if reset_running_requests:
        text = "running requests keep their KV; /pause_generation with mode retract takes it from them"
        raise bad_request("reset_running_requests", f"reset_running_requests: must be false: {text}")
    if reset_external:
        raise bad_request("reset_external", "reset_external: must be false: name the storage tier in tiers")
    query = [(name, value) for name, value in request.query_params.multi_items() if name not in _VLLM_QUERY]
    answer = await _flushed(request, services, query)
    return JSONResponse(answer.as_json(), answer.status)


def _is_whole(message: FlushCache) -> bool:
    scope = (message.cache_salt, message.extra_key, message.lora_name, message.prefix_ids)
    return all(part is None for part in scope) and not message.dry_run
