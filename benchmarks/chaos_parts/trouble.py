"""Trouble: kills engines, and stops others for a while."""

import asyncio
import contextlib
import os
import random
import signal
import time

import httpx

from chaos_parts.outcome import Outcome
from headwater.bench.machine import children_of, command_of

BACK_LIMIT_S = 180.0
STANDSTILL_S = (0.5, 4.0)


def engine_pids(server_pid: int) -> list[int]:
    """The engine processes of a server."""
    return [pid for pid in children_of(server_pid) if "headwater.server.engine_process" in command_of(pid)]


class Trouble:
    """Kills one engine after the other, `num_kills` times in total, and stops some in between."""

    def __init__(self, http: httpx.AsyncClient, *, server_pid: int, seed: int, outcome: Outcome) -> None:
        self._http = http
        self._server_pid = server_pid
        self._dice = random.Random(seed)
        self._outcome = outcome

    async def run(self, until_s: float, *, num_kills: int) -> None:
        every_s = (until_s - time.monotonic()) / (num_kills + 1)
        for _ in range(num_kills):
            kill_at_s = time.monotonic() + every_s
            await self._stand_still()
            await asyncio.sleep(max(0.0, kill_at_s - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._dice.choice(engine_pids(self._server_pid)), signal.SIGKILL)
            self._outcome.operations["kill -9"] += 1
            await asyncio.sleep(1.0)  # until the server has noticed
            await self.until_all_are_back()

    async def _stand_still(self) -> None:
        pid = self._dice.choice(engine_pids(self._server_pid))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(self._dice.uniform(*STANDSTILL_S))
            finally:
                os.kill(pid, signal.SIGCONT)
            self._outcome.operations["SIGSTOP, SIGCONT"] += 1

    async def until_all_are_back(self) -> None:
        """Wait until every engine reports its state."""
        deadline_s = time.monotonic() + BACK_LIMIT_S
        while time.monotonic() < deadline_s:
            with contextlib.suppress(httpx.HTTPError, KeyError, ValueError):
                states = (await self._http.get("/server_info", timeout=30.0)).json()["internal_states"]
                if all("weights_id" in state for state in states):
                    return
            await asyncio.sleep(0.5)
        self._outcome.fail("not back", f"an engine is not back {BACK_LIMIT_S:g} s after it was killed")
