"""A process that receives tensors: `python -m headwater.launch.receiving.process`, started by an API process only.

It reads frames from standard input, whose end means that the server has ended, and answers on standard output. A
broadcast that never comes blocks this process alone, and the server kills it.
"""

import os
import queue
import signal
import sys
import threading
import time
from io import FileIO

import msgspec

from headwater.launch.child_process import die_with_parent, take_standard_output
from headwater.launch.receiving.device_copies import FileWriter
from headwater.launch.receiving.tensors import Group, copy_from_gpu, join_group
from headwater.messages.frames import pack_frame, read_frame
from headwater.messages.receiving import (
    CopyFromGpu,
    DropFromGpu,
    FromReceiver,
    JoinGroup,
    NotDone,
    Ok,
    ReceiveBucket,
    ReceiverStart,
    ToReceiver,
    decode_to_receiver,
)


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server handles Ctrl-C
    answers = take_standard_output()
    stdin = FileIO(0, closefd=False)
    die_with_parent(msgspec.msgpack.decode(read_frame(stdin), type=ReceiverStart).parent_pid)
    calls: queue.SimpleQueue[ToReceiver] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(stdin, calls), daemon=True).start()
    group: Group | None = None
    writer = FileWriter()
    while True:
        call, began_s = calls.get(), time.monotonic()
        answer: FromReceiver
        try:
            match call:
                case JoinGroup():
                    group = join_group(call, writer)
                case ReceiveBucket():
                    assert group is not None, "join first"
                    group.receive(call)
                case CopyFromGpu():
                    copy_from_gpu(call, writer)
                case DropFromGpu():
                    writer.drop_held()
            answer = Ok(took_s=time.monotonic() - began_s)
        except Exception as error:  # noqa: BLE001  a trainer's mistakes and losses: the caller gets the reason
            answer = NotDone(message=f"{type(error).__name__}: {error}"[:2000])
        answers.write(pack_frame(answer))


def _read(stdin: FileIO, calls: "queue.SimpleQueue[ToReceiver]") -> None:
    """In a thread: the end of the pipe must be seen in a broadcast that hangs."""
    try:
        while True:
            calls.put(decode_to_receiver(read_frame(stdin)))
    except EOFError:
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
