#!/usr/bin/env python3
"""Decode steps with a grammar on every row, on half of the rows and on none, with random weights on one GPU.

    grammar_run.py MODEL OUT.json [--rows 64] [--tokens 256] [--repeat 3] [--device cuda]

Two ways to run steps whose rows have grammars: launched one ahead, with the choice enqueued when the masks are there
(what the server does), and each step collected before the next one is launched. Besides the time of a step, the run
reports how long the host takes to fill the masks and to record a step's tokens. It also counts how often the device had
nothing left to do when the masks were there, and when the next step was launched. It needs nothing but the repository
and its dependencies.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from figures import Figures
from shapes import SHAPES, make_model

import workloads

# does not end within the run; its texts, numbers and names have masks of many tokens, of a few and of one
SCHEMA = {
    "type": "array",
    "minItems": 1500,
    "maxItems": 1500,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "size": {"type": "integer", "minimum": 0, "maximum": 100_000},
            "kind": {"enum": ["small", "large", "unknown"]},
            "is_new": {"type": "boolean"},
        },
        "required": ["name", "size", "kind", "is_new"],
        "additionalProperties": False,
    },
}
GREEDY = {"temperature": 0, "ignore_eos": True}
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "ignore_eos": True}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(argv)
    figures = Figures(options.out, {"model": options.model, "device": options.device, "rows": options.rows})
    with tempfile.TemporaryDirectory() as root:
        run(make_model(options.model, Path(root)), options, figures)
    return 0


def run(folder: Path, options: argparse.Namespace, figures: Figures) -> None:
    from headwater import Engine
    from headwater.heap import freeze_heap

    with Engine(
        str(folder),
        load_format="dummy",
        device=options.device,
        context_length=4096,
        max_running_requests=max(64, options.rows),
        log_level="info",
    ) as engine:

        def step_ms(params: dict[str, Any], num_masked: int, *, seed: int) -> float:
            """Milliseconds of a decode step in which `num_masked` rows have grammars."""
            masked = params | {"json_schema": SCHEMA}
            seconds: list[float] = []
            for length in (2, 2 + options.tokens):
                prompts = workloads.random_prompts(options.rows, 128, seed=seed + length)
                given = [(masked if row < num_masked else params) | {"max_new_tokens": length}
                         for row in range(options.rows)]  # fmt: skip
                started_s = time.perf_counter()
                answers = engine.generate(input_ids=prompts, sampling_params=given)
                seconds.append(time.perf_counter() - started_s)
                assert all(len(answer["output_ids"]) == length for answer in answers), "an answer is short"
            return 1e3 * (seconds[1] - seconds[0]) / options.tokens

        step_ms(GREEDY, options.rows, seed=1)  # compiles the grammar and the kernels
        step_ms(SAMPLED, options.rows // 2, seed=2)
        freeze_heap()
        for repeat in range(options.repeat):
            for name, params in (("greedy", GREEDY), ("sampled", SAMPLED)):
                seed = 1000 * (repeat + 1)
                for share, num_masked in (("none", 0), ("half", options.rows // 2), ("all", options.rows)):
                    with host_times(engine, on_gpu=options.device == "cuda") as times:
                        figures.put(f"{name}_{share}_step_ms_run{repeat}", step_ms(params, num_masked, seed=seed))
                    for what, value in times.figures().items():
                        figures.put(f"{name}_{share}_{what}_run{repeat}", value)
                with not_launched_ahead(engine):
                    for share, num_masked in (("none", 0), ("all", options.rows)):
                        value = step_ms(params, num_masked, seed=seed)
                        figures.put(f"{name}_{share}_not_ahead_step_ms_run{repeat}", value)


@dataclass
class HostTimes:
    """What the host does between two steps, and how often the device waited for it."""

    fill_s: list[float] = field(default_factory=list)
    record_s: list[float] = field(default_factory=list)
    are_masks_late: list[bool] = field(default_factory=list)
    is_launch_late: list[bool] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        found = {"record_ms": 1e3 * statistics.median(self.record_s)}
        if self.fill_s:
            found["fill_ms"] = 1e3 * statistics.median(self.fill_s)
            found["fill_p95_ms"] = 1e3 * statistics.quantiles(self.fill_s, n=20)[-1]
        if self.are_masks_late:
            found["masks_late_share"] = statistics.fmean(self.are_masks_late)
        if self.is_launch_late:
            found["launch_late_share"] = statistics.fmean(self.is_launch_late)
        return found


@contextmanager
def host_times(engine: Any, *, on_gpu: bool) -> Iterator[HostTimes]:
    """Times of all steps within the block."""
    import torch

    scheduler, runner, times = engine._engine._scheduler, engine._engine._steps._runner._runner, HostTimes()

    def timed(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
        def measured(*given: Any) -> Any:
            started_s = time.perf_counter()
            result = call(*given)
            seconds.append(time.perf_counter() - started_s)
            return result

        return measured

    def watched(call: Callable[..., Any], late: list[bool]) -> Callable[..., Any]:
        def asked(*given: Any, **named: Any) -> Any:
            late.append(torch.cuda.current_stream().query())
            return call(*given, **named)

        return asked

    patched = [(scheduler.masks, "fill"), (scheduler, "collect")]
    scheduler.masks.fill = timed(scheduler.masks.fill, times.fill_s)
    scheduler.collect = timed(scheduler.collect, times.record_s)
    if on_gpu:
        patched += [(runner, "_sample_masked"), (runner, "launch")]
        runner._sample_masked = watched(runner._sample_masked, times.are_masks_late)
        runner.launch = watched(runner.launch, times.is_launch_late)
    try:
        yield times
    finally:
        for owner, name in patched:
            delattr(owner, name)


@contextmanager
def not_launched_ahead(engine: Any) -> Iterator[None]:
    """Every step is collected in the turn that launches it."""
    steps = engine._engine._steps

    def wait(handle: Any) -> bool:
        if (done := getattr(handle, "done", None)) is not None:  # a CPU computes within the launch
            done.wait()
        return True

    steps.is_done = wait
    try:
        yield
    finally:
        del steps.is_done


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
