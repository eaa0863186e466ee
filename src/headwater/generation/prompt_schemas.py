"""Fields that turn a conversation or a text into a prompt, the same on every route that takes them."""

from typing import Annotated, Any, ClassVar

from pydantic import Field

from headwater.generation.body import Body, Names
from headwater.generation.field_table import REFUSED_OF_PROMPTS
from headwater.generation.validation import Text

ParseSpecialTokens = Annotated[
    bool | None,
    Field(
        description="Whether special tokens spelled out in the text become control tokens. "
        "Left out: `--parse-special-tokens` decides; by default in `text` and `prompt`, not in `messages`."
    ),
]


class ChatPrompt(Body):
    """A conversation, and the fields that change how the chat template renders it."""

    messages: list[dict[str, Any]] | None = Field(
        default=None, description="A conversation, rendered by the chat template."
    )
    tools: list[dict[str, Any]] | None = Field(
        default=None, description="Functions that the answer may call, as OpenAI's objects."
    )
    tool_choice: Any = Field(
        default="auto",
        description="`auto`; `none`, which hides the tools; `required`; or the one function to call: "
        '`{"type": "function", "function": {"name": NAME}}`.',
    )
    documents: list[dict[str, Any]] | None = Field(
        default=None, description="Passed to the chat template; a 400 if the template does not use them."
    )
    reasoning_effort: Text | None = Field(default=None, description="Passed to the chat template.")
    add_generation_prompt: bool = Field(default=True, description="End with the header of the assistant's message.")
    continue_final_message: bool = Field(default=False, description="Continue the last message.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Further variables for the chat template, for example `enable_thinking`."
    )
    add_special_tokens: bool | None = Field(
        default=None,
        description="Prepend BOS if the model expects it. Default: for a text, but not for `messages`.",
    )
    parse_special_tokens: ParseSpecialTokens = None


class TokenizeRequest(ChatPrompt):
    """A `prompt` or chat `messages` to encode. Other fields of a chat request are accepted and ignored."""

    names: ClassVar[Names] = Names(refused=REFUSED_OF_PROMPTS)
    prompt: Text | list[Text] | None = Field(default=None, description="A text, or a list of texts.")
    text: Text | list[Text] | None = Field(default=None, description="The same as prompt.")
    model: Any = Field(default=None, description="Ignored, since one model is served.")
