"""vLLM's routes for weights that a trainer broadcasts: the server's own process group and bracket, by other names."""

from typing import Annotated

from fastapi import Body, Query, Request
from starlette.responses import JSONResponse, Response

from headwater.generation.errors import bad_request
from headwater.http_api.auth import control_router
from headwater.http_api.control.vllm.schemas import (
    PIECE_BYTES,
    FinishUpdate,
    InitEngine,
    InitInfo,
    StartUpdate,
    UpdateInfo,
    UpdateWeightsCall,
)
from headwater.http_api.control.weight_routes import refusal
from headwater.http_api.control.weights.group_routes import num_ranks, receive_broadcast, server_joins
from headwater.http_api.control.weights.routes import begin_weight_update, end_weight_update
from headwater.http_api.control.weights.schemas import BeginUpdate, EndUpdate, InitGroup, WeightsFromDistributed
from headwater.http_api.services import InjectedServices, Services
from headwater.messages.receiving import VLLM
from headwater.transports.receivers import has_torch

GROUP = "vllm"

router = control_router("weights")


def piece_bytes(info: InitInfo | UpdateInfo, *, default: int) -> int:
    """The size at which the sender ends a piece; 0 if it sends tensors one by one."""
    if info.packed is None:
        return default
    return (info.packed_buffer_size_bytes or PIECE_BYTES) if info.packed else 0


def backend_of(services: Services) -> str | None:
    """What the trainer's broadcasts travel on; None if the server cannot receive any."""
    if not has_torch():
        return None
    return "gloo" if services.model.device == "cpu" else "nccl"


@router.get("/get_world_size", summary="The number of the server's ranks")
async def get_world_size(
    services: InjectedServices,
    include_dp: Annotated[bool, Query(description="False: the ranks of one engine.")] = True,
) -> Response:
    """`--dp-size` times `--tp-size`: a trainer's group has one rank more, its own."""
    services.require_loaded()
    total = num_ranks(services)
    return JSONResponse({"world_size": total if include_dp else total // services.state.client.num_engines})


@router.post("/init_weight_transfer_engine", summary="Join a trainer's group (vLLM's name)")
async def init_weight_transfer_engine(body: Annotated[InitEngine, Body()], services: InjectedServices) -> Response:
    """Like /init_weights_update_group; a group that an earlier trainer has left behind is replaced.

    On GPUs the server speaks vLLM's own communicator, over NCCL. On a CPU the group is one of PyTorch's over gloo,
    named `vllm`. An update that the earlier trainer began here is given up.
    """
    services.require_loaded()
    engine, info = services.transfer_engine, body.init_info
    await services.weights.groups.destroy(GROUP)
    if engine.bracket_id is not None:
        services.weights.abort_if_open(engine.bracket_id)
    engine.bracket_id, engine.piece_bytes = None, piece_bytes(info, default=0)
    group = InitGroup(
        master_address=info.master_address,
        master_port=info.master_port,
        rank_offset=info.rank_offset,
        world_size=info.world_size,
        group_name=GROUP,
        backend="gloo",
        timeout=body.timeout,
    )
    return await server_joins(group, services, backend=VLLM if backend_of(services) == "nccl" else None)


@router.post("/start_weight_update", summary="Begin an update (vLLM's name)")
async def start_weight_update(
    services: InjectedServices, body: Annotated[StartUpdate | None, Body()] = None
) -> Response:
    """Like /begin_weight_update: what follows becomes visible with /finish_weight_update, or not at all."""
    asked = body or StartUpdate()
    answer = await begin_weight_update(services, BeginUpdate(timeout=asked.timeout))
    if answer.status_code == 200:
        services.transfer_engine.bracket_id = services.weights.open_id
    return answer


@router.post("/update_weights", summary="Tensors that a trainer broadcasts (vLLM's name)")
async def update_weights(
    body: Annotated[UpdateWeightsCall, Body()], request: Request, services: InjectedServices
) -> Response:
    """Like /update_weights_from_distributed, in the group of /init_weight_transfer_engine."""
    info = body.update_info
    if not len(info.tensor_names) == len(info.dtype_names) == len(info.shapes) or not info.tensor_names:
        error = bad_request("update_info", "names, dtype_names and shapes must have the same length, at least 1")
        return refusal(error)
    bucket = WeightsFromDistributed(
        names=info.tensor_names, dtypes=info.dtype_names, shapes=info.shapes, group_name=GROUP, timeout=body.timeout
    )
    size = piece_bytes(info, default=services.transfer_engine.piece_bytes)
    return await receive_broadcast(bucket, request, services, piece_bytes=size)


@router.post("/finish_weight_update", summary="Put an update in place (vLLM's name)")
async def finish_weight_update(
    request: Request, services: InjectedServices, body: Annotated[FinishUpdate | None, Body()] = None
) -> Response:
    """Like /end_weight_update: all tensors since /start_weight_update become visible in one swap."""
    asked = body or FinishUpdate()
    end = EndUpdate(weight_version=asked.weight_version, timeout=asked.timeout)
    return await end_weight_update(request, services, end)
