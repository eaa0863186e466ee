"""What the engine was ordered and stays in force after the operation has been answered."""

from collections.abc import Callable

from headwater.messages.weights import MEMORY_TAGS


class Orders:
    """A pause and released memory. While either is in force, no step is launched and requests queue."""

    def __init__(self) -> None:
        self.is_paused = False
        self.released: set[str] = set()
        self.when_continued: list[Callable[[], None]] = []  # one of each pause that is not answered yet

    def continue_generation(self) -> None:
        """End the pause, and the wait of pauses for a moment without a step, which may be long in coming now."""
        for end in self.when_continued:
            end()
        self.is_paused = False  # last: a pause of this very turn has only begun now

    def released_tags(self) -> tuple[str, ...]:
        return tuple(tag for tag in MEMORY_TAGS if tag in self.released)
