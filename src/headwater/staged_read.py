"""What a thread reads and checks for the loop, which asks whether it is ready: weights, adapters, hashes."""

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Abandoned(Exception):
    """The result is not wanted any more: reading stops."""


class StagedRead(Generic[T]):
    """A result that a thread makes (`control.ports.Staged`).

    The thread may hang for ever in a read (of a network mount), so nothing joins it or waits for it.
    """

    def __init__(self, read: Callable[[threading.Event], T], *, name: str) -> None:
        """`read` looks at the event now and then, and raises `Abandoned` once it is set."""
        self._read = read
        self._found: T | None = None
        self._cause: Exception | None = None
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def is_ready(self) -> bool:
        return not self._thread.is_alive()

    def error(self) -> str | None:
        return None if self._cause is None else in_words(self._cause)

    def abandon(self) -> None:
        """The result will not be used: stop reading soon, and drop what was read."""
        self._abandoned.set()
        self._found = None

    def found(self) -> T:
        """The result. Only when ready and without error."""
        assert self._found is not None, "not read, or in vain"
        return self._found

    def _run(self) -> None:
        try:
            found = self._read(self._abandoned)
            if not self._abandoned.is_set():
                self._found = found
        except Exception as error:  # noqa: BLE001  whatever a torn file makes its reader raise, serving goes on
            self._cause = error
            if not isinstance(error, Abandoned):
                _log.warning("%s has failed: %s", threading.current_thread().name, error)


def in_words(error: Exception) -> str:
    """An error as its caller reads it: the user's mistakes are `ValueError`s, which speak for themselves."""
    if isinstance(error, Abandoned):
        return "given up"
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
