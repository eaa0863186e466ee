"""Operators that flush, pause, swap weights, release memory, attach stores and pin at random and concurrently."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from chaos_parts.outcome import Outcome
from chaos_parts.weights_log import WeightsLog

Json = dict[str, Any]
HANG_S = 120.0  # longest wait beyond an operation's own deadline
DONE = (200, 202)  # 202: decided for all engines; one has not confirmed it, and takes no requests until it does
GONE = (409, 503, 504)  # an engine is gone, loading, silent, or busy with another operation: nothing was changed
LASTING_S = 120.0  # within which a pause or a release can be ended, even with restarts of engines
UPDATE_TIMEOUT_S = 60.0


class Operators:
    """Each method is one operator's next action; `run` runs all operators concurrently."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        *,
        seed: int,
        checkpoints: dict[str, str],
        store: Path,
        weights: WeightsLog,
        outcome: Outcome,
        rest: float = 1.0,
    ) -> None:
        """`checkpoints`: paths by name. `rest`: a factor for the rests between actions."""
        self._rest = rest
        self._http = http
        self._dice = random.Random(seed)
        self._checkpoints = checkpoints
        self._store = store
        self._weights = weights
        self._outcome = outcome
        self._num_updates = 0

    async def run(self, until_s: float) -> None:
        acts_and_rests_s = (
            (self._flush, 0.5),
            (self._flush, 0.5),
            (self._pause, 3.0),
            (self._memory, 6.0),
            (self._update, 4.0),
            (self._storage, 5.0),
            (self._pin, 2.0),
            (self._abort, 2.0),
        )
        await asyncio.gather(*(self._repeat(act, rest_s, until_s) for act, rest_s in acts_and_rests_s))

    async def _repeat(self, act: Callable[[], Awaitable[None]], rest_s: float, until_s: float) -> None:
        while time.monotonic() < until_s:
            await asyncio.sleep(self._dice.uniform(0.2, 2.0) * rest_s * self._rest)
            if time.monotonic() < until_s:
                await act()

    async def call(
        self, method: str, path: str, body: Json | None = None, *, allowed: Sequence[int], timeout_s: float = 0.0
    ) -> int | None:
        """The status of an operation with `timeout_s`; None if it was never answered."""
        name, started_s = f"{method} {path.partition('?')[0]}", time.monotonic()
        try:
            response = await self._http.request(method, path, json=body, timeout=timeout_s + HANG_S)
        except httpx.TimeoutException:
            self._outcome.fail("hang", f"{name} {body}: no answer {HANG_S:g} s after its deadline")
            return None
        except httpx.HTTPError as error:
            self._outcome.fail("broken answer", f"{name} {body}: {type(error).__name__}: {error}")
            return None
        self._outcome.answered(name, response.status_code, time.monotonic() - started_s - timeout_s)
        if response.status_code not in allowed:
            self._outcome.fail("wrong status", f"{name} {body}: {response.status_code} {response.text[:200]}")
        return response.status_code

    async def lasting(self, path: str, body: Json, *, timeout_s: float = 0.0) -> None:
        """Repeat a call that undoes a change until it succeeds, since engines may have to restart first."""
        deadline_s = time.monotonic() + LASTING_S
        while await self.call("POST", path, body, allowed=(*DONE, *GONE), timeout_s=timeout_s) not in DONE:
            if time.monotonic() > deadline_s:
                self._outcome.fail("not undone", f"{path} was refused for {LASTING_S:g} s")
                return
            await asyncio.sleep(0.5)

    async def _flush(self) -> None:
        dice = self._dice
        mode, timeout_s = dice.choice(("idle", "now", "drain")), dice.choice((0.0, 0.5, 3.0))
        body: Json = {"mode": mode, "timeout": timeout_s}
        body |= dice.choice(({}, {}, {"cache_salt": "red"}, {"extra_key": "nobody"}, {"prefix": "You know all about"}))
        body |= dice.choice(({}, {}, {"tiers": "device"}, {"dry_run": True}))
        if mode == "idle" and dice.random() < 0.3:
            body["hold"] = True
        allowed = (*DONE, 400, *GONE)  # 400: not idle; 202: some flushed pages are not free
        await self.call("POST", "/flush_cache", body, allowed=allowed, timeout_s=timeout_s)

    async def _pause(self) -> None:
        mode = self._dice.choice(("abort", "retract", "retract", "in_place", "in_place"))
        await self.call("POST", "/pause_generation", {"mode": mode}, allowed=(*DONE, *GONE))
        await asyncio.sleep(self._dice.uniform(0.1, 2.0))
        await self.lasting("/continue_generation", {})

    async def _memory(self) -> None:
        tags = self._dice.choice((["kv_cache"], ["weights"], []))
        body = {"tags": tags, "timeout": 3.0}
        allowed = (*DONE, 400, *GONE)  # 400: not idle in time
        await self.call("POST", "/release_memory_occupation", body, allowed=allowed, timeout_s=3.0)
        await asyncio.sleep(self._dice.uniform(0.1, 1.0))
        await self.lasting("/resume_memory_occupation", {"tags": [], "timeout": 60.0}, timeout_s=60.0)

    async def _update(self) -> None:
        checkpoint = self._dice.choice(list(self._checkpoints))
        self._num_updates += 1
        target = f"{checkpoint}-{self._num_updates}"
        body = {
            "model_path": self._checkpoints[checkpoint],
            "weight_version": target,
            "abort_all_requests": self._dice.random() < 0.1,
            "timeout": UPDATE_TIMEOUT_S,
        }
        before = self._weights.begin(target)
        status = await self.call(
            "POST", "/update_weights_from_disk", body, allowed=(*DONE, *GONE), timeout_s=UPDATE_TIMEOUT_S
        )
        is_done = None if status is None else status in DONE
        self._weights.end(before=before, target=target, is_done=is_done)

    async def _storage(self) -> None:
        if self._dice.random() < 0.5:
            await self.call(
                "DELETE", "/hicache/storage-backend", allowed=(*DONE, *GONE), timeout_s=30.0
            )
            return
        body = {"hicache_storage_backend": "file", "directory": str(self._store), "size": "200MB", "timeout": 30}
        await self.call("PUT", "/hicache/storage-backend", body, allowed=(*DONE, *GONE), timeout_s=30.0)

    async def _pin(self) -> None:
        body = {"text": f"You know all about bread. Pin {self._dice.randrange(3)}." * 4, "ttl_s": 5}
        await self.call("POST", "/cache/pin", body, allowed=(200, 202, 400, 409, 429, *GONE), timeout_s=30.0)

    async def _abort(self) -> None:
        everything = self._dice.random() < 0.1
        body: Json = {"abort_all": True} if everything else {"rid": f"chaos-{self._dice.randrange(30)}-"}
        await self.call("POST", "/abort_request", body, allowed=(200, *GONE))
