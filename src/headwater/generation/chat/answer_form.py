"""How the answers to one conversation are written and read: the grammar of their calls, and a reader of their text."""

import json
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from headwater.generation.answer_parser import AnswerParser
from headwater.generation.assistant_message import AssistantMessage, new_call_id
from headwater.generation.chat.call_grammars import calls_or, text_with_calls
from headwater.generation.chat.thinking import Thinking
from headwater.generation.chat.tool_choice import ToolChoice
from headwater.generation.errors import InvalidRequest, bad_request, unsupported
from headwater.generation.grammar.texts import GrammarTexts
from headwater.generation.text_request import TextOptions
from headwater.generation.tool_formats.tool_format import Tool, ToolFormat
from headwater.grammars.errors import GrammarError
from headwater.messages.generation import Grammar
from headwater.tokenization.tokenizer import Tokenizer

_ANY_OBJECT = {"type": "object", "additionalProperties": True}
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
    holds_calls: bool = False  # until they are complete

    async def grammar(
        self, answer: Grammar | None, texts: GrammarTexts, *, budget: int | None = None
    ) -> Grammar | None:
        """The grammar of the whole answer. InvalidRequest for a schema of a tool that no grammar can express.

        `answer`: the form of its content that the request asks for. `budget`: most tokens of thinking.
        """
        text = "" if answer is None else answer.text
        if self.choice.is_forced or (self._parsed_format is not None and (text or self.choice.is_strict)):
            text = await self._with_calls(text, texts)
        param = "response_format" if answer is not None else "tools"
        return self.thinking.before(text, budget=budget, param="tool_choice" if self.choice.is_forced else param)

    def text_options(self, options: TextOptions) -> TextOptions:
        """The options with which the text has the markers of calls and thinking."""
        formats = (self._parsed_format, self.thinking.format)
        needs_special = any(each is not None and each.needs_special_tokens for each in formats)
        return replace(options, skip_special_tokens=False) if needs_special else options

    def message(self) -> AssistantMessage:
        """A reader of one answer."""
        reasoning = self.thinking.format if self.separates_reasoning else None
        parser, tools = None, [_tool(given) for given in self._callable]
        if self._parsed_format is not None or reasoning is not None:
            parser = AnswerParser(
                self._parsed_format,
                reasoning,
                tools=tools,
                prompt=self.thinking.prompt_end,
                holds_calls=self.holds_calls,
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
        if self.tool_format is not None and (self.choice.tools or self.tool_format.is_whole):
            return self.tool_format
        return None

    async def _with_calls(self, answer: str, texts: GrammarTexts) -> str:
        """The grammar of an answer that may hold calls. If it is refused, the tool that is to blame is named."""
        if self.tool_format is None:
            raise unsupported("tool_choice", "tool_choice: no call can be forced with --tool-call-parser none")
        parallel = self.is_parallel and self.choice.name is None
        facts = [self.tool_format.name, self._callable, self.choice.is_forced, parallel, answer]
        try:
            return await texts.written(partial(self._write, answer), asked=json.dumps(facts), param="tools")
        except InvalidRequest as error:
            refused = error
        for given in self._callable:
            write = partial(self._write_calls, [_tool(given)])
            try:
                await texts.written(write, asked=json.dumps([self.tool_format.name, given]), param="tools")
            except (InvalidRequest, GrammarError) as error:
                raise self._refusal(given, str(error).removeprefix("tools: ")) from None
        raise refused

    def _write(self, answer: str) -> str:
        """The grammar, not validated; "" if calls begin like other text."""
        try:
            calls = self._write_calls([_tool(given) for given in self._callable])
        except GrammarError:
            calls = self._write_calls([self._enforceable(given) for given in self._callable])
        if self.choice.is_forced:
            return calls
        if answer:
            return calls_or(calls, answer)
        return text_with_calls(calls, parallel=self.is_parallel) or ""

    def _write_calls(self, tools: Sequence[Tool]) -> str:
        """The grammar of an answer that is calls and nothing else."""
        assert self.tool_format is not None
        parallel = self.is_parallel and self.choice.name is None
        return self.tool_format.grammar(tools, parallel=parallel, special_tokens=self.tokenizer.special_token_ids)

    def _enforceable(self, given: Mapping[str, Any]) -> Tool:
        """The tool with a schema that a grammar can express. A schema that need not be followed may give way."""
        tool = _tool(given)
        try:
            self._write_calls([tool])
        except GrammarError as error:
            if not self.choice.is_forced and not given["function"].get("strict"):
                return Tool(tool.name, _ANY_OBJECT)
            raise self._refusal(given, str(error)) from None
        return tool

    @property
    def _callable(self) -> tuple[Mapping[str, Any], ...]:
        return self.choice.callable_tools

    def _refusal(self, given: Mapping[str, Any], reason: str) -> InvalidRequest:
        where = f"tools[{self.choice.tools.index(given)}].function.parameters"
        return bad_request(where, f"{where}: {reason}", code="invalid_grammar")


def _tool(given: Mapping[str, Any]) -> Tool:
    function = given["function"]
    return Tool(function["name"], function.get("parameters") or {})


def _short_id() -> str:
    """An id for Mistral's templates, which take only nine letters and digits."""
    return "".join(secrets.choice(_LETTERS_AND_DIGITS) for _ in range(9))
