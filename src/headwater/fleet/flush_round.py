"""What the answers of the replicas to one flush add up to. No sockets, no clock."""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from headwater.client.change_call import Pending
from headwater.client.errors import CallFailed, EngineGone, EngineLoading, EngineOut
from headwater.messages.control import FlushCache, FlushResult

STORAGE = "storage"
MEMORY = ("device", "host")
LATE = "it came while the flush was under way"


@dataclass(frozen=True, slots=True)
class Settled:
    """Per replica its answer, an exception, or `Pending`. `owing`: those that must flush before they serve again."""

    answers: dict[int, Any]
    owing: dict[int, str]  # why


def settle(
    flush: FlushCache, answers: Mapping[int, Any], *, members: Iterable[int], gone: Container[int] = ()
) -> Settled:
    """A replica that has not said whether it flushed owes the flush, if it was made anywhere.

    `members`: all replicas at the end of the flush, also those that came meanwhile. `gone`: those that have ended, and
    their memory with them, so that nothing of theirs is pending. A replica that refused has answered: it owes nothing.
    Of a flush that was made nowhere, nothing is owed either.
    """
    is_made = any(isinstance(answer, FlushResult) and answer.success for answer in answers.values())
    if flush.dry_run or not is_made:
        return Settled(dict(answers), {})
    answers = {number: each for number, each in answers.items() if number not in gone or not _is_unknown(each)}
    owing = {number: _reason(answer) for number, answer in answers.items() if _is_unknown(answer)}
    owing |= {number: LATE for number in members if number not in answers}
    pending = {number: Pending(reason) for number, reason in owing.items()}
    return Settled(dict(sorted({**answers, **pending}.items())), owing)


def _is_unknown(answer: Any) -> bool:
    """Whether the replica may hold what the flush was to retire, without having said anything about it."""
    if isinstance(answer, CallFailed):
        return answer.failed.status >= 500
    return isinstance(answer, Exception)


def _reason(answer: Any) -> str:
    match answer:
        case TimeoutError():
            return "it did not answer in time"
        case EngineOut() | EngineGone():
            return answer.reason
        case EngineLoading():
            return "it is starting"
    return str(answer)


def is_raised(result: Any) -> bool:
    """Whether the store has acknowledged the flush that this replica sent it."""
    return isinstance(result, FlushResult) and result.success and STORAGE not in result.pending


def without_store(flush: FlushCache, enabled: Iterable[str]) -> FlushCache | None:
    """What is left of a flush for the replicas that send the store nothing, since another one has; None: nothing."""
    tiers = tuple(tier for tier in flush.tiers if tier != STORAGE and tier in set(enabled))
    return msgspec.structs.replace(flush, tiers=tiers) if tiers else None


def store_is_cold(answer: Any) -> Any:
    """The answer of a replica that was asked for its memory alone, after another one has flushed the shared store."""
    if isinstance(answer, FlushResult):
        return msgspec.structs.replace(answer, still_warm=tuple(t for t in answer.still_warm if t != STORAGE))
    return answer


def owed_by(flush: FlushCache) -> FlushCache | None:
    """What a replica makes up for: its memory. The store was flushed by another replica."""
    return without_store(flush, MEMORY) if flush.tiers else flush
