"""Flush: retire what is in scope, at once or when the engine is idle (docs/design.md section 6)."""

from headwater.control.operation import Hold, Moment
from headwater.control.ports import CachePort, FlushScope, RetirementView
from headwater.messages import FlushCache, FlushResult

FLUSHED = "Cache flushed."
TIMED_OUT = "Timed out waiting for idle state."
NOT_IDLE = "Flush cache failed."


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
        return "waiting_for_idle" if self._retirement is None else "draining"

    @property
    def hold(self) -> Hold:
        return Hold.STARTS if self._message.hold and self._message.mode == "idle" else Hold.NOTHING

    is_polling = False  # requests end inside the loop

    def in_flight(self) -> dict[str, int]:
        return {}

    def look(self, moment: Moment) -> FlushResult | None:
        if self._message.dry_run:
            return self._preview(moment)
        if self._message.mode == "idle":
            return self._look_idle(moment)
        if self._retirement is None:
            self._retirement = self._cache.retire(self._scope)
        if self._message.mode == "now":
            return self._flushed(moment, self._retirement)
        if self._retirement.is_drained:
            return self._flushed(moment, self._retirement)
        if moment.has_expired:
            text = "The cache was flushed; pages that running requests hold have not all come back."
            return self._flushed(moment, self._retirement, status=202, message=text)
        return None

    def cancelled(self, moment: Moment, reason: str) -> FlushResult:
        if self._retirement is not None:
            return self._flushed(
                moment, self._retirement, status=202, message=f"Cache flushed; {reason} while draining."
            )
        return self._refused(moment, f"{reason} before the engine was idle; nothing was flushed.")

    def _look_idle(self, moment: Moment) -> FlushResult | None:
        if not moment.blockers:
            return self._flushed(moment, self._cache.retire(self._scope))
        if moment.has_expired:
            return self._refused(moment, TIMED_OUT if self._message.timeout_s > 0 else NOT_IDLE)
        return None

    def _flushed(
        self, moment: Moment, done: RetirementView, *, status: int = 200, message: str = FLUSHED
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
