"""The openai SDK, unchanged, against a real server with the real default model."""

import json
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from running_server import RunningServer

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("default server")]

QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    url = server.url + "/v1"
    with openai.OpenAI(base_url=url, api_key="not-needed", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture
def model(client: openai.OpenAI) -> str:
    (only,) = client.models.list().data
    assert client.models.retrieve(only.id).id == only.id
    return only.id


def test_chat_answers_the_question(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=48)
    assert "Rayleigh" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streamed_text_equals_plain_text(client: openai.OpenAI, model: str) -> None:
    plain = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=24)
    stream = client.chat.completions.create(
        model=model,
        messages=QUESTION,
        temperature=0,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == plain.choices[0].message.content
    assert chunks[-1].usage is not None
    assert plain.usage is not None
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == plain.choices[0].finish_reason


def test_completions_continue_text_and_token_ids(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt="1, 2, 3, 4,", temperature=0, max_tokens=6)
    assert "5" in answer.choices[0].text
    batch = client.completions.create(model=model, prompt=["One", "Two"], temperature=0, max_tokens=2)
    assert [choice.index for choice in batch.choices] == [0, 1]
    from_ids = client.completions.create(model=model, prompt=[504, 3575, 282], temperature=0, max_tokens=2)
    assert from_ids.usage is not None
    assert from_ids.usage.prompt_tokens == 3


def test_n_gives_different_answers_and_a_seed_gives_the_same(client: openai.OpenAI, model: str) -> None:
    def ask() -> list[str | None]:
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Write a story about a cat."}],
            n=2,
            seed=11,
            temperature=1.0,
            max_tokens=16,
        )
        return [choice.message.content for choice in answer.choices]

    first, second = ask()
    assert first != second
    assert ask() == [first, second]


def test_logprobs_belong_to_the_tokens_shown(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert "".join(entry.token for entry in content).startswith((choice.message.content or "")[:5])
    for entry in content:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        best = max(entry.top_logprobs, key=lambda top: top.logprob)
        assert math.isclose(best.logprob, entry.logprob, abs_tol=1e-3), "greedy takes the likeliest token"


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt="1, 2, 3, 4,", temperature=0, max_tokens=40, stop=[" 7", "\n"]
    )
    assert "7" not in answer.choices[0].text
    assert answer.choices[0].finish_reason == "stop"


def test_an_unknown_model_is_a_404_that_names_it(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="no-such-model", messages=QUESTION)
    assert caught.value.code == "model_not_found"
    assert "no-such-model" in str(caught.value)


def test_a_wrong_parameter_is_a_400_that_names_it(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError, match="top_p"):
        client.chat.completions.create(model=model, messages=QUESTION, top_p=2)


PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
}
WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "strict": True, "parameters": PLACE}}
CLOCK: Any = {"type": "function", "function": {"name": "get_time"}}
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


def streamed_calls(chunks: Any) -> tuple[list[tuple[str, str]], str]:
    """Names and arguments of the calls in a stream, and its finish reason."""
    calls: list[tuple[str, str]] = []
    reason = ""
    for chunk in chunks:
        (choice,) = chunk.choices
        reason = choice.finish_reason or reason
        for piece in choice.delta.tool_calls or ():
            if piece.id:
                calls.append((piece.function.name, ""))
            name, arguments = calls[piece.index]
            calls[piece.index] = (name, arguments + (piece.function.arguments or ""))
    return calls, reason


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_forced_calls_have_arguments_that_satisfy_their_schema(client: openai.OpenAI, model: str, choice: Any) -> None:
    """The model knows nothing of tools, and neither does its template: the grammar makes the calls."""
    asked: Any = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [WEATHER, CLOCK],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "seed": 5,
        "max_tokens": 100,
    }
    answer = client.chat.completions.create(**asked).choices[0]
    assert answer.message.content is None
    assert answer.finish_reason == "tool_calls"
    [call] = answer.message.tool_calls or []
    assert call.type == "function" and call.id.startswith("call_")
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_weather":
        assert arguments["city"].__class__ is str and len(arguments["city"]) <= 20
        assert arguments["unit"] in ("celsius", "fahrenheit") and len(arguments) == 2
    else:
        assert choice == "required" and (call.function.name, arguments) == ("get_time", {})
    calls, reason = streamed_calls(client.chat.completions.create(stream=True, **asked))
    assert (calls, reason) == ([(call.function.name, call.function.arguments)], "tool_calls")


def test_a_strict_tool_is_called_right_or_not_at_all(client: openai.OpenAI, model: str) -> None:
    for seed in range(4):
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Call get_weather for Paris. Answer with a tool call only."}],
            tools=[WEATHER],
            seed=seed,
            max_tokens=60,
        )
        message = answer.choices[0].message
        assert message.content or message.tool_calls
        for call in message.tool_calls or ():
            assert call.type == "function"
            if answer.choices[0].finish_reason == "tool_calls":
                assert json.loads(call.function.arguments)["unit"] in ("celsius", "fahrenheit")
