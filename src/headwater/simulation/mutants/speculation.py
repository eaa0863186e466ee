"""Mutants of speculative decoding: which drafted tokens count, what stays of the others, where drafts come from."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from msgspec import structs

from headwater.cache.radix_tree import Node, RadixTree
from headwater.scheduling import answers, plan_builder
from headwater.scheduling.plan import NEWEST_TOKEN, StepPlan
from headwater.scheduling.plan_builder import PlanBuilder
from headwater.scheduling.request import Request
from headwater.scheduling.running import RunningRequests
from headwater.scheduling.scheduler import Scheduler
from headwater.scheduling.speculation.speculation import Speculation
from headwater.scheduling.speculation.tree_text import TreeText
from headwater.simulation.mutants.registry import Patch, mutant


@mutant(profile="speculation", seed=5)
def rejected_tokens_are_published() -> list[Patch]:
    """What a wrong drafted token has written is shared as the KV of the token in its place."""
    right = RunningRequests.rejected

    def rejected(self: RunningRequests, request: Request) -> None:
        right(self, request)
        request.progress.num_written = len(request.tokens)

    return [(RunningRequests, "rejected", rejected)]


@mutant(profile="speculation", seed=5)
def one_drafted_token_too_many_counts() -> list[Patch]:
    """The token sampled behind the first wrong drafted token counts."""
    right = Speculation.confirms

    def confirms(self: Speculation, request: Request, position: int, token_id: int) -> bool:
        was_open = request.drafting is not None and request.drafting.is_open
        return right(self, request, position, token_id) or was_open

    return [(Speculation, "confirms", confirms)]


@mutant(profile="speculation", seed=5)
def wrong_drafts_leave_a_gap() -> list[Patch]:
    """A request goes on behind the positions of its draft, whichever of them counted."""

    def rejected(self: RunningRequests, request: Request) -> None:
        request.progress.num_launched_samples -= 1

    return [(RunningRequests, "rejected", rejected)]


@mutant(profile="speculation", seed=5)
def stop_tokens_in_drafts_are_missed() -> list[Patch]:
    """A stop token, or the last token asked for, ends an answer only if it is the first of its step."""
    right = Scheduler._take_token

    def take_token(self: Scheduler, *args: Any, joins: bool) -> None:
        with patch.object(answers, "end_after", (lambda *_: None) if joins else answers.end_after):
            right(self, *args, joins=joins)

    return [(Scheduler, "_take_token", take_token)]


@mutant(profile="speculation", seed=5)
def drafts_share_the_noise_of_their_first_token() -> list[Patch]:
    """All rows of a draft sample with the noise of one position."""
    right = PlanBuilder.build

    def build(self: PlanBuilder, *args: Any, **kwargs: Any) -> StepPlan:
        plan = right(self, *args, **kwargs)
        slots = plan.slots.tolist()
        return structs.replace(plan, num_outputs=plan.num_outputs[[slots.index(slot) for slot in slots]])

    return [(PlanBuilder, "build", build)]


@mutant(profile="speculation", seed=5)
def pages_of_drafts_are_not_told() -> list[Patch]:
    """The runner does not learn of pages that were added for a draft."""
    right = RunningRequests.make_room

    def make_room(self: RunningRequests, request: Request, num_ahead: int) -> int:
        updates = request.progress.page_updates.copy()
        room = right(self, request, num_ahead)
        request.progress.page_updates = updates
        return room

    return [(RunningRequests, "make_room", make_room)]


@mutant(profile="speculation", seed=5)
def the_runner_keeps_the_last_token_of_a_draft() -> list[Patch]:
    """After a draft, the runner computes from the token that it sampled last, which may not have counted."""
    return [(plan_builder, "_newest_known", lambda request: NEWEST_TOKEN)]  # type: ignore[list-item]


@mutant(profile="speculation", seed=9)
def steps_are_planned_upon_drafts() -> list[Patch]:
    """The next step of a request does not wait until its draft is judged."""
    return [(Speculation, "awaits_tokens", lambda self: False)]


@mutant(profile="speculation", seed=2)
def drafts_come_from_any_namespace() -> list[Patch]:
    """A request is drafted what another tenant was answered."""
    right = TreeText.__init__

    def init(self: TreeText, tree: RadixTree) -> None:
        class Roots:
            def get(self, namespace: object) -> Node | None:
                return next(iter(tree.roots.values()), None)

        found = SimpleNamespace(roots=Roots(), page_size=tree.page_size, descend=tree.descend, key=tree.key)
        right(self, found)  # type: ignore[arg-type]

    return [(TreeText, "__init__", init)]
