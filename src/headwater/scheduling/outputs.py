"""What requests have to say since the last turn, one message per client."""

from headwater.messages import Finish, Output, OutputMeta, Outputs, TokenLogprob
from headwater.scheduling.request import Request


class OutputBuffer:
    """Collects outputs of one turn. The first and the last output of a request carry its facts."""

    def __init__(self) -> None:
        self._items: dict[bytes, list[Output]] = {}

    def add_token(
        self, request: Request, token_id: int, *, logprob: TokenLogprob | None, meta: OutputMeta | None
    ) -> None:
        prompt_logprobs = None
        if request.num_outputs == 1 and request.prompt_logprobs:
            prompt_logprobs = tuple(request.prompt_logprobs)
        self._put(
            request,
            Output(
                rid=request.rid,
                token_ids=(token_id,),
                logprobs=None if logprob is None else (logprob,),
                prompt_logprobs=prompt_logprobs,
                meta=meta,
            ),
        )

    def finish(self, request: Request, finish: Finish, meta: OutputMeta) -> None:
        """End `request`; merged into its token of this turn, if it has one."""
        items = self._items.setdefault(request.client, [])
        last = items[-1] if items and items[-1].rid == request.rid else None
        if last is not None:
            items.pop()
        prompt_logprobs = tuple(request.prompt_logprobs) if request.num_outputs == 0 else None
        items.append(
            Output(
                rid=request.rid,
                token_ids=last.token_ids if last else (),
                logprobs=last.logprobs if last else None,
                prompt_logprobs=last.prompt_logprobs if last else prompt_logprobs or None,
                finish=finish,
                meta=meta,
            )
        )

    def take(self) -> list[tuple[bytes, Outputs]]:
        """(client, message) of everything collected; the buffer is empty afterwards."""
        taken = [(client, Outputs(items=tuple(items))) for client, items in self._items.items() if items]
        self._items = {}
        return taken

    def _put(self, request: Request, output: Output) -> None:
        self._items.setdefault(request.client, []).append(output)
