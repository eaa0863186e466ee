"""The cost of the control plane in a turn of the loop when no operation is pending.

The real loop, scheduler and cache decode 32 requests with a runner that computes nothing. So a turn is host work only,
the worst case for the control plane's share. Blocks of turns with and without the control plane alternate in one run.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from headwater.clock import MonotonicClock
from headwater.control.operation import Hold
from headwater.engine.wiring import EngineParts, wire_engine
from headwater.messages.base import pack_ids
from headwater.messages.generation import Generate, SamplingParams
from headwater.messages.state import EngineReady
from headwater.messages.wire import ToClient, ToEngine
from headwater.scheduling.limits import SchedulerLimits
from headwater.scheduling.plan import StepPlan, StepResult
from headwater.simulation.fakes.memory import FakeKvMemory, FakeWeights

sys.path.append(str(Path(__file__).resolve().parent / "serving"))
from results import save

NUM_REQUESTS = 32
BLOCK_TURNS = 500


class NoWork:
    """A runner whose tokens are all 1, and the step handle of its only result."""

    def __init__(self) -> None:
        self.weights = FakeWeights()
        self.kv_memory = FakeKvMemory(np.zeros((1, 1), dtype=np.uint64))
        self._result: StepResult | None = None

    def launch(self, plan: StepPlan) -> "NoWork":
        self._result = StepResult(
            step_id=plan.step_id,
            slots=plan.slots,
            uses=plan.uses,
            tokens=np.ones(plan.num_rows, dtype=np.int32),
            is_finite=np.ones(plan.num_rows, dtype=np.bool_),
        )
        return self

    def is_done(self) -> bool:
        return True

    def collect(self) -> StepResult:
        assert self._result is not None
        return self._result


class Sink:
    """A wire that delivers its messages once, and drops answers."""

    def __init__(self) -> None:
        self.inbound: list[tuple[bytes, ToEngine]] = []

    def receive(self, *, wait_s: float) -> list[tuple[bytes, ToEngine]]:
        taken, self.inbound = self.inbound, []
        return taken

    def send(self, client: bytes, message: ToClient) -> None:
        pass

    def close(self) -> None:
        pass


class NoControl:
    """Replaces the control plane, without any operation."""

    hold = Hold.NOTHING
    has_answers = False

    def advance(self) -> None:
        pass

    def take_answers(self) -> tuple[()]:
        return ()

    def next_look_s(self) -> None:
        return None


def make_engine() -> tuple[EngineParts, Sink]:
    wire = Sink()
    ready = EngineReady(
        call_id="",
        model_name="none",
        architecture="None",
        dtype="none",
        vocab_size=200,
        max_context=1 << 20,
        eos_token_ids=(),
        page_size=16,
        num_pages=200_000,
        page_bytes=1,
        max_running=NUM_REQUESTS,
        weights_id="none",
        weight_version="",
        load_s=0.0,
        device="none",
    )
    limits = SchedulerLimits(
        max_running=NUM_REQUESTS,
        max_step_tokens=4096,
        prefill_chunk_tokens=4096,
        max_queued=1000,
        max_context=1 << 20,
    )
    parts = wire_engine(wire=wire, runner=NoWork(), ready=ready, limits=limits, clock=MonotonicClock())
    for number in range(NUM_REQUESTS):
        prompt = pack_ids([number + 1, *range(2, 100)])
        sampling = SamplingParams(max_new_tokens=90_000, ignore_eos=True)
        wire.inbound.append((b"c", Generate(rid=f"r{number}", prompt_ids=prompt, sampling=sampling)))
    for _ in range(50):
        parts.loop.turn()
    assert len(parts.scheduler.running) == NUM_REQUESTS
    return parts, wire


def block_us(parts: EngineParts) -> float:
    """Microseconds per turn over one block."""
    started_s = time.perf_counter()
    for _ in range(BLOCK_TURNS):
        parts.loop.turn()
    return (time.perf_counter() - started_s) / BLOCK_TURNS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=40, help="pairs of blocks")
    parser.add_argument("--no-save", action="store_true", help="print, but write no result file")
    options = parser.parse_args()
    parts, _ = make_engine()
    controls: dict[str, Any] = {"with": parts.control, "without": NoControl()}
    times: dict[str, list[float]] = {"with": [], "without": []}
    for number in range(options.blocks):
        for name in ("with", "without") if number % 2 else ("without", "with"):
            parts.loop._control = controls[name]
            times[name].append(block_us(parts))
    ratios = [a / b for a, b in zip(times["with"], times["without"], strict=True)]
    record = {
        "num_requests": NUM_REQUESTS,
        "turn_us_with": statistics.median(times["with"]),
        "turn_us_without": statistics.median(times["without"]),
        "ratio_median": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4),
    }
    print(record)
    if not options.no_save:
        print("written to", save("control-overhead", [record], servers={}))


if __name__ == "__main__":
    main()
