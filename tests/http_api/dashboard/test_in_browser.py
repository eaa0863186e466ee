"""The operating page in a real browser, on a real server and engine loop; only the model is a fake.

One server and one browser for all tests, each test with prompts of its own.
"""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from api_under_test import PLAIN, served
from axe import serious_faults
from browser import DESKTOP, PHONE, chromium, opened
from loop_engines import LoopEngine, loop_engines, prompt_of
from playwright.sync_api import Browser, Page, expect

pytestmark = pytest.mark.slow
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
SOON_MS = 20_000


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopEngine]:
    with loop_engines(tmp_path_factory.mktemp("engine")) as (engine,):
        yield engine


@pytest.fixture(scope="module")
def url(engine: LoopEngine) -> Iterator[str]:
    with served(engine) as (url, _):
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(autouse=True)
def fresh(url: str) -> None:
    """What a test that failed has left behind fails no other."""
    httpx.post(f"{url}/continue_generation", **PLAIN).raise_for_status()
    httpx.post(f"{url}/flush_cache?mode=now", **PLAIN).raise_for_status()


def generate(url: str, prompt: list[int], *, num_tokens: int = 2, **more: Any) -> None:
    body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": num_tokens, "ignore_eos": True}} | more
    httpx.post(f"{url}/generate", json=body, timeout=60, **PLAIN).raise_for_status()


@pytest.fixture
def long_request(engine: LoopEngine, url: str) -> Iterator[Callable[[int], None]]:
    """Begins requests that run for as long as the test does: a minute, since a browser may be tens of seconds late."""
    with ThreadPoolExecutor(4) as pool:

        def begin(count: int) -> None:
            engine.step_s = 0.2
            for index in range(count):
                pool.submit(generate, url, prompt_of(500 + index), num_tokens=330, rid=f"long-{index}")

        yield begin
        httpx.post(f"{url}/abort_request", json={"abort_all": True}, **PLAIN)
        engine.step_s = 0.0


def metrics(url: str) -> dict[str, float]:
    """By name and labels, without the labels that every series has."""
    found = {}
    for line in httpx.get(f"{url}/metrics", **PLAIN).text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            labels = sorted(re.findall(r'(\w+)="([^"]*)"', name))
            kept = ",".join(value for label, value in labels if label not in ("model_name", "dp_rank"))
            found[name.partition("{")[0] + (f"[{kept}]" if kept else "")] = float(value)
    return found


def quantile(before: dict[str, float], after: dict[str, float], name: str, q: float) -> float:
    """As histogram_quantile of Prometheus, over what was observed between two scrapes."""
    bounds = {
        float(found[1]): value - before.get(series, 0.0)
        for series, value in after.items()
        if (found := re.fullmatch(rf"sglang:{name}_seconds_bucket\[(.*)\]", series))
    }
    rank, low, below = q * bounds[float("inf")], 0.0, 0.0
    for bound, count in sorted(bounds.items()):
        if count >= rank:
            return low + (bound - low) * (rank - below) / (count - below)
        low, below = bound, count
    raise AssertionError


def in_seconds(text: str) -> float:
    number, unit = text.split()
    return float(number) / {"ms": 1000, "s": 1}[unit]


def test_the_numbers_are_those_of_metrics_under_load(
    url: str, browser: Browser, engine: LoopEngine, long_request: Callable[[int], None]
) -> None:
    with opened(browser, url) as page:
        expect(page.locator("#status")).to_have_text("Serving", timeout=SOON_MS)
        before = metrics(url)
        engine.step_s = 0.004
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(lambda index: generate(url, prompt_of(index % 4), num_tokens=12), range(12)))
        long_request(3)
        expect(page.locator("#figure-running")).to_have_text("3", timeout=SOON_MS)
        now = metrics(url)
        assert now["sglang:num_running_reqs"] == 3
        expect(page.locator("#device-private")).to_have_text(re.compile(r"[1-9]"), timeout=SOON_MS)
        httpx.post(f"{url}/abort_request", json={"abort_all": True}, **PLAIN)
        expect(page.locator("#figure-running")).to_have_text("0", timeout=SOON_MS)
        now = metrics(url)
        for owner in ("free", "tree", "private", "retired", "transfer"):
            expect(page.locator(f"#device-{owner}")).to_have_text(f"{now[f'headwater_pages[{owner},device]']:,.0f}")
        counts = ("prompt_tokens", "cached_tokens_device")
        prompts, cached = (now[f"headwater_{name}_total"] - before[f"headwater_{name}_total"] for name in counts)
        assert cached > 0
        expect(page.locator("#figure-hit-rate")).to_have_text(f"{100 * cached / prompts:.1f} %", timeout=SOON_MS)
        for kind, name in (("ttft", "time_to_first_token"), ("itl", "inter_token_latency")):
            shown = page.locator(f"#latency .legend:nth-of-type({1 if kind == 'ttft' else 2}) .value").all_inner_texts()
            for text, q in zip(shown, PERCENTILES.values(), strict=True):
                assert in_seconds(text) == pytest.approx(quantile(before, now, name, q), rel=0.06), (kind, q)


def tenant_rows(page: Page) -> list[str]:
    return page.locator("#tenants tbody th").all_inner_texts()


def test_a_dry_run_marks_what_a_flush_then_cuts(url: str, browser: Browser) -> None:
    """And nothing else. The tenant's name is text, whatever it looks like."""
    salt = "<i>birch</i>"
    for name in (21, 22):
        generate(url, prompt_of(20, 20) + prompt_of(name, 20), cache_salt=salt)
    generate(url, prompt_of(23), cache_salt="acme")
    with opened(browser, url) as page:
        expect(page.locator("#tenants tbody")).to_contain_text(salt, timeout=SOON_MS)
        page.locator("#flush-scope").select_option(label=f"Salt {salt}")
        page.get_by_role("button", name="Dry run").click()
        expect(page.locator("#flush .result")).to_contain_text("device: 15 pages freed")
        marked = page.locator(".tile.cut:not(.root)")
        assert marked.count() == 3
        expect(page.locator("#prefixes .cut-note")).to_have_text("The flush would cut 3 nodes on this map.")
        before = metrics(url)["headwater_cache_generation"]
        assert salt in tenant_rows(page), "a dry run changes nothing"
        page.get_by_role("button", name="Flush now").click()
        expect(page.locator("#flush .result")).to_contain_text("Cache flushed. Freed on device: 15 pages")
        assert metrics(url)["headwater_cache_generation"] == before + 1
        expect(page.locator("#tenants tbody")).not_to_contain_text(salt, timeout=SOON_MS)
        assert "acme" in tenant_rows(page)
        assert marked.count() == 0
        expect(page.locator("#log li").first).to_contain_text("Flushed 60 tokens", timeout=SOON_MS)
        assert page.locator("i", has_text="birch").count() == 0


def test_a_flush_that_expires_says_what_was_in_its_way(
    url: str, browser: Browser, long_request: Callable[[int], None]
) -> None:
    long_request(1)
    with opened(browser, url) as page:
        expect(page.locator("#figure-running")).to_have_text("1", timeout=SOON_MS)
        result, operations = page.locator("#flush .result"), page.locator("#control .operations li")
        page.locator("#flush-timeout").fill("2.5")
        page.get_by_role("button", name="Dry run").click()
        expect(result).to_contain_text("It would wait for: 1 running request.")
        page.get_by_role("button", name="Flush now").click()
        expect(page.locator("#flush .progress")).to_contain_text("In the way: 1 running request.")
        expect(operations).to_contain_text("in the way: 1 running request")
        expired = "Timed out waiting for idle state. Not idle: 1 running request."
        expect(result).to_contain_text(expired, timeout=SOON_MS)
        expect(page.locator("#flush .progress")).to_be_hidden()
        expect(operations).to_have_count(0, timeout=SOON_MS)
        page.locator("#flush-timeout").fill("60")
        page.get_by_role("button", name="Dry run").click()
        expect(result).to_contain_text("It would wait for: 1 running request.", timeout=SOON_MS)
        page.get_by_role("button", name="Flush now").click()
        operations.get_by_role("button", name="Cancel").click(timeout=SOON_MS)
        expect(result).to_contain_text("cancelled before the engine was idle; nothing was flushed", ignore_case=True)


def press_until(page: Page, selector: str, *, key: str = "Tab", most: int = 80) -> None:
    """Press a key until an element that fits has the focus, and check that the focus is seen."""
    for _ in range(most):
        page.keyboard.press(key)
        if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
            return
    raise AssertionError(f"{most} times {key} did not reach {selector}")


def test_everything_can_be_done_from_the_keyboard(url: str, browser: Browser) -> None:
    for name in (31, 32):
        generate(url, prompt_of(30, 20) + prompt_of(name, 20), cache_salt="keys")
    with opened(browser, url) as page:
        expect(page.locator("#tenants tbody")).to_contain_text("keys", timeout=SOON_MS)
        press_until(page, ".tile[aria-label^='keys:']")
        page.keyboard.press("ArrowDown")
        press_until(page, ".tile:not(.root)[aria-label*='20 tokens, 0 hits']", key="ArrowRight")
        page.keyboard.press("Enter")
        expect(page.locator("#prefixes .details h3")).to_have_text(re.compile(r"Node \d+"))
        press_until(page, "#flush-selected")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "flush-preview"
        page.keyboard.press("Enter")
        expect(page.locator("#flush .result")).to_contain_text("device: 5 pages freed")
        assert page.locator(".tile.cut:not(.root)").count() == 1
        assert page.evaluate("document.activeElement.id") == "flush-confirm"
        page.keyboard.press("Enter")
        expect(page.locator("#flush .result")).to_contain_text("Cache flushed. Freed on device: 5 pages")
        press_until(page, "#pause")
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text("Paused", timeout=SOON_MS)
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text("Serving", timeout=SOON_MS)


def test_a_prefix_is_pinned_from_the_map_and_the_pin_ended(url: str, browser: Browser) -> None:
    generate(url, prompt_of(41), cache_salt="pinned")
    with opened(browser, url) as page:
        page.locator(".tile[aria-label^='pinned:']").wait_for()
        page.locator(".tile[aria-label^='pinned:'] + .tile").click()
        page.get_by_role("button", name="Pin", exact=True).click()
        expect(page.locator("#prefixes .details .outcome")).to_have_text("Pinned 40 tokens for 3600 s.")
        expect(page.locator("#pins li")).to_contain_text("40 tokens", timeout=SOON_MS)
        page.locator("#pins li button").click()
        expect(page.locator("#pins li")).to_have_count(0, timeout=SOON_MS)
        assert httpx.get(f"{url}/cache/pins", **PLAIN).json() == {"pins": []}


@pytest.mark.parametrize(("scheme", "viewport"), [("light", DESKTOP), ("dark", PHONE)], ids=["light", "dark phone"])
def test_the_page_is_accessible(url: str, browser: Browser, scheme: str, viewport: dict[str, int]) -> None:
    """axe finds no serious fault in either scheme, with a node selected and a dry run shown."""
    generate(url, prompt_of(51), cache_salt="axe")
    with opened(browser, url, viewport=viewport, color_scheme=scheme) as page:
        page.locator(".tile[aria-label^='axe:'] + .tile").click()
        page.get_by_role("button", name="Dry run").click()
        page.get_by_role("button", name="Flush now").wait_for()
        assert page.evaluate("document.documentElement.dataset.scheme") == scheme
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= viewport["width"], "the page is wider than the screen"
        assert serious_faults(page) == []


def test_the_data_asks_for_the_key_and_the_tab_keeps_it(engine: LoopEngine, browser: Browser) -> None:
    with served(engine, api_key="user", admin_api_key="secret") as (url, _), opened(browser, url) as page:
        dialog = page.get_by_role("dialog")
        for key in ("wrong", "user", "secret"):
            expect(dialog).to_be_visible(timeout=SOON_MS)
            dialog.get_by_label("Admin key").fill(key)
            dialog.get_by_role("button").click()
        expect(page.locator("#status")).to_have_text("Serving", timeout=SOON_MS)
        page.get_by_role("button", name="Pause").click()
        expect(page.locator("#status")).to_have_text("Paused", timeout=SOON_MS)
        page.get_by_role("button", name="Continue").click()
        expect(page.locator("#status")).to_have_text("Serving", timeout=SOON_MS)
        page.reload()
        expect(page.locator("#status")).to_have_text("Serving", timeout=SOON_MS)
        assert page.evaluate("localStorage.length") == 0
