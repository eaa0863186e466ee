"""The form that each kind of chat template wants for tool calls, found by rendering."""

import json

import pytest

from headwater.tokenization.chat_template import ChatTemplate
from headwater.tokenization.template_form import TemplateForm

# each in the style of a family of official templates
_LOOP = "{% for m in messages %}<{{ m.role }}>BODY</>{% endfor %}"
_PLAIN = "{{ m.content }}"
_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"


def looped(body: str) -> str:
    return _TOOLS + _LOOP.replace("BODY", body)


def calls(arguments: str, before: str = "") -> str:
    return before + "{% for c in m.tool_calls %}{{ c.function.name }}(" + arguments + "){% endfor %}"


CONCATENATES = looped(  # DeepSeek-R1-Distill: either content or calls, arguments as text
    "{% if m.role == 'assistant' and m.content is none %}"
    + calls("{{ c.type + ' ' + c.function.arguments }}")
    + "{% else %}{{ 'says ' + m.content }}{% endif %}"
)
PRINTS_JSON = looped(calls("{{ c.function.arguments | tojson }}", before="{{ m.content or '' }}"))  # Llama 3, Qwen2.5
PRINTS_EITHER = looped(  # Qwen3, Hermes 3
    calls(
        "{% if c.function.arguments is string %}{{ c.function.arguments }}"
        "{% else %}{{ c.function.arguments | tojson }}{% endif %}",
        before="{{ '' if m.content is none else m.content }}",
    )
)
ITERATES = looped(  # GLM, MiniMax, Qwen3-Coder; a null is printed as a word
    calls("{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v | tojson }}{% endfor %}", before=_PLAIN)
)
OWN_NOTATION = looped(  # Gemma: text is printed, too, but is not what the model knows
    calls(
        "{% if c.function.arguments is mapping %}{% for k, v in c.function.arguments.items() %}"
        "{{ k }}:{{ v if v is string else v | join(';') }}{% endfor %}{% else %}{{ c.function.arguments }}{% endif %}",
        before="{{ m.content or '' }}",
    )
)
_JSON_CALLS = calls("{{ c.function.arguments | tojson }}")
ABSENT = looped("{% if m.content is defined %}" + _PLAIN + "{% else %}" + _JSON_CALLS + "{% endif %}")
PARTS = looped("{% for part in m.content or [] %}{{ part.text }}{% endfor %}" + _JSON_CALLS)
NO_TOOLS = _LOOP.replace("BODY", _PLAIN)  # SmolLM2, Llama 2: a loop over roles and contents
ROLES = "{% for m in messages if m.role in ('user', 'assistant') %}" + _PLAIN + "{% endfor %}"  # Phi 3.5
REFUSES = "{{ raise_exception('no') }}"


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, special_tokens={})


@pytest.mark.parametrize(
    ("source", "form"),
    [
        (CONCATENATES, TemplateForm("text", True, "null", shows_calls_beside_content=False)),
        (PRINTS_JSON, TemplateForm("object", False, "null")),
        (PRINTS_EITHER, TemplateForm("object", True, "null")),
        (ITERATES, TemplateForm("object", False, "empty")),
        (OWN_NOTATION, TemplateForm("object", True, "null")),
        (ABSENT, TemplateForm("object", False, "absent", shows_calls_beside_content=False)),
        (PARTS, TemplateForm("object", False, "null", has_content_parts=True)),
        (NO_TOOLS, TemplateForm(shows_calls=False, shows_tools=False)),
        (ROLES, TemplateForm(shows_calls=False, shows_results=False, shows_tools=False)),
        (REFUSES, TemplateForm(shows_tools=False)),
    ],
)
def test_the_form_is_what_the_template_shows_whole(source, form):
    assert template(source).form == form


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": ["Rome", true]}'}}
QUESTION = {"role": "user", "content": "q"}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "5 C"}
KINDS = [CONCATENATES, PRINTS_JSON, PRINTS_EITHER, ITERATES, OWN_NOTATION, ABSENT, PARTS, NO_TOOLS, ROLES]


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("content", [None, "", "let me see"])
def test_neither_call_nor_result_nor_words_are_lost(source, content):
    call = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    text = template(source).render([QUESTION, call, RESULT])
    assert "Rome" in text
    assert "weather" in text
    assert "5 C" in text
    assert (content or "") in text
    assert '\\"Rome' not in text, "quoted twice"
    assert "'Rome'" not in text, "Python's notation"
    assert "None" not in text


@pytest.mark.parametrize("source", KINDS)
def test_cut_arguments_stay_in_the_conversation(source):
    cut = CALL | {"function": {"name": "weather", "arguments": '{"city": "Rom'}}
    call = {"role": "assistant", "content": "", "tool_calls": [cut]}
    assert "Rom" in template(source).render([QUESTION, call, RESULT | {"content": "bad arguments"}])


def test_a_null_that_a_template_tests_for_in_one_place_and_measures_in_another():
    body = _JSON_CALLS + "{{ m.content | length if loop.last else m.content or '' }}"
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert template(looped(body)).form.empty_content == "null"
    assert "Rome" in template(looped(body)).render([QUESTION, call])


def test_text_arguments_are_not_written_anew_where_the_template_takes_text():
    """What the model said must come back as it was said: other blanks are other tokens."""
    spaced = CALL | {"function": {"name": "f", "arguments": '{"a":1,\n "b": 1.0}'}}
    text = template(CONCATENATES).render([QUESTION, {"role": "assistant", "tool_calls": [spaced]}])
    assert '{"a":1,\n "b": 1.0}' in text


def test_a_generator_is_a_list_to_tojson():
    """`tools | map(...) | tojson` is written for Jinjas that have no generators."""
    tools = [{"type": "function", "function": {"name": "f"}}]
    text = template("{{ tools | map(attribute='function') | tojson }}").render([QUESTION], tools=tools)
    assert json.loads(text) == [{"name": "f"}]
