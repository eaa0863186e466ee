"""Rounds as JSON, with every request, so that other figures can be computed later."""

import datetime
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headwater.bench.exchange import Exchange
from headwater.bench.turns import Ratio, Round
from headwater.version import version

Json = dict[str, Any]
ISA_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")


def record_of(rounds: Sequence[Round], *, workload: str, servers: Sequence[Json], found: Sequence[Ratio]) -> Json:
    """Times in seconds, counted from the first request of their round."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "headwater": version(),
        "client_machine": machine(),
        "workload": workload,
        "servers": list(servers),
        "rounds": [_round(each) for each in rounds],
        "ratios": [asdict(each) for each in found],
    }


def machine() -> Json:
    """Processor, cores this process may use, memory. No names."""
    processor, extensions = platform.machine(), ""
    cpu_info = Path("/proc/cpuinfo")
    for line in cpu_info.read_text().splitlines() if cpu_info.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            processor = value.strip()
        if key.strip() == "flags":
            extensions = " ".join(flag for flag in ISA_FLAGS if flag in value.split())
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": processor,
        "extensions": extensions,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory_gib, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
    }


def _round(each: Round) -> Json:
    figures = each.figures
    began_s = min(exchange.due_s for exchange in each.exchanges)
    rates = ("requests_per_s", "output_tokens_per_s", "prompt_tokens_per_s", "cached_share", "tokens_per_event")
    return {
        "server": each.server,
        "round": each.number,
        "flush": asdict(each.cold),
        "figures": asdict(figures) | {name: getattr(figures, name) for name in rates},
        "client_cpu_s": each.client_cpu_s,
        "client_us_per_token": each.client_us_per_token,
        "foreign_cores": each.foreign_cores,
        "requests": [_request(exchange, began_s) for exchange in sorted(each.exchanges, key=lambda e: e.due_s)],
    }


def _request(exchange: Exchange, began_s: float) -> Json:
    told = exchange.told
    facts: Json = {
        "due_s": round(exchange.due_s - began_s, 6),
        "sent_s": round(exchange.sent_s - began_s, 6),
        "ended_s": round(exchange.ended_s - began_s, 6),
    }
    if exchange.error:
        return facts | {"error": exchange.error}
    return facts | {
        "ttft_s": round(exchange.ttft_s, 6),
        "tpot_s": round(exchange.tpot_s, 6),
        "itl_p99_s": round(exchange.itl_p99_s, 6),
        "num_prompt_tokens": told.num_prompt_tokens,
        "num_cached_tokens": told.num_cached_tokens,
        "num_output_tokens": told.num_output_tokens,
    }
