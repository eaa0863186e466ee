#!/usr/bin/env python3
"""Text of eight LoRA adapters in one mixed batch of a server, against PEFT; and a reload in the middle of streams.

    check_text.py OUT.json [--device cuda|cpu] [--rows 64] [--tokens 600] [--rank 16] [--option ...]

A server with a small random model in float32 streams `--rows` greedy answers, whose requests have the adapters in turn.
In the middle one adapter is replaced by another content. Streams that have begun must end on the old content, new
requests must have the new one, with none of the old content's KV. Every token is judged by the logits of transformers
with PEFT (merged weights where PEFT is missing): it has the largest, or one that is closer to it than rounding is.
"""

import argparse
import asyncio
import importlib.util
import json
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks" / "gpu"), str(ROOT / "tests")]

import served  # noqa: E402
import torch  # noqa: E402
from shapes import make_model  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel  # noqa: E402

from tiny_models import make_adapter, merged  # noqa: E402

NUM_ADAPTERS = 8
ROUNDING = 1e-3  # of logits of a few units: float32 sums in another order differ by less
RELOADED = "a0"
BEFORE_RELOAD = 16  # tokens of each stream


@dataclass
class Stream:
    """One answer as it comes."""

    adapter: str
    prompt: list[int]
    output: list[int] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--option", nargs="*", default=[], help="further options of the server")
    options = parser.parse_args(argv)
    served.PORT = free_port()
    with tempfile.TemporaryDirectory() as root:
        report = check(Path(root), options)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return 0 if report["is_right"] else 1


def check(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    folder = make_model("small", root)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval().float()
    model.save_pretrained(folder)
    names = [f"a{index}" for index in range(NUM_ADAPTERS)]
    adapters = {
        name: make_adapter(model, root / name, rank=options.rank, seed=seed, size=0.05)
        for seed, name in enumerate([*names, "new"], 1)
    }
    paths = ",".join(f"{name}={adapters[name]}" for name in names)
    flags = ["--dtype", "float32", "--lora-paths", paths, "--max-lora-rank", str(options.rank), "--page-size", "16"]
    flags += ["--max-running-requests", str(options.rows), "--max-total-tokens", str(2 * options.rows * 1024)]
    prompts = [torch.randint(3, 4000, (int(length),)).tolist() for length in torch.randint(5, 90, (options.rows,))]
    streams = [Stream(names[index % NUM_ADAPTERS], prompt) for index, prompt in enumerate(prompts)]
    with served.serve(
        folder, device=options.device, load_format="auto", context_length=2048, options=[*flags, *options.option]
    ) as server:
        reload = asyncio.run(run(streams, adapters["new"], num_tokens=options.tokens))
    place = torch.device(options.device)
    texts, reference = judge(model.to(place), adapters, streams)
    new = Stream("new", prompts[0], reload.pop("new_output"))
    newer, _ = judge(model, adapters, [new])
    report = {
        "start_s": round(server.start_s, 1),
        "reference": reference,
        "rows": options.rows,
        "texts": texts,
        "reload": reload | {"new_text": newer, "tokens_differ": new.output != streams[0].output[: len(new.output)]},
    }
    report["is_right"] = (
        texts["num_wrong"] == newer["num_wrong"] == 0
        and reload["num_running_at_reload"] == options.rows
        and reload["cached_tokens_after_reload"] == 0
        and all(len(stream.output) == options.tokens for stream in streams)
        and report["reload"]["tokens_differ"]
    )
    return report


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


async def run(streams: Sequence[Stream], new: Path, *, num_tokens: int) -> dict[str, Any]:
    """All streams at once, and the reload when each of them has begun."""
    tasks = [asyncio.create_task(follow(stream, num_tokens=num_tokens)) for stream in streams]
    while min(len(stream.output) for stream in streams) < BEFORE_RELOAD:
        for task in tasks:
            if task.done():
                task.result()
        await asyncio.sleep(0.001)
    began_s = time.perf_counter()
    body = {"lora_name": RELOADED, "lora_path": str(new), "load_inplace": True}
    loaded = await asyncio.to_thread(post, "/v1/load_lora_adapter", body)
    took_s = time.perf_counter() - began_s
    lengths = [len(stream.output) for stream in streams]
    after = Stream(RELOADED, streams[0].prompt)
    await follow(after, num_tokens=num_tokens // 4)
    await asyncio.gather(*tasks)
    again = Stream(RELOADED, streams[0].prompt)
    await follow(again, num_tokens=num_tokens // 4)
    assert again.output == after.output, "the same request has another text in the same content"
    return {
        "reload_s": round(took_s, 3),
        "num_running_at_reload": sum(length < num_tokens for length in lengths),
        "tokens_at_reload": [min(lengths), max(lengths)],
        "num_kept": loaded["num_kept"],
        "is_changed": loaded["is_changed"],
        "cached_tokens_after_reload": after.meta["cached_tokens"],
        "new_output": after.output,
    }


async def follow(stream: Stream, *, num_tokens: int) -> None:
    """Send a request and note its tokens as they come."""
    sampling = {"temperature": 0, "ignore_eos": True, "max_new_tokens": num_tokens}
    body = {"input_ids": stream.prompt, "sampling_params": sampling, "lora_path": stream.adapter, "stream": True}
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", served.PORT, limit=1 << 24)
    head = "POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
    told = await reader.readline()
    assert b" 200 " in told, told + await reader.read()
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            stream.output, stream.meta = event["output_ids"], event["meta_info"]
    writer.close()


def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(f"http://127.0.0.1:{served.PORT}{path}", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    request.add_header("Accept", "application/json")
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


def judge(model: PreTrainedModel, adapters: dict[str, Path], streams: Sequence[Stream]) -> tuple[dict[str, Any], str]:
    """How far the tokens of the streams are from the reference's choice, each behind the tokens before it."""
    logits_of, reference = reference_logits(model, adapters, {stream.adapter for stream in streams})
    num_tokens, num_ties, num_wrong, largest = 0, 0, 0, 0.0
    for stream in sorted(streams, key=lambda it: it.adapter):
        logits = logits_of(stream.adapter, [*stream.prompt, *stream.output])[len(stream.prompt) - 1 : -1]
        chosen = torch.tensor(stream.output, device=logits.device)
        gaps = logits.max(dim=-1).values - logits.gather(1, chosen[:, None])[:, 0]
        num_tokens += len(stream.output)
        num_ties += int(((gaps > 0) & (gaps < ROUNDING)).sum())
        num_wrong += int((gaps >= ROUNDING).sum())
        largest = max(largest, float(gaps.max()))
    counts = {"num_tokens": num_tokens, "num_ties": num_ties, "num_wrong": num_wrong}
    return counts | {"largest_gap": round(largest, 6)}, reference


def reference_logits(
    model: PreTrainedModel, adapters: dict[str, Path], names: set[str]
) -> tuple[Callable[[str, list[int]], torch.Tensor], str]:
    """Logits float32[T, vocab] of token ids under an adapter, and what computes them."""
    peft_model: Any = None
    if importlib.util.find_spec("peft") is not None:
        import peft

        for name in sorted(names):
            if peft_model is None:
                peft_model = peft.PeftModel.from_pretrained(model, adapters[name], adapter_name=name).eval()
            else:
                peft_model.load_adapter(adapters[name], adapter_name=name)
    found: dict[str, PreTrainedModel] = {}

    @torch.inference_mode()
    def logits_of(name: str, token_ids: list[int]) -> torch.Tensor:
        ids = torch.tensor([token_ids], device=model.device)
        if peft_model is not None:
            peft_model.set_adapter(name)
            return peft_model(ids).logits[0]
        if name not in found:
            found.clear()
            found[name] = merged(model, adapters[name])
        return found[name](ids).logits[0]

    return logits_of, "merged weights" if peft_model is None else f"peft {peft.__version__}"


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = False
    sys.exit(main(sys.argv[1:]))
