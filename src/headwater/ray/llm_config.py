"""What Ray Serve LLM and a replica say to each other: the arguments of its server, and where its events are. No Ray."""

from typing import Any

import msgspec

from headwater.launch.config import FLAGS, ServerArgs

_EVENTS = "kv_events_config"
_EVENT_ARGS = {
    "endpoint": "kv_events_endpoint",
    "replay_endpoint": "kv_events_replay_endpoint",
    "topic": "kv_events_topic",
}
_EVENT_SWITCHES = ("enable_kv_cache_events", "publisher")


def server_args(llm_config: Any) -> ServerArgs:
    """The arguments of the server. ValueError that names one that `headwater serve` does not have."""
    loading = llm_config.model_loading_config
    given = {name.replace("-", "_"): value for name, value in llm_config.engine_kwargs.items()}
    given = _event_args(given.pop(_EVENTS, None) or {}) | given
    unknown = sorted(set(given) - set(FLAGS))
    if unknown:
        raise ValueError(f"engine_kwargs: `headwater serve` has no argument {unknown[0]!r}")
    named = {"model": loading.model_source or loading.model_id, "served_model_name": loading.model_id}
    return msgspec.convert(named | given, ServerArgs, strict=False)


def _event_args(config: dict[str, Any]) -> dict[str, Any]:
    """vLLM's `kv_events_config`, which Ray adds for its KV-aware router, as arguments of the server.

    The server takes a free port in place of the one that is named: all replicas get the same configuration.
    """
    named = {name: value for name, value in config.items() if name not in _EVENT_SWITCHES and value is not None}
    unknown = sorted(set(named) - set(_EVENT_ARGS))
    if unknown:
        raise ValueError(f"engine_kwargs: {_EVENTS}: {unknown[0]!r} is not supported")
    is_on = config.get("enable_kv_cache_events", False) and config.get("publisher", "zmq") == "zmq"
    return {_EVENT_ARGS[name]: value for name, value in named.items()} if is_on else {}


def routing_stats(sources: list[dict[str, Any]], info: dict[str, Any], *, host: str) -> dict[str, Any]:
    """What Ray's `KVTokenTracker` reads of a replica: addresses of its events on `host`, and the size of its blocks."""
    first = sources[0]  # it knows one engine in each replica
    endpoint, replay = (url and url.replace("*", host) for url in (first["endpoint"], first["replay_endpoint"]))
    metadata = {
        "endpoint": endpoint,
        "replay_endpoint": replay,
        "block_size": info["internal_states"][0]["page_size"],
        "max_num_batched_tokens": info["chunked_prefill_size"],
        "dp_rank": first["data_parallel_rank"],
    }
    return {"kv_event_metadata": metadata}
