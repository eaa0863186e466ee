"""What the ops of a program do in a step: their kind, the bytes that they read from memory, their arithmetic."""

from dataclasses import dataclass

from headwater.devices.cpu.attention_kernels import AttentionJob
from headwater.devices.cpu.kernel_library import SELECTED
from headwater.devices.cpu.linear_kernels import LinearJob
from headwater.devices.cpu.machine_speed import MachineSpeed
from headwater.devices.cpu.packed_weights import PackedWeights
from headwater.devices.cpu.program import Op
from headwater.devices.kv_memory import KVLayout
from headwater.profiling.step_cases import StepCase

_KINDS = {
    "attention": "attention",
    "embed": "embedding",
    "rms_norm": "norms",
    "prepare_qkv": "rotary, KV write",
    "rotary_angles": "rotary, KV write",
    "square_sums": "norms",
    "quantize": "activations to int",
    "argmax": "sampling",
    "select_rows": "sampling",
    "adapter_shrink": "adapters",
    "adapter_expand": "adapters",
    "multiply_halves": "adapters",
}


@dataclass(frozen=True, slots=True)
class OpWork:
    """What an op has to do in a step. Bytes and operations are 0 where the op works in caches."""

    kind: str
    num_bytes: int = 0
    operations: int = 0
    int_bits: int = 0  # of the products' activations; 0: float32

    def floor_s(self, speed: MachineSpeed) -> float:
        """The longer one of the times of reading and of computing."""
        rate = speed.gflop_s if not self.int_bits else speed.int8_gop_s * 8 / self.int_bits
        return max(self.num_bytes / speed.read_gb_s, self.operations / rate) / 1e9


def work_of(op: Op, case: StepCase, layout: KVLayout) -> OpWork:
    """The work of one op in a step of the case."""
    kind = _KINDS.get(op.kernel, op.kernel)
    if isinstance(op.job, LinearJob):
        return _product(op.job, op, case)
    if op.kernel == "attention" and isinstance(op.job, AttentionJob):
        per_token = layout.layer_bytes // layout.page_size
        operations = 4 * op.job.head_dim * op.job.num_heads * case.num_scores
        return OpWork(kind, num_bytes=case.num_read * per_token, operations=operations)
    return OpWork(kind)


def _product(job: LinearJob, op: Op, case: StepCase) -> OpWork:
    (packed,) = (kept for kept in op.keeps if isinstance(kept, PackedWeights))
    is_head = job.rows == SELECTED
    num_rows = case.num_rows if is_head else case.num_tokens
    num_weights = packed.in_features * packed.out_features * (2 if packed.is_gated else 1)
    return OpWork(
        f"{'head' if is_head else 'linear'} {packed.format}",
        num_bytes=packed.nbytes,
        operations=2 * num_rows * num_weights,
        int_bits={"float32": 0, "bfloat16": 0, "float16": 0, "Q8_0": 16}.get(packed.format, 8),
    )
