"""vLLM's routes for memory between bursts of work: `/sleep` releases it, `/wake_up` resumes it."""

import asyncio
from typing import Annotated, Literal

from fastapi import Query, Request
from starlette.responses import JSONResponse, Response

from headwater.client.engine_client import new_call_id
from headwater.generation.errors import bad_request
from headwater.http_api.auth import control_router
from headwater.http_api.control.memory_routes import (
    TagsQuery,
    Timeout,
    release_memory_occupation,
    resume_memory_occupation,
)
from headwater.http_api.control.query_types import SECONDS
from headwater.http_api.control.schemas_control import MemoryTags
from headwater.http_api.engine_answers import EngineAnswers
from headwater.http_api.services import InjectedServices, Services
from headwater.messages.generation import Abort
from headwater.messages.state import EngineState

ABORT_TIMEOUT_S = 10.0  # requests that were aborted end with the step under way
WAIT_TIMEOUT_S = 600.0
LEVELS = (1, 2)

router = control_router("memory")
Level = Annotated[int, Query(description="1 or 2; they are the same here.")]
Mode = Annotated[Literal["abort", "wait"], Query(description="`abort` ends running requests, `wait` lets them end.")]
SleepTimeout = Annotated[
    str | None, SECONDS, Query(description="Seconds until nothing may run any more; default 10, with `wait` 600.")
]


@router.post("/sleep", summary="Release all memory (vLLM's name)")
async def sleep(
    request: Request,
    services: InjectedServices,
    level: Level = 1,
    mode: Mode = "abort",
    timeout: SleepTimeout = None,
) -> Response:
    """Like /release_memory_occupation with both tags, after requests were ended or waited for.

    Requests that arrive meanwhile wait for /wake_up. The weights come back at either level: from their files, or from
    host memory with `--keep-weights-on-host`.
    """
    if level not in LEVELS:
        raise bad_request("level", f"level: must be 1 or 2, got {level}; /pause_generation keeps all memory")
    services.require_loaded()
    default_s = WAIT_TIMEOUT_S if mode == "wait" else ABORT_TIMEOUT_S
    timeout_s = services.control_timeout_s(timeout, default_s=default_s)
    release = release_memory_occupation(request, services, MemoryTags(timeout=timeout_s))
    if mode == "wait":
        return await release
    releasing = asyncio.ensure_future(release)  # first, so that no request starts behind the abort
    try:
        await asyncio.sleep(0)
        await _abort_all(services)
        return await releasing
    finally:
        releasing.cancel()


@router.post("/wake_up", summary="Take memory again (vLLM's name)")
async def wake_up(
    request: Request, services: InjectedServices, tags: TagsQuery = None, timeout: Timeout = None
) -> Response:
    """Like /resume_memory_occupation: `tags` names `weights` or `kv_cache`; left out, both."""
    return await resume_memory_occupation(request, services, None, tags, timeout)


@router.get("/is_sleeping", summary="Whether memory is released (vLLM's name)")
async def is_sleeping(services: InjectedServices) -> Response:
    """True while any memory is released."""
    services.require_loaded()
    answers = EngineAnswers(await services.engine_states())
    states: list[EngineState] = [state for _, state in answers.some_or_raise()]
    return JSONResponse({"is_sleeping": any(state.released_memory for state in states)})


async def _abort_all(services: Services) -> None:
    message = Abort(call_id=new_call_id(), rid="", match="all", message="aborted by /sleep")
    (await services.ask_all(message)).all_or_raise()
