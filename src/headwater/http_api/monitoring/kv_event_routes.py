"""Where the engines publish the events of their caches, for routers that subscribe to them."""

from fastapi import APIRouter

from headwater.generation.answer_fields import Json
from headwater.http_api.json_body import JsonRoute
from headwater.http_api.services import InjectedServices, Services
from headwater.kv_events import endpoint_of

router = APIRouter(route_class=JsonRoute, tags=["information"])


@router.get("/get_kv_event_sources", summary="Show where cache events are published")
async def get_kv_event_sources(services: InjectedServices) -> list[Json]:
    """The zmq address of each engine's events, as the engine listens on it. Empty without `--kv-events-endpoint`."""
    return [
        {"data_parallel_rank": rank} | {name: source[name] for name in ("endpoint", "replay_endpoint", "topic")}
        for rank, source in enumerate(_sources(services))
    ]


@router.get("/kv_event_sources", summary="Show where cache events are published, by rank")
async def kv_event_sources(services: InjectedServices) -> dict[str, Json]:
    """The same in the form of vLLM's route: settings by rank."""
    return {str(rank): source for rank, source in enumerate(_sources(services))}


def _sources(services: Services) -> list[Json]:
    args = services.state.server_args
    endpoint, replay = args.get("kv_events_endpoint"), args.get("kv_events_replay_endpoint")
    if endpoint is None:
        return []
    return [
        {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": endpoint_of(str(endpoint), rank),
            "replay_endpoint": None if replay is None else endpoint_of(str(replay), rank),
            "topic": args.get("kv_events_topic", ""),
            "buffer_steps": args.get("kv_events_kept"),
        }
        for rank in range(services.state.client.num_engines)
    ]
