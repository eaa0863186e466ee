"""The operating page of a server with two engines and a host tier: engines side by side, a store from the page."""

import re

import httpx
import pytest
from api_under_test import served
from axe import serious_faults
from browser import chromium, opened
from loop_engines import loop_engines, prompt_of
from playwright.sync_api import Locator, expect

pytestmark = pytest.mark.slow
SOON_MS = 60_000


def cells(row: Locator) -> list[str]:
    return row.locator("th, td").all_inner_texts()


def test_engines_stand_side_by_side_and_take_a_store_from_the_page(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A store that one engine alone has, or an engine that is silent and looks like the others, would be missed."""
    folder = tmp_path_factory.mktemp("engines")
    with (
        loop_engines(folder, count=2, num_host_pages=64) as engines,
        served(*engines) as (url, _),
        chromium() as browser,
        opened(browser, url) as page,
    ):
        rows, status = page.locator("#engines tbody tr"), page.locator("#status")
        expect(status).to_have_text("Serving", timeout=SOON_MS)
        expect(rows).to_have_count(2)
        assert [cells(rows.nth(index))[:2] for index in (0, 1)] == [["0", "serving"], ["1", "serving"]]

        page.locator("#store-kind").select_option("memory")
        page.locator("#store-size").fill("1MiB")
        page.get_by_role("button", name="Attach a store").click()
        expect(page.locator("#copies .outcome")).to_contain_text("attached", timeout=SOON_MS)
        expect(page.locator("#copies .facts")).to_contain_text("memory", timeout=SOON_MS)
        found = httpx.get(f"{url}/hicache/storage-backend").json()["engines"]
        assert [engine["kind"] for engine in found] == ["memory", "memory"]

        for name in range(4):
            body = {"input_ids": prompt_of(name), "sampling_params": {"max_new_tokens": 2, "ignore_eos": True}}
            httpx.post(f"{url}/generate", json=body, timeout=60).raise_for_status()
        expect(page.locator("#storage-stored")).to_have_text(re.compile("[1-9]"), timeout=SOON_MS)
        expect(page.locator("#tiers h3").last).to_have_text("Storage (memory) · 1.0 MiB")
        assert serious_faults(page) == []
        offload = page.locator("#copies tbody tr").filter(has_text="offload")
        expect(offload.locator("td").nth(1)).not_to_have_text("0 B", timeout=SOON_MS)

        page.get_by_role("button", name="Detach the store").click()
        expect(page.locator("#copies .outcome")).to_contain_text("detached", timeout=SOON_MS)
        expect(page.get_by_role("button", name="Attach a store")).to_be_visible(timeout=SOON_MS)

        expect(page.locator("#storage-stored")).to_have_count(0)
        engines[1].freeze()
        expect(status).to_have_text("1 of 2 engines do not answer", timeout=SOON_MS)
        assert cells(rows.nth(0))[1] == "serving"
        assert cells(rows.nth(1))[2] == "–", "an old number would look like a new one"
        engines[1].thaw()
        expect(status).to_have_text("Serving", timeout=SOON_MS)
