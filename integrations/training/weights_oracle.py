#!/usr/bin/env python3
"""Every token of many streams against an oracle, while the weights change under them.

    python integrations/training/weights_oracle.py                            # a random model on this machine's CPU
    python integrations/training/weights_oracle.py -- --device cuda --dtype float32 --mem-fraction-static 0.3
    python integrations/training/weights_oracle.py --max-difference 0.4 -- --device cuda --dtype bfloat16
    python integrations/training/weights_oracle.py --model FOLDER --url URL   # a server that serves FOLDER already

Streams run while a trainer swaps two known sets of weights again and again. An answer says which weights sampled each
of its tokens (`weights_versions`). transformers computes the same: the keys and values so far with the weights of their
time, the next token with those that the answer names. So a token of stale weights, a label that is off by one token, a
page of other weights, and a lost token all show. Needs the environment of `make dev`.
"""

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from servers import ServerProcess  # noqa: E402

SETS = ("A", "B")
NUM_PROMPT = 24
STEP_TOKENS = 4  # of each stream between two updates
LIMIT_S = 300.0
SAFETENSORS = {"content-type": "application/vnd.safetensors"}


@dataclass(slots=True)
class Stream:
    """One request, and what came of it so far. `metadata` and `finish` are those of its end."""

    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    finish: str | None = None

    def take(self, event: dict[str, Any]) -> None:
        """One event of the stream."""
        (choice,) = event["choices"]
        self.ids += choice.get("token_ids", ())
        if choice["logprobs"] is not None:
            self.logprobs += choice["logprobs"]["token_logprobs"]
        if choice["finish_reason"] is not None:
            self.finish, self.metadata = choice["finish_reason"], event["metadata"]


@dataclass(frozen=True, slots=True)
class Update:
    """One swap. `after` is what a request says of its weights that was sent after the server's answer."""

    label: str
    paused_s: float
    seconds: float
    after: dict[str, Any]


class Rollouts:
    """The streams of one server and the swaps under them."""

    def __init__(self, url: str, *, num_streams: int, vocab_size: int, headers: dict[str, str] | None = None) -> None:
        self._url, self._headers = url, headers or {}
        self.streams = [
            Stream([3 + (number * 97 + at * 31) % (vocab_size - 3) for at in range(NUM_PROMPT)])
            for number in range(num_streams)
        ]
        self.updates: list[Update] = []

    async def run(self, bodies: dict[str, bytes], *, num_updates: int) -> None:
        """Swap `num_updates` times, each after every stream has had some tokens since the last; then end all."""
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._url, timeout=LIMIT_S, limits=limits, trust_env=False) as client:
            retractions = await _num_retractions(client)
            tasks = [asyncio.ensure_future(self._follow(client, n, it)) for n, it in enumerate(self.streams)]
            try:
                await self._wait_for_tokens(tasks)
                for number in range(num_updates):
                    await self._swap(client, SETS[(number + 1) % 2], number + 1, bodies)
                    await self._wait_for_tokens(tasks)
                (await client.post("/abort_request", json={"rid": "oracle-"}, headers=self._headers)).raise_for_status()
                await asyncio.wait_for(asyncio.gather(*tasks), LIMIT_S)
            finally:
                for task in tasks:
                    task.cancel()
            if await _num_retractions(client) != retractions:  # their keys and values were computed again
                raise RuntimeError("the server has too few pages for these streams: raise --max-total-tokens")

    async def _follow(self, client: httpx.AsyncClient, number: int, stream: Stream) -> None:
        body = _request(stream.prompt, 100_000) | {"stream": True, "rid": f"oracle-{number}"}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            rest = b""
            async for chunk in response.aiter_bytes():  # not by lines: texts hold other ends of lines
                *events, rest = (rest + chunk).split(b"\n\n")
                for event in events:
                    if event.startswith(b"data: {"):
                        stream.take(json.loads(event[len(b"data: ") :]))

    async def _wait_for_tokens(self, tasks: Sequence["asyncio.Future[None]"]) -> None:
        wanted = [len(stream.ids) + STEP_TOKENS for stream in self.streams]
        deadline_s = time.monotonic() + LIMIT_S
        while any(len(stream.ids) < least for stream, least in zip(self.streams, wanted, strict=True)):
            if (ended := next((task for task in tasks if task.done()), None)) is not None:
                ended.result()
                raise RuntimeError("a stream ended by itself")
            if time.monotonic() > deadline_s:
                raise TimeoutError("the streams stand still")
            await asyncio.sleep(0.01)

    async def _swap(self, client: httpx.AsyncClient, which: str, number: int, bodies: dict[str, bytes]) -> None:
        label, began_s = f"{which}-{number}", time.monotonic()
        response = await client.post(
            "/update_weights_from_tensor", params={"weight_version": label}, content=bodies[which],
            headers=SAFETENSORS | self._headers,
        )  # fmt: skip
        response.raise_for_status()
        took_s = time.monotonic() - began_s
        prompt = [3 + (number * 53 + at * 17) % 200 for at in range(NUM_PROMPT)]
        after = (await client.post("/v1/completions", json=_request(prompt, 3))).raise_for_status().json()
        self.updates.append(Update(label, response.json()["paused_s"], took_s, after["metadata"]))


async def _num_retractions(client: httpx.AsyncClient) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("headwater_num_retractions_total"))


def _request(prompt: list[int], num_tokens: int) -> dict[str, Any]:
    return {
        "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "logprobs": 0,
        "return_token_ids": True, "return_partial_on_abort": True,
    }  # fmt: skip


@dataclass(slots=True)
class Verdict:
    """`problems` is empty if no token was lost or stale. `gap`: how far the other weights' log-probabilities are."""

    problems: list[str] = field(default_factory=list)
    num_tokens: int = 0
    num_spans: int = 0
    largest_difference: float = 0.0
    smallest_gap: float = float("inf")


def judge(rollouts: Rollouts, models: dict[str, PreTrainedModel], *, max_difference: float) -> Verdict:
    """Compare every token with transformers."""
    verdict = Verdict()
    labels = ["", *(update.label for update in rollouts.updates)]
    for number, stream in enumerate(rollouts.streams):
        found = _judge_stream(stream, labels, models, verdict, max_difference=max_difference)
        verdict.problems += [f"stream {number}: {problem}" for problem in found]
    for update in rollouts.updates:
        if update.after != {"weight_version": update.label}:
            verdict.problems.append(f"a request sent after {update.label} was in place: {update.after}")
    if verdict.smallest_gap < 10 * max_difference:
        verdict.problems.append(f"the two sets are too alike to tell: {verdict.smallest_gap:.4f}")
    return verdict


def _judge_stream(
    stream: Stream, labels: list[str], models: dict[str, PreTrainedModel], verdict: Verdict, *, max_difference: float
) -> list[str]:
    ids = stream.ids
    if stream.finish != "abort" or len(ids) != len(stream.logprobs):
        return [f"ended by {stream.finish} with {len(ids)} tokens and {len(stream.logprobs)} log-probabilities"]
    spans = [(label if label in labels else "", first) for label, first in stream.metadata["weights_versions"]]
    firsts = [first for _, first in spans]
    if [label for label, _ in spans] != labels or firsts != sorted(set(firsts)) or firsts[-1] >= len(ids):
        return [f"weights {spans} of {len(ids)} tokens, swaps {labels}"]
    differences, gaps = differences_of(stream.prompt, ids, stream.logprobs, spans, models)
    verdict.num_tokens += len(ids)
    verdict.num_spans += len(spans)
    verdict.largest_difference = max(verdict.largest_difference, max(differences))
    verdict.smallest_gap = min(verdict.smallest_gap, *gaps)
    wrong = [at for at, difference in enumerate(differences) if not difference <= max_difference]
    return [f"{len(wrong)} wrong tokens of {len(ids)}, the first is {wrong[0]}; weights {spans}"] if wrong else []


@torch.inference_mode()
def differences_of(
    prompt: list[int],
    ids: list[int],
    logprobs: list[float],
    spans: list[tuple[str, int]],
    models: dict[str, PreTrainedModel],
) -> tuple[list[float], list[float]]:
    """For each token, how far its log-probability is from the oracle's; for each span, how far it is from the mean of
    the other weights' (over the same keys and values)."""
    cache, differences, gaps = DynamicCache(), [], []
    tokens = [*prompt, *ids]
    for (label, first), (_, behind) in zip(spans, [*spans[1:], ("", len(ids))], strict=True):
        which = label[:1] or SETS[0]
        begins = 0 if first == 0 else len(prompt) + first - 1
        inputs = torch.tensor([tokens[begins : len(prompt) + behind - 1]])
        targets = torch.tensor(ids[first:behind])
        said = torch.tensor(logprobs[first:behind])
        other = models[SETS[1 - SETS.index(which)]]
        elsewhere = _logprobs(other, inputs, targets, cache)
        cache.crop(-inputs.shape[1])
        computed = _logprobs(models[which], inputs, targets, cache)
        differences += (computed - said).abs().tolist()
        gaps.append(float((elsewhere - said).abs().mean()))
    return differences, gaps


def _logprobs(
    model: PreTrainedModel, inputs: torch.Tensor, targets: torch.Tensor, cache: DynamicCache
) -> torch.Tensor:
    logits = model(inputs, past_key_values=cache, use_cache=True).logits[0, -len(targets) :].float()
    return logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]


def two_sets(folder: Path, *, seed: int = 7) -> dict[str, PreTrainedModel]:
    """The served model, set A, and random weights of the same shapes and sizes, set B; in float32."""
    served = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    other = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), served.parameters(), strict=True):
            scale = theirs.std() if theirs.dim() > 1 else 0.0
            mine.copy_(torch.randn_like(theirs) * scale + (theirs.mean() if theirs.dim() == 1 else 0.0))
    return dict(zip(SETS, (served, other), strict=True))


def bodies_of(models: dict[str, PreTrainedModel], dtype: torch.dtype) -> dict[str, bytes]:
    """Each set as a safetensors body."""
    return {
        name: safetensors.torch.save({key: value.detach().to(dtype) for key, value in model.named_parameters()})
        for name, model in models.items()
    }


def write_model(folder: Path) -> None:
    """A random Llama with a long context. It needs no tokenizer: prompts are token ids."""
    from tiny_policy import write_tiny_policy

    write_tiny_policy(folder)
    config = LlamaConfig.from_pretrained(folder)
    config.initializer_range, config.max_position_embeddings = 0.15, 16384
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--max-difference", type=float, default=1e-3, help="of a log-probability")
    parser.add_argument("--model", type=Path, help="a folder; default: a random model")
    parser.add_argument("--url", help="of a server that serves --model; default: one is started")
    parser.add_argument("serve", nargs="*", help="arguments of `headwater serve`, after --")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = args.model or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headwater-oracle-")))
        if args.model is None:
            write_model(folder)
        models = two_sets(folder)
        url = args.url
        if url is None:
            wanted = args.serve or ["--dtype", "float32"]
            server = ServerProcess(
                "-m", "headwater", "serve", "--model", str(folder), "--max-running-requests", str(args.streams + 1),
                "--max-total-tokens", str(4096 * args.streams), "--chunked-prefill-size", "8192", *wanted,
            )  # fmt: skip
            url = stack.enter_context(server).wait_healthy().url
        rollouts = Rollouts(url, num_streams=args.streams, vocab_size=models["A"].config.vocab_size)
        dtype = torch.bfloat16 if "bfloat16" in args.serve else torch.float32
        if dtype is torch.bfloat16:  # the oracle has the numbers that the server gets
            for model in models.values():
                model.load_state_dict({key: value.to(dtype).float() for key, value in model.state_dict().items()})
        asyncio.run(rollouts.run(bodies_of(models, dtype), num_updates=args.updates))
    verdict = judge(rollouts, models, max_difference=args.max_difference)
    pauses = sorted(update.paused_s for update in rollouts.updates)
    took = sorted(update.seconds for update in rollouts.updates)
    print(f"{len(rollouts.streams)} streams, {len(rollouts.updates)} swaps, {verdict.num_tokens} tokens")
    print(f"log-probabilities differ by at most {verdict.largest_difference:.2e}")
    print(f"those of the other weights by {verdict.smallest_gap:.2f} at least (mean of a span)")
    middle = len(took) // 2
    print(f"nothing generated for {pauses[middle]:.4f} s (median), an update took {took[middle]:.3f} s")
    print("\n".join(verdict.problems[:20]) or "none lost, none stale")
    return 1 if verdict.problems else 0


if __name__ == "__main__":
    sys.exit(main())
