"""Rendering chat templates."""

import datetime
import re

import pytest
from tiny_tokenizers import CHAT_TEMPLATE

from headwater.tokenization.chat_template import ChatTemplate

USER = [{"role": "user", "content": "Hi"}]


def render(source: str, messages=USER, **options) -> str:
    template = ChatTemplate(source, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
    return template.render(messages, **options)


def test_a_conversation_ends_with_the_generation_prompt():
    assert render(CHAT_TEMPLATE) == "<|user|>user\nHi<|end|>\n<|user|>assistant\n"
    assert render(CHAT_TEMPLATE, add_generation_prompt=False) == "<|user|>user\nHi<|end|>\n"


def test_special_tokens_and_extra_variables_are_known_to_the_template():
    source = "{{ bos_token }}{{ 'think' if enable_thinking else 'fast' }}{{ eos_token }}"
    assert render(source) == "<s>fast</s>"
    assert render(source, template_kwargs={"enable_thinking": True}) == "<s>think</s>"


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_a_request_cannot_replace_the_conversation_through_extra_variables(name):
    with pytest.raises(ValueError, match=f"chat_template_kwargs: '{name}'"):
        render(CHAT_TEMPLATE, template_kwargs={name: []})


def test_blocks_leave_no_blank_lines():
    """Templates are written for trim_blocks and lstrip_blocks; without, prompts have stray newlines."""
    source = "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n"
    assert render(source) == "Hi\n"


def test_loop_controls_and_generation_blocks_are_understood():
    body = "{% generation %}{{ m.content }}{% endgeneration %}{% break %}"
    source = "{% for m in messages %}" + body + "{% endfor %}"
    assert render(source, messages=USER * 2) == "Hi"


def test_json_is_not_escaped_for_html():
    """Jinja's own filter writes < as an escape that no model has seen in a tool's description."""
    tools = [{"type": "function", "function": {"name": "f", "description": "a < b & 'ü'"}}]
    rendered = render("{{ tools | tojson }}", tools=tools)
    assert rendered == '[{"type": "function", "function": {"name": "f", "description": "a < b & \'ü\'"}}]'
    assert render("{{ tools[0].type | tojson(indent=2) }}", tools=tools) == '"function"'


def test_no_tools_are_none():
    """Templates ask `if tools`; some ask `is not none`."""
    assert render("{{ tools is none }}", tools=[]) == "True"


def test_the_date_is_todays():
    before = datetime.datetime.now().year
    assert int(render("{{ strftime_now('%Y') }}")) in (before, before + 1)


def test_a_refusal_of_the_template_reaches_the_client_in_its_words():
    source = "{{ raise_exception('Conversation roles must alternate') }}"
    with pytest.raises(ValueError, match=r"messages: .*refused them: Conversation roles must alternate"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content.no.such }}",
        "{{ 1 / 0 }}",
        "{{ messages[0] + 1 }}",
        "{{ range(10 ** 9) | list }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ strftime_now(3) }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_a_template_that_fails_or_breaks_out_is_a_value_error(source):
    """Templates come from model files: neither a traceback to the client nor code out of the sandbox."""
    with pytest.raises(ValueError, match="chat template refused them"):
        render(source)


def test_a_template_that_is_not_jinja_is_a_value_error():
    with pytest.raises(ValueError, match="chat template is not valid Jinja"):
        render("{% for %}")


def test_the_last_message_can_be_continued():
    messages = [*USER, {"role": "assistant", "content": "The answer is "}]
    expected = "<|user|>user\nHi<|end|>\n<|user|>assistant\nThe answer is "
    assert render(CHAT_TEMPLATE, messages, continue_final_message=True) == expected
    assert messages[-1]["content"] == "The answer is "  # the caller's message is untouched


def test_continuing_follows_a_template_that_strips_contents():
    source = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
    messages = [*USER, {"role": "assistant", "content": "The answer is "}]
    assert render(source, messages, continue_final_message=True).endswith("The answer is")


def test_continuing_what_the_template_does_not_print_is_an_error():
    with pytest.raises(ValueError, match="continue_final_message"):
        render("{{ messages[0].role }}", continue_final_message=True)


def test_the_developer_role_goes_through_where_the_template_knows_it():
    messages = [{"role": "developer", "content": "x"}]
    assert re.match("system", render("{{ messages[0].role }}", messages))
    assert re.match("developer", render("{# developer #}{{ messages[0].role }}", messages))
