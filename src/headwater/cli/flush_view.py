"""The view of `headwater flush` while it waits: the time left, and what keeps each engine busy."""

from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from headwater.messages.blocker_words import blockers_in_words

WAITING = {"idle": "Waiting for an idle moment", "drain": "Waiting for the pages to come back"}
BAR_WIDTH = 40


def flush_view(answer: dict[str, Any] | None, *, mode: str, waited_s: float, timeout_s: float) -> RenderableType:
    """`answer` is the answer of /control/blockers, None before the first one."""
    left_s = max(0.0, timeout_s - waited_s)
    head = Table.grid(padding=(0, 1))
    head.add_row(
        Text(WAITING.get(mode, "Flushing")),
        ProgressBar(total=max(timeout_s, 1e-9), completed=min(waited_s, timeout_s), width=BAR_WIDTH),
        Text(f"{left_s:.1f} s left"),
    )
    lines = [_engine_line(entry) for entry in (answer or {}).get("engines", [])]
    if len(lines) == 1:
        lines[0] = lines[0].split(": ", 1)[1]
    return Group(head, *(Text("  " + line, style="dim") for line in lines))


def _engine_line(entry: dict[str, Any]) -> str:
    name = f"engine {entry.get('dp_rank', 0)}"
    if not entry.get("success", True):
        return f"{name}: {entry.get('message', 'does not answer')}"
    blockers = entry.get("blockers") or {}
    return f"{name}: " + (blockers_in_words(blockers) or "idle")
