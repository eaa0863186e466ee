"""The parts of OpenAI's answers: usage, finish reasons, log-probabilities."""

from collections.abc import Iterable, Sequence

from headwater.generation.answer_fields import Json, cached_tokens, cached_tokens_details
from headwater.generation.text_generation import TextGeneration
from headwater.messages.generation import Finish, OutputMeta, TokenLogprob
from headwater.tokenization.tokenizer import Tokenizer


def usage_of(generations: Iterable[TextGeneration], *, n: int, num_reasoning: int = 0) -> Json:
    """Tokens of generations, n to a prompt, in the order of the prompts. A prompt counts once."""
    prompt_tokens = completion_tokens = num_cached = 0
    for index, generation in enumerate(generations):
        completion_tokens += len(generation.token_ids)
        if index % n == 0:
            prompt_tokens += generation.num_prompt_tokens
            num_cached += cached_tokens(generation.meta)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached},
        "completion_tokens_details": {"reasoning_tokens": num_reasoning},
        "reasoning_tokens": num_reasoning,
    }


def finish_fields(finish: Finish) -> Json:
    """`finish_reason`, and what matched if a stop string or token did."""
    return {"finish_reason": finish.type, "matched_stop": finish.matched}


def extension(generations: Sequence[TextGeneration], *, n: int) -> Json:
    """`sglext`: cached prompt tokens by tier, summed over the prompts."""
    details = [cached_tokens_details(generation.meta) for generation in generations[::n]]
    return {"cached_tokens_details": {tier: sum(d[tier] for d in details) for tier in details[0]}}


def metadata(meta: OutputMeta | None) -> Json:
    return {"weight_version": "" if meta is None else meta.weight_version}


class ChatLogprobs:
    """`logprobs.content` of chat completions."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def content(self, items: Iterable[TokenLogprob]) -> Json:
        return {"content": [self._position(item) for item in items]}

    def _position(self, item: TokenLogprob) -> Json:
        top = zip(item.top_ids, item.top_logprobs, strict=True)
        return self._token(item.token_id, item.logprob) | {
            "top_logprobs": [self._token(token_id, logprob) for token_id, logprob in top]
        }

    def _token(self, token_id: int, logprob: float | None) -> Json:
        return {
            "token": self._tokenizer.token_text(token_id),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
            "logprob": logprob,
        }


class CompletionLogprobs:
    """`logprobs` of one choice of a completion; keeps the offset in the text from chunk to chunk."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0  # in characters

    def columns(self, items: Iterable[TokenLogprob]) -> Json:
        """The next positions. The first token of a prompt has null, since nothing predicts it."""
        tokens: list[str] = []
        offsets: list[int] = []
        logprobs: list[float | None] = []
        top_logprobs: list[dict[str, float] | None] = []
        for item in items:
            token = self._tokenizer.token_text(item.token_id)
            tokens.append(token)
            offsets.append(self._offset)
            logprobs.append(item.logprob)
            top_logprobs.append(self._top(token, item))
            self._offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": offsets,
        }

    def _top(self, token: str, item: TokenLogprob) -> dict[str, float] | None:
        if item.logprob is None:
            return None
        top: dict[str, float] = {}
        for token_id, logprob in zip(item.top_ids, item.top_logprobs, strict=True):
            top.setdefault(self._tokenizer.token_text(token_id), logprob)  # the likelier of two with one text
        return top | {token: item.logprob}
