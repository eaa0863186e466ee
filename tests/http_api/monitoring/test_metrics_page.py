"""docs/metrics.md and /metrics name the same metrics: one that is not documented is not found, and one that is
documented and not there breaks somebody's dashboard."""

import re
import subprocess
from pathlib import Path

import pytest
from full_page import exported, full_page, promtool
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio
# SGLang's, under its names although promtool dislikes them: colons, a unit in `gb`, a type in the name.
# A new one must be SGLang's own: its dashboards and the gateways read these.
SGLANG_NAMES = {
    f"sglang:{name}"
    for name in (
        "backuped_tokens cache_config_info cache_hit_rate cached_tokens "
        "e2e_request_latency_seconds evicted_tokens gen_throughput "
        "generation_tokens generation_tokens_histogram hicache_backup_bytes "
        "hicache_backup_dropped_tokens hicache_backup_tokens "
        "hicache_host_total_tokens hicache_host_used_tokens inter_token_latency_seconds kv_available_tokens "
        "kv_cache_memory_usage_gb kv_evictable_tokens kv_used_tokens load_back_bytes load_back_tokens "
        "max_total_num_tokens num_aborted_requests num_paused_reqs num_queue_reqs num_requests num_retracted_reqs "
        "num_pages num_retracted_requests num_running_reqs page_size prefetched_tokens prompt_tokens "
        "prompt_tokens_histogram "
        "queue_time_seconds spec_accept_length spec_accept_rate "
        "storage_prefetch_unfulfilled_tokens time_to_first_token_seconds token_usage "
        "uncached_prompt_tokens_histogram"
    ).split()
}
# those that routers read by default; they have SGLang's names as well
VLLM_NAMES = {f"vllm:{name}" for name in ("cache_config_info", "num_requests_running", "num_requests_waiting")}
VLLM_NAMES |= {"vllm:kv_cache_usage_perc", "vllm:lora_requests_info"}
OF_A_FRONT = {"headwater_fleet_broken_requests_total"}  # tests/fleet/test_front.py has it
OURS = re.compile(r"headwater_[a-z0-9]+(_[a-z0-9]+)*")
# promtool's tables of units: abbreviations, and those that are not the base unit of what they measure
ABBREVIATED = set("s ms us ns sec b kb mb gb tb pb m h d".split())
NOT_BASE = set(
    "milliseconds microseconds nanoseconds minutes hours days weeks bits kilobytes megabytes gigabytes kibibytes "
    "mebibytes gibibytes percent kelvin fahrenheit meters kilometers grams kilograms".split()
)
KINDS = {"counter", "gauge", "histogram", "summary"}
PAGE = Path(__file__).resolve().parents[3] / "docs" / "metrics.md"


def documented() -> set[str]:
    """Names in the first column of the tables: alternatives `{a,b}` in the middle are meant, labels at the end not."""
    found: set[str] = set()
    for line in PAGE.read_text().splitlines():
        cells = line.split("|")
        if len(cells) < 5 or not re.search("`(sglang:|vllm:|headwater_)", cells[1]):
            continue
        prefix = ""
        for name in re.findall(r"`([^`]+)`", cells[1]):
            name = re.sub(r"\{[^{}]*\}$", "", name)
            if name.startswith(("headwater_", "vllm:")):
                prefix = ""
            elif ":" in name:
                prefix, name = "sglang:", name.removeprefix("sglang:")
            options = re.search(r"\{([^{}]*)\}", name)
            parts = options[1].split(",") if options else [""]
            if "<name>" in name:
                parts, options = re.findall(r"`([^`]+)`", cells[3]), re.search("<name>", name)
            found |= {prefix + (name.replace(options[0], part) if options else name) for part in parts}
    return found


async def test_the_page_in_the_docs_names_every_metric_and_no_other(engine: ScriptedEngine) -> None:
    found, told = exported(await full_page(engine)), documented()
    assert len(found) > 50
    assert sorted(found - told) == [], "exported and not documented"
    assert sorted(told - found - OF_A_FRONT) == [], "documented and not exported"


def lint(family: Metric) -> list[str]:
    """What promtool would say of a family, and what it lets pass and should not: a name that is not ours."""
    words, found = family.name.split("_"), []
    if not OURS.fullmatch(family.name):
        found.append("not headwater_ and words in small letters")
    if not family.documentation:
        found.append("no help")
    found += [f"unit {word}" for word in words if word in ABBREVIATED | NOT_BASE]
    found += [f"type {word} in the name" for word in words if word in KINDS]
    suffixes = ("_bucket", "_count", "_sum", "_info", "_total")
    found += [f"reserved {suffix}" for suffix in suffixes if family.name.endswith(suffix)]
    for sample in family.samples:
        if (family.type == "counter") != sample.name.endswith("_total"):
            found.append("_total is for counters, and for all of them")
        found += [f"label {label}" for label in sample.labels if not re.fullmatch(r"[a-z][a-z0-9_]*", label)]
        reserved = ("quantile",) if family.type == "histogram" else ("le", "quantile")
        found += [f"label {label}" for label in reserved if label in sample.labels]
    return sorted(set(found))


async def test_our_names_pass_the_rules_of_prometheus(engine: ScriptedEngine) -> None:
    """A colon is for recording rules, a unit is spelt out and the base one; monitoring teams lint what they scrape."""
    families = list(text_string_to_metric_families(await full_page(engine)))
    ours = [family for family in families if not family.name.startswith(("sglang:", "vllm:"))]
    assert len(ours) > 20
    assert {family.name: lint(family) for family in ours if lint(family)} == {}
    assert {family.name for family in families} - {family.name for family in ours} <= SGLANG_NAMES | VLLM_NAMES


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("counter", "headwater:pages"),
        ("counter", "headwater_queue_time_s"),
        ("gauge", "headwater_wait_ms"),
        ("gauge", "headwater_memory_gb"),
        ("gauge", "headwater_pages_total"),
        ("gauge", "headwater_wait_milliseconds"),
        ("gauge", "headwater_numPages"),
        ("gauge", "pages"),
        ("gauge", "headwater_load_gauge"),
    ],
)
def test_the_rules_notice(kind: str, name: str) -> None:
    family = Metric(name, "A text.", kind)
    family.add_sample(name + ("_total" if kind == "counter" else ""), {}, 1.0)
    assert lint(family) != []


async def test_promtool_has_nothing_to_say_of_our_names(engine: ScriptedEngine) -> None:
    page = await full_page(engine)
    done = subprocess.run([promtool(), "check", "metrics"], input=page, capture_output=True, text=True)
    said = (done.stdout + done.stderr).splitlines()
    assert [line for line in said if not line.startswith(("sglang:", "vllm:"))] == []
    assert any(line.startswith("sglang:") for line in said), "it did look"
