"""What tests of servers of several ranks share: their processes, values of their weights, a rank that hangs."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from running_server import RunningServer
from safetensors.numpy import load_file
from tiered import SAMPLING, prompt

from headwater.bench.machine import all_processes, children_of
from processes import is_alive


@contextlib.contextmanager
def hanging_ranks(file: Path) -> Iterator[None]:
    """For servers that are started within: while `file` exists, each rank but rank 0 hangs in its next step."""
    shutil.copy(Path(__file__).with_name("hanging_rank.py"), file.parent / "sitecustomize.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADWATER_TEST_HANG", str(file))
        patch.setenv("PYTHONPATH", str(file.parent), prepend=os.pathsep)
        yield


def ranks_by_engine(server: RunningServer) -> dict[int, list[int]]:
    """The processes of ranks 1 and up, in their order, by the process of their engine."""
    return {pid: children_of(pid) for pid in server.engine_pids()}


def check_values(server: RunningServer, model: str) -> None:
    """Whole tensors are shown, of which each rank has rows, columns or everything."""
    for path in Path(model).glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            shown = server.get(f"/get_weights_by_name?name={name}&truncate_size={tensor.size}").json()
            assert shown["shape"] == list(tensor.shape)
            for engine in shown["engines"]:
                assert np.array_equal(np.array(engine["values"], dtype=np.float32), tensor.reshape(-1)), name


def wait_until(condition: Callable[[], bool], server: RunningServer) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, server.log
        time.sleep(0.1)


def status(server: RunningServer, engine: int, num_new: int) -> int:
    sampling = SAMPLING | {"max_new_tokens": num_new}
    body = {"input_ids": prompt(0), "sampling_params": sampling, "routed_dp_rank": engine}
    return server.post("/generate", json=body).status_code


def alive_in_session(session: int) -> list[int]:
    """The processes that a server has left: it leads a session."""
    return [pid for pid, fields in all_processes().items() if int(fields[3]) == session and is_alive(pid)]
