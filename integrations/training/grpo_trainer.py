"""A GRPO run by trl's own trainer, whose rollouts come from a Headwater server: `--url`, `--model`, `--report`.

Runs in the environment of `make training`, with stand_ins/ on its path, as a process of its own. It teaches a model to
write small letters. The report has, for each step, the reward, how far the server's log-probabilities are from the
trainer's own, and the time of each phase; and every request that was sent.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient

PROMPTS = ("Once upon a time", "The weather today is", "She opened the door and", "A list of words:")
SMALL_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz")

sent: list[dict[str, Any]] = []  # every request of this process
spent_s: dict[str, float] = {}  # of the step under way, by phase


class TimedClient(VLLMClient):
    """trl's client, with its phases timed. On a CPU the group is gloo's, so no device is chosen."""

    def init_communicator(self, device: Any = 0) -> None:
        super().init_communicator(device="cuda")  # a name only: trl refuses others, and the stand-in needs none

    def generate(self, *args: Any, **more: Any) -> Any:
        return timed("generate", super().generate, *args, **more)

    def update_named_params(self, *args: Any, **more: Any) -> Any:
        return timed("update", super().update_named_params, *args, **more)

    def reset_prefix_cache(self) -> Any:
        return timed("reset", super().reset_prefix_cache)


def timed(phase: str, call: Any, *args: Any, **more: Any) -> Any:
    began_s = time.monotonic()
    try:
        return call(*args, **more)
    finally:
        spent_s[phase] = spent_s.get(phase, 0.0) + time.monotonic() - began_s


class Steps(TrainerCallback):
    """The facts of each step, as trl logs them."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self._began_s = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        if "reward" not in logs:
            return  # the summary of the run
        now_s = time.monotonic()
        self.done.append(
            {
                "step": state.global_step,
                "reward": float(logs["reward"]),
                "logprob_difference_max": float(logs["sampling/sampling_logp_difference/max"]),
                "logprob_difference_mean": float(logs["sampling/sampling_logp_difference/mean"]),
                "num_tokens": float(logs["num_tokens"]),
                "seconds": {name: round(value, 4) for name, value in spent_s.items()},
                "step_s": round(now_s - self._began_s, 4),
            }
        )
        spent_s.clear()
        self._began_s = now_s


def record_requests() -> None:
    """Keep method, path and time of every request of this process."""
    send = requests.Session.send

    def send_and_keep(self: requests.Session, request: requests.PreparedRequest, **more: Any) -> requests.Response:
        began_s = time.monotonic()
        answer = send(self, request, **more)
        path, took_s = urlsplit(str(request.url)).path, round(time.monotonic() - began_s, 4)
        sent.append({"method": request.method, "path": path, "status": answer.status_code, "seconds": took_s})
        return answer

    requests.Session.send = send_and_keep  # type: ignore[method-assign]


def letters(completions: list[str], **_: Any) -> list[float]:
    """The share of small letters in a text, of as many as it could have."""
    return [sum(char in SMALL_LETTERS for char in text) / MAX_TOKENS for text in completions]


MAX_TOKENS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--group-port", type=int, default=51216)
    args = parser.parse_args()
    record_requests()
    vllm_generation.VLLMClient = TimedClient
    steps = Steps()
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, max_steps=args.steps, seed=1, use_cpu=True, bf16=False, report_to="none",
            logging_steps=1, save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
            learning_rate=args.learning_rate,
            per_device_train_batch_size=32, num_generations=8, max_completion_length=MAX_TOKENS, temperature=1.0,
            beta=0.0, gradient_checkpointing=False,
            use_vllm=True, vllm_mode="server", vllm_server_base_url=args.url, vllm_group_port=args.group_port,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=args.model,
            args=config,
            reward_funcs=letters,
            train_dataset=Dataset.from_list([{"prompt": PROMPTS[i % len(PROMPTS)]} for i in range(4 * args.steps)]),
            processing_class=AutoTokenizer.from_pretrained(args.model),
            callbacks=[steps],
        )
        trainer.train()
    args.report.write_text(json.dumps({"steps": steps.done, "requests": sent}))


if __name__ == "__main__":
    main()
