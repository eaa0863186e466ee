"""What a server's process has loaded stays until its end, so Python's collector need not look through it."""

import gc


def freeze_heap() -> None:
    """Leave all objects of now out of the collector's rounds.

    A full round takes 50 to 100 ms where torch or the web framework is loaded, and nothing else runs meanwhile. What is
    garbage now is collected first, or it would stay for ever. For processes of our own: in a user's, the user's objects
    would be frozen with ours.
    """
    gc.collect()
    gc.freeze()
