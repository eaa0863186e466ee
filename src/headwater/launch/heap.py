"""What a process has loaded stays until its end, so Python's collector need not look through it again and again."""

import gc


def freeze_heap() -> None:
    """Leave all objects of now out of the collector's rounds; those take 100 ms and more where torch is loaded.

    `gc.unfreeze` takes it back. What is garbage now is collected first, or it would stay for ever.
    """
    gc.collect()
    gc.freeze()
