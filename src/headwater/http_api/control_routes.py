"""Routes that operate the engine: flush, pause, abort, and what is pending."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Depends, Query, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from headwater.client.engine_client import new_call_id
from headwater.client.errors import CallFailed
from headwater.http_api.errors import ApiError
from headwater.http_api.flush_answer import as_json, as_text, merged_status
from headwater.http_api.flush_request import flush_message, given_parameters
from headwater.http_api.schemas_native import AbortRequest, PauseRequest
from headwater.http_api.services import Services, services
from headwater.http_api.sse import while_connected
from headwater.messages import (
    Abort,
    CancelOperation,
    ContinueGeneration,
    FlushResult,
    GetOperations,
    PauseGeneration,
)

CALL_TIMEOUT_S = 30.0  # for calls the engine answers in its next turn

router = APIRouter(tags=["control"])
Given = Annotated[Services, Depends(services)]

FLUSH_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "Flushed.", "content": {"text/plain": {}, "application/json": {}}},
    202: {"description": "Nothing old can match any more, but not every page is back yet."},
    400: {"description": "Not idle within the timeout (nothing was flushed), or a bad parameter."},
    503: {"description": "The engine is gone."},
}


def _flush_query(
    timeout: Annotated[str | None, Query(description="Seconds to wait for the outcome; default 0.")] = None,
    mode: Annotated[
        Literal["idle", "now", "drain"] | str | None,
        Query(description="`idle`: at an idle moment. `now`: under load. `drain`: until all pages are back."),
    ] = None,
    tiers: Annotated[str | None, Query(description="Any of `device,host,storage`; default `device,host`.")] = None,
    cache_salt: Annotated[str | None, Query(description="Only namespaces with this salt.")] = None,
    extra_key: Annotated[str | None, Query(description="Only namespaces with this key.")] = None,
    prefix: Annotated[str | None, Query(description="Only what begins with this text.")] = None,
    prefix_ids: Annotated[str | None, Query(description="Only what begins with these token ids.")] = None,
    hold: Annotated[str | None, Query(description="With `idle`: let no new request start meanwhile.")] = None,
    dry_run: Annotated[str | None, Query(description="Tell what would be freed, change nothing.")] = None,
) -> None:
    """Declares the parameters for the documentation; `given_parameters` reads them."""


_flush = {
    "summary": "Retire cached KV",
    "responses": FLUSH_RESPONSES,
    "dependencies": [Depends(_flush_query)],
}


@router.get("/flush_cache", operation_id="flush_cache", **_flush)
@router.post("/flush_cache", operation_id="flush_cache_post", **_flush)
async def flush_cache(request: Request, given: Given) -> Response:
    """Make cached KV unmatchable and give its pages back.

    Parameters come in the query, or by the same names in a JSON body. A client that disconnects cancels its
    pending flush. The answer is text that begins as SGLang's, or JSON with `Accept: application/json`.
    """
    body = await request.body()
    parameters = given_parameters(request.query_params.multi_items(), body)
    message = await flush_message(parameters, given.generator, max_timeout_s=given.state.limits.max_control_timeout_s)
    limit_s = message.timeout_s + given.state.limits.health_timeout_s  # the engine keeps the deadline itself
    calls = given.state.client.call_all(message, timeout_s=limit_s)
    answers = await while_connected(calls, request.receive)
    results: list[FlushResult] = _all_or_raise(answers)
    status = merged_status(results)
    if "application/json" in request.headers.get("accept", ""):
        return JSONResponse(as_json(results), status)
    return PlainTextResponse(as_text(results), status)


@router.post("/reset_prefix_cache", summary="The same as /flush_cache (vLLM's name)", responses=FLUSH_RESPONSES)
async def reset_prefix_cache(request: Request, given: Given) -> Response:
    """See `/flush_cache`."""
    return await flush_cache(request, given)


@router.post("/pause_generation", summary="Pause generation")
async def pause_generation(
    given: Given, request: Request, body: Annotated[PauseRequest | None, Body()] = None
) -> Response:
    """Pause until `/continue_generation`; requests that arrive meanwhile wait."""
    mode = (body or PauseRequest()).mode
    message = PauseGeneration(call_id=new_call_id(), mode=mode)
    call = given.state.client.call_all(message, timeout_s=CALL_TIMEOUT_S)
    answers = _all_or_raise(await while_connected(call, request.receive))
    return JSONResponse(
        {
            "message": "Generation paused successfully.",
            "status": "ok",
            "num_requests": sum(answer.num_requests for answer in answers),
        }
    )


@router.post("/continue_generation", summary="End a pause")
async def continue_generation(given: Given) -> Response:
    """Go on with what a pause held. Harmless when nothing is paused."""
    call = ContinueGeneration(call_id=new_call_id())
    _all_or_raise(await given.state.client.call_all(call, timeout_s=CALL_TIMEOUT_S))
    return JSONResponse({"message": "Generation continued successfully.", "status": "ok"})


@router.post("/abort_request", summary="End running requests", response_class=Response)
async def abort_request(given: Given, body: Annotated[AbortRequest | None, Body()] = None) -> Response:
    """End every request whose `rid` begins with the given one, or all. Unknown names are no error."""
    asked = body or AbortRequest()
    if asked.rid or asked.abort_all:
        message = Abort(
            call_id=new_call_id(),
            rid=asked.rid,
            match="all" if asked.abort_all else "prefix",
            message=asked.abort_message,
        )
        _all_or_raise(await given.state.client.call_all(message, timeout_s=CALL_TIMEOUT_S))
    return Response(status_code=200)


@router.get("/control/operations", summary="Pending operations")
async def list_operations(given: Given) -> Response:
    """Flushes and pauses that wait for their moment: phase, age, time left and what blocks them."""
    answers = await given.state.client.call_all(GetOperations(call_id=new_call_id()), timeout_s=CALL_TIMEOUT_S)
    operations = [
        {
            "operation_id": item.operation_id,
            "kind": item.kind,
            "phase": item.phase,
            "waited_s": item.waited_s,
            "remaining_s": item.remaining_s,
            "blockers": item.blockers,
            "dp_rank": rank,
        }
        for rank, answer in enumerate(_all_or_raise(answers))
        for item in answer.items
    ]
    return JSONResponse({"operations": operations})


@router.delete("/control/operations/{operation_id}", summary="Cancel a pending operation")
async def cancel_operation(operation_id: str, given: Given) -> Response:
    """Its caller gets the answer that nothing was done; what has been applied stays applied."""
    message = CancelOperation(call_id=new_call_id(), operation_id=operation_id)
    answers = await given.state.client.call_all(message, timeout_s=CALL_TIMEOUT_S)
    if all(isinstance(answer, Exception) for answer in answers):  # known to no engine
        error = answers[0]
        if isinstance(error, CallFailed) and error.failed.status == 404:
            raise ApiError(404, error.failed.message, param="operation_id", code="not_found")
        raise error
    return JSONResponse({"operation_id": operation_id, "cancelled": True})


@router.get("/control/blockers", summary="What keeps the engine from being idle")
async def blockers(given: Given) -> Response:
    """Names and counts, empty when idle; the one definition of idleness that flushes wait for."""
    states = _all_or_raise(await given.engine_states())
    total: dict[str, int] = {}
    for state in states:
        for name, count in state.blockers.items():
            total[name] = total.get(name, 0) + count
    engines = [{"dp_rank": rank, "blockers": state.blockers} for rank, state in enumerate(states)]
    return JSONResponse({"is_idle": not total, "blockers": total, "engines": engines})


def _all_or_raise(answers: list[Any]) -> list[Any]:
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers
