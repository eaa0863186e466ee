"""Mutants of the queue's bounds, of timeouts and of embeddings."""

import math
from dataclasses import replace
from typing import Any

from headwater.scheduling.deadlines import Deadlines
from headwater.scheduling.outputs import OutputBuffer
from headwater.scheduling.queue_gate import QueueGate
from headwater.scheduling.request import Request
from headwater.scheduling.waiting_queue import WaitingQueue
from headwater.simulation.mutants.registry import Patch, mutant


@mutant(profile="limits", seed=1)
def queue_timeouts_end_what_has_started() -> list[Patch]:
    """The queue's timeout also ends requests that have started."""
    return [(Deadlines, "started", lambda self, request: None)]


@mutant(profile="limits", seed=1)
def nothing_is_overdue() -> list[Patch]:
    """A request waits for as long as it takes."""
    return [(Deadlines, "overdue", lambda self: None)]


@mutant(profile="limits", seed=1)
def answers_take_as_long_as_they_will() -> list[Patch]:
    """The timeout of whole requests is ignored."""
    right = Deadlines.arrived

    def arrived(self: Deadlines, request: Request) -> None:
        right(self, request)
        self._not_ended.remove(request)

    return [(Deadlines, "arrived", arrived)]


@mutant(profile="limits", seed=1)
def the_loop_sleeps_through_timeouts() -> list[Patch]:
    """A sleeping loop does not wake for a timeout."""
    return [(Deadlines, "next_look_s", lambda self: math.inf)]


@mutant(profile="limits", seed=1)
def tokens_in_the_queue_are_not_counted() -> list[Patch]:
    """A queue accepts any number of tokens."""
    right = QueueGate.__init__

    def init(self: QueueGate, *args: Any, limits: Any, **kwargs: Any) -> None:
        right(self, *args, limits=replace(limits, max_queued_tokens=None), **kwargs)

    return [(QueueGate, "__init__", init)]


@mutant(profile="limits", seed=1)
def tokens_stay_counted_after_the_queue() -> list[Patch]:
    """Tokens of requests that have left the queue still count."""
    right = WaitingQueue._count

    def count(self: WaitingQueue, request: Request, sign: int) -> None:
        right(self, request, sign)
        if sign < 0:
            self.held = self.held._replace(num_tokens=self.held.num_tokens + len(request.tokens))

    return [(WaitingQueue, "_count", count)]


@mutant(profile="limits", seed=1)
def one_key_fills_the_queue() -> list[Patch]:
    """The requests of one key may take all places of the queue."""
    right = QueueGate.__init__

    def init(self: QueueGate, *args: Any, limits: Any, **kwargs: Any) -> None:
        right(self, *args, limits=replace(limits, max_queue_share=1.0), **kwargs)

    return [(QueueGate, "__init__", init)]


@mutant(profile="limits", seed=1)
def embeddings_are_of_the_last_chunk() -> list[Patch]:
    """The mean of a prompt covers its last chunk only."""
    right = OutputBuffer.add_pooled

    def add_pooled(self: OutputBuffer, request: Request, hidden: Any) -> None:
        request.unsent.pooled = None
        right(self, request, hidden)

    return [(OutputBuffer, "add_pooled", add_pooled)]


@mutant(profile="limits", seed=1)
def means_leave_out_cached_tokens() -> list[Patch]:
    """A request for the mean of all hidden states takes a part of its prompt from the cache."""
    right: Any = Request.num_matchable

    def num_matchable(self: Request) -> int:
        pooling, self.pooling = self.pooling, None
        try:
            return right.fget(self)
        finally:
            self.pooling = pooling

    return [(Request, "num_matchable", property(num_matchable))]


@mutant(profile="limits", seed=6)
def retracted_prompts_are_pooled_twice() -> list[Patch]:
    """A prompt that is computed again counts twice in its embedding."""
    right = OutputBuffer.begin_prompt

    def begin_prompt(self: OutputBuffer, request: Request) -> None:
        pooled = request.unsent.pooled
        right(self, request)
        request.unsent.pooled = pooled

    return [(OutputBuffer, "begin_prompt", begin_prompt)]
