"""How flushes ended, for programs (JSON) and for people and SGLang's scripts (text)."""

from collections.abc import Iterable

from headwater.client.change_call import Pending
from headwater.generation.answer_fields import Json
from headwater.generation.errors import ApiError
from headwater.http_api.engine_answers import EngineAnswers, engine_list, error_entry, facts_of, pending_entry
from headwater.messages.blocker_words import blockers_in_words
from headwater.messages.control import FLUSHED, FlushResult, PagesAndBytes

MIB = 1 << 20


class FlushAnswer:
    """The outcome over all engines. Each flushed at a moment of its own; success means that all did."""

    def __init__(self, answers: EngineAnswers) -> None:
        """Raises ApiError if no engine has answered with a result: then the error is the only fact."""
        self._outcomes: list[tuple[int, FlushResult | ApiError | Pending]] = answers.outcomes
        self._results: list[FlushResult] = [result for _, result in answers.succeeded]
        if not self._results:
            answers.all_or_raise()

    @property
    def status(self) -> int:
        """The HTTP status: the worst of all engines'. 202 if one has yet to flush, and takes no requests until then."""
        return max(_status(outcome) for _, outcome in self._outcomes)

    @property
    def is_success(self) -> bool:
        return all(isinstance(outcome, FlushResult) and outcome.success for _, outcome in self._outcomes)

    @property
    def _waiting(self) -> list[Pending]:
        """Of a flush that was carried out everywhere else: the engines that have yet to make it."""
        waiting = [outcome for _, outcome in self._outcomes if isinstance(outcome, Pending)]
        return waiting if self.status == 202 else []

    def as_json(self) -> Json:
        """The facts of docs/design.md section 6: over all engines, and of each in `engines`."""
        results = self._results
        answer: Json = {
            "success": self.is_success,
            "message": self._message(),
            "mode": results[0].mode,
            "waited_s": max(result.waited_s for result in results),
        }
        if self.is_success or self._waiting:
            answer |= {
                "generation": max(result.generation for result in results),
                "drained": all(result.drained for result in results),
                "freed": summed_pages(result.freed for result in results),
                "retired": summed_pages(result.retired for result in results),
                "side_caches": summed_counts(result.side_caches for result in results),
                "still_warm": sorted({tier for result in results for tier in result.still_warm}),
                "pending": sorted({tier for result in results for tier in result.pending}),
            }
        if any(result.dry_run for result in results):
            answer["dry_run"] = True
        answer["blockers"] = summed_counts(result.blockers for result in results)
        answer["engines"] = [_of_one(rank, outcome) for rank, outcome in self._outcomes]
        return answer

    def as_text(self) -> str:
        """The same in sentences; the first words are SGLang's, which scripts look for."""
        facts = self.as_json()
        is_flushed = facts["success"] and not facts.get("dry_run")
        sentences = [FLUSHED] if is_flushed and not facts["message"].startswith(FLUSHED) else []
        sentences.append(facts["message"])
        freed, held = ("Would free", "Would stay held") if facts.get("dry_run") else ("Freed", "Still held")
        for tier, amount in facts.get("freed", {}).items():
            sentences.append(f"{freed} on {tier}: {_amount(amount)}.")
        for tier, amount in facts.get("retired", {}).items():
            if amount["pages"]:
                sentences.append(f"{held} by running requests on {tier}: {_amount(amount)}.")
        if facts.get("still_warm"):
            sentences.append(f"Still warm: {', '.join(facts['still_warm'])}.")
        if facts.get("pending"):
            sentences.append(f"Not acknowledged yet: {', '.join(facts['pending'])}.")
        if facts["blockers"]:
            blockers = blockers_in_words(facts["blockers"])
            sentences.append(f"Held by: {blockers}." if is_flushed else f"Not idle: {blockers}.")
        sentences.append(f"Waited {facts['waited_s']:.3f} s.")
        return " ".join(sentences) + "\n"

    def _message(self) -> str:
        """The message of the worst engine; if only some engines flushed, which ones."""
        flushed = [rank for rank, outcome in self._outcomes if isinstance(outcome, FlushResult) and outcome.success]
        others = [rank for rank, _ in self._outcomes if rank not in flushed]
        if self._waiting:
            take = "takes" if len(others) == 1 else "take"
            until = f"{engine_list(others)} {take} no requests until it is done there as well"
            return f"Flushed on {engine_list(flushed)}; {until}: {self._waiting[0].reason}."
        worst = max((outcome for _, outcome in self._outcomes), key=_status)
        assert not isinstance(worst, Pending)
        if self.is_success or not flushed:
            return worst.message
        message = worst.message.rstrip(".")
        return f"{message}. The cache was flushed on {engine_list(flushed)}, not on {engine_list(others)}."


def summed_pages(amounts: Iterable[dict[str, PagesAndBytes]]) -> dict[str, Json]:
    """Pages and bytes by tier, over all engines."""
    total: dict[str, Json] = {}
    for by_tier in amounts:
        for tier, amount in by_tier.items():
            entry = total.setdefault(tier, {"pages": 0, "bytes": 0})
            entry["pages"] += amount.pages
            entry["bytes"] += amount.bytes
    return total


def summed_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Counts by name, over all engines."""
    total: dict[str, int] = {}
    for by_name in counts:
        for name, count in by_name.items():
            total[name] = total.get(name, 0) + count
    return total


def _status(outcome: FlushResult | ApiError | Pending) -> int:
    return 202 if isinstance(outcome, Pending) else outcome.status


def _of_one(rank: int, outcome: FlushResult | ApiError | Pending) -> Json:
    if isinstance(outcome, Pending):
        return pending_entry(rank, outcome)
    if isinstance(outcome, ApiError):
        return error_entry(rank, outcome)
    return {"dp_rank": rank} | facts_of(outcome, without=("call_id",))


def _amount(amount: Json) -> str:
    return f"{amount['pages']} pages, {amount['bytes'] / MIB:.1f} MiB"
