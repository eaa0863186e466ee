"""Fields of Ollama's API as those of a chat completion."""

from typing import Any

import pytest
from api_under_test import ENGINE_READY, facts
from pydantic import ValidationError

from headwater.generation.errors import ApiError, from_validation
from headwater.http_api.ollama.conversion import RENAMED, chat_fields, chat_messages, generate_fields, raw_fields
from headwater.http_api.ollama.schemas import OllamaChatRequest, OllamaGenerateRequest
from headwater.http_api.openai.conversation import chat_request

MODEL = facts(ENGINE_READY)
MESSAGES = [{"role": "user", "content": "hi"}]


def converted(**more: Any) -> dict[str, Any]:
    return chat_fields(OllamaChatRequest.model_validate({"model": "m:latest", "messages": MESSAGES} | more), MODEL)


def generated(**more: Any) -> OllamaGenerateRequest:
    return OllamaGenerateRequest.model_validate({"model": "m", "prompt": "hi"} | more)


def test_options() -> None:
    given = {"temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1, "seed": 3, "stop": ["x"]}
    others = {"num_predict": 5, "repeat_penalty": 1.1, "repeat_last_n": -1, "num_ctx": 256}
    ignored = {"num_gpu": 1, "num_thread": 4, "use_mmap": True, "num_keep": 3, "mirostat": 0, "tfs_z": 1.0}
    fields = converted(options=given | others | ignored)
    assert fields.items() >= given.items()
    assert (fields["max_tokens"], fields["repetition_penalty"], fields["model"]) == (5, 1.1, "m")
    assert fields["stream"] is True, "Ollama streams unless told not to"
    chat_request(fields, RENAMED)


@pytest.mark.parametrize("num_predict", [-2, -1, 0])
def test_no_limit(num_predict: int) -> None:
    assert "max_tokens" not in converted(options={"num_predict": num_predict})


def test_formats_and_thinking() -> None:
    assert converted(format="json")["response_format"] == {"type": "json_object"}
    schema = {"type": "object"}
    assert converted(format=schema)["response_format"]["json_schema"]["schema"] == schema
    assert "response_format" not in converted(format="")
    assert converted(think=False)["chat_template_kwargs"] == {"enable_thinking": False}
    high = converted(think="high")
    assert (high["chat_template_kwargs"], high["reasoning_effort"]) == ({"enable_thinking": True}, "high")
    assert "chat_template_kwargs" not in converted()


def test_a_conversation_with_tools_gets_the_ids_that_ollama_leaves_out() -> None:
    calls = [{"function": {"name": name, "arguments": {"a": 1}}} for name in ("f", "g", "f")]
    messages = [
        {"role": "assistant", "content": "", "thinking": "so", "tool_calls": calls},
        {"role": "tool", "tool_name": "g", "content": "G"},
        {"role": "tool", "tool_name": "f", "content": "F1"},
        {"role": "tool", "content": "F2"},
    ]
    said, *results = chat_messages(messages)
    assert said["reasoning_content"] == "so"
    assert [call["function"]["arguments"] for call in said["tool_calls"]] == ['{"a": 1}'] * 3
    first, second, third = (call["id"] for call in said["tool_calls"])
    assert len({first, second, third}) == 3
    assert [result["tool_call_id"] for result in results] == [second, first, third]
    assert [result.get("name") for result in results] == ["g", "f", None]


def test_given_ids_are_kept() -> None:
    call = {"id": "mine", "function": {"name": "f", "arguments": "{}"}}
    said, result = chat_messages(
        [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "mine", "content": "1"}]
    )
    assert said["tool_calls"][0]["id"] == result["tool_call_id"] == "mine"


def test_generate_is_a_chat_or_a_completion() -> None:
    fields = generate_fields(generated(system="be kind"), MODEL)
    assert fields["messages"] == [{"role": "system", "content": "be kind"}, *MESSAGES]
    raw = raw_fields(generated(raw=True), MODEL)
    assert (raw["prompt"], raw["max_tokens"]) == ("hi", 256)


def test_a_last_message_of_the_assistant_is_continued() -> None:
    assert converted(messages=[*MESSAGES, {"role": "assistant", "content": "so"}])["continue_final_message"] is True


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"options": {"num_ctx": 257}}, "options.num_ctx"),
        ({"options": {"mirostat": 1}}, "options.mirostat"),
        ({"options": {"typical_p": 0.5}}, "options.typical_p"),
        ({"options": {"repeat_penalty": 1.1, "repeat_last_n": 64}}, "options.repeat_last_n"),
        ({"options": {"temperature": -1}}, "options.temperature"),
        ({"options": {"num_predict": -3}}, "options.num_predict"),
        ({"options": {"tempo": 1}}, "options.tempo"),
        ({"format": "xml"}, "format"),
        ({"template": "{{ .Prompt }}"}, "template"),
        ({"messages": [{"role": "user", "content": "a", "images": ["x"]}]}, "messages[0].images"),
        ({"messages": [{"role": "developer", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}]},
         "messages[0].tool_calls[0].function.arguments"),
        ({"max_tokens": 5}, "max_tokens"),
    ],
)  # fmt: skip
def test_what_is_not_honoured_is_named(more: dict[str, Any], param: str) -> None:
    try:
        converted(**more)
    except ValidationError as error:
        found = from_validation(error.errors())
    except ApiError as error:
        found = error
    else:
        pytest.fail("accepted")
    assert (found.status, found.param) == (400, param)
    assert str(found.message).startswith(param)


@pytest.mark.parametrize("more", [{"context": [1, 2]}, {"suffix": "x"}, {"images": ["x"]}, {"width": 512}])
def test_what_generate_does_not_honour(more: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="not supported"):
        generated(**more)


def test_raw_goes_without_the_template() -> None:
    with pytest.raises(ApiError, match="system"):
        raw_fields(generated(raw=True, system="be kind"), MODEL)
