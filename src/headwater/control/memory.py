"""Giving memory back between bursts of work, and taking it again."""

from headwater.control.operation import Hold, Moment, Permit
from headwater.control.ports import (
    CachePort,
    FlushScope,
    IdentityPort,
    KvMemoryPort,
    RequestsPort,
    StagedWeights,
    StepPort,
    WeightsPort,
)
from headwater.control.released_memory import TAGS, ReleasedMemory
from headwater.control.weights import CHANGED_WEIGHTS, retire_other_weights
from headwater.messages.control import Failed
from headwater.messages.weights import MemoryResult, ReleaseMemory, ResumeMemory
from headwater.messages.wire import ToClient


class MemoryRelease:
    """Releases when nothing runs. Requests that have never started are held, so that the moment comes."""

    kind = "release_memory"
    is_exclusive = True
    is_polling = False

    def __init__(
        self,
        message: ReleaseMemory,
        *,
        released: ReleasedMemory,
        cache: CachePort,
        step: StepPort,
        kv_memory: KvMemoryPort,
        weights: WeightsPort,
        permit: Permit | None = None,
    ) -> None:
        self._message = message
        self._permit = permit or Permit()
        self._released = released
        self._cache = cache
        self._step = step
        self._kv_memory = kv_memory
        self._weights = weights

    phase = "waiting_for_idle"
    hold = Hold.STARTS

    def in_flight(self) -> dict[str, int]:
        return {}

    def look(self, moment: Moment) -> ToClient | None:
        wanted = set(self._message.tags or TAGS) - self._released.tags
        if not wanted:
            return self._result(0, moment) if self._permit.ask() else None
        if moment.blockers:
            is_promised = self._permit.is_awaited  # then what came in between, a copy, ends soon
            return self._refused(moment) if moment.has_expired and not is_promised else None
        if self._step.is_step_in_flight():
            return None  # its requests have ended, so it blocks nobody; but it still computes
        if not self._permit.ask():
            return None
        num_bytes = 0
        if "kv_cache" in wanted:
            self._cache.retire(FlushScope(tiers=("device",)))
            num_bytes += self._kv_memory.release()
        if "weights" in wanted:
            num_bytes += self._weights.release()
        self._released.tags |= wanted
        return self._result(num_bytes, moment)

    def cancelled(self, moment: Moment, reason: str) -> Failed:
        return Failed(call_id=self._message.call_id, status=409, message=f"{reason}; nothing was released")

    def _result(self, num_bytes: int, moment: Moment) -> MemoryResult:
        return MemoryResult(
            call_id=self._message.call_id,
            released=self._released.as_tuple(),
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


class MemoryResume:
    """Takes released memory again; weights are read from their files in a thread of their own."""

    kind = "resume_memory"
    is_exclusive = True

    def __init__(
        self,
        message: ResumeMemory,
        *,
        released: ReleasedMemory,
        cache: CachePort,
        kv_memory: KvMemoryPort,
        weights: WeightsPort,
        identity: IdentityPort,
        requests: RequestsPort,
        permit: Permit | None = None,
    ) -> None:
        self._message = message
        self._permit = permit or Permit()
        self._released = released
        self._cache = cache
        self._kv_memory = kv_memory
        self._weights = weights
        self._identity = identity
        self._requests = requests
        self._staged: StagedWeights | None = None

    phase = "resuming"
    hold = Hold.ALL

    @property
    def is_polling(self) -> bool:
        return self._staged is not None and not self._staged.is_ready()

    def in_flight(self) -> dict[str, int]:
        return {} if self._staged is None else {"weight_update": 1}

    def look(self, moment: Moment) -> ToClient | None:
        wanted = set(self._message.tags or TAGS) & self._released.tags
        if "weights" in wanted:
            if self._staged is None:
                self._requests.refuse_new(None, cause=CHANGED_WEIGHTS)
                self._staged = self._weights.reload(accepts_changes=self._message.accept_changed_weights)
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
        num_bytes = self._kv_memory.resume() if "kv_cache" in wanted else 0
        self._released.tags -= wanted
        return MemoryResult(
            call_id=self._message.call_id,
            released=self._released.as_tuple(),
            num_bytes=num_bytes,
            waited_s=moment.waited_s,
            weights_id=self._identity.weights_id,
            weight_version=self._identity.weight_version,
            has_changed_weights=has_changed,
        )

    def cancelled(self, moment: Moment, reason: str) -> Failed:
        if self._staged is not None:
            self._staged.abandon()
        return Failed(call_id=self._message.call_id, status=409, message=f"{reason}; nothing was resumed")

    def _put_in_place(self, staged: StagedWeights) -> None:
        if staged.has_changed:
            self._identity.set_weight_version("")  # the label was of other weights
        self._identity.begin_weights(staged.weights_id, end_ids=staged.end_ids)
        retire_other_weights(self._cache, staged.weights_id)
        self._weights.swap(staged)
        self._staged = None

    def _too_late(self) -> Failed:
        assert self._staged is not None
        self._staged.abandon()
        return self._failed("the weights were not loaded in time")

    def _changed(self, error: str) -> Failed:
        text = (
            f"{error}; nothing was resumed. Put the old files back, resume with accept_changed_weights to serve the "
            f"new ones without a label, or load weights with /update_weights_from_disk"
        )
        # Who has not looked at this answer must not wait for weights that do not come.
        self._requests.refuse_new(f"the weights were released, and not resumed: {error}", cause=CHANGED_WEIGHTS)
        param = "accept_changed_weights"
        return Failed(call_id=self._message.call_id, status=409, message=text, param=param)

    def _failed(self, message: str) -> Failed:
        return Failed(call_id=self._message.call_id, status=500, message=message)
