"""Python's garbage collection in the server's own processes: none during the start, and then without its objects.

Call these functions only there: in a user's process they would also concern the user's objects.
"""

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
