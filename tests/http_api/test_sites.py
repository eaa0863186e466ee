"""No web page of another site uses the server through its visitor's browser; programs notice nothing."""

import pytest
from api_under_test import api, error_of, saying
from fastapi.routing import APIRoute
from starlette.datastructures import Headers

from headwater.http_api.app import ROUTERS
from headwater.http_api.middleware import MAX_LOGGED
from headwater.http_api.sites import CHANGING_BY_GET, SitePolicy, host_name, is_loopback
from headwater.messages.control import FlushCache
from headwater.messages.generation import Generate
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio
LOCAL = SitePolicy.of_server("127.0.0.1", has_api_key=False)
EVIL = "https://evil.example"
ROUTES = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
# GET routes that read: a new one has to be put here or in CHANGING_BY_GET
READING = {
    "/v1/models",
    "/get_kv_event_sources",
    "/kv_event_sources",
    "/v1/models/{model_id:path}",
    "/v1/responses/{response_id}",
    "/v1/responses/{response_id}/input_items",
    "/api/tags",
    "/api/ps",
    "/api/version",
    "/control/operations",
    "/control/blockers",
    "/get_weights_by_name",
    "/cache",
    "/cache/tree",
    "/cache/pins",
    "/hicache/storage-backend",
    "/health",
    "/ping",
    "/ready",
    "/model_info",
    "/get_model_info",
    "/get_weight_version",
    "/get_world_size",
    "/is_sleeping",
    "/server_info",
    "/get_server_info",
    "/v1/loads",
    "/get_load",
    "/metrics",
    "/",
    "/docs",
    "/docs/{name}",
    "/dashboard",
    "/dashboard/files/{path:path}",
    "/dashboard/snapshot",
    "/dashboard/node",
}


def refused(method: str, path: str, policy: SitePolicy = LOCAL, **headers: str) -> str | None:
    """The code of the refusal."""
    given = {"host": "127.0.0.1:30000"} | {name.replace("_", "-"): value for name, value in headers.items()}
    refusal = policy.refusal(method, path, Headers(given))
    return None if refusal is None else str(refusal.code)


def test_every_get_route_is_known_as_reading_or_changing() -> None:
    paths = {route.path for route in ROUTES if "GET" in route.methods}
    assert paths - CHANGING_BY_GET == READING


def test_every_route_that_changes_or_costs_is_guarded_however_it_is_called() -> None:
    for route in ROUTES:
        for method in route.methods - {"HEAD"}:
            is_reading = method == "GET" and route.path in READING
            for path in (route.path, route.path.rstrip("/") + "/"):
                expected = None if is_reading else "cross_site"
                assert refused(method, path, origin=EVIL) == expected, (method, path)
                assert refused(method, path, sec_fetch_site="cross-site") == expected, (method, path)


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": EVIL},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:3000"},  # another port is another origin
        {"origin": "http://localhost:30000"},
        {"origin": "http://["},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
        {"sec_fetch_site": "unknown"},
        {"sec_fetch_site": "cross-site", "origin": "http://127.0.0.1:30000"},
        {"referer": f"{EVIL}/page"},  # an image of an old browser, or of a server without TLS
    ],
)
def test_what_a_foreign_page_sends_is_refused(headers: dict[str, str]) -> None:
    assert refused("POST", "/generate", **headers) == "cross_site"
    assert refused("GET", "/flush_cache", **headers) == "cross_site"
    assert refused("OPTIONS", "/generate", **headers) is None, "a preflight changes nothing"


@pytest.mark.parametrize(
    "headers",
    [
        {},  # curl, SDKs
        {"user_agent": "Mozilla/5.0"},
        {"sec_fetch_site": "none"},  # typed into the address bar
        {"sec_fetch_site": "same-origin", "origin": "http://127.0.0.1:30000"},
        {"sec_fetch_site": "same-origin", "origin": "https://chat.example"},  # a proxy that changes the host
        {"origin": "http://127.0.0.1:30000"},
        {"origin": "HTTP://127.0.0.1:30000"},
        {"origin": "https://chat.example", "x_forwarded_host": "chat.example"},
        {"origin": "https://chat.example", "x_forwarded_host": "chat.example:443"},
        {"referer": "http://127.0.0.1:30000/docs"},
    ],
)
def test_programs_and_own_pages_notice_nothing(headers: dict[str, str]) -> None:
    assert refused("POST", "/generate", **headers) is None
    assert refused("GET", "/flush_cache", **headers) is None


@pytest.mark.parametrize("origins", [(EVIL,), (f"{EVIL}/",), ("HTTPS://EVIL.example", "http://other"), ("*",)])
def test_allowed_origins_pass(origins: tuple[str, ...]) -> None:
    policy = SitePolicy.of_server("127.0.0.1", has_api_key=False, origins=origins)
    assert refused("POST", "/generate", policy, origin=EVIL, sec_fetch_site="cross-site") is None
    expected = None if "*" in origins else "cross_site"
    assert refused("POST", "/generate", policy, origin="https://worse.example") == expected


OWN_HOSTS = [
    "127.0.0.1:30000",
    "127.9.9.9",
    "localhost",
    "LOCALHOST:30000",
    "localhost.:30000",
    "app.localhost:30000",
    "[::1]:30000",
    "192.168.1.7:30000",
    "host.docker.internal:30000",
    "",
]
FOREIGN_HOSTS = ["evil.example", "evil.example:30000", "localhost.evil.example", "127.0.0.1.evil.example", "evil"]


@pytest.mark.parametrize("host", OWN_HOSTS)
def test_own_names_and_addresses_pass(host: str) -> None:
    assert refused("POST", "/generate", host=host) is None


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_a_rebound_name_reaches_nothing_but_probes(host: str) -> None:
    """The browser calls such a page same-origin: it could read the answers, too."""
    page = {"host": host, "origin": f"http://{host}", "sec_fetch_site": "same-origin"}
    for method, path in (("POST", "/generate"), ("GET", "/flush_cache"), ("GET", "/cache/tree"), ("GET", "/")):
        assert refused(method, path, **page) == "foreign_host", path
    assert refused("GET", "/health", **page) is None
    assert refused("GET", "/metrics", **page) is None


@pytest.mark.parametrize(
    ("host", "has_api_key", "hosts", "is_checked"),
    [
        ("127.0.0.1", False, (), True),
        ("localhost", False, (), True),
        ("::1", False, (), True),
        ("127.0.0.1", True, (), False),  # a page has no key
        ("0.0.0.0", False, (), False),  # behind a service, a proxy: any name
        ("10.0.0.5", False, (), False),
        ("0.0.0.0", False, ("gpu.example",), True),
        ("127.0.0.1", True, ("gpu.example",), True),
    ],
)
def test_names_are_checked_where_rebinding_threatens(host, has_api_key, hosts, is_checked) -> None:
    policy = SitePolicy.of_server(host, has_api_key=has_api_key, hosts=hosts)
    assert policy.checks_host is is_checked
    assert (refused("POST", "/generate", policy, host="evil.example") == "foreign_host") is is_checked
    for name in hosts:
        assert refused("POST", "/generate", policy, host=f"{name}:443") is None


def test_any_name_can_be_allowed() -> None:
    policy = SitePolicy.of_server("127.0.0.1", has_api_key=False, hosts=("*",))
    assert refused("POST", "/generate", policy, host="evil.example") is None


def test_names_in_host_headers() -> None:
    assert [host_name(host) for host in ("[::1]:80", "[::1", "A.b:1", "a.", " a ")] == ["::1", "::1", "a.b", "a", "a"]
    assert [is_loopback(host) for host in ("::1", "127.1.2.3", "0.0.0.0", "gpu")] == [True, True, False, False]


async def test_head_is_where_get_is_and_changes_nothing(engine: ScriptedEngine) -> None:
    """Proxies, monitors and `curl -I` ask so."""
    async with api(engine) as server:
        for path in READING - {"/docs/{name}", "/v1/models/{model_id:path}", "/get_weights_by_name"}:
            got, head = await server.http.get(path), await server.http.head(path)
            assert (head.status_code, head.content) == (got.status_code, b""), path
            assert head.headers.get("content-type") == got.headers.get("content-type"), path
        for path in CHANGING_BY_GET:
            assert (await server.http.head(path)).status_code == 405, path
    assert not engine.of_type(FlushCache)


async def test_the_refusal_says_what_to_do_and_nothing_reaches_the_engine(engine: ScriptedEngine) -> None:
    async with api(engine, sites=LOCAL) as server:
        server.http.headers["host"] = "127.0.0.1"
        for path, body in (("/generate", '{"text": "a"}'), ("/flush_cache", "")):
            headers = {"origin": EVIL, "content-type": "text/plain"}
            response = await server.http.post(path, content=body, headers=headers)
            assert (response.status_code, error_of(response)["code"]) == (403, "cross_site")
            assert EVIL in response.text
            assert "--allowed-origin" in response.text
            assert "access-control-allow-origin" not in response.headers
        response = await server.http.get("/cache", headers={"host": "evil.example"})
        assert (response.status_code, error_of(response)["code"]) == (403, "foreign_host")
        assert "--allowed-host" in response.text
        assert (await server.http.get("/v1/models", headers={"origin": EVIL})).status_code == 200
    assert not engine.of_type(Generate)
    assert not engine.of_type(FlushCache)


async def test_the_log_says_once_what_would_let_a_page_in(
    engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """A browser asks first, and shows its user hardly more than that it failed."""
    asked = {"origin": "http://localhost:3000", "access-control-request-method": "POST"}
    async with api(engine, sites=LOCAL) as server:
        server.http.headers["host"] = "127.0.0.1"
        for _ in range(3):
            await server.http.request("OPTIONS", "/v1/chat/completions", headers=asked)
        (record,) = caplog.records
        assert "http://localhost:3000" in record.getMessage()
        assert "--allowed-origin" in record.getMessage()
        for number in range(100):
            await server.http.post("/generate", headers={"origin": f"http://{number}.example"})
        assert len(caplog.records) == MAX_LOGGED
        assert max(len(record.getMessage()) for record in caplog.records) < 500


async def test_an_allowed_page_gets_what_its_browser_asks_for(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("yes")
    policy = SitePolicy.of_server("127.0.0.1", has_api_key=True, origins=("https://chat.example",))
    async with api(engine, sites=policy, api_key="key") as server:
        page = {"origin": "https://chat.example", "sec-fetch-site": "cross-site"}
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        preflight = await server.http.request("OPTIONS", "/v1/chat/completions", headers=page | asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://chat.example"
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        for key, status in (("Bearer key", 200), ("", 401)):
            body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
            headers = page | {"authorization": key}
            response = await server.http.post("/v1/chat/completions", json=body, headers=headers)
            assert response.status_code == status
            assert response.headers["access-control-allow-origin"] == "https://chat.example", "errors are read, too"
        other = await server.http.request("OPTIONS", "/generate", headers=asked | {"origin": EVIL})
        assert "access-control-allow-origin" not in other.headers
