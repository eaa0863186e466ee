"""The parts of OpenAI's answers: usage, finish reasons, log-probabilities."""

from collections.abc import Iterable, Sequence

from headwater.generation.answer_fields import Json, cached_tokens, cached_tokens_details, json_bytes
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
    if meta is None:
        return {"weight_version": ""}
    mixture = {"weights_versions": [list(span) for span in meta.weights_versions]} if meta.weights_versions else {}
    return {"weight_version": meta.weight_version} | mixture


class TokenIds:
    """The `token_ids` of one choice, on request; in a stream those that the last piece did not have yet."""

    def __init__(self, generation: TextGeneration, *, is_asked: bool) -> None:
        self._generation = generation
        self._is_asked = is_asked
        self._num_taken = 0

    @property
    def is_waiting(self) -> bool:
        """Whether a stream has yet to report some."""
        return self._is_asked and self._num_taken < len(self._generation.token_ids)

    def whole(self) -> Json:
        return {"token_ids": list(self._generation.token_ids)} if self._is_asked else {}

    def take(self) -> bytes:
        """The field for the next piece, with a comma before it; empty if it was not asked for."""
        if not self._is_asked:
            return b""
        ids = self._generation.token_ids[self._num_taken :]
        self._num_taken += len(ids)
        return b',"token_ids":%b' % json_bytes(ids)


class ChatLogprobs:
    """`logprobs.content` of chat completions. With `as_ids`, a token is named `token_id:ID` instead of by its text."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def content(self, items: Iterable[TokenLogprob]) -> Json:
        return {"content": [self._position(item) for item in items]}

    def _position(self, item: TokenLogprob) -> Json:
        top = zip(item.top_ids, item.top_logprobs, strict=True)
        return self._token(item.token_id, item.logprob) | {
            "top_logprobs": [self._token(token_id, logprob) for token_id, logprob in top]
        }

    def _token(self, token_id: int, logprob: float | None) -> Json:
        return {
            "token": _id_name(token_id) if self._as_ids else self._tokenizer.token_text(token_id),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
            "logprob": logprob,
        }


class CompletionLogprobs:
    """`logprobs` of one choice of a completion; keeps the offset in the text from chunk to chunk.

    With `as_ids`, a token is named `token_id:ID` instead of by its text.
    """

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids
        self._offset = 0  # in characters

    def columns(self, items: Iterable[TokenLogprob]) -> Json:
        """The next positions. The first token of a prompt has null, since nothing predicts it."""
        tokens: list[str] = []
        offsets: list[int] = []
        logprobs: list[float | None] = []
        top_logprobs: list[dict[str, float] | None] = []
        for item in items:
            token = self._name(item.token_id)
            tokens.append(token)
            offsets.append(self._offset)
            logprobs.append(item.logprob)
            top_logprobs.append(self._top(token, item))
            self._offset += len(self._tokenizer.token_text(item.token_id))
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
            top.setdefault(self._name(token_id), logprob)  # the likelier of two with one text
        return top | {token: item.logprob}

    def _name(self, token_id: int) -> str:
        return _id_name(token_id) if self._as_ids else self._tokenizer.token_text(token_id)


def _id_name(token_id: int) -> str:
    """As vLLM names tokens that have no text of their own."""
    return f"token_id:{token_id}"
