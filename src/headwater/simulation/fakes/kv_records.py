"""The simulation's contents of a page: for each token its canary and its origin."""

import struct

import numpy as np
import numpy.typing as npt

TOKEN = np.dtype(
    [
        ("canary", "<u8"),  # 0: never written
        ("birth", "<u4"),  # turn of its computation
        ("retired", "<u4"),  # turn in which a flush covered it on its tier; 0: none
        ("drawn", "<u4"),  # turn in which it was last read from a store; 0: never
        ("sequence", "<u4"),  # its owner, an index into `SharedWorld.sequences`
        ("position", "<u4"),  # in that sequence
    ]
)
PACKED = struct.Struct("<Q5I")  # one TOKEN
Records = npt.NDArray[np.void]  # of TOKEN


def make_records(num_pages: int, page_size: int) -> Records:
    """Unwritten pages. TOKEN[num_pages, page_size]."""
    return np.zeros((num_pages, page_size), dtype=TOKEN)


class HostRecords:
    """`cache.host_pages.HostPages` over a host tier of records, which storage carries unchanged."""

    def __init__(self, records: Records) -> None:
        self._bytes = records.view(np.uint8).reshape(records.shape[0], -1)

    @property
    def page_bytes(self) -> int:
        return self._bytes.shape[1]

    def view(self, page: int) -> memoryview:
        return memoryview(self._bytes[page])
