"""Routes for LoRA adapters: vLLM's and SGLang's names for the same two operations."""

import asyncio
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from headwater.client.engine_client import new_call_id
from headwater.generation.answer_fields import Json
from headwater.generation.errors import ApiError, bad_request
from headwater.http_api.auth import control_router
from headwater.http_api.control.schemas_control import LoadLora, LoraFromTensors, UnloadLora
from headwater.http_api.control.weights.receiver import Fill
from headwater.http_api.control.weights.routes import (
    RAW_TYPES,
    Pickle,
    content_type,
    fill_from_file,
    fill_from_pickle,
    stream_body,
)
from headwater.http_api.engine_answers import EngineAnswers, facts_of
from headwater.http_api.services import InjectedServices, Services
from headwater.http_api.sse import while_connected
from headwater.messages.adapters import LoadAdapter, UnloadAdapter
from headwater.transports.staging import BucketFile

DEFAULT_TIMEOUT_S = 600.0

router = control_router("adapters")
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/vnd.safetensors": {"schema": {"type": "string", "format": "binary"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "application/json": {"schema": LoraFromTensors.model_json_schema()},
        },
    }
}


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


@router.post(
    "/load_lora_adapter_from_tensors", summary="Serve a LoRA adapter that a trainer sends", openapi_extra=_BODY
)
async def load_lora_adapter_from_tensors(request: Request, services: InjectedServices) -> Response:
    """The same of tensors under the names of PEFT's files: a safetensors body, a file in shared memory, or a pickle.

    With a safetensors body, `lora_name`, `config_dict` (as JSON text), `load_inplace` and `timeout` are query
    parameters. Nothing changes before all tensors have arrived and fit the model.
    """
    services.require_loaded()
    if content_type(request) in RAW_TYPES:
        asked = LoraFromTensors.model_validate(dict(request.query_params))
        fill: Fill = lambda bucket: stream_body(request, bucket)  # noqa: E731
    else:
        asked = LoraFromTensors.model_validate(await request.json())
        fill = lambda bucket: _fill(asked, bucket, services)  # noqa: E731
    _check_name(asked.lora_name, services)
    async with services.weights.adapter_of(fill, asked.config()) as path:
        body = LoadLora(
            lora_name=asked.lora_name, lora_path=path, load_inplace=asked.load_inplace, timeout=asked.timeout
        )
        return _native_answer(await _load(body, request, services), services)


async def _fill(asked: LoraFromTensors, bucket: BucketFile, services: Services) -> None:
    if asked.safetensors_path is not None:
        await fill_from_file(asked.safetensors_path, bucket, takes=False)
    elif asked.serialized_tensors is not None:
        is_flattened = asked.load_format == "flattened_bucket"
        pickle = Pickle(
            "serialized_tensors", asked.serialized_tensors, is_flattened=is_flattened, may_stay_on_gpu=False
        )
        await fill_from_pickle(pickle, bucket, services)
    else:
        text = "send a safetensors body, or safetensors_path (a file in /dev/shm)"
        raise bad_request("safetensors_path", text, code="missing")


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
    _check_name(body.lora_name, services)
    message = LoadAdapter(
        call_id=new_call_id(),
        name=body.lora_name,
        path=body.lora_path,
        load_inplace=body.load_inplace,
        timeout_s=services.control_timeout_s(body.timeout, default_s=DEFAULT_TIMEOUT_S),
    )
    call = services.change(message, arrived_s=arrived_s, timeout_s=message.timeout_s)
    answers = await while_connected(call, request.receive)
    services.weights.delete_unused()  # what the name meant may have come from a trainer
    return answers


def _check_name(name: str, services: Services) -> None:
    if name in (services.model.served_name, "default"):
        message = f"lora_name: {name!r} is the name of the model itself"
        raise ApiError(400, message, param="lora_name", code="invalid_value")


async def _unload(body: UnloadLora, services: Services) -> EngineAnswers:
    arrived_s = asyncio.get_running_loop().time()
    services.require_loaded()
    message = UnloadAdapter(call_id=new_call_id(), name=body.lora_name)
    answers = await services.change(message, arrived_s=arrived_s)
    services.weights.delete_unused()
    return answers


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
