"""Which buckets belong together: a bracket collects them, and all become visible at once, or none.

No sockets, no files, no clock: calls and time go in. `WeightReceiver` drives it in the server, the simulation in
virtual time.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from headwater.devices.safetensors_header import StoredTensor
from headwater.messages.weights import Parameters

_DTYPES = ("F64", "F32", "F16", "BF16")
NO_BRACKET = "no bracket is open: begin one with /begin_weight_update"


class TransferRefused(ValueError):
    """A call that does not fit the transfer, in words for its caller. Nothing was changed."""


class Phase(Enum):
    RECEIVING = "receiving"
    SEALED = "sealed"  # complete: the engines read it
    ENDED = "ended"  # given up, or in place


@dataclass(slots=True, eq=False)
class Transfer:
    """Buckets that become visible together. Without a bracket, one call is a transfer of its own."""

    transfer_id: str
    is_bracket: bool
    deadline_s: float  # of the end
    phase: Phase = Phase.RECEIVING
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)  # received so far: shape by name
    num_buckets: int = 0
    num_arriving: int = 0
    broken: str | None = None  # why it can only be given up
    weight_version: str | None = None
    aborts_all: bool = False
    in_place: bool = False
    folder: Any = None  # of the driver


class Transfers:
    """At most one open bracket, and any number of transfers of single calls."""

    def __init__(self, *, new_id: Callable[[], str], drop: Callable[[Transfer], None]) -> None:
        """`drop` is called once for each transfer that is given up."""
        self._new_id = new_id
        self._drop = drop
        self._open: Transfer | None = None
        self._lost: str | None = None  # why the last bracket ended without its caller

    @property
    def open(self) -> Transfer | None:
        """The bracket that is open."""
        return self._open

    @property
    def next_look_s(self) -> float:
        """When `tick` is due."""
        return math.inf if self._open is None else self._open.deadline_s

    def begin(self, *, deadline_s: float, now_s: float) -> Transfer:
        """Open a bracket. TransferRefused while another one is open."""
        self.tick(now_s)
        if self._open is not None:
            left_s = self._open.deadline_s - now_s
            raise TransferRefused(
                f"a bracket is open ({self._open.transfer_id}, for {left_s:.0f} s more): end it with "
                "/end_weight_update, or give it up with /abort_weight_update"
            )
        self._lost = None
        self._open = Transfer(self._new_id(), is_bracket=True, deadline_s=deadline_s)
        return self._open

    def bucket_begins(self, transfer_id: str | None, *, deadline_s: float, now_s: float) -> Transfer:
        """The transfer that a bucket belongs to: the open bracket, or one of its own.

        TransferRefused if it was meant for a bracket that has ended: alone, it would be half an update.
        """
        self.tick(now_s)
        if self._lost is not None:
            raise TransferRefused(self._lost)
        if self._open is None:
            if transfer_id is not None:
                raise TransferRefused(f"transfer {transfer_id} has ended: {NO_BRACKET}")
            transfer = Transfer(self._new_id(), is_bracket=False, deadline_s=deadline_s)
        else:
            transfer = self._named(transfer_id)
            if transfer.broken is not None:
                raise TransferRefused(_is_broken(transfer))
        transfer.num_arriving += 1
        return transfer

    def bucket_ends(self, transfer: Transfer, tensors: Mapping[str, StoredTensor], model: Parameters) -> None:
        """A whole bucket has arrived. TransferRefused if a tensor does not fit the model."""
        transfer.num_arriving -= 1
        if transfer.phase is not Phase.RECEIVING:
            raise TransferRefused("the bracket ended while the bucket arrived: nothing of it was kept")
        wrong = _misfit(tensors, model)
        if wrong is not None:
            transfer.broken = wrong
            raise TransferRefused(wrong)
        transfer.tensors |= {name: stored.shape for name, stored in tensors.items()}
        transfer.num_buckets += 1

    def bucket_fails(self, transfer: Transfer, reason: str) -> None:
        """A bucket was torn or refused: without it, the transfer is half an update."""
        transfer.num_arriving -= 1
        transfer.broken = transfer.broken or reason

    def take_label(self, weight_version: str, *, aborts_all: bool, now_s: float) -> bool:
        """Whether a label waits for the end of the open bracket: it never runs ahead of its weights.

        TransferRefused if it was meant for a bracket that is over, whose weights never come.
        """
        self.tick(now_s)
        if self._lost is not None:
            raise TransferRefused(self._lost)
        if self._open is None:
            return False
        self._open.weight_version = weight_version
        self._open.aborts_all |= aborts_all
        return True

    def end(self, transfer_id: str | None, *, now_s: float) -> Transfer:
        """Close the bracket: everything has arrived, and it may be put in place.

        TransferRefused for a bracket that is broken, empty or over; it is given up.
        """
        self.tick(now_s)
        if self._lost is not None:
            reason, self._lost = self._lost, None
            raise TransferRefused(reason)
        transfer = self._named(transfer_id)
        if transfer.num_arriving:
            raise TransferRefused(f"{transfer.num_arriving} buckets are still arriving: end the bracket after them")
        if transfer.broken is not None:
            self._give_up(transfer)
            raise TransferRefused(_is_broken(transfer))
        if not transfer.num_buckets:
            self._give_up(transfer)
            raise TransferRefused("the bracket is empty: nothing was changed")
        transfer.phase, self._open = Phase.SEALED, None
        return transfer

    def seal(self, transfer: Transfer) -> None:
        """The only bucket of a call without a bracket has arrived."""
        transfer.phase = Phase.SEALED

    def give_up(self, transfer: Transfer) -> None:
        """Drop a transfer of a single call."""
        self._give_up(transfer)

    def abort(self, transfer_id: str | None, *, now_s: float) -> Transfer | None:
        """Give the open bracket up. None if there is none: harmless."""
        self.tick(now_s)
        self._lost = None
        if self._open is None:
            return None
        transfer = self._named(transfer_id)
        self._give_up(transfer)
        return transfer

    def tick(self, now_s: float) -> None:
        """Time has passed: a bracket that is overdue is given up."""
        transfer = self._open
        if transfer is not None and now_s >= transfer.deadline_s:
            self._lost = (
                f"the bracket {transfer.transfer_id} was not ended by its deadline: its {transfer.num_buckets} buckets "
                "were dropped and the old weights serve on; begin again with /begin_weight_update"
            )
            self._give_up(transfer)

    def _named(self, transfer_id: str | None) -> Transfer:
        if self._open is None:
            raise TransferRefused(NO_BRACKET)
        if transfer_id not in (None, self._open.transfer_id):
            raise TransferRefused(f"transfer {transfer_id} is not open; {self._open.transfer_id} is, of another caller")
        return self._open

    def _give_up(self, transfer: Transfer) -> None:
        if transfer is self._open:
            self._open = None
        if transfer.phase is not Phase.ENDED:
            transfer.phase = Phase.ENDED
            self._drop(transfer)


def _misfit(tensors: Mapping[str, StoredTensor], model: Parameters) -> str | None:
    """What is wrong with a bucket for the model; None if nothing is."""
    if not tensors:
        return "the bucket holds no tensor"
    for name, stored in tensors.items():
        if name.endswith(model.ignored_suffixes):
            continue
        if name not in model.shapes:
            return f"the model has no tensor {name!r}"
        if stored.shape != model.shapes[name]:
            return f"tensor {name!r} has shape {list(stored.shape)}, the model's has {list(model.shapes[name])}"
        if stored.dtype not in _DTYPES:
            return f"tensor {name!r} is of type {stored.dtype}; weights are read of {', '.join(_DTYPES)}"
    return None


def _is_broken(transfer: Transfer) -> str:
    return f"the bracket cannot be completed: a bucket was refused ({transfer.broken}); the old weights serve on"
