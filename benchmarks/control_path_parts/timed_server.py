"""`headwater serve` whose engine notes when it computes.

`timed_server.py OUT serve ...` is the command line; the engine process that it starts is `timed_server.py OUT`. When
the engine ends, it writes an array to OUT: a row for each call of the kernels, with the columns of COLUMNS. With
CONTROL_PATH_PAUSE_MS in the environment, repeated decode steps are not computed: the engine's thread sleeps so long.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

NUM_COMPUTED = 4  # steps of a size, before pauses take their place: the results stay in memory
COLUMNS = ("num_tokens", "began_ns", "ended_ns", "cpu_began_ns", "cpu_ended_ns")  # the latter of the engine's thread


class TimedRun:
    """Takes the place of the library's `hw_run`. A call costs about 1 us more."""

    def __init__(self, run: Any, *, pause_s: float) -> None:
        self._run = run
        self._pause_s = pause_s
        self._num_alike = (0, 0)  # tokens of the newest step, how many steps in a row had as many
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, *arguments: Any) -> None:
        cpu_began_ns, began_ns = time.thread_time_ns(), time.monotonic_ns()
        num_tokens = arguments[2]._obj.num_tokens  # 0: not a step, but an op of sampling
        if self._may_pause(num_tokens):
            time.sleep(self._pause_s)
        else:
            self._run(*arguments)
        ended_ns, cpu_ended_ns = time.monotonic_ns(), time.thread_time_ns()
        self.calls.append((num_tokens, began_ns, ended_ns, cpu_began_ns, cpu_ended_ns))

    def _may_pause(self, num_tokens: int) -> bool:
        if num_tokens == 0 or not self._pause_s:
            return False
        alike, count = self._num_alike
        self._num_alike = (num_tokens, count + 1 if num_tokens == alike else 1)
        return self._num_alike[1] > NUM_COMPUTED


def run_engine(out: Path) -> int:
    import numpy as np

    from headwater.devices.cpu.kernel_library import kernel_library
    from headwater.server.engine_process import main

    library = kernel_library()
    assert library is not None, "the kernels are what is timed"
    pause_s = float(os.environ.get("CONTROL_PATH_PAUSE_MS", "0")) / 1e3
    timed = library.functions.hw_run = TimedRun(library.functions.hw_run, pause_s=pause_s)
    code = main()
    np.save(out, np.array(timed.calls, dtype=np.int64).reshape(-1, len(COLUMNS)))
    return code


def run_server(out: Path, arguments: list[str]) -> None:
    from headwater.cli.main import app
    from headwater.server.supervisor import EngineSupervisor

    command = (sys.executable, __file__, str(out))
    EngineSupervisor.__init__.__kwdefaults__["command"] = command
    app(arguments)


if __name__ == "__main__":
    sys.exit(run_server(Path(sys.argv[1]), sys.argv[2:]) if sys.argv[2:] else run_engine(Path(sys.argv[1])))
