"""Pins: prefixes that an operator keeps from being evicted."""

from collections.abc import Iterable

from headwater.cache.namespace import Namespace, Tier
from headwater.cache.pins import Pin, PinLimit
from headwater.messages.base import unpack_ids
from headwater.messages.cache import GetPins, PinGaveWay, PinInfo, PinPrefix, Pins, UnpinPrefix
from headwater.messages.control import Done, Failed
from headwater.scheduling.scheduler import Scheduler

_MAX_TTL_S = 30 * 86400.0


class Pinning:
    """Answers messages about pins, and ends those whose time is over (`advance`, every turn)."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._cache = scheduler.cache
        self._board = scheduler.pins
        self._scheduler = scheduler

    @property
    def pins(self) -> Iterable[Pin]:
        return self._board

    @property
    def num_pins(self) -> int:
        """Pins that hold device pages, with a lease each."""
        return sum(pin.lease is not None for pin in self._board)

    def has(self, pin_id: str) -> bool:
        return any(pin.pin_id == pin_id for pin in self._board)

    def advance(self) -> None:
        self._board.advance()

    def take_notices(self) -> list[PinGaveWay]:
        """What clients have to know of the pins that have given way since the last call."""
        return [PinGaveWay(pin_id=pin.pin_id, tiers=_names(pin)) for pin in self._board.take_gave_way()]

    def as_now(self, pins: Pins) -> Pins:
        """`pins` as they are now; those that have ended meanwhile as they were."""
        now = {pin.pin_id: self._info(pin) for pin in self._board}
        return Pins(call_id=pins.call_id, items=tuple(now.get(item.pin_id, item) for item in pins.items))

    def list(self, message: GetPins) -> Pins:
        return Pins(call_id=message.call_id, items=tuple(self._info(pin) for pin in self._board))

    def unpin(self, message: UnpinPrefix) -> Done | Failed:
        if self._board.unpin(message.pin_id):
            return Done(call_id=message.call_id)
        return Failed(call_id=message.call_id, status=404, message=f"no pin {message.pin_id!r}", param="pin_id")

    def pin(self, message: PinPrefix) -> Pins | Failed:
        if not 0 < message.ttl_s <= _MAX_TTL_S:
            text = f"ttl_s must be above 0 and at most {_MAX_TTL_S:g} seconds"
            return Failed(call_id=message.call_id, status=400, message=text, param="ttl_s")
        tiers = frozenset(Tier[name.upper()] for name in message.tiers)
        if not tiers or not tiers <= self._cache.tier_pages.keys():
            text = f"tiers must name one or more of {', '.join(tier.name.lower() for tier in self._cache.tier_pages)}"
            return Failed(call_id=message.call_id, status=400, message=text, param="tiers")
        adapter_id = self._scheduler.adapters.id_of(message.lora_name)
        if adapter_id is None:
            text = f"no adapter {message.lora_name!r} is loaded"
            return Failed(call_id=message.call_id, status=404, message=text, param="lora_path")
        namespace = Namespace(message.cache_salt, message.extra_key, adapter_id, self._scheduler.weights_id)
        try:
            pin = self._board.pin(
                namespace, unpack_ids(message.prompt_ids), ttl_s=message.ttl_s, tiers=tiers, pin_id=message.pin_id
            )
        except PinLimit as error:
            return Failed(call_id=message.call_id, status=409, message=str(error))
        return Pins(call_id=message.call_id, items=(self._info(pin),))

    def _info(self, pin: Pin) -> PinInfo:
        return PinInfo(
            pin_id=pin.pin_id,
            num_tokens=pin.num_tokens,
            remaining_s=self._board.remaining_s(pin),
            cache_salt=pin.namespace.cache_salt,
            extra_key=pin.namespace.extra_key,
            adapter_id=pin.namespace.adapter,
            tiers=_names(pin),
            num_host_tokens=pin.hold.num_pages * self._cache.page_size if pin.hold is not None else 0,
            gave_way=pin.gave_way,
        )


def _names(pin: Pin) -> tuple[str, ...]:
    return tuple(tier.name.lower() for tier in sorted(pin.tiers))
