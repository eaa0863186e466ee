"""What a device does in a second: presets, and files that change them."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import msgspec


@dataclass(frozen=True, slots=True)
class Hardware:
    """Rates of one engine's device, as reached by a serving engine, not as printed on the box."""

    name: str
    flops_per_s: float  # of the linear layers, in large products
    attention_flops_per_s: float
    bytes_per_s: float  # reading weights and KV
    overlap: float  # 1: a product takes the longer of bytes and FLOPs; 0: their sum
    step_overhead_s: float  # of a step, whatever is in it
    row_overhead_s: float  # of each request in a step
    token_overhead_s: float  # of each token computed: norms, rotary embedding, writing KV
    host_bytes_per_s: float  # copies between device and host, each way
    storage_bytes_per_s: float
    storage_latency_s: float  # of one call of the store
    memory_bytes: float  # of the device: weights and KV
    is_async: bool  # a step is launched while the one before it runs

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is not float and field.type != "float":
                continue
            low = 0.0 if field.name in _MAY_BE_ZERO else math.ulp(0.0)
            high = 1.0 if field.name == "overlap" else math.inf
            if not low <= value <= high:
                raise ValueError(f"{field.name} of the hardware must be {_range_of(field.name)}, found {value}")


_MAY_BE_ZERO = ("overlap", "step_overhead_s", "row_overhead_s", "token_overhead_s", "storage_latency_s")


def _range_of(name: str) -> str:
    if name == "overlap":
        return "from 0 to 1"
    return "at least 0" if name in _MAY_BE_ZERO else "above 0"


# From measurements of 22 Nov 2026 on one H100 80GB: products 757 TFLOP/s and reads 3.10 TB/s at best, of which
# serving engines reached 81 % in prefill and 2.6 TB/s in decode; 0.7 ms a step beside those; paged attention in
# prefill 510 TFLOP/s; scattered pages 52 GB/s to and from pinned memory.
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
)
HARDWARE = {
    hardware.name: hardware
    for hardware in (
        _H100,
        # The same processor with 4.8 instead of 3.35 TB/s of memory by its data sheet. Held against one H200: this
        # gives 4.7 ms a token for one stream at 8B in bfloat16, 4.5 were measured; scattered pages moved at 51 GB/s.
        dataclasses.replace(_H100, name="h200", bytes_per_s=2.6e12 * 4.8 / 3.35, memory_bytes=141e9),
        # Two cores with AVX512-BF16, SmolLM2 in bfloat16, as benchmarks/plan_check.py measured them on 22 Nov 2026.
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
    """A preset by name, or a JSON file: fields of `Hardware`, and `base`, the preset that has the rest."""
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
