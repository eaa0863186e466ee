"""Memory of the server's own processes. Nothing is collected during the start; freed memory returns to the system.

Call these functions only there: in a user's process they would also concern the user's objects.
"""

import contextlib
import ctypes
import gc

MMAP_THRESHOLD = 128 << 10  # bytes; glibc's value at the start
TRIM_THRESHOLD = 1 << 20  # bytes that may be free at the heap's top
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def pause_collection() -> None:
    """Collect nothing until `freeze_heap`. Imports make many objects and hardly any garbage."""
    gc.disable()


def freeze_heap() -> None:
    """Exclude all present objects from later collections, which begin now: they live as long as the process.

    A full collection takes 50 to 100 ms when torch or the web framework is loaded, and stops the process meanwhile.
    """
    gc.freeze()
    gc.enable()


def give_back_memory() -> None:
    """Return freed memory to the system, in about a millisecond.

    Reading a vocabulary leaves megabytes of it, which glibc would keep.
    """
    with contextlib.suppress(OSError, AttributeError):  # other systems
        ctypes.CDLL(None).malloc_trim(0)


def map_large_buffers() -> None:
    """Take memory of `MMAP_THRESHOLD` and more by `mmap`, always. Call it before much is loaded.

    Every read from a socket allocates 256 KiB and then shrinks that to what came. glibc raises its threshold when such
    memory is freed, and puts it on the heap from then on. There, each small allocation that outlives its neighbours
    splits the space, so the heap grows slowly, for hours, although what is in use does not.
    """
    with contextlib.suppress(OSError, AttributeError):  # other systems
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        library.mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD)
