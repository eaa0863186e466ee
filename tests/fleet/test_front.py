"""The front's own routes: answers of control calls over replicas, and what a fleet refuses."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from fronts import ADMIN, FleetWithFront
from replicas import SimulatedReplica

from headwater.fleet import proxy
from headwater.fleet.planned.virtual_loop import VirtualLoop
from headwater.http_api.app import ROUTERS
from headwater.http_api.auth import AdminRoute
from headwater.messages.control import FlushCache
from headwater.messages.two_phase import Prepare

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> Any:
    return "asyncio", {"loop_factory": VirtualLoop}


@pytest.fixture
async def fleet() -> AsyncIterator[FleetWithFront]:
    async with FleetWithFront(SimulatedReplica("a"), SimulatedReplica("b")) as fleet:
        yield fleet


async def test_a_flush_that_one_replica_has_not_made_is_202_and_says_who(fleet: FleetWithFront) -> None:
    async with fleet.http() as http:
        answer = await http.post("/flush_cache?mode=now", headers=ADMIN)
        assert answer.status_code == 200 and answer.json()["success"]
        assert [entry["dp_rank"] for entry in answer.json()["engines"]] == [0, 1]
        fleet.replicas["b"].is_cut = True
        answer = await http.post("/flush_cache?mode=now", headers=ADMIN)
        facts = answer.json()
        assert answer.status_code == 202 and not facts["success"]
        assert "engine 1 takes no requests" in facts["message"] and "device" in facts["freed"]
        assert [(each["dp_rank"], each["success"], each.get("pending")) for each in facts["engines"]] == [
            (0, True, []),
            (1, False, True),
        ]
        text = (await http.post("/flush_cache?mode=now", headers={"authorization": "Bearer boss"})).text
        assert not text.startswith("Cache flushed")  # what scripts take for a success
        health = await http.get("/health")
        assert [each["dp_rank"] for each in health.json()["engines_out"]] == [1]


async def test_metrics_and_loads_name_replicas_by_their_numbers(fleet: FleetWithFront) -> None:
    fleet.replicas["a"].is_dead = True
    await fleet.until(lambda: 0 not in fleet.client.replicas)
    async with fleet.http() as http:
        assert [each["dp_rank"] for each in (await http.get("/v1/loads")).json()["loads"]] == [1]
        assert 'headwater_engine_up{dp_rank="1"' in (await http.get("/metrics")).text


async def test_the_operating_page_shows_replicas_by_their_numbers(fleet: FleetWithFront) -> None:
    fleet.replicas["b"].is_dead = True
    await fleet.until(lambda: 1 not in fleet.client.replicas)
    async with fleet.http() as http:
        assert "<title>Headwater" in (await http.get("/dashboard")).text
        assert (await http.get("/dashboard/snapshot")).status_code == 401
        found = (await http.get("/dashboard/snapshot", headers=ADMIN)).json()
        assert list(found["engines"]) == ["0"] and found["engines"]["0"]["up"]
        assert found["sample"]["device.free"] == found["engines"]["0"]["tiers"]["device"]["free"] > 0
        gone = await http.get("/dashboard/node?dp_rank=1&number=1", headers=ADMIN)
        assert gone.status_code == 503
        fleet.replicas["a"].is_dead = True
        await fleet.until(lambda: not fleet.client.replicas)
        assert (await http.get("/dashboard/snapshot", headers=ADMIN)).json()["engines"] == {}


async def test_changes_are_made_by_all_replicas(fleet: FleetWithFront) -> None:
    async with fleet.http() as http:
        answer = await http.post("/pause_generation", json={"mode": "retract"}, headers=ADMIN)
        assert answer.status_code == 200 and len(answer.json()["engines"]) == 2
        assert all(replica.engine.state.is_paused for replica in fleet.replicas.values())
        listed = (await http.get("/fleet", headers=ADMIN)).json()["replicas"]
        assert [(each["paused"], each["released"]) for each in listed] == [(True, [])] * 2
        await http.post("/continue_generation", json={}, headers=ADMIN)
        await http.post("/release_memory_occupation", json={"tags": ["kv_cache"]}, headers=ADMIN)
        listed = (await http.get("/fleet", headers=ADMIN)).json()["replicas"]
        assert [(each["paused"], each["released"]) for each in listed] == [(False, ["kv_cache"])] * 2


async def test_the_fleet_is_listed_and_scaled_with_the_admin_key_only(fleet: FleetWithFront) -> None:
    async with fleet.http() as http:
        assert (await http.get("/fleet")).status_code == 401
        listed = (await http.get("/fleet", headers=ADMIN)).json()["replicas"]
        assert [(each["dp_rank"], each["name"], each["serving"]) for each in listed] == [(0, "a", True), (1, "b", True)]
        assert "admin_key" not in str(listed)
        assert (await http.post("/fleet/scale?replicas=3")).status_code == 401
        assert (await http.post("/fleet/scale?replicas=0", headers=ADMIN)).status_code == 400
        assert (await http.get("/fleet/scale?replicas=3", headers=ADMIN)).status_code == 405
        assert (await http.post("/fleet/scale?replicas=3", headers=ADMIN)).status_code == 200
        assert fleet.wanted == [3]
        limits = "min_replicas=1&max_replicas=4&target_ongoing_requests=2.5"
        for wrong in (limits + "&replicas=2", "max_replicas=0", "min_replicas=2", "max_replicas=2&more=1"):
            assert (await http.post(f"/fleet/scale?{wrong}", headers=ADMIN)).status_code == 400, wrong
        found = (await http.post(f"/fleet/scale?{limits}", headers=ADMIN)).json()["autoscaling"]
        assert (found["max_replicas"], found["target_ongoing_requests"], found["wanted"]) == (4, 2.5, 2)
        assert (await http.post("/fleet/scale?replicas=1", headers=ADMIN)).json().keys() == {"replicas"}


async def test_what_only_a_replica_has_is_refused_and_never_one_replicas_answer(
    fleet: FleetWithFront, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fleet.http() as http:
        for router in ROUTERS:
            for route in router.routes:
                if isinstance(route, AdminRoute) and "POST" in (route.methods or ()) and "{" not in route.path:
                    await http.post(route.path, headers=ADMIN, content=b"[]")  # a body that none of them takes
                    assert not fleet.asked, route.path
        for path in ("/control/messages", "/control/staged", "/init_weights_update_group"):
            assert (await http.post(path, headers=ADMIN)).status_code == 501
        assert not fleet.asked
        monkeypatch.setattr(proxy, "HOLD_S", 0.0)
        await http.post("/v1/completions", json={"prompt": "hello"})
        assert fleet.asked == ["http://a/v1/completions", "http://b/v1/completions"]


async def test_a_call_about_another_model_reaches_no_replica(fleet: FleetWithFront) -> None:
    async with fleet.http() as http:
        for path, body in (("/flush_cache?model=other", {}), ("/flush_cache", {"model": "other"}),
                           ("/pause_generation?model=other", {})):  # fmt: skip
            answer = await http.post(path, json=body, headers=ADMIN)
            assert answer.status_code == 404, path
        made = [message for replica in fleet.replicas.values() for message in replica.made]
        assert not any(isinstance(message, FlushCache | Prepare) for message in made)
        assert (await http.post("/flush_cache?mode=now&model=tiny", headers=ADMIN)).status_code == 200


async def test_requests_without_an_answer_are_counted(fleet: FleetWithFront) -> None:
    async with fleet.http() as http:
        fleet.error = ConnectionResetError("reset")
        assert (await http.post("/v1/completions", json={"prompt": "hello"})).status_code == 502
        page = (await http.get("/metrics")).text
        for outcome in ("retried", "given_up"):
            assert f'headwater_fleet_broken_requests_total{{model_name="tiny",outcome="{outcome}"}} 1.0' in page


async def test_adapters_are_loaded_by_all_replicas_and_by_those_that_come_later(fleet: FleetWithFront) -> None:
    async with fleet.http() as http:
        body = {"lora_name": "law", "lora_path": "law-1"}
        assert (await http.post("/v1/load_lora_adapter", json=body, headers=ADMIN)).status_code == 200
        await fleet.join(SimulatedReplica("late"))
        info = (await http.get("/server_info", headers=ADMIN)).json()["internal_states"]
        assert [[each["name"] for each in state["adapters"]] for state in info] == [["law"]] * 3
        fleet.replicas["b"].is_cut = True
        answer = await http.post("/v1/unload_lora_adapter", json={"lora_name": "law"}, headers=ADMIN)
        assert answer.status_code >= 500 and "nothing was changed on any" in answer.text
        assert fleet.client.adapters() == {"law": "law-1"}
