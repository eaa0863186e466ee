"""Tools, calls and results for a chat template that knows none of them."""

import json

from headwater.generation.chat.tool_prompt import with_tools

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CALLS = [
    {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "a"}'}},
    {"id": "2", "type": "function", "function": {"name": "look", "arguments": {"at": "b"}}},
]
USER = {"role": "user", "content": "hi"}


def test_the_tools_are_described_behind_the_words_of_the_system_message() -> None:
    system, user = with_tools([{"role": "system", "content": "Be kind."}, USER], TOOLS)
    assert system["content"].startswith("Be kind.\n\n# Tools\n")
    assert f"\n{json.dumps(TOOLS[0])}\n" in system["content"]
    assert system["content"].endswith("</tool_call>")
    assert user == USER


def test_without_a_system_message_one_is_put_first() -> None:
    system, user = with_tools([USER], TOOLS)
    assert (system["role"], user) == ("system", USER)


def test_a_template_without_system_messages_gets_them_in_the_first_message_of_the_user() -> None:
    (user,) = with_tools([USER], TOOLS, has_system=False)
    assert user["role"] == "user"
    assert user["content"].startswith("# Tools\n")
    assert user["content"].endswith("</tool_call>\n\nhi")


def test_calls_and_results_have_the_form_that_the_description_asks_for() -> None:
    history = [
        USER,
        {"role": "assistant", "content": "Let me see.", "tool_calls": CALLS},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
        {"role": "tool", "tool_call_id": "2", "content": "43"},
        {"role": "assistant", "content": None, "tool_calls": CALLS[:1]},
    ]
    _, _, said, result, only_calls = with_tools(history, TOOLS)
    first, second = (f'<tool_call>\n{{"name": "look", "arguments": {{"at": "{at}"}}}}\n</tool_call>' for at in "ab")
    assert said == {"role": "assistant", "content": f"Let me see.\n{first}\n{second}"}
    responses = "<tool_response>\n42\n</tool_response>\n<tool_response>\n43\n</tool_response>"
    assert result == {"role": "user", "content": responses}
    assert only_calls == {"role": "assistant", "content": first}


def test_parts_of_a_content_stay_parts() -> None:
    parts = [{"type": "text", "text": "Be kind."}]
    system, _ = with_tools([{"role": "system", "content": parts}, USER], TOOLS)
    assert system["content"][0] == parts[0]
    assert system["content"][1].startswith("# Tools")


def test_what_is_no_message_is_left_for_the_check_that_names_its_place() -> None:
    assert with_tools(["hi", {"role": "assistant", "tool_calls": [1]}], TOOLS)[1:] == [
        "hi",
        {"role": "assistant", "tool_calls": [1]},
    ]
