"""The line that says what is being waited for."""

import io
import re
import threading
import time

from headwater.cli.waiting_line import CLEAR, WaitingLine


class Screen(io.StringIO):
    """A terminal, or not."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


def wait_for(screen: Screen, words: str, limit_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while words not in screen.getvalue():
        assert time.monotonic() < deadline_s, screen.getvalue()
        time.sleep(0.01)


def test_a_terminal_sees_the_reason_and_it_is_gone_afterwards() -> None:
    screen = Screen(is_terminal=True)
    with WaitingLine(lambda: "the server is loading", stream=screen, wonder_s=0.0):
        wait_for(screen, "(the server is loading, ")
    assert re.search(r"\(the server is loading, \d+ s\)", screen.getvalue())
    assert screen.getvalue().endswith(CLEAR)


def test_a_file_gets_a_line_for_each_reason_and_no_control_characters() -> None:
    screen = Screen(is_terminal=False)
    reasons = iter(["one", "one", "two"])
    with WaitingLine(lambda: next(reasons, "two"), stream=screen, wonder_s=0.0):
        wait_for(screen, "two")
    assert screen.getvalue() == "(one)\n(two)\n"


def test_what_comes_soon_needs_no_word() -> None:
    screen = Screen(is_terminal=True)
    with WaitingLine(lambda: "never", stream=screen, wonder_s=60.0):
        pass
    assert screen.getvalue() == ""


def test_nothing_is_painted_after_the_stop() -> None:
    """A reason that is slow to learn must not be painted over the answer."""
    screen = Screen(is_terminal=True)

    asked, may_answer = threading.Event(), threading.Event()

    def slow() -> str:
        asked.set()
        may_answer.wait(60)
        return "too late"

    before = set(threading.enumerate())
    with WaitingLine(slow, stream=screen, wonder_s=0.0) as line:
        (painter,) = set(threading.enumerate()) - before
        assert asked.wait(60)
        line.stop()
        may_answer.set()
    painter.join(60)
    assert screen.getvalue() == "" and not painter.is_alive()
