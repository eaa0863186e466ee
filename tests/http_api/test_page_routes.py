"""Pages for people work without a network, and say the same to programs."""

import re
from pathlib import Path
from urllib.parse import urljoin

import pytest
from api_under_test import MODEL, api, error_of
from loop_engines import LoopEngine, loop_engines

from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio
BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
LINK = re.compile(r"""(?:src|href)=["']?([^"'\s>]+)""")


@pytest.mark.parametrize("path", ["/", "/docs"])
async def test_everything_that_a_page_needs_comes_from_this_server(tmp_path: Path, path: str) -> None:
    """The documentation was blank without a network: its scripts came from a CDN."""
    with loop_engines(tmp_path) as (engine,):
        await check_links(engine, path)


async def check_links(engine: LoopEngine, path: str) -> None:
    async with api(engine) as server:
        page = await server.http.get(path, headers=BROWSER)
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
        links = LINK.findall(page.text)
        assert len(links) >= 3
        for link in [*links, "openapi.json"]:
            assert "://" not in link, link
            response = await server.http.get(urljoin(f"http://test{path}", link))
            assert response.status_code == 200, link
            assert response.content or link == "health", link


async def test_the_documentation_names_its_schema(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        page = (await server.http.get("/docs")).text
        assert "'openapi.json'" in page or '"openapi.json"' in page
        assert '"validatorUrl": null' in page, "nothing is asked of servers elsewhere"
        script = await server.http.get("/docs/swagger-ui-bundle.js")
        assert len(script.content) > 1_000_000
        assert script.headers["content-type"].startswith("text/javascript")
        for name in ("redoc.standalone.js", "..%2F__init__.py", "x"):
            response = await server.http.get(f"/docs/{name}")
            assert (response.status_code, error_of(response)["code"]) == (404, "not_found")


async def test_programs_read_the_front_page_as_json(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        facts = (await server.http.get("/")).json()
        assert (facts["name"], facts["model"], facts["status"]) == ("Headwater", MODEL, "ready")
        for path in (facts["docs"], facts["openapi"], facts["health"], facts["metrics"], facts["models"]):
            assert (await server.http.get(path)).status_code == 200


async def test_people_read_which_model_is_served(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        page = (await server.http.get("/", headers=BROWSER)).text
        assert MODEL in page
        assert "curl http://test/v1/chat/completions" in page


async def test_the_front_page_is_there_while_the_model_loads(engine: ScriptedEngine) -> None:
    async with api(engine, is_ready=False) as server:
        assert (await server.http.get("/")).json()["status"] == "not ready"
        page = await server.http.get("/", headers=BROWSER)
        assert (page.status_code, "not ready" in page.text) == (200, True)


async def test_what_a_client_sends_is_no_markup(engine: ScriptedEngine) -> None:
    """The address of the server in the example is what the client called it."""
    async with api(engine) as server:
        for host in ('"><script>alert(1)</script>', "<b>", "a'b"):
            page = await server.http.get("/", headers=BROWSER | {"host": host})
            assert page.status_code == 200
            assert "<script>" not in page.text
            assert "<b>" not in page.text
