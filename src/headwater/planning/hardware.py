"""The rates of a device: presets, and files that change them."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import msgspec


@dataclass(frozen=True, slots=True)
class Hardware:
    """Rates of one engine's device. They are those that a serving engine reaches, not those of the data sheet."""

    name: str
    flops_per_s: float  # of linear layers, in large products
    attention_flops_per_s: float
    bytes_per_s: float  # reading weights and KV
    overlap: float  # 1: a product takes the longer time of bytes and FLOPs; 0: their sum
    step_overhead_s: float  # of every step
    row_overhead_s: float  # of each request in a step
    token_overhead_s: float  # of each token computed: norms, rotary embedding, writing KV
    host_bytes_per_s: float  # copies between device and host, in each direction
    storage_bytes_per_s: float
    storage_latency_s: float  # of one call to the store
    memory_bytes: float  # of the device: weights and KV
    is_async: bool  # a step is launched while the previous one runs
    all_reduce_latency_s: float = 0.0  # of a sum over the ranks, however short
    all_reduce_bytes_per_s: float = 0.0  # of two ranks' longer sums; 0: several ranks cannot be planned here

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is not float and field.type != "float":
                continue
            low = 0.0 if field.name in _MAY_BE_ZERO else math.ulp(0.0)
            high = 1.0 if field.name == "overlap" else math.inf
            if not low <= value <= high:
                raise ValueError(f"{field.name} of the hardware must be {_range_of(field.name)}, found {value}")


_MAY_BE_ZERO = (
    "overlap",
    "step_overhead_s",
    "row_overhead_s",
    "token_overhead_s",
    "storage_latency_s",
    "all_reduce_latency_s",
    "all_reduce_bytes_per_s",
)


def _range_of(name: str) -> str:
    if name == "overlap":
        return "from 0 to 1"
    return "at least 0" if name in _MAY_BE_ZERO else "above 0"


# Measured on 22 Nov 2026 on one H100 80GB: at best 757 TFLOP/s in products and 3.10 TB/s in reads. Serving engines
# reached 81 % of the former in prefill and 2.6 TB/s in decode, plus 0.7 ms a step. Paged attention in prefill
# reached 510 TFLOP/s; scattered pages moved at 52 GB/s to and from pinned memory.
_H100 = Hardware(
    name="h100",
    flops_per_s=6.1e14,
    attention_flops_per_s=5.1e14,
    bytes_per_s=2.6e12,
    overlap=1.0,
    step_overhead_s=0.0007,
    row_overhead_s=0.0,
    token_overhead_s=0.0,
    host_bytes_per_s=5.2e10,
    storage_bytes_per_s=3e9,  # one NVMe disk
    storage_latency_s=0.0005,
    memory_bytes=80e9,
    is_async=True,
    # NCCL in a CUDA graph on two H200 of one host, 29 Nov 2026: 8 KiB in 12.4 us, 512 KiB in 15.6, 1 MiB in 20.0
    all_reduce_latency_s=12.3e-6,
    all_reduce_bytes_per_s=1.4e11,
)
HARDWARE = {
    hardware.name: hardware
    for hardware in (
        _H100,
        # The same processor with 4.8 instead of 3.35 TB/s of memory in its data sheet. For one stream at 8B in bfloat16
        # the model gives 4.7 ms a token; one H200 took 4.5 ms, and moved scattered pages at 51 GB/s.
        dataclasses.replace(_H100, name="h200", bytes_per_s=2.6e12 * 4.8 / 3.35, memory_bytes=141e9),
        # Two cores with AVX512-BF16, SmolLM2 in bfloat16, measured by benchmarks/plan_check.py on 22 Nov 2026.
        Hardware(
            name="cpu",
            flops_per_s=3.4e11,
            attention_flops_per_s=3.4e11,
            bytes_per_s=2.35e10,
            overlap=1.0,
            step_overhead_s=0.001,
            row_overhead_s=0.0004,
            token_overhead_s=0.0,
            host_bytes_per_s=5e9,
            storage_bytes_per_s=1e9,
            storage_latency_s=0.001,
            memory_bytes=4e9,
            is_async=False,
        ),
    )
}


def find_hardware(name: str) -> Hardware:
    """A preset by name, or a JSON file with fields of `Hardware` and `base`, a preset for the other fields."""
    if name in HARDWARE:
        return HARDWARE[name]
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"hardware must be a JSON file or one of {', '.join(HARDWARE)}; found {name!r}")
    try:
        raw = msgspec.json.decode(path.read_bytes(), type=dict[str, float | bool | str])
        base = HARDWARE.get(str(raw.pop("base", "h100")))
        if base is None:
            raise ValueError(f"base must be one of {', '.join(HARDWARE)}")
        fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
        unknown = raw.keys() - fields.keys()
        if unknown:
            raise ValueError(f"{min(unknown)!r} is not known; known: base, {', '.join(fields)}")
        return msgspec.convert(fields | {"name": path.stem} | raw, Hardware)
    except ValueError as error:  # msgspec's errors are ValueErrors
        raise ValueError(f"hardware {path.name}: {error}") from None
