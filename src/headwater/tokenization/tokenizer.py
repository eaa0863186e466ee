"""The tokenizer of a served model: encodes and decodes text, and renders chat messages to a prompt."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from headwater.tokenization.chat_template import ChatTemplate
from headwater.tokenization.incremental import IncrementalDecoder
from headwater.tokenization.text_encoder import TextEncoder
from headwater.tokenization.tokenizer_parts import TokenizerParts


class Tokenizer(TextEncoder):
    """Encodes, decodes and renders chats. Its methods may be called from several threads."""

    def __init__(self, parts: TokenizerParts) -> None:
        super().__init__(parts)
        self.special_tokens = dict(parts.special_tokens)  # "bos_token" -> "<s>", ...
        self.eos_token_ids = parts.eos_token_ids
        self.bos_token_id = self._id_of_named("bos_token")
        self.vocab_size = parts.backend.get_vocab_size(with_added_tokens=True)
        self._chat_templates = {
            name: ChatTemplate(source, special_tokens=parts.special_tokens)
            for name, source in parts.chat_templates.items()
        }

    @property
    def special_token_ids(self) -> dict[str, int]:
        """Special tokens by their spelling."""
        named = ((self._backend.id_to_token(token_id), token_id) for token_id in self.spelling.special_ids)
        return {text: token_id for text, token_id in named if text is not None}

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids, equal to the text of a stream. Ids without a token have no text.

        ValueError for an invalid id.
        """
        decoder = IncrementalDecoder(self.spelling, skip_special_tokens=skip_special_tokens)
        return decoder.feed(list(token_ids)) + decoder.finish()

    def token_text(self, token_id: int) -> str:
        """A token as text, with special tokens spelled out and U+FFFD for incomplete characters."""
        return self.spelling.bytes_of(token_id).decode("utf-8", errors="replace")

    def is_slow_for(self, said: Any, *, parses_special: bool) -> bool:
        """Whether encoding this text or these messages needs a preparation that would block an event loop."""
        return not parses_special and self._literal.must_prepare_for(said)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._chat_templates)

    def chat_template_source(self, *, has_tools: bool) -> str:
        """The Jinja text of the chat template; "" if the model has none."""
        try:
            return self._chat_template(has_tools=has_tools).source
        except ValueError:
            return ""

    def shows(self, name: Literal["tools", "documents"], *, has_tools: bool) -> bool:
        """Whether the chat template prints the tools, or reads the documents, of a request."""
        template = self._chat_template(has_tools=has_tools)
        return template.form.shows_tools if name == "tools" else name in template.variables

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text for OpenAI chat messages; see `ChatTemplate.render`.

        ValueError if the model has no chat template, if the messages are malformed, or if the template rejects them.
        """
        return self._chat_template(has_tools=bool(tools)).render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        add_special_tokens: bool = False,
        parses_special: bool = True,
    ) -> list[int]:
        """Token ids of `render_chat`. The template writes BOS if the model wants it.

        Without `parses_special`, spelled-out control tokens in the arguments stay text. Those of the template are
        always control tokens.
        """
        given: Any = (messages, tools, template_kwargs)
        if not parses_special:
            given = self._literal.hide(given)
        text = self.render_chat(
            given[0],
            tools=given[1],
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=given[2],
        )
        if not parses_special and self._literal.is_hidden_in(text):
            return self._encode_literal(text, add_special_tokens=add_special_tokens)
        return self.encode(text, add_special_tokens=add_special_tokens)

    def _chat_template(self, *, has_tools: bool) -> ChatTemplate:
        if has_tools and "tool_use" in self._chat_templates:
            return self._chat_templates["tool_use"]
        if "default" in self._chat_templates:
            return self._chat_templates["default"]
        raise ValueError("messages: this model has no chat template; send a prompt to /v1/completions")

    def _id_of_named(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)
