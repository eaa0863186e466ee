"""trl trains against a real server (`make training`): its own client, weights pushed after every step, nothing polled.

A server whose weights lag a step, or that serves KV of the weights before, shows in the log-probabilities at once.
"""

import os
import sys
from pathlib import Path

import pytest
from running_server import RunningServer

ROOT = Path(__file__).parents[3]
sys.path.append(str(ROOT / "integrations"))
sys.path.append(str(ROOT / "integrations" / "training"))

from grpo_on_cpu import PYTHON, SERVER_ARGUMENTS, train  # noqa: E402
from grpo_report import EACH_STEP, MAX_LOGPROB_DIFFERENCE, mean_reward, problems  # noqa: E402
from tiny_policy import write_tiny_policy  # noqa: E402

pytestmark = pytest.mark.slow
NUM_STEPS = 12
LEARNING_RATE = 1e-2  # higher than in the run that is kept: 12 steps go from 0.1 to 0.9, whatever is sampled


@pytest.mark.timeout(900)  # three processes, on a machine that may be busy
def test_trl_trains_with_rollouts_of_this_server(tmp_path: Path) -> None:
    if not PYTHON.exists():
        if os.environ.get("CI") == "true":
            pytest.fail("CI needs the environment of `make training`")
        pytest.skip("no trl here: run `make training`")
    write_tiny_policy(tmp_path / "model")
    with RunningServer("--model", str(tmp_path / "model"), *SERVER_ARGUMENTS) as server:
        server.wait_healthy()
        report = train(server.url, tmp_path, num_steps=NUM_STEPS, learning_rate=LEARNING_RATE)
        state = server.get("/server_info").json()["internal_states"][0]
        assert (state["blockers"], state["paused"]) == ({}, False)
    assert problems(report, num_steps=NUM_STEPS) == []


def step(number: int, reward: float, difference: float = 1e-6) -> dict[str, object]:
    return {"step": number, "reward": reward, "logprob_difference_max": difference}


def test_what_a_run_must_show() -> None:
    """The judge of the test above: a reward that stays, a stale rollout, a call too many, a call refused."""
    good = [step(number, 0.1 * number) for number in range(1, 7)]
    calls = ["/health", "/v1/models", *["/server_info"] * 2, "/get_world_size", "/init_weight_transfer_engine"]
    calls += [path for path in EACH_STEP for _ in range(6)]
    requests = [{"path": path, "status": 200} for path in calls]
    assert problems({"steps": good, "requests": requests}, num_steps=6) == []
    assert mean_reward(good[:3]) == pytest.approx(0.2)
    for steps, sent in (
        ([step(number, 0.5) for number in range(1, 7)], requests),
        ([*good[:5], step(6, 0.6, 2 * MAX_LOGPROB_DIFFERENCE)], requests),
        ([*good[:5], step(6, 0.6, float("nan"))], requests),
        (good[:5], requests),
        (good, [*requests, {"path": "/health", "status": 200}]),
        (good, requests[1:]),
        (good, [*requests[1:], {"path": "/health", "status": 503}]),
    ):
        assert len(problems({"steps": steps, "requests": sent}, num_steps=6)) >= 1
