"""Memory that an engine shares with its rank processes. It has no name, so it ends with its last process."""

import contextlib
import mmap
import os
import tempfile


class SharedMemory:
    """`num_bytes` bytes, zero at first and allocated on first write. Another process maps them by the descriptor."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        """Map what `fd` refers to; the descriptor belongs to this object from now on."""
        self.fd = fd
        self.num_bytes = num_bytes
        self.buffer = mmap.mmap(fd, num_bytes)

    @classmethod
    def create(cls, num_bytes: int) -> "SharedMemory":
        if hasattr(os, "memfd_create"):  # not limited by the size of /dev/shm, which containers keep small
            fd = os.memfd_create("headwater")
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        os.ftruncate(fd, num_bytes)
        return cls(fd, num_bytes)

    def close(self) -> None:
        """Drop the descriptor, and the mapping once nothing looks at it any more."""
        os.close(self.fd)
        with contextlib.suppress(BufferError):  # arrays over it are still alive: it ends with them
            self.buffer.close()
