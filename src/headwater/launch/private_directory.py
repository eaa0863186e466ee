"""A folder of this process alone, for its sockets."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def private_directory() -> Iterator[Path]:
    """A directory only this user can enter (0700), for the ipc sockets; removed with all in it at the end."""
    with tempfile.TemporaryDirectory(prefix="headwater-", ignore_cleanup_errors=True) as path:
        yield Path(path)
