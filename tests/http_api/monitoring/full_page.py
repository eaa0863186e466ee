"""A page /metrics with every family that there is, and the tool that checks metrics, rules and queries."""

import os
import shutil

import msgspec
import pytest
from api_under_test import api
from prometheus_client.parser import text_string_to_metric_families

from engine_driver import Driver
from headwater.messages.cache import GetStorage
from headwater.messages.control import FlushCache, GetOperations, OperationInfo, OperationList
from headwater.messages.generation import Finish
from headwater.messages.state import EngineState, GetState
from headwater.storage.memory import MemoryBackend
from scripted_engine import ScriptedEngine


def promtool() -> str:
    """The path of Prometheus's checker. Skips the test if there is none; an error in CI."""
    found = shutil.which("promtool")
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI needs promtool: apt-get install prometheus")
        pytest.skip("promtool is not installed: apt-get install prometheus")
    return found


def state_of_an_engine_that_did_everything() -> tuple[EngineState, object]:
    """As a real engine with three tiers and speculation reports itself, and its store."""
    driver = Driver(num_pages=24, num_host_pages=40, drafts="fake", backend=MemoryBackend(capacity_bytes=1 << 20))
    prompts = [[number * 50 + place for place in range(40)] for number in range(6)]
    for lap in range(2):
        for number, prompt in enumerate(prompts):
            driver.finish(driver.generate(f"{lap}-{number}", prompt, 2))
            driver.settle()
    driver.generate("running", [1] * 10, 50)
    driver.turn(4)
    driver.send(FlushCache(call_id="busy"))
    driver.turn()
    driver.send(FlushCache(call_id="f", mode="now"))
    for message in (GetState(call_id="state"), GetStorage(call_id="store")):
        driver.send(message)
    driver.turn(2)
    return driver.replies["state"], driver.replies["store"]  # type: ignore[return-value]


async def full_page(engine: ScriptedEngine) -> str:
    """The page with every family that there is."""
    state, store = state_of_an_engine_that_did_everything()
    drops = {"dropped_tokens_prefetch_miss": 16.0}
    full = msgspec.structs.replace(state, memory_bytes={"kv_cache": 1}, counters=state.counters | drops)
    info = OperationInfo(
        operation_id="1", kind="flush_cache", phase="waiting", waited_s=0.0, remaining_s=1.0, blockers={}
    )
    engine.script.answers |= {
        GetState: lambda message: msgspec.structs.replace(full, call_id=message.call_id),
        GetStorage: lambda message: msgspec.structs.replace(store, call_id=message.call_id),
        GetOperations: lambda message: OperationList(call_id=message.call_id, items=(info,)),
    }
    async with api(engine) as server:
        answer = await server.post("/generate", {"text": "abc", "sampling_params": {"max_new_tokens": 2}})
        assert answer.status_code == 200
        engine.script.refusal = Finish(type="abort", status=400, message="no")
        assert (await server.post("/generate", {"text": "abc"})).status_code == 400
        return (await server.http.get("/metrics")).text


def exported(page: str) -> set[str]:
    found = set()
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found.add(family.name if family.type == "histogram" else sample.name)
    return found
