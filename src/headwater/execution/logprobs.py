"""Log-probabilities of tokens, from the raw logits (before temperature and penalties), natural log."""

from collections.abc import Sequence

import torch

from headwater.messages import LogprobParams, TokenLogprob


def token_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], params: Sequence[LogprobParams]
) -> list[TokenLogprob]:
    """One answer per row: of `token_ids[row]`, of the top alternatives, and of the ids asked for.

    `logits` is float32[rows, vocab_size] and is not changed. Alternatives come most probable first.
    """
    vocab_size = logits.shape[1]
    totals = logits.logsumexp(dim=-1)
    most = min(max(param.top for param in params), vocab_size)
    top_values, top_ids = logits.topk(most, dim=-1) if most else (logits[:, :0], logits[:, :0].long())
    own = logits.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0] - totals
    top_rows, top_id_rows, own_row = (top_values - totals[:, None]).tolist(), top_ids.tolist(), own.tolist()
    answers = []
    for row, (token_id, param) in enumerate(zip(token_ids, params, strict=True)):
        ids_logprobs: tuple[float, ...] = ()
        if param.token_ids:
            ids_logprobs = tuple((logits[row, list(param.token_ids)] - totals[row]).tolist())
        answers.append(
            TokenLogprob(
                token_id=int(token_id),
                logprob=own_row[row],
                top_ids=tuple(top_id_rows[row][: param.top]),
                top_logprobs=tuple(top_rows[row][: param.top]),
                ids_logprobs=ids_logprobs,
            )
        )
    return answers
