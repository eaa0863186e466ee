"""docs/metrics.md and /metrics name the same metrics: one that is not documented is not found, and one that is
documented and not there breaks somebody's dashboard."""

import re
from pathlib import Path

import msgspec
import pytest
from api_under_test import api
from prometheus_client.parser import text_string_to_metric_families

from engine_driver import Driver
from headwater.messages.cache import GetStorage
from headwater.messages.control import FlushCache, GetOperations, OperationInfo, Operations
from headwater.messages.generation import Finish
from headwater.messages.state import EngineState, GetState
from headwater.simulation.scripted_engine import ScriptedEngine
from headwater.storage.memory import MemoryBackend

pytestmark = pytest.mark.anyio
PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def documented() -> set[str]:
    """Names in the first column of the tables: alternatives `{a,b}` in the middle are meant, labels at the end not."""
    found: set[str] = set()
    for line in PAGE.read_text().splitlines():
        cells = line.split("|")
        if len(cells) < 5 or ":" not in cells[1]:
            continue
        prefix = ""
        for name in re.findall(r"`([^`]+)`", cells[1]):
            name = re.sub(r"\{[^{}]*\}$", "", name)
            prefix, name = name.split(":") if ":" in name else (prefix, name)
            options = re.search(r"\{([^{}]*)\}", name)
            parts = options[1].split(",") if options else [""]
            if "<name>" in name:
                parts, options = re.findall(r"`([^`]+)`", cells[3]), re.search("<name>", name)
            found |= {f"{prefix}:{name.replace(options[0], part) if options else name}" for part in parts}
    return found


def state_of_an_engine_that_did_everything() -> tuple[EngineState, object]:
    """As a real engine with three tiers reports itself, and its store."""
    driver = Driver(num_pages=24, num_host_pages=40, backend=MemoryBackend(capacity_bytes=1 << 20))
    prompts = [[number * 50 + place for place in range(40)] for number in range(6)]
    for lap in range(2):
        for number, prompt in enumerate(prompts):
            driver.finish(driver.generate(f"{lap}-{number}", prompt, 2))
            driver.settle()
    driver.generate("running", [1] * 10, 50)
    driver.turn(4)
    driver.send(FlushCache(call_id="f", mode="now"))
    for message in (GetState(call_id="state"), GetStorage(call_id="store")):
        driver.send(message)
    driver.turn(2)
    return driver.replies["state"], driver.replies["store"]  # type: ignore[return-value]


async def exported(engine: ScriptedEngine) -> set[str]:
    state, store = state_of_an_engine_that_did_everything()
    drops = {"dropped_tokens_prefetch_miss": 16.0}
    full = msgspec.structs.replace(state, memory_bytes={"kv_cache": 1}, counters=state.counters | drops)
    info = OperationInfo(
        operation_id="1", kind="flush_cache", phase="waiting", waited_s=0.0, remaining_s=1.0, blockers={}
    )
    engine.script.answers |= {
        GetState: lambda message: msgspec.structs.replace(full, call_id=message.call_id),
        GetStorage: lambda message: msgspec.structs.replace(store, call_id=message.call_id),
        GetOperations: lambda message: Operations(call_id=message.call_id, items=(info,)),
    }
    async with api(engine) as server:
        answer = await server.post("/generate", {"text": "abc", "sampling_params": {"max_new_tokens": 2}})
        assert answer.status_code == 200
        engine.script.refusal = Finish(type="abort", status=400, message="no")
        assert (await server.post("/generate", {"text": "abc"})).status_code == 400
        text = (await server.http.get("/metrics")).text
    found = set()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.add(family.name if family.type == "histogram" else sample.name)
    return found


async def test_the_page_in_the_docs_names_every_metric_and_no_other(engine: ScriptedEngine) -> None:
    found, told = await exported(engine), documented()
    assert len(found) > 50
    assert sorted(found - told) == [], "exported and not documented"
    assert sorted(told - found) == [], "documented and not exported"
