"""The CPU as a device: plain PyTorch everywhere, native kernels for bfloat16 where they have been built."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from headwater.devices.cpu.attention import TorchStepAttention
from headwater.devices.cpu.draw import draw
from headwater.devices.cpu.kv_memory import CpuKVMemory
from headwater.devices.cpu.linear import TorchGatedLinear, TorchLinear, can_pack
from headwater.devices.cpu.native_layers import (
    NativeGatedLinear,
    NativeLinear,
    NativeStepAttention,
    can_run_attention,
    can_run_linear,
)
from headwater.devices.cpu.native_library import native_library
from headwater.devices.cpu.topology import free_memory_bytes, has_fast_bfloat16, num_usable_cores
from headwater.devices.cuda.kv_memory import CudaKVMemory
from headwater.devices.device import AttentionBatch, AttentionGeometry, GatedLinear, Linear, StepAttention, Weight
from headwater.devices.host_tensor import HostTensor
from headwater.devices.kv_memory import KVLayout, KVMemory
from headwater.devices.noise import NoiseKeys
from headwater.devices.torch_tensors import place_tensor, to_host


class CpuDevice:
    """This machine's CPU (device.Device). Sets the number of threads PyTorch computes with in this process."""

    name = "cpu"
    block_formats: frozenset[str] = frozenset()
    torch_device = torch.device("cpu")

    def __init__(self, *, num_threads: int | None = None, use_native: bool = True) -> None:
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, found {num_threads}")
        self.num_threads = num_threads or num_usable_cores()
        torch.set_num_threads(self.num_threads)
        self._library = native_library() if use_native else None

    def auto_dtype(self) -> str:
        is_fast = has_fast_bfloat16() and (self._library is not None or can_pack(torch.bfloat16))
        return "bfloat16" if is_fast else "float32"

    def place(self, weight: Weight, *, form: str) -> torch.Tensor:
        return place_tensor(weight, dtype=form, device=self.torch_device)

    def to_host(self, array: torch.Tensor, *, max_rows: int | None = None) -> HostTensor:
        return to_host(array, max_rows=max_rows)

    def free_memory_bytes(self) -> int:
        return free_memory_bytes()

    def trim_memory(self) -> None:
        """Nothing to do: freed tensors return their memory."""

    def allocate_kv(self, layout: KVLayout, num_pages: int) -> CpuKVMemory:
        return CpuKVMemory(layout, num_pages)

    def pack_linear(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor] | None = None) -> Linear:
        if self._library and can_run_linear(weights[0]):
            return NativeLinear(self._library, weights, biases, num_threads=self.num_threads)
        return TorchLinear(weights, biases)

    def pack_gated_linear(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        *,
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
    ) -> GatedLinear:
        if self._library and can_run_linear(gate):
            return NativeGatedLinear(
                self._library, gate, up, gate_bias=gate_bias, up_bias=up_bias, num_threads=self.num_threads
            )
        return TorchGatedLinear(gate, up, gate_bias, up_bias)

    def rms_norm(self, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if self._library and weight.dtype == torch.bfloat16:
            y = torch.empty_like(residual, dtype=torch.bfloat16)
            self._library.hw_rms_norm(
                residual.data_ptr(), weight.data_ptr(), y.data_ptr(), *residual.shape, eps, self.num_threads
            )
            return y
        return F.rms_norm(residual, residual.shape[-1:], weight.float(), eps).to(weight.dtype)

    def draw(self, logits: npt.NDArray[np.float32], keys: NoiseKeys) -> npt.NDArray[np.int64]:
        """A token for each row, drawn from softmax(logits[row]) with the noise of its key."""
        if self._library is None:
            return draw(logits, keys)
        assert logits.dtype == np.float32 and logits.flags.c_contiguous and len(keys) == len(logits)
        winners = np.empty(len(logits), dtype=np.int64)
        self._library.hw_draw(
            logits.ctypes.data, keys.ctypes.data, winners.ctypes.data, *logits.shape, self.num_threads
        )
        return winners

    def plan_attention(
        self,
        geometry: AttentionGeometry,
        batch: AttentionBatch,
        *,
        kv: KVMemory,
    ) -> StepAttention:
        if self._library and can_run_attention(geometry, kv.layout.dtype):
            return NativeStepAttention(self._library, geometry, batch, kv=kv, num_threads=self.num_threads)
        return TorchStepAttention(geometry, batch, kv=CudaKVMemory(kv.layout, torch.from_numpy(kv.memory)))
