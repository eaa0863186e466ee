#!/usr/bin/env python3
"""Two hours of mixed clients: memory, pages and open files must stay flat, and no request may go wrong.

    python integrations/two_hours.py
    python integrations/two_hours.py --minutes 20 --streams 4 --sdks openai-python,anthropic

It starts `headwater serve` (the arguments after `--` go to it), fills once what fills with use and then stays (pages,
the memory of the largest step, stored responses), and loads it with streams of every kind of request
(endurance/streams.py). Meanwhile the real SDKs named by --sdks run their checks, one after
another. Samples are taken every 10 s. A line through the samples after the first tenth must not rise; see
endurance/samples.py for the limits. The samples go to results/two-hours.json, the picture to results/two-hours.png.
"""

import argparse
import asyncio
import json
import random
import sys
import threading
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from checks import URL_VARIABLES, server_at
from clients import client_named
from endurance.plot import plot
from endurance.samples import Sample, device_pages, engine_of, grown, mappings_mib, process_at, trends
from endurance.streams import Outcome, Stream
from environment import Environment
from record import commit
from run import run_script
from servers import ServerProcess

RESULTS = Path(__file__).parent / "results"
IDLE_LIMIT_S = 60.0
LARGEST_STEP = 48  # decodes in one step: more than the streams and the SDKs send at once
MAX_STORED_RESPONSES = 50  # the default, 1,000, would fill for hours and look like a leak
JUMP_MIB = 3.0  # between two samples, of which the record says where it is
MAX_KEPT_SAMPLES = 400  # in the record; every sample counts for the trends


class Run:
    """One long run against one server."""

    def __init__(self, server: ServerProcess, http: httpx.AsyncClient, options: argparse.Namespace) -> None:
        self._server = server
        self._http = http
        self._options = options
        self._began_s = 0.0
        self._is_over = threading.Event()  # also when something has failed
        self.outcome = Outcome()
        self.samples: list[Sample] = []
        self.num_late_samples = 0  # which the engine did not answer in time: a 504 on a busy machine
        self.jumps: list[dict[str, Any]] = []  # of the engine's memory between two samples, by mapping
        self.sdk_checks: dict[str, dict[str, int]] = {}

    async def go(self) -> dict[str, int]:
        """Load the server for the given time; the pages by owner when all is done."""
        model = server_at(self._server.url).model
        await self._stream(model, 0).probe()
        await self._fill_pages()
        await self._take_the_largest_step()
        await self._fill_stored_responses(model)
        self._began_s = time.monotonic()
        until_s = self._began_s + self._options.minutes * 60
        tasks = [self._stream(model, 1 + n).run(until_s) for n in range(self._options.streams)]
        try:
            await asyncio.gather(*tasks, self._sample(until_s), asyncio.to_thread(self._run_sdks, until_s))
        finally:
            self._is_over.set()
        return await self._pages_when_idle()

    def _stream(self, model: str, seed: int) -> Stream:
        pause_s = self._options.pause
        return Stream(self._http, model=model, seed=seed, outcome=self.outcome, pause_s=pause_s)

    async def _fill_pages(self) -> None:
        """Memory of a page counts from its first use, so every page is used once before the first sample."""
        words = random.Random(0)
        while (await device_pages(self._http))["free"] > 8:
            ids = [words.randrange(100, 20_000) for _ in range(1000)]
            body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 1}}
            (await self._http.post("/generate", json=body)).raise_for_status()

    async def _take_the_largest_step(self) -> None:
        """A CPU's arrays grow to the largest step: chunks of a prompt whose every token has logits, and decodes.

        Alone the prompt has whole chunks; beside streams they are cut, so that no stream waits long.
        """
        prompt = {"input_ids": list(range(1000, 2000)), "return_logprob": True, "logprob_start_len": 0}
        prompt |= {"sampling_params": {"max_new_tokens": 1}}
        decodes = {"text": "Hello", "sampling_params": {"n": LARGEST_STEP, "max_new_tokens": 200, "ignore_eos": True}}

        (await self._http.post("/generate", json=prompt)).raise_for_status()

        async def go_beside() -> None:
            for _ in range(3):
                await asyncio.sleep(1.0)
                (await self._http.post("/generate", json=prompt)).raise_for_status()

        decoded, _ = await asyncio.gather(self._http.post("/generate", json=decodes), go_beside())
        decoded.raise_for_status()

    async def _fill_stored_responses(self, model: str) -> None:
        body = {"model": model, "input": "Hello", "max_output_tokens": 1}
        for _ in range(MAX_STORED_RESPONSES):
            (await self._http.post("/v1/responses", json=body)).raise_for_status()

    async def _sample(self, until_s: float) -> None:
        api = self._server.process.pid
        engine = engine_of(api)
        before = mappings_mib(engine)
        while time.monotonic() < until_s:
            if sum((after := mappings_mib(engine)).values()) > sum(before.values()) + JUMP_MIB:
                at_s = round(time.monotonic() - self._began_s, 1)
                self.jumps.append({"at_s": at_s, "grown_mib": grown(before, after)})
            before = after
            if (pages := await self._pages_in_time()) is not None:
                self.samples.append(
                    Sample(
                        at_s=round(time.monotonic() - self._began_s, 1),
                        api=process_at(api),
                        engine=process_at(engine),
                        pages=pages,
                        num_requests=self.outcome.counts.total(),
                    )
                )
            await asyncio.sleep(self._options.every)

    async def _pages_in_time(self) -> dict[str, int] | None:
        try:
            return await device_pages(self._http)
        except httpx.HTTPStatusError as error:
            if error.response.status_code != 504:
                raise
            self.num_late_samples += 1
            return None

    def _run_sdks(self, until_s: float) -> None:
        """The SDKs' own scripts, one after another until the time is over."""
        names = [name for name in self._options.sdks.split(",") if name]
        while names and time.monotonic() < until_s - 60:
            for name in names:
                if self._is_over.is_set():
                    return
                client = client_named(name)
                environment = Environment(client)
                environment.install()
                variables = {URL_VARIABLES["model"]: self._server.url}
                results = [c["result"] for c in run_script(client, environment, variables=variables, only=[])]
                sums = self.sdk_checks.setdefault(name, {"runs": 0, "passed": 0, "failed": 0, "skipped": 0})
                sums["runs"] += 1
                for result in results:
                    sums[result] += 1
            self._is_over.wait(min(self._options.sdk_pause, max(0.0, until_s - time.monotonic())))

    async def _pages_when_idle(self) -> dict[str, int]:
        deadline_s = time.monotonic() + IDLE_LIMIT_S
        while True:
            pages = await device_pages(self._http)
            is_idle = not (pages["private"] or pages["retired"] or pages["transfer"])
            if is_idle or time.monotonic() > deadline_s:
                return pages
            await asyncio.sleep(0.2)


def verdict(run: Run, pages: dict[str, int], *, warm_up_s: float) -> dict[str, Any]:
    """What the run found; `faults` is empty if all is well."""
    settled = [sample for sample in run.samples if sample.at_s >= warm_up_s]
    lines = trends(settled)
    faults = list(run.outcome.failures[:20])
    faults += [f"{one.name} grew by {one.growth:g}, limit {one.limit:g}" for one in lines if not one.is_flat]
    faults += [f"pages without an owner at {s.at_s} s: {s.pages}" for s in run.samples if not s.is_accounted][:5]
    if pages["free"] + pages["cached"] != pages["capacity"]:
        faults.append(f"pages are held by no request: {pages}")
    faults += [f"{name}: {sums['failed']} checks failed" for name, sums in run.sdk_checks.items() if sums["failed"]]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "minutes": round(run.samples[-1].at_s / 60, 1),
        "requests": dict(run.outcome.counts),
        "left_out": run.outcome.left_out,
        "sdk_checks": run.sdk_checks,
        "trends": [asdict(one) for one in lines],
        "pages_at_the_end": pages,
        "num_failures": len(run.outcome.failures),
        "faults": faults,
        "num_late_samples": run.num_late_samples,
        "jumps": run.jumps,
        "samples": [sample.as_dict() for sample in run.samples[:: len(run.samples) // MAX_KEPT_SAMPLES + 1]],
    }


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    bounds = ("--max-stored-responses", str(MAX_STORED_RESPONSES))
    with ServerProcess("-m", "headwater", "serve", *bounds, *options.serve) as server:
        server.wait_healthy()
        limits = httpx.Limits(max_connections=4 * options.streams + 4)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits, trust_env=False) as http:
            run = Run(server, http, options)
            pages = await run.go()
    warm_up_s = options.minutes * 6.0  # a tenth
    found = verdict(run, pages, warm_up_s=warm_up_s)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "two-hours.json").write_text(json.dumps(found, indent=1) + "\n")
    title = f"{found['minutes']} minutes, {sum(found['requests'].values())} requests of {len(found['requests'])} kinds"
    plot(run.samples, RESULTS / "two-hours.png", title=title, warm_up_s=warm_up_s)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.3, help="mean seconds between a stream's requests")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between samples")
    parser.add_argument("--sdks", default="", help="clients of run.py whose checks run meanwhile, with commas")
    parser.add_argument("--sdk-pause", type=float, default=60.0, help="seconds between two rounds of the SDKs' checks")
    parser.add_argument("serve", nargs="*", help="arguments for `headwater serve`")
    found = asyncio.run(measure(parser.parse_args()))
    for key in ("minutes", "requests", "left_out", "sdk_checks", "pages_at_the_end", "num_failures"):
        print(f"{key}: {found[key]}")
    for line in found["trends"]:
        print(f"{line['name']}: mean {line['mean']:g}, grew by {line['growth']:g}, limit {line['limit']:g}")
    for fault in found["faults"]:
        print("FAULT", fault)
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
