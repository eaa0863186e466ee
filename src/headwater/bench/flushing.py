"""Empties a server's cache before a round, and says what that made cold, or that it could not be done."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from headwater.bench.apis import refusal
from headwater.bench.connection import ConnectionBroke, HttpClient

TIERS = ("device", "host", "storage")
ANSWER_GRACE_S = 35.0


@dataclass(frozen=True, slots=True)
class Cold:
    """The state of a server's cache at the start of a round."""

    is_flushed: bool
    words: str
    still_warm: tuple[str, ...] = ()
    waited_s: float = 0.0


class _FlushAnswer(msgspec.Struct):
    """What Headwater answers; SGLang answers a text."""

    success: bool = False
    message: str = ""
    waited_s: float = 0.0
    still_warm: list[str] = []
    pending: list[str] = []


def parse_tiers(text: str) -> tuple[str, ...]:
    """Of `--flush`. Empty for `none`. Raises ValueError."""
    if text == "none":
        return ()
    found = tuple(part.strip() for part in text.split(","))
    if wrong := [tier for tier in found if tier not in TIERS]:
        raise ValueError(f"flush: {wrong[0]!r} is not one of {', '.join(TIERS)}, none")
    return found


async def flush(http: HttpClient, tiers: tuple[str, ...], *, timeout_s: float) -> Cold:
    """Flush the tiers of a Headwater server, or the cache of a server with SGLang's route."""
    if not tiers:
        return Cold(False, "not flushed, as asked")
    there = await _tiers_of(http)
    wanted = [tier for tier in tiers if tier in there]
    body = msgspec.json.encode({"timeout": timeout_s} | ({"tiers": wanted} if wanted else {}))
    try:
        answer = await http.request("POST", "/flush_cache", body, timeout_s=timeout_s + ANSWER_GRACE_S)
    except ConnectionBroke as error:
        return Cold(False, f"not flushed: {error}")
    return cold_of(answer.status, answer.text, wanted)


def cold_of(status: int, text: str, tiers: Sequence[str]) -> Cold:
    """What the answer to a flush of these tiers says."""
    if status in (404, 405):
        return Cold(False, f"cannot be flushed: it answers /flush_cache with {status}")
    try:
        answer = msgspec.json.decode(text.encode(), type=_FlushAnswer)
    except msgspec.DecodeError:
        answer = None
    if status >= 300 or (answer is not None and not answer.success):
        message = answer.message if answer is not None and answer.message else refusal(status, text)
        return Cold(False, f"not flushed: {message}")
    if answer is None:
        return Cold(True, f"flushed; its answer names no tiers: {' '.join(text.split())[:80]}")
    warm = sorted({*answer.still_warm, *answer.pending})
    cold = ", ".join(tier for tier in tiers if tier not in warm) or "nothing"
    words = f"cold: {cold}" + (f"; still warm: {', '.join(warm)}" if warm else "")
    return Cold(True, words, tuple(warm), answer.waited_s)


async def _tiers_of(http: HttpClient) -> tuple[str, ...]:
    """The tiers of a Headwater server; empty for other servers."""
    try:
        answer = await http.request("GET", "/cache", timeout_s=ANSWER_GRACE_S)
        found = msgspec.json.decode(answer.text.encode()) if answer.status == 200 else {}
    except (ConnectionBroke, msgspec.DecodeError):
        return ()
    if not isinstance(found, dict) or not isinstance(found.get("tiers"), dict):
        return ()
    return (*found["tiers"], *(("storage",) if found.get("storage") else ()))
