"""The tokens of rows of logits by the kernels of draw.c, or in numpy: drawn ones, and the most probable allowed."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headwater.devices.cpu.attention_kernels import DrawJob, MaskedArgmaxJob
from headwater.devices.cpu.kernel_library import KernelLibrary
from headwater.devices.cpu.plain import draw as plain_draw
from headwater.devices.noise import NoiseKeys

Masks = npt.NDArray[np.uint32]  # [M, ceil(vocab_size / 32)]; bit t % 32 of word t // 32 allows token t


@dataclass(frozen=True, slots=True)
class Draws:
    """The N rows of logits that draw a token each, and from what: an item of every array for each.

    A mask comes before everything, then top_k; top_p then keeps the fewest most probable tokens whose probabilities,
    renormalised after top_k, sum to it; min_p comes last. Of equal logits all are kept or none.
    """

    rows: npt.NDArray[np.int32]
    keys: NoiseKeys
    temperatures: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int32]  # 0: all
    top_p: npt.NDArray[np.float32]  # 1: all
    log_min_p: npt.NDArray[np.float32]  # -inf: all
    masks: Masks | None = None
    mask_rows: npt.NDArray[np.int32] | None = None  # with masks: the row of each; -1: all tokens are allowed

    def __len__(self) -> int:
        return len(self.rows)

    def mask(self, index: int | np.intp) -> npt.NDArray[np.uint32] | None:
        """The mask of item `index`; None if all tokens are allowed."""
        if self.masks is None or self.mask_rows is None or self.mask_rows[index] < 0:
            return None
        return self.masks[self.mask_rows[index]]


def draw_tokens(
    logits: npt.NDArray[np.float32], draws: Draws, *, library: KernelLibrary | None, num_threads: int
) -> npt.NDArray[np.int32]:
    """The drawn tokens, int32[N]. float32 `logits` [any, vocab_size] are not changed."""
    tokens = np.full(len(draws), -1, dtype=np.int32)
    if library is not None:
        assert logits.dtype == np.float32 and logits.flags.c_contiguous
        fields = ["rows", "keys", "temperatures", "log_min_p", "top_k", "top_p"]
        if draws.masks is not None:
            _check_masks(draws.masks, logits.shape[1])
            fields += ["masks", "mask_rows"]
        job = DrawJob(
            logits=logits.ctypes.data,
            tokens=tokens.ctypes.data,
            cols=logits.shape[1],
            num_rows=len(draws),
            num_words=0 if draws.masks is None else draws.masks.shape[1],
            **{name: getattr(draws, name).ctypes.data for name in fields},
        )
        library.run_on_threads("draw", job, num_threads=num_threads)
    for index in np.flatnonzero(tokens < 0):
        tokens[index] = plain_draw.draw(
            logits[draws.rows[index]],
            int(draws.keys[index]),
            temperature=draws.temperatures[index],
            top_k=int(draws.top_k[index]),
            top_p=float(draws.top_p[index]),
            log_min_p=draws.log_min_p[index],
            mask=draws.mask(index),
        )
    return tokens


def best_allowed(
    logits: npt.NDArray[np.float32],
    rows: npt.NDArray[np.int32],
    *,
    masks: Masks,
    mask_rows: npt.NDArray[np.int32],
    library: KernelLibrary | None,
    num_threads: int,
) -> npt.NDArray[np.int32]:
    """The most probable token of each of some rows of `logits` that its mask allows. int32[rows]"""
    if library is None:
        found = [plain_draw.masked_argmax(logits[row], masks[of]) for row, of in zip(rows, mask_rows, strict=True)]
        return np.array(found, dtype=np.int32)
    assert logits.dtype == np.float32 and logits.flags.c_contiguous
    _check_masks(masks, logits.shape[1])
    tokens = np.empty(len(rows), dtype=np.int32)
    job = MaskedArgmaxJob(
        logits=logits.ctypes.data,
        rows=rows.ctypes.data,
        masks=masks.ctypes.data,
        mask_rows=mask_rows.ctypes.data,
        tokens=tokens.ctypes.data,
        cols=logits.shape[1],
        num_rows=len(rows),
        num_words=masks.shape[1],
    )
    library.run_on_threads("masked_argmax", job, num_threads=num_threads)
    return tokens


def _check_masks(masks: Masks, vocab_size: int) -> None:
    assert masks.dtype == np.uint32 and masks.flags.c_contiguous and masks.shape[1] * 32 >= vocab_size
