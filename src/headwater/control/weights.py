"""New weights while the server serves, in one operation (docs/design.md section 5, rule 12)."""

import secrets

from headwater.cache.namespace import Scope, Tier
from headwater.cache.retirement import Retirement
from headwater.control.controlled_engine import ControlledEngine
from headwater.control.operation import Hold, Moment, Operation, Permit
from headwater.control.ports import Staged, StagedWeights
from headwater.messages.base import Answer
from headwater.messages.control import Failed
from headwater.messages.weights import UpdateWeights, WeightsUpdated

CHANGED_WEIGHTS = "changed_weights"  # why new requests are refused
INCOMPLETE_WEIGHTS = "incomplete_weights"


class WeightUpdate(Operation):
    """Stages while requests run; then stops launching, collects, takes the new id, retires, swaps.

    Whatever is wrong with the files shows while staging: then nothing has been touched, and serving goes on. In place,
    staging only checks, and the weights are overwritten while nothing is launched.
    """

    kind = "update_weights"
    is_exclusive = True

    def __init__(self, message: UpdateWeights, engine: ControlledEngine, permit: Permit) -> None:
        self._message = message
        self._engine = engine
        self._permit = permit
        self._staged: StagedWeights | None = None
        self._overwriting: Staged | None = None
        self._idle_since_s: float | None = None  # nothing is generated since then

    @property
    def phase(self) -> str:
        if self._staged is None:
            return "queued"
        if self._overwriting is not None:
            return "overwriting"
        return "waiting_for_step" if self._staged.is_ready() else "staging"

    @property
    def hold(self) -> Hold:
        is_ready = self._staged is not None and self._staged.is_ready()
        return Hold.ALL if is_ready and self._permit.is_given else Hold.NOTHING

    @property
    def is_polling(self) -> bool:
        return self._overwriting is not None or (self._staged is not None and not self._staged.is_ready())

    def in_flight(self) -> dict[str, int]:
        return {} if self._staged is None else {"weight_update": 1}

    def look(self, moment: Moment) -> Answer | None:
        if self._staged is None:
            self._staged = self._stage()
        if self._overwriting is not None:
            return self._overwritten(self._staged, self._overwriting, moment)
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
        self._idle_since_s = self._engine.clock.now()
        if self._staged.overwrite is not None:
            self._begin_overwriting(self._staged)
            return None
        return self._swap(self._staged, moment)

    def cancelled(self, moment: Moment, reason: str) -> Answer:
        if self._overwriting is not None:
            return self._incomplete(f"{reason} while they were overwritten in place")
        if self._staged is not None:
            self._staged.abandon()
        return self._failed(409, f"{reason}; the old weights serve on")

    def _stage(self) -> StagedWeights:
        message, weights = self._message, self._engine.weights
        if message.weights_id:
            return weights.stage_received(message.path, message.weights_id, in_place=message.in_place)
        return weights.stage(message.path, message.load_format)

    def _begin_overwriting(self, staged: StagedWeights) -> None:
        """From here on the weights are neither the old nor the new ones: no request may match or keep their KV."""
        between = secrets.token_hex(16)
        self._engine.scheduler.weights_id = between
        retire_other_weights(self._engine, between)
        self._overwriting = self._engine.weights.overwrite(staged)

    def _overwritten(self, staged: StagedWeights, overwriting: Staged, moment: Moment) -> Answer | None:
        if not overwriting.is_ready():
            return None  # the deadline is no reason to leave the weights incomplete
        error = overwriting.error()
        return self._incomplete(error) if error is not None else self._swap(staged, moment)

    def _incomplete(self, reason: str) -> Failed:
        """The engine computes nothing until whole weights come."""
        why = (
            f"the weights are incomplete ({reason}): send all tensors or a whole checkpoint, or take the last whole "
            "weights from their files with /resume_memory_occupation"
        )
        self._engine.orders.released.add("weights")
        self._engine.scheduler.why_refusing[INCOMPLETE_WEIGHTS] = why
        return self._failed(500, why)

    def _swap(self, staged: StagedWeights, moment: Moment) -> WeightsUpdated:
        engine, num_aborted = self._engine, 0
        scheduler = engine.scheduler
        if self._message.abort_all_requests:
            num_aborted = engine.abort_all("Aborted: the weights were updated")
        if self._message.weight_version is not None:
            scheduler.weight_version = self._message.weight_version
        scheduler.begin_weights(staged.weights_id, end_ids=staged.end_ids)
        retirement = retire_other_weights(engine, staged.weights_id)
        engine.weights.swap(staged)
        scheduler.why_refusing.pop(CHANGED_WEIGHTS, None)
        scheduler.why_refusing.pop(INCOMPLETE_WEIGHTS, None)
        engine.orders.released.discard("weights")  # they are in place: there is nothing left to resume
        assert self._idle_since_s is not None
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
            freed=engine.amounts(retirement.freed),
            retired=engine.amounts(retirement.retired),
            is_whole=staged.is_whole,
            paused_s=engine.clock.now() - self._idle_since_s,
        )

    def _failed(self, status: int, message: str) -> Failed:
        return Failed(call_id=self._message.call_id, status=status, message=message, param="model_path")


def retire_other_weights(engine: ControlledEngine, weights_id: str) -> Retirement:
    """Retire every namespace of weights other than `weights_id`: no request can match it any more."""
    # Storage names pages by their weights: there is nothing to raise.
    tiers = frozenset(tier for tier in engine.cache.tiers if tier is not Tier.STORAGE)
    return engine.cache.retire(Scope(tiers=tiers, other_than_weights_id=weights_id))
