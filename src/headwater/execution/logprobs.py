"""Log-probabilities of tokens on a CPU, from the raw logits (before temperature and penalties), natural log."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from headwater.messages.generation import LogprobParams, TokenLogprob

_COLUMNS_PER_WANTED = 4  # more find fewer candidates that are not wanted, but take longer to find them
_MIN_COLUMNS = 512  # fewer are slower


def token_logprobs(
    logits: npt.NDArray[np.float32], token_ids: Sequence[int], params: Sequence[LogprobParams]
) -> list[TokenLogprob]:
    """For each row: of its token, of the top alternatives (most probable first), and of the ids asked for.

    `logits` is float32[rows, vocab_size] and is not changed.
    """
    with np.errstate(invalid="ignore"):  # a row that is not finite fails by itself
        return [_of_row(*it) for it in zip(logits, token_ids, params, strict=True)]


def _of_row(row: npt.NDArray[np.float32], token_id: int, params: LogprobParams) -> TokenLogprob:
    total = logsumexp(row)
    top = largest(row, min(params.top, len(row)))
    return TokenLogprob(
        token_id=int(token_id),
        logprob=float(row[token_id] - total),
        top_ids=tuple(top.tolist()),
        top_logprobs=tuple((row[top] - total).tolist()),
        ids_logprobs=tuple((row[list(params.token_ids)] - total).tolist()) if params.token_ids else (),
    )


def logsumexp(row: npt.NDArray[np.float32]) -> np.float32:
    """log(sum(exp(row)))"""
    top = row.max()
    return top + np.log(np.exp(row - top).sum())


def largest(row: npt.NDArray[np.float32], num: int) -> npt.NDArray[np.int64]:
    """The indices of the `num` largest numbers, the largest first; of equal ones the first comes first."""
    if num == 0:
        return np.empty(0, dtype=np.int64)
    at = np.arange(len(row))
    num_columns = max(_COLUMNS_PER_WANTED * num, _MIN_COLUMNS)
    per_column = len(row) // num_columns
    if per_column > 1:
        # `num` columns have a number that large, so all that are wanted are at least as large. Much faster than
        # partitioning the row.
        maxima = row[: per_column * num_columns].reshape(per_column, num_columns).max(axis=0)
        above = np.flatnonzero(row >= np.partition(maxima, -num)[-num])
        at = above if len(above) >= num else at  # fewer among NaN
    return at[np.argsort(-row[at], kind="stable")[:num]]
