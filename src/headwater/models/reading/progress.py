"""How far the reading of weights is: a bar in a terminal, else a line of the log now and then."""

import logging
import sys
import time
from collections.abc import Callable
from typing import TextIO

_BAR_S, _LINE_S = 0.1, 5.0
_BAR_WIDTH = 30
_log = logging.getLogger(__name__)


class Progress:
    """Counts the numbers of the tensors that are used up, of `num_numbers` in files of `num_bytes`."""

    def __init__(
        self,
        num_numbers: int,
        num_bytes: int,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`stream`: where the bar is drawn if it is a terminal; None: standard error."""
        self._num_numbers = max(1, num_numbers)
        self._num_bytes = num_bytes
        self._stream = sys.stderr if stream is None else stream
        self._has_bar = self._stream.isatty()
        self._clock = clock
        self._started_s = self._told_s = clock()
        self._done = 0

    @property
    def gb_per_s(self) -> float:
        """So far."""
        return self._read_bytes / max(self._clock() - self._started_s, 1e-9) / 1e9

    def add(self, num_numbers: int) -> None:
        self._done += num_numbers
        now_s = self._clock()
        if now_s - self._told_s < (_BAR_S if self._has_bar else _LINE_S):
            return
        self._told_s = now_s
        if self._has_bar:
            self._stream.write(f"\r{self._bar()}")
            self._stream.flush()
        else:
            _log.info("reading the weights: %s", self._words())

    def end(self) -> None:
        """Take the bar away."""
        if self._has_bar:
            self._stream.write("\r" + " " * len(self._bar()) + "\r")
            self._stream.flush()

    @property
    def _read_bytes(self) -> float:
        return min(1.0, self._done / self._num_numbers) * self._num_bytes

    def _words(self) -> str:
        percent = 100 * min(1.0, self._done / self._num_numbers)
        of_all = f"{self._read_bytes / 1e9:.1f} of {self._num_bytes / 1e9:.1f} GB"
        return f"{percent:.0f} %, {of_all}, {self.gb_per_s:.1f} GB/s"

    def _bar(self) -> str:
        filled = int(_BAR_WIDTH * min(1.0, self._done / self._num_numbers))
        return f"weights [{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {self._words():<40}"
