"""The compiled CPU kernels as ctypes sees them: one library per instruction set, its structs, one op by hand."""

import ctypes
import functools
import logging
import os
from pathlib import Path

from headwater.devices.cpu.kernel_build import InstructionSet, build, chosen_instruction_set, find

logger = logging.getLogger(__name__)

_LONGEST_REASON = 500  # of a compiler's errors in the log

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64


class Step(ctypes.Structure):
    """`Step` of kernels/step.h, field by field."""

    _fields_ = (
        ("num_tokens", _LONG),
        ("num_rows", _LONG),
        ("num_selected", _LONG),
        ("token_ids", _POINTER),
        ("positions", _POINTER),
        ("query_starts", _POINTER),
        ("context_lens", _POINTER),
        ("page_tables", _POINTER),
        ("table_stride", _LONG),
        ("selected", _POINTER),
        ("kv", _POINTER),
        ("chunks", _POINTER),
        ("num_chunks", _LONG),
        ("queries_per_chunk", _LONG),
        ("partial_slots", _POINTER),
        ("next_sharing", _POINTER),
    )


TOKENS, SELECTED = 0, 1  # `enum Rows` of kernels/step.h

_NUM_CHUNKS = ctypes.CFUNCTYPE(_LONG, _POINTER, ctypes.POINTER(Step))
_RUN_CHUNK = ctypes.CFUNCTYPE(None, _POINTER, ctypes.POINTER(Step), _LONG)


class Kernel(ctypes.Structure):
    """`Kernel` of kernels/step.h: the two functions of a kernel."""

    _fields_ = (("num_chunks", _NUM_CHUNKS), ("run_chunk", _RUN_CHUNK))


class Op(ctypes.Structure):
    """`Op` of kernels/step.h: addresses of a kernel and of its job."""

    _fields_ = (("kernel", _POINTER), ("job", _POINTER))


class KernelLibrary:
    """The loaded library of one instruction set."""

    def __init__(self, path: Path, isa: InstructionSet) -> None:
        self.isa = isa
        self.functions = ctypes.CDLL(str(path))
        self.functions.hw_run.argtypes = (_POINTER, _LONG, ctypes.POINTER(Step), _LONG, _POINTER)
        self.functions.hw_run.restype = None

    def kernel(self, name: str) -> Kernel:
        """The `Kernel` named hw_NAME; `ctypes.addressof` of it is what a program records."""
        return Kernel.in_dll(self.functions, f"hw_{name}")

    def run(self, name: str, job: ctypes.Structure, step: Step) -> None:
        """Run one op without a pool, chunk after chunk."""
        kernel, address = self.kernel(name), ctypes.addressof(job)
        for chunk in range(kernel.num_chunks(address, ctypes.byref(step))):
            kernel.run_chunk(address, ctypes.byref(step), chunk)

    def run_on_threads(self, name: str, job: ctypes.Structure, *, num_threads: int) -> None:
        """Run one op that needs nothing of a step."""
        op = Op(ctypes.addressof(self.kernel(name)), ctypes.addressof(job))
        self.functions.hw_run(ctypes.addressof(op), 1, ctypes.byref(Step()), num_threads, None)


def usable_kernels() -> KernelLibrary | None:
    """`kernel_library()`; None as well if HEADWATER_NATIVE=0 asks for numpy."""
    return None if os.environ.get("HEADWATER_NATIVE") == "0" else kernel_library()


@functools.cache
def kernel_library() -> KernelLibrary | None:
    """The library of the chosen instruction set, built if need be. None, with the reason in the log, if there is none.

    ValueError if HEADWATER_CPU_ISA names a set that is unknown or that this CPU lacks.
    """
    isa = chosen_instruction_set()
    if isa is None:
        logger.warning("no CPU kernels are written for this processor: computing in numpy, many times slower")
        return None
    try:
        if find(isa) is None:
            logger.info("compiling the CPU kernels for %s, once", isa.name)
        return KernelLibrary(build(isa), isa)
    except (RuntimeError, OSError) as error:
        logger.warning("no CPU kernels (%s), computing in numpy, many times slower: install a C compiler, or "
                       "`pip install ziglang`", str(error)[:_LONGEST_REASON])  # fmt: skip
        return None
