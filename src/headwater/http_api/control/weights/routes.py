"""Routes for weights that a trainer sends: tensors in a body or in shared memory, and the brackets around them."""

import asyncio
import base64
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Body, Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from headwater.devices.safetensors_header import ITEM_BYTES
from headwater.generation.errors import ApiError, bad_request
from headwater.http_api.auth import control_router
from headwater.http_api.control.weight_routes import DEFAULT_TIMEOUT_S, refusal, update_answer
from headwater.http_api.control.weights.receiver import UpdateOptions
from headwater.http_api.control.weights.schemas import AbortUpdate, BeginUpdate, EndUpdate, Push, WeightsFromTensor
from headwater.http_api.services import InjectedServices, Services
from headwater.http_api.socket_body import EXTENSION, BodyLost, SocketBody
from headwater.http_api.sse import while_connected
from headwater.messages.receiving import CopyFromGpu
from headwater.transports.bracket import Transfer
from headwater.transports.pickled.machine import PickleRefused
from headwater.transports.pickled.payload import CudaTensorHandle, PayloadTensor, named_tensors
from headwater.transports.receivers import has_torch
from headwater.transports.staging import SHARED_MEMORY, BucketError, BucketFile

RAW_TYPES = frozenset({"application/octet-stream", "application/vnd.safetensors"})

router = control_router("weights")
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/vnd.safetensors": {"schema": {"type": "string", "format": "binary"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "application/json": {"schema": WeightsFromTensor.model_json_schema()},
        },
    }
}


@router.post("/update_weights_from_tensor", summary="Tensors from a trainer", openapi_extra=_BODY)
async def update_weights_from_tensor(request: Request, services: InjectedServices) -> Response:
    """Tensors of the model, all or some: a safetensors body, a file in shared memory, or SGLang's pickles.

    With a safetensors body, the options (`weight_version`, `transfer_id`, `in_place`, `abort_all_requests`, `timeout`)
    are query parameters. Requests go on while the tensors arrive. Within a bracket (/begin_weight_update) nothing
    becomes visible before its end; without one, the tensors are swapped in at once, as /update_weights_from_disk does.
    """
    arrived_s = asyncio.get_running_loop().time()
    services.require_loaded()
    try:
        if content_type(request) in RAW_TYPES:
            asked = Push.model_validate(dict(request.query_params))
            transfer = await services.weights.receive(
                lambda bucket: stream_body(request, bucket), transfer_id=asked.transfer_id, options=options_of(asked)
            )
        else:
            asked = WeightsFromTensor.model_validate(await request.json())
            transfer = await services.weights.receive(
                lambda bucket: _fill(asked, bucket, services), transfer_id=asked.transfer_id, options=options_of(asked)
            )
        return await answer_of(transfer, asked, request, services, arrived_s=arrived_s)
    except ApiError as error:
        return refusal(error)


@router.post("/begin_weight_update", summary="Open a bracket around buckets")
async def begin_weight_update(
    services: InjectedServices, body: Annotated[BeginUpdate | None, Body()] = None
) -> Response:
    """The buckets until /end_weight_update become visible together, or none of them.

    A bracket that is not ended within `timeout` seconds (default 600) is dropped, and the old weights serve on.
    """
    services.require_loaded()
    asked = body or BeginUpdate()
    try:
        timeout_s = services.control_timeout_s(asked.timeout, default_s=DEFAULT_TIMEOUT_S)
        transfer = services.weights.begin(timeout_s=timeout_s)
    except ApiError as error:
        return refusal(error)
    return JSONResponse(
        {
            "success": True,
            "message": "A bracket is open.",
            "transfer_id": transfer.transfer_id,
            "timeout": timeout_s,
        }
    )


@router.post("/end_weight_update", summary="Close the bracket and swap its tensors in")
async def end_weight_update(
    request: Request, services: InjectedServices, body: Annotated[EndUpdate | None, Body()] = None
) -> Response:
    """All tensors of the bracket become visible in one swap. A bucket that was refused means 400 and no change."""
    arrived_s = asyncio.get_running_loop().time()
    services.require_loaded()
    asked = body or EndUpdate()
    try:
        transfer = services.weights.end(asked.transfer_id, options=options_of(asked))
        return await _apply(transfer, asked, request, services, arrived_s=arrived_s)
    except ApiError as error:
        return refusal(error)


@router.post("/abort_weight_update", summary="Give the bracket up")
async def abort_weight_update(
    services: InjectedServices, body: Annotated[AbortUpdate | None, Body()] = None
) -> Response:
    """Drop what the bracket has received; the old weights serve on. Harmless without a bracket."""
    try:
        transfer = services.weights.abort((body or AbortUpdate()).transfer_id)
    except ApiError as error:
        return refusal(error)
    text = "No bracket was open." if transfer is None else f"{transfer.num_buckets} buckets were dropped."
    return JSONResponse({"success": True, "message": text})


async def answer_of(
    transfer: Transfer, asked: Push, request: Request, services: Services, *, arrived_s: float
) -> Response:
    """The answer to a bucket: it waits for the end of its bracket, or is put in place."""
    if not transfer.is_bracket:
        return await _apply(transfer, asked, request, services, arrived_s=arrived_s)
    return JSONResponse(
        {
            "success": True,
            "message": "Received; visible with /end_weight_update.",
            "transfer_id": transfer.transfer_id,
            "num_buckets": transfer.num_buckets,
            "num_tensors": len(transfer.tensors),
        }
    )


async def _apply(
    transfer: Transfer, asked: Push | EndUpdate, request: Request, services: Services, *, arrived_s: float
) -> Response:
    timeout_s = services.control_timeout_s(asked.timeout, default_s=DEFAULT_TIMEOUT_S)
    async with services.weights.update_of(transfer, timeout_s=timeout_s) as message:
        call = services.change(message, arrived_s=arrived_s, timeout_s=timeout_s)
        answers = await while_connected(call, request.receive)
        return update_answer(answers, services)


async def stream_body(request: Request, bucket: BucketFile) -> None:
    announced = request.headers.get("content-length", "")
    if announced.isdigit():
        bucket.reserve(int(announced))
    body: SocketBody | None = request.scope.get("extensions", {}).get(EXTENSION)
    try:
        if body is not None:
            await body.read_into(bucket)
            return
        async for chunk in request.stream():
            if chunk:
                bucket.write(chunk)
    except ClientDisconnect:
        raise BucketError("the sender left before the bucket was whole") from None
    except BodyLost as error:
        raise BucketError(str(error)) from None


async def _fill(asked: WeightsFromTensor, bucket: BucketFile, services: Services) -> None:
    if asked.safetensors_path is not None:
        await fill_from_file(asked.safetensors_path, bucket, takes=asked.take)
        return
    if asked.serialized_named_tensors:  # the first one: each rank's payload holds the same whole tensors
        is_flattened = asked.load_format == "flattened_bucket"
        pickle = Pickle("serialized_named_tensors", asked.serialized_named_tensors[0], is_flattened=is_flattened)
        await fill_from_pickle(pickle, bucket, services)
        return
    raise bad_request(
        "safetensors_path", "send a safetensors body, or safetensors_path (a file in /dev/shm)", code="missing"
    )


async def fill_from_file(path: str, bucket: BucketFile, *, takes: bool) -> None:
    """A file in shared memory, which is copied, or moved (`takes`)."""
    found = _shared_file(path)
    if takes and found.suffix != ".safetensors":
        raise bad_request("take", "take: only a file named *.safetensors is moved")
    await asyncio.to_thread(bucket.take if takes else bucket.copy_from, found)


@dataclass(frozen=True, slots=True)
class Pickle:
    """A payload of SGLang's trainers, in base64, and the parameter that it came in."""

    param: str
    payload: str
    is_flattened: bool
    may_stay_on_gpu: bool = True  # until the engines have read it


async def fill_from_pickle(pickle: Pickle, bucket: BucketFile, services: Services) -> None:
    """The tensors of a payload, if the server accepts pickles."""
    if not services.state.allows_pickles:
        text = f"{pickle.param} are pickles: they need --allow-pickled-tensors and --admin-api-key"
        raise bad_request(pickle.param, f"{text}. Or send a safetensors body", code="pickles_not_allowed")
    try:
        tensors = await asyncio.to_thread(_read_pickle, pickle.payload, is_flattened=pickle.is_flattened)
        on_gpu = [(name, tensor) for name, tensor in tensors if isinstance(tensor, CudaTensorHandle)]
        if not on_gpu:
            await asyncio.to_thread(_write_pickle, tensors, bucket)
        elif len(on_gpu) < len(tensors):
            raise PickleRefused("the tensors must be all on GPUs or all in host memory")
        else:
            spare_bytes = services.weights.spare_gpu_bytes(services.model.dtype) if pickle.may_stay_on_gpu else -1
            await _copy_from_gpu(on_gpu, bucket, services, spare_bytes=spare_bytes)
    except PickleRefused as error:
        raise bad_request(pickle.param, f"{pickle.param}: {error}", code="bad_pickle") from None


def _read_pickle(payload: str, *, is_flattened: bool) -> list[tuple[str, PayloadTensor]]:
    try:
        data = base64.b64decode(payload, validate=True)
    except ValueError:
        raise PickleRefused("is not base64") from None
    return named_tensors(data, is_flattened=is_flattened)


def _write_pickle(tensors: list[tuple[str, Any]], bucket: BucketFile) -> None:
    from headwater.transports.pickled.host_tensors import write_bucket  # numpy: the server starts without it

    write_bucket(tensors, bucket.write, reserve=bucket.reserve)


async def _copy_from_gpu(
    tensors: list[tuple[str, CudaTensorHandle]], bucket: BucketFile, services: Services, *, spare_bytes: int
) -> None:
    """Handles of CUDA: a process with PyTorch opens them."""
    if services.model.device == "cpu" or not has_torch():
        raise PickleRefused("tensors on a GPU: this server computes on a CPU; send them from host memory")
    found = [tensor for _, tensor in tensors]
    bucket.reserve(sum(math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype] for tensor in found))
    await services.weights.groups.copy_from_gpu(
        CopyFromGpu(
            names=tuple(name for name, _ in tensors),
            dtypes=tuple(tensor.dtype for tensor in found),
            shapes=tuple(tensor.shape for tensor in found),
            handles=tuple(tensor.arguments for tensor in found),
            first_bytes=tuple(tensor.first_byte for tensor in found),
            path=str(bucket.path),
            spare_bytes=spare_bytes,
        ),
        timeout_s=DEFAULT_TIMEOUT_S,
    )
    bucket.written_elsewhere()


def _shared_file(path: str) -> Path:
    """A file in shared memory: other files are /update_weights_from_disk's."""
    found = Path(path)
    if not found.is_absolute() or ".." in found.parts or not found.is_relative_to(SHARED_MEMORY):
        raise bad_request("safetensors_path", f"safetensors_path must be a file in {SHARED_MEMORY}")
    return found


def options_of(asked: Push | EndUpdate) -> UpdateOptions:
    """What a call says about its transfer."""
    return UpdateOptions(asked.weight_version, aborts_all=asked.abort_all_requests, in_place=asked.in_place)


def content_type(request: Request) -> Any:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()
