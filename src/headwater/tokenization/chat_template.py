"""Render a model's chat template to the text of a prompt.

A chat template is a Jinja program from the model's files, so it runs in Jinja's sandbox. Its environment is that of
`apply_chat_template` in Hugging Face transformers, for which templates are written.
"""

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headwater.tokenization.chat_messages import normalize_messages
from headwater.tokenization.template_form import TemplateForm, find_form

# Marks the end of a message that the model continues; the mark never reaches the model.
_CONTINUE_HERE = "\ue000continue here\ue000"

_RESERVED_NAMES = frozenset({"messages", "tools", "add_generation_prompt"})

# The errors of a sandboxed template with messages that its author did not expect.
_RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)


class ChatTemplate:
    """A Jinja chat template with the model's named special tokens."""

    def __init__(self, source: str, *, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text, with special tokens spelled out.

        `messages` and `tools` are OpenAI's objects. With `continue_final_message`, the text ends within the last
        message, which the model continues, and `add_generation_prompt` is ignored. `template_kwargs` are additional
        variables for the template (`enable_thinking`). ValueError if the messages are malformed, or if the template
        rejects them or fails.
        """
        template_kwargs = template_kwargs or {}
        if reserved := sorted(_RESERVED_NAMES & template_kwargs.keys()):
            raise ValueError(f"chat_template_kwargs: {reserved[0]!r} is set by the request itself")
        variables = {
            **self._special_tokens,
            **template_kwargs,
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        try:
            text = self._render_in(self.form, messages, variables, marks_end=continue_final_message)
        except ValueError:
            if self.form.empty_content == "empty":
                raise
            form = replace(self.form, empty_content="empty")  # the template may test for null in one place only
            text = self._render_in(form, messages, variables, marks_end=continue_final_message)
        return _cut_at_mark(text) if continue_final_message else text

    def _render_in(
        self,
        form: TemplateForm,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        *,
        marks_end: bool,
    ) -> str:
        developer_role = "developer" if "developer" in self.source else "system"
        shaped = normalize_messages(messages, developer_role=developer_role, form=form)
        if marks_end:
            _mark_end(shaped[-1])
        return self._render({**variables, "messages": shaped})

    @cached_property
    def form(self) -> TemplateForm:
        """The form of messages that the template expects, found once by rendering examples."""
        return find_form(
            lambda messages, tools: self._render(
                {**self._special_tokens, "messages": messages, "tools": tools, "add_generation_prompt": True}
            )
        )

    @cached_property
    def variables(self) -> frozenset[str]:
        """The variables that the template reads but does not set."""
        return frozenset(meta.find_undeclared_variables(_environment().parse(self.source)))

    def _render(self, variables: Mapping[str, Any]) -> str:
        try:
            return self._compiled.render(variables)
        except _RENDER_ERRORS as error:
            raise ValueError(f"messages: the model's chat template refused them: {error}") from error

    @cached_property
    def _compiled(self) -> jinja2.Template:
        try:
            return _environment().from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"messages: the model's chat template is not valid Jinja: {error}") from error


def _mark_end(message: dict[str, Any]) -> None:
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _CONTINUE_HERE + " "
    elif content:
        content[-1]["text"] += _CONTINUE_HERE + " "
    else:
        raise ValueError("continue_final_message: the last message has no content to go on with")


def _cut_at_mark(text: str) -> str:
    position = text.rfind(_CONTINUE_HERE)
    if position < 0:
        raise ValueError("continue_final_message: the model's chat template does not print the last message's content")
    # without the space after the mark, the template strips contents, so the text before is stripped as well
    keeps_spaces = text.startswith(" ", position + len(_CONTINUE_HERE))
    return text[:position] if keeps_spaces else text[:position].rstrip()


class _GenerationBlock(Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's text for training; here it only prints."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON in the form of the models' training data; Jinja's own filter would escape HTML's special characters."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        default=_list_of_generator,
    )


def _list_of_generator(value: Any) -> list[Any]:
    """`tools | map(attribute='function') | tojson` gives a generator in Python, but a list in other Jinjas."""
    if isinstance(value, Iterator):
        return list(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
