"""A family's way of writing tool calls, as data: where it is found, how it is read, which grammar writes it."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headwater.generation.tool_formats.reading.call_writer import CallWriter
from headwater.generation.tool_formats.reading.reader import Parse, Reader
from headwater.grammars.errors import GrammarError
from headwater.grammars.json_schemas import prepare_schema


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `parameters` is the JSON schema of its arguments."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def properties(self) -> Mapping[str, Any]:
        """Schema of each parameter."""
        properties = self.parameters.get("properties")
        return properties if isinstance(properties, Mapping) else {}


_NAME = re.compile(r"[\w.-]+")
Tools = Mapping[str, Tool]  # by name
ReadCalls = Callable[[Reader, CallWriter, Tools], Parse[None]]  # up to the answer's end
WriteGrammar = Callable[[Sequence[Tool], bool, Mapping[str, int]], str]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How one family of models writes its calls.

    `needs_special_tokens`: its markers are special tokens, so the text must show them. `is_whole`: the format marks
    thinking and content as well, so it reads the answer from its first character.
    """

    name: str
    description: str
    read: ReadCalls
    is_of: Callable[[str], bool]  # does a chat template with this text teach it?
    write_grammar: WriteGrammar
    needs_special_tokens: bool = False
    takes_any_name: bool = False  # of a function; names are JSON strings
    trims: bool = True  # whitespace between content and calls belongs to neither
    is_whole: bool = False
    thinking_ends: tuple[str, ...] = ()  # beginnings of calls that end a thinking that was left open
    opened_by: Callable[[str], str] = lambda prompt: ""  # the end of a prompt that the answer continues

    def grammar(
        self, tools: Sequence[Tool], *, parallel: bool = True, special_tokens: Mapping[str, int] | None = None
    ) -> str:
        """llguidance's Lark text for an answer that is one call of `tools`, or several if `parallel`.

        `special_tokens`: the vocabulary's special tokens and their ids. A marker among them is that token. Raises
        GrammarError if a tool cannot be called in this format with arguments that are sure to follow its schema.
        """
        text = self.write_grammar([self._prepared(tool) for tool in tools], parallel, special_tokens or {})
        try:
            text.encode()
        except UnicodeEncodeError:
            raise GrammarError("", "", "half of a surrogate pair cannot be written") from None
        return text

    def _prepared(self, tool: Tool) -> Tool:
        """The tool with a schema that can be enforced: an object that holds no parameters but those that are named."""
        if not self.takes_any_name and not _NAME.fullmatch(tool.name):
            raise GrammarError("", "", f"the name {tool.name!r} cannot be written in this format")
        schema = {"type": "object", "properties": {}, **tool.parameters}
        properties, required = schema["properties"], schema.get("required")
        if isinstance(properties, Mapping) and isinstance(required, list):
            unnamed = {name: {} for name in required if isinstance(name, str) and name not in properties}
            schema["properties"] = {**properties, **unnamed}
        return Tool(tool.name, prepare_schema(schema, closes_objects=True))
