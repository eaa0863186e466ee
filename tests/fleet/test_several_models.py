"""A fleet of several models: where requests go, and answers to calls that concern all of them."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fronts import ADMIN
from prometheus_client.parser import text_string_to_metric_families
from several_models import TwoModels

from headwater.fleet.merging import Taken, merged, merged_metrics
from headwater.fleet.planned.virtual_loop import VirtualLoop
from headwater.messages.control import FlushCache

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> Any:
    return "asyncio", {"loop_factory": VirtualLoop}


@pytest.fixture
async def two() -> AsyncIterator[TwoModels]:
    async with TwoModels() as two:
        yield two


async def test_a_request_goes_to_a_replica_of_its_model(two: TwoModels) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/api/chat"):
        for model in two.fleets:
            answer = await two.http.post(path, json={"model": model, "prompt": "hello"})
            assert (answer.status_code, answer.json()["model"]) == (200, model)
            assert json.loads(answer.json()["body"]) == {"model": model, "prompt": "hello"}
    answer = await two.http.post("/generate?model=cd&other=1", json={"text": "hello"})
    assert answer.json()["model"] == "cd" and two.fleets["cd"].asked[-1].endswith("/generate?other=1")
    named_as_serve_does = {"serve_multiplexed_model_id": "cd"}
    assert (await two.http.post("/generate", json={}, headers=named_as_serve_does)).json()["model"] == "cd"


async def test_a_request_for_no_model_is_refused_by_name(two: TwoModels) -> None:
    for body in ({"prompt": "a"}, {"model": "", "prompt": "a"}, {"model": 3}):
        error = (await two.http.post("/v1/completions", json=body)).json()["error"]
        assert (error["param"], error["code"]) == ("model", "missing") and "'ab', 'cd'" in error["message"]
    for answer in (
        await two.http.post("/v1/completions", json={"model": "ef"}),
        await two.http.post("/flush_cache?model=ef", headers=ADMIN),
        await two.http.get("/v1/models/ef"),
    ):
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
    assert (await two.http.post("/v1/completions", content=b"[]")).status_code == 400
    contradiction = await two.http.post("/flush_cache?model=ab&model=cd", headers=ADMIN)
    assert (contradiction.status_code, contradiction.json()["error"]["param"]) == (400, "model")
    assert not any(fleet.asked for fleet in two.fleets.values())


async def test_all_models_are_listed(two: TwoModels) -> None:
    assert [each["id"] for each in (await two.http.get("/v1/models")).json()["data"]] == ["ab", "cd"]
    assert [each["id"] for each in (await two.http.get("/api/tags")).json()["models"]] == ["ab", "cd"]
    listed = (await two.http.get("/fleet", headers=ADMIN)).json()["replicas"]
    assert [(each["model"], each["name"]) for each in listed] == [("ab", "a"), ("ab", "b"), ("cd", "c"), ("cd", "d")]
    assert (await two.http.get("/fleet")).status_code == 401


async def test_a_flush_is_made_by_all_models_or_by_the_one_that_is_named(two: TwoModels) -> None:
    answer = await two.http.post("/flush_cache?mode=now", headers=ADMIN)
    facts = answer.json()
    assert answer.status_code == 200 and facts["success"]
    assert [(each["model"], each["dp_rank"], each["success"]) for each in facts["engines"]] == [
        ("ab", 0, True), ("ab", 1, True), ("cd", 0, True), ("cd", 1, True),
    ]  # fmt: skip
    answer = await two.http.post("/flush_cache?mode=now&model=cd", headers=ADMIN)
    assert answer.status_code == 200 and [each["dp_rank"] for each in answer.json()["engines"]] == [0, 1]
    assert {model: num_flushes(two, model) for model in two.fleets} == {"ab": [1, 1], "cd": [2, 2]}
    answer = await two.http.post("/flush_cache", json={"mode": "now", "model": "ab"}, headers=ADMIN)
    assert answer.status_code == 200 and [each["dp_rank"] for each in answer.json()["engines"]] == [0, 1]
    assert {model: num_flushes(two, model) for model in two.fleets} == {"ab": [2, 2], "cd": [2, 2]}
    odd = await two.http.post("/flush_cache", json={"model": ["ab"]}, headers=ADMIN)
    assert (odd.status_code, odd.json()["error"]["param"]) == (400, "model")


def num_flushes(two: TwoModels, model: str) -> list[int]:
    replicas = two.fleets[model].replicas.values()
    return [sum(isinstance(message, FlushCache) for message in replica.made) for replica in replicas]


async def test_what_one_model_has_not_done_is_no_success_of_all(two: TwoModels) -> None:
    two.fleets["cd"].replicas["d"].is_cut = True
    answer = await two.http.post("/flush_cache?mode=now&timeout=0.3", headers=ADMIN)
    facts = answer.json()
    assert answer.status_code == 202 and not facts["success"] and "cd: Flushed on engine 0" in facts["message"]
    assert [each.get("pending") for each in facts["engines"] if each["dp_rank"] == 1] == [[], True]
    assert facts["models"]["ab"]["success"] and not facts["models"]["cd"]["success"]
    text = (await two.http.post("/flush_cache?mode=now", headers={"authorization": "Bearer boss"})).text
    assert not text.startswith("Cache flushed") and "(ab)" in text and "(cd)" in text
    health = await two.http.get("/health")
    assert [each["dp_rank"] for each in health.json()["models"]["cd"]["engines_out"]] == [1]


async def test_a_pause_names_a_model_or_holds_all(two: TwoModels) -> None:
    paused = {"json": {"mode": "retract"}, "headers": ADMIN}
    assert (await two.http.post("/pause_generation?model=ab", **paused)).status_code == 200
    assert [are_paused(two, model) for model in two.fleets] == [True, False]
    answer = await two.http.post("/pause_generation", **paused)
    assert answer.status_code == 200 and len(answer.json()["engines"]) == 4 and answer.json()["num_requests"] == 0
    assert [are_paused(two, model) for model in two.fleets] == [True, True]
    assert (await two.http.post("/continue_generation", json={}, headers=ADMIN)).status_code == 200
    assert [are_paused(two, model) for model in two.fleets] == [False, False]


def are_paused(two: TwoModels, model: str) -> bool:
    return all(replica.engine.state.is_paused for replica in two.fleets[model].replicas.values())


async def test_what_concerns_one_model_has_to_name_it(two: TwoModels) -> None:
    body = {"model_path": "/w", "lora_name": "x", "lora_path": "/l"}
    for path in ("/update_weights_from_disk", "/v1/load_lora_adapter", "/fleet/scale?replicas=3", "/cache/warm"):
        answer = await two.http.post(path, json=body, headers=ADMIN)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "model", path
    assert (await two.http.post("/fleet/scale?replicas=3&model=cd", headers=ADMIN)).status_code == 200
    assert [fleet.wanted for fleet in two.fleets.values()] == [[], [3]]
    clash = {"lora_name": "ab", "lora_path": "/l"}
    answer = await two.http.post("/v1/load_lora_adapter?model=cd", json=clash, headers=ADMIN)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "lora_name"


async def test_control_calls_need_the_admin_key_and_are_no_model_s_for_strangers(two: TwoModels) -> None:
    for query in ("", "&model=cd"):
        assert (await two.http.post(f"/flush_cache?mode=now{query}")).status_code == 401
    strange = {"origin": "https://evil.example", "sec-fetch-site": "cross-site"} | ADMIN
    assert (await two.http.post("/flush_cache?mode=now", headers=strange)).status_code == 403
    assert len((await two.http.get("/health")).headers.get_list("x-request-id")) == 1


async def test_a_stored_response_is_asked_of_the_model_that_gave_it(two: TwoModels) -> None:
    await two.http.post("/v1/responses", json={"model": "cd", "input": "hello"})
    await two.http.get("/v1/responses/resp_c1")
    assert two.fleets["cd"].asked[-1].endswith("/v1/responses/resp_c1")


async def test_the_operating_page_is_that_of_a_model(two: TwoModels) -> None:
    assert (await two.http.get("/dashboard")).json()["error"]["param"] == "model"
    assert "<title>Headwater" in (await two.http.get("/dashboard?model=cd")).text
    script = (await two.http.get("/dashboard/files/server.js")).text
    name = next(word for word in script.split() if "multiplexed" in word).rstrip(":")
    assert (await two.http.get("/dashboard/snapshot", headers=ADMIN)).status_code == 400
    found = await two.http.get("/dashboard/snapshot", headers=ADMIN | {name: "cd"})
    assert list(found.json()["engines"]) == ["0", "1"]


async def test_metrics_have_each_family_once_and_a_series_of_each_model(two: TwoModels) -> None:
    text = (await two.http.get("/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    helps = [line.split()[2] for line in text.splitlines() if line.startswith("# HELP")]
    assert len(helps) == len(set(helps))
    up = {(s.labels["model_name"], s.labels["dp_rank"]) for s in families["headwater_engine_up"].samples}
    assert up == {("ab", "0"), ("ab", "1"), ("cd", "0"), ("cd", "1")}


def test_samples_of_a_family_stand_together() -> None:
    pages = [f'# HELP a A.\n# TYPE a gauge\na{{m="{m}"}} 1\n# HELP b B.\n# TYPE b gauge\nb 2\n' for m in "xy"]
    assert merged_metrics(pages).splitlines()[:4] == ["# HELP a A.", "# TYPE a gauge", 'a{m="x"} 1', 'a{m="y"} 1']


def test_a_refusal_of_one_model_is_the_status_and_names_it() -> None:
    refused = b'{"error":{"message":"not idle","type":"t","param":null,"code":"busy"}}'
    done = b'{"success":true,"message":"Done."}'
    found = merged("/flush_cache", {"x": Taken(200, [], done), "y": Taken(409, [], refused)})
    assert found.status == 409
    assert found.facts["success"] is False and found.facts["error"]["message"] == "y: not idle"
    assert found.facts["message"] == "x: Done. y: not idle"


def test_a_model_that_has_not_loaded_is_left_out_of_a_list_and_all_of_them_are_an_error() -> None:
    card, loading = Taken(200, [], b'{"data":[{"id":"x"}]}'), Taken(503, [], b'{"error":{"message":"loading"}}')
    assert merged("/v1/models", {"x": card, "y": loading}).facts == {"data": [{"id": "x"}]}
    assert merged("/v1/models", {"x": loading, "y": loading}).status == 503
    assert merged("/health", {"x": Taken(200, [], b""), "y": Taken(503, [], b"")}).status == 503
