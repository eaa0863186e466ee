"""The processes that receive with PyTorch, as the API process sees them: one for each rank of a trainer's group."""

import asyncio
import contextlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from headwater.messages.frames import pack_frame
from headwater.messages.receiving import (
    CopyFromGpu,
    DropFromGpu,
    JoinGroup,
    NotDone,
    ReceiveBucket,
    ReceiverStart,
    ToReceiver,
    decode_from_receiver,
)
from headwater.transports.staging import BucketError

_MODULE = "headwater.launch.receiving.process"
_GRACE_S = 2.0  # beyond PyTorch's own timeout
_DROP_S = 120.0  # for files that are still being filled
NO_TORCH = "needs PyTorch: install headwater[gpu], or PyTorch for CPUs (a safetensors body needs none)"


class ReceiverFailed(BucketError):
    """A process that receives could not, or was too slow, in words for the trainer."""


def has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


class Receiver:
    """One process. After an error or a missed deadline it is of no more use, and is killed."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._lock = asyncio.Lock()

    @classmethod
    async def start(cls) -> "Receiver":
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", _MODULE, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        receiver = cls(process)
        receiver._write(pack_frame(ReceiverStart(parent_pid=os.getpid())))
        return receiver

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None

    async def call(self, message: ToReceiver, *, timeout_s: float) -> float:
        """Seconds that it took. ReceiverFailed with the reason; then the process has been killed."""
        try:
            async with self._lock, asyncio.timeout(timeout_s):
                self._write(pack_frame(message))
                assert self._process.stdout is not None
                size = int.from_bytes(await self._process.stdout.readexactly(4), "little")
                answer = decode_from_receiver(await self._process.stdout.readexactly(size))
        except TimeoutError:
            await self.end()
            raise ReceiverFailed(f"the trainer sent nothing more within {timeout_s:.0f} s") from None
        except (asyncio.IncompleteReadError, OSError):
            await self.end()
            raise ReceiverFailed("the receiving process has ended") from None
        except asyncio.CancelledError:
            await self.end()  # it is in the middle of a broadcast
            raise
        if isinstance(answer, NotDone):
            await self.end()
            raise ReceiverFailed(answer.message)
        return answer.took_s

    async def end(self) -> None:
        """Kill the process, wherever it hangs, and wait for its end, which comes at once."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        self._process._transport.close()  # type: ignore[attr-defined]  # asyncio closes it some turns later

    def _write(self, frame: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(frame)


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A process group as a trainer names it. The server has `num_members` ranks from `rank_offset` on."""

    name: str
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    backend: str
    num_members: int


class ReceiverGroups:
    """The groups by name. The first rank of each keeps what it receives: every rank gets whole tensors."""

    def __init__(self) -> None:
        self._groups: dict[str, list[Receiver]] = {}
        self._of_gpus: Receiver | None = None

    def names(self) -> list[str]:
        return list(self._groups)

    async def join(self, spec: GroupSpec, *, timeout_s: float) -> None:
        """Become members of the group. ReceiverFailed if it does not come together in time, or exists."""
        if spec.name in self._groups:
            raise ReceiverFailed(f"group {spec.name!r} exists; destroy it first (/destroy_weights_update_group)")
        members = self._groups[spec.name] = [await Receiver.start() for _ in range(spec.num_members)]
        try:
            async with asyncio.TaskGroup() as tasks:
                for index, member in enumerate(members):
                    tasks.create_task(member.call(_join(spec, index, timeout_s), timeout_s=timeout_s + _GRACE_S))
        except BaseExceptionGroup as errors:
            await self.destroy(spec.name)
            raise errors.exceptions[0] from None
        except BaseException:
            await self.destroy(spec.name)
            raise

    async def receive(self, name: str, bucket: ReceiveBucket, *, timeout_s: float) -> None:
        """Receive one bucket. After an error the group is gone: the trainer makes it anew."""
        members = self._groups.get(name)
        if members is None:
            raise ReceiverFailed(f"there is no group {name!r}: make it with /init_weights_update_group")
        messages = [bucket, *[msgspec.structs.replace(bucket, path="")] * (len(members) - 1)]
        try:
            async with asyncio.TaskGroup() as tasks:
                for member, message in zip(members, messages, strict=True):
                    tasks.create_task(member.call(message, timeout_s=timeout_s))
        except BaseExceptionGroup as errors:
            await self.destroy(name)
            reason = errors.exceptions[0]
            raise ReceiverFailed(f"{reason}; the group {name!r} has ended, make it anew") from None
        except BaseException:
            await self.destroy(name)
            raise

    async def copy_from_gpu(self, call: CopyFromGpu, *, timeout_s: float) -> None:
        """Copy another process's tensors on a GPU of this host. The process for it stays, since CUDA starts slowly."""
        if self._of_gpus is None or not self._of_gpus.is_alive:
            self._of_gpus = await Receiver.start()
        await self._of_gpus.call(call, timeout_s=timeout_s)

    async def drop_from_gpu(self) -> None:
        """Free what the processes keep on GPUs, once its files are whole. Never raises."""
        receivers = [member for members in self._groups.values() for member in members]
        receivers += [self._of_gpus] if self._of_gpus is not None and self._of_gpus.is_alive else []
        calls = [receiver.call(DropFromGpu(), timeout_s=_DROP_S) for receiver in receivers]
        await asyncio.gather(*calls, return_exceptions=True)

    async def destroy(self, name: str) -> bool:
        """Leave a group. False if there is none of this name: harmless."""
        members = self._groups.pop(name, None)
        for member in members or ():
            await member.end()
        return members is not None

    async def close(self) -> None:
        for name in list(self._groups):
            await self.destroy(name)
        if self._of_gpus is not None:
            await self._of_gpus.end()


def _join(spec: GroupSpec, index: int, timeout_s: float) -> JoinGroup:
    return JoinGroup(
        master_address=spec.master_address,
        master_port=spec.master_port,
        rank=spec.rank_offset + index,
        world_size=spec.world_size,
        group_name=spec.name,
        backend=spec.backend,
        device=None if spec.backend == "gloo" else index,
        timeout_s=timeout_s,
    )


def safetensors_dtypes(names: Sequence[str]) -> tuple[str, ...]:
    """PyTorch's names of dtypes ("torch.bfloat16", "bfloat16") as safetensors has them. ValueError if unknown."""
    known = {
        "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float": "F32", "half": "F16",
        "double": "F64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "uint8": "U8", "int8": "I8",
    }  # fmt: skip
    found = [known.get(name.removeprefix("torch.")) for name in names]
    if None in found:
        raise ValueError(f"dtype {names[found.index(None)]!r} is not known; known: {', '.join(known)}")
    return tuple(dtype for dtype in found if dtype is not None)
