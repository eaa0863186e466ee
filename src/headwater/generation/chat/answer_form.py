"""How the answers to one conversation are written and read: the grammar of their calls, and a reader of their text."""

import secrets
import string
from dataclasses import dataclass, replace

from headwater.generation.answer_parser import AnswerParser
from headwater.generation.assistant_message import AssistantMessage, new_call_id
from headwater.generation.chat.thinking import Thinking
from headwater.generation.chat.tool_choice import ToolChoice
from headwater.generation.errors import unsupported
from headwater.generation.text_request import TextOptions
from headwater.generation.tool_formats.tool_format import Tool, ToolFormat
from headwater.messages.generation import Grammar
from headwater.tokenization.tokenizer import Tokenizer

_LETTERS_AND_DIGITS = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """The form of the answers to one request."""

    choice: ToolChoice
    tool_format: ToolFormat | None  # None: calls stay in the content
    thinking: Thinking
    tokenizer: Tokenizer
    is_parallel: bool = True  # may an answer hold several calls
    separates_reasoning: bool = True
    streams_reasoning: bool = True

    def grammar(self, text: str, *, budget: int | None = None) -> Grammar | None:
        """The grammar of an answer whose part behind the thinking matches `text`; "": any. `budget`: of thinking."""
        return self.thinking.before(text, budget=budget)

    def text_options(self, options: TextOptions) -> TextOptions:
        """The options with which the text has the markers of calls and thinking."""
        formats = (self._parsed_format, self.thinking.format)
        needs_special = any(each is not None and each.needs_special_tokens for each in formats)
        return replace(options, skip_special_tokens=False) if needs_special else options

    def message(self) -> AssistantMessage:
        """A reader of one answer."""
        reasoning = self.thinking.format if self.separates_reasoning else None
        parser = None
        if self._parsed_format is not None or reasoning is not None:
            parser = AnswerParser(
                self._parsed_format, reasoning, tools=_tools(self.choice), prompt=self.thinking.prompt_end
            )
        return AssistantMessage(
            parser,
            max_calls=None if self.is_parallel else 1,
            new_id=_short_id if self._has_short_ids else new_call_id,
            streams_reasoning=self.streams_reasoning,
        )

    @property
    def _has_short_ids(self) -> bool:
        return self.tool_format is not None and self.tool_format.name.startswith("mistral")

    @property
    def _parsed_format(self) -> ToolFormat | None:
        return self.tool_format if self.choice.tools else None

    def calls(self) -> str:
        """The grammar of calls that must be made, not validated. GrammarError for a schema that cannot be enforced."""
        if self.tool_format is None:
            raise unsupported("tool_choice", "tool_choice: no call can be forced with --tool-call-parser none")
        return self.tool_format.grammar(
            _tools(self.choice),
            parallel=self.is_parallel and self.choice.name is None,
            special_tokens=self.tokenizer.special_token_ids,
        )


def _tools(choice: ToolChoice) -> list[Tool]:
    functions = [tool["function"] for tool in choice.callable_tools]
    return [Tool(function["name"], function.get("parameters") or {}) for function in functions]


def _short_id() -> str:
    """An id for Mistral's templates, which take only nine letters and digits."""
    return "".join(secrets.choice(_LETTERS_AND_DIGITS) for _ in range(9))
