"""Routers find the addresses of the events by asking the server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from api_under_test import ENGINE_READY, api

from headwater.launch.config import ServerArgs
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio


@pytest.fixture
def other(tmp_path: Path) -> Iterator[ScriptedEngine]:
    with ScriptedEngine(f"ipc://{tmp_path}/other.sock", ready=ENGINE_READY) as other:
        yield other


async def test_each_engine_has_an_entry_in_a_list_and_by_rank(engine: ScriptedEngine, other: ScriptedEngine) -> None:
    args = ServerArgs(
        kv_events_endpoint="tcp://0.0.0.0:5557",
        kv_events_replay_endpoint="tcp://0.0.0.0:5600",
        kv_events_topic="kv@a@m",
    )
    async with api(engine, other, server_args=args.public()) as server:
        listed = (await server.http.get("/get_kv_event_sources")).json()
        by_rank = (await server.http.get("/kv_event_sources")).json()
    assert listed == [
        {
            "data_parallel_rank": rank, "endpoint": f"tcp://0.0.0.0:{5557 + rank}",
            "replay_endpoint": f"tcp://0.0.0.0:{5600 + rank}", "topic": "kv@a@m",
        }
        for rank in (0, 1)
    ]  # fmt: skip
    assert by_rank["1"] == {
        "enable_kv_cache_events": True, "publisher": "zmq", "endpoint": "tcp://0.0.0.0:5558",
        "replay_endpoint": "tcp://0.0.0.0:5601", "topic": "kv@a@m", "buffer_steps": 10_000,
    }  # fmt: skip


async def test_a_server_without_events_lists_none(engine: ScriptedEngine) -> None:
    async with api(engine, server_args=ServerArgs().public()) as server:
        assert (await server.http.get("/get_kv_event_sources")).json() == []
        assert (await server.http.get("/kv_event_sources")).json() == {}
