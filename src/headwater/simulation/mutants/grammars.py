"""Mutants of grammars: of the state of a request, of masks, and of compilations."""

from typing import Any

import numpy as np
from msgspec import structs

from headwater.control.controlled_engine import ControlledEngine
from headwater.scheduling.grammar_masks import MaskBuffer
from headwater.scheduling.grammar_queue import GrammarQueue
from headwater.scheduling.grammar_state import GrammarState
from headwater.scheduling.plan import StepPlan, TokenMasks
from headwater.scheduling.request import Phase, Request
from headwater.scheduling.scheduler import Scheduler
from headwater.simulation.fakes.grammar import FakeMatcher
from headwater.simulation.mutants.registry import Patch, mutant


@mutant(profile="grammars")
def retraction_forgets_the_place() -> list[Patch]:
    """A retracted request begins its grammar again, as if its slot held the place."""
    right = Scheduler._retract

    def retract(self: Scheduler, request: Request) -> None:
        right(self, request)
        if request.grammar is not None and isinstance(request.grammar.matcher, FakeMatcher):
            request.grammar.matcher.accepted.clear()

    return [(Scheduler, "_retract", retract)]


@mutant(profile="grammars", seed=4)
def dropped_tokens_advance_grammars() -> list[Patch]:
    """The token of a step in flight, which a retraction drops, advances the grammar nevertheless."""
    right = Scheduler._retract

    def retract(self: Scheduler, request: Request) -> None:
        is_in_flight = request.progress.num_launched_samples > request.num_outputs
        right(self, request)
        if is_in_flight and request.grammar is not None and isinstance(request.grammar.matcher, FakeMatcher):
            for token_id in request.grammar.matcher.allowed[:1]:
                request.grammar.accept(token_id)

    return [(Scheduler, "_retract", retract)]


@mutant(profile="grammars")
def masks_are_of_another_row() -> list[Patch]:
    """Each row of a step gets the mask of the row before."""
    right = MaskBuffer.fill

    def fill(self: MaskBuffer, plan: StepPlan) -> TokenMasks:
        masks = right(self, plan)
        return structs.replace(masks, words=np.roll(masks.words, 1, axis=0))

    return [(MaskBuffer, "fill", fill)]


@mutant(profile="grammars")
def masks_are_a_step_late() -> list[Patch]:
    """A row gets the mask that it had in its last step."""
    right = MaskBuffer.fill
    last: dict[tuple[int, int], Any] = {}

    def fill(self: MaskBuffer, plan: StepPlan) -> TokenMasks:
        masks = right(self, plan)
        words = masks.words.copy()
        for index, row in enumerate(plan.grammar_rows.tolist()):
            key = (int(plan.slots[row]), int(plan.uses[row]))
            last[key], words[index] = masks.words[index].copy(), last.get(key, masks.words[index])
        return structs.replace(masks, words=words)

    return [(MaskBuffer, "fill", fill)]


@mutant(profile="grammars")
def grammars_share_one_matcher() -> list[Patch]:
    """Requests with the same grammar advance one matcher together."""
    return [(FakeMatcher, "copy", lambda self: self)]


@mutant(profile="grammars")
def grammars_begin_at_once() -> list[Patch]:
    """A grammar that should begin after free text begins with the first token."""
    right = GrammarState.begin

    def begin(self: GrammarState, matcher: Any) -> None:
        right(self, matcher)
        self._has_begun = True

    return [(GrammarState, "begin", begin)]


@mutant(profile="grammars")
def free_text_has_no_limit() -> list[Patch]:
    """The end of free text is never forced."""
    return [(GrammarState, "forced_token", property(lambda self: None))]


@mutant(profile="grammars")
def free_text_is_never_optional() -> list[Patch]:
    """A grammar waits for the end of free text that the answer has not begun with."""
    return [(GrammarState, "opening_token", property(lambda self: None))]


@mutant(profile="grammars")
def complete_answers_go_on() -> list[Patch]:
    """An answer that nothing may follow does not end."""
    return [(GrammarState, "is_complete", property(lambda self: False))]


@mutant(profile="grammars")
def compiled_grammars_are_mixed_up() -> list[Patch]:
    """Grammars of the same length count as the same, so a request gets what was compiled for another."""
    return [(GrammarQueue, "key_of", staticmethod(lambda text: str(len(text)).encode()))]


@mutant(profile="grammars")
def requests_start_before_their_grammar() -> list[Patch]:
    """A request is admitted while its grammar is still being compiled."""
    right = GrammarQueue.begin

    def begin(self: GrammarQueue, request: Request) -> bool:
        if right(self, request):
            request.enter(Phase.WAITING)
        return False

    return [(GrammarQueue, "begin", begin)]


@mutant(profile="grammars")
def compiled_grammars_are_kept_for_ever() -> list[Patch]:
    """The bound on the compiled grammars that are kept is ignored."""

    def keep(self: GrammarQueue, key: bytes, matcher: Any) -> Any:
        self._cached[key] = matcher
        return matcher

    return [(GrammarQueue, "_keep", keep)]


@mutant(profile="grammars")
def compilations_hang_for_ever() -> list[Patch]:
    """A compilation that takes too long is not given up."""
    right = GrammarQueue.take_done

    def take_done(self: GrammarQueue) -> Any:
        for compilation in self._compilations.values():
            compilation.begun_s = self._clock.now()
        return right(self)

    return [(GrammarQueue, "take_done", take_done)]


@mutant(profile="grammars")
def compiling_requests_block_nobody() -> list[Patch]:
    """Requests whose grammars are being compiled are missing from the blockers."""
    right: Any = Scheduler.in_flight

    def in_flight(self: Scheduler) -> dict[str, int]:
        return {name: count for name, count in right(self).items() if name != "grammar"}

    return [(Scheduler, "in_flight", in_flight)]


@mutant(profile="grammars")
def side_caches_are_not_flushed() -> list[Patch]:
    """A flush of everything leaves the compiled grammars, and reports none."""
    return [(ControlledEngine, "clear_side_caches", lambda self: {})]
