"""Several planned engines in virtual time, behind the API process's routing."""

import heapq
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from headwater.client.engine_choice import choose_engine
from headwater.client.prefix_routes import PrefixRoutes
from headwater.messages.base import pack_ids
from headwater.messages.generation import Generate, Output, RequestOptions, SamplingParams
from headwater.planning.fleet_result import FleetResult, RequestResult
from headwater.planning.planned_engine import EnginePlan, PlannedEngine
from headwater.planning.timed_runner import foretold_tokens
from headwater.planning.timed_tiers import MeteredStore
from headwater.planning.trace import PlannedRequest, Tokens


class _Member:
    """`client.engine_choice.Candidate`: an engine as the API process sees it at a moment."""

    def __init__(self, engine: PlannedEngine) -> None:
        self.engine = engine
        self.index = engine.index
        self.num_running = 0
        self._ends_s: list[float] = []  # ends of requests, some of them after that moment

    def ended(self, at_s: float) -> None:
        heapq.heappush(self._ends_s, at_s)

    def look(self, now_s: float) -> None:
        """Count the requests that have ended by `now_s`."""
        while self._ends_s and self._ends_s[0] <= now_s:
            heapq.heappop(self._ends_s)
            self.num_running -= 1


class PlannedFleet:
    """Runs a workload once. Engines turn in the order of their clocks, so that no clock passes an arrival."""

    def __init__(self, plan: EnginePlan, *, num_engines: int) -> None:
        if num_engines < 1:
            raise ValueError(f"engines must be at least 1, found {num_engines}")
        self._plan = plan
        store = MeteredStore(num_pages=plan.num_storage_pages) if plan.num_storage_pages else None
        self._members = [_Member(PlannedEngine(index, plan, store)) for index in range(num_engines)]
        self._routes = PrefixRoutes(page_size=plan.page_size) if num_engines > 1 else None
        self._arrivals: list[tuple[float, int]] = []  # a heap of times and request numbers
        self._conversations: dict[str, Tokens] = {}
        self._next_turns: dict[int, int] = {}  # the next request of the session, by request
        self._results: list[RequestResult] = []
        self._trace: Sequence[PlannedRequest] = ()

    def play(self, trace: Sequence[PlannedRequest], *, on_end: Callable[[], None] | None = None) -> FleetResult:
        """Serve all of `trace`. `on_end` is called at the end of each request."""
        self._trace = trace
        self._results = [RequestResult() for _ in trace]
        self._queue_arrivals(trace)
        while True:
            busy = [member for member in self._members if member.engine.is_busy]
            first = min(busy, key=lambda member: member.engine.clock.now(), default=None)
            if self._arrivals and (first is None or self._arrivals[0][0] <= first.engine.clock.now()):
                self._send(*heapq.heappop(self._arrivals))
            elif first is not None:
                first.engine.wake_s = self._arrivals[0][0] if self._arrivals else float("inf")
                for output in first.engine.turn():
                    self._take(first, output, on_end)
            else:
                return self._result()

    # ------------------------------------------------------------------------------------------------

    def _queue_arrivals(self, trace: Sequence[PlannedRequest]) -> None:
        last_of: dict[str, int] = {}
        for number, request in enumerate(trace):
            before = last_of.get(request.session) if request.session else None
            if before is None:
                self._arrivals.append((request.arrival_s, number))
            else:
                self._next_turns[before] = number
            last_of[request.session] = number
        heapq.heapify(self._arrivals)

    def _send(self, now_s: float, number: int) -> None:
        planned = self._trace[number]
        prompt = planned.own_tokens(number)
        if planned.session:
            before = self._conversations.get(planned.session)
            prompt = prompt if before is None else np.concatenate([before, prompt])
            self._conversations[planned.session] = prompt
        request = Generate(
            rid=str(number),
            prompt_ids=pack_ids(prompt),
            sampling=SamplingParams(max_new_tokens=planned.num_output_tokens, ignore_eos=True, seed=number),
            options=RequestOptions(cache_salt=planned.cache_salt),
        )
        for each in self._members:
            each.look(now_s)
        member = choose_engine(self._members, self._routes.known(request) if self._routes else [])
        if self._routes is not None:
            self._routes.learn(request, member.index)
        result = self._results[number]
        result.sent_s, result.engine, result.num_prompt_tokens = now_s, member.index, len(prompt)
        member.num_running += 1
        member.engine.deliver(request, now_s=now_s)

    def _take(self, member: _Member, output: Output, on_end: Callable[[], None] | None) -> None:
        number, now_s = int(output.rid), member.engine.clock.now()
        result = self._results[number]
        if output.token_ids and not result.num_output_tokens:
            result.first_token_s = now_s
        result.num_output_tokens += len(output.token_ids)
        if output.meta is not None:
            meta = output.meta
            result.cached = {"device": meta.cached_device, "host": meta.cached_host, "storage": meta.cached_storage}
            result.num_retractions = meta.num_retractions
        if output.finish is None:
            return
        result.ended_s = now_s
        result.is_refused = output.finish.type == "abort"
        member.ended(now_s)
        if on_end is not None:
            on_end()
        self._begin_next_turn(number, now_s)

    def _begin_next_turn(self, number: int, now_s: float) -> None:
        following = self._next_turns.get(number)
        if following is None:
            self._conversations.pop(self._trace[number].session, None)
            return
        planned = self._trace[following]
        answer = foretold_tokens(number, 0, self._results[number].num_output_tokens)
        self._conversations[planned.session] = np.concatenate([self._conversations[planned.session], answer])
        heapq.heappush(self._arrivals, (max(planned.arrival_s, now_s + planned.think_s), following))

    def _result(self) -> FleetResult:
        engines = [member.engine for member in self._members]
        moved: Counter[str] = Counter()
        dropped: Counter[str] = Counter()
        for engine in engines:
            transfers = engine.parts.cache.lower.transfers
            if transfers is not None:
                moved.update(transfers.counters.pages)
                dropped.update(transfers.counters.dropped_pages)
        return FleetResult(
            requests=tuple(self._results),
            num_steps=sum(engine.runner.num_steps for engine in engines),
            busy_s=tuple(engine.runner.busy_s for engine in engines),
            moved_pages=dict(moved),
            dropped_pages=dict(dropped),
        )
