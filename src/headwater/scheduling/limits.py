"""What bounds the scheduler: sizes of its steps and its queue, timeouts, and what may run now."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from headwater.scheduling.prefill_pace import LEAST_TOKENS
from headwater.scheduling.request import Request


class _Requests(Protocol):
    """Some requests, counted without a walk."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Request]: ...


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Sizes and times that the scheduler respects. None: no limit."""

    max_running: int  # slots
    max_step_tokens: int  # tokens of one step, decodes and prefill chunks together
    prefill_chunk_tokens: int  # of one request in one step
    max_queued: int
    max_context: int
    max_gap_s: float | None = None  # that prefill should leave between two tokens of a stream
    least_paced_tokens: int = LEAST_TOKENS  # of prompts in a step beside streams, whatever the gap
    max_queued_tokens: int | None = None
    max_queue_share: float = 1.0  # of the queue's requests and tokens that one account may hold
    queue_timeout_s: float | None = None  # from arrival until a request starts
    request_timeout_s: float | None = None  # from arrival until it ends


@dataclass(frozen=True, slots=True)
class Admission:
    """What may run now. A pause, a holding flush or a weight update closes it."""

    may_run: bool = True  # launch steps at all
    may_start: bool = True  # admit requests that have never started

    def admits(self, request: Request) -> bool:
        return self.may_run and (self.may_start or request.started_s is not None)

    def num_admitted(self, requests: _Requests) -> int:
        """How many of `requests` it admits."""
        if not self.may_run or not len(requests):
            return 0
        return len(requests) if self.may_start else sum([self.admits(request) for request in requests])
