"""Operations that take no time. Changes among them still have a permit: several engines make them together."""

from collections.abc import Callable
from functools import partial
from typing import Any

from headwater.control.controlled_engine import ControlledEngine
from headwater.control.operation import Moment, Operation, Permit
from headwater.messages.base import Answer, Call
from headwater.messages.cache import DetachStorage, GetPins, GetStorage, PinPrefix, Pins, UnpinPrefix
from headwater.messages.control import ContinueGeneration, Done, Failed
from headwater.messages.weights import (
    GetParameters,
    GetWeights,
    Parameters,
    SetWeightVersion,
    Weights,
    WeightVersionSet,
)

Do = Callable[[Any, ControlledEngine], Answer]


class AtOnce(Operation):
    """A function of the message, which cannot fail half-way. `kind` is the tag of its message."""

    is_immediate = True

    def __init__(self, do: Do, ends: str | None, message: Call, engine: ControlledEngine, permit: Permit) -> None:
        self.kind = str(message.__struct_config__.tag)
        self.ends = ends
        self._do = do
        self._message = message
        self._engine = engine
        self._permit = permit

    def look(self, moment: Moment) -> Answer | None:
        return self._do(self._message, self._engine) if self._permit.ask() else None

    def cancelled(self, moment: Moment, reason: str) -> Failed:
        return Failed(call_id=self._message.call_id, status=409, message=f"{reason}; nothing was changed")


def at_once(do: Do, *, ends: str | None = None) -> Callable[[Any, ControlledEngine, Permit], Operation]:
    """`do` as an entry of the table of operations."""
    return partial(AtOnce, do, ends)


class PinChange(Operation):
    """Sets or ends a pin. Setting may fail, so it comes before the permit, and is undone if the permit does not."""

    kind = "pin"
    is_immediate = True

    def __init__(self, message: PinPrefix | UnpinPrefix, engine: ControlledEngine, permit: Permit) -> None:
        self._message = message
        self._pinning = engine.pinning
        self._permit = permit
        self._pinned: Pins | None = None

    def look(self, moment: Moment) -> Answer | None:
        if isinstance(self._message, UnpinPrefix):
            if not self._pinning.has(self._message.pin_id) or self._permit.ask():
                return self._pinning.unpin(self._message)
            return None
        if self._pinned is None:
            answer = self._pinning.pin(self._message)
            if not isinstance(answer, Pins):
                return answer
            self._pinned = answer
        return self._pinning.as_now(self._pinned) if self._permit.ask() else None

    def cancelled(self, moment: Moment, reason: str) -> Failed:
        for item in self._pinned.items if self._pinned is not None else ():
            self._pinning.unpin(UnpinPrefix(call_id="", pin_id=item.pin_id))
        return Failed(call_id=self._message.call_id, status=409, message=f"{reason}; nothing was changed")


def continue_generation(message: ContinueGeneration, engine: ControlledEngine) -> Done:
    engine.orders.is_paused = False
    return Done(call_id=message.call_id)


def set_weight_version(message: SetWeightVersion, engine: ControlledEngine) -> WeightVersionSet:
    """Change the label. By default requests end with it, unless a trainer holds them: these go on under the new one."""
    ends_all = message.abort_all_requests
    if ends_all is None:
        ends_all = not (engine.orders.is_paused or engine.orders.released)
    num_aborted = engine.abort_all("Aborted: the weight version was changed") if ends_all else 0
    engine.scheduler.weight_version = message.weight_version
    return WeightVersionSet(call_id=message.call_id, weight_version=message.weight_version, num_aborted=num_aborted)


def get_weights(message: GetWeights, engine: ControlledEngine) -> Weights | Failed:
    try:
        if "weights" in engine.orders.released:
            raise KeyError(message.name)
        dtype, shape, values = engine.weights.values(message.name, message.num_values)
    except KeyError:
        text = f"the model has no parameter {message.name!r}, or its weights are released"
        return Failed(call_id=message.call_id, status=404, message=text, param="name")
    return Weights(call_id=message.call_id, name=message.name, dtype=dtype, shape=shape, values=values)


def get_parameters(message: GetParameters, engine: ControlledEngine) -> Parameters:
    shapes, ignored = engine.weights.parameters()
    return Parameters(call_id=message.call_id, shapes=shapes, ignored_suffixes=ignored)


def detach_storage(message: DetachStorage, engine: ControlledEngine) -> Answer:
    return engine.storage.detach(message.call_id)


def get_storage(message: GetStorage, engine: ControlledEngine) -> Answer:
    return engine.storage.info(message.call_id)


def get_pins(message: GetPins, engine: ControlledEngine) -> Answer:
    return engine.pinning.list(message)
