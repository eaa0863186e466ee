"""Decides what runs next, from requests, slots and the cache. No torch, no I/O, no clock of its own."""

from headwater.cache.lease import Lease
from headwater.cache.pins import PinBoard
from headwater.cache.prefix_cache import PrefixCache
from headwater.clock import Clock
from headwater.messages.generation import Finish, Generate, OutputMeta, Outputs, SamplingParams, TokenLogprob
from headwater.scheduling import answers
from headwater.scheduling.adapters import AdapterBoard, AdapterContent
from headwater.scheduling.counters import Counters
from headwater.scheduling.deadlines import Deadlines
from headwater.scheduling.grammar_masks import MaskBuffer
from headwater.scheduling.grammar_queue import GrammarQueue
from headwater.scheduling.limits import Admission, SchedulerLimits
from headwater.scheduling.loading import LoadingRequests
from headwater.scheduling.outputs import OutputBuffer, has_broken_embedding
from headwater.scheduling.plan import StepPlan, StepResult
from headwater.scheduling.plan_builder import PlanBuilder, PlanColumns
from headwater.scheduling.prefill_pace import PrefillPace
from headwater.scheduling.queue_gate import QueueGate
from headwater.scheduling.request import Phase, Request
from headwater.scheduling.running import RunningRequests
from headwater.scheduling.shared_prefix import is_worth_waiting
from headwater.scheduling.speculation.drafters import NO_SPECULATION, SpeculationSettings
from headwater.scheduling.speculation.speculation import Speculation
from headwater.scheduling.step_filler import StepFiller
from headwater.scheduling.waiting_queue import SchedulePolicy, WaitingQueue

_NUM_EXAMINED_PER_TURN = 64  # waiting requests looked at in one turn, so that a long queue costs nothing
_MIN_PREFILL_SAMPLE = 64  # prompt tokens of a step from which its time says something about prefill


class Scheduler:
    """Continuous batching: a step takes all decodes and fills the rest of its token budget with prefill."""

    def __init__(
        self,
        cache: PrefixCache,
        *,
        limits: SchedulerLimits,
        clock: Clock,
        weights_id: str,
        eos_token_ids: frozenset[int],
        weight_version: str = "",
        policy: SchedulePolicy = "fcfs",
        vocab_size: int = 1 << 31,
        grammars: GrammarQueue | None = None,
        speculation: SpeculationSettings = NO_SPECULATION,
    ) -> None:
        self.cache = cache
        self.limits = limits
        self.weights_id = weights_id
        self.weight_version = weight_version
        self.counters = Counters()
        self.why_refusing: dict[str, str] = {}  # new requests are refused for these reasons, by their source
        self.admission = Admission()  # set by the loop in each turn
        self.adapters = AdapterBoard()
        self._clock = clock
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._capacity_tokens = cache.pool.capacity * cache.page_size - 1  # of one request: the next one has no place
        self._end_ids_of_weights: frozenset[int] = frozenset()  # that a later checkpoint's files name
        self.waiting = WaitingQueue(policy)
        self._gate = QueueGate(self.waiting, limits=limits, counters=self.counters, clock=clock)
        self.deadlines = Deadlines(limits=limits, gate=self._gate, counters=self.counters, clock=clock)
        self.pins = PinBoard(cache, clock)
        self.running = RunningRequests(cache, num_slots=limits.max_running, pins=self.pins)
        self.loading = LoadingRequests(cache, clock=clock)
        self.grammars = GrammarQueue(None, clock=clock) if grammars is None else grammars
        self.masks = MaskBuffer(self.grammars.compiler, self.running.slots)  # of launched steps
        self._requests: dict[tuple[bytes, str], Request] = {}  # by client and rid
        self._outputs = OutputBuffer()
        self._columns = PlanColumns()
        self._num_launched = 0  # the id of the next step
        self._launched_s = 0.0
        self._pace = PrefillPace(limits.max_gap_s, least_tokens=limits.least_paced_tokens)
        self.speculation = Speculation(speculation, cache, running=self.running, counters=self.counters)
        self._filler = StepFiller(
            self.running, limits=limits, pace=self._pace, retract=self._retract, speculation=self.speculation
        )

    # --- requests come and go -----------------------------------------------------------------------

    def add(self, message: Generate, *, client: bytes) -> None:
        """Queue a request. If it can never run, or raises, it is answered at once with the reason."""
        request: Request | None = None
        try:
            request = Request(message, client=client, arrived_s=self._clock.now())
            self._add(request, message.sampling)
        except Exception as error:
            request = request or Request.unreadable(message, client=client, arrived_s=self._clock.now())
            self._fail_arrival(request, error)
            raise

    def _add(self, request: Request, sampling: SamplingParams) -> None:
        refusal = self._refusal(request)
        if refusal is not None:
            self.counters.num_refused += 1
            request.enter(Phase.FINISHED)
            self._outputs.finish(request, refusal, self._meta(request))
            return
        eos = frozenset() if sampling.ignore_eos else self._eos_token_ids | self._end_ids_of_weights
        request.stop_token_ids = eos | frozenset(sampling.stop_token_ids)
        adapter = self.adapters.find(request.options.lora_name)
        if adapter is not None:
            request.use_adapter(adapter)
        room = min(self.limits.max_context, self._capacity_tokens) - request.num_prompt_tokens
        request.max_new_tokens = min(sampling.max_new_tokens, room)
        self._requests[request.client, request.rid] = request
        self.deadlines.arrived(request)
        if self.grammars.begin(request):
            self.waiting.keep_place(request)
        else:
            self._queue(request)
        self.counters.prompt_tokens += request.num_prompt_tokens

    def _queue(self, request: Request) -> None:
        tokens = request.tokens.view(0, request.num_matchable)
        if not self.loading.seek_in_storage(request, request.namespace(self.weights_id), tokens):
            self.waiting.add(request)

    def _fail_arrival(self, request: Request, error: Exception) -> None:
        """Answer a request whose arrival raised, at whatever point."""
        self.counters.num_failed += 1
        if self._requests.get((request.client, request.rid)) is request:
            if request in self.waiting or request.phase in (Phase.LOADING, Phase.GRAMMAR):
                self._finish(request, answers.engine_failed(error))
                return
            del self._requests[request.client, request.rid]
        self.deadlines.ended(request)
        request.enter(Phase.FINISHED)
        self._outputs.finish(request, answers.engine_failed(error), self._meta(request))

    def take_compiled(self) -> None:
        """Queue the requests whose grammars are compiled, and end those whose grammars cannot be."""
        for request, failure in self.grammars.take_done():
            if failure is None:
                self.waiting.give_up_place(request)
                self._queue(request)
            else:
                self.counters.num_refused += 1
                self._finish(request, failure)

    def abort(self, rid: str, *, match: str, message: str) -> int:
        """End requests by rid ("exact", "prefix") or "all"; returns how many. They end with `message`."""
        requests = [
            r
            for r in self._requests.values()
            if match == "all" or r.rid == rid or (match == "prefix" and r.rid.startswith(rid))
        ]
        for request in requests:
            self.counters.num_aborted += 1
            self._finish(request, Finish(type="abort", message=message))
        return len(requests)

    def end_overdue(self) -> None:
        """End the requests that have waited for too long to start, or have taken too long in all."""
        while (overdue := self.deadlines.overdue()) is not None:
            self._finish(*overdue)

    def take_outputs(self) -> list[tuple[bytes, Outputs]]:
        return self._outputs.take()

    def retract_all(self) -> int:
        """Return every running request to the queue, without its pages; returns how many."""
        running = list(self.running)
        for request in running:
            self._retract(request)
        return len(running)

    def begin_weights(self, weights_id: str, *, end_ids: tuple[int, ...] = ()) -> None:
        """Match requests against `weights_id` from now on, and note the change in those that have begun.

        Until other weights begin, `end_ids` end answers as well, also those of requests that are here already.
        """
        self.weights_id = weights_id
        self._end_ids_of_weights = frozenset(end_ids)
        for request in self._requests.values():
            if not request.sampling.ignore_eos:
                request.stop_token_ids |= self._end_ids_of_weights
            if request.is_running or request.num_outputs:
                request.weights_versions.append((self.weight_version, request.num_outputs))

    def begin_adapter(self, name: str, content: AdapterContent) -> None:
        """`name` means another adapter: for requests that have not begun, and for later ones."""
        for request in self._requests.values():
            if request.options.lora_name == name and not request.has_begun:
                request.use_adapter(content)

    def end_adapter(self, name: str) -> int:
        """End the requests of an adapter that have not begun; returns how many."""
        waiting = [it for it in self._requests.values() if it.options.lora_name == name and not it.has_begun]
        for request in waiting:
            self._finish(request, answers.refuse_adapter(name))
        return len(waiting)

    def adapters_begun(self) -> list[AdapterContent | None]:
        """The adapter of each request that has begun."""
        return [request.adapter for request in self._requests.values() if request.has_begun]

    def num_of_adapter(self, content: AdapterContent) -> tuple[int, int]:
        """Requests with this adapter: in the batch, and others."""
        running = [request.is_running for request in self._requests.values() if request.adapter is content]
        return sum(running), len(running) - sum(running)

    def in_flight(self) -> dict[str, int]:
        """The blockers: requests that keep the engine from being idle. Those that admission keeps out do not count."""
        if not self._requests:
            return {}
        counts = {
            "running": len(self.running),
            "loading": len(self.loading),
            "queued": self.admission.num_admitted(self.waiting),
            "grammar": self.admission.num_admitted(self.grammars),
        }
        return {name: count for name, count in counts.items() if count}

    # --- planning -----------------------------------------------------------------------------------

    def plan_step(self) -> StepPlan | None:
        """The next step, or None if nothing can run. The caller launches it; its pages are in use until `collect`."""
        for request in self.loading.take_arrived():
            self.waiting.add(request)
        if not self.admission.may_run or not (self.running or self.waiting) or self.speculation.awaits_tokens():
            return None
        builder = PlanBuilder(max_tokens=self.limits.max_step_tokens, columns=self._columns)
        self._filler.fill(builder)
        self._admit(builder)
        if builder.is_empty:
            return None
        rows = builder.rows
        page_updates = self.running.take_page_updates(rows)
        plan = builder.build(self._num_launched, uses=self.running.slots.uses, page_updates=page_updates)
        self.running.launched(rows, plan.step_id)
        self._num_launched += 1
        self._launched_s = self._clock.now()
        self.speculation.planned(self._launched_s)
        return plan

    # --- admission ----------------------------------------------------------------------------------

    def _admit(self, builder: PlanBuilder) -> None:
        if not self.waiting or self.running.slots.is_full or builder.num_tokens_left <= 0:
            return
        for request in self.waiting.in_service_order(self.cache, self.weights_id)[:_NUM_EXAMINED_PER_TURN]:
            if self.running.slots.is_full or builder.num_tokens_left <= 0:
                return
            if not self.admission.admits(request):
                continue
            limit = request.num_matchable
            lease = self.cache.acquire(
                request.namespace(self.weights_id),
                request.tokens,
                max_cached_tokens=limit,
                no_store=request.options.no_store or (request.adapter is not None and request.adapter.is_retired),
            )
            if is_worth_waiting(lease, request.tokens.view(0, limit), self.running, page_size=self.cache.page_size):
                self.cache.release(lease)
                continue
            if self.loading.begin(request, lease, max_cached_tokens=limit):
                self.waiting.remove(request)
                continue
            self.cache.find_part(lease, max_cached_tokens=limit)
            if not self.running.reserve(request, lease):
                self.cache.release(lease)
                return  # no request overtakes: short prompts cannot starve a long one
            self._start(builder, request, lease)

    def _start(self, builder: PlanBuilder, request: Request, lease: Lease) -> None:
        self.waiting.remove(request)
        request.enter(Phase.PREFILLING)
        use = self.running.enter(request, lease)
        if request.started_s is None:
            request.started_s = self._clock.now()
            self._gate.started(request)
            self.deadlines.started(request)
            request.weights_versions = [(self.weight_version, 0)]
            self.loading.count_hits(request, lease, self.counters)
            self.counters.queue_time_seconds += request.started_s - request.arrived_s
            self._outputs.begin_prompt(request)
        self.speculation.begin(request)
        builder.assign(request, use=use)
        builder.copy_part(lease)
        self._filler.add_chunk(builder, request)

    # --- results ------------------------------------------------------------------------------------

    def collect(self, plan: StepPlan, result: StepResult) -> None:
        """Apply the result of a step. Rows of requests that have left their slot are dropped here."""
        self.running.collected(plan.step_id)
        num_prefill, took_s = len(plan.token_ids) - plan.num_decodes, self._clock.now() - self._launched_s
        self._pace.saw(num_prefill, took_s)
        self.speculation.ended(plan, self._clock.now())
        if num_prefill >= _MIN_PREFILL_SAMPLE:
            self.cache.lower.restore_cost.saw_prefill(num_prefill, took_s)
        running, slots, slot_before = self.running, self.running.slots, -1
        columns = (result.slots, result.uses, result.is_finite, plan.num_computed, plan.num_tokens, plan.samples)
        rows = zip(*[column.tolist() for column in columns], result.tokens.tolist(), strict=True)
        for row, (slot, use, is_finite, first, num_tokens, samples, token_id) in enumerate(rows):
            request, is_draft, slot_before = slots.at(slot, use=use), slot == slot_before, slot
            if request is None or (is_draft and not self.speculation.confirms(request, first, plan.token_ids[row])):
                continue
            assert request.lease is not None
            if request.lease.superseded or request.lease.part is not None:
                self.cache.settle(request.lease)
            if not is_finite:  # its pages are as bad as its logits and must not be shared
                self._finish(request, answers.NOT_FINITE)
                continue
            running.written(request, first + num_tokens)
            if row >= plan.num_decodes:
                running.publish(request)
            if row in result.prompt_logprobs:
                self._outputs.add_prompt_logprobs(request, result.prompt_logprobs[row])
            if row in result.pooled:
                self._outputs.add_pooled(request, result.pooled[row])
            if samples:
                self._take_token(request, token_id, result.logprobs.get(row), joins=is_draft)
            elif request.max_new_tokens == 0 and first + num_tokens >= request.num_prompt_tokens:
                self._finish(request, answers.NOT_FINITE if has_broken_embedding(request) else Finish(type="length"))
        self.running.release_leaving()

    def fail(self, plan: StepPlan, error: Exception) -> int:
        """End the requests of a step that raised; returns how many. The pages that it wrote are never published.

        The step no longer runs. Steps are collected or fail in the order of their launch.
        """
        self.running.collected(plan.step_id)
        self.speculation.ended(plan, self._clock.now(), has_failed=True)
        rows = dict.fromkeys(zip(plan.slots.tolist(), plan.uses.tolist(), strict=True))  # once, also with a draft
        ended = [request for slot, use in rows if (request := self.running.slots.at(slot, use=use)) is not None]
        for request in ended:
            self._finish(request, answers.engine_failed(error))
        self.counters.num_failed += len(ended)
        self.counters.num_failed_steps += 1
        self.running.release_leaving()
        return len(ended)

    def _take_token(self, request: Request, token_id: int, logprob: TokenLogprob | None, *, joins: bool) -> None:
        grammar = request.grammar
        if grammar is not None and grammar.is_over:  # before this token: it failed, or allows the empty answer only
            self._finish(request, answers.refuse_grammar(grammar.error) if grammar.error else Finish(type="stop"))
            return
        request.tokens.append(token_id)
        if grammar is not None and not (request.is_stop_token(token_id) or grammar.accept(token_id)):
            self._finish(request, answers.grammar_failed(grammar.error))
            return
        self.counters.generated_tokens += 1
        meta = self._meta(request) if request.num_outputs == 1 else None
        self._outputs.add_token(request, token_id, logprob=logprob, meta=meta, joins=joins)
        if (end := answers.end_after(request, token_id)) is not None:
            self._finish(request, end)

    def _finish(self, request: Request, finish: Finish) -> None:
        if request.is_running:
            self.running.publish(request)
            self.running.leave(request)
        elif request.phase is Phase.WAITING:
            self.waiting.remove(request)
        elif request.phase is Phase.LOADING:
            self.loading.remove(request)
        elif request.phase is Phase.GRAMMAR:
            self.grammars.remove(request)
            self.waiting.give_up_place(request)
        request.enter(Phase.FINISHED)
        self.deadlines.ended(request)
        del self._requests[request.client, request.rid]
        self.counters.num_finished += 1
        if request.adapter is not None and request.adapter.is_retired:
            self.adapters.free_unused(it.adapter for it in self._requests.values())
        self._outputs.finish(request, finish, self._meta(request))

    def _retract(self, request: Request) -> None:
        """Return a request to the queue without its pages. It continues from its tokens, with the same text."""
        self.running.publish(request)
        assert request.lease is not None
        if self.cache.lower.back_up(request.lease):  # parked: it will find its pages on the host
            self.counters.num_parked += 1
            self.loading.allow_again(request)
        self.running.leave(request)
        request.enter(Phase.WAITING)
        request.num_retractions += 1
        if not request.num_outputs:
            self._outputs.begin_prompt(request)
        self.counters.num_retractions += 1
        self.waiting.add(request)

    def _refusal(self, request: Request) -> Finish | None:
        """Why a request can never run, or not now."""
        if self.why_refusing:
            return answers.refuse_now(next(iter(self.why_refusing.values())))
        if (request.client, request.rid) in self._requests:
            return answers.refuse_rid(request.rid)
        if request.options.lora_name and self.adapters.find(request.options.lora_name) is None:
            return answers.refuse_adapter(request.options.lora_name)
        sizes = {"context": self.limits.max_context, "capacity": self._capacity_tokens}
        never = answers.refuse_for_ever(request, vocab_size=self._vocab_size, **sizes) or self.grammars.refusal(request)
        return never or self._gate.refusal(request)

    def _meta(self, request: Request) -> OutputMeta:
        return answers.describe(request, generation=self.cache.generation, weight_version=self.weight_version)
