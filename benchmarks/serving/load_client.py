"""Sends the requests of a measurement at once and times what streams back, with the client of `headwater bench`."""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from headwater.bench.apis import APIS, Settings
from headwater.bench.connection import HttpClient
from headwater.bench.exchange import Exchange, Watched, exchange
from headwater.bench.percentile import percentile
from workloads import Measurement

CHAT = APIS["chat"]
LIMIT_S = 600.0
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Target:
    """A server with OpenAI's API, and fields that its requests need beyond the standard ones."""

    url: str
    model: str
    extra: dict[str, Any]


async def measure(http: HttpClient, target: Target, measurement: Measurement) -> Record:
    """Run a measurement. Returns its times in seconds and its rates in tokens per second."""
    settings = Settings(target.model, ignores_eos=False, extra=target.extra)
    bodies = [CHAT.body(messages, measurement.max_tokens, settings) for messages in measurement.requests]
    started_s = time.perf_counter()
    watched = Watched()
    asked = (exchange(http, CHAT, body, due_s=started_s, timeout_s=LIMIT_S, watched=watched) for body in bodies)
    done = await asyncio.gather(*asked)
    total_s = time.perf_counter() - started_s
    for each in done:
        if each.error:
            raise RuntimeError(f"{target.url}: {each.error}")
    return record_of(measurement.workload, done, total_s)


def record_of(workload: str, done: list[Exchange], total_s: float) -> Record:
    """The figures of one measurement."""
    num_output = sum(each.told.num_output_tokens for each in done)
    num_prompt = sum(each.told.num_prompt_tokens for each in done)
    ttfts = sorted(each.ttft_s for each in done)
    record = {
        "workload": workload,
        "total_s": total_s,
        "ttft_p50_s": percentile(ttfts, 50),
        "ttft_p99_s": percentile(ttfts, 99),
        "output_tokens_per_s": num_output / total_s,
        "prefill_tokens_per_s": num_prompt / ttfts[-1],
        "num_prompt_tokens": num_prompt,
        "num_cached_tokens": sum(each.told.num_cached_tokens for each in done),
        "num_output_tokens": num_output,
    }
    if len(done) == 1 and (decode_s := done[0].last_s - done[0].first_s) > 0:
        record["decode_tokens_per_s"] = (num_output - 1) / decode_s
    return record
