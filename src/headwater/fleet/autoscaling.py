"""How many replicas the requests need: looked at every second, and followed slowly. No Ray here."""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable

import msgspec

from headwater.generation.errors import ApiError

Scale = Callable[[int], Awaitable[None]]
MAX_REPLICAS = 1000
LOOK_S = 1.0
log = logging.getLogger(__name__)


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Between which numbers of replicas a fleet scales itself, and by what."""

    min_replicas: int = 1
    max_replicas: int
    target_ongoing_requests: float = 8.0  # of each replica, those that wait included
    upscale_after_s: float = 3.0  # of more requests than that
    downscale_after_s: float = 60.0  # of fewer

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas <= MAX_REPLICAS:
            found = f"{self.min_replicas} and {self.max_replicas}"
            raise ValueError(f"min_replicas and max_replicas must be in this order from 1 to {MAX_REPLICAS}: {found}")
        if not (self.target_ongoing_requests > 0 and self.upscale_after_s >= 0 and self.downscale_after_s >= 0):
            raise ValueError("target_ongoing_requests must be above 0, upscale_after_s and downscale_after_s not below")

    def clamp(self, replicas: int) -> int:
        return min(max(replicas, self.min_replicas), self.max_replicas)


class Autoscaler:
    """A number that has been too small, or too large, all the time since a moment is changed. No clock of its own."""

    def __init__(self, limits: Limits, *, replicas: int) -> None:
        """`replicas`: how many there are to be now."""
        self.limits = limits
        self.wanted = replicas
        self._needed: list[tuple[float, int]] = []  # moment and number, of one direction

    def look(self, *, num_ongoing: int, now_s: float) -> int | None:
        """The number of replicas to go to; None: as before."""
        limits = self.limits
        needed = limits.clamp(math.ceil(num_ongoing / limits.target_ongoing_requests))
        if needed == self.wanted or (self._needed and (self._needed[-1][1] > self.wanted) != (needed > self.wanted)):
            self._needed = []
        if needed == self.wanted:
            return None
        self._needed.append((now_s, needed))
        after_s = limits.upscale_after_s if needed > self.wanted else limits.downscale_after_s
        if now_s - self._needed[0][0] < after_s:
            return None
        numbers = [number for _, number in self._needed]
        self.wanted = min(numbers) if needed > self.wanted else max(numbers)  # what was needed all the time
        self._needed = []
        return self.wanted


class Scaling:
    """Changes the number of replicas: by command, or by itself between limits. Belongs to one event loop."""

    def __init__(
        self,
        scale: Scale,
        *,
        num_ongoing: Callable[[], int],
        num_replicas: Callable[[], int],
        limits: Limits | None = None,
    ) -> None:
        """`limits`: those of the command line; None: the number stays as it is until a command."""
        self._scale = scale
        self._num_ongoing = num_ongoing
        self._num_replicas = num_replicas
        self._autoscaler: Autoscaler | None = None
        if limits is not None:
            self.adapt(limits)

    @property
    def facts(self) -> dict[str, object] | None:
        """For `GET /fleet`; None: it does not scale itself."""
        if self._autoscaler is None:
            return None
        return msgspec.to_builtins(self._autoscaler.limits) | {"wanted": self._autoscaler.wanted}

    async def fix(self, replicas: int) -> None:
        """From now on the number is this one."""
        await self._scale(replicas)
        self._autoscaler = None

    def adapt(self, limits: Limits) -> None:
        """From now on the fleet scales itself."""
        self._autoscaler = Autoscaler(limits, replicas=self._num_replicas())

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    async def look(self) -> None:
        autoscaler = self._autoscaler
        if autoscaler is None or not self._num_replicas():  # a front that has just started has not met them
            return
        before = autoscaler.wanted = autoscaler.wanted or self._num_replicas()
        wanted = autoscaler.look(num_ongoing=self._num_ongoing(), now_s=asyncio.get_running_loop().time())
        if wanted is None:
            return
        log.info("the fleet goes from %d to %d replicas", before, wanted)
        try:
            await self._scale(wanted)
        except ApiError as error:
            log.warning("%s", error.message)
            autoscaler.wanted = before
