"""The bytes of host pages, for those that carry them to and from storage."""

from typing import Protocol


class HostPages(Protocol):
    """Host memory by page id."""

    @property
    def page_bytes(self) -> int: ...

    def view(self, page: int) -> memoryview:
        """A writable view of one page's bytes. Who owns the page may use it."""
        ...
