"""The ctypes structs of jobs and steps have the fields of C; with one too few, a kernel reads beyond the job."""

import ctypes
import re

import pytest

from headwater.devices.cpu import attention_kernels, kernel_library, linear_kernels
from headwater.devices.cpu.adapters import memory as adapter_memory
from headwater.devices.cpu.adapters import recorded as recorded_adapters
from headwater.devices.cpu.experts import jobs as expert_jobs
from headwater.devices.cpu.kernel_build import SOURCES
from headwater.devices.cpu.ranks import group as rank_group
from headwater.devices.cpu.ranks import ops as rank_ops

C_TYPES = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "float": ctypes.c_float, "double": ctypes.c_double}
MODULES = (
    adapter_memory,
    recorded_adapters,
    attention_kernels,
    expert_jobs,
    kernel_library,
    linear_kernels,
    rank_group,
    rank_ops,
)
STRUCTS = sorted(
    {
        struct
        for module in MODULES
        for struct in vars(module).values()
        if isinstance(struct, type) and issubclass(struct, ctypes.Structure)
    },
    key=lambda struct: struct.__name__,
)


def fields_in_c(struct_name: str) -> list[tuple[str, type]]:
    """Name and type of each field; pointers are addresses, and arrays have their length."""
    sources = "\n".join(path.read_text() for path in sorted(SOURCES.rglob("*.[ch]")))
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", sources, flags=re.S)
    (body,) = re.findall(rf"typedef struct \{{([^{{}}]*)\}} {struct_name};", code)
    fields: list[tuple[str, type]] = []
    for line in filter(str.strip, body.split(";")):
        function = re.fullmatch(r"\s*\w+ \(\*(\w+)\)\(.*\)\s*", line, flags=re.S)
        if function:
            fields.append((function[1], ctypes.c_void_p))
            continue
        declared = re.fullmatch(r"\s*(?:const )?(\w+) (.*)", line, flags=re.S)
        assert declared, line
        for one in declared[2].split(","):
            kind = (
                ctypes.c_void_p if "*" in one else C_TYPES.get(declared[1], getattr(linear_kernels, declared[1], None))
            )
            name, _, length = one.replace("*", "").strip().rstrip("]").partition("[")
            fields.append((name, kind * int(length) if length else kind))
    return fields


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_a_struct_has_the_fields_of_c_in_their_order(struct: type[ctypes.Structure]) -> None:
    def plain(kind: type) -> type:
        is_address = issubclass(kind, ctypes._Pointer | ctypes._CFuncPtr)
        return ctypes.c_void_p if is_address else kind

    found = [(name, plain(kind)) for name, kind, *_ in struct._fields_]
    assert found == fields_in_c(struct.__name__)
