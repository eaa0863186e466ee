"""The memory that the ranks of one group share: their meetings, two buffers, and the newest token of each slot.

    facts | abort flag, steps sampled | a line of each rank | newest tokens int32[num_slots] | buffer 0 | buffer 1

It has no name: workers inherit its descriptor. Pages that were never written take no memory.
"""

import mmap
import os
import tempfile

import numpy as np
import numpy.typing as npt

_LINE = 64  # bytes of the cache
_PAGE = 4096
_MAGIC = 0x3152_4157_4448  # "HDWAR1"
LOGIT_ROWS = 64  # rows of logits in memory at once: of a vocabulary of 150,000 they are 38 MB
BEST_BYTES = 12  # of a row and rank: token, logit, whether all logits are finite

Bytes = npt.NDArray[np.uint8]


def rank_buffer_bytes(*, size: int, hidden_size: int, vocab_size: int, max_step_tokens: int) -> int:
    """What a step's sums over ranks need, and 64 rows of logits."""
    sums = max_step_tokens * size * hidden_size * 4
    return _aligned(max(sums, logits_start(size=size) + LOGIT_ROWS * vocab_size * 4))


def logits_start(*, size: int) -> int:
    """Where the logits of all ranks begin in the buffer, behind the most probable token of each row and rank."""
    return -(-LOGIT_ROWS * size * BEST_BYTES // _LINE) * _LINE


class RankSegment:
    """Shared memory of a group, as it is mapped in this process."""

    def __init__(self, descriptor: int) -> None:
        """Map a segment that `create` has made, in this process or in the one that left the descriptor."""
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, 0)
        whole = np.frombuffer(self._memory, np.uint8)
        facts = whole[:_LINE].view(np.int64)
        if facts[0] != _MAGIC:
            raise ValueError(f"descriptor {descriptor} is no segment of ranks of this version")
        self.size, self.buffer_bytes, self.num_slots = (int(it) for it in facts[1:4])
        self.aborted: npt.NDArray[np.int64] = whole[_LINE : _LINE + 8].view(np.int64)  # [1]: 0, or 1 + a failed rank
        self.num_sampled: npt.NDArray[np.int64] = whole[_LINE + 8 : _LINE + 16].view(np.int64)  # [1]: steps
        self.lines: Bytes = whole[2 * _LINE : (2 + self.size) * _LINE].reshape(self.size, _LINE)  # RankLine of ranks.h
        start = (2 + self.size) * _LINE
        self.newest_tokens: npt.NDArray[np.int32] = whole[start : start + 4 * self.num_slots].view(np.int32)
        start = _aligned(start + 4 * self.num_slots)
        self.buffers: Bytes = whole[start : start + 2 * self.buffer_bytes].reshape(2, self.buffer_bytes)

    @classmethod
    def create(cls, *, size: int, buffer_bytes: int, num_slots: int) -> "RankSegment":
        """A new one for `size` ranks, whose steps are of at most `num_slots` requests (see `rank_buffer_bytes`)."""
        if size < 1 or buffer_bytes < 1 or num_slots < 1:
            raise ValueError(
                f"size, buffer_bytes and num_slots must be at least 1: {size}, {buffer_bytes}, {num_slots}"
            )
        buffer_bytes = _aligned(buffer_bytes)
        total = _aligned((2 + size) * _LINE + 4 * num_slots) + 2 * buffer_bytes
        descriptor = _nameless_file()
        os.ftruncate(descriptor, total)
        os.pwrite(descriptor, np.array([_MAGIC, size, buffer_bytes, num_slots], dtype=np.int64).tobytes(), 0)
        return cls(descriptor)

    def close(self) -> None:
        """Close the descriptor. The memory goes with the last array that shows it."""
        os.close(self.descriptor)


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("headwater-ranks", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE) * _PAGE
