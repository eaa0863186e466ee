"""Flush: retire what is in scope, at once or when the engine is idle (docs/design.md section 6)."""

from headwater.cache.namespace import UNLOADED, Scope, Tier
from headwater.cache.retirement import Retirement
from headwater.control.controlled_engine import ControlledEngine
from headwater.control.operation import Hold, Moment, Operation, Permit
from headwater.control.reports.flush_counts import FlushOutcome
from headwater.messages.base import unpack_ids
from headwater.messages.control import FLUSHED, Failed, FlushCache, FlushResult

TIMED_OUT = "Timed out waiting for idle state."
NOT_IDLE = "Flush cache failed."
STILL_HELD = f"{FLUSHED} Pages that running requests hold have not all come back."
STILL_PENDING = f"{FLUSHED} The store has not acknowledged yet; until it does, it is neither read nor written."
HOLDING_REQUESTS = "requests_holding_old_pages"
_STORE_GRACE_S = 1.0  # for the store to acknowledge, whatever the timeout: a flush with timeout=0 may ask for it


class Flush(Operation):
    """One flush. `idle` waits for an idle moment, `now` retires at once, `drain` also waits for the retired pages."""

    kind = "flush_cache"

    def __init__(self, message: FlushCache, engine: ControlledEngine, permit: Permit) -> None:
        self._message = message
        self._engine = engine
        tiers = message.tiers or tuple(name for name in engine.tier_names if name != "storage")
        self._tiers = tiers  # by name, as they were when the flush arrived
        self._retirement: Retirement | None = None
        self._side_caches: dict[str, int] = {}  # that were emptied with it

    @property
    def phase(self) -> str:
        if self._retirement is None:
            return "waiting_for_idle"
        return "draining" if self._retirement.is_acknowledged else "waiting_for_store"

    @property
    def hold(self) -> Hold:
        return Hold.STARTS if self._message.hold and self._message.mode == "idle" else Hold.NOTHING

    @property
    def is_polling(self) -> bool:
        """Requests end inside the loop; a store acknowledges outside."""
        return self._retirement is not None and not self._retirement.is_acknowledged

    def arrive(self) -> Failed | None:
        message, enabled = self._message, self._engine.tier_names
        param, text = None, ""
        unknown = [tier for tier in message.tiers if tier not in enabled]
        if unknown:
            param, text = "tiers", f"tier {unknown[0]!r} is not enabled; enabled: {', '.join(enabled)}"
        if message.prefix_ids is not None and not message.prefix_ids:
            param, text = "prefix_ids", "prefix_ids must hold at least one token"
        if message.names_prefix_of_store:
            param, text = "prefix_ids", "storage cannot be flushed by prefix: its keys are hashes"
        if message.names_adapter_of_store:
            param, text = "lora_path", "storage cannot be flushed by adapter: leave it out, or flush by salt or key"
        if param is not None:
            return Failed(call_id=message.call_id, status=400, message=text, param=param)
        if message.lora_name is None or self._engine.scheduler.adapters.id_of(message.lora_name) is not None:
            return None
        text = f"no adapter {message.lora_name!r} is loaded"
        return Failed(call_id=message.call_id, status=404, message=text, param="lora_path")

    def look(self, moment: Moment) -> FlushResult | None:
        if self._message.dry_run:
            return self._preview(moment)
        if self._retirement is None:
            if self._message.mode == "idle" and moment.blockers:
                return self._still_busy(moment)
            scope = self.scope()
            self._retirement = self._engine.cache.retire(scope)
            if scope.is_everything:
                self._side_caches = self._engine.clear_side_caches()
        return self._look_retired(moment, self._retirement)

    def cancelled(self, moment: Moment, reason: str) -> FlushResult:
        if self._retirement is not None:
            message = f"{FLUSHED} The wait for what is still held ended early: {reason}."
            return self._flushed(moment, self._retirement, status=202, message=message)
        if self._message.mode == "idle" and moment.blockers and (timed_out := self._still_busy(moment)):
            return timed_out  # a long step went over the deadline and over all that its caller waits beyond
        message = f"{reason} before the engine was idle; nothing was flushed."
        return self._refused(moment, message, outcome="cancelled")

    def scope(self) -> Scope:
        message = self._message
        return Scope(
            cache_salt=message.cache_salt,
            extra_key=message.extra_key,
            adapter=self._adapter_id(),
            prefix=None if message.prefix_ids is None else unpack_ids(message.prefix_ids),
            tiers=frozenset(Tier[name.upper()] for name in self._tiers),
        )

    def _adapter_id(self) -> str | None:
        """The content that the named adapter has now. What was unloaded since the flush arrived has no KV left."""
        if self._message.lora_name is None:
            return None
        found = self._engine.scheduler.adapters.id_of(self._message.lora_name)
        return UNLOADED if found is None else found

    def _still_busy(self, moment: Moment) -> FlushResult | None:
        if moment.has_expired:
            message = TIMED_OUT if self._message.timeout_s > 0 else NOT_IDLE
            return self._refused(moment, message, outcome="expired")
        return None

    def _look_retired(self, moment: Moment, done: Retirement) -> FlushResult | None:
        """After the retirement, when no later request can match here: wait for pages and for the store."""
        waits_for_pages = self._message.mode == "drain" and not done.is_drained
        if not waits_for_pages and done.is_acknowledged:
            return self._flushed(moment, done)
        if waits_for_pages and moment.has_expired:
            holders = {HOLDING_REQUESTS: done.num_leases} if done.num_leases else {}
            return self._flushed(moment, done, status=202, message=STILL_HELD, blockers=holders)
        if not done.is_acknowledged and moment.has_expired and moment.waited_s >= _STORE_GRACE_S:
            return self._flushed(moment, done, status=202, message=STILL_PENDING)
        return None

    def _flushed(
        self,
        moment: Moment,
        done: Retirement,
        *,
        status: int = 200,
        message: str = FLUSHED,
        blockers: dict[str, int] | None = None,
    ) -> FlushResult:
        is_held = self._message.mode == "drain" and not done.is_drained
        self._count(moment, "flushed" if status == 200 else "held" if is_held else "store_pending", blockers or {})
        return FlushResult(
            call_id=self._message.call_id,
            status=status,
            success=True,
            message=message,
            mode=self._message.mode,
            waited_s=moment.waited_s,
            generation=done.generation,
            drained=done.is_drained,
            freed=self._engine.amounts(done.freed),
            retired=self._engine.amounts(done.retired),
            side_caches=self._side_caches,
            still_warm=self._still_warm(),
            pending=() if done.is_acknowledged else ("storage",),
            blockers=blockers or {},
        )

    def _refused(self, moment: Moment, message: str, *, outcome: FlushOutcome) -> FlushResult:
        blockers = moment.blockers
        self._count(moment, outcome, blockers)
        return FlushResult(
            call_id=self._message.call_id,
            status=400,
            success=False,
            message=message,
            mode=self._message.mode,
            waited_s=moment.waited_s,
            blockers=blockers,
        )

    def _count(self, moment: Moment, outcome: FlushOutcome, blockers: dict[str, int]) -> None:
        self._engine.flushes.ended(self._message.mode, outcome, waited_s=moment.waited_s, blockers=blockers)

    def _preview(self, moment: Moment) -> FlushResult:
        scope = self.scope()
        would = self._engine.cache.preview(scope)
        return FlushResult(
            call_id=self._message.call_id,
            status=200,
            success=True,
            message="Dry run: nothing was changed.",
            mode=self._message.mode,
            waited_s=moment.waited_s,
            generation=would.generation,
            drained=would.is_drained,
            dry_run=True,
            freed=self._engine.amounts(would.freed),
            retired=self._engine.amounts(would.retired),
            side_caches=self._engine.side_caches() if scope.is_everything else {},
            still_warm=self._still_warm(),
            blockers=moment.blockers,
        )

    def _still_warm(self) -> tuple[str, ...]:
        """Enabled tiers that this flush does not name."""
        return tuple(name for name in self._engine.tier_names if name not in self._tiers)
