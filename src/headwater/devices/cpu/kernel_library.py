"""The compiled CPU kernels as ctypes sees them: one library per instruction set, its structs, one op by hand."""

import ctypes
import functools
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from headwater.devices.cpu.kernel_build import (
    PACKAGED,
    InstructionSet,
    build,
    chosen_instruction_set,
    find,
    usable_instruction_sets,
)

logger = logging.getLogger(__name__)

REMEDY = "install a C compiler, or `pip install ziglang`"
_NO_SET = "no CPU kernels are written for this processor"
_LONGEST_REASON = 500  # of a compiler's errors in the log

_MASK_BYTES = 128  # of Linux's cpu_set_t

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
        ("num_decodes", _LONG),
        ("num_sampled", _LONG),
        ("adapter_rows", _POINTER),
        ("adapter_tiles", _POINTER),
        ("num_adapter_tiles", _LONG),
    )


TOKENS, SELECTED = 0, 1  # `enum Rows` of kernels/step.h

_NUM_CHUNKS = ctypes.CFUNCTYPE(_LONG, _POINTER, ctypes.POINTER(Step))
_RUN_CHUNK = ctypes.CFUNCTYPE(None, _POINTER, ctypes.POINTER(Step), _LONG)


class Kernel(ctypes.Structure):
    """`Kernel` of kernels/step.h: the two functions of a kernel, and whether its chunks are in the order of rows."""

    _fields_ = (("num_chunks", _NUM_CHUNKS), ("run_chunk", _RUN_CHUNK), ("has_ordered_rows", _LONG))


class Op(ctypes.Structure):
    """`Op` of kernels/step.h: addresses of a kernel and of its job."""

    _fields_ = (("kernel", _POINTER), ("job", _POINTER))


class KernelLibrary:
    """The loaded library of one instruction set."""

    def __init__(self, path: Path, isa: InstructionSet) -> None:
        self.isa = isa
        self.path = path
        self.functions = ctypes.CDLL(str(path))
        self.functions.hw_run.argtypes = (_POINTER, _LONG, ctypes.POINTER(Step), _LONG, _POINTER)
        self.functions.hw_run.restype = None

    def pin_threads(self, cpus: Sequence[Sequence[int]]) -> None:
        """Keep thread i of the pool on `cpus[i]`, the caller (thread 0) while it runs ops. Before the first run."""
        process = os.sched_getaffinity(0)
        masks = b"".join(_mask(each) for each in cpus)
        self.functions.hw_pin_threads(masks, ctypes.c_int64(len(cpus)), _mask(process))

    @property
    def max_stacked(self) -> int:
        """Query heads times queries that a chunk of attention may have."""
        return ctypes.c_int64.in_dll(self.functions, "hw_max_stacked").value

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


def _mask(cpus: Iterable[int]) -> bytes:
    """Linux's bit mask of CPUs. Those above the largest one of the mask are left out."""
    bits = sum(1 << cpu for cpu in cpus if cpu < 8 * _MASK_BYTES)
    return bits.to_bytes(_MASK_BYTES, sys.byteorder)


def are_kernels_wanted() -> bool:
    """Unless HEADWATER_NATIVE=0 asks for numpy."""
    return os.environ.get("HEADWATER_NATIVE") != "0"


def usable_kernels() -> KernelLibrary | None:
    """`kernel_library()`; None as well if numpy is asked for."""
    return kernel_library() if are_kernels_wanted() else None


def kernel_library() -> KernelLibrary | None:
    """The library of the chosen instruction set, built if need be. None, with the reason in the log, if there is none.

    ValueError if HEADWATER_CPU_ISA names a set that is unknown or that this CPU lacks.
    """
    return library_or_reason()[0]


def kernels_origin() -> str:
    """Where the kernels in use come from, or in a few words what to do where there are none."""
    if not are_kernels_wanted():
        return "unset HEADWATER_NATIVE"
    library, reason = library_or_reason()
    if library is None:
        return REMEDY if reason != _NO_SET else _NO_SET
    origin = "shipped" if library.path.parent == PACKAGED else "compiled here"
    best = usable_instruction_sets()[0].name  # at least the one of the library
    return origin if library.isa.name == best else f"{origin}; unset HEADWATER_CPU_ISA for the faster {best}"


@functools.cache
def library_or_reason() -> tuple[KernelLibrary | None, str]:
    """`kernel_library()`, or None and why there is none. Compiled, loaded and logged once."""
    isa = chosen_instruction_set()
    if isa is None:
        logger.warning("%s: computing in numpy, many times slower", _NO_SET)
        return None, _NO_SET
    try:
        if find(isa) is None:
            logger.info("compiling the CPU kernels for %s, once", isa.name)
        return KernelLibrary(build(isa), isa), ""
    except (RuntimeError, OSError) as error:
        reason = str(error)[:_LONGEST_REASON]
        logger.warning("no CPU kernels (%s), computing in numpy, many times slower: %s", reason, REMEDY)
        return None, reason
