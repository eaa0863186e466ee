"""What all tests share: warnings that are not ours, and nothing that reaches out of this machine."""

import atexit
import gc
import os
import sys
from pathlib import Path

import pytest
from _pytest.assertion import rewrite
from hypothesis import HealthCheck, settings

settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("NO_COLOR", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded: other processes need the cores, too
if not Path("/dev/nvidiactl").exists():  # no GPU: the Triton kernels are interpreted, which must be said before import
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Of several processes each rewrites the assertions of its share of the files, and keeps them for the others.

    They collect the same files in one order, so each would rewrite all of them at the same time: 10 s of CPU.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        return
    gc.disable()  # until the files are collected: they make a million objects, and all of them stay
    if sys.dont_write_bytecode:
        return
    number, count = int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    for path in sorted(Path(__file__).parent.rglob("test_*.py"))[number::count]:
        folder = rewrite.get_cache_dir(path)
        bytecode = folder / (path.stem + rewrite.PYC_TAIL)
        if rewrite._read_pyc(path, bytecode) is None and rewrite.try_makedirs(folder):
            source_hash, code = rewrite._rewrite_test(path, session.config)
            rewrite._write_pyc(session.config.stash[rewrite.assertstate_key], code, source_hash, bytecode)


def pytest_collection_finish() -> None:
    gc.freeze()  # or each collection of garbage, those of pytest at the end too, would look at the files again
    atexit.register(gc.unfreeze)  # libraries complain of what they find alive when the process has ended
    gc.enable()
    if "triton.runtime.interpreter" in sys.modules:
        from interpreted_triton import hasten

        hasten()
