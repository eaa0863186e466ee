"""How flushes ended, for programs (JSON) and for people and SGLang's scripts (text)."""

from typing import Any

import msgspec

from headwater.messages import FlushResult, PagesAndBytes

FLUSHED = "Cache flushed."
MIB = 1 << 20
Json = dict[str, Any]


def merged_status(results: list[FlushResult]) -> int:
    """The HTTP status for all engines: the worst."""
    return max(result.status for result in results)


def as_json(results: list[FlushResult]) -> Json:
    """The facts of design section 6: summed over the engines, and of each in `engines`."""
    worst = max(results, key=lambda result: result.status)
    answer: Json = {
        "success": all(result.success for result in results),
        "message": worst.message,
        "mode": worst.mode,
        "waited_s": max(result.waited_s for result in results),
    }
    if answer["success"]:
        answer |= {
            "generation": max(result.generation for result in results),
            "drained": all(result.drained for result in results),
            "freed": _summed([result.freed for result in results]),
            "retired": _summed([result.retired for result in results]),
            "still_warm": sorted({tier for result in results for tier in result.still_warm}),
            "pending": sorted({tier for result in results for tier in result.pending}),
        }
    if answer_dry_run := any(result.dry_run for result in results):
        answer["dry_run"] = answer_dry_run
    answer["blockers"] = _summed_counts([result.blockers for result in results])
    answer["engines"] = [_of_one(result) for result in results]
    return answer


def as_text(results: list[FlushResult]) -> str:
    """The same in sentences; the first words are SGLang's, which scripts look for."""
    facts = as_json(results)
    sentences = [FLUSHED] if facts["success"] and not facts.get("dry_run") else []
    if facts["message"] != FLUSHED or not sentences:
        sentences.append(facts["message"])
    for tier, amount in facts.get("freed", {}).items():
        sentences.append(f"Freed on {tier}: {_amount(amount)}.")
    for tier, amount in facts.get("retired", {}).items():
        if amount["pages"]:
            sentences.append(f"Still held by running requests on {tier}: {_amount(amount)}.")
    if facts.get("still_warm"):
        sentences.append(f"Still warm: {', '.join(facts['still_warm'])}.")
    if facts["blockers"]:
        blockers = ", ".join(f"{name}={count}" for name, count in sorted(facts["blockers"].items()))
        sentences.append(f"Not idle: {blockers}.")
    sentences.append(f"Waited {facts['waited_s']:.3f} s.")
    return " ".join(sentences) + "\n"


def _of_one(result: FlushResult) -> Json:
    fields = msgspec.to_builtins(result)
    for name in ("call_id", "type"):
        fields.pop(name, None)
    return fields


def _summed(amounts: list[dict[str, PagesAndBytes]]) -> dict[str, Json]:
    total: dict[str, Json] = {}
    for by_tier in amounts:
        for tier, amount in by_tier.items():
            entry = total.setdefault(tier, {"pages": 0, "bytes": 0})
            entry["pages"] += amount.pages
            entry["bytes"] += amount.bytes
    return total


def _summed_counts(counts: list[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for by_name in counts:
        for name, count in by_name.items():
            total[name] = total.get(name, 0) + count
    return total


def _amount(amount: Json) -> str:
    return f"{amount['pages']} pages, {amount['bytes'] / MIB:.1f} MiB"
