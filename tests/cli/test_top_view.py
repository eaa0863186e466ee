"""What the lines of `headwater top` say, without a terminal and without a server."""

import io
import math
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from headwater.cli.top import view
from headwater.cli.top.actions import FlushChoice
from headwater.cli.top.feed import events
from headwater.cli.top.more import more_lines
from headwater.cli.top.series import Series, quantile_of

TIER = {"free": 60, "tree": 25, "private": 10, "retired": 4, "transfer": 1, "capacity": 100, "page_bytes": 1 << 20}


def snapshot_of(**more: Any) -> dict[str, Any]:
    """What `/dashboard/events` shows of a server with one engine."""
    engine = {
        "up": True,
        "paused": False,
        "tiers": {"device": TIER, "host": TIER | {"capacity": 200, "free": 160}},
        "storage": {"kind": "file", "num_pages": 7, "num_bytes": 7 << 20, "breaker": "closed"},
        "map": {"roots": {"0": {"cache_salt": ""}, "1": {"cache_salt": "acme"}}},
    }
    return {
        "server": {"version": "0.1.0", "model": "tiny", "device": "cpu"},
        "engines": {"0": engine},
        "operations": {},
        "latency": {"ttft": [0.1, 0.5], "itl": [0.01]},
        "sample": {"t": 100_000, "running": 3, "queued": 1, "loading": 0, "parked": 0},
        "log": {},
    } | more


def plain(text: Text) -> str:
    return text.plain


def test_a_bar_has_a_letter_for_every_owner_and_its_width() -> None:
    """A retired page that rounds to nothing would hide what a flush waits for."""
    bar = plain(view.tier_bar({"tree": 500, "private": 0, "retired": 1, "transfer": 1, "free": 498}, 20))
    assert len(bar) == 22
    assert bar.count("x") == bar.count(">") == 1
    assert "=" not in bar
    assert (
        plain(view.tier_bar(dict.fromkeys(("tree", "private", "retired", "transfer", "free"), 0), 10)).count(".") == 0
    )


TROUBLE = {
    "happened": "The redis store fails: it cannot be reached (redis: ConnectionError: Error 111). "
    "Requests are served without it.",
    "todo": "Start the Redis server again, or mend the way to it. This server then finds it by itself.",
    "failing_s": 43,
    "retry_in_s": 12,
}


def broken_store() -> dict[str, Any]:
    """A snapshot of a server whose store fails."""
    found = snapshot_of()
    found["engines"]["0"]["storage"] |= {"kind": "redis", "breaker": "half_open", "trouble": TROUBLE}
    return found


def test_a_store_in_trouble_is_said_in_words_and_in_a_warning_colour() -> None:
    """The breaker's state alone says neither what happened nor what to do; colour alone is lost in monochrome."""
    notice = view.notices(broken_store())
    assert plain(notice).startswith("! WARNING (43 s): The redis store fails: it cannot be reached (redis: Conn")
    assert "Start the Redis server again" in plain(notice)
    assert plain(notice).endswith("Next try in 12 s.")
    assert all("yellow" in str(span.style) for span in notice.spans), "a warning colour"
    assert notice.spans
    (line,) = [line for line in plain(view.tiers(broken_store(), width=78)).splitlines() if line.startswith("store")]
    assert line == "store    redis: 7 pages, 7 MiB, FAILS, breaker half open"


def test_no_notice_without_trouble_and_one_for_engines_that_share_it() -> None:
    assert plain(view.notices(snapshot_of())) == ""
    found = broken_store()
    found["engines"]["1"] = found["engines"]["0"]
    assert plain(view.notices(found)).count("WARNING") == 1
    assert "engine 0" in plain(view.notices(found))


def lines_of(snapshot: dict[str, Any], *, series: Series | None = None, num_lines: int = 10) -> list[str]:
    found = more_lines(snapshot, series or Series(), range_s=60, num_lines=num_lines, width=78)
    return plain(found).splitlines()


def test_where_lines_are_left_copies_tenants_and_pins_are_shown() -> None:
    found = snapshot_of()
    engine = found["engines"]["0"]
    assert lines_of(found) == [], "nothing is copied, cached or pinned"
    engine["copies"] = {"offload": {"in_flight": 2}, "restore": {"in_flight": 0}}
    engine["map"]["roots"] = {
        str(index): {"cache_salt": salt, "num_tokens": tokens}
        for index, (salt, tokens) in enumerate([("acme", 60), ("", 20), ("acme", 10), ("b", 5), ("c", 4), ("d", 1)])
    }
    engine["pins"] = {"pin-1": {"num_tokens": 1200, "ends_in_s": 40}, "pin-2": {"num_tokens": 80, "ends_in_s": 7}}
    series = Series()
    series.push({"t": 1000})
    series.push({"t": 2000, "offload.bytes": 50 << 20, "offload.ms": 250, "persist.bytes": 1 << 20, "persist.ms": 100})
    assert lines_of(found, series=series) == [
        "copies   offload 200 MiB/s (2 now)   persist 10 MiB/s",
        "tenants  acme 70 %   no salt 20 %   b 5 %   c 4 %   and 1 more",
        "pins     2 pins hold 1,280 tokens; the next ends in 7 s",
    ]
    assert len(lines_of(found, num_lines=2)) == 2


def test_engines_stand_side_by_side_and_one_that_is_silent_says_why() -> None:
    found = snapshot_of()
    found["engines"]["0"] |= {"requests": {"running": 3, "queued": 1}, "generation": 7}
    found["engines"]["1"] = {"up": False, "message": "it is silent"}
    assert lines_of(found)[:2] == [
        "engine 0 serving  3 running  1 queued  device 40 %  host 20 %  generation 7",
        "engine 1 ! it is silent",
    ]


def test_tiers_are_summed_over_engines_and_fit_the_width() -> None:
    found = snapshot_of()
    found["engines"]["1"] = found["engines"]["0"]
    found["engines"]["2"] = {"up": False, "message": "silent"}
    assert view.tier_sums(found)["device"]["capacity"] == 200
    lines = plain(view.tiers(found, width=78)).splitlines()
    assert lines[0].startswith("device   [##")
    assert lines[0].endswith(" 40 %  80/200 MiB")
    assert max(map(len, lines)) <= 78
    assert "store    file: 7 pages, 7 MiB, breaker closed" in lines
    assert "2/3 engines" in plain(view.header(found, state="live"))


def test_figures_are_those_of_the_range() -> None:
    series = Series()
    for second in range(101):
        series.push(
            {
                "t": 1000 * second,
                "prompt_tokens": 10 * second,
                "cached_tokens_device": 4 * second,
                "cached_tokens_host": second if second > 90 else 90,
                "generated_tokens": 20 * second,
                **{"ttft.0": second, "ttft.1": second, "ttft.2": second, "itl.0": 0, "itl.1": second},
            }
        )
    text = plain(view.figures(snapshot_of(), series, range_index=0))
    assert "hit rate  41.7 %" in text.replace("   ", "  ")
    assert "device 40.0 %" in text
    assert "host 1.7 %" in text
    assert "p50   50.0 ms" in text.replace("     ", "   ")
    assert "> bounds" in text, "gaps above the last bound have no number"
    assert "20.0 generated" in text
    assert "3 running   1 queued" in text
    assert "PAUSED" not in text
    nothing = plain(view.figures(snapshot_of(), Series(), range_index=2))
    assert "last 1 h" in nothing
    assert "-" in nothing


def test_counts_that_fall_belong_to_a_server_that_was_started_again() -> None:
    series = Series()
    series.load({"t": [1000, 1000, 1000], "n": [50, 10, -55], "late": [-1, 0, 6]})
    assert series.growth("n", 60) == 10 + 5
    assert series.window(1)[-1] == {"t": 3000, "n": 5, "late": 5}
    assert "late" not in series.window(60)[0]
    series.push({"t": 2000, "n": 99})
    assert series.window(60)[-1]["t"] == 3000, "an older sample is left out"


def test_quantiles_are_prometheus() -> None:
    assert quantile_of([0, 10, 10], 0.5, [1.0, 2.0]) == pytest.approx(1.5)
    assert quantile_of([10, 10, 20], 0.9, [1.0, 2.0]) == math.inf
    assert math.isnan(quantile_of([0, 0, 0], 0.5, [1.0, 2.0]))


def test_pending_operations_say_what_is_in_the_way() -> None:
    entry = {"kind": "flush_cache", "phase": "waiting", "remaining_s": 7.6, "blockers": {"running": 2}, "ranks": [0]}
    shown = plain(view.operations(snapshot_of(operations={"a": entry}), width=78))
    assert shown == "pending  flush cache: 8 s left, in the way: 2 running requests"
    several = view.operation_line(entry | {"remaining_s": -1, "ranks": [0, 1], "blockers": {}})
    assert several == "flush cache on 2 engines: no deadline, in the way: nothing"


def test_the_newest_events_are_at_the_bottom() -> None:
    log = {str(n): {"t": 1000 * n, "rank": 0, "level": "info", "text": f"event {n}"} for n in (2, 10, 9)}
    log["11"] = {"t": 11_000, "rank": 0, "level": "warning", "text": "does not answer"}
    lines = plain(view.log_lines(snapshot_of(log=log), num_lines=3, width=40)).splitlines()
    assert [line[11:] for line in lines] == ["event 9", "event 10", "does not answer"]
    assert " ! " in lines[2]


def test_without_colour_nothing_is_lost() -> None:
    """Owners have letters, so a monochrome terminal shows what a coloured one does."""
    out = io.StringIO()
    Console(file=out, no_color=True, color_system=None, width=80).print(view.tiers(snapshot_of(), width=78))
    assert {"#", "=", "x", ">", "."} <= set(out.getvalue())


def test_the_form_of_a_flush() -> None:
    choice = FlushChoice(there=view.tier_names(snapshot_of()), salts=("acme",))
    assert choice.tier_choices == [
        ("device", "host"), ("device",), ("host",), ("storage",), ("device", "host", "storage"),
    ]  # fmt: skip
    assert FlushChoice().tier_choices == [("device",)], "a tier that a server lacks is refused"
    assert choice.body() == {"mode": "idle", "tiers": ["device", "host"], "timeout": 10}
    for key in ("m", "m", "t", "plus", "s", "x"):
        choice = choice.turned(key)
    assert choice.body() == {"mode": "drain", "tiers": ["device"], "timeout": 30, "cache_salt": "acme"}
    assert choice.turned("s").salt is None
    assert FlushChoice().turned("h").body()["hold"] is True
    assert "hold" not in FlushChoice().turned("h").turned("m").body()
    assert "timeout" not in FlushChoice().turned("m").body(), "now does not wait"


def test_events_of_a_stream() -> None:
    lines = [
        b": hi\n",
        b"\n",
        b"event: whole\n",
        b'data: {"a": 1}\n',
        b"\n",
        b"event: patch\r\n",
        b"data: {}\r\n",
        b"\r\n",
    ]
    assert list(events(lines)) == [("whole", {"a": 1}), ("patch", {})]
