"""Routes for the weights: new ones from disk, their label, and a look at their values."""

import asyncio
import hashlib
from typing import Annotated, Any

from fastapi import Body, Query, Request
from starlette.responses import JSONResponse, Response

from headwater.client.engine_client import new_call_id
from headwater.generation.answer_fields import Json
from headwater.generation.errors import ApiError
from headwater.http_api.auth import control_router
from headwater.http_api.control.flush_answer import summed_pages
from headwater.http_api.control.schemas_control import CheckWeights, WeightsByName, WeightsFromDisk, WeightVersion
from headwater.http_api.engine_answers import EngineAnswers, facts_of
from headwater.http_api.services import InjectedServices, Services
from headwater.http_api.sse import while_connected
from headwater.messages.weights import (
    Checksums,
    GetChecksums,
    GetWeights,
    SetWeightVersion,
    UpdateWeights,
    Weights,
    WeightsUpdated,
)

DEFAULT_TIMEOUT_S = 600.0

router = control_router("weights")


@router.post("/update_weights_from_disk", summary="New weights while serving")
async def update_weights_from_disk(body: WeightsFromDisk, request: Request, services: InjectedServices) -> Response:
    """Load, check and swap in new weights, all or nothing, in one operation.

    Requests go on with the old weights while the new ones load. From the swap on no request can match KV of the
    old ones, flushed or not. Running requests go on with the new weights, and report it in `weights_versions`.
    """
    arrived_s = asyncio.get_running_loop().time()
    message = UpdateWeights(
        call_id=new_call_id(),
        path=body.model_path,
        load_format=body.load_format,
        weight_version=body.weight_version,
        abort_all_requests=body.abort_all_requests,
        timeout_s=services.control_timeout_s(body.timeout, default_s=DEFAULT_TIMEOUT_S),
    )
    services.require_loaded()
    call = services.change(message, arrived_s=arrived_s, timeout_s=message.timeout_s)
    return update_answer(await while_connected(call, request.receive), services)


@router.post("/update_weight_version", summary="A new label for the weights")
async def update_weight_version(body: WeightVersion, services: InjectedServices) -> Response:
    """The label alone: it never decides what matches, so the cache is not touched.

    Ends all requests, as SGLang does, except while they wait by order; `num_aborted` counts them.
    """
    arrived_s = asyncio.get_running_loop().time()
    services.require_loaded()
    message = SetWeightVersion(
        call_id=new_call_id(), weight_version=body.new_version, abort_all_requests=body.abort_all_requests
    )
    if services.weights.take_label(body.new_version, aborts_all=bool(body.abort_all_requests)):
        return JSONResponse(
            {
                "success": True,
                "message": f"Weight version {body.new_version} comes with /end_weight_update",
                "new_version": body.new_version,
                "num_aborted": 0,
            }
        )
    answers = await services.change(message, arrived_s=arrived_s)
    error = answers.error()
    if error is not None:
        return refusal(error, new_version=body.new_version)
    services.state.set_weight_version(body.new_version)
    text = f"Weight version updated to {body.new_version}"
    return JSONResponse(
        {
            "success": True,
            "message": text,
            "new_version": body.new_version,
            "num_aborted": sum(answer.num_aborted for _, answer in answers.succeeded),
            "engines": answers.entries(lambda answer: {"num_aborted": answer.num_aborted}),
        },
        answers.status,
    )


@router.get("/get_weights_by_name", summary="The first values of a parameter")
async def get_weights_by_name(query: Annotated[WeightsByName, Query()], services: InjectedServices) -> Response:
    """By its Hugging Face name; with several engines each one's values are in `engines`."""
    return await _weights(query, services)


@router.post("/get_weights_by_name", summary="The first values of a parameter")
async def post_weights_by_name(body: Annotated[WeightsByName, Body()], services: InjectedServices) -> Response:
    """The same with a body."""
    return await _weights(body, services)


@router.get("/weights_checker", summary="Hashes of the tensors in place")
async def weights_checker(
    query: Annotated[CheckWeights, Query()], request: Request, services: InjectedServices
) -> Response:
    """A hash of every tensor as the engines compute with it, in SGLang's form. Requests go on meanwhile.

    Engines with the same weights have the same hashes, if they have the same device and `--tp-size`.
    """
    return await _checksums(query, request, services)


@router.post("/weights_checker", summary="Hashes of the tensors in place")
async def post_weights_checker(
    services: InjectedServices, request: Request, body: Annotated[CheckWeights | None, Body()] = None
) -> Response:
    """The same with a body."""
    return await _checksums(body or CheckWeights(), request, services)


async def _checksums(asked: CheckWeights, request: Request, services: Services) -> Response:
    services.require_loaded()
    timeout_s = services.control_timeout_s(asked.timeout, default_s=DEFAULT_TIMEOUT_S)
    message = GetChecksums(call_id=new_call_id(), timeout_s=timeout_s)
    call = services.state.client.call_all(message, timeout_s=timeout_s + 1.0)
    answers = EngineAnswers(await while_connected(call, request.receive))
    error = answers.error()
    if error is not None:
        return refusal(error)
    ranks = [_rank_checksums(rank, found) for rank, found in answers.succeeded]
    return JSONResponse(
        {
            "success": True,
            "message": f"{len(ranks[0]['checksums'])} tensors of {len(ranks)} engines were hashed.",
            "ranks": ranks,
            "per_engine_checksum": ranks[0]["per_gpu_checksum"],
            "are_equal": len({rank["per_gpu_checksum"] for rank in ranks}) == 1,
            "weights_id": answers.results[0].weights_id,
        }
    )


def _rank_checksums(rank: int, found: Checksums) -> Json:
    lines = "\n".join(f"{name} {value}" for name, value in sorted(found.checksums.items()))
    overall = hashlib.blake2b(lines.encode(), digest_size=8).hexdigest()
    return {"checksums": found.checksums, "per_gpu_checksum": overall, "parallelism_info": {"dp_rank": rank}}


async def _weights(asked: WeightsByName, services: Services) -> Response:
    services.require_loaded()
    message = GetWeights(call_id=new_call_id(), name=asked.name, num_values=asked.truncate_size)
    answers = await services.ask_all(message)
    first: Weights = answers.all_or_raise()[0]
    facts = facts_of(first, without=("call_id",))
    return JSONResponse(facts | {"engines": answers.entries(lambda weights: {"values": list(weights.values)})})


def update_answer(answers: EngineAnswers, services: Services) -> Response:
    """What the engines made of an update."""
    for _, updated in answers.succeeded:
        services.state.client.forget_prefixes()
        services.state.set_weight_version(updated.weight_version)
    error = answers.error(_update_facts)
    if error is not None:
        return refusal(error, num_paused_requests=0)
    if not answers.results:
        text = "The update is decided; no engine has confirmed it yet, and none takes requests until it has."
        facts: Json = {"success": True, "message": text, "num_paused_requests": 0}
        return JSONResponse(facts | {"engines": answers.entries()}, answers.status)
    return JSONResponse(_updated(answers.results, answers.entries(_update_facts)), answers.status)


def _updated(results: list[WeightsUpdated], entries: list[Json]) -> Json:
    """SGLang's three keys, then ours. `num_paused_requests`: held for the moment of the swap."""
    first = results[0]
    return {
        "success": True,
        "message": first.message,
        "num_paused_requests": sum(result.num_kept for result in results),
        "weights_id": first.weights_id,
        "weight_version": first.weight_version,
        "generation": max(result.generation for result in results),
        "num_tensors": first.num_tensors,
        "num_kept": sum(result.num_kept for result in results),
        "num_aborted": sum(result.num_aborted for result in results),
        "waited_s": max(result.waited_s for result in results),
        "paused_s": max(result.paused_s for result in results),
        "freed": summed_pages(result.freed for result in results),
        "retired": summed_pages(result.retired for result in results),
        "engines": entries,
    }


def _update_facts(result: WeightsUpdated) -> Json:
    return facts_of(result, without=("call_id",))


def refusal(error: ApiError, **keys: Any) -> Response:
    """The keys of a success, so that clients which read them find them, beside the error itself."""
    status = error.status if error.status in (413, 500, 501, 503, 504) else 400
    body = {"success": False, "message": error.message} | keys | error.body()
    return JSONResponse(body, status, headers=error.headers)
