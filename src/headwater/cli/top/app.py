"""The screen of `headwater top`."""

import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.events import Resize
from textual.message import Message
from textual.widgets import Footer, Static

from headwater.cli.server_call import Server
from headwater.cli.top import actions, view
from headwater.cli.top.actions import FlushChoice, Outcome
from headwater.cli.top.feed import Feed, Json
from headwater.cli.top.more import more_lines
from headwater.cli.top.screens import ChooseOperation, Confirm, FlushDialog, Help
from headwater.cli.top.series import Series

GAPS, LOG_LINES = 4, 3  # at least
PAUSE = "Pause generation? Running requests go back to the queue and go on after the pause."


class Snapshot(Message):
    """What the server showed; with `history` it is the first one of a connection."""

    def __init__(self, snapshot: Json, history: Json | None = None) -> None:
        super().__init__()
        self.snapshot, self.history = snapshot, history


class Broken(Message):
    """The events ended."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason


class Done(Message):
    """An action ended."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__()
        self.outcome = outcome


class TopApp(App[None]):
    """One screen. State comes from the server alone; the app keeps the range and the last outcome."""

    CSS = """
    Static { height: auto; padding: 0 1; }
    #log { height: 1fr; min-height: 3; margin-top: 1; }
    #notices { max-height: 6; }
    #outcome { max-height: 3; }
    .gap { margin-top: 1; }
    .warned #tiers, .warned #log { margin-top: 0; }
    .warned #log { min-height: 2; }
    Dialog { align: center middle; }
    Dialog > Vertical { width: 76; max-width: 100%; height: auto; max-height: 100%; border: solid $foreground; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f", "flush", "Flush"),
        Binding("p", "pause", "Pause/continue"),
        Binding("c", "cancel", "Cancel operation"),
        Binding("r", "range", "Range"),
        Binding("question_mark", "keys", "Keys", key_display="?"),
        Binding("q", "quit", "Quit"),
    ]
    ENABLE_COMMAND_PALETTE = False
    TITLE = "headwater top"

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._server = server
        self._snapshot: Json = {}
        self._series = Series()
        self._range = 0
        self._state, self._reason = f"connecting to {server.url}", ""
        self._outcome: Outcome | None = None
        self._feed = Feed(
            server,
            on_whole=lambda snapshot, history: self._post(Snapshot(snapshot, history)),
            on_patch=lambda snapshot: self._post(Snapshot(snapshot)),
            on_error=lambda reason: self._post(Broken(reason)),
        )

    def compose(self) -> ComposeResult:
        yield Static(id="header")
        yield Static(id="notices")
        yield Static(id="tiers", classes="gap")
        yield Static(id="figures", classes="gap")
        yield Static(id="more")
        yield Static(id="operations", classes="gap")
        yield Static(id="outcome", markup=False)
        yield Static(id="log")
        yield Footer()

    def on_mount(self) -> None:
        self._show()
        self._feed.start()

    def on_unmount(self) -> None:
        self._feed.stop()

    def on_resize(self, _: Resize) -> None:
        self.call_after_refresh(self._show)

    # --- what comes from threads

    def _post(self, message: Message) -> None:
        with contextlib.suppress(RuntimeError):  # the app has just ended
            self.post_message(message)

    def on_snapshot(self, message: Snapshot) -> None:
        if message.history is not None:
            self._series.load(message.history)
        self._snapshot = message.snapshot
        self._series.push(message.snapshot["sample"])
        self._state, self._reason = "live", ""
        self._show()

    def on_broken(self, message: Broken) -> None:
        self._state, self._reason = "NOT LIVE", " ".join(message.reason.split())
        self._show()

    def on_done(self, message: Done) -> None:
        self._outcome = message.outcome
        self._show()

    # --- keys

    def action_flush(self) -> None:
        choice = FlushChoice(there=view.tier_names(self._snapshot), salts=tuple(view.salts(self._snapshot)))
        dialog = FlushDialog(choice, lambda body: actions.dry_run(self._server, body))
        self.push_screen(dialog, self._flush_chosen)

    def _flush_chosen(self, body: dict[str, Any] | None) -> None:
        if body is not None:
            self._act("Flushing ...", lambda: actions.flush(self._server, body))

    def action_pause(self) -> None:
        if view.is_paused(self._snapshot):
            self._act("Continuing ...", lambda: actions.resume(self._server))
        else:
            self.push_screen(Confirm(PAUSE), self._pause)

    def _pause(self, is_sure: bool | None) -> None:
        if is_sure:
            self._act("Pausing ...", lambda: actions.pause(self._server))

    def action_cancel(self) -> None:
        found = self._snapshot.get("operations", {})
        if not found:
            self._outcome = Outcome("No operation is pending.")
            self._show()
            return
        lines = [(name, view.operation_line(entry)) for name, entry in found.items()]
        self.push_screen(ChooseOperation(lines), self._cancel)

    def _cancel(self, name: str | None) -> None:
        if name is not None:
            self._act("Cancelling ...", lambda: actions.cancel(self._server, name))

    def action_range(self) -> None:
        self._range = (self._range + 1) % len(view.RANGES)
        self._show()

    def action_keys(self) -> None:
        self.push_screen(Help())

    def _act(self, words: str, call: Callable[[], Outcome]) -> None:
        """Call the server in a thread: a flush may wait for a minute, and the screen goes on."""
        self._outcome = Outcome(words)
        self._show()
        threading.Thread(target=lambda: self._post(Done(call())), name="action", daemon=True).start()

    # --- the screen

    def _show(self) -> None:
        if not self.screen_stack or not self.screen_stack[0].query("#log"):  # a message before the widgets, or after
            return
        base = self.screen_stack[0]
        width = self.size.width - 2
        shown = {
            "header": view.header(self._snapshot, state=self._state, reason=self._reason),
            "notices": view.notices(self._snapshot),
            "tiers": view.tiers(self._snapshot, width=width),
            "figures": view.figures(self._snapshot, self._series, range_index=self._range),
            "operations": view.operations(self._snapshot, width=width),
            "outcome": self._outcome_text(),
            "log": view.log_lines(
                self._snapshot, num_lines=base.query_one("#log", Static).size.height or 5, width=width
            ),
        }
        shown["more"] = more_lines(
            self._snapshot,
            self._series,
            range_s=view.RANGES[self._range][0],
            num_lines=self._lines_left(shown, width=width),
            width=width,
        )
        base.query_one("#more").display = bool(shown["more"])
        base.set_class(bool(shown["notices"]), "warned")  # the lines of a warning come from gaps and the log
        base.query_one("#notices").display = bool(shown["notices"])
        for name, text in shown.items():
            base.query_one(f"#{name}", Static).update(text)

    def _lines_left(self, shown: Mapping[str, Text], *, width: int) -> int:
        """Lines that neither the other texts need nor the log and the keys."""
        texts = [text for name, text in shown.items() if name != "log" and (text or name != "notices")]
        taken = sum(len(text.wrap(self.console, width)) for text in texts)
        return max(0, self.size.height - taken - GAPS - LOG_LINES - 1)

    def _outcome_text(self) -> Text:
        if self._outcome is None:
            return Text("")
        return Text(self._outcome.text, style="" if self._outcome.is_good else "bold")
