"""What requests have produced since the last turn, one message per client."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from msgspec import structs

from headwater.messages.generation import Finish, Output, OutputMeta, Outputs, TokenLogprob
from headwater.scheduling.request import Request


class OutputBuffer:
    """Collects outputs of one turn, and writes `Request.unsent`.

    The first and the last output of a request carry its facts.
    """

    def __init__(self) -> None:
        self._items: dict[bytes, list[Output]] = {}

    def begin_prompt(self, request: Request) -> None:
        """The prompt is computed from its start, perhaps again; its log-probabilities are collected anew."""
        asked = request.logprobs
        reports_first = asked is not None and asked.prompt_start == 0  # which nothing predicts
        first = [TokenLogprob(token_id=int(request.tokens.view(0, 1)[0]), logprob=None)] if reports_first else []
        request.unsent.prompt_logprobs = first
        request.unsent.pooled = None

    def add_prompt_logprobs(self, request: Request, items: Sequence[TokenLogprob]) -> None:
        """Log-probabilities of the next prompt tokens. They leave with the first output."""
        request.unsent.prompt_logprobs += items

    def add_pooled(self, request: Request, hidden: npt.NDArray[np.floating]) -> None:
        """Hidden states of the next prompt tokens, summed. Their mean leaves with the last output."""
        unsent = request.unsent
        unsent.pooled = hidden.astype(np.float64) + (0.0 if unsent.pooled is None else unsent.pooled)

    def add_token(
        self,
        request: Request,
        token_id: int,
        *,
        logprob: TokenLogprob | None,
        meta: OutputMeta | None,
        joins: bool = False,
    ) -> None:
        """The newest token of `request`. It is kept back until there are as many as the request's interval.

        `joins`: it is of the same step as the token before it, and leaves in one output with it.
        """
        unsent = request.unsent
        unsent.token_ids.append(token_id)
        if logprob is not None:
            unsent.logprobs.append(logprob)
        num_outputs = request.num_outputs
        if num_outputs > 1 and meta is None and len(unsent.token_ids) < request.output_interval:
            return
        prompt_logprobs = None
        if num_outputs == 1 and unsent.prompt_logprobs:
            prompt_logprobs = tuple(unsent.prompt_logprobs)
        token_ids, logprobs = _take_unsent(request)
        items = self._items.setdefault(request.client, [])
        last = _last_of(items, request) if joins else None
        if last is not None:
            items[-1] = structs.replace(
                last,
                token_ids=last.token_ids + token_ids,
                logprobs=_joined(last.logprobs, logprobs),
            )
            return
        items.append(
            Output(
                rid=request.rid,
                token_ids=token_ids,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                meta=meta,
            )
        )

    def finish(self, request: Request, finish: Finish, meta: OutputMeta) -> None:
        """End `request`; merged into its token of this turn, if it has one, with what was kept back."""
        items = self._items.setdefault(request.client, [])
        last = _last_of(items, request)
        if last is not None:
            items.pop()
        prompt_logprobs = tuple(request.unsent.prompt_logprobs) if request.num_outputs == 0 else None
        token_ids, logprobs = _take_unsent(request)
        items.append(
            Output(
                rid=request.rid,
                token_ids=last.token_ids + token_ids if last else token_ids,
                logprobs=_joined(last.logprobs, logprobs) if last else logprobs,
                prompt_logprobs=last.prompt_logprobs if last else prompt_logprobs or None,
                finish=finish,
                meta=meta,
                embedding=_embedding(request) if finish.type == "length" else None,
            )
        )

    def take(self) -> list[tuple[bytes, Outputs]]:
        """(client, message) of everything collected; the buffer is empty afterwards."""
        if not self._items:
            return []
        taken = [(client, Outputs(items=tuple(items))) for client, items in self._items.items() if items]
        self._items = {}
        return taken


def has_broken_embedding(request: Request) -> bool:
    """Whether a hidden state was not finite."""
    pooled = request.unsent.pooled
    return pooled is not None and not np.isfinite(pooled).all()


def _embedding(request: Request) -> bytes | None:
    """float32, of length 1: the direction of the sum is that of the mean."""
    pooled = request.unsent.pooled
    if pooled is None:
        return None
    return (pooled / max(float(np.linalg.norm(pooled)), 1e-12)).astype("<f4").tobytes()


def _last_of(items: Sequence[Output], request: Request) -> Output | None:
    """The output of `request` in this turn, if it is the newest one. A refusal belongs to another of the same rid."""
    last = items[-1] if items else None
    return last if last is not None and last.rid == request.rid and last.finish is None else None


def _joined(
    left: tuple[TokenLogprob, ...] | None, right: tuple[TokenLogprob, ...] | None
) -> tuple[TokenLogprob, ...] | None:
    return (left or ()) + (right or ()) or None


def _take_unsent(request: Request) -> tuple[tuple[int, ...], tuple[TokenLogprob, ...] | None]:
    unsent = request.unsent
    taken = tuple(unsent.token_ids), tuple(unsent.logprobs) or None
    unsent.token_ids.clear()
    unsent.logprobs.clear()
    return taken
