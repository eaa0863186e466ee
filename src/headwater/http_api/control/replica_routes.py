"""The way of a fleet's messages to the engine of this replica: msgpack in, msgpack out, as on the engine's socket."""

import asyncio

import msgspec
from fastapi import Request
from starlette.responses import Response

from headwater.generation.errors import ApiError
from headwater.http_api.auth import control_router
from headwater.http_api.services import InjectedServices
from headwater.http_api.sse import while_connected
from headwater.messages.base import Call
from headwater.messages.state import Shutdown
from headwater.messages.wire import decode_to_engine, encode

router = control_router("control")
CLOCK_HEADER = "x-headwater-clock"  # CLOCK_MONOTONIC of this host when the answer was made


@router.post("/control/messages", include_in_schema=False)
async def relay_message(services: InjectedServices, request: Request) -> Response:
    """The engine's answer to one call. A fleet that disconnects cancels a call that is pending."""
    if not services.state.is_replica:
        raise ApiError(404, "this server is not a replica of a fleet (--fleet-replica)", code="not_found")
    try:
        message = decode_to_engine(await request.body())
    except msgspec.MsgspecError as error:
        raise ApiError(400, f"the body is no message for an engine: {error}", code="invalid_message") from None
    if not isinstance(message, Call) or isinstance(message, Shutdown):
        raise ApiError(400, "only calls are taken, and no shutdown", code="invalid_message")
    answer = await while_connected(services.state.client.relay(message), request.receive)
    clock = repr(asyncio.get_running_loop().time())
    return Response(encode(answer), media_type="application/msgpack", headers={CLOCK_HEADER: clock})
