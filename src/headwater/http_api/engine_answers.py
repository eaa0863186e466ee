"""The answers of all engines to one control call. Success means that all of them did it.

A change that all engines make or none (`EngineClient.change`) succeeds when it is decided. An engine that has not
confirmed it takes no requests until it has, and is listed as `pending`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from headwater.client.change_call import Outcome, Pending, Untouched, engines_of
from headwater.generation.answer_fields import Json
from headwater.generation.errors import ApiError, as_api_error


class EngineAnswers:
    """Per engine, by index, its answer or the `ApiError` that stands for it. Holds at least one."""

    def __init__(self, answers: Sequence[Any], *, ranks: Sequence[int] | None = None) -> None:
        """`answers` as `EngineClient.call_all` returns them. Raises an exception that is a bug."""
        self.by_rank: list[Any] = [_or_error(answer) for answer in answers]
        self._ranks = engines_of(answers) if ranks is None else ranks

    @classmethod
    def of_change(cls, outcome: Outcome) -> "EngineAnswers":
        return cls(list(outcome.answers.values()), ranks=list(outcome.answers))

    @property
    def status(self) -> int:
        """Of a success: 202 while an engine has not confirmed it."""
        return 202 if any(isinstance(answer, Pending) for answer in self.by_rank) else 200

    @property
    def outcomes(self) -> list[tuple[int, Any]]:
        """(index, answer, `Pending`, `Untouched` or error) of every engine."""
        return list(zip(self._ranks, self.by_rank, strict=True))

    @property
    def results(self) -> list[Any]:
        """The answers of the engines that did it."""
        return [answer for _, answer in self.succeeded]

    @property
    def succeeded(self) -> list[tuple[int, Any]]:
        """(index, answer) of the engines that did it."""
        return [(rank, a) for rank, a in self.outcomes if not isinstance(a, ApiError | Pending | Untouched)]

    @property
    def errors(self) -> list[tuple[int, ApiError]]:
        """(index, error) of the others."""
        return [(rank, a) for rank, a in self.outcomes if isinstance(a, ApiError)]

    def all_or_raise(self, describe: Callable[[Any], Json] | None = None) -> list[Any]:
        """The answers, if every engine gave one. Else ApiError, which lists each engine."""
        error = self.error(describe)
        if error is not None:
            raise error
        return self.by_rank

    def some_or_raise(self) -> list[tuple[int, Any]]:
        """The answers that came, for reports that may be incomplete. ApiError if there is none."""
        if not self.succeeded:
            self.all_or_raise()
        return self.succeeded

    def error(self, describe: Callable[[Any], Json] | None = None) -> ApiError | None:
        """The worst error, None if there is none. With several engines it lists the outcome of each."""
        if not self.errors:
            return None
        rank, worst = max(self.errors, key=lambda item: item[1].status)
        if len(self.by_rank) == 1:
            return worst
        message = worst.message
        if any(isinstance(answer, Untouched) for answer in self.by_rank):
            message += "; nothing was changed on any engine"
        elif self.succeeded:
            message += f"; done on {engine_list([rank for rank, _ in self.succeeded])}"
        return ApiError(
            worst.status,
            message,
            param=worst.param,
            code=worst.code,
            type=worst.type,
            details={"engine": rank} | worst.details | {"engines": self.entries(describe)},
        )

    def entries(self, describe: Callable[[Any], Json] | None = None) -> list[Json]:
        """For `engines` in an answer: index, success, and `describe` of the answer or the error's facts."""
        return [self._entry(rank, answer, describe) for rank, answer in self.outcomes]

    def _entry(self, rank: int, answer: Any, describe: Callable[[Any], Json] | None) -> Json:
        if isinstance(answer, ApiError):
            return error_entry(rank, answer)
        if isinstance(answer, Pending):
            return pending_entry(rank, answer)
        if isinstance(answer, Untouched):
            return {"dp_rank": rank, "success": False, "message": "nothing was changed: another engine could not"}
        return {"dp_rank": rank, "success": True} | (describe(answer) if describe else {})


def error_entry(rank: int, error: ApiError) -> Json:
    """The entry of an engine that failed."""
    facts = {"dp_rank": rank, "success": False, "status": error.status, "message": error.message, "code": error.code}
    return facts | {name: value for name, value in error.details.items() if name != "engine"}


def pending_entry(rank: int, pending: Pending) -> Json:
    """The entry of an engine that has not confirmed what the others have done."""
    text = f"decided, not confirmed; the engine takes no requests until it is: {pending.reason}"
    return {"dp_rank": rank, "success": False, "pending": True, "message": text}


def facts_of(answer: msgspec.Struct, *, without: Sequence[str] = ()) -> Json:
    """All fields of an engine's answer, including those with their default value."""
    names = [name for name in answer.__struct_fields__ if name not in without]
    return {name: msgspec.to_builtins(getattr(answer, name)) for name in names}


def engine_list(ranks: Sequence[int]) -> str:
    """`engine 0`, `engines 0 and 2`, `engines 0, 1 and 2`."""
    names = [str(rank) for rank in ranks]
    if len(names) == 1:
        return f"engine {names[0]}"
    return f"engines {', '.join(names[:-1])} and {names[-1]}"


def _or_error(answer: Any) -> Any:
    if not isinstance(answer, BaseException):
        return answer
    error = as_api_error(answer)
    if error is None:
        raise answer
    return error
