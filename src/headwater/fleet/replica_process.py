"""The server of one replica: arguments on the first line of standard input, and it ends when that is closed."""

import os
import signal
import sys
import threading
import time

import msgspec

from headwater.launch.config import ServerArgs
from headwater.server.serve import serve

_GRACE_S = 8.0  # the server ends within five seconds of SIGTERM


def main() -> int:
    args = msgspec.json.decode(sys.stdin.buffer.readline(), type=ServerArgs)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return serve(args)


def _end_with_parent() -> None:
    """Whatever ends the parent closes the pipe, kill -9 as well."""
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
