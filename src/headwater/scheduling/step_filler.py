"""Puts the running requests into a step: all decodes, then chunks of the prompts that are being computed."""

from collections.abc import Callable
from operator import attrgetter

from headwater.scheduling.limits import SchedulerLimits
from headwater.scheduling.plan_builder import PlanBuilder
from headwater.scheduling.prefill_pace import PrefillPace
from headwater.scheduling.request import Phase, Request
from headwater.scheduling.running import RunningRequests
from headwater.scheduling.speculation.speculation import Speculation

_queue_key = attrgetter("queue_key")


class StepFiller:
    """Fills steps. If pages run out, it calls `retract` with the request that is to be served last."""

    def __init__(
        self,
        running: RunningRequests,
        *,
        limits: SchedulerLimits,
        pace: PrefillPace,
        retract: Callable[[Request], None],
        speculation: Speculation,
    ) -> None:
        self._running = running
        self._limits = limits
        self._pace = pace
        self._retract = retract
        self._speculation = speculation

    def fill(self, builder: PlanBuilder) -> None:
        """Add what runs already. The tokens that are left are for requests that start."""
        self._add_decodes(builder)
        self._speculation.add_drafts(builder)
        if not builder.is_empty:
            builder.num_tokens_left = self._pace.limit(builder.num_tokens_left)
        for request in self._running:
            if request.phase is Phase.PREFILLING and builder.num_tokens_left > 0:
                self.add_chunk(builder, request)

    def add_chunk(self, builder: PlanBuilder, request: Request) -> None:
        """Add the next tokens of a prompt, as many as fit. The last chunk samples."""
        num_left = len(request.tokens) - request.progress.num_computed
        num_tokens = min(num_left, builder.num_tokens_left, self._limits.prefill_chunk_tokens)
        samples = num_tokens == num_left and request.max_new_tokens > 0
        builder.add_chunk(request, num_tokens, samples=samples)

    def _add_decodes(self, builder: PlanBuilder) -> None:
        # In order of service: a request that is retracted for pages is served later, so its row is not planned yet.
        for request in sorted(self._running, key=_queue_key):
            if request.phase is not Phase.DECODING:  # still prefilling, or retracted for one before it
                continue
            if request.progress.num_launched_samples >= request.max_new_tokens:
                continue  # its last token is in flight
            if builder.num_tokens_left > 0 and self._has_page_for_next_token(request):
                builder.add_decode(request)

    def _has_page_for_next_token(self, request: Request) -> bool:
        """Make sure of a page for position `num_computed`, retracting later requests if necessary."""
        if self._running.has_page_for_next_token(request):
            return True
        while not self._running.extend(request):
            if self._running.awaits_pages:
                return False
            victim = max(self._running, key=_queue_key)
            self._retract(victim)
            if victim is request:
                return False
        return True
