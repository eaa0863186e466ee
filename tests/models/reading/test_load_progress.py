"""Progress while weights are read: a bar in a terminal, lines of the log elsewhere."""

import io
import logging

import pytest

from headwater.models.reading.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_terminal_has_a_bar_that_goes_away() -> None:
    terminal, clock = Terminal(), Clock()
    progress = Progress(1000, 8_000_000_000, stream=terminal, clock=clock)
    clock.now_s = 2.0
    progress.add(500)
    bar = terminal.getvalue()
    assert bar.startswith("\rweights [###############...............] 50 %, 4.0 of 8.0 GB, 2.0 GB/s")
    progress.add(1)
    assert terminal.getvalue() == bar, "not drawn for every tensor"
    progress.end()
    shown = terminal.getvalue().split("\r")
    assert not shown[-2].strip() and len(shown[-2]) >= len(shown[1]) and not shown[-1]


def test_a_log_has_a_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    progress = Progress(1000, 8_000_000_000, stream=io.StringIO(), clock=clock)
    for second in range(1, 13):
        clock.now_s = float(second)
        progress.add(50)
    progress.end()
    assert [record.message for record in caplog.records] == [
        "reading the weights: 25 %, 2.0 of 8.0 GB, 0.4 GB/s",
        "reading the weights: 50 %, 4.0 of 8.0 GB, 0.4 GB/s",
    ]
