"""Memory that an engine shares with its rank processes. It has no name, so it ends with its last process."""

import contextlib
import mmap
import os
import tempfile


def nameless_file() -> int:
    """The descriptor of an empty file in memory, for rank processes to inherit."""
    if hasattr(os, "memfd_create"):  # not limited by the size of /dev/shm, which containers keep small
        return os.memfd_create("headwater")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class SharedMemory:
    """`num_bytes` bytes, zero at first and allocated on first write. Another process maps them by the descriptor."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        """Map what `fd` refers to, and make it that large; the descriptor belongs to this object from now on."""
        self.fd = fd
        self.num_bytes = num_bytes
        if os.fstat(fd).st_size < num_bytes:
            os.ftruncate(fd, num_bytes)
        self.buffer = mmap.mmap(fd, num_bytes)

    @classmethod
    def create(cls, num_bytes: int) -> "SharedMemory":
        return cls(nameless_file(), num_bytes)

    def close(self) -> None:
        """Drop the descriptor, and the mapping once nothing looks at it any more."""
        os.close(self.fd)
        with contextlib.suppress(BufferError):  # arrays over it are still alive: it ends with them
            self.buffer.close()
