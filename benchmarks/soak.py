#!/usr/bin/env python3
"""Put a running server under mixed load, then check that nothing was lost: no request, no page, no memory.

    soak.py --url http://127.0.0.1:30000 --pid PID --streams 200 --seconds 120

Every stream sends one request after another: short and long, streamed and not, some aborted by name, some
disconnected, some invalid. Each must get the right kind of answer. At the end the server must be idle with
`free + cached = capacity`. With --pid (of `headwater serve`), its memory must not have grown in the second half.
"""

import argparse
import asyncio
import collections
import json
import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent / "serving"))
from headwater.bench.machine import process_tree, rss_mib

ANSWER_LIMIT_S = 300.0  # with hundreds of streams on two cores, most of it is time in the queue
IDLE_LIMIT_S = 60.0
GROWTH_LIMIT = 1.05


@dataclass(slots=True)
class Outcome:
    """The figures of the soak. `failures` must stay empty."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)
    pages: dict[str, int] = field(default_factory=dict)  # by owner, at the end
    rss_mib: list[float] = field(default_factory=list)  # at the start, at half time, at the end

    @property
    def num_requests(self) -> int:
        return self.counts.total()


class Stream:
    """One client that sends requests until the time is over."""

    def __init__(self, http: httpx.AsyncClient, *, seed: int, outcome: Outcome) -> None:
        self._http = http
        self._random = random.Random(seed)
        self._name = f"soak-{seed}"
        self._outcome = outcome
        self._num_asked = 0
        # one of a few system prompts, so that prefixes are shared, evicted and computed again
        self._system = (
            f"You are assistant number {seed % 7}. " + "Answer with care and in full sentences. " * 12
        )

    async def run(self, until: float) -> None:
        kinds = (self._short, self._streamed, self._long, self._aborted, self._left, self._wrong)
        while time.monotonic() < until:
            kind = self._random.choices(kinds, weights=(4, 4, 1, 2, 2, 1))[0]
            name = kind.__name__.lstrip("_")
            self._num_asked += 1
            try:
                await asyncio.wait_for(kind(), ANSWER_LIMIT_S)
            except (httpx.HTTPError, TimeoutError, AssertionError, ValueError, KeyError) as error:
                self._outcome.failures.append(f"{name}: {type(error).__name__}: {error}")
            self._outcome.counts[name] += 1

    async def _short(self) -> None:
        answer = await self._http.post(
            "/generate", json=self._body(max_new_tokens=self._random.randint(1, 8))
        )
        assert answer.status_code == 200, answer.text
        finish = answer.json()["meta_info"]["finish_reason"]["type"]
        assert finish in ("length", "stop"), finish

    async def _streamed(self) -> None:
        body = {
            "model": "default",
            "messages": [
                {"role": "system", "content": self._system},
                {"role": "user", "content": self._text()},
            ],
            "max_tokens": self._random.randint(1, 24),
            "stream": True,
        }
        async with self._http.stream("POST", "/v1/chat/completions", json=body) as answer:
            events = [line async for line in answer.aiter_lines() if line.startswith("data:")]
        assert answer.status_code == 200, events
        assert events, "an empty stream"
        assert events[-1] == "data: [DONE]", events[-1]

    async def _long(self) -> None:
        words = " ".join(self._text() for _ in range(self._random.randint(20, 60)))
        answer = await self._http.post("/generate", json=self._body(words, max_new_tokens=2))
        assert answer.status_code == 200, answer.text

    async def _aborted(self) -> None:
        rid = f"{self._name}-{self._num_asked}-"
        generating = asyncio.create_task(
            self._http.post("/generate", json=self._body(max_new_tokens=400, rid=rid, ignore_eos=True))
        )
        await asyncio.sleep(self._random.uniform(0.0, 1.0))
        aborted = await self._http.post("/abort_request", json={"rid": rid})
        assert aborted.status_code == 200, aborted.text
        answer = await generating
        # an abort that overtakes its request has no effect, and the request runs to its end
        assert answer.status_code == 200, answer.text

    async def _left(self) -> None:
        body = self._body(max_new_tokens=400, ignore_eos=True, stream=True)
        async with self._http.stream("POST", "/generate", json=body) as answer:
            assert answer.status_code == 200, answer.status_code
            if self._random.random() < 0.8:
                await anext(answer.aiter_lines())

    async def _wrong(self) -> None:
        answer = await self._http.post("/generate", json=self._body(max_new_tokens=-1))
        assert answer.status_code == 400, answer.text
        assert "max_new_tokens" in answer.json()["error"]["message"]

    def _body(self, text: str = "", *, rid: str | None = None, stream: bool = False, **sampling: Any) -> dict:
        return {
            "text": self._system + (text or self._text()),
            "sampling_params": {"temperature": self._random.choice((0.0, 0.8)), **sampling},
            "stream": stream,
            "rid": rid,
        }

    def _text(self) -> str:
        return f"Tell me about the number {self._random.randrange(10_000)}."


async def soak(
    url: str, *, num_streams: int, seconds: float, pid: int | None = None, seed: int = 0
) -> Outcome:
    """Load a server without other clients, then check it. The outcome's `failures` list all faults."""
    outcome = Outcome()
    limits = httpx.Limits(max_connections=2 * num_streams, max_keepalive_connections=num_streams)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False) as http:
        until = time.monotonic() + seconds
        watch = asyncio.create_task(_sample_memory(outcome, pid, seconds))
        streams = [
            Stream(http, seed=seed * 100_000 + number, outcome=outcome) for number in range(num_streams)
        ]
        await asyncio.gather(*(stream.run(until) for stream in streams))
        await watch
        outcome.pages = await _pages_when_idle(http)
    _check_memory(outcome)
    kept = outcome.pages["free"] + outcome.pages["tree"]
    if kept != outcome.pages["capacity"]:
        outcome.failures.append(f"pages were lost: free + cached = {kept}, not the capacity: {outcome.pages}")
    return outcome


def _check_memory(outcome: Outcome) -> None:
    """The first half fills caches and pools; growth after it would never end."""
    if len(outcome.rss_mib) == 3:
        _, half_mib, end_mib = outcome.rss_mib
        if end_mib > half_mib * GROWTH_LIMIT:
            outcome.failures.append(f"memory grew in the second half: {outcome.rss_mib} MiB")


async def _sample_memory(outcome: Outcome, pid: int | None, seconds: float) -> None:
    for _ in range(3 if pid else 0):
        assert pid is not None
        outcome.rss_mib.append(sum(rss_mib(process) for process in process_tree(pid)))
        if len(outcome.rss_mib) < 3:
            await asyncio.sleep(seconds / 2)


async def _pages_when_idle(http: httpx.AsyncClient) -> dict[str, int]:
    """Pages by owner when the server is idle without pins, or after `IDLE_LIMIT_S`."""
    deadline = time.monotonic() + IDLE_LIMIT_S
    while True:
        metrics = (await http.get("/metrics")).text
        pages = device_pages(metrics)
        is_idle = not any(pages[owner] for owner in ("private", "retired", "transfer"))
        if is_idle or time.monotonic() > deadline:
            return pages
        await asyncio.sleep(0.2)


def device_pages(metrics: str) -> dict[str, int]:
    """Device pages by owner, and the capacity, from the text of /metrics."""
    pages = {}
    series = re.findall(r"^headwater_(pages|page_capacity)\{([^}]*)\} (\S+)$", metrics, re.MULTILINE)
    for name, labels, value in series:
        label = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if label["tier"] == "device":
            pages["capacity" if name == "page_capacity" else label["owner"]] = int(float(value))
    return pages


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--pid", type=int, help="of `headwater serve`: watch its memory")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    outcome = asyncio.run(
        soak(
            options.url,
            num_streams=options.streams,
            seconds=options.seconds,
            pid=options.pid,
            seed=options.seed,
        )
    )
    print(json.dumps({"requests": dict(outcome.counts), "pages": outcome.pages, "rss_mib": outcome.rss_mib}))
    for failure in outcome.failures[:20]:
        print("FAILED", failure)
    print(f"{outcome.num_requests} requests, {len(outcome.failures)} failures")
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
