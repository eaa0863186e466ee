"""The final checks, without load: the same state on all engines, right texts, and every page accounted for."""

import asyncio
import re
import time
from typing import Any

import httpx

from chaos_parts.cases import PATHS, Answer, Case
from chaos_parts.clients import Expected
from chaos_parts.operators import Operators
from chaos_parts.outcome import Outcome
from chaos_parts.weights_log import WeightsLog, checkpoint_of

IDLE_LIMIT_S = 60.0
SAME = ("weights_id", "weight_version", "paused", "released_memory")
PAGES = re.compile(r"^headwater_(pages|page_capacity)\{([^}]*)\} (\S+)$", re.MULTILINE)


async def check_aftermath(
    http: httpx.AsyncClient,
    operators: Operators,
    *,
    weights: WeightsLog,
    expected: Expected,
    outcome: Outcome,
    num_cases: int,
) -> None:
    """Undo the operators' changes, then compare the engines with each other and with the books."""
    await operators.lasting("/continue_generation", {})
    await operators.lasting("/resume_memory_occupation", {"tags": [], "timeout": 60.0}, timeout_s=60.0)
    states = await _agreed_states(http, outcome)
    for rank, state in enumerate(states):
        label = state.get("weight_version")
        if label not in weights.now:
            outcome.fail("stale policy", f"in the end engine {rank} {label!r}, the trainer: {sorted(weights.now)}")
        right = expected[checkpoint_of(str(label))]
        for case in [case for case in right if case.kind == "generate"][:num_cases]:
            await _check_text(http, case, right[case], rank=rank, outcome=outcome)
    await _end_pins(http)
    await operators.call("DELETE", "/hicache/storage-backend", allowed=(200,), timeout_s=30.0)
    body = {"timeout": IDLE_LIMIT_S, "tiers": "device,host"}
    await operators.call("POST", "/flush_cache", body, allowed=(200,), timeout_s=IDLE_LIMIT_S)
    await _check_pages(http, outcome)


async def _agreed_states(http: httpx.AsyncClient, outcome: Outcome) -> list[dict[str, Any]]:
    """The states of all engines as soon as they agree; a failure if they never agree."""
    deadline_s = time.monotonic() + IDLE_LIMIT_S
    while True:
        states = (await http.get("/server_info")).json()["internal_states"]
        told = [[state.get(name) for name in SAME] for state in states]
        if all(values == told[0] for values in told) and "weights_id" in states[0]:
            return states
        if time.monotonic() > deadline_s:
            outcome.fail("engines differ", f"in {SAME}: {told}")
            return states
        await asyncio.sleep(0.5)


async def _check_text(http: httpx.AsyncClient, case: Case, right: Answer, *, rank: int, outcome: Outcome) -> None:
    """Check one answer of one engine, without load."""
    answer = Answer()
    try:
        response = await http.post(PATHS[case.kind], json=case.body(stream=False, routed_dp_rank=rank), timeout=120.0)
        answer.take(case.kind, response.json(), is_chunk=False)
    except httpx.HTTPError as error:
        outcome.fail("hang", f"afterwards on engine {rank}: {type(error).__name__}")
        return
    if answer.error is not None or answer.ids != right.ids:
        what = answer.error or f"{answer.text!r}, not {right.text!r}"
        outcome.fail("wrong text afterwards", f"engine {rank} {case.prompt[-40:]!r}: {what}")


async def _end_pins(http: httpx.AsyncClient) -> None:
    for pin in (await http.get("/cache/pins")).json().get("pins", ()):
        await http.delete(f"/cache/pin/{pin['pin_id']}")


async def _check_pages(http: httpx.AsyncClient, outcome: Outcome) -> None:
    """Check that nothing is cached, held or in flight: every page of every tier is free."""
    deadline_s = time.monotonic() + IDLE_LIMIT_S
    while True:
        lost = _not_free((await http.get("/metrics")).text)
        if not lost:
            return
        if time.monotonic() > deadline_s:
            outcome.fail("pages lost", f"not free after a flush of an idle server: {lost}")
            return
        await asyncio.sleep(0.5)


def _not_free(metrics: str) -> list[dict[str, Any]]:
    """Pages by owner of each engine's tiers that are not all free."""
    tiers: dict[tuple[str, str], dict[str, int]] = {}
    for name, labels, value in PAGES.findall(metrics):
        label = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        owner = "capacity" if name == "page_capacity" else label["owner"]
        tiers.setdefault((label["dp_rank"], label["tier"]), {})[owner] = int(float(value))
    found: list[dict[str, Any]] = [
        {"engine": rank, "tier": tier} | pages
        for (rank, tier), pages in tiers.items()
        if pages.get("free") != pages["capacity"]
    ]
    return found if tiers else [{"no engine": "tells its pages"}]
