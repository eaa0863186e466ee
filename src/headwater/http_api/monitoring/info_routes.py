"""Routes that report the state of the server: health, model, load, metrics."""

import asyncio
import re
import time
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Query
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, PlainTextResponse, Response

from headwater.client.change_call import by_engine
from headwater.client.engine_client import new_call_id
from headwater.generation.answer_fields import Json
from headwater.http_api.control.vllm.transfer_routes import backend_of
from headwater.http_api.control.weights.group_routes import num_ranks
from headwater.http_api.engine_answers import EngineAnswers, facts_of
from headwater.http_api.json_body import JsonRoute
from headwater.http_api.monitoring.engine_metrics import used_pages
from headwater.http_api.services import InjectedServices, Services
from headwater.messages.cache import GetStorage
from headwater.messages.control import GetOperations
from headwater.messages.state import ComputeFacts, EngineState
from headwater.version import version

SCRAPE_TIMEOUT_S = 2.0
GIB = 1 << 30
SECRET = re.compile(r"(^|_)(key|secret|password)(_|$)")

router = APIRouter(route_class=JsonRoute, tags=["information"])
PROBE_RESPONSES: dict[int | str, Json] = {200: {"description": "Yes"}, 503: {"description": "No"}}


@router.get("/health", summary="Check liveness", response_class=Response, responses=PROBE_RESPONSES)
async def health(services: InjectedServices) -> Response:
    """200 if an engine has loaded and its loop turns; 503 during start and shutdown, and if all engines are gone.

    The body is empty, or names the engines that take no requests, with the reasons.
    """
    status = 200 if await services.health.is_alive() else 503
    out = services.state.client.engines_out if services.state.model is not None else {}
    if not out:
        return Response(status_code=status)
    return JSONResponse({"engines_out": [{"dp_rank": rank, "message": why} for rank, why in out.items()]}, status)


@router.get("/health_generate", summary="Generate a token", response_class=Response, responses=PROBE_RESPONSES)
async def health_generate(services: InjectedServices) -> Response:
    """Like /health, and generates one token, unless requests are running.

    While an operation holds requests (a pause, released memory, a weight update), it returns 200 at once and names it.
    """
    health = await services.health.of_generation()
    if not health.is_well:
        return Response(status_code=503)
    if health.held_by:
        message = f"well, but not generating by order: {', '.join(health.held_by)}"
        return JSONResponse({"generating": False, "held_by": list(health.held_by), "message": message})
    return Response(status_code=200)


@router.get("/ping", summary="Like /health", include_in_schema=False)
async def ping(services: InjectedServices) -> Response:
    return Response(status_code=200 if await services.health.is_alive() else 503)


@router.get("/ready", summary="Check readiness", response_class=Response, responses=PROBE_RESPONSES)
async def ready(services: InjectedServices) -> Response:
    """200 if an engine has loaded and answers within 5 s, else 503."""
    return Response(status_code=200 if await services.health.is_ready() else 503)


@router.get("/model_info", summary="Show the model")
@router.get("/get_model_info", include_in_schema=False)
async def model_info(services: InjectedServices) -> Response:
    """Names, paths and architecture of the model, and the version of its weights."""
    model = services.model
    return JSONResponse(
        {
            "model_path": model.model_path,
            "served_model_name": model.served_name,
            "tokenizer_path": model.tokenizer_path,
            "is_generation": True,
            "preferred_sampling_params": None,
            "default_sampling_params": dict(model.sampling_defaults),
            "weight_version": await _weight_version(services),
            "load_format": model.load_format,
            "reasoning_parser": None,
            "tool_call_parser": None,
            "disaggregation_mode": "null",
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "model_type": model.model_type,
            "architectures": [model.architecture],
            "dtype": model.dtype,
            "device": model.device,
            "vocab_size": model.vocab_size,
            "max_model_len": model.max_context,
        }
    )


@router.get("/get_weight_version", summary="Show the label of the weights")
async def get_weight_version(services: InjectedServices) -> Response:
    """The label that a client gave the weights."""
    return JSONResponse({"weight_version": await _weight_version(services)})


@router.get("/server_info", summary="Show arguments and state")
@router.get("/get_server_info", include_in_schema=False)
async def server_info(
    services: InjectedServices,
    config_format: Annotated[
        Literal["json"] | None, Query(description="`json`: add `vllm_config`, where clients of vLLM look.")
    ] = None,
) -> Response:
    """The arguments in force, secrets masked, and a snapshot of each engine in `internal_states`."""
    model, state = services.model, services.state
    engines = EngineAnswers(await services.engine_states()).entries(_internal_state)
    arguments = {name: _masked(name, value) for name, value in state.server_args.items()}
    return JSONResponse(
        arguments
        | {
            "model_path": model.model_path,
            "served_model_name": model.served_name,
            "tokenizer_path": model.tokenizer_path,
            "max_total_num_tokens": model.num_pages * model.page_size,
            "max_model_len": model.max_context,
            "dp_size": state.client.num_engines,
            "status": "ready" if state.is_serving else "not ready",
            "startup_time": state.started_at_s,
            "version": version(),
            "compute": _compute(model.compute),
            "internal_states": engines,
        }
        | ({} if config_format is None else {"vllm_config": _vllm_config(services)})
    )


@router.get("/v1/loads", summary="Show the load of each engine")
async def loads(
    services: InjectedServices,
    include: Annotated[str, Query(description="Sections: core, memory, queues, disagg, all.")] = "all",
) -> Response:
    """Requests, tokens and throughput of each engine, for gateways."""
    sections = {section.strip() for section in include.split(",")}
    states = [(r, s) for r, s in by_engine(await services.engine_states()) if isinstance(s, EngineState)]
    entries = [_load(rank, state, sections) for rank, state in states]
    running, waiting = (sum(e[k] for e in entries) for k in ("num_running_reqs", "num_waiting_reqs"))
    count = max(1, len(entries))
    return JSONResponse(
        {
            "timestamp": time.time(),
            "version": version(),
            "dp_rank_count": len(entries),
            "loads": entries,
            "aggregate": {
                "total_running_reqs": running,
                "total_waiting_reqs": waiting,
                "total_reqs": running + waiting,
                "avg_token_usage": sum(e["token_usage"] for e in entries) / count,
                "avg_throughput": sum(e["gen_throughput"] for e in entries) / count,
                "avg_utilization": sum(e["utilization"] for e in entries) / count,
            },
        }
    )


@router.get("/get_load", summary="Show the load of each engine, briefly")
async def get_load(services: InjectedServices) -> Response:
    """SGLang's older form of /v1/loads."""
    states = [(r, s) for r, s in by_engine(await services.engine_states()) if isinstance(s, EngineState)]
    return JSONResponse(
        [
            {
                "dp_rank": rank,
                "num_reqs": state.num_running + state.num_waiting,
                "num_waiting_reqs": state.num_waiting,
                "num_tokens": _used_tokens(state),
            }
            for rank, state in states
        ]
    )


@router.get("/metrics", summary="Prometheus metrics", response_class=PlainTextResponse)
async def metrics(services: InjectedServices) -> Response:
    """Prometheus text. If an engine is gone, its `headwater_engine_up` is 0."""
    states, operations, storage = await asyncio.gather(
        services.engine_states(timeout_s=SCRAPE_TIMEOUT_S),
        services.state.client.call_all(GetOperations(call_id=new_call_id()), timeout_s=SCRAPE_TIMEOUT_S),
        services.state.client.call_all(GetStorage(call_id=new_call_id()), timeout_s=SCRAPE_TIMEOUT_S),
    )
    model_name = services.state.model.served_name if services.state.model else ""
    page = services.metrics.page(
        model_name, states, operations, storage, responses=services.responses, accounts=services.accounts.all
    )
    return Response(page, headers={"content-type": CONTENT_TYPE_LATEST})


async def _weight_version(services: Services) -> str:
    """The label as the engine reports it; if it does not answer, the label of the weights that it loaded first."""
    for state in await services.engine_states(timeout_s=SCRAPE_TIMEOUT_S):
        if isinstance(state, EngineState):
            return state.weight_version
    return services.model.weight_version


def _vllm_config(services: Services) -> Json:
    """The parts of vLLM's configuration that trainers read."""
    model, num_engines, backend = services.model, services.state.client.num_engines, backend_of(services)
    return {
        "model_config": {
            "model": model.model_path,
            "dtype": model.dtype,
            "max_model_len": model.max_context,
            "logprobs_mode": "raw_logprobs",  # before temperature and penalties
        },
        "parallel_config": {
            "tensor_parallel_size": num_ranks(services) // num_engines,
            "data_parallel_size": num_engines,
        },
        "weight_transfer_config": None if backend is None else {"backend": backend},
    }


def _compute(compute: ComputeFacts | None) -> Json | None:
    """How the first engine computes, measured at its start; null on a GPU."""
    if compute is None:
        return None
    return msgspec.structs.asdict(compute) | {"expected_tokens_per_s": round(compute.tokens_per_s, 1)}


def _masked(name: str, value: object) -> object:
    return "***" if isinstance(value, str) and SECRET.search(name) else value  # a limit per key is no secret


def _used_tokens(state: EngineState) -> int:
    device = state.tiers.get("device")
    return used_pages(device) * state.page_size if device else 0


def _internal_state(state: EngineState) -> Json:
    return {
        "last_gen_throughput": state.gen_throughput,
        "memory_usage": {name: num_bytes / GIB for name, num_bytes in state.memory_bytes.items()},
        "effective_max_running_requests_per_dp": state.max_running,
        "max_total_num_tokens": state.max_total_tokens,
        "num_running_reqs": state.num_running,
        "num_waiting_reqs": state.num_waiting,
        "paused": state.paused,
        "page_size": state.page_size,
        "weight_version": state.weight_version,
        "weights_id": state.weights_id,
        "cache_generation": state.generation,
        "released_memory": list(state.released_memory),
        "blockers": state.blockers,
        "uptime_s": state.uptime_s,
        "adapters": [facts_of(adapter) for adapter in state.adapters],
    } | _speculation(state)


def _speculation(state: EngineState) -> Json:
    """SGLang's name for the tokens of a request in a step that had a draft; nothing before the first draft."""
    num_steps = state.counters.get("spec_verify_steps", 0)
    return {"avg_spec_accept_length": 1 + state.counters["spec_accepted_tokens"] / num_steps} if num_steps else {}


def _load(rank: int, state: EngineState, sections: set[str]) -> Json:
    used = _used_tokens(state)
    entry: Json = {
        "dp_rank": rank,
        "timestamp": time.time(),
        "num_running_reqs": state.num_running,
        "num_waiting_reqs": state.num_waiting,
        "num_reqs": state.num_running + state.num_waiting,
        "num_used_tokens": used,
        "max_total_num_tokens": state.max_total_tokens,
        "token_usage": used / state.max_total_tokens if state.max_total_tokens else 0.0,
        "gen_throughput": state.gen_throughput,
        "utilization": state.num_running / state.max_running if state.max_running else 0.0,
        "max_running_requests": state.max_running,
    }
    if sections & {"memory", "all"}:
        entry["memory"] = {
            "weight_gb": state.memory_bytes.get("weights", 0) / GIB,
            "kv_cache_gb": state.memory_bytes.get("kv_cache", 0) / GIB,
            "graph_gb": 0.0,
            "token_capacity": state.max_total_tokens,
        }
    if sections & {"queues", "all"}:
        entry["queues"] = {
            "waiting": state.num_waiting,
            "grammar": 0,
            "paused": state.num_paused,
            "retracted": state.num_retracted,
        }
    if sections & {"disagg", "all"}:
        entry["disaggregation"] = {"mode": "null"}
    return entry
