"""Giving memory back between bursts of work, and taking it again."""

from headwater.cache.namespace import Scope, Tier
from headwater.control.controlled_engine import ControlledEngine
from headwater.control.operation import Hold, Moment, Operation, Permit
from headwater.control.ports import StagedWeights
from headwater.control.weights import CHANGED_WEIGHTS, INCOMPLETE_WEIGHTS, retire_other_weights
from headwater.messages.base import Answer
from headwater.messages.control import Failed
from headwater.messages.weights import MEMORY_TAGS, MemoryResult, ReleaseMemory, ResumeMemory


class MemoryRelease(Operation):
    """Releases when nothing runs. Requests that have never started are held, so that the moment comes."""

    kind = "release_memory"
    is_exclusive = True

    def __init__(self, message: ReleaseMemory, engine: ControlledEngine, permit: Permit) -> None:
        self._message = message
        self._engine = engine
        self._permit = permit
        self._released = engine.orders.released

    @property
    def phase(self) -> str:
        return "waiting_for_idle"

    @property
    def hold(self) -> Hold:
        return Hold.STARTS

    def arrive(self) -> Failed | None:
        return _unknown_tag(self._message)

    def look(self, moment: Moment) -> Answer | None:
        wanted = set(self._message.tags or MEMORY_TAGS) - self._released
        if not wanted:
            return self._result(0, moment) if self._permit.ask() else None
        if moment.blockers:
            is_promised = self._permit.is_awaited  # then the blocker, a copy that began since, ends soon
            return self._refused(moment) if moment.has_expired and not is_promised else None
        if self._engine.is_step_in_flight():
            return None  # its requests have ended, so it is no blocker; but it still computes
        if not self._permit.ask():
            return None
        num_bytes = 0
        if "kv_cache" in wanted:
            self._engine.cache.retire(Scope(tiers=frozenset({Tier.DEVICE})))
            num_bytes += self._engine.kv_memory.release()
        if "weights" in wanted:
            num_bytes += self._engine.weights.release()
        self._released |= wanted
        return self._result(num_bytes, moment)

    def cancelled(self, moment: Moment, reason: str) -> Failed:
        return Failed(call_id=self._message.call_id, status=409, message=f"{reason}; nothing was released")

    def _result(self, num_bytes: int, moment: Moment) -> MemoryResult:
        return MemoryResult(
            call_id=self._message.call_id,
            released=self._engine.orders.released_tags(),
            num_bytes=num_bytes,
            waited_s=moment.waited_s,
        )

    def _refused(self, moment: Moment) -> Failed:
        return Failed(
            call_id=self._message.call_id,
            status=400,
            message="memory was not released: the engine is not idle",
            blockers=moment.blockers,
        )


class MemoryResume(Operation):
    """Takes released memory again; weights are read from their files in a thread of their own."""

    kind = "resume_memory"
    is_exclusive = True

    def __init__(self, message: ResumeMemory, engine: ControlledEngine, permit: Permit) -> None:
        self._message = message
        self._engine = engine
        self._permit = permit
        self._released = engine.orders.released
        self._staged: StagedWeights | None = None

    @property
    def phase(self) -> str:
        return "resuming"

    @property
    def hold(self) -> Hold:
        return Hold.ALL

    @property
    def is_polling(self) -> bool:
        return self._staged is not None and not self._staged.is_ready()

    def in_flight(self) -> dict[str, int]:
        return {} if self._staged is None else {"weight_update": 1}

    def arrive(self) -> Failed | None:
        return _unknown_tag(self._message)

    def look(self, moment: Moment) -> Answer | None:
        wanted = set(self._message.tags or MEMORY_TAGS) & self._released
        if "weights" in wanted:
            if self._staged is None:
                self._engine.scheduler.why_refusing.pop(CHANGED_WEIGHTS, None)
                self._staged = self._engine.weights.reload(accepts_changes=self._message.accept_changed_weights)
            if not self._staged.is_ready():
                return self._too_late() if moment.has_expired else None
            error = self._staged.error()
            if error is not None:
                return self._changed(error) if self._staged.has_changed else self._failed(error)
        if not self._permit.ask(weights_id=self._staged.weights_id if self._staged is not None else ""):
            return None
        has_changed = False
        if self._staged is not None:
            has_changed = self._staged.has_changed
            self._put_in_place(self._staged)
        num_bytes = self._engine.kv_memory.resume() if "kv_cache" in wanted else 0
        self._released -= wanted
        return MemoryResult(
            call_id=self._message.call_id,
            released=self._engine.orders.released_tags(),
            num_bytes=num_bytes,
            waited_s=moment.waited_s,
            weights_id=self._engine.scheduler.weights_id,
            weight_version=self._engine.scheduler.weight_version,
            has_changed_weights=has_changed,
        )

    def cancelled(self, moment: Moment, reason: str) -> Failed:
        if self._staged is not None:
            self._staged.abandon()
        return Failed(call_id=self._message.call_id, status=409, message=f"{reason}; nothing was resumed")

    def _put_in_place(self, staged: StagedWeights) -> None:
        scheduler = self._engine.scheduler
        if staged.has_changed:
            scheduler.weight_version = ""  # the label was of other weights
        scheduler.begin_weights(staged.weights_id, end_ids=staged.end_ids)
        retire_other_weights(self._engine, staged.weights_id)
        self._engine.weights.swap(staged)
        scheduler.why_refusing.pop(INCOMPLETE_WEIGHTS, None)
        self._staged = None

    def _too_late(self) -> Failed:
        assert self._staged is not None
        self._staged.abandon()
        message = "the weights were not loaded in time; nothing was resumed"
        return Failed(call_id=self._message.call_id, status=408, message=message)

    def _changed(self, error: str) -> Failed:
        text = (
            f"{error}; nothing was resumed. Put the old files back, resume with accept_changed_weights to serve the "
            f"new ones without a label, or load weights with /update_weights_from_disk"
        )
        # Clients that have not seen this answer must not wait for weights that do not come.
        why = f"the weights were released, and not resumed: {error}"
        self._engine.scheduler.why_refusing[CHANGED_WEIGHTS] = why
        param = "accept_changed_weights"
        return Failed(call_id=self._message.call_id, status=409, message=text, param=param)

    def _failed(self, message: str) -> Failed:
        return Failed(call_id=self._message.call_id, status=500, message=message)


def _unknown_tag(message: ReleaseMemory | ResumeMemory) -> Failed | None:
    unknown = [tag for tag in message.tags if tag not in MEMORY_TAGS]
    if not unknown:
        return None
    text = f"tag {unknown[0]!r} is not known; known: {', '.join(MEMORY_TAGS)}"
    return Failed(call_id=message.call_id, status=400, message=text, param="tags")
