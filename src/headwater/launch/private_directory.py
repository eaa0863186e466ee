"""A private folder of this process, for its sockets."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def private_directory() -> Iterator[Path]:
    """A directory that only this user can enter (0700), for ipc sockets. It is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="headwater-", ignore_cleanup_errors=True) as path:
        yield Path(path)
