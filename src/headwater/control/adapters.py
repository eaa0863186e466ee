"""Loading and unloading LoRA adapters while the server serves.

Content decides what matches: the namespace of a request has the hash of its adapter. So a reload under the same name
retires the KV of the old content and no other, and requests that have begun finish on the content they began with.
"""

from headwater.cache.namespace import Scope, Tier
from headwater.cache.retirement import Retirement
from headwater.control.controlled_engine import ControlledEngine
from headwater.control.operation import Moment, Operation, Permit
from headwater.control.ports import StagedAdapter
from headwater.messages.adapters import AdapterLoaded, AdapterUnloaded, LoadAdapter, UnloadAdapter
from headwater.messages.base import Answer
from headwater.messages.control import Failed
from headwater.scheduling.adapters import AdapterContent


class AdapterLoad(Operation):
    """Reads and checks in a thread, then takes a slot and, for a name that had another content, retires its KV."""

    kind = "load_adapter"
    is_exclusive = True

    def __init__(self, message: LoadAdapter, engine: ControlledEngine, permit: Permit) -> None:
        self._message = message
        self._engine = engine
        self._board = engine.scheduler.adapters
        self._permit = permit
        self._staged: StagedAdapter | None = None

    @property
    def phase(self) -> str:
        return "queued" if self._staged is None else "staging"

    @property
    def is_polling(self) -> bool:
        return self._staged is not None and not self._staged.is_ready()

    def arrive(self) -> Failed | None:
        if self._engine.adapters is None:
            return self._failed(400, "this server serves no adapters: start it with --enable-lora", param="lora_name")
        return None

    def look(self, moment: Moment) -> Answer | None:
        message, port = self._message, self._engine.adapters
        assert port is not None, "refused on arrival"
        if self._staged is None:
            if message.name in self._board.by_name and not message.load_inplace:
                text = f"the adapter {message.name!r} is loaded already; load_inplace replaces it"
                return self._failed(400, text, param="lora_name")
            self._staged = port.stage(message.path)
        staged = self._staged
        if not staged.is_ready():
            if not moment.has_expired:
                return None
            staged.abandon()
            return self._failed(408, "the adapter was not read in time")
        old = self._board.find(message.name)
        if (refusal := self._refusal(staged, old)) is not None:
            staged.abandon()
            return refusal
        return self._place(staged, old, moment) if self._permit.ask(weights_id=staged.adapter_id) else None

    def _refusal(self, staged: StagedAdapter, old: AdapterContent | None) -> Failed | None:
        """Why what was read is not placed."""
        message = self._message
        if (error := staged.error()) is not None:
            return self._failed(400, error)
        if message.only_adapter_id and staged.adapter_id != message.only_adapter_id:
            found = f"what lies at {message.path} now is not what the server serves as {message.name!r}"
            return self._failed(409, f"{found}: adapter {staged.adapter_id}, not {message.only_adapter_id}")
        in_use = old is not None and old in self._engine.scheduler.adapters_begun()
        if not self._board.has_room(staged.adapter_id, replaces=old, in_use=in_use):
            return self._failed(409, _no_room(self._board.num_slots, self._board.num_retired))
        return None

    def cancelled(self, moment: Moment, reason: str) -> Failed:
        if self._staged is not None:
            self._staged.abandon()
        return self._failed(409, f"{reason}; no adapter was changed")

    def _place(self, staged: StagedAdapter, old: AdapterContent | None, moment: Moment) -> AdapterLoaded:
        engine, board, message, port = self._engine, self._board, self._message, self._engine.adapters
        assert port is not None, "refused on arrival"
        scheduler = engine.scheduler
        is_changed = old is None or old.adapter_id != staged.adapter_id
        dropped = board.remove(message.name) if old is not None and is_changed else None
        if dropped is not None:
            board.free_unused(scheduler.adapters_begun())
        is_new = not board.has(staged.adapter_id)
        content = board.put(
            message.name,
            message.path,
            adapter_id=staged.adapter_id,
            rank=staged.rank,
            num_bytes=staged.num_bytes,
        )
        if is_new:
            port.place(content.slot, staged)
        else:
            staged.abandon()  # what was read lies in a slot already
        scheduler.begin_adapter(message.name, content)
        retirement = None if dropped is None else retire_adapter(engine, dropped.adapter_id)
        return AdapterLoaded(
            call_id=message.call_id,
            name=message.name,
            adapter_id=content.adapter_id,
            rank=content.rank,
            num_bytes=content.num_bytes,
            generation=engine.cache.generation,
            num_kept=0 if dropped is None else sum(it is dropped for it in scheduler.adapters_begun()),
            is_changed=is_changed,
            waited_s=moment.waited_s,
            freed={} if retirement is None else engine.amounts(retirement.freed),
            retired={} if retirement is None else engine.amounts(retirement.retired),
        )

    def _failed(self, status: int, message: str, *, param: str = "lora_path") -> Failed:
        return Failed(call_id=self._message.call_id, status=status, message=message, param=param)


def unload_adapter(message: UnloadAdapter, engine: ControlledEngine) -> AdapterUnloaded | Failed:
    board, scheduler = engine.scheduler.adapters, engine.scheduler
    content = board.find(message.name)
    if content is None:
        text = f"no adapter {message.name!r} is loaded"
        return Failed(call_id=message.call_id, status=404, message=text, param="lora_name")
    dropped = board.remove(message.name)
    num_ended = scheduler.end_adapter(message.name)
    num_kept = sum(it is dropped for it in scheduler.adapters_begun())
    board.free_unused(scheduler.adapters_begun())
    retirement = None if dropped is None else retire_adapter(engine, dropped.adapter_id)
    return AdapterUnloaded(
        call_id=message.call_id,
        name=message.name,
        adapter_id=content.adapter_id,
        generation=engine.cache.generation,
        num_kept=num_kept,
        num_ended=num_ended,
        freed={} if retirement is None else engine.amounts(retirement.freed),
        retired={} if retirement is None else engine.amounts(retirement.retired),
    )


def retire_adapter(engine: ControlledEngine, adapter_id: str) -> Retirement:
    """Retire every namespace of an adapter's content: no request can match it any more."""
    # Storage names pages by the content: there is nothing to raise.
    tiers = frozenset(tier for tier in engine.cache.tiers if tier is not Tier.STORAGE)
    return engine.cache.retire(Scope(tiers=tiers, adapter=adapter_id))


def _no_room(num_slots: int, num_retired: int) -> str:
    old = f", {num_retired} of them for requests that finish on an adapter that was replaced" if num_retired else ""
    return f"all {num_slots} places for adapters are taken{old}: unload one, or start with more --max-loras-per-batch"
