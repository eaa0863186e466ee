"""Exclude the objects of a server's start from Python's garbage collection: they live as long as the process."""

import gc


def freeze_heap() -> None:
    """Exclude all present objects from later collections, after one full collection.

    A full collection takes 50 to 100 ms when torch or the web framework is loaded, and stops the process meanwhile.
    Call it only in the server's own processes: in a user's process it would also freeze the user's objects.
    """
    gc.collect()
    gc.freeze()
