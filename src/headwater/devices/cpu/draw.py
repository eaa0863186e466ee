"""Sample rows of logits with the Gumbel-max trick in numpy, for machines without the kernel that does it (draw.c)."""

import numpy as np
import numpy.typing as npt

from headwater.devices.noise import NoiseKeys, noise_bits, uniform_noise

_SLACK = np.float32(1e-3)  # more than float32 rounds off a logit and its noise


def draw(logits: npt.NDArray[np.float32], keys: NoiseKeys) -> npt.NDArray[np.int64]:
    """argmax of logits[row][i] - log(E(keys[row], i)), E exponential: a draw from softmax(logits[row]). int64[rows]"""
    token_ids = np.arange(logits.shape[1], dtype=np.uint32)
    with np.errstate(invalid="ignore"):  # a row that is not finite fails by itself
        return np.array(
            [draw_index(row, key, token_ids) for row, key in zip(logits, keys, strict=True)], dtype=np.int64
        )


def draw_index(row: npt.NDArray[np.float32], key: np.uint64, token_ids: npt.NDArray[np.uint32]) -> int:
    """Draw from softmax(row), whose logits are those of `token_ids`: an index into both."""
    # numpy's log1p is six times slower than its log. E is at least u, so the log of u gives bounds of the scores, and
    # only the few tokens whose bound reaches the score of the most promising one can win.
    uniform = uniform_noise(noise_bits(key, token_ids))
    bounds = row - np.log(uniform)
    best = int(bounds.argmax())
    near = np.flatnonzero(bounds >= _scores(row, uniform, np.array([best])) - _SLACK)
    return int(near[_scores(row, uniform, near).argmax()]) if len(near) else best


def _scores(
    row: npt.NDArray[np.float32], uniform: npt.NDArray[np.float32], at: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    return row[at] - np.log(-np.log1p(-uniform[at]))
