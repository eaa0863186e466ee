"""Takes the pictures of the operating page for the documentation: a server of the default model under mixed chats.

Needs Chromium and the extra `dev`. The pictures differ from run to run, as the traffic does.
"""

import argparse
import random
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

sys.path.append(str(Path(__file__).resolve().parents[1] / "serving"))
from server_process import ServerProcess

PICTURES = Path(__file__).resolve().parents[2] / "docs" / "pictures"
NUM_COLOURS = 256
COMMAND = (
    "-m headwater serve --port {port} --enable-hierarchical-cache --max-total-tokens 5000 --hicache-ratio 3 "
    "--hicache-storage-backend file --hicache-storage-dir STORE --hicache-storage-size 2"
)
SYSTEMS = (
    "You are a patient teacher of mathematics. Explain every step slowly, and use examples from daily life. " * 3,
    "You answer questions about the public library of a small town. It is open from nine to five. " * 4,
    "Rewrite what the user says in plain English, and keep all names as they are. " * 3,
)
SALTS = ("", "acme", "birch", "cedar")
NUM_CHATTING = 3
SIZES = {"light": (1280, 1000), "dark": (1280, 1000), "phone": (390, 844)}


def chat(url: str, seed: int, ended: threading.Event) -> None:
    """Conversations of several tenants that return now and then, so that some of their pages are on the host."""
    rng, chats = random.Random(seed), {}
    while not ended.is_set():
        name = (rng.randrange(3), SALTS[min(3, int(rng.expovariate(1.1)))], rng.randrange(8))
        messages = chats.setdefault(name, [{"role": "system", "content": SYSTEMS[name[0]]}])
        if len(messages) > 8:
            del messages[1:]
        messages.append({"role": "user", "content": f"Question {rng.randrange(999)}: what about {rng.randrange(99)}?"})
        body: dict[str, Any] = {"model": "default", "messages": messages, "max_tokens": rng.randrange(10, 50)}
        if name[1]:
            body["cache_salt"] = name[1]
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120, trust_env=False).json()
        messages.append(answer["choices"][0]["message"])
        ended.wait(rng.random())


def shown(page: Page) -> None:
    """A node is selected, one is pinned, and a dry run marks a tenant."""
    page.locator("#pause").wait_for()
    page.locator("#tenants tbody tr").nth(2).wait_for(timeout=60_000)
    page.locator(".tile:not(.root)").first.click()
    if not page.locator("#pins li").count():
        page.get_by_role("button", name="Pin", exact=True).click()
        page.locator("#pins li").wait_for()
    page.locator("#flush-scope").select_option(label="Salt acme")
    page.get_by_role("button", name="Dry run").click()
    page.get_by_role("button", name="Flush now").wait_for()
    page.wait_for_timeout(1500)


def take(browser: Browser, url: str, name: str) -> None:
    width, height = SIZES[name]
    tab = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if name == "dark" else "light",
        reduced_motion="reduce",
    )
    page = tab.new_page()
    page.goto(f"{url}/dashboard")
    shown(page)
    if name == "phone":
        page.locator("#prefixes-title").scroll_into_view_if_needed()
        page.evaluate("window.scrollTo(0, document.querySelector('#prefixes').offsetTop - 12)")
    path = PICTURES / f"dashboard-{name}.png"
    if name == "phone":
        page.screenshot(path=path)
    else:  # down to the map and the flush
        bottom = page.evaluate("document.querySelector('#flush').getBoundingClientRect().bottom + window.scrollY")
        page.screenshot(path=path, full_page=True, clip={"x": 0, "y": 0, "width": width, "height": bottom + 14})
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(NUM_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path, path.stat().st_size)
    tab.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=150, help="of traffic before the first picture")
    args = parser.parse_args()
    ended = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        command = f"{sys.executable} {COMMAND}".replace("STORE", f"{folder}/store")
        server = ServerProcess(command, environment={}, model="default", extra={}, log=Path(folder) / "log")
        try:
            server.wait_until_answering(120)
            url = server.target.url
            for seed in range(NUM_CHATTING):
                threading.Thread(target=chat, args=(url, seed, ended), daemon=True).start()
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
                watching = browser.new_page()  # the history of the charts is that of open pages
                watching.goto(f"{url}/dashboard")
                watching.wait_for_timeout(600 * args.seconds)
                httpx.post(f"{url}/flush_cache?mode=now&cache_salt=birch", trust_env=False)
                watching.wait_for_timeout(400 * args.seconds)
                for name in SIZES:
                    take(browser, url, name)
                browser.close()
        finally:
            ended.set()
            time.sleep(1)
            server.stop()


if __name__ == "__main__":
    main()
