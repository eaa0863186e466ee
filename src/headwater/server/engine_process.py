"""The engine process: `python -m headwater.server.engine_process`, started by the supervisor only.

The parent writes one `EngineStart` to its standard input, so keys and paths never show on a command line. The
pipe then stays open; its end means that the parent has died, and this process exits. Standard output carries
at most one `StartFailure`; all other output goes to standard error.
"""

import logging
import signal
import sys
import threading
import traceback
from io import FileIO, RawIOBase
from pathlib import Path

import msgspec

from headwater.heap import freeze_heap, pause_collection
from headwater.launch.child_process import EXIT_CRASHED, EXIT_REFUSED, exit_with_parent, take_standard_output
from headwater.launch.config import ServerArgs
from headwater.logs import configure_logging
from headwater.messages.frames import pack_frame, read_frame
from headwater.ranks.errors import RankLost


class EngineStart(msgspec.Struct, frozen=True, kw_only=True):
    """The arguments of an engine process. `directory` is the server's private directory, with the sockets."""

    args: ServerArgs
    endpoint: str
    directory: str
    index: int = 0  # of this engine among the server's engines
    weights: tuple[str, str] | None = None  # path and format, if they differ from the arguments
    cpus: tuple[tuple[int, ...], ...] = ()  # of each compute thread, if they are pinned
    rank_cpus: tuple[tuple[tuple[int, ...], ...], ...] = ()  # the same of the engine's other ranks


class StartFailure(msgspec.Struct, frozen=True):
    """The reason why the engine did not start, or cannot go on, for the user."""

    message: str


def read_start(stream: RawIOBase) -> EngineStart:
    """What the parent wrote. Raises `EOFError` if it died before it had written the whole frame."""
    return msgspec.msgpack.decode(read_frame(stream), type=EngineStart)


class FailureReport:
    """Writes one `StartFailure`, of the first thread: the loop, or the one that ends a process that hangs."""

    def __init__(self, reports: RawIOBase) -> None:
        self._reports = reports
        self._lock = threading.Lock()
        self._has_written = False

    def write(self, message: str) -> None:
        with self._lock:
            if not self._has_written:
                self._reports.write(pack_frame(StartFailure(message)))
            self._has_written = True


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    pause_collection()
    report = FailureReport(take_standard_output())
    stdin = FileIO(0, closefd=False)
    start = read_start(stdin)
    exit_with_parent(stdin, Path(start.directory))
    prefix = f"engine {start.index}" if start.args.dp_size > 1 else ""
    configure_logging(start.args.log_level, start.args.log_format, prefix=prefix)
    try:
        logging.getLogger(__name__).info("loading the engine")
        from headwater.launch.assembly import build_engine

        freeze_heap()  # before the load: on a GPU, garbage of the load may hold memory that the KV cache needs
        engine = build_engine(
            start.args,
            start.endpoint,
            index=start.index,
            weights=start.weights,
            cpus=start.cpus,
            rank_cpus=start.rank_cpus,
            last_words=report.write,
        )
    except (
        ValueError,
        OSError,
    ) as error:  # mistakes of the user: a wrong model, a missing file, too little memory
        logging.getLogger(__name__).debug("the engine could not start", exc_info=True)
        report.write(str(error))
        return EXIT_REFUSED
    except Exception as error:  # noqa: BLE001  the parent must report any error
        traceback.print_exc()
        report.write(f"the engine failed to start: {type(error).__name__}: {error}")
        return EXIT_CRASHED
    signal.signal(signal.SIGTERM, lambda *_: engine.stop())
    freeze_heap()
    engine.call_when_idle(engine.prepare_grammars)
    try:
        engine.run()
    except RankLost as error:
        report.write(str(error))
        return EXIT_CRASHED
    return 0


if __name__ == "__main__":
    sys.exit(main())
