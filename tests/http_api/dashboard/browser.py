"""Chromium for the tests of the page: the system's own, driven by playwright."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@contextmanager
def chromium() -> Iterator[Browser]:
    """Without Chromium a test is skipped; in CI, which installs it, that is an error."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        reason = "no Chromium is installed (apt-get install chromium)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        # a container has no user namespaces for its sandbox; the only pages here are ours
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, url: str, *, viewport: Any = DESKTOP, **context: Any) -> Iterator[Page]:
    """The operating page in a tab of its own. Fails if the browser reports an error, or a request to elsewhere."""
    tab = browser.new_context(viewport=viewport, reduced_motion="reduce", **context)
    page = tab.new_page()
    page.set_default_timeout(20_000)
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith((url, "data:")) else errors.append(request.url))
    page.goto(f"{url}/dashboard")
    try:
        yield page
    finally:
        tab.close()
    expected = "the server responded with a status of"  # a refusal, which the page shows in words
    assert not [text for text in errors if expected not in text], errors
