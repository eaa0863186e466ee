"""Routes that show the cache, fill it ahead, and keep prefixes from being evicted."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, Response

from headwater.client.engine_client import new_call_id
from headwater.generation.answer_fields import Json
from headwater.generation.errors import ApiError, adapter_not_found, bad_request
from headwater.http_api.auth import control_router
from headwater.http_api.control.cache_prefixes import compute, encode_prefixes, target_engines
from headwater.http_api.control.cache_report import cache_report
from headwater.http_api.control.cache_tree import tree_facts, tree_facts_with_blocks
from headwater.http_api.control.schemas_cache import PinRequest, WarmRequest
from headwater.http_api.engine_answers import EngineAnswers, facts_of
from headwater.http_api.json_body import JsonRoute
from headwater.http_api.services import CALL_TIMEOUT_S, InjectedServices, Services
from headwater.http_api.sse import while_connected
from headwater.messages.base import TokenArray, pack_ids
from headwater.messages.cache import GetCacheTree, GetPins, GetStorage, PinPrefix, UnpinPrefix

router = control_router("cache")
view_router = control_router("cache")  # of all engines; a fleet's front has it as well
report_router = APIRouter(route_class=JsonRoute, tags=["cache"])  # open to users


@report_router.get("/cache", summary="What the cache holds and what it is worth")
async def show_cache(services: InjectedServices) -> Response:
    """Tiers (used, capacity, evictable), hit rates by tier, copies between tiers and their speed, the store.

    `stored_responses` counts what /v1/responses keeps.

    The sums over all engines, and each engine in `engines`. docs/cache.md says what each number means.
    """
    states, storage = await asyncio.gather(
        services.engine_states(),
        services.state.client.call_all(GetStorage(call_id=new_call_id()), timeout_s=CALL_TIMEOUT_S),
    )
    report = cache_report(EngineAnswers(states), EngineAnswers(storage))
    return JSONResponse(report | {"stored_responses": services.responses.facts()})


@router.delete("/cache/responses", summary="Drop the stored responses")
async def drop_responses(services: InjectedServices) -> Response:
    """Forget every response that /v1/responses keeps for `previous_response_id`. Cached pages are not touched."""
    num_responses, num_bytes = services.responses.clear()
    return JSONResponse({"success": True, "dropped": num_responses, "bytes": num_bytes})


@view_router.get("/cache/tree", summary="The prefix tree")
async def show_tree(
    services: InjectedServices,
    depth: Annotated[int, Query(ge=1, le=64, description="Nodes from a root downwards.")] = 3,
    max_nodes: Annotated[int, Query(ge=1, le=100_000, description="Most nodes in the answer.")] = 1000,
    blocks: Annotated[
        bool, Query(description="Also every block's hash and tokens, for a mirror of the events that missed some.")
    ] = False,
    lora_path: Annotated[
        str | None, Query(description="Only what this LoRA adapter computed; empty: only the model itself.")
    ] = None,
    dp_rank: Annotated[int | None, Query(description="Only of this engine; left out: of every engine.")] = None,
) -> Response:
    """Namespaces and the nodes below them, most used first: tokens, first ids, hits, and pins by tier.

    With `blocks=true` also all blocks of the device and of the host, whatever `depth` and `max_nodes` are, and
    `next_event`, the number of the first batch of events that is not in them: docs/events.md.
    """
    if lora_path and lora_path not in services.model.adapters():
        raise adapter_not_found(lora_path)
    message = GetCacheTree(
        call_id=new_call_id(), depth=depth, max_nodes=max_nodes, blocks=blocks, lora_name=lora_path
    )
    answers = await (services.ask_all(message) if dp_rank is None else services.ask_one(message, engine=dp_rank))
    answers.some_or_raise()
    if not blocks:
        return JSONResponse({"engines": answers.entries(tree_facts)})
    # A thread: a million tokens are megabytes of JSON, and streams must go on meanwhile.
    return await asyncio.to_thread(lambda: JSONResponse({"engines": answers.entries(tree_facts_with_blocks)}))


@router.post("/cache/warm", summary="Compute or prefetch prefixes ahead")
async def warm_prefixes(body: WarmRequest, request: Request, services: InjectedServices) -> Response:
    """Bring prefixes into the cache before requests need them: found on a tier, copied up, or computed.

    Answers when that is done, with the tokens by origin. A caller who disconnects ends it.
    """
    encoded = await encode_prefixes(body, services)
    work = [
        compute(encoded.prompts, body, services, engine=engine, priority=body.priority)
        for engine in target_engines(body, services)
    ]
    by_engine = await while_connected(_all(work), request.receive)
    items = [item for items in by_engine for item in items]
    total = {name: sum(item[name] for item in items) for name in ("prompt_tokens", "cached_tokens", "computed_tokens")}
    return JSONResponse({"success": True} | total | {"items": items})


@router.post("/cache/pin", summary="Keep a prefix from being evicted")
async def pin_prefix(body: PinRequest, request: Request, services: InjectedServices) -> Response:
    """Pin a prefix for `ttl_s` seconds; the part that is not cached is computed first.

    Whole pages are pinned: `num_tokens` says how many tokens. On the host they are held as their copies arrive:
    `GET /cache/pins` reports `num_host_tokens`. A flush in scope ends a pin. On the device a pin gives way to a request
    that could not run otherwise.
    """
    if "host" in body.tiers and services.state.server_args.get("enable_hierarchical_cache") is False:
        raise bad_request("tiers", "tiers: this server has no host tier; it needs --enable-hierarchical-cache")
    encoded = await encode_prefixes(body, services)
    if len(encoded.prompts) != 1:
        raise bad_request("text", "text: one prefix is pinned at a time, got a batch")
    work = _pin(body, encoded.prompts[0], services, engines=target_engines(body, services))
    pins, status = await while_connected(work, request.receive)
    pin_id = ",".join(entry["pin_id"] for entry in pins)
    facts = {"success": True, "pin_id": pin_id, "num_tokens": pins[0].get("num_tokens", 0), "pins": pins}
    return JSONResponse(facts, status)


@view_router.get("/cache/pins", summary="Pinned prefixes")
async def list_pins(services: InjectedServices) -> Response:
    """Pins with their length, namespace and time left.

    `tiers` is where a pin holds pages. `gave_way` says which request needed its device pages; empty: it has them.
    """
    answers = await services.ask_all(GetPins(call_id=new_call_id()))
    found = [_pin_facts(rank, item) for rank, pins in answers.some_or_raise() for item in pins.items]
    missing = [entry for entry in answers.entries() if not entry["success"]]
    return JSONResponse({"pins": found, **({"engines_missing": missing} if missing else {})})


@router.delete("/cache/pin/{pin_id}", summary="End a pin")
async def unpin_prefix(pin_id: str, services: InjectedServices) -> Response:
    """End a pin before its time, by the `pin_id` that `POST /cache/pin` returned."""
    arrived_s = asyncio.get_running_loop().time()
    by_name: dict[str, list[int]] = {}
    for engine, name in [_parse_pin(part, services) for part in pin_id.split(",")]:
        by_name.setdefault(name, []).append(engine)
    status = 200
    for name, engines in by_name.items():
        message = UnpinPrefix(call_id=new_call_id(), pin_id=name)
        answers = await services.change(message, arrived_s=arrived_s, engines=engines)
        answers.all_or_raise()
        status = max(status, answers.status)
    return JSONResponse({"success": True, "pin_id": pin_id}, status)


async def _all(work: list[Any]) -> list[Any]:
    return await asyncio.gather(*work)


async def _pin(
    body: PinRequest, prompt: TokenArray, services: Services, *, engines: list[int]
) -> tuple[list[Json], int]:
    """Compute, then pin, on each engine: in between, only requests that use the whole pool could evict the prefix.

    Returns an entry for each engine, and the status of the answer.
    """
    work = [compute([prompt], body, services, engine=engine, priority=body.priority) for engine in engines]
    found = {engine: items[0] for engine, items in zip(engines, await _all(work), strict=True)}
    message = PinPrefix(
        call_id=new_call_id(),
        prompt_ids=pack_ids(prompt),
        ttl_s=body.ttl_s,
        cache_salt=body.cache_salt,
        extra_key=body.extra_key,
        lora_name=body.lora_path or "",
        tiers=tuple(dict.fromkeys(body.tiers)),
        pin_id=services.new_pin_id(),
    )
    answers = await services.change(message, arrived_s=asyncio.get_running_loop().time(), engines=engines)
    answers.all_or_raise()
    pins = {rank: result.items[0] for rank, result in answers.succeeded}
    entries = []
    for entry in answers.entries():
        rank = entry["dp_rank"]
        counts = {name: found[rank][name] for name in ("cached_tokens", "computed_tokens")}
        if rank in pins:
            entries.append(_pin_facts(rank, pins[rank]) | counts)
        else:
            entries.append({"pin_id": f"{rank}.{message.pin_id}"} | entry)
    return entries, answers.status


def _pin_facts(engine: int, item: Any) -> Json:
    return facts_of(item) | {"pin_id": f"{engine}.{item.pin_id}", "dp_rank": engine}


def _parse_pin(pin_id: str, services: Services) -> tuple[int, str]:
    engine, _, name = pin_id.partition(".")
    if not engine.isdecimal() or not name or int(engine) >= services.state.client.num_engines:
        raise ApiError(404, f"no pin {pin_id!r} exists", param="pin_id", code="not_found")
    return int(engine), name
