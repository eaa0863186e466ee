"""Routes that operate the engines: pause, abort, and what is pending."""

import asyncio
from typing import Annotated

from fastapi import Body, Request
from starlette.responses import JSONResponse, Response

from headwater.client.engine_client import new_call_id
from headwater.generation.answer_fields import Json
from headwater.generation.errors import ApiError
from headwater.http_api.auth import control_router
from headwater.http_api.control.flush_answer import summed_counts
from headwater.http_api.control.schemas_control import AbortRequest, PauseRequest
from headwater.http_api.engine_answers import EngineAnswers, facts_of
from headwater.http_api.services import CALL_TIMEOUT_S, InjectedServices, Services
from headwater.http_api.sse import while_connected
from headwater.messages.control import (
    CancelOperation,
    ContinueGeneration,
    GetOperations,
    OperationList,
    PauseGeneration,
    PauseResult,
)
from headwater.messages.generation import Abort
from headwater.messages.state import EngineState

router = control_router("control")
WAITING_FOR_MEMORY = "waiting_for_memory"


@router.post("/pause_generation", summary="Pause generation")
async def pause_generation(
    services: InjectedServices, request: Request, body: Annotated[PauseRequest | None, Body()] = None
) -> Response:
    """Pause until `/continue_generation`; requests that arrive meanwhile wait.

    Answers when the step under way has ended: from then on nothing computes.
    """
    arrived_s = asyncio.get_running_loop().time()
    mode = (body or PauseRequest()).mode
    message = PauseGeneration(call_id=new_call_id(), mode=mode)
    answers = await while_connected(services.change(message, arrived_s=arrived_s), request.receive)
    answers.all_or_raise(_pause_facts)
    results: list[PauseResult] = answers.results
    return JSONResponse(
        {
            "message": "Generation paused successfully.",
            "status": "ok",
            "num_requests": sum(result.num_requests for result in results),
            "engines": answers.entries(_pause_facts),
        },
        answers.status,
    )


@router.post("/continue_generation", summary="End a pause")
async def continue_generation(services: InjectedServices) -> Response:
    """Run the requests that a pause held. Harmless when nothing is paused. A body is accepted and not read."""
    arrived_s = asyncio.get_running_loop().time()
    answers = await services.change(ContinueGeneration(call_id=new_call_id()), arrived_s=arrived_s)
    answers.all_or_raise()
    return JSONResponse(
        {"message": "Generation continued successfully.", "status": "ok", "engines": answers.entries()},
        answers.status,
    )


@router.post("/abort_request", summary="End running requests", response_class=Response)
async def abort_request(services: InjectedServices, body: Annotated[AbortRequest | None, Body()] = None) -> Response:
    """End every request whose `rid` begins with the given one, or all. Unknown names are no error."""
    asked = body or AbortRequest()
    if asked.rid or asked.abort_all:
        message = Abort(
            call_id=new_call_id(),
            rid=asked.rid,
            match="all" if asked.abort_all else "prefix",
            message=asked.abort_message,
        )
        (await services.ask_all(message)).all_or_raise()
    return Response(status_code=200)


@router.get("/control/operations", summary="Pending operations")
async def list_operations(services: InjectedServices) -> Response:
    """Flushes, pauses, weight updates and releases that wait for their moment.

    An operation runs on every engine; `engines` reports its phase, age, time left and blockers on each that it
    is still pending on. The engine that has waited longest stands for all. `waiting_for_memory`: requests
    that cannot begin before released memory is resumed, if there are any.
    """
    answers, states = await asyncio.gather(_operations(services), services.engine_states())
    missing = [entry for entry in answers.entries() if not entry["success"]]
    waiting = summed_counts(_waiting_for_memory(state) for state in states if isinstance(state, EngineState))
    facts = {"operations": _by_call(answers)} | waiting
    return JSONResponse(facts | ({"engines_missing": missing} if missing else {}))


@router.delete("/control/operations/{operation_id}", summary="Cancel a pending operation")
async def cancel_operation(operation_id: str, services: InjectedServices) -> Response:
    """On all engines. Its caller is answered that nothing was done; an effect already applied stays."""
    pending = await _operations(services)
    found = [op for op in _by_call(pending) if op["operation_id"] == operation_id]
    if not found:
        pending.all_or_raise()  # an engine that does not answer may have it
        message = f"no operation {operation_id!r} is pending"
        raise ApiError(404, message, param="operation_id", code="not_found")
    ranks = [engine["dp_rank"] for engine in found[0]["engines"]]
    calls = [
        services.state.client.call(
            CancelOperation(call_id=new_call_id(), operation_id=engine["engine_operation_id"]),
            engine=engine["dp_rank"],
            timeout_s=CALL_TIMEOUT_S,
        )
        for engine in found[0]["engines"]
    ]
    answers = EngineAnswers(await asyncio.gather(*calls, return_exceptions=True))
    answers.some_or_raise()  # an engine on which it has ended meanwhile has nothing to cancel
    entries = [entry | {"dp_rank": rank} for rank, entry in zip(ranks, answers.entries(), strict=True)]
    return JSONResponse({"operation_id": operation_id, "cancelled": True, "engines": entries})


@router.get("/control/blockers", summary="What keeps the engines from being idle")
async def blockers(services: InjectedServices) -> Response:
    """Names and counts, empty when idle; the one definition of idleness that flushes wait for.

    And `waiting_for_memory`: requests that cannot begin before released memory is resumed. No flush waits for those.
    """
    answers = EngineAnswers(await services.engine_states())
    states = answers.some_or_raise()
    total = summed_counts(_blockers_of(state) for _, state in states)
    return JSONResponse(
        {
            "is_idle": not total and not answers.errors,
            "blockers": total,
            "engines": answers.entries(lambda state: {"blockers": _blockers_of(state)}),
        }
    )


def _blockers_of(state: EngineState) -> dict[str, int]:
    return state.blockers | _waiting_for_memory(state)


def _waiting_for_memory(state: EngineState) -> dict[str, int]:
    is_waiting = state.released_memory and state.num_waiting
    return {WAITING_FOR_MEMORY: state.num_waiting} if is_waiting else {}


def _pause_facts(result: PauseResult) -> Json:
    return {"num_requests": result.num_requests}


async def _operations(services: Services) -> EngineAnswers:
    answers = await services.ask_all(GetOperations(call_id=new_call_id()))
    answers.some_or_raise()
    return answers


def _by_call(answers: EngineAnswers) -> list[Json]:
    """Pending operations, one entry for each call, whatever number of engines it went to."""
    operations: dict[str, Json] = {}
    for rank, answer in answers.succeeded:
        assert isinstance(answer, OperationList)
        for item in answer.items:
            facts = facts_of(item)
            call_id, engine_operation_id = facts.pop("call_id"), facts.pop("operation_id")
            name = call_id or f"{engine_operation_id}@{rank}"
            entry = operations.setdefault(name, {"operation_id": name} | facts | {"engines": []})
            entry["engines"].append({"dp_rank": rank, "engine_operation_id": engine_operation_id} | facts)
            if facts["waited_s"] > entry["waited_s"]:
                entry |= facts
    return list(operations.values())
