"""Routes for a trainer's process group: the server joins it, and receives the tensors that its rank 0 broadcasts."""

import asyncio
import contextlib
import dataclasses
import math
from typing import Annotated

import msgspec
from fastapi import Body, Request
from starlette.responses import JSONResponse, Response

from headwater.devices.safetensors_header import ITEM_BYTES
from headwater.generation.errors import ApiError, bad_request
from headwater.http_api.auth import control_router
from headwater.http_api.control.weight_routes import DEFAULT_TIMEOUT_S, refusal
from headwater.http_api.control.weights.routes import answer_of, options_of
from headwater.http_api.control.weights.schemas import DestroyGroup, InitGroup, WeightsFromDistributed
from headwater.http_api.services import InjectedServices, Services
from headwater.messages.receiving import ReceiveBucket
from headwater.transports.receivers import NO_TORCH, GroupSpec, ReceiverFailed, has_torch, safetensors_dtypes
from headwater.transports.staging import BucketFile

INIT_TIMEOUT_S = 120.0

router = control_router("weights")


@router.post("/init_weights_update_group", summary="Join a trainer's process group")
async def init_weights_update_group(body: Annotated[InitGroup, Body()], services: InjectedServices) -> Response:
    """Answers when the group is complete: the trainer makes its side of it meanwhile, as rank 0.

    The server has one rank for each engine and each of its ranks (`--dp-size` times `--tp-size`), from `rank_offset`
    on. A group that does not come together in `timeout` seconds (default 120) is a 400, and may be tried again.
    """
    services.require_loaded()
    return await server_joins(body, services)


async def server_joins(body: InitGroup, services: Services, *, backend: str | None = None) -> Response:
    """Become members of the group; the answer of the call. `backend`: in place of the body's."""
    try:
        timeout_s = services.control_timeout_s(body.timeout, default_s=INIT_TIMEOUT_S)
        spec = _spec(body, services)
        spec = spec if backend is None else dataclasses.replace(spec, backend=backend)
        await services.weights.groups.join(spec, timeout_s=timeout_s)
    except ApiError as error:
        return refusal(error)
    except ReceiverFailed as error:
        return refusal(bad_request("group_name", f"the group was not made: {error}", code="group_failed"))
    text = f"Joined group {spec.name!r} with {spec.num_members} of its {spec.world_size} ranks."
    return JSONResponse({"success": True, "message": text})


@router.post("/destroy_weights_update_group", summary="Leave a trainer's process group")
async def destroy_weights_update_group(
    services: InjectedServices, body: Annotated[DestroyGroup | None, Body()] = None
) -> Response:
    """Leave the group. Harmless if there is none."""
    name = (body or DestroyGroup()).group_name
    was_there = await services.weights.groups.destroy(name)
    text = f"Left group {name!r}." if was_there else f"There was no group {name!r}."
    return JSONResponse({"success": True, "message": text})


@router.post("/update_weights_from_distributed", summary="Tensors that a trainer broadcasts")
async def update_weights_from_distributed(
    body: Annotated[WeightsFromDistributed, Body()], request: Request, services: InjectedServices
) -> Response:
    """Receive the named tensors, which rank 0 of the group broadcasts in this order, one by one or as one piece.

    Requests go on meanwhile. Within a bracket (/begin_weight_update) nothing becomes visible before its end; without
    one, the tensors are swapped in at once. If the trainer ends, or sends nothing for `timeout` seconds, the answer is
    a 400, the old weights serve on, and the group can be made anew.
    """
    return await receive_broadcast(body, request, services)


async def receive_broadcast(
    body: WeightsFromDistributed, request: Request, services: Services, *, piece_bytes: int = 0
) -> Response:
    """The answer to a bucket that is broadcast, `piece_bytes` in a piece (messages/receiving.py)."""
    arrived_s = asyncio.get_running_loop().time()
    services.require_loaded()
    try:
        timeout_s = services.control_timeout_s(body.timeout, default_s=DEFAULT_TIMEOUT_S)
        bucket = _bucket(body, piece_bytes)
        has_begun = False

        async def fill(file: BucketFile) -> None:
            nonlocal has_begun
            has_begun = True
            file.reserve(_num_bytes(bucket))
            spare_bytes = services.weights.spare_gpu_bytes(services.model.dtype)
            into = msgspec.structs.replace(bucket, path=str(file.path), spare_bytes=spare_bytes)
            await services.weights.groups.receive(body.group_name, into, timeout_s=timeout_s)
            file.written_elsewhere()

        try:
            transfer = await services.weights.receive(fill, transfer_id=body.transfer_id, options=options_of(body))
        except ApiError:
            if not has_begun:  # the trainer broadcasts in any case, and would wait
                await _drop(bucket, body.group_name, services, timeout_s=timeout_s)
            raise
        return await answer_of(transfer, body, request, services, arrived_s=arrived_s)
    except ApiError as error:
        return refusal(error)


def _spec(body: InitGroup, services: Services) -> GroupSpec:
    if not has_torch():
        raise ApiError(501, f"/init_weights_update_group {NO_TORCH}", code="no_torch")
    is_on_gpus = services.model.device != "cpu"
    if body.backend == "nccl" and not is_on_gpus:
        raise bad_request("backend", "backend nccl needs GPUs; this server computes on a CPU: make a group with gloo")
    num_members = num_ranks(services)
    if not 1 <= body.rank_offset <= body.world_size - num_members:
        text = f"rank_offset must be from 1 to {body.world_size - num_members}: the server has {num_members} ranks"
        raise bad_request("rank_offset", f"{text} of {body.world_size}, and rank 0 is the trainer's")
    return GroupSpec(
        name=body.group_name,
        master_address=body.master_address,
        master_port=body.master_port,
        rank_offset=body.rank_offset,
        world_size=body.world_size,
        backend=body.backend,
        num_members=num_members,
    )


def num_ranks(services: Services) -> int:
    """Ranks of all engines."""
    return services.state.client.num_engines * int(str(services.state.server_args.get("tp_size", 1)))


def _bucket(body: WeightsFromDistributed, piece_bytes: int) -> ReceiveBucket:
    if not len(body.tensor_names) == len(body.dtypes) == len(body.shapes) or not body.tensor_names:
        raise bad_request("names", "names, dtypes and shapes must have the same length, at least 1")
    if len(set(body.tensor_names)) < len(body.tensor_names):
        raise bad_request("names", "names must not repeat")
    try:
        dtypes = safetensors_dtypes(body.dtypes)
    except ValueError as error:
        raise bad_request("dtypes", f"dtypes: {error}") from None
    if any(length < 0 for shape in body.shapes for length in shape):
        raise bad_request("shapes", "shapes must not be negative")
    return ReceiveBucket(
        names=tuple(body.tensor_names),
        dtypes=dtypes,
        shapes=tuple(tuple(shape) for shape in body.shapes),
        is_flattened=body.load_format == "flattened_bucket" or piece_bytes > 0,
        path="",
        piece_bytes=piece_bytes,
    )


def _num_bytes(bucket: ReceiveBucket) -> int:
    return sum(math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in zip(bucket.dtypes, bucket.shapes, strict=True))


async def _drop(bucket: ReceiveBucket, name: str, services: Services, *, timeout_s: float) -> None:
    """Receive a bucket that was refused, so that the trainer's broadcast ends and the group stays usable."""
    with contextlib.suppress(ReceiverFailed):
        await services.weights.groups.receive(name, bucket, timeout_s=timeout_s)
