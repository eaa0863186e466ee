"""Options that have the same name on every route. Each is declared here once.

An option that the engine reads is also a field of the struct that carries it: `SamplingParams` or `RequestOptions`.
The code between schema and use copies by name and names no option.
"""

import msgspec
from pydantic import Field

from headwater.generation.body import Body
from headwater.generation.errors import bad_request
from headwater.generation.text_request import TextOptions
from headwater.generation.validation import (
    LogitBias,
    MinP,
    Name,
    NumSamples,
    Penalty,
    Priority,
    RepetitionPenalty,
    Stop,
    StopTokenIds,
    Temperature,
    TopK,
    TopP,
)
from headwater.messages.generation import RequestOptions
from headwater.tokenization.stop_program import compile_stop


class SamplingFields(Body):
    """How tokens are chosen and when an answer ends. The fields of `SamplingParams` go to the engine."""

    temperature: Temperature = Field(default=1.0, description="0 is greedy.")
    top_p: TopP = Field(default=1.0, description="Sample from the likeliest tokens with this total probability.")
    top_k: TopK = Field(default=-1, description="Sample from this many of the likeliest tokens; -1 or 0: from all.")
    min_p: MinP = Field(default=0.0, description="Least probability of a token, relative to the likeliest one.")
    frequency_penalty: Penalty = Field(default=0.0, description="Per occurrence of a token in the answer.")
    presence_penalty: Penalty = Field(default=0.0, description="Once for each token that the answer holds.")
    repetition_penalty: RepetitionPenalty = Field(
        default=1.0, description="Divides the scores of tokens in prompt and answer; 1 is off."
    )
    logit_bias: LogitBias | None = Field(default=None, description="Token id to a value added to its logit.")
    stop: Stop = Field(default=[], description="Strings that end the answer; left out of it.")
    stop_regex: Stop = Field(
        default=[], description="Regular expressions that end the answer where one first matches; left out of it."
    )
    stop_token_ids: StopTokenIds = Field(default=[], description="Tokens that end the answer, like EOS.")
    ignore_eos: bool = Field(default=False, description="Generate past the end-of-sequence token.")
    skip_special_tokens: bool = Field(default=True, description="Leave special tokens out of the text.")
    no_stop_trim: bool = Field(default=False, description="Keep the stop string or token in the text.")
    n: NumSamples = Field(default=1, description="Answers per prompt; each has its own noise.")

    @property
    def keeps_stop(self) -> bool:
        return self.no_stop_trim

    def text_options(self) -> TextOptions:
        """What the text layer reads. InvalidRequest for a pattern that cannot be used."""
        stop, stop_regex = tuple(self.stop), tuple(self.stop_regex)
        if stop_regex:
            try:
                compile_stop(stop, stop_regex)
            except ValueError as error:
                raise bad_request("stop_regex", f"stop_regex: {error}") from None
        return TextOptions(
            stop=stop,
            stop_regex=stop_regex,
            keep_stop=self.keeps_stop,
            skip_special_tokens=self.skip_special_tokens,
        )


class NamespaceFields(Body):
    """The part of the cache that a request uses."""

    cache_salt: Name = Field(default="", description="Prompts share cached KV only under the same salt and key.")
    extra_key: Name = Field(default="", description="Like cache_salt: both must match.")


class OptionFields(NamespaceFields):
    """How a request is scheduled, cached, routed and answered. The fields of `RequestOptions` go to the engine."""

    stream: bool = Field(default=False, description="Answer with server-sent events.")
    priority: Priority = Field(default=0, description="Higher runs first.")
    no_store: bool = Field(default=False, description="Leave nothing of this request in the cache, on any tier.")
    routed_dp_rank: int | None = Field(
        default=None, description="Index of the engine to run on; left out: the one that suits best."
    )
    data_parallel_rank: int | None = Field(default=None, description="Older name of routed_dp_rank.")

    @property
    def engine(self) -> int | None:
        return self.data_parallel_rank if self.routed_dp_rank is None else self.routed_dp_rank

    def engine_options(self) -> RequestOptions:
        """What the engine reads."""
        return msgspec.convert(self, RequestOptions, from_attributes=True)
