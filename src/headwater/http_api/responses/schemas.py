"""The body of OpenAI's responses. A null counts as left out."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from headwater.generation.body import Names
from headwater.generation.field_table import REFUSED, Refused
from headwater.generation.validation import Name, NumLogprobs, NumTokensFromOne, Text
from headwater.http_api.openai.conversation import ConversationRequest

_REFUSED = dict(REFUSED) | {
    "background": Refused("a request runs as long as its client listens"),
    "background_options": Refused("a request runs as long as its client listens"),
    "conversation": Refused("conversations are kept by previous_response_id"),
    "context_management": Refused("a prompt that is too long is refused, never cut"),
    "prompt": Refused("no prompts are stored; send the input"),
    "moderation": Refused("nothing is moderated"),
}
_OTHER_NAMES = {
    "messages": "input",
    "system": "instructions",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "max_new_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "logprobs": "top_logprobs",
}
# name -> why an answer is the same without it
_IGNORED = {
    "max_tool_calls": "limits tools that the provider runs; this server runs none",
    "stream_options": "obfuscation only pads events",
    "prompt_cache_options": "prefixes are cached anyway",
    "access_programs": "for the provider's own books",
}


class ResponsesRequest(ConversationRequest):
    """Answer an input, which may go on from an earlier response."""

    names: ClassVar[Names] = Names(refused=_REFUSED, other_names=_OTHER_NAMES, ignored=_IGNORED)
    input: Text | list[dict[str, Any]] = Field(
        description="A text of the user, or items: messages, function_call, function_call_output, reasoning, "
        "item_reference.",
        json_schema_extra={"examples": ["What is a radix tree?"]},
    )
    instructions: Text | None = Field(default=None, description="The system prompt of this response alone.")
    previous_response_id: Name | None = Field(
        default=None, description="A stored response whose conversation goes on; 404 if it is not kept any more."
    )
    store: bool = Field(default=True, description="Keep the response and its conversation in the server's memory.")
    max_output_tokens: NumTokensFromOne | None = Field(default=None, description="Left out: up to the context length.")
    tools: list[dict[str, Any]] = Field(
        default=[], description="Objects of type `function` with `name`, `description`, `parameters` and `strict`."
    )
    tool_choice: Any = Field(
        default="auto", description="`auto`, `none`, `required`, or an object of type function or allowed_tools."
    )
    parallel_tool_calls: bool = Field(default=True, description="Whether the answer may hold several calls.")
    text: dict[str, Any] | None = Field(
        default=None, description="`format` is of type text, json_object or json_schema (with `name` and `schema`)."
    )
    reasoning: dict[str, Any] | None = Field(
        default=None, description="`effort` is passed to the chat template; `summary` may be auto: none is written."
    )
    include: list[str] = Field(
        default=[], description="`message.output_text.logprobs` adds log-probabilities to the text."
    )
    top_logprobs: NumLogprobs = Field(default=0, description="Alternatives at each position of the log-probabilities.")
    metadata: dict[str, str] = Field(default={}, description="Returned with the response.")
    truncation: Literal["disabled"] = Field(default="disabled", description="An input that is too long is refused.")
    user: Text | None = Field(default=None, description="Returned with the response.")
