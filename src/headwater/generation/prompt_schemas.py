"""What makes a prompt out of a conversation or a text: the same fields on every route that takes them."""

from typing import Annotated, Any, ClassVar

from pydantic import Field

from headwater.generation.field_table import REFUSED_OF_PROMPTS
from headwater.generation.request_fields import Body, Names
from headwater.generation.validation import Text

ParseSpecialTokens = Annotated[
    bool | None,
    Field(
        description="Whether special tokens spelled out in the text become control tokens. "
        "Left out: as `--parse-special-tokens` says; by default in `text` and `prompt`, not in `messages`."
    ),
]


class ChatPrompt(Body):
    """A conversation and all that changes how the chat template shows it."""

    messages: list[dict[str, Any]] | None = Field(
        default=None, description="A conversation, put through the chat template."
    )
    tools: list[dict[str, Any]] | None = Field(
        default=None, description="Given to the chat template; a 400 where it shows none."
    )
    tool_choice: Any = Field(default="auto", description="`auto` or `none` (hides the tools), so far.")
    documents: list[dict[str, Any]] | None = Field(
        default=None, description="Given to the chat template; a 400 where it shows none."
    )
    reasoning_effort: Text | None = Field(default=None, description="Given to the chat template.")
    add_generation_prompt: bool = Field(default=True, description="End where the assistant begins to speak.")
    continue_final_message: bool = Field(default=False, description="Go on with the last message.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="More variables for the chat template, like `enable_thinking`."
    )
    add_special_tokens: bool | None = Field(
        default=None,
        description="Put BOS before the prompt where the model wants it. Default: before a text, not before "
        "`messages`, whose template writes it.",
    )
    parse_special_tokens: ParseSpecialTokens = None


class TokenizeRequest(ChatPrompt):
    """Text to encode: `prompt`, or chat `messages`. Fields that change no prompt are ignored, so a chat's body fits."""

    names: ClassVar[Names] = Names(refused=REFUSED_OF_PROMPTS)
    prompt: Text | list[Text] | None = None
    text: Text | list[Text] | None = Field(default=None, description="The same as prompt.")
    model: Any = None
