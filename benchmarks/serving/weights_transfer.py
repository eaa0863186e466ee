#!/usr/bin/env python3
"""Weights from a trainer to a server of its own process, while streams run: GB/s, and the time without tokens.

weights_transfer.py --shape qwen3-0.6b                         a CPU: safetensors bodies, shared memory, gloo
weights_transfer.py --shape llama3.1-8b --device cuda --ways body,shared,ipc
weights_transfer.py --shape llama3.1-8b --device cuda --ways nccl,vllm    the trainer on the second card

Two sets of random weights are sent by turns. Each is a bracket of buckets. After each update:

* every stream that ran across it has ended with all its tokens, and says at which token the weights changed;
* fixed tokens behind a fixed prompt, whose pages are in the cache, have the log-probabilities of the set that was sent,
  as at its first time (no page of other weights was matched).

Beside each way stands a plain copy of the same bytes, measured between the rounds: `copy` writes them to shared memory,
`socket` sends them through a socket of this host into shared memory, `gpu_to_host` copies them out of a card.
"""

import argparse
import asyncio
import base64
import io
import json
import math
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
import types
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import safetensors.torch
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

sys.path.append(str(Path(__file__).resolve().parents[1] / "gpu"))
sys.path.append(str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parents[2] / "integrations" / "training" / "stand_ins"))
from served import PORT, serve
from shapes import SHAPES, make_model

from headwater.models.loader import read_config, resolve_model
from steady_streams import Streams

BUCKET_BYTES = 512 << 20
PROMPT = [100 + (37 * i) % 400 for i in range(96)]
CONTINUATION = [300 + (53 * i) % 400 for i in range(8)]
URL = f"http://127.0.0.1:{PORT}"
KEY = "root"
SHARED = Path("/dev/shm")
LIMITS = httpx.Limits(max_connections=256)
Tensors = dict[str, torch.Tensor]
Send = Callable[[httpx.AsyncClient, Tensors], Awaitable[None]]


def buckets_of(tensors: Tensors) -> Iterator[Tensors]:
    bucket: Tensors = {}
    for name, tensor in tensors.items():
        if bucket and sum(each.nbytes for each in bucket.values()) + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = {}
        bucket[name] = tensor
    yield bucket


async def post(http: httpx.AsyncClient, path: str, **more: Any) -> dict[str, Any]:
    answer = await http.post(URL + path, timeout=600, **more)
    if answer.status_code != 200:
        raise RuntimeError(f"{path}: {answer.status_code} {answer.text[:500]}")
    return answer.json()


# --- the ways --------------------------------------------------------------------------------------------------------


async def send_body(http: httpx.AsyncClient, bucket: Tensors) -> None:
    data = await asyncio.to_thread(safetensors.torch.save, {name: tensor.cpu() for name, tensor in bucket.items()})
    headers = {"content-type": "application/vnd.safetensors"}
    await post(http, "/update_weights_from_tensor", content=data, headers=headers)


async def send_shared(http: httpx.AsyncClient, bucket: Tensors) -> None:
    path = SHARED / f"trainer-{os.getpid()}.safetensors"
    try:
        await asyncio.to_thread(safetensors.torch.save_file, {n: t.cpu() for n, t in bucket.items()}, path)
        await post(http, "/update_weights_from_tensor", json={"safetensors_path": str(path), "take": True})
    finally:
        path.unlink(missing_ok=True)


async def send_handles(http: httpx.AsyncClient, bucket: Tensors) -> None:
    """SGLang's form: handles of CUDA, or names of PyTorch's shared memory."""
    from multiprocessing.reduction import ForkingPickler

    out = io.BytesIO()
    ForkingPickler(out).dump(list(bucket.items()))
    body = {"serialized_named_tensors": [base64.b64encode(out.getvalue()).decode()]}
    await post(http, "/update_weights_from_tensor", json=body)


class FlattenedTensorMetadata:
    """SGLang's class, as pickles name it: where a tensor lies in a flattened bucket."""

    __module__ = "sglang.srt.weight_sync.tensor_bucket"

    def __init__(self, **facts: Any) -> None:
        self.__dict__ |= facts


def know_sglangs_module() -> None:
    """Python pickles a class by the name of a module that it can find."""
    for name in ("sglang", "sglang.srt", "sglang.srt.weight_sync", FlattenedTensorMetadata.__module__):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules[FlattenedTensorMetadata.__module__].FlattenedTensorMetadata = FlattenedTensorMetadata  # type: ignore[attr-defined]


async def send_flattened(http: httpx.AsyncClient, bucket: Tensors) -> None:
    """One handle for all tensors of a bucket, as SGLang's trainers send them by default."""
    from multiprocessing.reduction import ForkingPickler

    know_sglangs_module()
    flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in bucket.values()])
    metadata, at = [], 0
    for name, tensor in bucket.items():
        size = tensor.nbytes
        facts = {"name": name, "shape": tensor.shape, "dtype": tensor.dtype, "start_idx": at, "end_idx": at + size}
        metadata.append(FlattenedTensorMetadata(**facts, numel=size))
        at += size
    if flat.is_cuda:
        torch.cuda.synchronize(flat.device)
    out = io.BytesIO()
    ForkingPickler(out).dump({"flattened_tensor": flat, "metadata": metadata})
    payload = base64.b64encode(out.getvalue()).decode()
    body = {"serialized_named_tensors": [payload], "load_format": "flattened_bucket"}
    await post(http, "/update_weights_from_tensor", json=body)


class Group:
    """The trainer's side of a process group, as SGLang's trainers make it."""

    name = "trainer"

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._group: Any = None

    async def join(self, http: httpx.AsyncClient) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        body = {
            "master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2,
            "group_name": "trainer", "backend": self.backend,
        }  # fmt: skip
        await asyncio.gather(post(http, "/init_weights_update_group", json=body), asyncio.to_thread(self._make, port))

    async def send(self, http: httpx.AsyncClient, bucket: Tensors) -> None:
        flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in bucket.values()])
        body = {
            "names": list(bucket),
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in bucket.values()],
            "shapes": [list(tensor.shape) for tensor in bucket.values()],
            "group_name": "trainer", "load_format": "flattened_bucket",
        }  # fmt: skip
        call = post(http, "/update_weights_from_distributed", json=body)
        await asyncio.gather(call, asyncio.to_thread(self._broadcast, flat))

    def _make(self, port: int) -> None:
        timeout = timedelta(seconds=120)
        store, rank, size = next(c10d.rendezvous(f"tcp://127.0.0.1:{port}", 0, 2, timeout=timeout))
        prefixed = c10d.PrefixStore("trainer", store)
        self._group, _ = c10d._new_process_group_helper(
            size, rank, [], c10d.Backend(self.backend), prefixed, group_name="trainer", timeout=timeout
        )
        c10d._world.pg_group_ranks[self._group] = {0: 0, 1: 1}

    def _broadcast(self, flat: torch.Tensor) -> None:
        if flat.is_cuda:
            torch.cuda.set_device(flat.device)
        dist.broadcast(flat, group_src=0, group=self._group)
        if flat.is_cuda:
            torch.cuda.synchronize(flat.device)


class VllmGroup(Group):
    """The trainer's side of vLLM's calls, as trl makes them: the stand-in for the package speaks NCCL on GPUs."""

    name = "vllm"

    async def join(self, http: httpx.AsyncClient) -> None:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        info = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2, "packed": True}

        def make() -> Any:
            torch.cuda.set_device(self._device)
            return trainer_init(info)

        call = post(http, "/init_weight_transfer_engine", json={"init_info": info})
        _, self._group = await asyncio.gather(call, asyncio.to_thread(make))

    async def send(self, http: httpx.AsyncClient, bucket: Tensors) -> None:
        info = {
            "names": list(bucket),
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in bucket.values()],
            "shapes": [list(tensor.shape) for tensor in bucket.values()],
        }
        call = post(http, "/update_weights", json={"update_info": info})
        await asyncio.gather(call, asyncio.to_thread(self._broadcast_packed, bucket))

    def _broadcast_packed(self, bucket: Tensors) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        torch.cuda.set_device(self._device)
        packed_nccl_broadcast_producer(
            iterator=iter(bucket.items()), group=self._group, src=0, post_iter_func=lambda item: item[1]
        )
        torch.cuda.synchronize(self._device)

    @property
    def _device(self) -> torch.device:
        """The second card, where there is one: NCCL has one rank of a group on a card."""
        return torch.device("cuda", torch.cuda.device_count() - 1)


SENDERS: dict[str, Send] = {
    "body": send_body, "shared": send_shared, "pickle": send_handles, "ipc": send_handles,
    "pickle-flat": send_flattened, "ipc-flat": send_flattened,
}  # fmt: skip


# --- plain copies ----------------------------------------------------------------------------------------------------


def copy_gb_per_s(num_bytes: int) -> float:
    """Bytes of this process, written to a file in shared memory."""
    data = memoryview(bytearray(min(num_bytes, 1 << 30)))
    with tempfile.NamedTemporaryFile(dir=SHARED, buffering=0) as file:
        began_s = time.perf_counter()
        for at in range(0, len(data), 16 << 20):
            file.write(data[at : at + (16 << 20)])
        return len(data) / (time.perf_counter() - began_s) / 1e9


def socket_gb_per_s(num_bytes: int) -> float:
    """Through a socket of this host into shared memory, by two threads."""
    total = min(num_bytes, 1 << 30)
    ours, theirs = socket.create_server(("127.0.0.1", 0)), None
    data = memoryview(bytearray(16 << 20))

    def send() -> None:
        with socket.create_connection(ours.getsockname()) as out:
            for _ in range(max(1, total // len(data))):
                out.sendall(data)

    sender = threading.Thread(target=send)
    with tempfile.NamedTemporaryFile(dir=SHARED, buffering=0) as file:
        began_s = time.perf_counter()
        sender.start()
        theirs, _ = ours.accept()
        buffer, received = memoryview(bytearray(4 << 20)), 0
        while count := theirs.recv_into(buffer):
            file.write(buffer[:count])
            received += count
        took_s = time.perf_counter() - began_s
    sender.join()
    theirs.close()
    ours.close()
    return received / took_s / 1e9


def gpu_to_host_gb_per_s(num_bytes: int) -> float:
    """From a card to pageable host memory that exists already."""
    source = torch.zeros(min(num_bytes, 1 << 30), dtype=torch.uint8, device="cuda")
    target = torch.zeros_like(source, device="cpu")
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    target.copy_(source)
    torch.cuda.synchronize()
    return source.nbytes / (time.perf_counter() - began_s) / 1e9


def device_to_device_gb_per_s(num_bytes: int) -> float:
    """Within a card: what no way through host memory can reach."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    target.copy_(source)
    torch.cuda.synchronize()
    return num_bytes / (time.perf_counter() - began_s) / 1e9


PLAIN = {
    "body": "socket", "gloo": "socket", "shared": "copy", "pickle": "copy", "pickle-flat": "copy",
    "ipc": "gpu_to_host", "ipc-flat": "gpu_to_host", "nccl": "gpu_to_host", "vllm": "gpu_to_host",
}  # fmt: skip
PLAIN_COPIES = {"copy": copy_gb_per_s, "socket": socket_gb_per_s, "gpu_to_host": gpu_to_host_gb_per_s}


# --- a run -----------------------------------------------------------------------------------------------------------


def make_weights(folder: Path, *, seed: int, device: str) -> Tensors:
    torch.manual_seed(seed)
    shapes = read_config(resolve_model(str(folder))).parameter_shapes()
    return {
        name: (
            torch.ones(shape, dtype=torch.bfloat16, device=device)
            if len(shape) == 1
            else torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
        )
        for name, shape in shapes.items()
    }


async def scores_of(http: httpx.AsyncClient) -> list[float]:
    """Log-probabilities of fixed tokens behind the fixed prompt, whose pages the cache has if it was asked before.

    A text would differ by rounding alone, where two tokens are as probable: on a GPU that depends on the batch.
    """
    body = {
        "input_ids": PROMPT + CONTINUATION, "sampling_params": {"temperature": 0, "max_new_tokens": 1},
        "return_logprob": True, "logprob_start_len": len(PROMPT) - 1,
    }  # fmt: skip
    told = (await post(http, "/generate", json=body))["meta_info"]["input_token_logprobs"]
    return [entry[0] for entry in told[-len(CONTINUATION) :]]


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


async def one_update(http: httpx.AsyncClient, send: Send, tensors: Tensors, label: str) -> dict:
    """One bracket. `transfer_s` ends with the last bucket, `end_s` is the end of the bracket."""
    began_s = time.perf_counter()
    await post(http, "/begin_weight_update", json={})
    for bucket in buckets_of(tensors):
        await send(http, bucket)
    sent_s = time.perf_counter()
    ended = await post(http, "/end_weight_update", json={"weight_version": label})
    done_s = time.perf_counter()
    await asyncio.sleep(1.0)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return {
        "gb": num_bytes / 1e9,
        "transfer_s": sent_s - began_s,
        "gb_per_s": num_bytes / (sent_s - began_s) / 1e9,
        "end_s": done_s - sent_s,
        "paused_s": ended["paused_s"],
        "began_s": began_s,
        "done_s": done_s,
    }


async def measure(way: str, sets: Sequence[Tensors], options: argparse.Namespace) -> dict:
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {KEY}"}, trust_env=False, limits=LIMITS) as http:
        group = VllmGroup(way) if way == "vllm" else Group(way) if way in ("gloo", "nccl") else None
        if group is not None:
            await group.join(http)
            send: Send = group.send
        else:
            send = SENDERS[way]
        streams = Streams(URL, options.streams, options.tokens)
        await asyncio.to_thread(streams.wait_until_all_run)
        before_s = time.perf_counter()
        await asyncio.sleep(2.0)
        num_bytes = sum(tensor.nbytes for tensor in sets[0].values())
        rounds, plain = [], []
        scores: list[tuple[int, list[float]]] = []
        for number in range(options.rounds):
            which = number % 2
            plain.append(await asyncio.to_thread(PLAIN_COPIES[PLAIN[way]], num_bytes))
            rounds.append(await one_update(http, send, sets[which], f"set-{which}"))
            scores += [(which, await scores_of(http)) for _ in range(2)]
            print(json.dumps({"way": way, "round": number} | rounds[-1]), flush=True)
        await asyncio.to_thread(streams.end)
        if group is not None:
            await post(http, "/destroy_weights_update_group", json={"group_name": group.name})
    references = dict(reversed(scores))  # of each set, the first
    apart = distance(*references.values()) if len(references) > 1 else math.inf
    distances = [distance(found, references[which]) for which, found in scores]
    rate, base = statistics.median(each["gb_per_s"] for each in rounds[1:] or rounds), statistics.median(plain)
    return {
        "way": way,
        "gb_per_s": round(rate, 2),
        "plain": PLAIN[way],
        "plain_gb_per_s": round(base, 2),
        "of_plain": round(rate / base, 2),
        "paused_s": round(max(each["paused_s"] for each in rounds), 3),
        "longest_gap_s": round(max(streams.longest_gap_s(r["began_s"], r["done_s"] + 0.9) for r in rounds), 3),
        "gap_at_swap_s": round(max(streams.longest_gap_s(r["done_s"] - 1.5, r["done_s"] + 0.9) for r in rounds), 3),
        "usual_gap_s": round(streams.longest_gap_s(before_s, before_s + 2.0), 3),
        "end_s": round(statistics.median(each["end_s"] for each in rounds), 2),
        "streams_ended": streams.num_ended,
        "streams_across": streams.num_mixed,
        "lost": streams.num_lost,
        "stale": sum(each > apart / 8 for each in distances),
        "largest_distance": round(max(distances), 4),  # of log-probabilities from the first of the same weights
        "sets_are_apart_by": round(apart, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b", choices=sorted(SHAPES))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--ways", default="", help=f"of {', '.join(PLAIN)}; default: those of the device")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--streams", type=int, default=0, help="default: 4 on a CPU, 64 on a GPU")
    parser.add_argument("--tokens", type=int, default=0, help="of each stream; default: 48 on a CPU, 512 on a GPU")
    parser.add_argument("--server-options", default="", help="more options of `headwater serve`")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    options = parser.parse_args()
    is_gpu = options.device == "cuda"
    ways = (options.ways or ("body,shared,ipc" if is_gpu else "shared,pickle,body,gloo")).split(",")
    options.streams = options.streams or (64 if is_gpu else 4)
    options.tokens = options.tokens or (512 if is_gpu else 48)
    torch.multiprocessing.set_sharing_strategy("file_system")
    results = []
    with tempfile.TemporaryDirectory() as root:
        folder = make_model(options.shape, Path(root))
        serving = ["--admin-api-key", KEY, "--allow-pickled-tensors", *options.server_options.split()]
        with serve(folder, device=options.device, options=serving):
            for way in ways:
                device = {"ipc": "cuda:0", "nccl": f"cuda:{torch.cuda.device_count() - 1}"}.get(way, "cpu")
                sets = [make_weights(folder, seed=seed, device=device) for seed in (1, 2)]
                results.append({"shape": options.shape} | asyncio.run(measure(way, sets, options)))
                print(json.dumps(results[-1]), flush=True)
                del sets
    if options.out is not None:
        given = {name: str(value) for name, value in vars(options).items()}
        options.out.write_text(json.dumps({"options": given, "results": results}))
    return int(any(result["lost"] or result["stale"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
