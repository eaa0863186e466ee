"""A scheduler over a real cache, whose steps the test computes itself: it sees every plan and chooses every token."""

import numpy as np

from headwater.cache.prefix_cache import PrefixCache
from headwater.clock import ManualClock
from headwater.messages.base import pack_ids
from headwater.messages.generation import Generate, Grammar, LogprobParams, Output, RequestOptions, SamplingParams
from headwater.scheduling.limits import SchedulerLimits
from headwater.scheduling.plan import StepPlan, StepResult
from headwater.scheduling.request import Request
from headwater.scheduling.scheduler import Scheduler

PAGE = 4
CLIENT = b"client"


def message(
    rid: str = "a",
    num_prompt_tokens: int = 6,
    num_tokens: int = 4,
    *,
    first_id: int = 0,
    logprobs: LogprobParams | None = None,
    output_interval: int = 1,
    account: int = 0,
    grammar: Grammar | None = None,
    **fields: object,
) -> Generate:
    """A request whose prompt is `first_id`, `first_id` + 1, ...; `fields` of RequestOptions and SamplingParams."""
    options = {name: fields.pop(name) for name in RequestOptions.__struct_fields__ if name in fields}
    return Generate(
        rid=rid,
        prompt_ids=pack_ids(list(range(first_id, first_id + num_prompt_tokens))),
        sampling=SamplingParams(max_new_tokens=num_tokens, **fields),
        options=RequestOptions(**options),
        logprobs=logprobs,
        output_interval=output_interval,
        account=account,
        grammar=grammar,
    )


def request(*args, arrived_s: float = 0.0, **kwargs) -> Request:
    return Request(message(*args, **kwargs), client=CLIENT, arrived_s=arrived_s)


class Steps:
    """`plan()` launches, `collect(plan)` ends a step; `step()` is both. Outputs are kept by rid."""

    def __init__(
        self,
        *,
        num_pages: int = 64,
        max_running: int = 4,
        max_step_tokens: int = 32,
        prefill_chunk_tokens: int = 16,
        max_queued: int = 8,
        max_context: int = 128,
        eos: tuple[int, ...] = (),
        policy: str = "fcfs",
        min_part_tokens: int = PAGE,
        max_gap_s: float | None = None,
        limits: dict[str, object] | None = None,
        **scheduler: object,
    ) -> None:
        self.clock = ManualClock()
        self.cache = PrefixCache(
            num_pages=num_pages, page_size=PAGE, page_bytes=64, clock=self.clock, min_part_tokens=min_part_tokens
        )
        all_limits = SchedulerLimits(
            max_running=max_running,
            max_step_tokens=max_step_tokens,
            prefill_chunk_tokens=prefill_chunk_tokens,
            max_queued=max_queued,
            max_context=max_context,
            max_gap_s=max_gap_s,
            **(limits or {}),
        )
        self.scheduler = Scheduler(
            self.cache,
            limits=all_limits,
            clock=self.clock,
            weights_id="w",
            eos_token_ids=frozenset(eos),
            policy=policy,
            **scheduler,
        )
        self.outputs: dict[str, list[Output]] = {}

    def add(self, *args, **kwargs) -> None:
        self.scheduler.add(message(*args, **kwargs), client=CLIENT)

    def plan(self) -> StepPlan | None:
        self.scheduler.take_compiled()
        return self.scheduler.plan_step()

    def collect(self, plan: StepPlan, *, token: int = 900, not_finite: tuple[int, ...] = ()) -> None:
        """The step ends; every row that samples gets `token`."""
        is_finite = np.ones(plan.num_rows, dtype=np.bool_)
        is_finite[list(not_finite)] = False
        tokens = np.where(plan.samples, token, -1).astype(np.int32)
        self.scheduler.collect(
            plan,
            StepResult(step_id=plan.step_id, slots=plan.slots, uses=plan.uses, tokens=tokens, is_finite=is_finite),
        )

    def step(self, *, token: int = 900) -> StepPlan:
        plan = self.plan()
        assert plan is not None, "nothing can run"
        self.collect(plan, token=token)
        return plan

    def finish_all(self, *, max_steps: int = 200) -> None:
        for _ in range(max_steps):
            plan = self.plan()
            if plan is None:
                break
            self.collect(plan)
        assert not self.scheduler.in_flight(), f"still there: {self.scheduler.in_flight()}"

    def said(self, rid: str = "a") -> list[Output]:
        """All outputs of a request up to now."""
        for _, outputs in self.scheduler.take_outputs():
            for output in outputs.items:
                self.outputs.setdefault(output.rid, []).append(output)
        return self.outputs.get(rid, [])

    def tokens_of(self, rid: str = "a") -> list[int]:
        return [token for output in self.said(rid) for token in output.token_ids]

    def finish_of(self, rid: str = "a"):
        """How it ended; None while it has not."""
        return next((output.finish for output in self.said(rid) if output.finish is not None), None)

    def rows(self, plan: StepPlan) -> list[tuple[str, int]]:
        """(rid, tokens) of the plan's rows, in its order."""
        by_slot = {r.slot: r.rid for r in self.scheduler.running}
        return [(by_slot[slot], num) for slot, num in zip(plan.slots.tolist(), plan.num_tokens.tolist(), strict=True)]

    @property
    def running(self) -> list[str]:
        return [r.rid for r in self.scheduler.running]

    @property
    def num_free_pages(self) -> int:
        return self.cache.num_available
