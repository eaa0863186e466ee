"""Bodies of Anthropic's API. A null counts as left out."""

from typing import Any, ClassVar

from pydantic import Field

from headwater.generation.body import Body, Names
from headwater.generation.field_table import IGNORED, REFUSED, Refused
from headwater.generation.validation import NumTokensFromOne, Stop, Text
from headwater.http_api.openai.conversation import ConversationRequest

_REFUSED = dict(REFUSED) | {
    "container": Refused("nothing runs on this server but the model"),
    "mcp_servers": Refused("this server calls no other servers"),
    "diagnostics": Refused("the answer cannot tell this"),
    "speed": Refused("there is one speed", neutral=("standard",)),
}
_OTHER_NAMES = {
    "max_completion_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "response_format": "output_config.format",
    "output_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "prompt": "messages",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
}
# name -> why an answer is the same without it
_IGNORED = {
    "cache_control": "prefixes are cached anyway",
    "metadata": IGNORED["metadata"],
    "service_tier": IGNORED["service_tier"],
    "inference_geo": "for the provider's own books",
    "user_profile_id": "for the provider's own books",
    "workspace_id": "for the provider's own books",
}


class MessagesPrompt(Body):
    """The fields that make the prompt."""

    names: ClassVar[Names] = Names(refused=_REFUSED, other_names=_OTHER_NAMES, ignored=_IGNORED)
    messages: list[dict[str, Any]] = Field(
        description="Objects with `role` (user, assistant or system) and `content`: a string, or blocks of the types "
        "text, tool_use, tool_result, thinking and redacted_thinking. The answer continues a last message of the "
        "assistant.",
        json_schema_extra={"examples": [[{"role": "user", "content": "What is a radix tree?"}]]},
    )
    system: Text | list[dict[str, Any]] | None = Field(
        default=None, description="The system prompt: a string, or text blocks."
    )
    tools: list[dict[str, Any]] = Field(
        default=[], description="Objects with `name`, `description`, `input_schema` and `strict`."
    )
    tool_choice: dict[str, Any] | None = Field(
        default=None,
        description="`type` is auto, any, tool (with `name`) or none; `disable_parallel_tool_use` allows one call.",
    )
    thinking: dict[str, Any] | None = Field(
        default=None,
        description="`type` is enabled (with `budget_tokens`), adaptive or disabled; `display: omitted` leaves the "
        "thinking out of the answer.",
    )
    output_config: dict[str, Any] | None = Field(
        default=None, description="`format` with a JSON schema that the answer must match; `effort` for the template."
    )
    context_management: dict[str, Any] | None = Field(
        default=None, description="`edits` that keep everything, since nothing is cut from a prompt."
    )


class MessagesRequest(MessagesPrompt, ConversationRequest):
    """Answer a conversation."""

    names: ClassVar[Names] = MessagesPrompt.names
    max_tokens: NumTokensFromOne = Field(description="Reduced to what fits the context.")
    stop_sequences: Stop = Field(default=[], description="Strings that end the answer; left out of it.")


class CountTokensRequest(MessagesPrompt):
    """A conversation whose prompt is counted. Other fields of a message are accepted and ignored."""

    names: ClassVar[Names] = MessagesPrompt.names
    model: str = Field(default="default", description="The served name, or `default`.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Further variables for the chat template, for example `enable_thinking`."
    )
