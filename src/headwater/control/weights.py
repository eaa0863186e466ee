"""New weights while the server serves, in one operation (docs/design.md section 5, rule 12)."""

from headwater.cache.namespace import Scope, Tier
from headwater.cache.retirement import Retirement
from headwater.control.controlled_engine import ControlledEngine
from headwater.control.operation import Hold, Moment, Operation, Permit
from headwater.control.ports import StagedWeights
from headwater.messages.base import Answer
from headwater.messages.control import Failed
from headwater.messages.weights import UpdateWeights, WeightsUpdated

CHANGED_WEIGHTS = "changed_weights"  # why new requests are refused


class WeightUpdate(Operation):
    """Stages while requests run; then stops launching, collects, takes the new id, retires, swaps.

    Whatever is wrong with the files shows while staging: then nothing has been touched, and serving goes on.
    """

    kind = "update_weights"
    is_exclusive = True

    def __init__(self, message: UpdateWeights, engine: ControlledEngine, permit: Permit) -> None:
        self._message = message
        self._engine = engine
        self._permit = permit
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

    def look(self, moment: Moment) -> Answer | None:
        if self._staged is None:
            self._staged = self._engine.weights.stage(self._message.path, self._message.load_format)
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
        if self._engine.is_step_in_flight():
            return None  # one step at most: launching is held
        return self._swap(self._staged, moment)

    def cancelled(self, moment: Moment, reason: str) -> Failed:
        if self._staged is not None:
            self._staged.abandon()
        return self._failed(409, f"{reason}; the old weights serve on")

    def _swap(self, staged: StagedWeights, moment: Moment) -> WeightsUpdated:
        scheduler, num_aborted = self._engine.scheduler, 0
        if self._message.abort_all_requests:
            num_aborted = self._engine.abort_all("Aborted: the weights were updated")
        if self._message.weight_version is not None:
            scheduler.weight_version = self._message.weight_version
        scheduler.begin_weights(staged.weights_id, end_ids=staged.end_ids)
        retirement = retire_other_weights(self._engine, staged.weights_id)
        self._engine.weights.swap(staged)
        scheduler.why_refusing.pop(CHANGED_WEIGHTS, None)
        self._engine.orders.released.discard("weights")  # they are in place: there is nothing left to resume
        return WeightsUpdated(
            call_id=self._message.call_id,
            message="Weights updated.",
            weights_id=staged.weights_id,
            weight_version=scheduler.weight_version,
            generation=retirement.generation,
            num_tensors=staged.num_tensors,
            num_kept=len(scheduler.running),
            num_aborted=num_aborted,
            waited_s=moment.waited_s,
            freed=self._engine.amounts(retirement.freed),
            retired=self._engine.amounts(retirement.retired),
            is_whole=staged.is_whole,
        )

    def _failed(self, status: int, message: str) -> Failed:
        return Failed(call_id=self._message.call_id, status=status, message=message, param="model_path")


def retire_other_weights(engine: ControlledEngine, weights_id: str) -> Retirement:
    """Retire every namespace of weights other than `weights_id`: no request can match it any more."""
    # Storage names pages by their weights: there is nothing to raise.
    tiers = frozenset(tier for tier in engine.cache.tiers if tier is not Tier.STORAGE)
    return engine.cache.retire(Scope(tiers=tiers, other_than_weights_id=weights_id))
