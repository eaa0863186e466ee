"""Routes of the storage tier: attach, detach, look at and clear the store, under traffic (SGLang's names)."""

import asyncio
import re
from typing import Annotated, Any

from fastapi import Query, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from headwater.client.engine_client import new_call_id
from headwater.generation.answer_fields import Json
from headwater.generation.errors import ApiError, bad_request
from headwater.http_api.auth import control_router
from headwater.http_api.control.query_types import SECONDS
from headwater.http_api.control.schemas_cache import MAX_STORE_BYTES, StorageBackendRequest
from headwater.http_api.control.storage_clear import ClearAnswer
from headwater.http_api.engine_answers import EngineAnswers, facts_of
from headwater.http_api.json_body import parse_json
from headwater.http_api.services import InjectedServices
from headwater.http_api.sse import while_connected
from headwater.messages.cache import AttachStorage, DetachStorage, GetStorage, StorageInfo
from headwater.messages.control import FlushCache

ATTACH_TIMEOUT_S = 30.0
CLEAR_TIMEOUT_S = 5.0
ATTACHED = "HiCache storage backend attached."
DETACHED = "HiCache storage backend detached."
TEXT_OR_JSON: dict[int | str, Json] = {
    status: {"description": text, "content": {"text/plain": {}, "application/json": {}}}
    for status, text in ((200, "Done."), (202, "Done, but not confirmed by every engine or the store yet."))
}
PLACES = ("directory", "url", "size")

router = control_router("storage")

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@router.put("/hicache/storage-backend", summary="Attach or replace a store", responses=TEXT_OR_JSON)
async def attach_storage(body: StorageBackendRequest, request: Request, services: InjectedServices) -> Response:
    """Put a store below the host tier while requests run. It replaces the attached store; if it is the same store
    and a policy is given, the store stays and only the policies change.

    The server answers when the store is open on every engine, or names an engine on which it is not.
    """
    arrived_s = asyncio.get_running_loop().time()
    services.require_loaded()
    place = _place(body)
    timeout_s = services.control_timeout_s(body.timeout, default_s=ATTACH_TIMEOUT_S)
    message = AttachStorage(
        call_id=new_call_id(),
        kind=body.hicache_storage_backend,
        directory=place.get("directory"),
        url=place.get("url"),
        size_bytes=size_bytes(place["size"]) if place.get("size") is not None else None,
        prefetch_policy=body.hicache_storage_prefetch_policy,
        write_policy=body.hicache_write_policy,
        timeout_s=timeout_s,
    )
    call = services.change(message, arrived_s=arrived_s, timeout_s=timeout_s)
    return _outcome(ATTACHED, await while_connected(call, request.receive), request)


@router.delete("/hicache/storage-backend", summary="Detach the store", responses=TEXT_OR_JSON)
async def detach_storage(request: Request, services: InjectedServices) -> Response:
    """Stop using the store while requests run; its pages stay in it. Harmless when there is none."""
    arrived_s = asyncio.get_running_loop().time()
    services.require_loaded()
    answers = await services.change(DetachStorage(call_id=new_call_id()), arrived_s=arrived_s)
    return _outcome(DETACHED, answers, request)


@router.get("/hicache/storage-backend", summary="The attached store")
async def show_storage(services: InjectedServices) -> Response:
    """As the engines report it: kind, prefetch policy, circuit breaker, what it holds, counters, what is in flight."""
    answers = await services.ask_all(GetStorage(call_id=new_call_id()))
    info: StorageInfo = answers.some_or_raise()[0][1]
    return JSONResponse(
        {
            "hicache_storage_backend": info.kind or None,
            "hicache_storage_backend_extra_config": {"size": info.capacity_bytes} if info.kind else None,
            "hicache_storage_prefetch_policy": info.prefetch_policy or None,
            "hicache_write_policy": info.write_policy or None,
            "engines": answers.entries(_facts),
        }
    )


@router.post("/clear_hicache_storage_backend", include_in_schema=False)
@router.post(
    "/hicache/storage-backend/clear", summary="Make everything in the store unreachable", responses=TEXT_OR_JSON
)
async def clear_storage(
    request: Request,
    services: InjectedServices,
    timeout: Annotated[str | None, SECONDS, Query(description="Seconds to wait for the store; default 5.")] = None,
) -> Response:
    """Flush the storage tier alone, at once and under load; device and host stay warm.

    200 when the store has acknowledged: no server finds earlier pages in it. 202 while it has not: until then this
    server neither reads nor writes it.
    """
    arrived_s = asyncio.get_running_loop().time()
    timeout_s = services.control_timeout_s(timeout, default_s=CLEAR_TIMEOUT_S)
    message = FlushCache(call_id=new_call_id(), mode="now", tiers=("storage",), timeout_s=timeout_s)
    call = services.flush_all(message, arrived_s=arrived_s, has_timeout=timeout is not None)
    answers = await while_connected(call, request.receive)
    answer = ClearAnswer(EngineAnswers(answers))
    if _wants_json(request):
        return JSONResponse(answer.as_json(), answer.status)
    return PlainTextResponse(answer.as_text(), answer.status)


def size_bytes(size: Any) -> int:
    """A size as bytes: a whole number, or a text such as `200MB` (10^6) or `16GiB` (2^30)."""
    expected = f"size: must be bytes from 1 to {MAX_STORE_BYTES}, or a text such as 200MB or 16GiB"
    matched = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if matched is not None:
        number, unit, is_binary = matched.groups()
        number_of_bytes = float(number) * (1024 if is_binary else 1000) ** _POWERS[unit.lower()]
        value = int(min(number_of_bytes, 2.0 * MAX_STORE_BYTES))  # infinity is no integer
    elif isinstance(size, int) and not isinstance(size, bool):
        value = size
    else:
        raise bad_request("size", f"{expected}; got {size!r}")
    if not 1 <= value <= MAX_STORE_BYTES:
        raise bad_request("size", f"{expected}; got {size!r}")
    return value


def _place(body: StorageBackendRequest) -> Json:
    """Directory, url and size: from the fields, else from the extra configuration. InvalidRequest."""
    name = "hicache_storage_backend_extra_config_json"
    extra: Any = body.hicache_storage_backend_extra_config_json or {}
    if isinstance(extra, str):
        try:
            extra = parse_json(extra.encode(), what="the text")
        except ApiError as error:
            raise bad_request(name, f"{name}: must be a JSON object; {error.message}") from None
    if not isinstance(extra, dict):
        raise bad_request(name, f"{name}: must be a JSON object, got {extra!r}")
    if unknown := sorted(extra.keys() - set(PLACES)):
        known = ", ".join(PLACES)
        raise bad_request(name, f"{name}: knows only {known}; got {', '.join(unknown)}")
    place = extra | {key: value for key in PLACES if (value := getattr(body, key)) is not None}
    for key in ("directory", "url"):
        if place.get(key) is not None and (not isinstance(place[key], str) or not place[key]):
            raise bad_request(key, f"{key}: must be a text that is not empty, got {place[key]!r}")
    return place


def _outcome(first_words: str, answers: EngineAnswers, request: Request) -> Response:
    """Success of every engine, as text or JSON; ApiError names an engine that failed."""
    answers.all_or_raise(_facts)
    words = sorted({info.message for _, info in answers.succeeded if info.message})
    message = " ".join([first_words, *words])
    if not _wants_json(request):
        return PlainTextResponse(message + "\n", answers.status)
    facts = {"success": True, "message": message, "engines": answers.entries(_facts)}
    return JSONResponse(facts, answers.status)


def _facts(info: StorageInfo) -> Json:
    return facts_of(info, without=("call_id",))


def _wants_json(request: Request) -> bool:
    return "application/json" in request.headers.get("accept", "")
