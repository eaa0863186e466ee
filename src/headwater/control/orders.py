"""What the engine was ordered and stays in force after the operation has been answered."""

from headwater.messages.weights import MEMORY_TAGS


class Orders:
    """A pause and released memory. While either is in force, no step is launched and requests queue."""

    def __init__(self) -> None:
        self.is_paused = False
        self.released: set[str] = set()

    def released_tags(self) -> tuple[str, ...]:
        return tuple(tag for tag in MEMORY_TAGS if tag in self.released)
