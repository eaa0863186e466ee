"""The arguments of a server under Ray Serve LLM, and what Ray's router by cache events learns of it. No Ray here."""

from types import SimpleNamespace
from typing import Any

import pytest

from headwater.ray.llm_config import routing_stats, server_args

BY_RAY = {
    "enable_kv_cache_events": True,
    "publisher": "zmq",
    "endpoint": "tcp://*:5557",
    "replay_endpoint": "tcp://*:6557",
}  # what `configure_kv_events_for_kv_routing` adds to a model's engine_kwargs


def config(**engine_kwargs: Any) -> Any:
    loading = SimpleNamespace(model_id="named", model_source="folder")
    return SimpleNamespace(model_loading_config=loading, engine_kwargs=engine_kwargs)


def test_arguments_are_those_of_serve() -> None:
    args = server_args(config(**{"max-total-tokens": "8192"}))
    assert (args.model, args.served_model_name, args.max_total_tokens) == ("folder", "named", 8192)
    with pytest.raises(ValueError, match="'tensor_parallel_size'"):
        server_args(config(tensor_parallel_size=2))


def test_rays_configuration_of_events_is_that_of_the_server() -> None:
    args = server_args(config(kv_events_config=BY_RAY))
    assert (args.kv_events_endpoint, args.kv_events_replay_endpoint) == ("tcp://*:5557", "tcp://*:6557")
    own = server_args(config(kv_events_config=BY_RAY, kv_events_endpoint="tcp://*:1"))
    assert own.kv_events_endpoint == "tcp://*:1"
    for off in ({"enable_kv_cache_events": False}, {"publisher": "null"}):
        assert server_args(config(kv_events_config=BY_RAY | off)).kv_events_endpoint is None
    with pytest.raises(ValueError, match="kv_events_config: 'hwm'"):
        server_args(config(kv_events_config=BY_RAY | {"hwm": 3}))


def test_a_replica_says_where_its_events_are_as_others_reach_them() -> None:
    source = {"data_parallel_rank": 0, "endpoint": "tcp://*:7", "replay_endpoint": "tcp://*:8", "topic": ""}
    info = {"chunked_prefill_size": 512, "internal_states": [{"page_size": 16}]}
    assert routing_stats([source], info, host="10.0.0.9")["kv_event_metadata"] == {
        "endpoint": "tcp://10.0.0.9:7",
        "replay_endpoint": "tcp://10.0.0.9:8",
        "block_size": 16,
        "max_num_batched_tokens": 512,
        "dp_rank": 0,
    }
    without_replay = routing_stats([source | {"replay_endpoint": None}], info, host="h")
    assert without_replay["kv_event_metadata"]["replay_endpoint"] is None
