"""Tokens drawn from rows of logits, in the kernel of draw.c, or in numpy without it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headwater.devices.cpu.attention_kernels import DrawJob
from headwater.devices.cpu.kernel_library import KernelLibrary
from headwater.devices.cpu.plain.draw import draw
from headwater.devices.noise import NoiseKeys


@dataclass(frozen=True, slots=True)
class Draws:
    """The N rows of logits that draw a token each, and from what: an item of every array for each.

    top_k comes first; top_p then keeps the fewest most probable tokens whose probabilities, renormalised after top_k,
    sum to it; min_p comes last. Of equal logits all are kept or none.
    """

    rows: npt.NDArray[np.int32]
    keys: NoiseKeys
    temperatures: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int32]  # 0: all
    top_p: npt.NDArray[np.float32]  # 1: all
    log_min_p: npt.NDArray[np.float32]  # -inf: all

    def __len__(self) -> int:
        return len(self.rows)


def draw_tokens(
    logits: npt.NDArray[np.float32], draws: Draws, *, library: KernelLibrary | None, num_threads: int
) -> npt.NDArray[np.int32]:
    """The drawn tokens, int32[N]. float32 `logits` [any, vocab_size] are not changed."""
    tokens = np.full(len(draws), -1, dtype=np.int32)
    if library is not None:
        assert logits.dtype == np.float32 and logits.flags.c_contiguous
        fields = ("rows", "keys", "temperatures", "log_min_p", "top_k", "top_p")
        job = DrawJob(
            logits=logits.ctypes.data,
            tokens=tokens.ctypes.data,
            cols=logits.shape[1],
            num_rows=len(draws),
            **{name: getattr(draws, name).ctypes.data for name in fields},
        )
        library.run_on_threads("draw", job, num_threads=num_threads)
    for index in np.flatnonzero(tokens < 0):
        tokens[index] = draw(
            logits[draws.rows[index]],
            int(draws.keys[index]),
            temperature=draws.temperatures[index],
            top_k=int(draws.top_k[index]),
            top_p=float(draws.top_p[index]),
            log_min_p=draws.log_min_p[index],
        )
    return tokens
