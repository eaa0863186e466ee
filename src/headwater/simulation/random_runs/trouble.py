"""The trouble in random runs: faults, clients that disconnect, invalid calls, crashes."""

import random
from collections.abc import Iterator

import msgspec

from headwater.messages.base import pack_ids
from headwater.messages.cache import AttachStorage, PinPrefix, UnpinPrefix
from headwater.messages.control import CancelOperation, FlushCache
from headwater.messages.generation import Abort
from headwater.messages.weights import ReleaseMemory, UpdateWeights
from headwater.messages.wire import ToEngine
from headwater.simulation.random_runs.callers import Callers
from headwater.simulation.random_runs.events import Crash, Deliver, Event, Faults
from headwater.simulation.random_runs.profiles import Profile
from headwater.simulation.random_runs.requests import Requests


class Trouble:
    """Each method is one kind of trouble, as events."""

    def __init__(
        self, source: random.Random, profile: Profile, *, callers: Callers, requests: Requests, has_store: bool
    ) -> None:
        self._source = source
        self._profile = profile
        self._callers = callers
        self._requests = requests
        self._has_store = has_store

    def faults(self) -> Faults:
        """Random faults from now on."""
        source, level = self._source, self._profile.fault_level
        if level == 0 or source.random() < 0.3 / level:
            return Faults()
        faults = Faults(
            copy_polls=source.choice([0, 2, 10, 40]),
            copy_failures=self._sometimes(0.15),
            job_polls=source.choice([0, 3, 15]),
            job_hangs=self._sometimes(0.05),
            staging_polls=source.choice([0, 3, 20]),
            store_fails=self._sometimes(0.2),
            store_writes_late=self._sometimes(0.1),
            store_flips=self._sometimes(0.2),
            store_full=self._sometimes(0.1),
            store_is_read_only=source.random() < 0.15,
        )
        if self._profile.has_step_faults:
            faults = msgspec.structs.replace(faults, step_faults=source.choice([0.0, 0.02, 0.1]))
            faults = msgspec.structs.replace(faults, not_finite=source.choice([0.0, 0.02]))
        if not self._profile.has_rare_faults:
            return faults
        return msgspec.structs.replace(
            faults,
            copy_hangs=self._sometimes(0.05),
            store_truncates=self._sometimes(0.1),
            store_loses=self._sometimes(0.1),
        )

    def disconnect(self) -> Iterator[Event]:
        """Disconnect a client, which aborts its requests and cancels its calls."""
        rids = [rid for rid in self._callers.rids if self._source.random() < 0.4]
        calls = [call for call in self._callers.calls if self._source.random() < 0.3]
        for rid in rids:
            for engine in range(self._callers.num_engines):
                abort = Abort(call_id=self._callers.call_id(), rid=rid, message="the client has gone")
                yield Deliver(abort, self._callers.client(), engine)
        for engine, client, started in calls:
            yield Deliver(CancelOperation(call_id=self._callers.call_id(), started_by_call=started), client, engine)

    def nonsense(self) -> Iterator[Event]:
        """An invalid call, or a request whose rid may be in use."""
        if self._callers.rids and self._source.random() < 0.2:
            request = msgspec.structs.replace(
                self._requests.generate([1, 2, 3]), rid=self._source.choice(self._callers.rids)
            )
            yield Deliver(request, self._callers.client(), self._callers.engine())
            return
        wrong = self._source.choice(self._wrong_calls())
        yield self._callers.call(lambda call_id: msgspec.structs.replace(wrong, call_id=call_id))

    def crash(self) -> Iterator[Event]:
        yield Crash(self._callers.engine())

    # ------------------------------------------------------------------------------------------------

    def _wrong_calls(self) -> list[ToEngine]:
        prefix = pack_ids([1, 2, 3])
        calls: list[ToEngine] = [
            FlushCache(call_id="", timeout_s=-1.0),
            FlushCache(call_id="", timeout_s=1e9, mode="drain"),
            FlushCache(call_id="", tiers=("tape",), mode="now"),
            FlushCache(call_id="", tiers=("device", "host", "storage"), prefix_ids=prefix, mode="now"),
            FlushCache(call_id="", prefix_ids=b"", mode="now"),
            UpdateWeights(call_id="", path="w1", timeout_s=-1.0),
            ReleaseMemory(call_id="", tags=("disk",)),
            PinPrefix(call_id="", prompt_ids=prefix, ttl_s=0.0),
            UnpinPrefix(call_id="", pin_id="none"),
            CancelOperation(call_id="", operation_id="none"),
        ]
        if not self._has_store:
            calls += [
                FlushCache(call_id="", tiers=("storage",), mode="now"),
                AttachStorage(call_id="", kind="memory", timeout_s=1.0),
            ]
        return calls

    def _sometimes(self, value: float) -> float:
        return value * self._profile.fault_level if self._source.random() < 0.4 else 0.0
