"""Makes grammars in another process, which is ended if it takes too long and started again when it has died."""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
import weakref

from headwater.grammars.errors import GrammarError
from headwater.grammars.json_options import JsonOptions

_COMMAND = (sys.executable, "-m", "headwater.grammars.check_process")
_CHUNK_BYTES = 1 << 16
_TOO_COMPLEX = "is too complex to be checked"


def question(kind: str, value: object, options: JsonOptions) -> str:
    """What to ask for a grammar. Equal questions have equal answers."""
    return json.dumps([kind, value, options.whitespace, options.closes_objects])


class GrammarChecker:
    """One process, started when it is first needed. Not for several threads at once."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._finalize = lambda: None

    def ask(self, asked: str, *, timeout_s: float) -> str:
        """The grammar's text. Blocks. Raises GrammarError, also if it takes too long; OSError without a process."""
        try:
            line = self._exchange(asked.encode() + b"\n", deadline_s=time.monotonic() + timeout_s)
        except TimeoutError:
            self.close()
            raise GrammarError("", "", f"takes longer than {timeout_s:g} s to check") from None
        if not line.endswith(b"\n"):  # the process has died, most likely of this grammar
            self.close()
            raise GrammarError("", "", _TOO_COMPLEX)
        match json.loads(line):
            case [text]:
                return text
            case [path, keyword, message]:
                raise GrammarError(path, keyword, message)
        raise AssertionError(f"not an answer: {line!r}")

    def close(self) -> None:
        """End the process. The next question starts another."""
        self._process = None
        self._finalize()  # a second call does nothing

    def _exchange(self, data: bytes, *, deadline_s: float) -> bytes:
        """Send a line and read one, or what comes before the process dies."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        answer, sent, received = b"", process.stdin.fileno(), process.stdout.fileno()
        poll = select.poll()
        poll.register(received, select.POLLIN)
        poll.register(sent, select.POLLOUT)
        while not answer.endswith(b"\n"):
            ready = dict(poll.poll(max(0.0, deadline_s - time.monotonic()) * 1e3))
            if not ready:
                raise TimeoutError
            if sent in ready:
                with contextlib.suppress(BrokenPipeError):
                    data = data[os.write(sent, data[: select.PIPE_BUF]) :]
                if not data or ready[sent] & select.POLLERR:
                    poll.unregister(sent)
            if received in ready:
                if not (chunk := os.read(received, _CHUNK_BYTES)):
                    break
                answer += chunk
        return answer

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            process = subprocess.Popen(
                _COMMAND,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # a client must not fill the server's log
                start_new_session=True,
            )
            self._process = process
            self._finalize = weakref.finalize(self, _end, process)
        return self._process


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
