"""What a control call may not ask for, in words that name the parameter."""

from collections.abc import Sequence

from headwater.control.released_memory import TAGS
from headwater.messages.cache import AttachStorage
from headwater.messages.control import Failed, FlushCache
from headwater.messages.weights import ReleaseMemory, ResumeMemory, UpdateWeights

Timed = FlushCache | UpdateWeights | ReleaseMemory | ResumeMemory | AttachStorage


def refuse_timeout(message: Timed, *, max_s: float) -> Failed | None:
    if 0 <= message.timeout_s <= max_s:  # also false for NaN
        return None
    text = f"timeout must be between 0 and {max_s:g} seconds"
    return Failed(call_id=message.call_id, status=400, message=text, param="timeout")


def refuse_scope(message: FlushCache, *, tiers: Sequence[str]) -> Failed | None:
    """`tiers`: those that are enabled."""
    param, text = None, ""
    unknown = [tier for tier in message.tiers if tier not in tiers]
    if unknown:
        param, text = "tiers", f"tier {unknown[0]!r} is not enabled; enabled: {', '.join(tiers)}"
    if message.prefix_ids is not None and not message.prefix_ids:
        param, text = "prefix_ids", "prefix_ids must hold at least one token"
    if message.prefix_ids is not None and "storage" in message.tiers:
        param, text = "prefix_ids", "storage cannot be flushed by prefix: its keys are hashes"
    if param is None:
        return None
    return Failed(call_id=message.call_id, status=400, message=text, param=param)


def refuse_tags(message: ReleaseMemory | ResumeMemory) -> Failed | None:
    unknown = [tag for tag in message.tags if tag not in TAGS]
    if not unknown:
        return None
    text = f"tag {unknown[0]!r} is not known; known: {', '.join(TAGS)}"
    return Failed(call_id=message.call_id, status=400, message=text, param="tags")
