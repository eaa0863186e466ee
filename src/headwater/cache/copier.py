"""The copies of pages between device and host: one implementation for each device, one in the simulation."""

from typing import Protocol, runtime_checkable

from headwater.cache.page_pool import PageIds


class CopyHandle(Protocol):
    """A copy that was started. Its pages are in use until it is done."""

    def is_done(self) -> bool:
        """Whether the copy has ended; never blocks."""
        ...

    @property
    def has_failed(self) -> bool:
        """Whether the destination must not be used. Only when done."""
        ...

    @property
    def took_s(self) -> float:
        """Seconds the copying itself took, without its wait for other copies. Only when done."""
        ...


@runtime_checkable
class EarlyCopyHandle(CopyHandle, Protocol):
    """A restore whose pages may be used by new steps before the copy is done."""

    def is_readable(self, *, is_alone: bool) -> bool:
        """Whether steps launched from now on may read the destination; never blocks. Stays true.

        From then on the copy cannot fail, and the runner makes the kernels of these steps wait for layers that have
        not arrived. The pages of both sides stay in use until the copy is done. `is_alone`: no other request would
        be delayed, so the restore may count as readable however much of it is still to arrive.
        """
        ...


class PageCopier(Protocol):
    """Copies pages, all layers of each. Asynchronous: both methods return at once."""

    def offload(self, device_pages: PageIds, host_pages: PageIds) -> CopyHandle:
        """device -> host, page by page. The device pages were written by steps that have been collected."""
        ...

    def restore(self, host_pages: PageIds, device_pages: PageIds) -> CopyHandle:
        """host -> device, page by page. May return an `EarlyCopyHandle`."""
        ...
