"""The screen's texts out of a snapshot. Pure functions; every owner has a letter, so no colour is needed."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from headwater.cli.top.series import Series
from headwater.messages.blocker_words import blockers_in_words

Json = Mapping[str, Any]
OWNERS = (  # owner, letter, style, word
    ("tree", "#", "green", "cached"),
    ("private", "=", "cyan", "private"),
    ("retired", "x", "red", "retired"),
    ("transfer", ">", "yellow", "arriving"),
    ("free", ".", "dim", "free"),
)
RANGES = ((60, "1 min"), (300, "5 min"), (3600, "1 h"))
TIERS = ("device", "host", "storage")
MIB = 1 << 20
LABEL = 9
WARNING = "bold yellow"  # beside a mark or a word: a monochrome terminal shows it too
FIGURES_WIDTH = 30  # behind a tier's bar


def header(snapshot: Json, *, state: str, reason: str = "") -> Text:
    """One line, and below it the whole reason why the screen is not live."""
    server = snapshot.get("server", {})
    engines = snapshot.get("engines", {})
    up = sum(bool(engine.get("up")) for engine in engines.values())
    words = [f"Headwater {server.get('version', '')}", str(server.get("model", "no model")), server.get("device", "")]
    words += [f"{up}/{len(engines)} engines", state]
    return Text("  ".join(word for word in words if word) + ("\n" + reason if reason else ""), style="bold")


def notices(snapshot: Json) -> Text:
    """What happened to a store in trouble and what to do; empty if all is well."""
    found: dict[str, Text] = {}
    for rank, engine in snapshot.get("engines", {}).items():
        if trouble := store_trouble(engine):
            where = f"engine {rank}, " if len(snapshot["engines"]) > 1 else ""
            again_s = trouble["retry_in_s"]
            again = f" Next try in {again_s} s." if again_s else ""
            words = f"! WARNING ({where}{trouble['failing_s']} s): {trouble['happened']} {trouble['todo']}{again}"
            found.setdefault(trouble["happened"], Text(words, style=WARNING))
    return _stack(list(found.values()))


def store_trouble(engine: Json) -> Json:
    """What the server says of the engine's store if it fails; empty if it does not."""
    found: Json = (engine.get("storage") or {}).get("trouble") or {}
    return found


def tiers(snapshot: Json, *, width: int) -> Text:
    """A bar for each tier, over all engines, and the legend."""
    lines = []
    for name, owners in tier_sums(snapshot).items():
        bar = tier_bar(owners, max(8, width - LABEL - FIGURES_WIDTH))
        capacity = max(1, owners["capacity"])
        used = capacity - owners["free"]
        size = f"{used * owners['page_bytes'] / MIB:,.0f}/{capacity * owners['page_bytes'] / MIB:,.0f} MiB"
        lines.append(Text(f"{name:<{LABEL}}") + bar + Text(f" {100 * used / capacity:3.0f} %  {size}"))
    with_store = [engine for engine in snapshot.get("engines", {}).values() if engine.get("storage")]
    if with_store:
        lines.append(_store_line(next(filter(store_trouble, with_store), with_store[0])))
    legend = Text(" " * LABEL)
    for _, letter, style, word in OWNERS:
        legend += Text(letter, style=style) + Text(f" {word}  ")
    return _stack([*lines, legend])


def _store_line(engine: Json) -> Text:
    store, is_bad = engine["storage"], bool(store_trouble(engine))
    size = f"{store.get('num_pages', 0):,} pages, {store.get('num_bytes', 0) / MIB:,.0f} MiB"
    state = ("FAILS, " if is_bad else "") + f"breaker {store.get('breaker', '').replace('_', ' ')}"
    return Text(f"{'store':<{LABEL}}{store['kind']}: {size}, {state}", style=WARNING if is_bad else "")


def tier_sums(snapshot: Json) -> dict[str, dict[str, int]]:
    """Pages by owner of each tier, over all engines that answer."""
    sums: dict[str, dict[str, int]] = {}
    for engine in snapshot.get("engines", {}).values():
        for name, tier in (engine.get("tiers") or {}).items():
            found = sums.setdefault(name, dict.fromkeys([*(owner for owner, *_ in OWNERS), "capacity"], 0))
            for key in found:
                if key != "page_bytes":
                    found[key] += tier.get(key, 0)
            found["page_bytes"] = tier.get("page_bytes", 0)
    return sums


def tier_bar(owners: Mapping[str, int], width: int) -> Text:
    """Each owner's share in letters. An owner with any page has a letter at least."""
    total = max(1, sum(owners[owner] for owner, *_ in OWNERS))
    cells = {owner: max(owners[owner] > 0, round(width * owners[owner] / total)) for owner, *_ in OWNERS}
    while sum(cells.values()) > width:
        cells[max(cells, key=lambda owner: cells[owner])] -= 1
    while sum(cells.values()) < width:
        cells[max(cells, key=lambda owner: owners[owner])] += 1
    bar = Text("[")
    for owner, letter, style, _ in OWNERS:
        bar += Text(letter * cells[owner], style=style)
    return bar + Text("]")


def figures(snapshot: Json, series: Series, *, range_index: int) -> Text:
    """Hit rate, latencies, throughput and requests over the range."""
    range_s, range_words = RANGES[range_index]
    prompt = series.growth("prompt_tokens", range_s)
    found = {tier: series.growth(f"cached_tokens_{tier}", range_s) for tier in TIERS}
    shares = ", ".join(f"{tier} {_percent(tokens, prompt)}" for tier, tokens in found.items())
    lines = [f"{'hit rate':<{LABEL}}{_percent(sum(found.values()), prompt):>7}  ({shares})  last {range_words}"]
    bounds = snapshot.get("latency", {})
    for kind, label in (("ttft", "TTFT"), ("itl", "ITL")):
        values = [
            f"p{round(100 * q)} {_ms(series.quantile_s(kind, q, range_s, bounds.get(kind, ()))):>9}"
            for q in (0.5, 0.9, 0.99)
        ]
        lines.append(f"{label:<{LABEL}}" + "   ".join(values))
    generated, prompted = (series.per_second(name, range_s) for name in ("generated_tokens", "prompt_tokens"))
    lines.append(f"{'tokens/s':<{LABEL}}{generated:,.1f} generated   {prompted:,.1f} of prompts")
    sample = snapshot.get("sample", {})
    counts = [f"{sample.get(name, 0)} {name}" for name in ("running", "queued", "loading", "parked")]
    lines.append(f"{'requests':<{LABEL}}" + "   ".join(counts) + ("   PAUSED" if is_paused(snapshot) else ""))
    return _stack([Text(line, no_wrap=True) for line in lines])


def operations(snapshot: Json, *, width: int) -> Text:
    """Pending operations with the time left and what is in the way."""
    found = snapshot.get("operations", {})
    if not found:
        return Text("pending  none", style="dim")
    return _stack(
        [
            Text(f"{'pending' if index == 0 else '':<{LABEL}}{operation_line(entry)}"[:width], no_wrap=True)
            for index, entry in enumerate(found.values())
        ]
    )


def operation_line(entry: Json) -> str:
    """One pending operation."""
    left_s = entry.get("remaining_s", -1)
    left = f"{left_s:.0f} s left" if left_s >= 0 else "no deadline"
    where = f" on {len(entry['ranks'])} engines" if len(entry.get("ranks", ())) > 1 else ""
    why = blockers_in_words(entry.get("blockers") or {}) or "nothing"
    return f"{entry['kind'].replace('_', ' ')}{where}: {left}, in the way: {why}"


def log_lines(snapshot: Json, *, num_lines: int, width: int) -> Text:
    """The newest events, the last one at the bottom."""
    entries = sorted(snapshot.get("log", {}).items(), key=lambda item: int(item[0]))
    shows_rank = len(snapshot.get("engines", {})) > 1
    lines = []
    for _, entry in entries[-num_lines:] if num_lines > 0 else ():
        clock = time.strftime("%H:%M:%S", time.localtime(entry["t"] / 1000))
        mark = "!" if entry["level"] == "warning" else " "
        engine = f"engine {entry['rank']}: " if shows_rank else ""
        style = "bold" if mark == "!" else ""
        lines.append(Text(f"{clock} {mark} {engine}{entry['text']}"[:width], style=style, no_wrap=True))
    return _stack(lines) if lines else Text("no events yet", style="dim")


def is_paused(snapshot: Json) -> bool:
    return any(engine.get("paused") for engine in snapshot.get("engines", {}).values())


def tier_names(snapshot: Json) -> tuple[str, ...]:
    """The tiers that can be flushed; `device` if no engine has answered yet."""
    has_store = any(engine.get("storage") for engine in snapshot.get("engines", {}).values())
    return (*(tier_sums(snapshot) or ("device",)), *(("storage",) if has_store else ()))


def salts(snapshot: Json) -> list[str]:
    """The salts of the cached prefixes, without the empty one."""
    found = [root for engine in snapshot.get("engines", {}).values() for root in roots(engine)]
    return sorted({root["cache_salt"] for root in found if root["cache_salt"]})


def roots(engine: Json) -> Sequence[Json]:
    """The namespaces of an engine's map."""
    return list((engine.get("map") or {}).get("roots", {}).values())


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _ms(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    return "> bounds" if math.isinf(seconds) else f"{1000 * seconds:,.1f} ms"


def _stack(lines: Sequence[Text]) -> Text:
    return Text("\n").join(lines)
