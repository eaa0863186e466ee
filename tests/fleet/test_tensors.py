"""Tensors of a trainer over a fleet: all replicas have them or none, and those that come later get them first."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest
import torch
from fronts import ADMIN, FleetWithFront
from replicas import SimulatedReplica
from safetensors.torch import save

from headwater.fleet import carrying
from headwater.fleet.carrying import STAGED
from headwater.messages.weights import UpdateWeights
from headwater.simulation.fakes.memory import FakeWeights
from headwater.transports.carried import CarriedWeights
from headwater.transports.staging import StagingArea, StagingFull

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


def weights_of(fleet: FleetWithFront) -> set[str]:
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


class FarReplica(SimulatedReplica):
    """On another machine: what the front carries to it lies in an area of its own."""

    def __init__(self, name: str, folder: Path, *, max_bytes: int | None = None) -> None:
        self.paths: list[str] = []  # from which its engine has read
        weights = FakeWeights()
        stage = weights.stage_received
        weights.stage_received = lambda path, id, **more: self.paths.append(path) or stage(path, id, **more)  # type: ignore[method-assign]
        super().__init__(name, weights=weights)
        folder.mkdir()
        self.folder = folder
        self.area = StagingArea(folder, max_bytes=max_bytes)
        self.carried = CarriedWeights(self.area)
        self.num_pieces = 0

    def take_piece(self, url: str, body: bytes) -> tuple[int, bytes, float]:
        self.num_pieces += 1
        query = dict(parse_qsl(urlsplit(url).query))
        query = dict.fromkeys(("weights_id", "bucket", "offset", "keep"), "") | query
        try:
            path = self.carried.write(
                query["weights_id"],
                bucket=query["bucket"],
                offset=int(query["offset"]),
                data=body,
                keep=query["keep"].split(","),
            )
        except StagingFull as error:
            return 413, json.dumps({"error": {"message": str(error)}}).encode(), 0.0
        return 200, json.dumps({"path": path}).encode(), 0.0


class FarFleet(FleetWithFront):
    async def post(self, url: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes, float]:
        if STAGED not in url:
            return await super().post(url, body, headers)
        far = self.replicas[url.removeprefix("http://").partition("/")[0]]
        assert isinstance(far, FarReplica) and headers["authorization"] == "Bearer key"
        return far.take_piece(url, body)


@pytest.fixture
async def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FarFleet]:
    monkeypatch.setattr(carrying, "PIECE_BYTES", 50)  # so that a bucket is carried in pieces
    fleet = FarFleet(FarReplica("a", tmp_path / "a"), FarReplica("b", tmp_path / "b"))
    (tmp_path / "front").mkdir()
    fleet.arguments = {"staging_dir": str(tmp_path / "front")}
    async with fleet:
        yield fleet
        await fleet.front.close()


def are_there(paths: list[str]) -> list[bool]:
    return [Path(path).exists() for path in paths]


def read_by(replica: SimulatedReplica) -> list[bytes]:
    """The bytes of the buckets that its engine has read last."""
    assert isinstance(replica, FarReplica)
    return [file.read_bytes() for file in sorted(Path(replica.paths[-1]).iterdir())]


async def test_tensors_are_carried_to_replicas_on_other_machines(far: FarFleet, tmp_path: Path) -> None:
    async with far.http() as http:
        await http.post("/begin_weight_update", json={}, headers=ADMIN)
        for bucket in (BUCKET, OTHER_BUCKET):
            await http.post("/update_weights_from_tensor", content=bucket, headers=TENSOR)
        answer = await http.post("/end_weight_update", json={}, headers=ADMIN)
        assert answer.status_code == 200, answer.text
        for replica in far.replicas.values():
            assert isinstance(replica, FarReplica) and replica.num_pieces > 2
            assert replica.paths[-1].startswith(str(replica.folder)) and read_by(replica) == [BUCKET, OTHER_BUCKET]
        late = FarReplica("late", tmp_path / "late")
        await far.join(late)
        assert read_by(late) == [BUCKET, OTHER_BUCKET] and weights_of(far) == {answer.json()["weights_id"]}


async def test_a_replica_keeps_what_it_may_read_again_and_nothing_else(far: FarFleet) -> None:
    async with far.http() as http:
        for _ in range(3):
            assert (await http.post("/update_weights_from_tensor", content=BUCKET, headers=TENSOR)).status_code == 200
        a = far.replicas["a"]
        assert isinstance(a, FarReplica) and len(set(a.paths)) == 3
        assert are_there(a.paths) == [False, True, True]  # the second one was in use while the third one came


async def test_a_replica_without_room_for_the_tensors_means_that_none_takes_them(far: FarFleet) -> None:
    async with far.http() as http:
        b = far.replicas["b"]
        assert isinstance(b, FarReplica)
        b.carried = CarriedWeights(StagingArea(b.folder, max_bytes=60))
        answer = await http.post("/update_weights_from_tensor", content=BUCKET, headers=TENSOR)
        assert answer.status_code == 413 and "nothing was changed on any" in answer.text and "60 bytes" in answer.text
        assert weights_of(far) == {"w0"}


async def test_what_a_fleet_does_not_carry_out_says_why() -> None:
    async with FleetWithFront(SimulatedReplica("a")) as fleet, fleet.http() as http:
        for path in ("/init_weights_update_group", "/update_weights_from_distributed"):
            error = (await http.post(path, json={}, headers=ADMIN)).json()["error"]
            assert error["code"] == "not_on_a_fleet" and "replicas come and go" in error["message"]
