"""What the keys do to the server, in the words of its answers."""

from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote

from headwater.cli.control_client import ANSWER_GRACE_S, refused, unreachable
from headwater.cli.server_call import HttpAnswer, Server, ServerError

MODES = (
    ("idle", "at the first idle moment"),
    ("now", "now, under load"),
    ("drain", "now, and wait until old pages are free"),
)
TIMEOUTS_S = (0, 5, 10, 30, 60, 120)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an action."""

    text: str
    is_good: bool = True


@dataclass(frozen=True, slots=True)
class FlushChoice:
    """What a flush would do. `there`: the server's tiers. `salts` are those that can be chosen; None: everything."""

    there: tuple[str, ...] = ("device",)
    mode: int = 0
    tiers: int = 0
    timeout: int = 2
    salt: str | None = None
    holds: bool = False
    salts: tuple[str, ...] = field(default=())

    @property
    def tier_choices(self) -> list[tuple[str, ...]]:
        """The memory tiers together, which is the server's default, each alone, and all with the store."""
        memory = tuple(tier for tier in self.there if tier != "storage")
        found = [memory, *((tier,) for tier in self.there), self.there]
        return list(dict.fromkeys(each for each in found if each))

    def turned(self, key: str) -> "FlushChoice":
        """The choice after a key of the form; the same for other keys."""
        if key == "m":
            return replace(self, mode=(self.mode + 1) % len(MODES))
        if key == "t":
            return replace(self, tiers=(self.tiers + 1) % len(self.tier_choices))
        if key in ("plus", "minus"):
            step = 1 if key == "plus" else -1
            return replace(self, timeout=min(len(TIMEOUTS_S) - 1, max(0, self.timeout + step)))
        if key == "s":
            scopes = (None, *self.salts)
            return replace(self, salt=scopes[(scopes.index(self.salt) + 1) % len(scopes)])
        if key == "h":
            return replace(self, holds=not self.holds)
        return self

    def lines(self) -> list[str]:
        """The form."""
        mode, words = MODES[self.mode]
        return [
            f"m  when     {mode}: {words}",
            f"t  tiers    {','.join(self.tier_choices[self.tiers])}",
            f"s  scope    {'everything' if self.salt is None else f'salt {self.salt}'}",
            f"+- timeout  {TIMEOUTS_S[self.timeout]} s" + (" (not used)" if mode == "now" else ""),
            f"h  hold     {'new requests wait meanwhile' if self.holds else 'new requests go on'}"
            + (" (only with idle)" if mode != "idle" else ""),
        ]

    def body(self) -> dict[str, Any]:
        """For `/flush_cache`."""
        mode = MODES[self.mode][0]
        found: dict[str, Any] = {"mode": mode, "tiers": list(self.tier_choices[self.tiers])}
        if mode != "now":
            found["timeout"] = TIMEOUTS_S[self.timeout]
        if self.salt is not None:
            found["cache_salt"] = self.salt
        if self.holds and mode == "idle":
            found["hold"] = True
        return found


def dry_run(server: Server, body: dict[str, Any]) -> Outcome:
    """What the flush would cut; nothing is changed."""
    given = {name: value for name, value in body.items() if name not in ("timeout", "hold")}
    return _call(server, "POST", "/flush_cache", given | {"dry_run": True}, accept="text/plain")


def flush(server: Server, body: dict[str, Any]) -> Outcome:
    return _call(server, "POST", "/flush_cache", body, accept="text/plain", timeout_s=body.get("timeout", 0))


def pause(server: Server) -> Outcome:
    """Running requests go back to the queue, as with `headwater pause`."""
    outcome = _call(server, "POST", "/pause_generation", {"mode": "retract"})
    return Outcome("Paused. Running requests wait in the queue.") if outcome.is_good else outcome


def resume(server: Server) -> Outcome:
    outcome = _call(server, "POST", "/continue_generation", {})
    return Outcome("Generation goes on.") if outcome.is_good else outcome


def cancel(server: Server, operation: str) -> Outcome:
    outcome = _call(server, "DELETE", f"/control/operations/{quote(operation, safe='')}", None)
    return Outcome("Cancelled.") if outcome.is_good else outcome


def _call(
    server: Server,
    method: str,
    path: str,
    body: dict[str, Any] | None,
    *,
    accept: str = "application/json",
    timeout_s: float = 0.0,
) -> Outcome:
    try:
        answer = server.request(method, path, body, timeout_s=timeout_s + ANSWER_GRACE_S, accept=accept)
    except ServerError as error:
        return Outcome(str(unreachable(error)), is_good=False)
    return _outcome(answer)


def _outcome(answer: HttpAnswer) -> Outcome:
    if answer.status_code >= 300 and answer.error:
        return Outcome(str(refused(answer)), is_good=False)
    return Outcome(" ".join(answer.text.split()), is_good=answer.status_code < 300)
