"""Bodies of the OpenAI API with the extensions that SGLang and vLLM share. Null means not given."""

from typing import Any, ClassVar

from pydantic import Field

from headwater.generation.field_table import OTHER_NAMES_IN_CHAT, OTHER_NAMES_IN_COMPLETIONS, REFUSED
from headwater.generation.native_schemas import Body
from headwater.generation.prompt_schemas import ChatPrompt, ParseSpecialTokens
from headwater.generation.request_fields import Names
from headwater.generation.validation import (
    LogitBias,
    MinP,
    Name,
    NumLogprobs,
    NumSamples,
    NumTokens,
    NumTokensFromOne,
    Penalty,
    Priority,
    RepetitionPenalty,
    Seed,
    Stop,
    StopTokenIds,
    Temperature,
    Text,
    TopK,
    TopP,
)

_MODEL_FIRST = "Left out: what the model's files recommend (`--sampling-defaults`), else the default."


class StreamOptions(Body):
    """What a stream tells beside its text."""

    include_usage: bool = Field(default=False, description="A last chunk without choices but with usage.")
    continuous_usage_stats: bool = Field(default=False, description="Usage in every chunk.")


class OpenAIRequest(Body):
    """What completions and chat completions have in common."""

    model: str = Field(default="default", description="The served name, or `default`.")
    temperature: Temperature = Field(default=1.0, description=f"0 is greedy. {_MODEL_FIRST}")
    top_p: TopP = Field(default=1.0, description=_MODEL_FIRST)
    top_k: TopK = Field(default=-1, description=f"-1 (or 0): all tokens. {_MODEL_FIRST}")
    min_p: MinP = Field(default=0.0, description=_MODEL_FIRST)
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: RepetitionPenalty = Field(default=1.0, description=_MODEL_FIRST)
    logit_bias: LogitBias | None = None
    seed: Seed | None = None
    stop: Stop = Field(default=[])
    stop_token_ids: StopTokenIds = Field(default=[])
    min_tokens: NumTokens = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    include_stop_str_in_output: bool = Field(default=False, description="The same as no_stop_trim.")
    n: NumSamples = 1
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    rid: Name | None = None
    priority: Priority = 0
    cache_salt: Name = ""
    extra_key: Name = ""
    no_store: bool = Field(default=False, description="Leave nothing of this request in the cache, on any tier.")
    routed_dp_rank: int | None = Field(default=None, description="Run on this engine, counted from 0.")
    data_parallel_rank: int | None = Field(default=None, description="Older name of routed_dp_rank.")
    return_cached_tokens_details: bool = Field(
        default=False, description="Tell in `sglext` on which tier cached prompt tokens were found."
    )
    return_partial_on_abort: bool = Field(
        default=False,
        description="Answer an aborted request with the text so far and `finish_reason: abort`, not with an error.",
    )
    response_format: dict[str, Any] | None = Field(default=None, description="`text` only, so far.")

    @property
    def keeps_stop(self) -> bool:
        return self.no_stop_trim or self.include_stop_str_in_output

    @property
    def engine(self) -> int | None:
        return self.data_parallel_rank if self.routed_dp_rank is None else self.routed_dp_rank


class CompletionRequest(OpenAIRequest):
    """Continue a prompt, or each of several."""

    names: ClassVar[Names] = Names(refused=REFUSED, other_names=OTHER_NAMES_IN_COMPLETIONS)
    prompt: Text | list[Text] | list[int] | list[list[int]] = Field(description="Text or token ids.")
    max_tokens: NumTokens = Field(default=16, description="What does not fit the context is cut off.")
    logprobs: NumLogprobs | None = Field(default=None, description="Alternatives at each position.")
    echo: bool = Field(default=False, description="Begin the text (and the log-probabilities) with the prompt.")
    best_of: int | None = Field(default=None, description="1, or the same as n.")
    add_special_tokens: bool = Field(default=True, description="Put BOS before a text where the model wants it.")
    parse_special_tokens: ParseSpecialTokens = None


class ChatCompletionRequest(OpenAIRequest, ChatPrompt):
    """Answer a conversation."""

    names: ClassVar[Names] = Names(refused=REFUSED, other_names=OTHER_NAMES_IN_CHAT)
    messages: list[dict[str, Any]] = Field(
        description="Objects with `role` and `content` (a string, null, or a list of text parts).",
        json_schema_extra={"examples": [[{"role": "user", "content": "What is a radix tree?"}]]},
    )
    max_tokens: NumTokensFromOne | None = Field(default=None, description="Default: up to the context.")
    max_completion_tokens: NumTokensFromOne | None = Field(default=None, description="Wins over max_tokens.")
    logprobs: bool = False
    top_logprobs: NumLogprobs = Field(default=0, description="Alternatives at each position; needs logprobs.")
