#!/usr/bin/env python3
"""Weights from a trainer to a server of its own process, while streams run: GB/s, and the time without tokens.

weights_transfer.py --shape qwen3-0.6b                         a CPU: safetensors bodies, shared memory, gloo
weights_transfer.py --shape llama3.1-8b --device cuda --ways body,shared,ipc
weights_transfer.py --shape llama3.1-8b --device cuda --ways nccl,vllm    the trainer on the second card

Two sets of random weights are sent by turns. Each is a bracket of buckets. After each update:

* every stream that ran across it has ended with all its tokens, and says at which token the weights changed;
* fixed tokens behind a fixed prompt, whose pages are in the cache, have the log-probabilities of the set that was sent,
  as at its first time (no page of other weights was matched).

In the same rounds, beside the same streams, the same bytes are measured without a server:

* `of_plain`: the share of a plain copy. `copy` writes a new file in shared memory, `gpu_to_host` copies out of a card.
* `of_copy_over`: the share of a copy into memory that exists already, the most that a memory can give.
* `of_bare`: the share of the bare transport, between two processes that do nothing else with the bytes. `gloo` is the
  broadcast of the same tensors, `socket` a connection of this host. Ways through shared memory have `copy` for it.

`trainer_cpu_s_per_gb` and `server_cpu_s_per_gb` are seconds of a core that the trainer, and the server's processes that
receive, used for a GB; `plain_`, `copy_over_` and `bare_cpu_s_per_gb` the same without a server (of `bare`, both ends).
They change little on a machine that is busy with something else.

`gloo` broadcasts each tensor from where it lies. `gloo-flat` lays a bucket out as one tensor first
(`load_format: flattened_bucket`), into memory that the trainer keeps.
"""

import argparse
import asyncio
import base64
import contextlib
import http.client as http_client
import io
import itertools
import json
import math
import os
import socket
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
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
from served import PORT, Served, serve
from shapes import SHAPES, make_model

from bare_transport import (
    SHARED,
    BareTransport,
    CopyOver,
    Measure,
    as_bytes,
    copy_gb_per_s,
    gpu_to_host_gb_per_s,
    num_bytes_of,
)
from headwater.bench.machine import cpu_s
from headwater.devices.safetensors_header import build_header
from headwater.models.loader import read_config, resolve_model
from headwater.transports.receivers import safetensors_dtypes
from steady_streams import Streams

BUCKET_BYTES = 512 << 20
PROMPT = [100 + (37 * i) % 400 for i in range(96)]
CONTINUATION = [300 + (53 * i) % 400 for i in range(8)]
URL = f"http://127.0.0.1:{PORT}"
KEY = "root"
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
    """From the tensors' memory: `safetensors.torch.save` would copy each of them twice first."""
    status, text = await asyncio.to_thread(_post_bucket, {name: tensor.cpu() for name, tensor in bucket.items()})
    if status != 200:
        raise RuntimeError(f"/update_weights_from_tensor: {status} {text[:500]}")


def _post_bucket(bucket: Tensors) -> tuple[int, str]:
    dtypes = safetensors_dtypes([str(tensor.dtype) for tensor in bucket.values()])
    header = build_header(
        (name, dtype, tuple(tensor.shape)) for (name, tensor), dtype in zip(bucket.items(), dtypes, strict=True)
    )
    num_bytes = len(header) + sum(tensor.nbytes for tensor in bucket.values())
    connection = http_client.HTTPConnection("127.0.0.1", PORT, timeout=600)
    headers = {
        "content-type": "application/vnd.safetensors", "content-length": str(num_bytes),
        "authorization": f"Bearer {KEY}",
    }  # fmt: skip
    pieces = itertools.chain([header], (memoryview(as_bytes(tensor).numpy()) for tensor in bucket.values()))
    with contextlib.closing(connection):
        connection.request("POST", "/update_weights_from_tensor", body=pieces, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


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

    def __init__(self, way: str) -> None:
        self.name = way  # PyTorch makes a group of a name once in a process
        self.backend = way.removesuffix("-flat")
        self._is_flat = way.endswith("-flat") or way == "nccl"
        self._flat: torch.Tensor | None = None
        self._group: Any = None

    async def join(self, http: httpx.AsyncClient) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        body = {
            "master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2,
            "group_name": self.name, "backend": self.backend,
        }  # fmt: skip
        await asyncio.gather(post(http, "/init_weights_update_group", json=body), asyncio.to_thread(self._make, port))

    async def send(self, http: httpx.AsyncClient, bucket: Tensors) -> None:
        body = {
            "names": list(bucket),
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in bucket.values()],
            "shapes": [list(tensor.shape) for tensor in bucket.values()],
            "group_name": self.name, "load_format": "flattened_bucket" if self._is_flat else None,
        }  # fmt: skip
        pieces = list(bucket.values())
        pieces = [await asyncio.to_thread(self._laid_out, pieces)] if self._is_flat else pieces
        call = post(http, "/update_weights_from_distributed", json=body)
        await asyncio.gather(call, asyncio.to_thread(self._broadcast, pieces))

    def _laid_out(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """All of a bucket as one tensor of bytes. On a CPU, new memory for each would cost more than the transfer."""
        num_bytes = sum(tensor.nbytes for tensor in tensors)
        if self._flat is None or len(self._flat) < num_bytes:
            self._flat = torch.empty(num_bytes, dtype=torch.uint8, device=tensors[0].device)
        return torch.cat([as_bytes(tensor) for tensor in tensors], out=self._flat[:num_bytes])

    def _make(self, port: int) -> None:
        timeout = timedelta(seconds=120)
        store, rank, size = next(c10d.rendezvous(f"tcp://127.0.0.1:{port}", 0, 2, timeout=timeout))
        prefixed = c10d.PrefixStore(self.name, store)
        self._group, _ = c10d._new_process_group_helper(
            size, rank, [], c10d.Backend(self.backend), prefixed, group_name=self.name, timeout=timeout
        )
        c10d._world.pg_group_ranks[self._group] = {0: 0, 1: 1}

    def _broadcast(self, pieces: Sequence[torch.Tensor]) -> None:
        """All at once: the next one leaves while this process learns that one has left."""
        device = pieces[0].device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        works = [dist.broadcast(piece, group_src=0, group=self._group, async_op=True) for piece in pieces]
        for work in works:
            assert work is not None
            work.wait()
        if device.type == "cuda":
            torch.cuda.synchronize(device)


class VllmGroup(Group):
    """The trainer's side of vLLM's calls, as trl makes them: the stand-in for the package speaks NCCL on GPUs."""

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


# --- what they are compared with -------------------------------------------------------------------------------------

_GPU_WAYS = ("ipc", "ipc-flat", "nccl", "vllm")
BARE = {
    "shared": "copy", "pickle": "copy", "pickle-flat": "copy", "body": "socket", "gloo": "gloo", "gloo-flat": "gloo",
}  # fmt: skip
WAYS = (*BARE, *_GPU_WAYS)


CPU_S = ("trainer_cpu_s_per_gb", "server_cpu_s_per_gb")


class Compared:
    """Measures of the same bytes without a server. Each round adds one of each."""

    def __init__(self, way: str, undo: ExitStack) -> None:
        self.plain = "gpu_to_host" if way in _GPU_WAYS else "copy"
        self.bare = BARE.get(way)
        self._other: BareTransport | None = None
        self._measures: dict[str, Measure] = {"plain": gpu_to_host_gb_per_s if way in _GPU_WAYS else copy_gb_per_s}
        if way not in _GPU_WAYS:
            self._measures["copy_over"] = CopyOver().gb_per_s
        if self.bare in ("gloo", "socket"):
            self._other = undo.enter_context(BareTransport(self.bare))
            self._measures["bare"] = self._other.gb_per_s
        self._found: dict[str, list[tuple[float, float]]] = {name: [] for name in self._measures}

    def measure(self, tensors: Tensors) -> None:
        buckets = [list(bucket.values()) for bucket in buckets_of(tensors)]
        for name, measure in self._measures.items():
            before_s = self._cpu_s()
            rate = measure(buckets)
            self._found[name].append((rate, (self._cpu_s() - before_s) / num_bytes_of(buckets) * 1e9))

    def of(self, rate: float) -> dict[str, Any]:
        """The medians, and the shares that `rate` is of them."""
        found: dict[str, Any] = {"plain": self.plain, "bare": self.bare}
        medians = {
            name: map(statistics.median, zip(*(each[1:] or each), strict=True)) for name, each in self._found.items()
        }
        for name, (each, used_s) in medians.items():
            found |= {f"{name}_gb_per_s": round(each, 2), f"of_{name}": round(rate / each, 2)}
            found[f"{name}_cpu_s_per_gb"] = round(used_s, 2)
        if self.bare == "copy":
            found |= {
                key.replace("plain", "bare"): value
                for key, value in found.items()
                if "plain_" in key or key == "of_plain"
            }
        return found

    def _cpu_s(self) -> float:
        """Of this process and of the other end of the bare transport."""
        return time.process_time() + (cpu_s(self._other.pid) if self._other is not None else 0.0)


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


async def one_update(http: httpx.AsyncClient, send: Send, tensors: Tensors, label: str, server: Served) -> dict:
    """One bracket. `transfer_s` ends with the last bucket, `end_s` is the end of the bracket."""
    trainer_s, server_s = time.process_time(), server.receiving_cpu_s()
    began_s = time.perf_counter()
    await post(http, "/begin_weight_update", json={})
    for bucket in buckets_of(tensors):
        await send(http, bucket)
    sent_s = time.perf_counter()
    trainer_s, server_s = time.process_time() - trainer_s, server.receiving_cpu_s() - server_s
    ended = await post(http, "/end_weight_update", json={"weight_version": label})
    done_s = time.perf_counter()
    await asyncio.sleep(1.0)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return {
        "gb": num_bytes / 1e9,
        "transfer_s": sent_s - began_s,
        "trainer_cpu_s_per_gb": trainer_s / num_bytes * 1e9,
        "server_cpu_s_per_gb": server_s / num_bytes * 1e9,
        "gb_per_s": num_bytes / (sent_s - began_s) / 1e9,
        "end_s": done_s - sent_s,
        "paused_s": ended["paused_s"],
        "began_s": began_s,
        "done_s": done_s,
    }


async def measure(way: str, sets: Sequence[Tensors], options: argparse.Namespace, server: Served) -> dict:
    with ExitStack() as undo:
        return await _measure(way, sets, options, Compared(way, undo), server)


async def _measure(
    way: str, sets: Sequence[Tensors], options: argparse.Namespace, compared: Compared, server: Served
) -> dict:
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {KEY}"}, trust_env=False, limits=LIMITS) as http:
        group = VllmGroup(way) if way == "vllm" else Group(way) if way in ("gloo", "gloo-flat", "nccl") else None
        if group is not None:
            await group.join(http)
            send: Send = group.send
        else:
            send = SENDERS[way]
        streams = Streams(URL, options.streams, options.tokens)
        await asyncio.to_thread(streams.wait_until_all_run)
        before_s = time.perf_counter()
        await asyncio.sleep(2.0)
        rounds = []
        scores: list[tuple[int, list[float]]] = []
        for number in range(options.rounds):
            which = number % 2
            await asyncio.to_thread(compared.measure, sets[which])
            rounds.append(await one_update(http, send, sets[which], f"set-{which}", server))
            scores += [(which, await scores_of(http)) for _ in range(2)]
            print(json.dumps({"way": way, "round": number} | rounds[-1]), flush=True)
        await asyncio.to_thread(streams.end)
        if group is not None:
            await post(http, "/destroy_weights_update_group", json={"group_name": group.name})
    references = dict(reversed(scores))  # of each set, the first
    apart = distance(*references.values()) if len(references) > 1 else math.inf
    distances = [distance(found, references[which]) for which, found in scores]
    rate = statistics.median(each["gb_per_s"] for each in rounds[1:] or rounds)
    return {
        "way": way,
        "gb_per_s": round(rate, 2),
        **compared.of(rate),
        **{name: round(statistics.median(each[name] for each in rounds[1:] or rounds), 2) for name in CPU_S},
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


def device_of(way: str) -> str:
    """Where the trainer has its weights: NCCL has one rank of a group on a card."""
    if way in ("nccl", "vllm"):
        return f"cuda:{torch.cuda.device_count() - 1}"
    return "cuda:0" if way in _GPU_WAYS else "cpu"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b", choices=sorted(SHAPES))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--ways", default="", help=f"of {', '.join(WAYS)}; default: those of the device")
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
        context_length = min(8192, SHAPES[options.shape]["max_position_embeddings"])
        with serve(folder, device=options.device, context_length=context_length, options=serving) as server:
            made: dict[str, list[Tensors]] = {}
            for way in ways:
                device = device_of(way)
                if device not in made:
                    made = {device: [make_weights(folder, seed=seed, device=device) for seed in (1, 2)]}
                results.append({"shape": options.shape} | asyncio.run(measure(way, made[device], options, server)))
                print(json.dumps(results[-1]), flush=True)
    if options.out is not None:
        given = {name: str(value) for name, value in vars(options).items()}
        options.out.write_text(json.dumps({"options": given, "results": results}))
    return int(any(result["lost"] or result["stale"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
