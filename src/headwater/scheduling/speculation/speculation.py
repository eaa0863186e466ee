"""Speculative decoding: drafted tokens are computed in the step that verifies them.

A draft is rows of a plan behind the row of its request, each with one token more (`StepPlan`). Every row samples with
the noise of its own position. A row counts if the row before it has sampled the token that the row was computed from.
So the text is, token for token, the one without drafts, greedy or sampled. What wrong rows have written lies behind the
request's tokens, in its private pages, and is overwritten before anything reads it.
"""

from headwater.cache.prefix_cache import PrefixCache
from headwater.scheduling.counters import Counters
from headwater.scheduling.plan import StepPlan
from headwater.scheduling.plan_builder import PlanBuilder
from headwater.scheduling.request import Request
from headwater.scheduling.running import RunningRequests
from headwater.scheduling.speculation.acceptance import Acceptance, StepCost
from headwater.scheduling.speculation.drafters import SpeculationSettings
from headwater.scheduling.speculation.drafting import Drafting, Source

_LEAST_SHARE = 0.05  # of a row in the time of a step, however cheap rows seem to be
_MOST_LOOKS = 4  # for drafts of requests whose newest token is not known yet, before a step
_FIRST_RATES = {Source.SHORT_SUFFIX: 0.5, Source.LONG_SUFFIX: 0.8, Source.TREE: 0.8}


class Speculation:
    """Decides which requests get drafts and how long these are, and which tokens of a step count.

    Writes `Request.drafting`.
    """

    def __init__(
        self,
        settings: SpeculationSettings,
        cache: PrefixCache,
        *,
        running: RunningRequests,
        counters: Counters,
    ) -> None:
        self._drafter = settings.make_drafter(cache.tree)  # None: no request gets drafts
        self._num_draft_tokens = settings.num_draft_tokens
        self._limits = settings.limits
        self._running = running
        self._counters = counters
        self._cost = StepCost()
        self._has_drafts = False  # whether the newest plan has some
        self._num_looks = 0

    def begin(self, request: Request) -> None:
        """`request` enters a slot."""
        if self._drafter is not None and request.drafting is None and may_draft(request):
            request.drafting = Drafting()

    def awaits_tokens(self) -> bool:
        """Whether the next step is planned when the step in flight has been collected, not before.

        Then its requests' tokens are known, so they can have drafts. It must wait if drafts are in flight. Else it does
        if some request's text, its token in flight left out, goes on with a draft that pays: all requests wait, or each
        step would have a part of them, and take as long. On a CPU no step is in flight when one is planned.
        """
        if self._drafter is None:
            return False
        if self._has_drafts and any(_num_in_flight(request) > 1 for request in self._running):
            return True
        if not 0 < len(self._running) <= self._limits.max_requests:
            return False
        in_flight = [it for it in self._running if it.drafting is not None and _num_in_flight(it) > 0]
        if any(it.drafting is not None and it.drafting.is_on for it in in_flight):
            return True
        first = self._num_looks % max(len(in_flight), 1)
        looked_for = (in_flight[first:] + in_flight[:first])[:_MOST_LOOKS]
        self._num_looks += _MOST_LOOKS
        return any(self._look(request, num_rows=len(in_flight)) for request in looked_for)

    def add_drafts(self, builder: PlanBuilder) -> None:
        """Add drafts to a step that has all of its decodes, as long as they pay. No page is evicted for a draft."""
        decodes, num_rows = builder.decodes, len(builder.decodes)
        self._has_drafts = False
        num_left = min(self._limits.max_rows - num_rows, builder.num_tokens_left)
        if self._drafter is None or not 0 < num_rows <= self._limits.max_requests:
            return
        row_share = self._row_share(num_rows)
        for request in decodes:
            drafting = request.drafting
            if drafting is None or request.progress.num_launched_samples != request.num_outputs:
                continue
            most = min(self._num_draft_tokens, num_left, request.max_new_tokens - request.num_outputs - 1)
            tokens = self._draft(request, drafting, most, num_rows=num_rows, row_share=row_share) if most > 0 else []
            if tokens:
                num_left -= len(tokens)
                builder.add_draft(request, tokens)
                self._has_drafts = True
                drafting.num_steps += 1
                drafting.num_drafted += len(tokens)
                self._counters.spec_verify_steps += 1
                self._counters.spec_draft_tokens += len(tokens)

    def confirms(self, request: Request, position: int, token_id: int) -> bool:
        """Whether the row of a draft counts that was computed from `token_id` at `position`.

        Rows are asked about in their order, each after the token of the row before it has been taken.
        """
        drafting, tokens = request.drafting, request.tokens
        assert drafting is not None
        is_right = position == len(tokens) - 1 and tokens.newest == token_id
        if is_right:
            drafting.num_accepted += 1
            self._counters.spec_accepted_tokens += 1
            drafting.by_source[drafting.source].accepted()
        else:
            self._running.rejected(request)
            if drafting.is_open:
                drafting.by_source[drafting.source].rejected()
            drafting.is_open = False
        return is_right

    def saw_step(self, plan: StepPlan, seconds: float) -> None:
        """A step has taken so long. Only steps of decodes alone count."""
        if self._drafter is not None and plan.num_decodes == plan.num_rows:
            self._cost.saw(plan.num_rows, seconds)

    def _row_share(self, num_rows: int) -> float:
        return max(self._cost.row_share(num_rows), _LEAST_SHARE)

    def _look(self, request: Request, *, num_rows: int) -> bool:
        """Turn the drafts of `request` on if what is known of its text goes on with one that pays."""
        assert self._drafter is not None and request.drafting is not None
        drafting = request.drafting
        if request.max_new_tokens - request.num_outputs - _num_in_flight(request) <= 1:
            return False
        tokens, source = self._drafter.draft(request, drafting, 1)
        if len(tokens):
            acceptance = drafting.by_source.setdefault(source, Acceptance(_FIRST_RATES[source]))
            drafting.is_on = acceptance.may_pay(num_rows=num_rows, row_share=self._row_share(num_rows))
        return drafting.is_on

    def _draft(self, request: Request, drafting: Drafting, most: int, *, num_rows: int, row_share: float) -> list[int]:
        assert self._drafter is not None
        tokens, source = self._drafter.draft(request, drafting, most)
        drafting.is_on = False
        if not len(tokens):
            return []
        acceptance = drafting.by_source.setdefault(source, Acceptance(_FIRST_RATES[source]))
        length = acceptance.length(len(tokens), num_rows=num_rows, row_share=row_share)
        drafting.source, drafting.is_on = source, length > 0
        length = self._running.make_room(request, length)
        drafting.is_open = length > 0
        return tokens[:length].tolist()


def _num_in_flight(request: Request) -> int:
    """Tokens that launched steps sample for `request` and that are not known yet; more than 1: with a draft."""
    return request.progress.num_launched_samples - request.num_outputs


def may_draft(request: Request) -> bool:
    """Whether every position of a draft can be sampled as without a draft.

    Penalties depend on the tokens before, which a row of a draft has not all counted. A grammar's mask of a position
    needs the token before it.
    """
    sampling = request.sampling
    has_penalty = sampling.frequency_penalty or sampling.presence_penalty or sampling.repetition_penalty != 1.0
    return request.grammar is None and not has_penalty and request.max_new_tokens > 1
