"""A store in trouble in words: what happened and what to do. The page and `headwater top` show the same ones."""

from headwater.generation.answer_fields import Json
from headwater.messages.cache import StorageInfo, StoreTrouble

_MAX_DETAILS = 200
_FAILING = {
    "look_up": "pages cannot be looked up",
    "read": "pages cannot be read",
    "write": "pages cannot be written",
    "flush": "a flush is not acknowledged",
    "upkeep": "its contents cannot be counted or cleaned up",
}
_CAUSES = {
    "timeout": "it does not answer in time",
    "deadline": "it does not answer in time",
    "slow": "its answers come too late",
    "busy": "too many calls wait for it",
    "full": "it has no room even for a counter",
    "unavailable": "it cannot be reached",
}
_SLOW = "See whether its process, disk or network hangs or is overloaded."
_ADVICE = {
    "timeout": _SLOW,
    "deadline": _SLOW,
    "slow": _SLOW,
    "busy": _SLOW,
    "full": "Make room on its disk or in its memory.",
}
_UNAVAILABLE = {
    "redis": "Start the Redis server again, or mend the way to it.",
    "file": "Bring its folder back, on a disk with room that this user may write to.",
}
_BACK = "This server then finds it by itself, without a restart."


def happened(info: StorageInfo) -> str:
    """What fails and why, in one or two sentences; empty if nothing does."""
    trouble = info.trouble
    if trouble is None:
        return ""
    details = f" ({trouble.details[:_MAX_DETAILS].rstrip('.')})" if trouble.details else ""
    cause = _CAUSES.get(trouble.cause, "its calls end in errors")
    if trouble.is_left_alone:
        return f"The {info.kind} store fails: {cause}{details}. Requests are served without it."
    failing = ", ".join(_FAILING.get(kind, kind) for kind in trouble.failing)
    return f"The {info.kind} store fails in part: {failing}; {cause}{details}. Requests are served all the same."


def trouble_facts(info: StorageInfo) -> Json:
    """Members of the snapshot's `storage.trouble`; empty if there is none."""
    trouble = info.trouble
    if trouble is None:
        return {}
    return {
        "happened": happened(info),
        "todo": f"{_advice(info.kind, trouble)} {_BACK}",
        "failing_s": int(trouble.failing_s),
        "retry_in_s": int(trouble.retry_in_s),
    }


def _advice(kind: str, trouble: StoreTrouble) -> str:
    if trouble.is_left_alone and trouble.cause == "unavailable":
        return _UNAVAILABLE.get(kind, "Bring it back.")
    return _ADVICE.get(trouble.cause, "See what the store's own log says, and whether it accepts writes.")
