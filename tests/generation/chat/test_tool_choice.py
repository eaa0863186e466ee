"""Which tools an answer may call, and whether it must: from the fields `tools` and `tool_choice`."""

from typing import Any

import pytest

from headwater.generation.chat.tool_choice import MAX_TOOLS, ToolChoice, read_tool_choice
from headwater.generation.errors import InvalidRequest


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name} | more}


TOOLS = [tool("look"), tool("buy", strict=True)]


def names(choice: ToolChoice) -> list[str]:
    return [each["function"]["name"] for each in choice.callable_tools]


def test_auto_shows_all_tools_and_forces_none() -> None:
    choice = read_tool_choice(TOOLS, "auto")
    assert (names(choice), choice.is_forced, choice.is_strict) == (["look", "buy"], False, True)
    assert not read_tool_choice(TOOLS[:1], "auto").is_strict


def test_none_hides_the_tools() -> None:
    assert read_tool_choice(TOOLS, "none") == ToolChoice()


def test_required_forces_any_of_them() -> None:
    choice = read_tool_choice(TOOLS, "required")
    assert (names(choice), choice.is_forced) == (["look", "buy"], True)


@pytest.mark.parametrize("named", [tool("buy"), {"type": "function", "name": "buy"}])
def test_a_named_function_is_the_only_one_that_may_be_called_but_all_are_shown(named: dict[str, Any]) -> None:
    choice = read_tool_choice(TOOLS, named)
    assert (names(choice), choice.is_forced) == (["buy"], True)
    assert len(choice.tools) == 2


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_of_allowed_tools_only_these_are_shown(mode: str) -> None:
    allowed = {"mode": mode, "tools": [tool("buy")]}
    for given in ({"type": "allowed_tools", "allowed_tools": allowed}, {"type": "allowed_tools"} | allowed):
        choice = read_tool_choice(TOOLS, given)
        assert (names(choice), choice.is_forced) == (["buy"], mode == "required")
        assert len(choice.tools) == 1


@pytest.mark.parametrize(
    ("tools", "choice", "param", "words"),
    [
        (TOOLS, "sometimes", "tool_choice", "'required'"),
        (TOOLS, tool("sell"), "tool_choice", "'sell'"),
        (TOOLS, {"type": "function"}, "tool_choice", "NAME"),
        (TOOLS, {"type": "allowed_tools", "tools": [tool("sell")]}, "tool_choice", "'sell'"),
        (TOOLS, {"type": "allowed_tools"}, "tool_choice", "allowed_tools"),
        (None, "required", "tool_choice", "needs tools"),
        (None, tool("buy"), "tool_choice", "'buy'"),
        ([{"type": "web_search"}], "auto", "tools[0].type", "'web_search'"),
        ([*TOOLS, {"type": "function"}], "auto", "tools[2].function", "object"),
        ([tool("")], "auto", "tools[0].function.name", "256"),
        ([tool("f", parameters=[])], "auto", "tools[0].function.parameters", "schema"),
        ([tool("f", strict="yes")], "auto", "tools[0].function.strict", "true or false"),
        ([tool("f")] * (MAX_TOOLS + 1), "none", "tools", "512"),
    ],
)
def test_a_fault_is_a_400_that_names_its_place(tools: Any, choice: Any, param: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_tool_choice(tools, choice)
    assert caught.value.param == param
    assert caught.value.message.startswith(param + ":") and words in caught.value.message
