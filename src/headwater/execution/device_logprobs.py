"""Log-probabilities of tokens on a GPU, from the raw logits (before temperature and penalties), natural log."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from headwater.devices.cuda.kernels.fixed import fixed_logsumexp
from headwater.messages.generation import LogprobParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Log-probabilities of N rows, on the device or copied to the host."""

    own: torch.Tensor  # float32[N], of the rows' tokens
    top_values: torch.Tensor  # float32[N, most alternatives], descending
    top_ids: torch.Tensor  # int64[N, most alternatives]
    asked: torch.Tensor  # float32[N, most ids asked for]

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "LogprobTensors":
        return LogprobTensors(move(self.own), move(self.top_values), move(self.top_ids), move(self.asked))


def compute_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, params: Sequence[LogprobParams], *, is_deterministic: bool = False
) -> LogprobTensors:
    """For each row: of its token, of the top alternatives, and of the ids asked for.

    `logits` is float32[rows, vocab_size] and is not changed; `token_ids` is int64[rows] on the same device. Does not
    wait for the device unless ids are asked for. `is_deterministic`: a row's bits do not depend on the other rows.
    """
    totals = fixed_logsumexp(logits) if is_deterministic else logits.logsumexp(dim=-1, keepdim=True)
    most = min(max(param.top for param in params), logits.shape[1])
    top_values, top_ids = logits.topk(most, dim=-1) if most else (logits[:, :0], logits[:, :0].long())
    num_asked = max(len(param.token_ids) for param in params)
    asked = logits[:, :0]
    if num_asked:
        ids = [[*param.token_ids, *[0] * (num_asked - len(param.token_ids))] for param in params]
        asked = logits.gather(1, torch.tensor(ids, device=logits.device)) - totals
    own = logits.gather(1, token_ids[:, None]) - totals
    return LogprobTensors(own[:, 0], top_values - totals, top_ids, asked)


def as_answers(found: LogprobTensors, token_ids: Sequence[int], params: Sequence[LogprobParams]) -> list[TokenLogprob]:
    """One answer per row of `found`, which is on the host. Alternatives come most probable first."""
    own, asked = found.own.tolist(), found.asked.tolist()
    top_values, top_ids = found.top_values.tolist(), found.top_ids.tolist()
    return [
        TokenLogprob(
            token_id=int(token_id),
            logprob=own[row],
            top_ids=tuple(top_ids[row][: param.top]),
            top_logprobs=tuple(top_values[row][: param.top]),
            ids_logprobs=tuple(asked[row][: len(param.token_ids)]),
        )
        for row, (token_id, param) in enumerate(zip(token_ids, params, strict=True))
    ]
