"""A store that breaks under the operating page, in a real browser: a real Redis server, killed and started again."""

import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from api_under_test import served
from axe import serious_faults
from browser import DESKTOP, PHONE, chromium, opened
from loop_engines import loop_engines, prompt_of
from playwright.sync_api import Page, expect

sys.path.append(str(Path(__file__).parents[2] / "storage"))
from redis_server import RedisServer

pytestmark = pytest.mark.slow
SOON_MS = 60_000


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    server = RedisServer()
    server.start()
    yield server
    server.close()


@pytest.fixture
def url(tmp_path_factory: pytest.TempPathFactory, redis: RedisServer) -> Iterator[str]:
    """A server with a host tier, which has the Redis server as its store."""
    with loop_engines(tmp_path_factory.mktemp("engine"), num_host_pages=64) as (engine,), served(engine) as (url, _):
        body = {"hicache_storage_backend": "redis", "url": redis.url}
        httpx.put(f"{url}/hicache/storage-backend", json=body, timeout=60).raise_for_status()
        yield url


def generate(url: str, name: int) -> None:
    body = {"input_ids": prompt_of(name), "sampling_params": {"max_new_tokens": 2, "ignore_eos": True}}
    httpx.post(f"{url}/generate", json=body, timeout=60).raise_for_status()


def state_of_store(page: Page) -> str:
    return page.locator("#copies .facts div").filter(has_text="State").locator("dd").inner_text()


def test_a_redis_server_that_dies_is_a_warning_until_it_is_back(url: str, redis: RedisServer) -> None:
    """What happened, what to do, and that it is over; in both schemes, for axe, and on a phone."""
    generate(url, 1)
    with chromium() as browser, opened(browser, url, viewport=DESKTOP, color_scheme="light") as page:
        notice, status = page.locator("#notices .notice"), page.locator("#status")
        expect(status).to_have_text("Serving", timeout=SOON_MS)
        expect(notice).to_have_count(0)
        assert state_of_store(page) == "works"

        redis.kill()
        expect(notice).to_have_count(1, timeout=SOON_MS)
        generate(url, 2)
        expect(notice).to_contain_text("Warning: the store fails")
        expect(notice).to_contain_text("The redis store fails: it cannot be reached (redis: ConnectionError: Error ")
        expect(notice).to_contain_text("Requests are served without it.")
        expect(notice).to_contain_text("What to do: Start the Redis server again, or mend the way to it.")
        expect(status).to_have_text("Serving, the store fails")
        assert "fails for" in state_of_store(page)
        assert page.locator("#notices[role=alert]").is_visible()
        grounds = {}
        for scheme in ("light", "dark"):
            page.evaluate("(scheme) => { document.documentElement.dataset.scheme = scheme }", scheme)
            held = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--held')")
            grounds[scheme] = page.locator(".notice h2").evaluate("(title) => getComputedStyle(title).color")
            assert held
            assert serious_faults(page) == []
        assert grounds["light"] != grounds["dark"]
        page.set_viewport_size(PHONE)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        page.set_viewport_size(DESKTOP)

        redis.start()
        expect(notice).to_have_count(0, timeout=SOON_MS)
        expect(status).to_have_text("Serving")
        assert state_of_store(page) == "works"
        expect(page.locator("#log li").first).to_contain_text("The store answers again", timeout=SOON_MS)


def test_a_redis_server_that_only_rejects_writes_is_said_to_do_so(url: str, redis: RedisServer) -> None:
    """As one does that cannot save to its disk. The circuit breaker stays closed, since all else succeeds."""
    with redis.client() as client, chromium() as browser, opened(browser, url) as page:
        expect(page.locator("#status")).to_have_text("Serving", timeout=SOON_MS)
        client.config_set("min-replicas-to-write", 1)
        for name in range(10, 14):
            generate(url, name)
            page.wait_for_timeout(300)  # a call of its own for each
        notice = page.locator("#notices .notice")
        expect(notice).to_contain_text("fails in part: pages cannot be written", timeout=SOON_MS)
        expect(notice).to_contain_text("NOREPLICAS")
        client.config_set("min-replicas-to-write", 0)
        generate(url, 20)
        expect(notice).to_have_count(0, timeout=SOON_MS)
