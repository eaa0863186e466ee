"""The operating page over HTTP, on real engine loops: numbers, keys, files, and the scope of a node."""

import json
import re
from collections.abc import AsyncIterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_under_test import Api, api, error_of, served
from loop_engines import PAGE_SIZE, loop_engines, prompt_of

from headwater.http_api.dashboard.routes import FILE_HEADERS
from headwater.http_api.state import DashboardSettings

pytestmark = pytest.mark.anyio
PAGE = Path(str(files("headwater.http_api.dashboard").joinpath("page")))
FILES = [str(path.relative_to(PAGE)) for path in PAGE.rglob("*.*") if path.suffix != ".html"]
ADMIN = {"authorization": "Bearer admin"}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Api]:
    with loop_engines(tmp_path, 2) as engines:
        async with api(*engines) as server:
            yield server


async def generate(server: Api, prompt: list[int], **more: Any) -> None:
    body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 4}} | more
    assert (await server.post("/generate", body)).status_code == 200


async def test_the_snapshot_has_the_numbers_of_metrics_and_cache(server: Api) -> None:
    for name in range(4):
        for _ in range(2):
            await generate(server, prompt_of(name), cache_salt="acme", routed_dp_rank=name % 2)
    found = (await server.http.get("/dashboard/snapshot")).json()
    cache = (await server.http.get("/cache")).json()
    metrics = (await server.http.get("/metrics")).text
    sample = found["sample"]
    assert sample["prompt_tokens"] == cache["hits"]["prompt_tokens"] == 8 * 40
    assert sample["cached_tokens_device"] == cache["hits"]["tokens"]["device"] > 0
    device = cache["tiers"]["device"]
    assert (sample["device.free"], sample["device.tree"]) == (device["free_pages"], device["cached_pages"])
    assert set(found["engines"]) == {"0", "1"}
    for kind, name in (("ttft", "time_to_first_token"), ("itl", "inter_token_latency")):
        last = len(found["latency"][kind])
        shown = re.search(rf'sglang:{name}_seconds_bucket{{le="\+Inf".*}} (\S+)', metrics)
        assert shown is not None
        assert sample[f"{kind}.{last}"] == float(shown[1])
    assert sample[f"ttft.{len(found['latency']['ttft'])}"] == 8
    spaces = [root for engine in found["engines"].values() for root in engine["map"]["roots"].values()]
    assert [space["cache_salt"] for space in spaces] == ["acme", "acme"]
    assert sum(space["device"] for space in spaces) == device["cached_pages"] * PAGE_SIZE


async def test_the_scope_of_a_node_cuts_it_and_what_is_below_and_nothing_else(server: Api) -> None:
    shared = prompt_of(1, 16)
    for name in (2, 3):
        await generate(server, shared + prompt_of(name, 16), cache_salt="acme", routed_dp_rank=0)
    await generate(server, prompt_of(4, 16), cache_salt="acme", routed_dp_rank=0)
    nodes = (await server.http.get("/dashboard/snapshot")).json()["engines"]["0"]["map"]["nodes"]
    top = max(nodes, key=lambda number: nodes[number]["below"])
    below = next(number for number, node in nodes.items() if node["parent"] == int(top))
    where = (await server.http.get(f"/dashboard/node?dp_rank=0&number={below}")).json()
    assert where["path_ids"][:16] == shared
    assert len(where["flush_ids"]) == 16 + PAGE_SIZE
    scope = {"prefix_ids": where["flush_ids"], "cache_salt": where["cache_salt"], "mode": "now"}
    json_answer = {"accept": "application/json"}
    flushed = (await server.post("/flush_cache", scope, headers=json_answer)).json()
    assert flushed["freed"]["device"]["pages"] == nodes[below]["below"] // PAGE_SIZE
    after = (await server.http.get("/dashboard/snapshot")).json()["engines"]["0"]["map"]["nodes"]
    assert set(nodes) - set(after) >= {below}
    assert top in after
    gone = await server.http.get(f"/dashboard/node?dp_rank=0&number={below}")
    assert (gone.status_code, error_of(gone)["param"]) == (404, "number")
    assert (await server.http.get("/dashboard/node?dp_rank=7&number=1")).status_code == 404


async def test_an_engine_that_is_gone_shows_as_such(server: Api) -> None:
    server.state.client.engine_gone(1, "killed for the test")
    found = (await server.http.get("/dashboard/snapshot")).json()
    assert found["engines"]["0"]["up"]
    assert (found["engines"]["1"]["up"], "killed for the test" in found["engines"]["1"]["message"]) == (False, True)


async def test_text_is_shown_only_if_the_server_was_told_to(tmp_path: Path) -> None:
    with loop_engines(tmp_path) as (engine,):
        for settings, has_text in ((DashboardSettings(), False), (DashboardSettings(shows_text=True), True)):
            async with api(engine, dashboard=settings) as server:
                body = {"text": "My secret plan is this", "sampling_params": {"max_new_tokens": 2}}
                await server.post("/generate", body)
                snapshot = await server.http.get("/dashboard/snapshot")
                assert ("secret" in snapshot.text) is has_text
                assert snapshot.json()["server"]["shows_text"] is has_text


async def test_the_page_needs_no_key_and_its_data_does(tmp_path: Path) -> None:
    with loop_engines(tmp_path) as (engine,):
        async with api(engine, api_key="user", admin_api_key="admin") as server:
            for path in ("/dashboard", "/dashboard/files/main.js", "/dashboard/files/panels/flush.js"):
                assert (await server.http.get(path)).status_code == 200, path
            for path in ("/dashboard/snapshot", "/dashboard/events", "/dashboard/node?number=1"):
                assert (await server.http.get(path)).status_code == 401, path
                user = await server.http.get(path, headers={"authorization": "Bearer user"})
                assert user.status_code == 403, path
            assert (await server.http.get("/dashboard/snapshot", headers=ADMIN)).status_code == 200


async def test_a_server_without_the_page_has_none_of_it(tmp_path: Path) -> None:
    with loop_engines(tmp_path) as (engine,):
        async with api(engine, dashboard=None) as server:
            for path in ("", "/files/main.js", "/events", "/snapshot", "/node?number=1"):
                assert (await server.http.get(f"/dashboard{path}")).status_code == 404, path


async def test_other_sites_may_not_open_the_stream(server: Api) -> None:
    foreign = {"sec-fetch-site": "cross-site", "origin": "https://evil.example"}
    refused = await server.http.get("/dashboard/events", headers=foreign)
    assert (refused.status_code, error_of(refused)["code"]) == (403, "cross_site")


async def test_files_lie_inside_the_page_and_need_nothing_from_elsewhere(server: Api) -> None:
    for path in ("..%2Froutes.py", "../routes.py", "panels", "panels/none.js", "%2Fetc%2Fpasswd", "a.py"):
        assert (await server.http.get(f"/dashboard/files/{path}")).status_code == 404, path
    assert len(FILES) > 20
    for name in FILES:
        response = await server.http.get(f"/dashboard/files/{name}")
        assert response.status_code == 200, name
        assert {key: response.headers[key] for key in FILE_HEADERS} == FILE_HEADERS
        elsewhere = set(re.findall(r"https?://[^\"'\s]+", response.text)) - {"http://www.w3.org/2000/svg"}
        assert not elsewhere, (name, elsewhere)
    page = await server.http.get("/dashboard")
    for link in re.findall(r'(?:src|href)="([^"#]+)"', page.text):
        assert (await server.http.get(f"/{link}")).status_code == 200, link
    assert " style=" not in page.text
    assert "<script>" not in page.text


def test_a_stream_over_a_socket_begins_with_everything(tmp_path: Path) -> None:
    with (
        loop_engines(tmp_path) as (engine,),
        served(engine) as (url, _),
        httpx.stream("GET", f"{url}/dashboard/events", timeout=20) as stream,
    ):
        lines = stream.iter_lines()
        assert next(lines) == "event: whole"
        whole = json.loads(next(lines).removeprefix("data: "))
        assert whole["snapshot"]["engines"]["0"]["up"]
        assert whole["history"]["t"] == [whole["snapshot"]["sample"]["t"]]
        assert (next(lines), next(lines)) == ("", "event: patch")
        assert "server" not in json.loads(next(lines).removeprefix("data: ")), "it has not changed"
