"""New weights while the server serves, in one operation (docs/design.md section 5, rule 12)."""

from headwater.control.operation import Hold, Moment, Permit
from headwater.control.ports import (
    CachePort,
    FlushScope,
    IdentityPort,
    RequestsPort,
    RetirementView,
    StagedWeights,
    StepPort,
    WeightsPort,
)
from headwater.control.released_memory import ReleasedMemory
from headwater.messages.control import Failed
from headwater.messages.weights import UpdateWeights, WeightsUpdated
from headwater.messages.wire import ToClient

CHANGED_WEIGHTS = "changed_weights"  # why new requests are refused


class WeightUpdate:
    """Stages while requests run; then stops launching, collects, takes the new id, retires, swaps.

    Whatever is wrong with the files shows while staging: then nothing has been touched, and serving goes on.
    """

    kind = "update_weights"
    is_exclusive = True

    def __init__(
        self,
        message: UpdateWeights,
        *,
        weights: WeightsPort,
        identity: IdentityPort,
        cache: CachePort,
        requests: RequestsPort,
        step: StepPort,
        released: ReleasedMemory,
        permit: Permit | None = None,
    ) -> None:
        self._message = message
        self._permit = permit or Permit()
        self._weights = weights
        self._identity = identity
        self._cache = cache
        self._requests = requests
        self._step = step
        self._released = released
        self._staged: StagedWeights | None = None

    @property
    def phase(self) -> str:
        if self._staged is None:
            return "queued"
        return "waiting_for_step" if self._staged.is_ready() else "staging"

    @property
    def hold(self) -> Hold:
        is_ready = self._staged is not None and self._staged.is_ready()
        return Hold.ALL if is_ready and self._permit.is_given else Hold.NOTHING

    @property
    def is_polling(self) -> bool:
        return self._staged is not None and not self._staged.is_ready()

    def in_flight(self) -> dict[str, int]:
        return {} if self._staged is None else {"weight_update": 1}

    def look(self, moment: Moment) -> ToClient | None:
        if self._staged is None:
            self._staged = self._weights.stage(self._message.path, self._message.load_format)
        if not self._staged.is_ready():
            if not moment.has_expired:
                return None
            self._staged.abandon()
            return self._failed(408, "the weights were not loaded in time")
        error = self._staged.error()
        if error is not None:
            return self._failed(400, error)
        only = self._message.only_weights_id
        if only and self._staged.weights_id != only:
            found = f"what lies at {self._message.path} now is not what the server serves"
            return self._failed(409, f"{found}: weights {self._staged.weights_id}, not {only}")
        if not self._permit.ask(weights_id=self._staged.weights_id, is_whole=self._staged.is_whole):
            return None
        if self._step.is_step_in_flight():
            return None  # one step at most: launching is held
        return self._swap(self._staged, moment)

    def cancelled(self, moment: Moment, reason: str) -> Failed:
        if self._staged is not None:
            self._staged.abandon()
        return self._failed(409, f"{reason}; the old weights serve on")

    def _swap(self, staged: StagedWeights, moment: Moment) -> WeightsUpdated:
        num_aborted = 0
        if self._message.abort_all_requests:
            num_aborted = self._requests.abort_all("Aborted: the weights were updated")
        if self._message.weight_version is not None:
            self._identity.set_weight_version(self._message.weight_version)
        self._identity.begin_weights(staged.weights_id, end_ids=staged.end_ids)
        retirement = retire_other_weights(self._cache, staged.weights_id)
        self._weights.swap(staged)
        self._requests.refuse_new(None, cause=CHANGED_WEIGHTS)
        self._released.tags.discard("weights")  # they are in place: there is nothing left to resume
        return WeightsUpdated(
            call_id=self._message.call_id,
            message="Weights updated.",
            weights_id=staged.weights_id,
            weight_version=self._identity.weight_version,
            generation=retirement.generation,
            num_tensors=staged.num_tensors,
            num_kept=self._requests.num_running,
            num_aborted=num_aborted,
            waited_s=moment.waited_s,
            freed=retirement.freed(),
            retired=retirement.retired(),
            is_whole=staged.is_whole,
        )

    def _failed(self, status: int, message: str) -> Failed:
        return Failed(call_id=self._message.call_id, status=status, message=message, param="model_path")


def retire_other_weights(cache: CachePort, weights_id: str) -> RetirementView:
    """Retire every namespace of weights other than `weights_id`: no request can match it any more."""
    # Storage names pages by their weights: there is nothing to raise.
    tiers = tuple(tier for tier in cache.tiers if tier != "storage")
    return cache.retire(FlushScope(tiers=tiers, other_than_weights_id=weights_id))
