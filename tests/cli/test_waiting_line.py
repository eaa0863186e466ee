"""The line that says what is being waited for."""

import io
import time

from headwater.cli.waiting_line import CLEAR, WaitingLine


class Screen(io.StringIO):
    """A terminal, or not."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


def wait_for(screen: Screen, words: str, limit_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while words not in screen.getvalue():
        assert time.monotonic() < deadline_s, screen.getvalue()
        time.sleep(0.01)


def test_a_terminal_sees_the_reason_and_it_is_gone_afterwards() -> None:
    screen = Screen(is_terminal=True)
    with WaitingLine(lambda: "the server is loading", stream=screen, wonder_s=0.0):
        wait_for(screen, "(the server is loading, 0 s)")
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

    def slow() -> str:
        time.sleep(0.2)
        return "too late"

    line = WaitingLine(slow, stream=screen, wonder_s=0.0)
    with line:
        time.sleep(0.05)
        line.stop()
    time.sleep(0.3)
    assert screen.getvalue() == ""
