"""Read `tools` and `tool_choice` of a body: which functions the answer may call, and whether it must."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headwater.generation.errors import bad_request

MAX_TOOLS = 512
MAX_NAME_CHARS = 256
_NAMED = "{'type': 'function', 'function': {'name': NAME}}"


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """The tools of one request. Without tools, or with `none`, nothing is shown and nothing is parsed."""

    tools: tuple[Mapping[str, Any], ...] = ()  # shown to the model; OpenAI's objects
    name: str | None = None  # the one function that must be called
    is_forced: bool = False  # the answer is one call or several

    @property
    def callable_tools(self) -> tuple[Mapping[str, Any], ...]:
        """The tools that the answer may call."""
        return tuple(tool for tool in self.tools if self.name in (None, tool["function"]["name"]))

    @property
    def is_strict(self) -> bool:
        """Whether a tool asks for arguments that follow its schema."""
        return any(tool["function"].get("strict") for tool in self.tools)


def read_tool_choice(tools: Sequence[Any] | None, choice: Any) -> ToolChoice:
    """Check both fields. InvalidRequest names the place of the first fault."""
    checked = _checked_tools(tools or ())
    if isinstance(choice, Mapping):
        return _of_object(checked, choice)
    if choice not in ("auto", "none", "required"):
        raise bad_request("tool_choice", f"tool_choice: must be 'auto', 'none', 'required' or {_NAMED}, got {choice!r}")
    if choice == "none":
        return ToolChoice()
    return _choice_among(checked, is_forced=choice == "required")


def _choice_among(tools: tuple[Mapping[str, Any], ...], *, is_forced: bool) -> ToolChoice:
    if is_forced and not tools:
        raise bad_request("tool_choice", "tool_choice: 'required' needs tools")
    return ToolChoice(tools, is_forced=is_forced)


def _of_object(tools: tuple[Mapping[str, Any], ...], choice: Mapping[str, Any]) -> ToolChoice:
    if choice.get("type") == "allowed_tools":
        return _of_allowed(tools, choice.get("allowed_tools", choice))
    name = _name_in(choice)
    if choice.get("type", "function") != "function" or not isinstance(name, str):
        raise bad_request("tool_choice", f"tool_choice: must be {_NAMED}, got {dict(choice)!r}")
    _check_known(name, tools)
    return ToolChoice(tools, name=name, is_forced=True)


def _of_allowed(tools: tuple[Mapping[str, Any], ...], allowed: Any) -> ToolChoice:
    """OpenAI's `allowed_tools`: the model sees and may call these tools only."""
    listed = allowed.get("tools") if isinstance(allowed, Mapping) else None
    if not isinstance(listed, list) or allowed.get("mode", "auto") not in ("auto", "required"):
        message = "allowed_tools needs a list of tools, and the mode 'auto' or 'required'"
        raise bad_request("tool_choice", f"tool_choice: {message}")
    names = [_name_in(tool) if isinstance(tool, Mapping) else None for tool in listed]
    for name in names:
        _check_known(name, tools)
    shown = tuple(tool for tool in tools if tool["function"]["name"] in names)
    return _choice_among(shown, is_forced=allowed.get("mode") == "required")


def _name_in(choice: Mapping[str, Any]) -> Any:
    """The function's name in the form of chat completions, or in that of responses."""
    function = choice.get("function")
    return function.get("name") if isinstance(function, Mapping) else choice.get("name")


def _check_known(name: Any, tools: Sequence[Mapping[str, Any]]) -> None:
    known = [tool["function"]["name"] for tool in tools]
    if name not in known:
        raise bad_request("tool_choice", f"tool_choice: no tool has the name {name!r}; tools: {known}")


def _checked_tools(tools: Sequence[Any]) -> tuple[Mapping[str, Any], ...]:
    if len(tools) > MAX_TOOLS:
        raise bad_request("tools", f"tools: must hold at most {MAX_TOOLS} tools, got {len(tools)}")
    for index, tool in enumerate(tools):
        _check_tool(tool, where=f"tools[{index}]")
    return tuple(tools)


def _check_tool(tool: Any, *, where: str) -> None:
    if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
        kind = tool.get("type") if isinstance(tool, Mapping) else tool
        raise bad_request(f"{where}.type", f"{where}.type: must be 'function', got {kind!r}")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise bad_request(f"{where}.function", f"{where}.function: must be an object")
    name = function.get("name")
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME_CHARS:
        message = f"{where}.function.name: must be a string of 1 to {MAX_NAME_CHARS} characters"
        raise bad_request(f"{where}.function.name", message)
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise bad_request(f"{where}.function.parameters", f"{where}.function.parameters: must be a JSON schema object")
    if function.get("strict") not in (None, False, True):
        raise bad_request(f"{where}.function.strict", f"{where}.function.strict: must be true or false")
