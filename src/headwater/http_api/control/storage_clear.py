"""How clearing a store ended, per tier."""


from headwater.generation.answer_fields import Json
from headwater.generation.errors import ApiError
from headwater.http_api.engine_answers import EngineAnswers, facts_of
from headwater.messages.control import FlushResult

CLEARED = "Hierarchical cache storage backend cleared."
NOT_YET = (
    "Hierarchical cache storage backend not cleared yet: the store has not acknowledged. "
    "Until it does, this server neither reads nor writes it."
)


class ClearAnswer:
    """The outcome over all engines. 200: the store has acknowledged to all. 202: some still wait for it."""

    def __init__(self, answers: EngineAnswers) -> None:
        """Raises ApiError if an engine failed or refused; its details have the outcome on the others."""
        self._answers = answers
        self._results: list[FlushResult] = answers.all_or_raise(_facts)
        refused = next((result for result in self._results if not result.success), None)
        if refused is not None:
            raise ApiError(refused.status, refused.message, details={"blockers": refused.blockers})

    @property
    def is_pending(self) -> bool:
        return any("storage" in result.pending for result in self._results)

    @property
    def status(self) -> int:
        return 202 if self.is_pending else 200

    def as_json(self) -> Json:
        """`tiers` has the outcome of each tier: `dropped`, `kept` or `pending`."""
        kept = sorted({tier for result in self._results for tier in result.still_warm})
        return {
            "success": True,
            "message": NOT_YET if self.is_pending else CLEARED,
            "tiers": dict.fromkeys(kept, "kept") | {"storage": "pending" if self.is_pending else "dropped"},
            "pending": ["storage"] if self.is_pending else [],
            "waited_s": max(result.waited_s for result in self._results),
            "generation": max(result.generation for result in self._results),
            "engines": self._answers.entries(_facts),
        }

    def as_text(self) -> str:
        facts = self.as_json()
        kept = [tier for tier, outcome in facts["tiers"].items() if outcome == "kept"]
        sentences = [facts["message"], *([f"Still warm: {', '.join(kept)}."] if kept else [])]
        return " ".join(sentences) + "\n"


def _facts(result: FlushResult) -> Json:
    return facts_of(result, without=("call_id",))
