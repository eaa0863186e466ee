"""How OpenMP's threads, with which PyTorch computes on a CPU, wait for each other."""

import contextlib
import os
from collections.abc import Iterator

_WAIT_POLICY = "OMP_WAIT_POLICY"


@contextlib.contextmanager
def sleeping_threads() -> Iterator[None]:
    """Import PyTorch inside: the OpenMP library that comes with it reads its environment when it is loaded.

    Its threads then sleep while they wait. By default they spin, and where cores are shared a spinning thread keeps
    its core from the thread it waits for: decoding took 2 s a token instead of 0.1. What the user has set holds.
    """
    if _WAIT_POLICY in os.environ:
        yield
        return
    os.environ[_WAIT_POLICY] = "PASSIVE"
    try:
        yield
    finally:
        del os.environ[_WAIT_POLICY]
