"""The page /metrics of an engine with tiers."""

import msgspec
import pytest
from api_under_test import api
from prometheus_client.parser import text_string_to_metric_families

from headwater.messages.cache import GetStorage, StorageInfo, StoreTrouble
from headwater.messages.state import EngineState, GetState, TierState
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio
COMMON_LABELS = ("model_name", "dp_rank")
COUNTERS = {
    "prompt_tokens": 100.0, "cached_tokens_host": 32.0,
    "offload_tokens": 64.0, "offload_bytes": 6400.0, "offload_seconds": 0.5, "restore_tokens": 32.0,
    "restore_bytes": 3200.0, "restore_seconds": 0.25, "prefetch_tokens": 16.0, "prefetch_bytes": 1600.0,
    "prefetch_seconds": 1.0, "dropped_tokens_host_full": 48.0, "dropped_tokens_queue_full": 16.0,
    "dropped_tokens_prefetch_corrupt": 16.0, "dropped_tokens_retired": 80.0, "tier_event_storage_lookup_timeout": 3.0,
}  # fmt: skip
TROUBLE = StoreTrouble(
    is_left_alone=True, failing=(), cause="timeout", details="", failing_s=9, retry_in_s=0
)  # fmt: skip


@pytest.fixture
def tiered(engine: ScriptedEngine) -> ScriptedEngine:
    host = TierState(
        capacity=100, free=90, tree=10, private=0, retired=0, transfer=0, evictable=10, page_bytes=1024
    )  # fmt: skip

    def state(message: GetState) -> EngineState:
        plain = engine._state(message.call_id)
        return msgspec.structs.replace(
            plain, tiers=plain.tiers | {"host": host}, counters=COUNTERS, blockers={"persist": 3}
        )

    engine.script.answers[GetState] = state
    engine.script.answers[GetStorage] = lambda message: StorageInfo(
        call_id=message.call_id,
        kind="redis",
        breaker="half_open",
        num_pages=5,
        counters={"read_corrupt": 2},
        trouble=TROUBLE,
    )
    return engine


async def samples(engine: ScriptedEngine) -> dict[str, float]:
    """Value by name and labels, without those that every sample has."""
    async with api(engine) as server:
        text = (await server.http.get("/metrics")).text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = [f'{key}="{value}"' for key, value in sample.labels.items() if key not in COMMON_LABELS]
            found[sample.name + (f"{{{','.join(labels)}}}" if labels else "")] = sample.value
    return found


async def test_what_moved_and_what_is_moving(tiered: ScriptedEngine) -> None:
    found = await samples(tiered)
    assert found['headwater_transfer_bytes_total{kind="offload"}'] == 6400
    assert found['headwater_transfer_seconds_total{kind="restore"}'] == 0.25
    assert found['headwater_transfers_in_flight{kind="persist"}'] == 3
    assert found['headwater_transfers_in_flight{kind="restore"}'] == 0, "a series that comes and goes alarms nobody"
    assert found["sglang:load_back_tokens_total"] == 32 and found["sglang:hicache_backup_bytes_total"] == 6400
    assert found["sglang:prefetched_tokens_total"] == 16 and found["sglang:backuped_tokens_total"] == 0
    assert "headwater_offload_tokens_total" not in found, "told once, by label"
    assert found["headwater_cached_tokens_host_total"] == 32


async def test_what_was_dropped_by_cause(tiered: ScriptedEngine) -> None:
    found = await samples(tiered)
    assert found['headwater_dropped_tokens_total{cause="retired"}'] == 80
    assert found["sglang:hicache_backup_dropped_tokens_total"] == 48 + 16
    assert found['sglang:storage_prefetch_unfulfilled_tokens_total{reason="corrupt"}'] == 16


async def test_what_else_was_counted(tiered: ScriptedEngine) -> None:
    """Look-ups that failed were counted, and shown nowhere."""
    found = await samples(tiered)
    assert found['headwater_tier_events_total{event="storage_lookup_timeout"}'] == 3
    assert not any("tier_event_storage" in name for name in found), "told once, by label"


async def test_how_the_store_is(tiered: ScriptedEngine) -> None:
    found = await samples(tiered)
    states = [found[f'headwater_storage_breaker{{state="{name}"}}'] for name in ("closed", "open", "half_open")]
    assert states == [0, 0, 1]
    assert found["headwater_storage_failing"] == 1, "an alarm of `open` alone would miss it"
    assert found['headwater_storage_pages{storage_backend="redis"}'] == 5
    assert found['headwater_storage_events{event="read_corrupt"}'] == 2
    assert not any(name.startswith("headwater_storage_capacity_bytes") for name in found), "redis has no limit of ours"


async def test_an_engine_without_tiers_shows_none(engine: ScriptedEngine) -> None:
    engine.script.answers[GetStorage] = lambda message: StorageInfo(call_id=message.call_id)
    found = await samples(engine)
    assert found["headwater_storage_attached"] == 0
    assert not any("transfer_" in name or "load_back" in name for name in found)
