"""Tensors of a trainer over a fleet: all replicas have them or none, and those that come later get them first."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from fronts import ADMIN, FleetWithFront
from replicas import SimulatedReplica
from safetensors.torch import save

from headwater.messages.weights import UpdateWeights
from headwater.simulation.fakes.memory import FakeWeights

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
TENSOR = ADMIN | {"content-type": "application/vnd.safetensors"}
BUCKET = save({"weight": torch.ones(1)})
OTHER_BUCKET = save({"bias": torch.ones(2)})


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class SharingFleet(FleetWithFront):
    shares_files = True


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[SharingFleet]:
    fleet = SharingFleet(SimulatedReplica("a"), SimulatedReplica("b"))
    fleet.arguments = {"staging_dir": str(tmp_path)}
    async with fleet:
        yield fleet
        await fleet.front.close()
    assert not os.listdir(tmp_path), "the front has left tensors behind"


def weights_of(fleet: SharingFleet) -> set[str]:
    return {replica.engine.parts.scheduler.weights_id for replica in fleet.replicas.values()}


async def test_a_bucket_is_put_in_place_by_all_replicas(fleet: SharingFleet) -> None:
    async with fleet.http() as http:
        answer = await http.post("/update_weights_from_tensor?weight_version=s1", content=BUCKET, headers=TENSOR)
        assert answer.status_code == 200, answer.text
        assert [each["dp_rank"] for each in answer.json()["engines"]] == [0, 1]
        assert weights_of(fleet) == {answer.json()["weights_id"]}
        assert (await http.get("/get_weight_version")).json()["weight_version"] == "s1"


async def test_a_bracket_is_put_in_place_by_all_or_none(fleet: SharingFleet) -> None:
    async with fleet.http() as http:
        before = weights_of(fleet)
        for body in (BUCKET, OTHER_BUCKET):
            if body is BUCKET:
                assert (await http.post("/begin_weight_update", json={"timeout": 60}, headers=ADMIN)).status_code == 200
            sent = await http.post("/update_weights_from_tensor", content=body, headers=TENSOR)
            assert sent.status_code == 200 and weights_of(fleet) == before
        fleet.replicas["b"].is_silent = True
        answer = await http.post("/end_weight_update", json={"timeout": 0.3}, headers=ADMIN)
        assert answer.status_code == 504 and "nothing was changed on any" in answer.text
        assert weights_of(fleet) == before
        fleet.replicas["b"].is_silent = False
        assert (await http.post("/begin_weight_update", json={"timeout": 60}, headers=ADMIN)).status_code == 200
        await http.post("/update_weights_from_tensor", content=BUCKET, headers=TENSOR)
        answer = await http.post("/end_weight_update", json={}, headers=ADMIN)
        assert answer.status_code == 200 and weights_of(fleet) == {answer.json()["weights_id"]} != before


async def test_an_aborted_bracket_and_a_wrong_tensor_change_nothing(fleet: SharingFleet) -> None:
    async with fleet.http() as http:
        before = weights_of(fleet)
        await http.post("/begin_weight_update", json={}, headers=ADMIN)
        await http.post("/update_weights_from_tensor", content=BUCKET, headers=TENSOR)
        assert (await http.post("/abort_weight_update", json={}, headers=ADMIN)).status_code == 200
        assert (await http.post("/end_weight_update", json={}, headers=ADMIN)).status_code == 400
        wrong = save({"weight": torch.ones(7)})
        answer = await http.post("/update_weights_from_tensor", content=wrong, headers=TENSOR)
        assert answer.status_code == 400 and "'weight'" in answer.text
        assert weights_of(fleet) == before
        assert not any(isinstance(each, UpdateWeights) for replica in fleet.replicas.values() for each in replica.made)


async def test_a_replica_that_comes_later_gets_the_tensors_before_it_serves(fleet: SharingFleet) -> None:
    async with fleet.http() as http:
        answer = await http.post("/update_weights_from_tensor", content=BUCKET, headers=TENSOR)
        late = SimulatedReplica("late")
        await fleet.join(late)
        assert weights_of(fleet) == {answer.json()["weights_id"]}
        (update,) = (each for each in late.made if isinstance(each, UpdateWeights))
        assert os.listdir(update.path), "the front keeps the tensors for it"


async def test_a_replica_that_cannot_get_the_tensors_stays_out_and_the_front_says_why(fleet: SharingFleet) -> None:
    async with fleet.http() as http:
        await http.post("/update_weights_from_tensor", content=BUCKET, headers=TENSOR)
        weights = FakeWeights()
        weights.stage_received = lambda *_, **__: weights.stage("corrupt", "auto")  # type: ignore[method-assign]
        joining = asyncio.ensure_future(fleet.join(SimulatedReplica("late", weights=weights)))
        await fleet.until(lambda: "could not be brought" in (fleet.client.why_out(2) or ""))
        joining.cancel()
        listed = (await http.get("/fleet", headers=ADMIN)).json()["replicas"]
        (out,) = (each for each in listed if not each["serving"])
        assert out["name"] == "late" and "update weights" in out["message"]


async def test_what_a_fleet_on_several_machines_cannot_do_says_why() -> None:
    async with FleetWithFront(SimulatedReplica("a")) as fleet, fleet.http() as http:
        for path, words in (
            ("/update_weights_from_tensor", "other machines"),
            ("/begin_weight_update", "other machines"),
            ("/init_weights_update_group", "replicas come and go"),
            ("/update_weights_from_distributed", "replicas come and go"),
        ):
            error = (await http.post(path, json={}, headers=ADMIN)).json()["error"]
            assert error["code"] == "not_on_a_fleet" and words in error["message"]
