"""Memory of the server's own processes. Nothing is collected during the start; freed memory returns to the system.

Call these functions only there: in a user's process they would also concern the user's objects.
"""

import contextlib
import ctypes
import gc


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
