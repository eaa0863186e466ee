#!/usr/bin/env python3
"""Serve with two engines while clients send requests, operators act and engines are killed; check every answer.

    chaos.py                         5 minutes, the default model in float32, 30 clients, 4 kills
    chaos.py --model FOLDER --minutes 20 --seed 7 --rest 4
    chaos.py --tiny --minutes 0.5    two random checkpoints that compute in no time

Clients know the right answers, which the same server gave under both weights before the run. Operators flush in every
mode and scope, pause and continue, release and resume memory, swap weights, attach and detach a store, pin and abort,
all at the same time. Meanwhile engines are killed (-9) and stopped (SIGSTOP).

Every request must be answered, by the weights that the trainer's answers name, with the right text (or its beginning).
Every operation must be answered. In the end both engines must have the same weights, label and pause, and every page
must be free. The script exits with 1 if anything is wrong. Errors and aborts of requests are counted separately.
"""

import argparse
import asyncio
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

sys.path.append(str(Path(__file__).resolve().parent / "serving"))
from chaos_parts.aftermath import check_aftermath
from chaos_parts.cases import learn, make_cases
from chaos_parts.checkpoints import perturbed, tiny_checkpoint
from chaos_parts.clients import Client, Expected
from chaos_parts.operators import Operators
from chaos_parts.outcome import Outcome
from chaos_parts.trouble import Trouble
from chaos_parts.weights_log import WeightsLog
from results import save
from server_process import ServerProcess

FIRST, SECOND = "first", "second"  # the two checkpoints
START_LIMIT_S = 300.0
ENGINES = 2


async def chaos(
    url: str,
    *,
    server_pid: int,
    checkpoints: dict[str, str],
    store: Path,
    seconds: float,
    seed: int = 0,
    num_clients: int = 30,
    num_kills: int = 4,
    num_cases: int = 36,
    max_tokens: int = 24,
    rest: float = 1.0,
) -> Outcome:
    """Run clients, operators and trouble on a server of at least two engines. `checkpoints`: two paths by name."""
    outcome, weights = Outcome(), WeightsLog(f"{FIRST}-0")
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=num_clients)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False) as http:
        operators = Operators(
            http, seed=seed, checkpoints=checkpoints, store=store, weights=weights, outcome=outcome, rest=rest
        )
        cases = make_cases(seed, num_cases=num_cases, max_tokens=max_tokens)
        expected: Expected = {name: await _learn(http, name, checkpoints[name], cases) for name in (SECOND, FIRST)}
        until_s = time.monotonic() + seconds
        clients = [
            Client(http, number=number, seed=seed, expected=expected, weights=weights, outcome=outcome)
            for number in range(num_clients)
        ]
        trouble = Trouble(http, server_pid=server_pid, seed=seed, outcome=outcome)
        await asyncio.gather(
            operators.run(until_s),
            trouble.run(until_s, num_kills=num_kills),
            *(client.run(until_s) for client in clients),
        )
        await trouble.until_all_are_back()
        await check_aftermath(
            http, operators, weights=weights, expected=expected, outcome=outcome, num_cases=min(6, num_cases)
        )
    return outcome


async def _learn(http: httpx.AsyncClient, name: str, path: str, cases: Any) -> Any:
    """The right answers under one of the checkpoints, which the server then keeps."""
    body = {"model_path": path, "weight_version": f"{name}-0"}
    answer = await http.post("/update_weights_from_disk", json=body)
    assert answer.status_code == 200, answer.text
    found = await learn(http, cases)
    assert len(found) >= len(cases) // 4, f"only {len(found)} of {len(cases)} cases are clear under {name!r}"
    return found


def serve_flags(model: str, *, num_tokens: int) -> list[str]:
    """Flags of `headwater serve` for two engines, with tiers and a cache that is too small for the load."""
    flags = (
        f"--dp-size {ENGINES} --engine-restarts 99 --dtype float32 --threads 1 --enable-hierarchical-cache "
        f"--hicache-ratio 1.5 --max-total-tokens {num_tokens} --weight-version {FIRST}-start"
    )
    return ["--model", model, *flags.split()]


def make_checkpoints(model: str | None, folder: Path, *, seed: int) -> dict[str, str]:
    """Paths by name: the model and a perturbed copy, or for None two tiny random ones."""
    if model is None:
        return {
            FIRST: str(tiny_checkpoint(folder / "a", seed)),
            SECOND: str(tiny_checkpoint(folder / "b", seed + 1)),
        }
    return {FIRST: model, SECOND: str(perturbed(model, folder / "b", seed))}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or .gguf file; default: the default model")
    parser.add_argument("--tiny", action="store_true", help="two tiny random checkpoints instead")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=30)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument(
        "--rest",
        type=float,
        default=1.0,
        help="factor for the operators' rests: on a slow machine, longer rests let more answers complete",
    )
    parser.add_argument("--log", type=Path, help="where the server's log is kept")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="headwater-chaos-") as name:
        folder = Path(name)
        checkpoints = make_checkpoints(_model(options), folder, seed=options.seed)
        flags = serve_flags(checkpoints[FIRST], num_tokens=4096 if options.tiny else 6144)
        command = shlex.join([sys.executable, "-m", "headwater", "serve", "--port", "{port}", *flags])
        log = options.log or folder / "log"
        server = ServerProcess(command, environment={}, model="default", extra={}, log=log)
        try:
            server.wait_until_answering(START_LIMIT_S)
            outcome = asyncio.run(
                chaos(
                    server.target.url,
                    server_pid=server.pid,
                    checkpoints=checkpoints,
                    store=folder / "store",
                    seconds=60 * options.minutes,
                    seed=options.seed,
                    num_clients=options.clients,
                    num_kills=options.kills,
                    rest=options.rest,
                )
            )
        finally:
            server.stop()
    return report(outcome, options)


def _model(options: argparse.Namespace) -> str | None:
    if options.tiny:
        return None
    if options.model is not None:
        return options.model
    from headwater.launch.default_model import ensure_default_model

    return str(ensure_default_model())


def report(outcome: Outcome, options: argparse.Namespace) -> int:
    """Print the outcome and write it to a file. Returns the exit code."""
    record = {
        "requests": dict(sorted(outcome.requests.items())),
        "operations": dict(sorted(outcome.operations.items())),
        "latest_operation": {"name": outcome.latest, "after_its_deadline_s": round(outcome.latest_s, 3)},
        "failures": outcome.kinds(),
        "first_failures": outcome.first(8),
    }
    print(json.dumps(record, indent=1))
    num_requests, num_operations = outcome.requests.total(), outcome.operations.total()
    print(f"{num_requests} requests, {num_operations} operations, {len(outcome.failures)} failures")
    model = "tiny" if options.tiny else Path(options.model).name if options.model else "default"
    settings = {name: getattr(options, name) for name in ("minutes", "seed", "clients", "kills", "rest")}
    print(save("chaos", [record], servers={"headwater": settings | {"model": model, "engines": ENGINES}}))
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
