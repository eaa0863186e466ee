"""The CPU kernels that `serve` would use."""

import os

from headwater.devices.cpu.kernel_build import (
    INSTRUCTION_SETS,
    PACKAGED,
    chosen_instruction_set,
    find,
    has_compiler,
    usable_instruction_sets,
)
from headwater.devices.cpu.kernel_library import REMEDY, KernelLibrary, are_kernels_wanted
from headwater.devices.cpu.topology import cpu_flags
from headwater.doctor.finding import Finding, Level

_BUILD = "python -m headwater.devices.cpu.kernel_build"


def kernels() -> tuple[Finding, KernelLibrary | None]:
    """The choice of instruction set and library, and the library. Compiles nothing."""
    usable = [isa.name for isa in usable_instruction_sets()]
    known_flags = frozenset[str]().union(*(isa.flags for isa in INSTRUCTION_SETS.values()))
    facts = {
        "flags": sorted(cpu_flags() & known_flags),
        "usable": usable,
        "HEADWATER_CPU_ISA": os.environ.get("HEADWATER_CPU_ISA"),
        "HEADWATER_NATIVE": os.environ.get("HEADWATER_NATIVE"),
    }
    slow = "computes in numpy, many times slower"
    if not are_kernels_wanted():
        return Finding("kernels", f"HEADWATER_NATIVE=0: {slow}", Level.NOTE, "unset HEADWATER_NATIVE", facts), None
    try:
        isa = chosen_instruction_set()
    except ValueError as error:
        remedy = f"unset HEADWATER_CPU_ISA, or take one of: {', '.join(usable) or 'none'}"
        return Finding("kernels", str(error), Level.PROBLEM, remedy, facts), None
    if isa is None:
        text = f"none are written for this processor: {slow}"
        return Finding("kernels", text, Level.NOTE, "take a processor with AVX2, or Arm with dotprod", facts), None
    facts["chosen"] = isa.name
    why = f"the best of {', '.join(usable)}" if len(usable) > 1 else "the only set that it has"
    if facts["HEADWATER_CPU_ISA"]:
        why = "by HEADWATER_CPU_ISA"
    path = find(isa)
    facts["library"] = None if path is None else str(path)
    if path is None:
        if has_compiler(isa):
            text = f"{isa.name} ({why}), not compiled yet: the first start does it, in up to a minute"
            return Finding("kernels", text, Level.NOTE, f"`{_BUILD}` compiles them now", facts), None
        return Finding("kernels", f"{isa.name} ({why}), but no library: {slow}", Level.PROBLEM, REMEDY, facts), None
    try:
        library = KernelLibrary(path, isa)
    except (OSError, AttributeError) as error:
        text, remedy = f"{isa.name}: the library does not load ({error})", f"delete {path}: a start compiles it again"
        return Finding("kernels", text, Level.PROBLEM, remedy, facts), None
    origin = "shipped" if path.parent == PACKAGED else f"compiled here, in {path.parent}"
    if isa.name != usable[0]:
        remedy = f"unset HEADWATER_CPU_ISA for the faster {usable[0]}"
        return Finding("kernels", f"{isa.name} ({why}), {origin}", Level.NOTE, remedy, facts), library
    return Finding("kernels", f"{isa.name} ({why}), {origin}", facts=facts), library
