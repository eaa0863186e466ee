"""Streams that run all the time, in a process of their own: `steady_streams.py URL COUNT TOKENS` until a line comes."""

import asyncio
import contextlib
import itertools
import json
import subprocess
import sys
import threading
from typing import Any

from headwater.bench.apis import APIS, Settings
from headwater.bench.connection import HttpClient
from headwater.bench.event_stream import EventTimes

GENERATE, SETTINGS = APIS["generate"], Settings("")
LIMIT_S = 600.0


class Streams:
    """Requests that run all the time, in a process of their own: the trainer's work must not delay their clock.

    `times` are the moments at which a token of any of them arrived, on the clock that all processes share.
    """

    def __init__(self, url: str, count: int, num_tokens: int) -> None:
        command = [sys.executable, __file__, url, str(count), str(num_tokens)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.times: list[float] = []
        self.num_lost = self.num_ended = self.num_mixed = 0

    def wait_until_all_run(self) -> None:
        """Until each stream has had a token."""
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def end(self) -> None:
        """Let the running requests end, and take what was seen."""
        seen = json.loads(self._process.communicate("end\n", timeout=300)[0])
        self.times = seen["times"]
        self.num_ended, self.num_lost, self.num_mixed = seen["ended"], seen["lost"], seen["mixed"]

    def longest_gap_s(self, since_s: float, until_s: float) -> float:
        """The longest time within the interval in which no stream got a token."""
        inside = [since_s, *(at for at in self.times if since_s <= at <= until_s), until_s]
        return max(after - before for before, after in itertools.pairwise(inside))


async def run_streams(url: str, count: int, num_tokens: int) -> None:
    """The process of `Streams`: until a line comes on standard input."""
    seen: dict[str, Any] = {"times": [], "ended": 0, "lost": 0, "mixed": 0}
    ends = asyncio.Event()
    have_begun: set[int] = set()
    loop = asyncio.get_running_loop()
    threading.Thread(target=lambda: (sys.stdin.readline(), loop.call_soon_threadsafe(ends.set)), daemon=True).start()

    async def run(index: int) -> None:
        def note(now_s: float) -> None:
            seen["times"].append(now_s)
            if index not in have_begun:
                have_begun.add(index)
                if len(have_begun) == count:
                    print("all run", flush=True)

        while not ends.is_set():
            body = GENERATE.body([3 + (index * 7 + step) % 250 for step in range(32)], num_tokens, SETTINGS)
            events = EventTimes(note)
            await http.request("POST", GENERATE.path, body, on_body=events.take, timeout_s=LIMIT_S)
            meta = json.loads(events.last).get("meta_info", {})
            seen["ended"] += 1
            seen["lost"] += meta.get("completion_tokens") != num_tokens
            seen["mixed"] += bool(meta.get("weights_versions"))

    with contextlib.closing(HttpClient(url)) as http:
        await asyncio.gather(*(run(index) for index in range(count)))
    print(json.dumps(seen))


if __name__ == "__main__":
    asyncio.run(run_streams(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
