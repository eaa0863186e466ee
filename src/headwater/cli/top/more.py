"""What the screen shows where lines are left: engines side by side, copies between tiers, tenants, pins.

Pure functions. The most useful comes first, since a small terminal shows only the first lines.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import chain

from rich.text import Text

from headwater.cli.top.series import Series
from headwater.cli.top.view import LABEL, MIB, Json, roots, store_trouble

COPIES = ("offload", "restore", "persist", "prefetch")
MOST_TENANTS = 4


def more_lines(snapshot: Json, series: Series, *, range_s: float, num_lines: int, width: int) -> Text:
    """At most `num_lines` lines."""
    found = chain(_engines(snapshot), _copies(snapshot, series, range_s), _tenants(snapshot), _pins(snapshot))
    lines = [Text(line[:width], no_wrap=True) for line, _ in zip(found, range(num_lines), strict=False)]
    return Text("\n").join(lines)


def _engines(snapshot: Json) -> Iterator[str]:
    """One line for each of several engines."""
    engines = snapshot.get("engines", {})
    for rank, engine in engines.items() if len(engines) > 1 else ():
        label = f"{f'engine {rank}':<{LABEL}}"
        if not engine.get("up"):
            yield f"{label}! {engine.get('message', 'does not answer')}"
            continue
        counts = engine.get("requests", {})
        used = [f"{name} {_used(tier)}" for name, tier in engine.get("tiers", {}).items()]
        state = "paused" if engine.get("paused") else "store fails" if store_trouble(engine) else "serving"
        parts = [state, f"{counts.get('running', 0)} running", f"{counts.get('queued', 0)} queued", *used]
        yield label + "  ".join([*parts, f"generation {engine.get('generation', 0)}"])


def _copies(snapshot: Json, series: Series, range_s: float) -> Iterator[str]:
    """Copies in flight, and the speed of those in the range, of a server with a host tier."""
    engines = [engine for engine in snapshot.get("engines", {}).values() if engine.get("copies")]
    if not engines:
        return
    parts = []
    for kind in COPIES:
        in_flight = sum(engine["copies"].get(kind, {}).get("in_flight", 0) for engine in engines)
        num_bytes, ms = (series.growth(f"{kind}.{quantity}", range_s) for quantity in ("bytes", "ms"))
        if ms or in_flight:
            speed = f" {1000 * num_bytes / ms / MIB:,.0f} MiB/s" if ms else ""
            parts.append(f"{kind}{speed}" + (f" ({in_flight} now)" if in_flight else ""))
    yield f"{'copies':<{LABEL}}{'   '.join(parts) or 'none'}"


def _tenants(snapshot: Json) -> Iterator[str]:
    """The salts with the most cached tokens, and their share."""
    tokens: Counter[str] = Counter()
    for engine in snapshot.get("engines", {}).values():
        for root in roots(engine):
            tokens[root["cache_salt"]] += root.get("num_tokens", 0)
    total = tokens.total()
    if not total:
        return
    shares = [f"{salt or 'no salt'} {100 * count / total:.0f} %" for salt, count in tokens.most_common(MOST_TENANTS)]
    rest = f"   and {len(tokens) - MOST_TENANTS} more" if len(tokens) > MOST_TENANTS else ""
    yield f"{'tenants':<{LABEL}}{'   '.join(shares)}{rest}"


def _pins(snapshot: Json) -> Iterator[str]:
    pins = [pin for engine in snapshot.get("engines", {}).values() for pin in (engine.get("pins") or {}).values()]
    if pins:
        tokens, ends_in_s = sum(pin["num_tokens"] for pin in pins), min(pin["ends_in_s"] for pin in pins)
        words = "1 pin holds" if len(pins) == 1 else f"{len(pins)} pins hold"
        yield f"{'pins':<{LABEL}}{words} {tokens:,} tokens; the next ends in {ends_in_s} s"


def _used(tier: Json) -> str:
    return f"{100 * (tier['capacity'] - tier['free']) / max(1, tier['capacity']):.0f} %"
