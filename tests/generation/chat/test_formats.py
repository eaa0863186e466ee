"""The formats of a model: from its chat template, or by flags."""

from pathlib import Path
from typing import get_args

import pytest

from headwater.generation.chat.formats import ChatFormats, FormatFlags, choose_formats
from headwater.generation.reasoning import REASONING_FORMATS
from headwater.generation.tool_formats.formats import TOOL_FORMATS
from headwater.messages.choices import ReasoningFormatName, ToolFormatName

QWEN3 = '<tool_call>\n{"name": <function-name>}</tool_call> <think>\n\n</think>'
DOCS = Path(__file__).parents[3] / "docs" / "tools.md"


def names(formats: ChatFormats) -> tuple[str | None, str | None, bool]:
    tools, reasoning = formats.tools, formats.reasoning
    return tools and tools.name, reasoning and reasoning.name, formats.describes_tools


@pytest.mark.parametrize(
    ("template", "flags", "expected"),
    [
        (QWEN3, FormatFlags(), ("hermes", "qwen3", True)),
        ("<|im_start|>", FormatFlags(), ("hermes", None, True)),
        ("", FormatFlags(tool_prompt="off"), ("hermes", None, False)),
        (QWEN3, FormatFlags(tool_call_parser="none", reasoning_parser="none"), (None, None, False)),
        (
            QWEN3,
            FormatFlags(tool_call_parser="llama3", reasoning_parser="deepseek-r1"),
            ("llama3", "deepseek-r1", False),
        ),
        ("[TOOL_CALLS][ARGS]", FormatFlags(), ("mistral", None, False)),
    ],
)
def test_chosen_formats(template: str, flags: FormatFlags, expected: tuple) -> None:
    assert names(choose_formats(template, flags)) == expected


def test_the_flags_accept_every_format_and_the_docs_list_it() -> None:
    assert [*get_args(ToolFormatName)] == ["auto", "none", *TOOL_FORMATS]
    assert [*get_args(ReasoningFormatName)] == ["auto", "none", *REASONING_FORMATS]
    page = DOCS.read_text()
    for each in (*TOOL_FORMATS.values(), *REASONING_FORMATS.values()):
        described = each.description.replace("|", "\\|")
        assert f"| `{each.name}` | {described} |" in page
