"""Bodies of the OpenAI API with the extensions that SGLang and vLLM share. A null counts as left out."""

from typing import Any, ClassVar

from pydantic import ConfigDict, Field

from headwater.generation.body import Body, Names
from headwater.generation.field_table import OTHER_NAMES_IN_CHAT, OTHER_NAMES_IN_COMPLETIONS, REFUSED
from headwater.generation.grammar.fields import OpenAIGrammarFields
from headwater.generation.prompt_schemas import ChatPrompt, ParseSpecialTokens
from headwater.generation.request_schemas import OptionFields, SamplingFields
from headwater.generation.validation import (
    Name,
    NumLogprobs,
    NumTokens,
    NumTokensFromOne,
    ReasoningBudget,
    Seed,
    Text,
)

RECOMMENDABLE = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # by a model's files
_MODEL_FIRST = "Left out: the value that the model's files recommend (`--sampling-defaults`), else the default."


class StreamOptions(Body):
    """What a stream reports besides its text."""

    include_usage: bool = Field(default=False, description="End with a chunk that has usage and no choices.")
    continuous_usage_stats: bool = Field(default=False, description="Report usage in every chunk.")


def _describe_defaults(schema: dict[str, Any]) -> None:
    for name in RECOMMENDABLE:
        field = schema["properties"][name]
        field["description"] = f"{field['description']} {_MODEL_FIRST}"


class OpenAIRequest(SamplingFields, OptionFields, OpenAIGrammarFields):
    """The options that completions and chat completions share."""

    model_config = ConfigDict(json_schema_extra=_describe_defaults)
    model: str = Field(default="default", description="The served name, `default`, or the name of a LoRA adapter.")
    lora_path: Name | None = Field(
        default=None, description="Name of a LoRA adapter; left out: what `model` names."
    )
    seed: Seed | None = Field(default=None, description="Same seed, same noise at each position.")
    min_tokens: NumTokens = Field(default=0, description="No end of text and no stop token before this many.")
    include_stop_str_in_output: bool = Field(default=False, description="The same as no_stop_trim.")
    stream_options: StreamOptions = Field(default_factory=StreamOptions, description="What a stream reports.")
    rid: Name | None = Field(default=None, description="Name of the request for /abort_request, and its `id`.")
    return_cached_tokens_details: bool = Field(
        default=False, description="Report in `sglext` on which tier cached prompt tokens were found."
    )
    return_token_ids: bool = Field(
        default=False, description="Report the token ids of prompts and answers (`prompt_token_ids`, `token_ids`)."
    )
    return_tokens_as_token_ids: bool = Field(
        default=False, description="Name tokens in log-probabilities `token_id:ID` instead of by their text."
    )
    return_partial_on_abort: bool = Field(
        default=False,
        description="Answer an aborted request with the text so far and `finish_reason: abort`, not with an error.",
    )

    @property
    def keeps_stop(self) -> bool:
        return self.no_stop_trim or self.include_stop_str_in_output


class CompletionRequest(OpenAIRequest):
    """Continue one prompt or several."""

    names: ClassVar[Names] = Names(refused=REFUSED, other_names=OTHER_NAMES_IN_COMPLETIONS)
    prompt: Text | list[Text] | list[int] | list[list[int]] = Field(
        description="Text or token ids.", json_schema_extra={"examples": ["A radix tree is"]}
    )
    max_tokens: NumTokens = Field(default=16, description="Reduced to what fits the context.")
    logprobs: NumLogprobs | None = Field(default=None, description="Report this many alternatives at each position.")
    echo: bool = Field(default=False, description="Begin the text and the log-probabilities with the prompt.")
    best_of: int | None = Field(default=None, description="1 or the value of n.")
    add_special_tokens: bool = Field(default=True, description="Prepend BOS to a text if the model expects it.")
    parse_special_tokens: ParseSpecialTokens = None


class ChatCompletionRequest(OpenAIRequest, ChatPrompt):
    """Answer a conversation."""

    names: ClassVar[Names] = Names(refused=REFUSED, other_names=OTHER_NAMES_IN_CHAT)
    messages: list[dict[str, Any]] = Field(
        description="Objects with `role` and `content` (a string, null, or a list of text parts).",
        json_schema_extra={"examples": [[{"role": "user", "content": "What is a radix tree?"}]]},
    )
    max_tokens: NumTokensFromOne | None = Field(default=None, description="Left out: up to the context length.")
    max_completion_tokens: NumTokensFromOne | None = Field(default=None, description="Overrides max_tokens.")
    parallel_tool_calls: bool = Field(default=True, description="False: at most one tool call in an answer.")
    whole_tool_calls: bool = Field(
        default=False,
        description="True: only complete tool calls. A stream has each in one piece; a broken one stays content, and "
        "one that the answer's end cuts off is left out.",
    )
    separate_reasoning: bool = Field(
        default=True, description="Report thinking as `reasoning_content`. False: it stays in the content."
    )
    stream_reasoning: bool = Field(
        default=True, description="False: a stream reports the thinking in one piece, when it has ended."
    )
    include_reasoning: bool = Field(default=True, description="False: the answer leaves out the thinking.")
    max_reasoning_tokens: ReasoningBudget = Field(
        default=-1, description="After this many tokens of thinking, its end is forced; -1: no limit."
    )
    max_thinking_tokens: ReasoningBudget = Field(default=-1, description="The same as max_reasoning_tokens.")
    thinking_token_budget: ReasoningBudget = Field(default=-1, description="The same as max_reasoning_tokens.")
    logprobs: bool = Field(default=False, description="Report log-probabilities of the generated tokens.")
    top_logprobs: NumLogprobs = Field(default=0, description="Alternatives at each position; needs `logprobs`.")

    @property
    def reasoning_budget(self) -> int | None:
        """Most tokens of thinking."""
        given = (self.max_reasoning_tokens, self.max_thinking_tokens, self.thinking_token_budget)
        return min((budget for budget in given if budget >= 0), default=None)
