"""vLLM's `/collective_rpc`: the methods of its workers that have a meaning here, each as the route of its name."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Body, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from headwater.generation.errors import bad_request
from headwater.http_api.auth import control_router
from headwater.http_api.control.schemas_control import WeightsFromDisk, WeightVersion
from headwater.http_api.control.vllm import sleep_routes, transfer_routes
from headwater.http_api.control.vllm.schemas import FinishUpdate, InitEngine, Rpc, StartUpdate, UpdateWeightsCall
from headwater.http_api.control.weight_routes import update_weight_version, update_weights_from_disk
from headwater.http_api.control.weights.group_routes import num_ranks
from headwater.http_api.services import InjectedServices, Services

Arguments = dict[str, Any]
router = control_router("control")


@dataclass(frozen=True, slots=True)
class Method:
    """`parameters`: their names in the order of positions."""

    parameters: tuple[str, ...]
    call: Callable[[Arguments, Request, Services], Awaitable[Response]]


async def _init(given: Arguments, request: Request, services: Services) -> Response:
    return await transfer_routes.init_weight_transfer_engine(_checked(InitEngine, given), services)


async def _start(given: Arguments, request: Request, services: Services) -> Response:
    return await transfer_routes.start_weight_update(services, _checked(StartUpdate, given))


async def _update(given: Arguments, request: Request, services: Services) -> Response:
    return await transfer_routes.update_weights(_checked(UpdateWeightsCall, given), request, services)


async def _finish(given: Arguments, request: Request, services: Services) -> Response:
    return await transfer_routes.finish_weight_update(request, services, _checked(FinishUpdate, given))


async def _label(given: Arguments, request: Request, services: Services) -> Response:
    body = _checked(WeightVersion, {"new_version": given.get("weight_version"), "abort_all_requests": False})
    return await update_weight_version(body, services)


async def _reload(given: Arguments, request: Request, services: Services) -> Response:
    path = given.get("weights_path") or services.model.model_path
    body = _checked(WeightsFromDisk, {"model_path": path, "timeout": given.get("timeout")})
    return await update_weights_from_disk(body, request, services)


async def _sleep(given: Arguments, request: Request, services: Services) -> Response:
    level, timeout = given.get("level", 1), given.get("timeout")
    if type(level) is not int:
        raise bad_request("kwargs", "kwargs: level must be 1 or 2")
    return await sleep_routes.sleep(request, services, level, "abort", timeout)


async def _wake_up(given: Arguments, request: Request, services: Services) -> Response:
    tags = given.get("tags")
    if tags is not None and (not isinstance(tags, list) or any(not isinstance(tag, str) for tag in tags)):
        raise bad_request("kwargs", "kwargs: tags must be a list of names")
    return await sleep_routes.wake_up(request, services, tags, given.get("timeout"))


METHODS = {
    "init_weight_transfer_engine": Method(("init_info",), _init),
    "start_weight_update": Method(("is_checkpoint_format",), _start),
    "update_weights": Method(("update_info",), _update),
    "finish_weight_update": Method(("weight_version",), _finish),
    "update_weight_version": Method(("weight_version",), _label),
    "reload_weights": Method(("weights_path",), _reload),
    "sleep": Method(("level",), _sleep),
    "wake_up": Method(("tags",), _wake_up),
}


@router.post("/collective_rpc", summary="A method of vLLM's workers")
async def collective_rpc(body: Annotated[Rpc, Body()], request: Request, services: InjectedServices) -> Response:
    """Carried out once for the whole server, all or nothing. Methods that have no meaning here are a 400."""
    method = METHODS.get(body.method)
    if method is None:
        raise bad_request("method", f"method: must be one of {', '.join(METHODS)}, got {body.method[:100]!r}")
    services.require_loaded()
    answer = await method.call(_arguments(body, method), request, services)
    if answer.status_code >= 300:
        return answer
    return JSONResponse({"results": [None] * num_ranks(services)}, answer.status_code)


def _arguments(body: Rpc, method: Method) -> Arguments:
    """By name. InvalidRequest for one that the method does not have."""
    known = method.parameters
    if len(body.args) > len(known):
        raise bad_request("args", f"args: {body.method} takes {len(known)}, got {len(body.args)}")
    given = dict(zip(known, body.args, strict=False))
    for name, value in body.kwargs.items():
        if name not in known or name in given:
            text = "given twice" if name in given else f"not known; {body.method} takes {', '.join(known)}"
            raise bad_request("kwargs", f"kwargs: {name[:100]}: {text}")
        given[name] = value
    return given | ({} if body.timeout is None else {"timeout": body.timeout})


def _checked(body: type[BaseModel], given: Arguments) -> Any:
    """ValidationError is a 400 that names the field."""
    return body.model_validate(given)
