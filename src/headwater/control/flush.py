"""Flush: retire what is in scope, at once or when the engine is idle (docs/design.md section 6)."""

from headwater.control.operation import Hold, Moment
from headwater.control.ports import CachePort, FlushScope, RetirementView
from headwater.messages.control import FlushCache, FlushResult

FLUSHED = "Cache flushed."
TIMED_OUT = "Timed out waiting for idle state."
NOT_IDLE = "Flush cache failed."
STILL_HELD = "Cache flushed. Pages that running requests hold have not all come back."
STILL_PENDING = "Cache flushed. The store has not acknowledged yet; until it does, it is neither read nor written."
HOLDING_REQUESTS = "requests_holding_old_pages"
_STORE_GRACE_S = 1.0  # for the store to acknowledge, whatever the timeout: a flush with timeout=0 may ask for it


class Flush:
    """One flush. `idle` waits for an idle moment, `now` retires at once, `drain` waits for the pages, too."""

    kind = "flush_cache"
    is_exclusive = False

    def __init__(self, message: FlushCache, scope: FlushScope, cache: CachePort) -> None:
        self._message = message
        self._scope = scope
        self._cache = cache
        self._retirement: RetirementView | None = None

    @property
    def phase(self) -> str:
        if self._retirement is None:
            return "waiting_for_idle"
        return "waiting_for_store" if self._retirement.pending else "draining"

    @property
    def hold(self) -> Hold:
        return Hold.STARTS if self._message.hold and self._message.mode == "idle" else Hold.NOTHING

    @property
    def is_polling(self) -> bool:
        """Requests end inside the loop; a store acknowledges outside."""
        return self._retirement is not None and bool(self._retirement.pending)

    def in_flight(self) -> dict[str, int]:
        return {}

    def look(self, moment: Moment) -> FlushResult | None:
        if self._message.dry_run:
            return self._preview(moment)
        if self._retirement is None:
            if self._message.mode == "idle" and moment.blockers:
                return self._still_busy(moment)
            self._retirement = self._cache.retire(self._scope)
        return self._look_retired(moment, self._retirement)

    def cancelled(self, moment: Moment, reason: str) -> FlushResult:
        if self._retirement is not None:
            message = f"{FLUSHED} The wait for what is still held ended early: {reason}."
            return self._flushed(moment, self._retirement, status=202, message=message)
        return self._refused(moment, f"{reason} before the engine was idle; nothing was flushed.")

    def _still_busy(self, moment: Moment) -> FlushResult | None:
        if moment.has_expired:
            return self._refused(moment, TIMED_OUT if self._message.timeout_s > 0 else NOT_IDLE)
        return None

    def _look_retired(self, moment: Moment, done: RetirementView) -> FlushResult | None:
        """It is retired: no later request can match it here. What is left is to hear of pages and of the store."""
        waits_for_pages = self._message.mode == "drain" and not done.is_drained
        if not waits_for_pages and not done.pending:
            return self._flushed(moment, done)
        if waits_for_pages and moment.has_expired:
            holders = {HOLDING_REQUESTS: done.num_holders} if done.num_holders else {}
            return self._flushed(moment, done, status=202, message=STILL_HELD, blockers=holders)
        if done.pending and moment.has_expired and moment.waited_s >= _STORE_GRACE_S:
            return self._flushed(moment, done, status=202, message=STILL_PENDING)
        return None

    def _flushed(
        self,
        moment: Moment,
        done: RetirementView,
        *,
        status: int = 200,
        message: str = FLUSHED,
        blockers: dict[str, int] | None = None,
    ) -> FlushResult:
        return FlushResult(
            call_id=self._message.call_id,
            status=status,
            success=True,
            message=message,
            mode=self._message.mode,
            waited_s=moment.waited_s,
            generation=done.generation,
            drained=done.is_drained,
            freed=done.freed(),
            retired=done.retired(),
            still_warm=tuple(t for t in self._cache.tiers if t not in self._scope.tiers),
            pending=done.pending,
            blockers=blockers or {},
        )

    def _refused(self, moment: Moment, message: str) -> FlushResult:
        return FlushResult(
            call_id=self._message.call_id,
            status=400,
            success=False,
            message=message,
            mode=self._message.mode,
            waited_s=moment.waited_s,
            blockers=moment.blockers,
        )

    def _preview(self, moment: Moment) -> FlushResult:
        would = self._cache.preview(self._scope)
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
            freed=would.freed(),
            retired=would.retired(),
            still_warm=tuple(t for t in self._cache.tiers if t not in self._scope.tiers),
            blockers=moment.blockers,
        )
