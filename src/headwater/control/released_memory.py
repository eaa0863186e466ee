"""Which memory has been given back."""

TAGS = ("kv_cache", "weights")


class ReleasedMemory:
    """Which memory is released now. While any is, no step is launched and requests queue."""

    def __init__(self) -> None:
        self.tags: set[str] = set()

    def as_tuple(self) -> tuple[str, ...]:
        return tuple(tag for tag in TAGS if tag in self.tags)
