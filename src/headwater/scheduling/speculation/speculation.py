"""Speculative decoding: drafted tokens are computed in the step that verifies them.

A draft is rows of a plan behind the row of its request, each with one token more (`StepPlan`). Every row samples with
the noise of its own position. A row counts if the row before it has sampled the token that the row was computed from.
So the text is, token for token, the one without drafts, greedy or sampled. What wrong rows have written lies behind the
request's tokens, in its private pages, and is overwritten before anything reads it.
"""

from headwater.cache.prefix_cache import PrefixCache
from headwater.messages.base import TokenIds
from headwater.scheduling.counters import Counters
from headwater.scheduling.plan import StepPlan
from headwater.scheduling.plan_builder import PlanBuilder
from headwater.scheduling.request import Request
from headwater.scheduling.running import RunningRequests
from headwater.scheduling.speculation.acceptance import Acceptance, best_length
from headwater.scheduling.speculation.drafters import SpeculationSettings
from headwater.scheduling.speculation.drafting import Drafting, Source
from headwater.scheduling.speculation.step_times import StepTimes

_LEAST_SHARE = 0.05  # of a row in the time of a step, however cheap rows seem to be
_DEAREST_TRIAL = 1.0  # tokens that a draft may cost which hardly pays, to see whether it is right
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
        self._times = StepTimes()
        self._keeps_times = self._drafter is not None
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
        in_flight = [it for it in self._running if _num_in_flight(it) > 0]
        if self._times.needs_plain(len(in_flight)):
            return False
        self._look_at_some([it for it in in_flight if it.drafting is not None])
        candidates = [it.drafting for it in in_flight if it.drafting is not None and it.drafting.is_on]
        found = [it.by_source[it.source] for it in candidates]
        if not self._would_draft(found, num_rows=len(in_flight)):
            for acceptance in found:
                acceptance.pass_over()
            return False
        return True

    def add_drafts(self, builder: PlanBuilder) -> None:
        """Add drafts to a step that has all of its decodes, as long as they pay. No page is evicted for a draft."""
        decodes, num_rows = builder.decodes, len(builder.decodes)
        self._has_drafts = False
        if self._drafter is None or not 0 < num_rows <= self._limits.max_requests:
            return
        if self._times.is_ahead and self._times.needs_plain(num_rows):
            return
        num_left = min(self._limits.max_rows - num_rows, builder.num_tokens_left)
        found = [(it, tokens) for it in decodes if len(tokens := self._find(it, num_left))]
        lengths = self._lengths([(_acceptance(it), len(tokens)) for it, tokens in found], num_rows=num_rows)
        num_waiting = sum(length > 0 for length in lengths)
        for (request, tokens), wanted in zip(found, lengths, strict=True):
            drafting = request.drafting
            assert drafting is not None
            length = min(wanted, -(-num_left // max(num_waiting, 1)))  # alike: the first tokens are right most often
            num_waiting -= wanted > 0
            length = self._running.make_room(request, length)
            drafting.is_on = drafting.is_open = length > 0
            if length > 0:
                num_left -= length
                builder.add_draft(request, tokens[:length].tolist())
                self._has_drafts = True
                drafting.num_steps += 1
                drafting.num_drafted += length
                self._counters.spec_verify_steps += 1
                self._counters.spec_draft_tokens += length

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

    def planned(self, now_s: float) -> None:
        """A step is about to be launched."""
        if self._keeps_times:
            self._times.planned(now_s)

    def ended(self, plan: StepPlan, now_s: float, *, has_failed: bool = False) -> None:
        """The oldest step in flight has ended."""
        if not self._keeps_times:
            return
        if has_failed:
            self._times.failed(now_s)
        else:
            self._times.ended(plan, now_s)

    def _row_share(self, num_rows: int) -> float:
        return max(self._times.row_share(num_rows), _LEAST_SHARE)

    def _lengths(self, found: list[tuple[Acceptance, int]], *, num_rows: int) -> list[int]:
        """How long the drafts of a step are, of requests with so many tokens each."""
        row_share, jump = self._row_share(num_rows), self._times.jump(num_rows)
        if not jump:
            return [it.length(most, num_rows=num_rows, row_share=row_share) for it, most in found]
        lengths = [best_length(it.rate, most, num_rows=num_rows, row_share=row_share) for it, most in found]
        gains = [it.gain(length, row_share=row_share) for (it, _), length in zip(found, lengths, strict=True)]
        if sum(gains) > jump:
            return lengths
        if jump > _DEAREST_TRIAL:
            return [0] * len(found)
        return [it.trial(jump / (1 + jump)) for it, _ in found]

    def _would_draft(self, found: list[Acceptance], *, num_rows: int) -> bool:
        """Whether `_lengths` would draft something if the tokens in flight were known."""
        row_share, jump = self._row_share(num_rows), self._times.jump(num_rows)
        if jump <= _DEAREST_TRIAL and any(it.is_due for it in found):
            return True
        most = self._num_draft_tokens
        lengths = [best_length(it.rate, most, num_rows=num_rows, row_share=row_share) for it in found]
        return sum(it.gain(length, row_share=row_share) for it, length in zip(found, lengths, strict=True)) > jump

    def _look_at_some(self, requests: list[Request]) -> None:
        """See whether the known text of requests with a token in flight goes on with a draft. A few in turn."""
        first = self._num_looks % max(len(requests), 1)
        self._num_looks += _MOST_LOOKS
        for request in (requests[first:] + requests[:first])[:_MOST_LOOKS]:
            drafting = request.drafting
            assert drafting is not None
            has_room = request.max_new_tokens - request.num_outputs - _num_in_flight(request) > 1
            drafting.is_on = has_room and len(self._ask(request, drafting, 1)) > 0

    def _find(self, request: Request, most: int) -> TokenIds:
        """A draft of a request whose tokens are all known, and its source in `Request.drafting`."""
        drafting, nothing = request.drafting, request.tokens.view(0, 0)
        if drafting is None or _num_in_flight(request) > 0:
            return nothing
        drafting.is_on = False
        most = min(self._num_draft_tokens, most, request.max_new_tokens - request.num_outputs - 1)
        return self._ask(request, drafting, most) if most > 0 else nothing

    def _ask(self, request: Request, drafting: Drafting, most: int) -> TokenIds:
        assert self._drafter is not None
        tokens, source = self._drafter.draft(request, drafting, most)
        if len(tokens):
            drafting.source = source
            drafting.by_source.setdefault(source, Acceptance(_FIRST_RATES[source]))
        return tokens


def _acceptance(request: Request) -> Acceptance:
    """Of the newest draft's source."""
    assert request.drafting is not None
    return request.drafting.by_source[request.drafting.source]


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
