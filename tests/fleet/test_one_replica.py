"""Routes that one replica carries out: it is named, or the one that later requests go to, and the answer says which."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fronts import ADMIN, FleetWithFront
from replicas import SimulatedFleet, SimulatedReplica

from headwater.fleet.planned.virtual_loop import VirtualLoop
from headwater.fleet.proxy import Answer

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> Any:
    return "asyncio", {"loop_factory": VirtualLoop}


class Said:
    """An answer in JSON."""

    def __init__(self, facts: Any, status: int = 200) -> None:
        self.status = status
        self.headers = [(b"content-type", b"application/json")]
        self._facts = facts

    async def chunks(self) -> AsyncIterator[bytes]:
        text = json.dumps(self._facts).encode()
        yield text[:7]
        yield text[7:]


class FleetOfServers(FleetWithFront):
    """The replicas' servers answer as theirs do; what they were asked is kept."""

    def __init__(self, *replicas: SimulatedReplica) -> None:
        super().__init__(*replicas)
        self.calls: list[tuple[str, str, Any]] = []  # replica, method and path, body
        self.refusing: set[str] = set()

    @asynccontextmanager
    async def _forward(self, method: str, url: str, *, headers: Any, body: bytes) -> AsyncIterator[Answer]:
        name, _, path = url.removeprefix("http://").partition("/")
        self.calls.append((name, f"{method} /{path}", json.loads(body) if body else None))
        if name in self.refusing:
            yield Said({"error": {"message": "no room", "param": None, "code": "no_room"}}, 409)
            return
        yield Said(self._answer(name, method, path, self.calls[-1][2]))

    def _answer(self, name: str, method: str, path: str, fields: Any) -> Any:
        match path:
            case "cache/warm":
                texts = fields["text"] if isinstance(fields["text"], list) else [fields["text"]]
                counts = [{"prompt_tokens": len(t), "cached_tokens": 0, "computed_tokens": len(t)} for t in texts]
                return {"success": True, "items": [count | {"dp_rank": 0} for count in counts]}
            case "cache/pin":
                return {"success": True, "pins": [{"pin_id": "0.pin-7", "dp_rank": 0, "num_tokens": 3}]}
            case "cache/responses":
                return {"success": True, "dropped": 1, "bytes": 10}
            case "get_kv_event_sources":
                return [{"data_parallel_rank": 0, "endpoint": "tcp://*:5", "replay_endpoint": None, "topic": ""}]
            case "v1/responses":
                return {"id": f"resp_{name.encode().hex()}", "object": "response"}
        return {"id": "?"}

    def asked_for(self, path: str) -> list[str]:
        return [name for name, call, _ in self.calls if call == path]


@pytest.fixture
async def fleet() -> AsyncIterator[FleetOfServers]:
    replicas = [SimulatedReplica(name) for name in "abc"]
    fleet: SimulatedFleet = FleetOfServers(*replicas)
    async with fleet:
        yield fleet  # type: ignore[misc]


@pytest.fixture
async def http(fleet: FleetOfServers) -> AsyncIterator[httpx.AsyncClient]:
    async with fleet.http() as http:
        yield http


async def test_a_warmed_prefix_is_where_requests_for_it_go(fleet: FleetOfServers, http: httpx.AsyncClient) -> None:
    text = "a long beginning " * 20
    answer = await http.post("/cache/warm", json={"text": text, "routed_dp_rank": 2}, headers=ADMIN)
    assert answer.status_code == 200 and [item["dp_rank"] for item in answer.json()["items"]] == [2]
    assert fleet.calls[-1] == ("c", "POST /cache/warm", {"text": text})
    await http.post("/v1/completions", json={"prompt": text + "and more"})
    assert fleet.asked_for("POST /v1/completions") == ["c"]


async def test_prefixes_of_a_batch_are_warmed_where_each_is_known(
    fleet: FleetOfServers, http: httpx.AsyncClient
) -> None:
    known = "what replica 1 knows " * 10
    await http.post("/cache/warm", json={"text": known, "routed_dp_rank": 1}, headers=ADMIN)
    facts = (await http.post("/cache/warm", json={"text": ["new one", known]}, headers=ADMIN)).json()
    assert facts["items"][1]["dp_rank"] == 1 and facts["items"][1]["prompt_tokens"] == len(known)
    assert facts["items"][0]["prompt_tokens"] == len("new one")
    assert facts["prompt_tokens"] == len("new one") + len(known)


async def test_a_pin_is_named_with_its_replica_and_ended_there(fleet: FleetOfServers, http: httpx.AsyncClient) -> None:
    facts = (await http.post("/cache/pin", json={"text": "t", "routed_dp_rank": [1, 2]}, headers=ADMIN)).json()
    assert facts["pin_id"] == "1.pin-7,2.pin-7" and [pin["dp_rank"] for pin in facts["pins"]] == [1, 2]
    chosen = (await http.post("/cache/pin", json={"text": "t"}, headers=ADMIN)).json()
    assert len(chosen["pins"]) == 1
    assert (await http.delete("/cache/pin/1.pin-7,2.pin-7", headers=ADMIN)).status_code == 200
    assert fleet.asked_for("DELETE /cache/pin/0.pin-7") == ["b", "c"]
    fleet.replicas["c"].is_dead = True
    await fleet.until(lambda: 2 not in fleet.client.replicas)
    gone = await http.delete("/cache/pin/2.pin-7", headers=ADMIN)
    assert gone.status_code == 404 and "no pin '2.pin-7' exists" in gone.text


async def test_what_a_replica_refuses_is_said_with_its_number(fleet: FleetOfServers, http: httpx.AsyncClient) -> None:
    fleet.refusing = {"b"}
    answer = await http.post("/cache/pin", json={"text": "t", "routed_dp_rank": [0, 1]}, headers=ADMIN)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["engine"]) == (409, "no_room", 1)
    assert error["message"] == "no room; done on engine 0"
    answer = await http.post("/cache/pin", json={"text": "t", "routed_dp_rank": 9}, headers=ADMIN)
    assert answer.status_code == 400 and "[0, 1, 2]" in answer.text
    fleet.replicas["c"].is_cut = True
    await fleet.until(lambda: 2 in fleet.client.engines_out)
    answer = await http.post("/cache/pin", json={"text": "t", "routed_dp_rank": 2}, headers=ADMIN)
    assert answer.status_code == 503


async def test_the_trees_and_pins_of_all_replicas_are_shown_and_of_one(
    fleet: FleetOfServers, http: httpx.AsyncClient
) -> None:
    fleet.replicas["b"].compute()
    await fleet.until(lambda: fleet.replicas["b"].num_cached)
    engines = (await http.get("/cache/tree", headers=ADMIN)).json()["engines"]
    assert [bool(each["nodes"]) if "nodes" in each else each["dp_rank"] for each in engines]
    assert [each["dp_rank"] for each in engines] == [0, 1, 2]
    (only,) = (await http.get("/cache/tree?dp_rank=1", headers=ADMIN)).json()["engines"]
    assert only == engines[1]
    assert (await http.get("/cache/tree?dp_rank=5", headers=ADMIN)).status_code == 400
    assert (await http.get("/cache/pins", headers=ADMIN)).json() == {"pins": []}


async def test_what_every_replica_does_for_itself_is_listed(fleet: FleetOfServers, http: httpx.AsyncClient) -> None:
    facts = (await http.delete("/cache/responses", headers=ADMIN)).json()
    assert facts["dropped"] == 3 and [each["dp_rank"] for each in facts["engines"]] == [0, 1, 2]
    assert (await http.delete("/cache/responses")).status_code == 401
    for replica in fleet.client.replicas.values():
        replica.beat = replica.beat.__class__(name=replica.beat.name, url=replica.beat.url, admin_key="key", node="h")
    sources = (await http.get("/get_kv_event_sources")).json()  # open to users, as on a server
    assert [(each["data_parallel_rank"], each["endpoint"]) for each in sources] == [(n, "tcp://h:5") for n in range(3)]


async def test_a_conversation_goes_on_where_its_response_is_kept(
    fleet: FleetOfServers, http: httpx.AsyncClient
) -> None:
    id = (await http.post("/v1/responses", json={"input": "hello"})).json()["id"]
    owner = bytes.fromhex(id.removeprefix("resp_")).decode()
    for number in range(3):
        body = {"input": f"entirely different {number}" * 20, "previous_response_id": id}
        await http.post("/v1/responses", json=body)
    await http.get(f"/v1/responses/{id}")
    await http.delete(f"/v1/responses/{id}")
    assert {name for name, _, _ in fleet.calls} == {owner}
    fleet.replicas[owner].is_dead = True
    await fleet.until(lambda: len(fleet.client.replicas) == 2)
    gone = await http.post("/v1/responses", json={"input": "hello", "previous_response_id": id})
    assert gone.status_code == 404 and gone.json()["error"]["code"] == "previous_response_not_found"
    unknown = await http.post("/v1/responses", json={"input": "hello", "previous_response_id": "resp_0"})
    assert unknown.status_code == 200  # the replica that it reaches says what it knows
