"""What a training run showed: its problems, its record under results/, its picture. See grpo_on_cpu.py."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MAX_LOGPROB_DIFFERENCE = 1e-3  # in float32, between the server and the trainer
MIN_GAIN = 0.2  # of the reward, whose largest value is 1
ONCE = {"/health": 1, "/v1/models": 1, "/server_info": 2, "/get_world_size": 1, "/init_weight_transfer_engine": 1}
EACH_STEP = (
    "/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache", "/v1/completions",
)  # fmt: skip
PHASES = ("generate", "update", "reset")


def problems(report: Mapping[str, Any], *, num_steps: int) -> list[str]:
    """What a run must show and did not; empty for a good one."""
    steps, found = report["steps"], []
    if len(steps) != num_steps:
        found.append(f"{len(steps)} steps of {num_steps}")
    first, last = mean_reward(steps[:3]), mean_reward(steps[-3:])
    if last < first + MIN_GAIN:
        found.append(f"the reward went from {first:.3f} to {last:.3f}")
    for step in steps:
        if not step["logprob_difference_max"] <= MAX_LOGPROB_DIFFERENCE:
            found.append(f"step {step['step']}: log-probabilities differ by {step['logprob_difference_max']}")
    asked = Counter(call["path"] for call in report["requests"])
    expected = Counter(ONCE) + Counter(dict.fromkeys(EACH_STEP, num_steps))
    if asked != expected:
        found.append(f"requests {dict(asked - expected)} beyond those of the steps, {dict(expected - asked)} missing")
    refused = [call for call in report["requests"] if call["status"] != 200]
    return [*found, *(f"{call['path']} answered {call['status']}" for call in refused)]


def mean_reward(steps: Sequence[Mapping[str, Any]]) -> float:
    return sum(step["reward"] for step in steps) / len(steps)


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    steps = report["steps"]
    return {
        "reward_first_3": round(mean_reward(steps[:3]), 4),
        "reward_last_3": round(mean_reward(steps[-3:]), 4),
        "logprob_difference_max": max(step["logprob_difference_max"] for step in steps),
        "num_requests": len(report["requests"]),
        "median_seconds": {
            name: sorted(step["seconds"].get(name, 0.0) for step in steps)[len(steps) // 2] for name in PHASES
        },
    }


def save(report: Mapping[str, Any], path: Path, **facts: Any) -> None:
    """Write the record as JSON, requests counted."""
    requests = Counter(f"{call['method']} {call['path']}" for call in report["requests"])
    record = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **facts, **summary(report)}
    path.write_text(json.dumps(record | {"requests": dict(requests), "steps": report["steps"]}, indent=1) + "\n")


def plot(report: Mapping[str, Any], path: Path, *, title: str) -> None:
    """Write a PNG. Needs matplotlib (the extra `plot`)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = report["steps"]
    at = [step["step"] for step in steps]
    figure, (reward, agreement, seconds) = plt.subplots(3, 1, figsize=(8, 8), sharex=True, layout="constrained")
    reward.plot(at, [step["reward"] for step in steps], marker="o")
    reward.set(ylabel="reward", ylim=(0, 1), title=title)
    for which in ("max", "mean"):
        agreement.plot(at, [step[f"logprob_difference_{which}"] for step in steps], marker=".", label=which)
    agreement.axhline(MAX_LOGPROB_DIFFERENCE, color="grey", linestyle=":", label="limit")
    agreement.set(ylabel="difference of log-probabilities", yscale="log")
    below = [0.0] * len(steps)
    for phase in (*PHASES, "train"):
        tall = [_seconds(step, phase) for step in steps[1:]]  # the first step has the start in it
        seconds.bar(at[1:], tall, bottom=below[1:], label=phase)
        below[1:] = [a + b for a, b in zip(below[1:], tall, strict=True)]
    seconds.set(ylabel="seconds of a step", xlabel="step")
    agreement.legend(fontsize="small")
    seconds.legend(fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _seconds(step: Mapping[str, Any], phase: str) -> float:
    if phase == "train":
        return max(0.0, step["step_s"] - sum(step["seconds"].values()))
    return step["seconds"].get(phase, 0.0)
