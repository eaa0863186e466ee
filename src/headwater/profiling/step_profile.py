"""The time of a step on this CPU, in all and by kind of op, beside the machine's floor measured on the spot."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.machine_speed import MachineSpeed, measure_speed
from headwater.devices.cpu.program import Program
from headwater.devices.cpu.thread_plan import plan_threads
from headwater.execution.cpu_runner import CpuRunner
from headwater.execution.warm_up import warm_up
from headwater.models.loader import DtypeName, LoadFormat, Quantization, load_model, resolve_model
from headwater.profiling.op_work import OpWork, work_of
from headwater.profiling.step_cases import StepCase, StepMaker
from headwater.scheduling.plan import StepPlan

PAGE_SIZE = 16
CONTROL = "control path"  # the time of a step outside its ops: inputs, work of attention, results


@dataclass(frozen=True, slots=True)
class KindTime:
    """All ops of one kind in a step."""

    kind: str
    num_ops: int
    ms: float
    floor_ms: float
    gb_s: float  # 0 where the ops need not read memory
    gop_s: float


@dataclass(frozen=True, slots=True)
class StepProfile:
    """The fastest of the measured steps of a case. Without kernels there are neither kinds nor a floor."""

    case: StepCase
    best_ms: float
    median_ms: float
    kinds: tuple[KindTime, ...]  # the longest first; their times add up to `best_ms`
    speed: MachineSpeed | None  # the better ones of the rates before and after the steps

    @property
    def floor_ms(self) -> float:
        return sum(kind.floor_ms for kind in self.kinds)

    @property
    def tokens_per_s(self) -> float:
        return self.case.num_tokens / self.median_ms * 1e3

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"name": self.case.name, "floor_ms": self.floor_ms, "tokens_per_s": self.tokens_per_s}


@dataclass(frozen=True, slots=True)
class ProfiledModel:
    """A loaded model whose steps can be measured."""

    device: CpuDevice
    runner: CpuRunner
    maker: StepMaker

    def measure(self, case: StepCase, *, repeat: int) -> StepProfile:
        """Run the case's step `repeat` times. Results below the floor mean that others disturbed its measurement."""
        make_plan = self.maker.place(case)
        before = self._speed()
        steps = [self._timed_step(make_plan) for _ in range(repeat)]
        speed = _faster(before, self._speed())
        seconds, op_ns = min(steps, key=lambda step: step[0])
        return StepProfile(
            case=case,
            best_ms=seconds * 1e3,
            median_ms=statistics.median(step[0] for step in steps) * 1e3,
            kinds=() if speed is None else self._by_kind(case, seconds, op_ns, speed),
            speed=speed,
        )

    @property
    def _program(self) -> Program:
        return self.runner.program

    def _speed(self) -> MachineSpeed | None:
        library = self.device.library
        return None if library is None else measure_speed(library, num_threads=self.device.num_threads)

    def _timed_step(self, make_plan: Callable[[], StepPlan]) -> tuple[float, list[int]]:
        """Seconds of a step, and the nanoseconds of its ops."""
        plan, program = make_plan(), self._program
        program.op_ns[:] = 0
        program.is_timed = True
        began_s = time.perf_counter()
        self.runner.launch(plan).collect()
        seconds = time.perf_counter() - began_s
        program.is_timed = False
        return seconds, program.op_ns.tolist()

    def _by_kind(
        self, case: StepCase, seconds: float, op_ns: list[int], speed: MachineSpeed
    ) -> tuple[KindTime, ...]:
        groups: dict[str, list[tuple[OpWork, int]]] = {}
        for op, ns in zip(self._program.ops, op_ns, strict=True):
            work = work_of(op, case, self.runner.kv.layout)
            groups.setdefault(work.kind, []).append((work, ns))
        kinds = [_kind_time(kind, group, speed) for kind, group in groups.items()]
        control_ms = seconds * 1e3 - sum(kind.ms for kind in kinds)
        kinds.append(KindTime(CONTROL, num_ops=0, ms=control_ms, floor_ms=0.0, gb_s=0.0, gop_s=0.0))
        return tuple(sorted(kinds, key=lambda kind: -kind.ms))


def load_for_profile(
    model: str,
    *,
    cases: list[StepCase],
    dtype: DtypeName = "auto",
    quantization: Quantization = "none",
    load_format: LoadFormat = "auto",
    threads: int | None = None,
) -> ProfiledModel:
    """Load a model on this CPU, with memory for the largest of the cases. ValueError or OSError as `load_model`."""
    (planned,) = plan_threads(threads=threads).engines
    device = CpuDevice(num_threads=planned.num_threads, cpus=planned.cpus)
    files = resolve_model(model)
    loaded = load_model(files, device=device, dtype=dtype, quantization=quantization, load_format=load_format)
    longest = max(case.context + case.num_new for case in cases)
    if longest > loaded.config.max_context:
        raise ValueError(f"a case of {longest} tokens does not fit the model's context of {loaded.config.max_context}")
    runner = CpuRunner(
        loaded,
        device,
        layout=loaded.kv_layout(page_size=PAGE_SIZE),
        num_pages=max(case.num_pages(PAGE_SIZE) for case in cases) + 16,
        max_running=max(case.num_rows for case in cases),
    )
    warm_up(runner, sizes=(min(128, loaded.config.max_context - 1),))
    return ProfiledModel(device, runner, StepMaker(runner))


def _kind_time(kind: str, group: list[tuple[OpWork, int]], speed: MachineSpeed) -> KindTime:
    ns = max(1, sum(each for _, each in group))
    return KindTime(
        kind,
        num_ops=len(group),
        ms=ns / 1e6,
        floor_ms=sum(work.floor_s(speed) for work, _ in group) * 1e3,
        gb_s=sum(work.num_bytes for work, _ in group) / ns,
        gop_s=sum(work.operations for work, _ in group) / ns,
    )


def _faster(one: MachineSpeed | None, other: MachineSpeed | None) -> MachineSpeed | None:
    if one is None or other is None:
        return None
    best = {name: max(getattr(one, name), getattr(other, name)) for name in ("read_gb_s", "gflop_s", "int8_gop_s")}
    return MachineSpeed(one.num_threads, **best)
