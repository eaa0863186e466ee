"""One change on its way: prepared on all engines, then decided, then committed on all. No sockets, no clock."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from headwater.client.errors import CallFailed
from headwater.messages.cache import PinGaveWay
from headwater.messages.control import Failed
from headwater.messages.two_phase import Change

# After the caller's deadline, in this order, all within the second that an answer may take longer:
PREPARE_GRACE_S = 0.45  # an engine that has not prepared by then ends the change: nothing is done
EXPIRY_GRACE_S = 0.6  # engines give up by themselves what has not been committed
ANSWER_GRACE_S = 0.9  # the caller gets an answer from what is known


class Phase(Enum):
    DIRECT = "direct"  # the server has one engine, which gets the change itself
    PREPARING = "preparing"
    PREPARED = "prepared"  # on all engines; another change is being committed
    COMMITTING = "committing"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Pending:
    """The change is decided, but this engine has not confirmed it: it takes no requests until it has."""

    reason: str


@dataclass(frozen=True, slots=True)
class Untouched:
    """The change was not made here, because another engine could not make it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Per engine its answer, an exception, `Pending` or `Untouched`. `is_decided`: the change is in force."""

    is_decided: bool
    answers: dict[int, Any]


class ByEngine(list[Any]):
    """Answers, one for each engine, and the numbers of those engines: of a fleet these have gaps."""

    def __init__(self, answers: Mapping[int, Any]) -> None:
        super().__init__(answers.values())
        self.engines = list(answers)


def engines_of(answers: Sequence[Any]) -> Sequence[int]:
    """The number of the engine that gave each answer."""
    return answers.engines if isinstance(answers, ByEngine) else range(len(answers))


def by_engine(answers: Sequence[Any]) -> Iterable[tuple[int, Any]]:
    """Each answer with the number of its engine."""
    return zip(engines_of(answers), answers, strict=True)


@dataclass(slots=True, eq=False)
class ChangeCall:
    """A change, the engines that are asked to make it, and how far each of them is."""

    change: Change
    named: frozenset[int]  # the engines that it is for
    engines: tuple[int, ...]  # those of `named` that serve now; the others make the change before they serve again
    is_for_all: bool
    deadline_s: float  # the caller's
    phase: Phase = Phase.PREPARING
    answers: dict[int, Any] = field(default_factory=dict)  # by engine, in the present phase
    weights_id: str = ""  # of the weights that were prepared
    is_whole: bool = True
    gave_way: dict[int, PinGaveWay] = field(default_factory=dict)  # by engine: of the pin that the change sets
    outcome: Outcome | None = None

    @property
    def call_id(self) -> str:
        """The same on every engine."""
        return self.change.call_id

    @property
    def prepare_by_s(self) -> float:
        return self.deadline_s + PREPARE_GRACE_S

    @property
    def expires_at_s(self) -> float:
        return self.deadline_s + EXPIRY_GRACE_S

    @property
    def answer_by_s(self) -> float:
        return self.deadline_s + ANSWER_GRACE_S

    @property
    def next_look_s(self) -> float:
        """When the call must be looked at even if no message arrives."""
        if self.outcome is not None:
            return math.inf
        return self.prepare_by_s if self.phase in (Phase.PREPARING, Phase.PREPARED) else self.answer_by_s

    @property
    def missing(self) -> list[int]:
        """Engines that have not answered in the present phase."""
        return [engine for engine in self.engines if engine not in self.answers]


def outcome_of(call: ChangeCall, *, is_decided: bool, reasons: Mapping[int, str]) -> Outcome:
    """What the caller gets for each engine. `reasons`: why an engine that has not confirmed takes no requests."""
    outcomes: dict[int, Any] = {}
    overdue = call.missing or call.engines or call.named  # the silent engines; all, if another change held them up
    has_failed = any(isinstance(answer, Failed | Exception) for answer in call.answers.values())
    for engine in sorted(call.named):
        answer = call.answers.get(engine)
        has_refused = answer is None or isinstance(answer, Failed | Exception)
        if is_decided and has_refused:
            outcomes[engine] = Pending(reasons[engine])
        elif is_decided or (answer is not None and has_refused):
            outcomes[engine] = CallFailed(answer) if isinstance(answer, Failed) else answer
        elif engine in overdue and not has_failed:
            outcomes[engine] = TimeoutError()
        else:
            outcomes[engine] = Untouched()
    return Outcome(is_decided, outcomes)
