"""The operators' part in random runs: flushes, pauses, new weights, memory, pins, stores."""

import random
from collections.abc import Iterator
from typing import Any

import msgspec

from headwater.messages.adapters import LoadAdapter, UnloadAdapter
from headwater.messages.base import pack_ids
from headwater.messages.cache import (
    AttachStorage,
    DetachStorage,
    GetCacheTree,
    GetPins,
    GetStorage,
    PinPrefix,
    UnpinPrefix,
)
from headwater.messages.control import CancelOperation, ContinueGeneration, FlushCache, GetOperations, PauseGeneration
from headwater.messages.state import GetState, Hello, Ping
from headwater.messages.weights import GetWeights, ReleaseMemory, ResumeMemory, SetWeightVersion, UpdateWeights
from headwater.simulation.random_runs.callers import Callers
from headwater.simulation.random_runs.events import Deliver, Event, Turns
from headwater.simulation.random_runs.prompts import Prompts
from headwater.simulation.random_runs.requests import ADAPTER_NAMES, Requests


class Operators:
    """Each method is one action of an operator, as events."""

    def __init__(
        self,
        source: random.Random,
        *,
        prompts: Prompts,
        callers: Callers,
        requests: Requests,
        has_host: bool,
        has_store: bool,
        has_split_flushes: bool,
        pin_s: tuple[float, ...],
        has_pins_on_host: bool,
        adapter_scopes: float = 0.0,
    ) -> None:
        """`adapter_scopes`: chance that a flush or a pin is limited to a LoRA adapter, or to the model without one."""
        self._adapter_scopes = adapter_scopes
        self._source = source
        self._prompts = prompts
        self._callers = callers
        self._requests = requests
        self._has_host = has_host
        self._has_store = has_store
        self._has_split_flushes = has_split_flushes
        self._pin_s = pin_s
        self._has_pins_on_host = has_host and has_pins_on_host

    def flush(self) -> Iterator[Event]:
        source = self._source
        tiers = self._tiers()
        fields: dict[str, object] = {}
        if source.random() < 0.3:
            fields["cache_salt"] = source.choice(self._prompts.salts)
        if source.random() < 0.2:
            fields["extra_key"] = source.choice(self._prompts.keys)
        if source.random() < 0.3 and "storage" not in tiers:
            stem = self._prompts.stem()
            fields["prefix_ids"] = pack_ids(stem[: source.randrange(1, len(stem) + 1)])
        if self._is_of_adapter() and "storage" not in tiers:
            fields["lora_name"] = source.choice(["", *ADAPTER_NAMES])
        fields |= {
            "mode": source.choice(["idle", "idle", "now", "drain"]),
            "timeout_s": source.choice([0.0, 0.0, 0.005, 0.5, 20.0]),
            "hold": source.random() < 0.3,
            "dry_run": source.random() < 0.1,
        }
        engine = self._callers.engine()
        flush = FlushCache(call_id="", tiers=tiers, **fields)  # type: ignore[arg-type]
        yield self._callers.call(lambda call_id: msgspec.structs.replace(flush, call_id=call_id), engine)
        if "storage" in tiers:  # requests before the acknowledgement find nothing in the store
            yield Turns(source.choice([1, 2]), 0.001)
            for _ in range(3):
                yield Deliver(self._requests.generate([*self._prompts.stem(), 1]), self._callers.client(), engine)

    def pause(self) -> Iterator[Event]:
        mode = self._source.choice(["abort", "retract", "in_place"])
        engine = self._callers.engine()
        yield self._callers.call(lambda call_id: PauseGeneration(call_id=call_id, mode=mode), engine)  # type: ignore[arg-type]
        self._callers.later(self._callers.call(lambda call_id: ContinueGeneration(call_id=call_id), engine))

    def update(self) -> Iterator[Event]:
        source = self._source
        path = f"w{source.randrange(3)}" if source.random() < 0.8 else "corrupt"
        yield self._callers.call(
            lambda call_id: UpdateWeights(
                call_id=call_id,
                path=path,
                weight_version=source.choice([None, "label"]),
                abort_all_requests=source.random() < 0.2,
                timeout_s=source.choice([0.01, 20.0, 20.0]),
            )
        )

    def adapter(self) -> Iterator[Event]:
        """Load, reload or unload a LoRA adapter. Few contents under few names: a content may have two names."""
        source = self._source
        name, engine = source.choice(ADAPTER_NAMES), self._callers.engine()
        if source.random() < 0.25:
            yield self._callers.call(lambda call_id: UnloadAdapter(call_id=call_id, name=name), engine)
            return
        path = f"a{source.randrange(5)}" if source.random() < 0.9 else "corrupt"
        message = LoadAdapter(
            call_id="",
            name=name,
            path=path,
            load_inplace=source.random() < 0.8,
            timeout_s=source.choice([0.01, 20.0, 20.0]),
        )
        yield self._callers.call(lambda call_id: msgspec.structs.replace(message, call_id=call_id), engine)

    def release(self) -> Iterator[Event]:
        tags = self._source.choice([(), ("kv_cache",), ("weights",)])
        timeout_s = self._source.choice([0.0, 0.5, 5.0])
        engine = self._callers.engine()
        yield self._callers.call(lambda call_id: ReleaseMemory(call_id=call_id, tags=tags, timeout_s=timeout_s), engine)
        self._callers.later(self._callers.call(lambda call_id: ResumeMemory(call_id=call_id, timeout_s=100.0), engine))

    def relabel(self) -> Iterator[Event]:
        chance = self._source.random()
        ends_all = True if chance < 0.2 else None if chance < 0.3 else False
        yield self._callers.call(
            lambda call_id: SetWeightVersion(call_id=call_id, weight_version="new", abort_all_requests=ends_all)
        )

    def cancel(self) -> Iterator[Event]:
        if self._callers.calls:
            engine, client, started = self._source.choice(self._callers.calls)
            message = CancelOperation(call_id=self._callers.call_id(), started_by_call=started)
            yield Deliver(message, client, engine)

    def pin(self) -> Iterator[Event]:
        source = self._source
        if source.random() < 0.3:
            yield self._callers.call(
                lambda call_id: UnpinPrefix(call_id=call_id, pin_id=f"pin-{source.randrange(1, 9)}")
            )
            return
        yield self._callers.call(
            lambda call_id: PinPrefix(
                call_id=call_id,
                prompt_ids=pack_ids(self._prompts.stem()),
                ttl_s=source.choice(self._pin_s),
                cache_salt=source.choice(self._prompts.salts),
                extra_key=source.choice(self._prompts.keys),
                lora_name=source.choice(ADAPTER_NAMES) if self._is_of_adapter() else "",
                tiers=self._pin_tiers(),
            )
        )

    def attach(self) -> Iterator[Event]:
        engine = self._callers.engine()
        if self._source.random() < 0.6:
            yield self._callers.call(lambda call_id: DetachStorage(call_id=call_id), engine)
            self._callers.later(
                self._callers.call(lambda call_id: AttachStorage(call_id=call_id, kind="memory"), engine)
            )
            return
        yield self._callers.call(lambda call_id: AttachStorage(call_id=call_id, kind="memory", timeout_s=1.0), engine)

    def question(self) -> Iterator[Event]:
        ask = self._source.choice([GetState, GetOperations, Ping, GetPins, GetCacheTree])
        yield self._callers.call(lambda call_id: ask(call_id=call_id))

    def inspection(self) -> Iterator[Event]:
        choice = self._source.choice([0, 1, 2])
        if choice == 0:
            yield self._callers.call(lambda call_id: GetStorage(call_id=call_id))
        elif choice == 1:
            yield self._callers.call(lambda call_id: Hello(call_id=call_id))
        else:
            name = self._source.choice(["weight", "no such"])
            yield self._callers.call(lambda call_id: GetWeights(call_id=call_id, name=name))

    def everywhere(self) -> Iterator[Event]:
        """Flush everything on every engine, as the API process does."""
        source = self._source
        tiers = ("device", "host", "storage") if self._has_store and source.random() < 0.5 else ()
        flush = FlushCache(call_id="", tiers=tiers, mode=source.choice(["idle", "now", "drain"]), timeout_s=5.0)
        for engine in range(self._callers.num_engines):
            yield self._callers.call(lambda call_id: msgspec.structs.replace(flush, call_id=call_id), engine)

    def warming(self) -> Iterator[Event]:
        """Compute a prefix ahead, and pin it when it should be cached."""
        engine = self._callers.engine()
        stem = self._prompts.stem()
        request = self._requests.generate(stem, max_new_tokens=0)
        yield Deliver(request, self._callers.client(), engine)
        pin = PinPrefix(
            call_id="",
            prompt_ids=pack_ids(stem),
            ttl_s=self._source.choice(self._pin_s if self._has_pins_on_host else [0.1, 5.0]),
            cache_salt=request.options.cache_salt,
            extra_key=request.options.extra_key,
            lora_name=request.options.lora_name if self._adapter_scopes else "",
            tiers=self._pin_tiers(),
        )
        self._callers.later(self._callers.call(lambda call_id: msgspec.structs.replace(pin, call_id=call_id), engine))

    # ------------------------------------------------------------------------------------------------

    def _is_of_adapter(self) -> bool:
        return bool(self._adapter_scopes) and self._source.random() < self._adapter_scopes

    def _pin_tiers(self) -> Any:
        choices = [("device",), ("host",), ("device", "host")]
        return self._source.choice(choices) if self._has_pins_on_host else ("device",)

    def _tiers(self) -> tuple[str, ...]:
        choices: list[tuple[str, ...]] = [(), ()]
        if self._has_host:
            choices += [("host",), ("device",), ("device", "host")]
        if self._has_store:
            choices += [("device", "host", "storage"), ("device", "host", "storage"), ("storage",)]
        if self._has_split_flushes:
            choices += [("device", "storage"), ("host", "storage")]
        return self._source.choice(choices)
