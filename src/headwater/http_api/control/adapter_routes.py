"""Routes for LoRA adapters: vLLM's and SGLang's names for the same two operations."""

import asyncio
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from headwater.client.engine_client import new_call_id
from headwater.generation.answer_fields import Json
from headwater.generation.errors import ApiError
from headwater.http_api.auth import control_router
from headwater.http_api.control.schemas_control import LoadLora, UnloadLora
from headwater.http_api.engine_answers import EngineAnswers, facts_of
from headwater.http_api.services import InjectedServices, Services
from headwater.http_api.sse import while_connected
from headwater.messages.adapters import LoadAdapter, UnloadAdapter

DEFAULT_TIMEOUT_S = 600.0

router = control_router("adapters")


@router.post("/v1/load_lora_adapter", summary="Serve a LoRA adapter")
async def load_lora_adapter(body: LoadLora, request: Request, services: InjectedServices) -> Response:
    """Read, check and serve an adapter, all or nothing; vLLM's path and answer.

    With `load_inplace` it replaces the adapter of that name. From then on no request can match KV of the old content,
    and new requests take the new one; requests that have begun finish on what they began with.
    """
    answers = await _load(body, request, services)
    if (error := answers.error(_facts)) is not None:
        raise error
    text = f"Success: LoRA adapter '{body.lora_name}' added successfully."
    return _answer(request, text, answers)


@router.post("/v1/unload_lora_adapter", summary="Stop serving a LoRA adapter")
async def unload_lora_adapter(body: UnloadLora, request: Request, services: InjectedServices) -> Response:
    """Requests that have begun finish; those that wait end with 404. Nothing of the adapter can be matched any more."""
    answers = await _unload(body, services)
    if (error := answers.error(_facts)) is not None:
        raise error
    text = f"Success: LoRA adapter '{body.lora_name}' removed successfully."
    return _answer(request, text, answers)


@router.post("/load_lora_adapter", summary="Serve a LoRA adapter (SGLang)")
async def load_lora_adapter_native(body: LoadLora, request: Request, services: InjectedServices) -> Response:
    """The same operation with SGLang's answer."""
    return _native_answer(await _load(body, request, services), services)


@router.post("/unload_lora_adapter", summary="Stop serving a LoRA adapter (SGLang)")
async def unload_lora_adapter_native(body: UnloadLora, services: InjectedServices) -> Response:
    """The same operation with SGLang's answer."""
    return _native_answer(await _unload(body, services), services)


async def _load(body: LoadLora, request: Request, services: Services) -> EngineAnswers:
    arrived_s = asyncio.get_running_loop().time()
    services.require_loaded()
    if body.lora_name in (services.model.served_name, "default"):
        message = f"lora_name: {body.lora_name!r} is the name of the model itself"
        raise ApiError(400, message, param="lora_name", code="invalid_value")
    message = LoadAdapter(
        call_id=new_call_id(),
        name=body.lora_name,
        path=body.lora_path,
        load_inplace=body.load_inplace,
        timeout_s=services.control_timeout_s(body.timeout, default_s=DEFAULT_TIMEOUT_S),
    )
    call = services.change(message, arrived_s=arrived_s, timeout_s=message.timeout_s)
    return await while_connected(call, request.receive)


async def _unload(body: UnloadLora, services: Services) -> EngineAnswers:
    arrived_s = asyncio.get_running_loop().time()
    services.require_loaded()
    message = UnloadAdapter(call_id=new_call_id(), name=body.lora_name)
    return await services.change(message, arrived_s=arrived_s)


def _answer(request: Request, text: str, answers: EngineAnswers) -> Response:
    """Text as vLLM's; with `Accept: application/json` the facts."""
    if "application/json" not in request.headers.get("accept", ""):
        return PlainTextResponse(text, answers.status)
    first: Json = _facts(answers.results[0]) if answers.results else {}
    facts: Json = {"success": True, "message": text} | first | {"engines": answers.entries(_facts)}
    return JSONResponse(facts, answers.status)


def _native_answer(answers: EngineAnswers, services: Services) -> Response:
    loaded: Json = {"loaded_adapters": dict(services.model.adapters())}
    error = answers.error(_facts)
    if error is not None:
        status = error.status if error.status in (503, 504) else 400
        body = {"success": False, "error_message": error.message} | loaded | error.body()
        return JSONResponse(body, status, headers=error.headers)
    first: Json = _facts(answers.results[0]) if answers.results else {}
    facts: Json = {"success": True, "error_message": ""} | loaded | first | {"engines": answers.entries(_facts)}
    return JSONResponse(facts, answers.status)


def _facts(answer: Any) -> Json:
    return facts_of(answer, without=("call_id",))
