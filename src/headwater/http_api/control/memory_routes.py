"""Routes that release memory between bursts of work and take it again."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Body, Query, Request
from starlette.responses import JSONResponse, Response

from headwater.client.engine_client import new_call_id
from headwater.generation.answer_fields import Json
from headwater.http_api.auth import control_router
from headwater.http_api.control.query_types import SECONDS
from headwater.http_api.control.schemas_control import MemoryTags, ResumeTags
from headwater.http_api.engine_answers import EngineAnswers, facts_of
from headwater.http_api.services import InjectedServices, Services
from headwater.http_api.sse import while_connected
from headwater.messages.state import EngineState
from headwater.messages.weights import MemoryResult, ReleaseMemory, ResumeMemory

RESUME_TIMEOUT_S = 600.0  # weights are read from their files again
NOTHING_TO_RELEASE = "cuda_graph"  # SGLang's third tag

router = control_router("memory")
Tags = Annotated[MemoryTags | None, Body()]
Resumed = Annotated[ResumeTags | None, Body()]
Timeout = Annotated[str | None, SECONDS, Query(description="Seconds to wait.")]
TagsQuery = Annotated[list[str] | None, Query(alias="tags")]


@router.get("/release_memory_occupation", operation_id="release_memory_occupation_get")
@router.post("/release_memory_occupation", summary="Give memory back")
async def release_memory_occupation(
    request: Request, services: InjectedServices, body: Tags = None, tags: TagsQuery = None, timeout: Timeout = None
) -> Response:
    """Release the memory of the KV cache, the weights, or both; requests queue until it is resumed.

    Waits up to `timeout` seconds (default 0) until nothing runs, letting nothing new start. Not idle by then:
    400 with the blockers, and nothing was released. Releasing what is released is harmless.
    """
    asked = _asked(body, tags, timeout)
    timeout_s = services.control_timeout_s(asked.timeout, default_s=0.0)
    message = ReleaseMemory(call_id=new_call_id(), tags=_known_tags(asked), timeout_s=timeout_s)
    return await _carry_out(message, asked, request, services)


@router.get("/resume_memory_occupation", operation_id="resume_memory_occupation_get")
@router.post("/resume_memory_occupation", summary="Take memory again")
async def resume_memory_occupation(
    request: Request,
    services: InjectedServices,
    body: Resumed = None,
    tags: TagsQuery = None,
    timeout: Timeout = None,
) -> Response:
    """Take released memory again (weights are read from their files) and run what has queued meanwhile.

    Files that hold other weights by now are a 409 that names both, unless `accept_changed_weights`; then they are
    served under their own `weights_id`, and the label becomes empty. Resuming what is not released is harmless.
    """
    asked = _asked(body, tags, timeout)
    timeout_s = services.control_timeout_s(asked.timeout, default_s=RESUME_TIMEOUT_S)
    message = ResumeMemory(
        call_id=new_call_id(),
        tags=_known_tags(asked),
        timeout_s=timeout_s,
        accept_changed_weights=body is not None and body.accept_changed_weights,
    )
    return await _carry_out(message, asked, request, services)


async def _carry_out(
    message: ReleaseMemory | ResumeMemory, asked: MemoryTags, request: Request, services: Services
) -> Response:
    arrived_s = asyncio.get_running_loop().time()
    services.require_loaded()
    if asked.tags and not _known_tags(asked):  # no tags at all would mean every one
        states = EngineAnswers(await services.engine_states())
        states.all_or_raise(_released_now)
        return JSONResponse(_summary(states, _released_now))
    has_timeout = asked.timeout is not None or message.timeout_s > 0
    call = services.change(message, arrived_s=arrived_s, timeout_s=message.timeout_s if has_timeout else None)
    answers = await while_connected(call, request.receive)
    if answers.succeeded:
        services.state.client.forget_prefixes()
        if isinstance(message, ReleaseMemory):
            services.weights.free_spare()
    answers.all_or_raise(_memory_facts)
    return JSONResponse(_summary(answers, _memory_facts) | _weights_now(answers, services), answers.status)


def _weights_now(answers: EngineAnswers, services: Services) -> Json:
    """Which weights a resume has put in place. The label of other weights is forgotten here as well."""
    resumed = [result for _, result in answers.succeeded if result.weights_id]
    if not resumed:
        return {}
    if any(result.has_changed_weights for result in resumed):
        services.state.set_weight_version(resumed[0].weight_version)
    return {
        "weights_id": resumed[0].weights_id,
        "weight_version": resumed[0].weight_version,
        "has_changed_weights": any(result.has_changed_weights for result in resumed),
    }


def _asked(body: MemoryTags | None, tags: list[str] | None, timeout: str | None) -> MemoryTags:
    """The body, completed by the query (`tags=a&tags=b` or `tags=a,b`)."""
    body = body or MemoryTags()
    queried = tuple(tag for part in tags or () for tag in part.split(",") if tag)
    return MemoryTags(
        tags=body.tags or queried,
        timeout=timeout if body.timeout is None else body.timeout,
    )


def _known_tags(asked: MemoryTags) -> tuple[str, ...]:
    return tuple(tag for tag in asked.tags if tag != NOTHING_TO_RELEASE)


def _summary(answers: EngineAnswers, describe: Callable[[Any], Json]) -> Json:
    facts = [describe(result) for result in answers.results]
    return {
        "success": True,
        "released": facts[0]["released"] if facts else [],
        "num_bytes": sum(each["num_bytes"] for each in facts),
        "waited_s": max((each["waited_s"] for each in facts), default=0.0),
        "engines": answers.entries(describe),
    }


def _memory_facts(result: MemoryResult) -> Json:
    of_weights = () if result.weights_id else ("weights_id", "weight_version", "has_changed_weights")
    return facts_of(result, without=("call_id", *of_weights))


def _released_now(state: EngineState) -> Json:
    return {"released": list(state.released_memory), "num_bytes": 0, "waited_s": 0.0}
