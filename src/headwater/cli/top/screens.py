"""The dialogs: a flush with its dry run, a yes or no, a choice of an operation, the keys. Each is left with Escape."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.events import Key
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Static

from headwater.cli.top.actions import FlushChoice, Outcome

KEYS = (
    "f       flush: choose, see what it would cut, confirm",
    "p       pause generation, or let it go on",
    "c       cancel a pending operation",
    "r       range of rates and percentiles: 1 min, 5 min, 1 h",
    "?       these keys",
    "q       quit",
    "",
    "# cached   = private to a request   x retired   > arriving   . free",
)


class Dialog(ModalScreen[Any]):
    """Lines of text in a box. Subclasses take the keys."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self._heading = title
        self._body = Static("", markup=False, id="dialog")

    def compose(self) -> ComposeResult:
        box = Vertical(self._body)
        box.border_title = self._heading
        yield box

    def on_mount(self) -> None:
        self.show()

    def show(self) -> None:
        self._body.update("\n".join(self.lines()))

    def lines(self) -> Sequence[str]:
        raise NotImplementedError

    def on_key(self, event: Key) -> None:
        event.stop()
        if event.key == "escape":
            self.dismiss(None)
        else:
            self.take(event.key)

    def take(self, key: str) -> None:
        """A key other than Escape."""


class Help(Dialog):
    def __init__(self) -> None:
        super().__init__("Keys")

    def lines(self) -> Sequence[str]:
        return [*KEYS, "", "Esc: back"]

    def take(self, key: str) -> None:
        self.dismiss(None)


class Confirm(Dialog):
    """Dismissed with True for y."""

    def __init__(self, question: str) -> None:
        super().__init__("Confirm")
        self._question = question

    def lines(self) -> Sequence[str]:
        return [self._question, "", "y: yes    Esc: no"]

    def take(self, key: str) -> None:
        if key in ("y", "n"):
            self.dismiss(key == "y")


class ChooseOperation(Dialog):
    """Dismissed with the name of the chosen operation."""

    def __init__(self, operations: Sequence[tuple[str, str]]) -> None:
        """Name and line of each; the first nine can be chosen."""
        super().__init__("Cancel an operation")
        self._operations = operations[:9]

    def lines(self) -> Sequence[str]:
        return [
            *(f"{index}  {line}" for index, (_, line) in enumerate(self._operations, start=1)),
            "",
            "Its number cancels it    Esc: back",
        ]

    def take(self, key: str) -> None:
        if key.isdigit() and 1 <= int(key) <= len(self._operations):
            self.dismiss(self._operations[int(key) - 1][0])


class FlushDialog(Dialog):
    """Dismissed with the body of a flush whose dry run was shown. A change of the form asks for another dry run."""

    class Previewed(Message):
        """The answer to a dry run of `choice`."""

        def __init__(self, choice: FlushChoice, outcome: Outcome) -> None:
            super().__init__()
            self.choice, self.outcome = choice, outcome

    def __init__(self, choice: FlushChoice, preview: Callable[[dict[str, Any]], Outcome]) -> None:
        """`preview` is called in a thread."""
        super().__init__("Flush")
        self._choice = choice
        self._preview = preview
        self._answer: Outcome | None = None
        self._is_asking = False

    def lines(self) -> Sequence[str]:
        below = ["Enter: dry run    Esc: back"]
        if self._is_asking:
            below = ["Asking what it would cut ..."]
        elif self._answer is not None:
            keys = "y: flush now    Esc: back" if self._answer.is_good else "Esc: back"
            below = [self._answer.text, "", keys]
        return [*self._choice.lines(), "", *below]

    def take(self, key: str) -> None:
        if key == "y" and self._answer is not None and self._answer.is_good:
            self.dismiss(self._choice.body())
        elif key == "enter" and not self._is_asking:
            self._is_asking = True
            threading.Thread(target=self._ask, args=(self._choice,), name="dry-run", daemon=True).start()
        elif (turned := self._choice.turned(key)) != self._choice:
            self._choice, self._answer, self._is_asking = turned, None, False
        self.show()

    def _ask(self, choice: FlushChoice) -> None:
        self.post_message(self.Previewed(choice, self._preview(choice.body())))

    def on_flush_dialog_previewed(self, message: Previewed) -> None:
        if message.choice == self._choice:  # else the form has changed meanwhile
            self._answer, self._is_asking = message.outcome, False
            self.show()
