"""`headwater top` in a terminal of 80 x 24, driven by keys, against a server by script."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from click.testing import CliRunner
from scripted_http import HttpScript, scripted_http
from test_top_view import broken_store, snapshot_of
from textual.pilot import Pilot
from textual.widgets import Static

from headwater.cli.server_call import Server
from headwater.cli.top import feed
from headwater.cli.top.app import TopApp
from headwater.cli.top.command import top

LIMIT_S = 60.0
OPERATION = {"kind": "flush_cache", "phase": "waiting", "remaining_s": 8, "blockers": {"running": 2}, "ranks": [0]}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpScript]:
    """The events end at once; the app then connects again."""
    monkeypatch.setattr(feed, "AGAIN_S", 0.2)
    with scripted_http() as script:
        show(script, snapshot_of())
        yield script


def show(script: HttpScript, snapshot: Any, *patches: Any) -> None:
    text = f"event: whole\ndata: {json.dumps({'snapshot': snapshot, 'history': {}})}\n\n"
    text += "".join(f"event: patch\ndata: {json.dumps(patch)}\n\n" for patch in patches)
    script.answer("/dashboard/events", text)


def screen_of(app: TopApp) -> str:
    """All texts of the main screen and of the dialog above it."""
    found = []
    for screen in app.screen_stack:
        for widget in screen.query(Static):
            visual = widget.visual
            found.append(str(getattr(visual, "_renderable", visual)))
    return "\n".join(found)


async def until(pilot: Pilot[None], condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await pilot.pause(0.02)


def drive(script: HttpScript, steps: Callable[[Pilot[None], TopApp], Awaitable[None]], **size: int) -> None:
    async def run() -> None:
        app = TopApp(Server(script.url, key="admin"))
        async with app.run_test(size=(size.get("width", 80), size.get("height", 24))) as pilot:
            await until(pilot, lambda: "0.1.0" in screen_of(app))
            await steps(pilot, app)

    asyncio.run(run())


def test_one_screen_shows_it_all_and_follows_the_differences(script: HttpScript) -> None:
    event = {"t": 1000, "rank": 0, "level": "info", "text": "flushed 16 tokens; generation 2"}
    show(script, snapshot_of(), {"sample": {"t": 101_000, "running": 9}, "log": {"1": event}})

    async def steps(pilot: Pilot[None], app: TopApp) -> None:
        await until(pilot, lambda: "9 running" in screen_of(app))
        text = screen_of(app)
        for part in ("tiny", "device   [", "host     [", "hit rate", "TTFT", "ITL", "pending  none", "generation 2"):
            assert part in text
        drawn = [region for region in (widget.region for widget in app.screen.query(Static)) if region.height]
        assert max(region.bottom for region in drawn) <= 23, "the keys need the last of 24 lines"
        assert app.screen.query_one("#log").size.height >= 3
        await pilot.press("r")
        assert "last 5 min" in screen_of(app)

    drive(script, steps)
    assert script.to("/dashboard/events")[0].key == "Bearer admin"


def test_a_flush_is_shown_before_it_is_made(script: HttpScript) -> None:
    script.answer("/flush_cache", "Would free on device: 25 pages, 25.0 MiB. Waited 0.000 s.\n")

    async def steps(pilot: Pilot[None], app: TopApp) -> None:
        await pilot.press("f", "y")
        box = app.screen.query_one("Vertical").region
        assert 0 < box.x < box.right < 80, "a box in the middle"
        assert box.height < 14
        assert not script.to("/flush_cache"), "not without a dry run"
        await pilot.press("m", "s", "enter")
        await until(pilot, lambda: "Would free" in screen_of(app))
        assert script.to("/flush_cache")[0].body == {
            "mode": "now", "tiers": ["device", "host"], "cache_salt": "acme", "dry_run": True,
        }  # fmt: skip
        await pilot.press("t", "y")
        await pilot.pause()
        assert len(script.to("/flush_cache")) == 1, "another form needs another dry run"
        await pilot.press("enter")
        await until(pilot, lambda: "y: flush now" in screen_of(app))
        script.answer("/flush_cache", "Cache flushed. Freed on device: 25 pages, 25.0 MiB.\n")
        await pilot.press("y")
        await until(pilot, lambda: "Cache flushed." in screen_of(app))
        assert script.to("/flush_cache")[-1].body == {"mode": "now", "tiers": ["device"], "cache_salt": "acme"}

    drive(script, steps)


def test_escape_leaves_everything_as_it_is(script: HttpScript) -> None:
    script.answer("/flush_cache", "Would free on device: 25 pages.\n")

    async def steps(pilot: Pilot[None], app: TopApp) -> None:
        await pilot.press("f", "enter")
        await until(pilot, lambda: "y: flush now" in screen_of(app))
        await pilot.press("escape", "p", "escape", "question_mark")
        assert "q       quit" in screen_of(app)
        await pilot.press("escape")
        assert len(app.screen_stack) == 1

    drive(script, steps)
    assert [request.path for request in script.received if request.path != "/dashboard/events"] == ["/flush_cache"]


def test_pause_asks_and_continue_does_not(script: HttpScript) -> None:
    script.answer("/pause_generation", {"num_requests": 2})
    script.answer("/continue_generation", {})

    async def steps(pilot: Pilot[None], app: TopApp) -> None:
        await pilot.press("p", "y")
        await until(pilot, lambda: "Paused." in screen_of(app))
        paused = snapshot_of()
        paused["engines"]["0"]["paused"] = True
        show(script, paused)
        await until(pilot, lambda: "PAUSED" in screen_of(app))
        await pilot.press("p")
        await until(pilot, lambda: "goes on" in screen_of(app))

    drive(script, steps)
    assert script.to("/pause_generation")[0].body == {"mode": "retract"}
    assert len(script.to("/continue_generation")) == 1


def test_an_operation_is_cancelled_by_its_number(script: HttpScript) -> None:
    script.answer("/control/operations/7%400", {})

    async def steps(pilot: Pilot[None], app: TopApp) -> None:
        await pilot.press("c")
        assert "No operation is pending." in screen_of(app)
        show(script, snapshot_of(operations={"7@0": OPERATION}))
        await until(pilot, lambda: "8 s left" in screen_of(app))
        await pilot.press("c", "1")
        await until(pilot, lambda: "Cancelled." in screen_of(app))

    drive(script, steps)
    assert [request.method for request in script.to("/control/operations/7%400")] == ["DELETE"]


def test_a_refusal_is_the_servers_sentence(script: HttpScript) -> None:
    script.answer("/flush_cache", {"error": {"message": "needs the admin key"}}, status=403)

    async def steps(pilot: Pilot[None], app: TopApp) -> None:
        await pilot.press("f", "enter")
        await until(pilot, lambda: "needs the admin key" in screen_of(app))
        assert "y: flush now" not in screen_of(app)
        await pilot.press("y", "escape")

    drive(script, steps)
    assert len(script.to("/flush_cache")) == 1


def test_a_server_that_leaves_and_returns(script: HttpScript) -> None:
    async def steps(pilot: Pilot[None], app: TopApp) -> None:
        script.answer("/dashboard/events", {"error": {"message": "the engine is gone"}}, status=503)
        await until(pilot, lambda: "The server answered 503: the engine is gone" in screen_of(app))
        assert "NOT LIVE" in screen_of(app)
        assert "device   [" in screen_of(app), "the last figures stay"
        show(script, snapshot_of())  # the script's events end at once, so it is live for a moment only
        await until(pilot, lambda: "the engine is gone" not in screen_of(app))
        await until(pilot, lambda: "The server ended the stream." in screen_of(app))

    drive(script, steps, width=120, height=40)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [((), "needs a terminal"), (("--url", "nowhere"), "nowhere is not an address like")],
)
def test_what_cannot_be_shown_is_a_sentence(arguments: tuple[str, ...], says: str) -> None:
    done = CliRunner().invoke(top, list(arguments))
    assert done.exit_code in (1, 2)
    assert says in done.output
    assert "Traceback" not in done.output


def test_a_small_terminal_has_all_keys(script: HttpScript) -> None:
    async def steps(pilot: Pilot[None], app: TopApp) -> None:
        await pilot.resize_terminal(60, 18)
        await pilot.press("f")
        assert "Enter: dry run" in screen_of(app)
        await pilot.press("escape", "q")

    drive(script, steps)


def test_a_broken_store_is_on_the_screen_until_it_is_back(script: HttpScript) -> None:
    """The warning takes lines from the log, not from the keys and not from the figures."""
    show(script, broken_store())

    async def steps(pilot: Pilot[None], app: TopApp) -> None:
        await until(pilot, lambda: "WARNING (43 s)" in screen_of(app))
        await until(pilot, lambda: app.screen.query_one("#notices").region.height == 4)
        drawn = {widget.id: widget.region for widget in app.screen.query(Static) if widget.region.height}
        assert drawn["log"].height >= 2
        assert max(region.bottom for region in drawn.values()) <= 23
        show(script, snapshot_of())
        await until(pilot, lambda: "WARNING" not in screen_of(app) and "breaker closed" in screen_of(app))
        await until(pilot, lambda: app.screen.query_one("#notices").region.height == 0)

    drive(script, steps)


def test_what_the_log_leaves_over_shows_tenants(script: HttpScript) -> None:
    """On 24 lines as well; a warning takes these lines first."""
    well, broken = snapshot_of(), broken_store()
    for found in (well, broken):
        found["engines"]["0"]["map"]["roots"]["1"] |= {"num_tokens": 60}
    show(script, well)

    async def steps(pilot: Pilot[None], app: TopApp) -> None:
        await until(pilot, lambda: "tenants  acme 100 %" in screen_of(app))
        await until(pilot, lambda: app.screen.query_one("#log").size.height >= 3)
        assert app.screen.query_one("#log").region.bottom <= 23
        show(script, broken)
        await until(pilot, lambda: "WARNING (43 s)" in screen_of(app))
        await until(pilot, lambda: app.screen.query_one("#log").region.bottom <= 23)

    drive(script, steps)
