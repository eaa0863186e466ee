"""The way of a fleet's messages to the engine of this replica: msgpack in, msgpack out, as on the engine's socket."""

import asyncio

import msgspec
from fastapi import Request
from starlette.responses import JSONResponse, Response

from headwater.generation.errors import ApiError
from headwater.http_api.auth import control_router
from headwater.http_api.services import InjectedServices, Services
from headwater.http_api.sse import while_connected
from headwater.messages.base import Call
from headwater.messages.state import Shutdown
from headwater.messages.wire import decode_to_engine, encode
from headwater.transports.staging import StagingFull

router = control_router("control")
STAGED = "/control/staged"
CLOCK_HEADER = "x-headwater-clock"  # CLOCK_MONOTONIC of this host when the answer was made


@router.post("/control/messages", include_in_schema=False)
async def relay_message(services: InjectedServices, request: Request) -> Response:
    """The engine's answer to one call. A fleet that disconnects cancels a call that is pending."""
    _require_replica(services)
    try:
        message = decode_to_engine(await request.body())
    except msgspec.MsgspecError as error:
        raise ApiError(400, f"the body is no message for an engine: {error}", code="invalid_message") from None
    if not isinstance(message, Call) or isinstance(message, Shutdown):
        raise ApiError(400, "only calls are taken, and no shutdown", code="invalid_message")
    answer = await while_connected(services.state.client.relay(message), request.receive)
    clock = repr(asyncio.get_running_loop().time())
    return Response(encode(answer), media_type="application/msgpack", headers={CLOCK_HEADER: clock})


@router.post(STAGED, include_in_schema=False)
async def take_piece(services: InjectedServices, request: Request) -> Response:
    """A piece of tensors that the front has received: `weights_id`, `bucket` and `offset` say which.

    `keep` names other weights that are still needed, separated by commas. The answer is the path for `UpdateWeights`.
    """
    _require_replica(services)
    query = request.query_params
    try:
        path = services.carried.write(
            query.get("weights_id", ""),
            bucket=query.get("bucket", ""),
            offset=int(query.get("offset", "")),
            data=await request.body(),
            keep=query.get("keep", "").split(","),
        )
    except StagingFull as error:
        raise ApiError(413, str(error), code="staging_full") from None
    except ValueError as error:
        raise ApiError(400, str(error), code="invalid_value") from None
    return JSONResponse({"path": path})


def _require_replica(services: Services) -> None:
    if not services.state.is_replica:
        raise ApiError(404, "this server is not a replica of a fleet (--fleet-replica)", code="not_found")
