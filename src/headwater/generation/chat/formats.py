"""How the served model writes tool calls and thinking: chosen from its chat template, or by flags."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from headwater.generation.reasoning import REASONING_FORMATS, ReasoningFormat
from headwater.generation.tool_formats.formats import TOOL_FORMATS
from headwater.generation.tool_formats.tool_format import ToolFormat
from headwater.messages.choices import ReasoningFormatName, ToolFormatName, ToolPromptName

AUTO = "auto"
GENERIC = "hermes"  # for templates of no known format, and in the prompt's description of tools
Format = TypeVar("Format", ToolFormat, ReasoningFormat)


@dataclass(frozen=True, slots=True)
class FormatFlags:
    """The flags `--tool-call-parser`, `--tool-prompt` and `--reasoning-parser`."""

    tool_call_parser: ToolFormatName = "auto"
    tool_prompt: ToolPromptName = "auto"
    reasoning_parser: ReasoningFormatName = "auto"


@dataclass(frozen=True, slots=True)
class ChatFormats:
    """The formats of the served model. Without one, calls or thinking stay in the text."""

    tools: ToolFormat | None = None
    describes_tools: bool = False  # in the system message, if the template has no place for them
    reasoning: ReasoningFormat | None = None


def choose_formats(template: str, flags: FormatFlags) -> ChatFormats:
    """The formats that the flags name, or that the chat template teaches."""
    tools = _chosen(flags.tool_call_parser, TOOL_FORMATS, template)
    if tools is None and flags.tool_call_parser == AUTO:
        tools = TOOL_FORMATS[GENERIC]
    describes = flags.tool_prompt == AUTO and tools is not None and tools.name == GENERIC
    return ChatFormats(tools, describes, _chosen(flags.reasoning_parser, REASONING_FORMATS, template))


def _chosen(flag: str, formats: Mapping[str, Format], template: str) -> Format | None:
    if flag != AUTO:
        return formats.get(flag)
    return next((found for found in formats.values() if found.is_of(template)), None)
