"""What a token's place in a page holds in the simulation: its canary, and beside it where it came from."""

import struct

import numpy as np
import numpy.typing as npt

TOKEN = np.dtype(
    [
        ("canary", "<u8"),  # 0: never written
        ("birth", "<u4"),  # turn in which a step computed it
        ("retired", "<u4"),  # turn in which a flush covered it on the tier it lies on; 0: none did
        ("drawn", "<u4"),  # turn in which it last came out of a store; 0: never
        ("sequence", "<u4"),  # whose it is: an index into `Sequences`
        ("position", "<u4"),  # in that sequence
    ]
)
PACKED = struct.Struct("<Q5I")  # one TOKEN
Records = npt.NDArray[np.void]  # of TOKEN


def make_records(num_pages: int, page_size: int) -> Records:
    """Pages that nothing has been written to. TOKEN[num_pages, page_size]."""
    return np.zeros((num_pages, page_size), dtype=TOKEN)


class HostRecords:
    """`cache.host_pages.HostPages` over a host tier of records: storage carries them whole."""

    def __init__(self, records: Records) -> None:
        self._bytes = records.view(np.uint8).reshape(records.shape[0], -1)

    @property
    def page_bytes(self) -> int:
        return self._bytes.shape[1]

    def view(self, page: int) -> memoryview:
        return memoryview(self._bytes[page])
