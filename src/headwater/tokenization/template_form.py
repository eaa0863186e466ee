"""The form of a conversation that a chat template expects, found by rendering a short one in every form.

OpenAI's clients send a tool call's arguments as JSON text, and null as the content of its message. Templates differ:
some concatenate the arguments' text, others iterate over an object; some test `content is none`, others concatenate
the content.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Message = dict[str, Any]
Render = Callable[[Sequence[Message], Sequence[Mapping[str, Any]] | None], str]  # ValueError: the template rejects it
ArgumentsForm = Literal["object", "text"]
EmptyContent = Literal["null", "empty", "absent"]

_KEY, _VALUE, _RESULT, _WORDS, _TOOL = (
    f"probe_{name}_of_headwater" for name in ("key", "value", "result", "words", "f")
)
_ARGUMENTS = {_KEY: [_VALUE, True]}
_PARAMETERS = {"type": "object", "properties": {_KEY: {"type": "array", "description": "d"}}, "required": [_KEY]}
_TOOLS = [{"type": "function", "function": {"name": _TOOL, "description": "d", "parameters": _PARAMETERS}}]
_FORMS: list[tuple[ArgumentsForm, EmptyContent]] = [
    (arguments, content) for arguments in get_args(ArgumentsForm) for content in get_args(EmptyContent)
]
_DEFAULT_FORM: tuple[ArgumentsForm, EmptyContent] = ("object", "empty")
_CALL_ID = "call12345"  # Mistral's templates want nine letters and digits


@dataclass(frozen=True, slots=True)
class TemplateForm:
    """The form in which `normalize_messages` prepares a conversation for a template.

    The defaults are for templates that reject every form.
    """

    arguments: ArgumentsForm = "object"  # of tool calls
    takes_argument_text: bool = False  # prints text as it is, so that arguments that are not JSON may pass
    empty_content: EmptyContent = "empty"  # the value of missing content beside tool calls
    shows_calls: bool = True
    shows_calls_beside_content: bool = True
    shows_results: bool = True  # prints messages of the role `tool`
    shows_tools: bool = True  # prints the available tools
    has_content_parts: bool = False  # prints content given as a list of parts


def find_form(render: Render) -> TemplateForm:
    """The form in which `render` prints everything, found with about twenty renderings of a few messages."""
    has_parts = _shows_only_parts(render)
    probe = _Probe(render, has_parts=has_parts)
    grades = {form: probe.grade(_call(*form)) for form in _FORMS}
    best = max(grades.values())
    arguments, content = next(form for form in _FORMS if grades[form] == best) if best else _DEFAULT_FORM
    call = _call(arguments, content) if best else _said("assistant", "Hi", has_parts=has_parts)
    beside = _call(arguments, "empty") | {"content": _content(_WORDS, has_parts=has_parts)}
    return TemplateForm(
        arguments=arguments,
        takes_argument_text=best > 0 and max(grades[form] for form in _FORMS if form[0] == "text") == best,
        empty_content=content,
        shows_calls=best > 0 or probe.is_refused(_call("object", "empty")),
        shows_calls_beside_content=best == 0 or probe.grade(beside) > 0 or probe.is_refused(beside),
        shows_results=_RESULT in probe.text(call) or probe.is_refused(call),
        shows_tools=_TOOL in _try(render, [_said("user", "Hi", has_parts=has_parts)]),
        has_content_parts=has_parts,
    )


def _shows_only_parts(render: Render) -> bool:
    text, parts = (_try(render, [_said("user", _WORDS, has_parts=has_parts)]) for has_parts in (False, True))
    return _WORDS in parts and _WORDS not in text


class _Probe:
    """Renders an assistant's message within a realistic conversation."""

    def __init__(self, render: Render, *, has_parts: bool) -> None:
        self._render = render
        self._has_parts = has_parts

    def grade(self, call: Message) -> int:
        """A grade for the printed arguments: 0 if absent, 1 if quoted twice or in Python's notation, 2 if good."""
        text = self.text(call)
        if _KEY not in text or _VALUE not in text or self._prints_null(call, text):
            return 0
        return 1 if f'\\"{_VALUE}' in text or repr(_ARGUMENTS) in text else 2

    def is_refused(self, call: Message) -> bool:
        return not self.text(call)

    def text(self, call: Message) -> str:
        """The conversation's text; "" if the template rejects it."""
        result = _said("tool", _RESULT, has_parts=self._has_parts) | {"tool_call_id": _CALL_ID, "name": _TOOL}
        user, end = (_said(role, "Hi", has_parts=self._has_parts) for role in ("user", "assistant"))
        for messages in ([user, call, result, end, user], [user, call, result]):
            if text := _try(self._render, messages):
                return text
        return ""

    def _prints_null(self, call: Message, text: str) -> bool:
        if call.get("content", "") is not None:
            return False
        without = self.text(call | {"content": ""})
        return any(text.count(null) > without.count(null) for null in ("None", "null"))


def _call(arguments: str, content: str) -> Message:
    given: Any = _ARGUMENTS if arguments == "object" else json.dumps(_ARGUMENTS)
    call = {"id": _CALL_ID, "type": "function", "function": {"name": _TOOL, "arguments": given}}
    message: Message = {"role": "assistant", "tool_calls": [call]}
    return message if content == "absent" else message | {"content": None if content == "null" else ""}


def _said(role: str, text: str, *, has_parts: bool = False) -> Message:
    return {"role": role, "content": _content(text, has_parts=has_parts)}


def _content(text: str, *, has_parts: bool) -> Any:
    return [{"type": "text", "text": text}] if has_parts else text


def _try(render: Render, messages: Sequence[Message]) -> str:
    try:
        return render(messages, _TOOLS)
    except ValueError:
        return ""
