"""The first steps of a runner: afterwards everything is initialised and compiled for the first request."""

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from headwater.execution.runner import Runner
from headwater.messages.generation import SamplingParams
from headwater.scheduling.plan import NEWEST_TOKEN, PageCopy, PageUpdate, SlotAssignment, StepHandle, StepPlan

# Prompt tokens of the steps that load kernels. CUDA loads a kernel at its first launch, and the libraries choose other
# kernels for matrix products of other sizes; otherwise a user's prompt would wait for them.
_SIZES = (512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)


def chunk_sizes(largest: int) -> tuple[int, ...]:
    """Chunks that make a GPU load all kernels for chunks of up to `largest` tokens, the largest first."""
    return (largest, *sorted((size for size in _SIZES if size < largest), reverse=True))


class Steps(Protocol):
    """What launches steps: a runner, or what launches them on all ranks."""

    def launch(self, plan: StepPlan) -> StepHandle: ...


def warm_up(runner: Runner, *, steps: Steps | None = None, sizes: Sequence[int] = (128,)) -> None:
    """Run chunks of `sizes` tokens in slot 0, each with a decode after it, then a short one that samples.

    Waits for the results. Writes to page 0 only; call it before any request is planned. `steps`: what launches them, if
    not the runner itself.
    """
    steps = steps or runner
    for num_tokens in sizes:
        _run_request(runner, num_tokens, SamplingParams(temperature=0.0), steps=steps)
    if runner.adapters is not None:
        for num_tokens in sizes:
            _run_request(runner, num_tokens, SamplingParams(temperature=0.0), steps=steps, adapter=1)
    _run_request(runner, min(*sizes, 8), SamplingParams(top_k=8, top_p=0.9, seed=1), steps=steps)


def time_decode_s(steps: Steps, *, limit_s: float = 0.03) -> float:
    """The shortest of the decodes of one row that fit into `limit_s`, at least one. Directly after `warm_up`."""
    decode = _single_row_plan(np.full(1, NEWEST_TOKEN, dtype=np.int32), 1)  # in the slot and page of its last request
    times: list[float] = []
    while not times or sum(times) + min(times) < limit_s:
        began_s = time.perf_counter()
        steps.launch(decode).collect()
        times.append(time.perf_counter() - began_s)
    return min(times)


def _run_request(
    runner: Runner, num_tokens: int, sampling: SamplingParams, *, steps: Steps, adapter: int = 0
) -> None:
    num_tokens = min(num_tokens, runner.model.config.max_context - 1)
    assignment = SlotAssignment(
        slot=0,
        use=-1,
        sampling=sampling,
        token_ids=np.zeros(num_tokens, dtype=np.int32),
        num_prompt_tokens=num_tokens,
        stop_token_ids=(),
        adapter=adapter,
    )
    num_pages = -(-(num_tokens + 1) // runner.kv.layout.page_size)
    pages = PageUpdate(slot=0, first=0, pages=np.zeros(num_pages, dtype=np.int32))
    chunk = _single_row_plan(assignment.token_ids, 0, assignments=(assignment,), pages=(pages,))
    steps.launch(chunk).collect()
    steps.launch(_single_row_plan(np.full(1, NEWEST_TOKEN, dtype=np.int32), num_tokens)).collect()


def _single_row_plan(
    token_ids: np.ndarray,
    num_computed: int,
    *,
    assignments: tuple[SlotAssignment, ...] = (),
    pages: tuple[PageUpdate, ...] = (),
) -> StepPlan:
    """A plan of slot 0 alone, for the warm-up."""
    return StepPlan(
        step_id=-1,
        assignments=assignments,
        page_updates=pages,
        slots=np.zeros(1, dtype=np.int32),
        uses=np.full(1, -1, dtype=np.int64),
        num_computed=np.full(1, num_computed, dtype=np.int32),
        num_tokens=np.full(1, len(token_ids), dtype=np.int32),
        samples=np.ones(1, dtype=np.bool_),
        token_ids=token_ids,
        num_decodes=0 if num_computed == 0 else 1,
        num_outputs=np.zeros(1, dtype=np.int32),
        page_copies=(PageCopy(source=0, target=0, num_tokens=1),) if pages else (),
    )
