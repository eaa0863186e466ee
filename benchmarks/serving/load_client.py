"""Sends the requests of a measurement at once and times what streams back."""

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any

import httpx

from workloads import Measurement, Messages

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Target:
    """A server with OpenAI's API, and fields that its requests need beyond the standard ones."""

    url: str
    model: str
    extra: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Timing:
    """One request as its client saw it; times in seconds."""

    ttft_s: float
    decode_s: float  # from the first to the last token
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int


async def measure(http: httpx.AsyncClient, target: Target, measurement: Measurement) -> Record:
    """Run a measurement. Returns its times in seconds and its rates in tokens per second."""
    started = time.perf_counter()
    requests = [_ask(http, target, messages, measurement.max_tokens) for messages in measurement.requests]
    timings = await asyncio.gather(*requests)
    total_s = time.perf_counter() - started
    num_output = sum(t.num_output_tokens for t in timings)
    ttfts = sorted(t.ttft_s for t in timings)
    record = {
        "workload": measurement.workload,
        "total_s": total_s,
        "ttft_p50_s": _percentile(ttfts, 50),
        "ttft_p99_s": _percentile(ttfts, 99),
        "output_tokens_per_s": num_output / total_s,
        "prefill_tokens_per_s": sum(t.num_prompt_tokens for t in timings) / ttfts[-1],
        "num_prompt_tokens": sum(t.num_prompt_tokens for t in timings),
        "num_cached_tokens": sum(t.num_cached_tokens for t in timings),
        "num_output_tokens": num_output,
    }
    if len(timings) == 1 and timings[0].decode_s > 0:
        record["decode_tokens_per_s"] = (num_output - 1) / timings[0].decode_s
    return record


async def _ask(http: httpx.AsyncClient, target: Target, messages: Messages, max_tokens: int) -> Timing:
    body = {
        "model": target.model,
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.extra,
    }
    started = time.perf_counter()
    first = last = 0.0
    usage: dict[str, Any] = {}
    async with http.stream("POST", target.url + "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError(
                f"{target.url} answered {answer.status_code}: {(await answer.aread())[:300]!r}"
            )
        async for line in answer.aiter_lines():
            if not line.startswith("data:") or line.endswith("[DONE]"):
                continue
            event = json.loads(line[5:])
            if "error" in event:
                raise RuntimeError(f"{target.url} ended a stream: {event['error']}")
            usage = event.get("usage") or usage
            for choice in event.get("choices") or ():
                if (choice.get("delta") or {}).get("content") or choice.get("finish_reason"):
                    last = time.perf_counter()
                    first = first or last
    if not usage:
        raise RuntimeError(f"{target.url} sent no usage, so nothing can be counted")
    return Timing(
        ttft_s=first - started,
        decode_s=last - first,
        num_prompt_tokens=usage["prompt_tokens"],
        num_cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        num_output_tokens=usage["completion_tokens"],
    )


def _percentile(ordered: list[float], percent: float) -> float:
    """Linear interpolation between the two nearest of the ordered values."""
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
