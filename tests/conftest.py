"""What all tests share: warnings that are not ours, and nothing that reaches out of this machine."""

import atexit
import gc
import os
import re
import sys
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from suite import files_in_turn
from suite.hypothesis_constants import keep_constants

settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("NO_COLOR", "1")
# before numpy and torch are loaded: other processes need the cores, too, and OpenBLAS spins while it waits for them
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
if not Path("/dev/nvidiactl").exists():  # no GPU: the Triton kernels are interpreted, which must be said before import
    os.environ.setdefault("TRITON_INTERPRET", "1")


SOURCES = Path(__file__).parent.parent / "src" / "headwater"
# what a run leaves out with -m "not (gpu or load)", and the marks of all tests of a file
LEAVING_OUT = re.compile(r"not (\w+|\(\w+( or \w+)*\))")
MARKS_OF_FILE = re.compile(r"^pytestmark = (\[.*?\]$|[^\[].*?$)", re.MULTILINE | re.DOTALL)
# a file says pytest.mark.xdist_group("default server")
GROUP = re.compile(r"""^pytestmark = .*xdist_group\("(.+?)"\)""", re.MULTILINE)
BRINGS_TORCH = re.compile(
    r"^((from|import) (torch|transformers|tiny_models|tiny_gguf|attention_setting|safetensors\.torch)\b"
    r"""|.*importorskip\("torch"\))""",
    re.MULTILINE,
)


def pytest_configure(config: pytest.Config) -> None:
    leaves_out = bool(LEAVING_OUT.fullmatch(config.option.markexpr))
    files_in_turn.register(config, imported=hasten_triton, group_of=partial(group_of, without_gpu=leaves_out))


def group_of(path: Path, *, without_gpu: bool) -> str | None:
    """Files that run in one process: those that bring PyTorch, 7 s of CPU with transformers, and those with a group.

    Where a GPU's tests run as well, PyTorch is in every process.
    """
    text = path.read_text()
    group = GROUP.search(text)
    return group[1] if group else "torch" if without_gpu and BRINGS_TORCH.search(text) else None


@pytest.hookimpl(trylast=True)  # after Hypothesis's, which allows the use of its storage
def pytest_sessionstart(session: pytest.Session) -> None:
    """Each of several processes reads a share of our sources for Hypothesis."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None:
        return
    gc.disable()  # until the files are collected: they make a million objects, and all of them stay
    number, count = int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    keep_constants(sorted(SOURCES.rglob("*.py"))[number::count])


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A file is not imported if all of its tests have a mark that is left out: several bring PyTorch, or Triton."""
    marks = config.option.markexpr
    if collection_path.suffix != ".py" or not LEAVING_OUT.fullmatch(marks):
        return None
    found = MARKS_OF_FILE.search(collection_path.read_text())
    marks_of_file = re.findall(r"pytest\.mark\.(\w+)", found[1]) if found else []
    return True if set(marks_of_file) & set(re.findall(r"\w+", marks)) else None


def pytest_collection_finish() -> None:
    gc.freeze()  # or each collection of garbage, those of pytest at the end too, would look at the files again
    atexit.register(gc.unfreeze)  # libraries complain of what they find alive when the process has ended
    gc.enable()
    hasten_triton()


def hasten_triton() -> None:
    """Where tests that were imported run its interpreter."""
    if "triton.runtime.interpreter" in sys.modules:
        from interpreted_triton import hasten

        hasten()
