"""The engine process: `python -m headwater.server.engine_process`, started by the supervisor only.

The parent writes one `EngineStart` to its standard input, so keys and paths never show on a command line. The
pipe then stays open; its end means that the parent has died, and this process exits. Standard output carries
at most one `StartFailure`; all other output goes to standard error.
"""

import logging
import os
import shutil
import signal
import sys
import threading
import traceback
from io import FileIO, RawIOBase
from pathlib import Path

import msgspec

from headwater.launch.config import ServerArgs
from headwater.server.heap import freeze_heap, pause_collection

EXIT_CRASHED = 1
EXIT_REFUSED = 2  # wrong arguments or an unusable model: a restart would not help


class EngineStart(msgspec.Struct, frozen=True, kw_only=True):
    """The arguments of an engine process. `directory` is the server's private directory, with the sockets."""

    args: ServerArgs
    endpoint: str
    directory: str
    index: int = 0  # of this engine among the server's engines
    weights: tuple[str, str] | None = None  # path and format, if they differ from the arguments
    cpus: tuple[tuple[int, ...], ...] = ()  # of each compute thread, if they are pinned


class StartFailure(msgspec.Struct, frozen=True):
    """The reason why the engine did not start, for the user."""

    message: str


def pack_frame(message: msgspec.Struct) -> bytes:
    """Four bytes of length, little-endian, then the message in msgpack."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(4, "little") + body


def read_start(stream: RawIOBase) -> EngineStart:
    """The inverse of `pack_frame`. Raises `EOFError` if the parent died before it had written the whole frame."""
    num_bytes = int.from_bytes(read_exactly(stream, 4), "little")
    return msgspec.msgpack.decode(read_exactly(stream, num_bytes), type=EngineStart)


def read_exactly(stream: RawIOBase, num_bytes: int) -> bytes:
    """Read `num_bytes` from a pipe, which may return them in several portions. Raises `EOFError`."""
    data = b""
    while len(data) < num_bytes:
        portion = stream.read(num_bytes - len(data))
        if not portion:
            raise EOFError("the parent process ended before it sent the arguments")
        data += portion
    return data


def take_standard_output() -> RawIOBase:
    """Keep the real standard output for reports, and redirect later output to standard error."""
    reports = FileIO(os.dup(1), "w")
    os.dup2(2, 1)
    return reports


def exit_with_parent(stream: RawIOBase, directory: Path) -> None:
    """Watch the parent's pipe in a thread; at its end remove the private directory and exit immediately."""

    def watch() -> None:
        while stream.read(4096):
            pass
        shutil.rmtree(directory, ignore_errors=True)  # the parent, which would do it, is dead
        os._exit(EXIT_CRASHED)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    pause_collection()
    reports = take_standard_output()
    stdin = FileIO(0, closefd=False)
    start = read_start(stdin)
    exit_with_parent(stdin, Path(start.directory))
    logging.basicConfig(
        level=start.args.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        logging.getLogger(__name__).info("loading the engine")
        from headwater.launch.assembly import build_engine

        freeze_heap()  # before the load: on a GPU, garbage of the load may hold memory that the KV cache needs
        engine = build_engine(start.args, start.endpoint, index=start.index, weights=start.weights, cpus=start.cpus)
    except (
        ValueError,
        OSError,
    ) as error:  # mistakes of the user: a wrong model, a missing file, too little memory
        logging.getLogger(__name__).debug("the engine could not start", exc_info=True)
        reports.write(pack_frame(StartFailure(str(error))))
        return EXIT_REFUSED
    except Exception as error:  # noqa: BLE001  the parent must report any error
        traceback.print_exc()
        reports.write(pack_frame(StartFailure(f"the engine failed to start: {type(error).__name__}: {error}")))
        return EXIT_CRASHED
    signal.signal(signal.SIGTERM, lambda *_: engine.stop())
    freeze_heap()
    engine.call_when_idle(engine.prepare_grammars)
    engine.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
