"""The wait policy of OpenMP's threads, on which PyTorch computes on a CPU."""

import contextlib
import os
from collections.abc import Iterator

_WAIT_POLICY = "OMP_WAIT_POLICY"


@contextlib.contextmanager
def sleeping_threads() -> Iterator[None]:
    """Make OpenMP's threads sleep while they wait. Import PyTorch inside: OpenMP reads its environment on import.

    By default waiting threads spin. On shared cores a spinning thread takes the core from the thread that it waits for:
    decoding took 2 s a token instead of 0.1. A policy set by the user stays in effect.
    """
    if _WAIT_POLICY in os.environ:
        yield
        return
    os.environ[_WAIT_POLICY] = "PASSIVE"
    try:
        yield
    finally:
        del os.environ[_WAIT_POLICY]
