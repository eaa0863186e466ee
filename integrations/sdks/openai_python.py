"""The Python SDK `openai`: chat, streams, tools, structured output, log-probabilities, errors."""

import json

import openai
from pydantic import BaseModel

from checks import Server, check, check_page, refused, run_checks
from sdks.questions import CITY_SCHEMA, QUESTION, WEATHER_QUESTION, WEATHER_TOOL, assert_is_a_city


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.v1, api_key="unused", max_retries=0, timeout=80)


def ask(server: Server, messages=QUESTION, **more):
    fields = {"model": server.model, "messages": messages, "temperature": 0, "max_completion_tokens": 24} | more
    return client_of(server).chat.completions.create(**fields)


@check("models")
def models(server: Server) -> None:
    client = client_of(server)
    (only,) = client.models.list().data
    assert client.models.retrieve(only.id).id == only.id


@check("chat")
def chat(server: Server) -> None:
    answer = ask(server, messages=[{"role": "user", "content": [{"type": "text", "text": "Why is the sky blue?"}]}])
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert ask(server).choices[0].message.content == answer.choices[0].message.content


@check("stream")
def stream(server: Server) -> None:
    plain = ask(server)
    chunks = list(ask(server, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == plain.choices[0].message.content
    assert chunks[-1].choices == []
    found = chunks[-1].usage
    assert found is not None
    assert plain.usage is not None
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")  # what is cached depends on who flushes meanwhile
    assert [getattr(found, name) for name in counts] == [getattr(plain.usage, name) for name in counts]
    assert all(chunk.choices for chunk in ask(server, stream=True)), "usage comes only when asked for"


@check("stream helper", on="scripted")
def stream_helper(server: Server) -> None:
    with client_of(server).chat.completions.stream(model=server.model, messages=QUESTION, max_tokens=80) as events:
        kinds = {event.type for event in events}
        final = events.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content


@check("tools auto", on="scripted")
def tools_auto(server: Server) -> None:
    messages = [{"role": "user", "content": WEATHER_QUESTION}]
    answer = ask(server, messages, tools=[WEATHER_TOOL], max_completion_tokens=200)
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    messages.append(answer.choices[0].message.model_dump(exclude_none=True))
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "21 degrees"})
    last = ask(server, messages, tools=[WEATHER_TOOL], max_completion_tokens=200)
    assert last.choices[0].finish_reason == "stop"
    assert "21 degrees" in last.choices[0].message.content
    none = ask(server, messages[:1], tools=[WEATHER_TOOL], tool_choice="none", max_completion_tokens=200)
    assert not none.choices[0].message.tool_calls


@check("tools auto, streamed", on="scripted")
def tools_auto_streamed(server: Server) -> None:
    messages = [{"role": "user", "content": WEATHER_QUESTION}]
    name, arguments, ends = "", "", []
    for chunk in ask(server, messages, tools=[WEATHER_TOOL], max_completion_tokens=200, stream=True):
        ends.append(chunk.choices[0].finish_reason)
        for call in chunk.choices[0].delta.tool_calls or ():
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    assert name == "get_weather"
    assert json.loads(arguments) == {"city": "Paris"}
    assert ends[-1] == "tool_calls"


@check("tools auto, parallel", on="scripted")
def tools_auto_parallel(server: Server) -> None:
    messages = [{"role": "user", "content": "What is the weather in Paris and the weather in Rome?"}]
    calls = ask(server, messages, tools=[WEATHER_TOOL], max_completion_tokens=400).choices[0].message.tool_calls
    assert [json.loads(call.function.arguments)["city"] for call in calls] == ["Paris", "Rome"]
    assert len({call.id for call in calls}) == 2


@check("tools required")
def tools_required(server: Server) -> None:
    answer = ask(server, tools=[WEATHER_TOOL], tool_choice="required", max_completion_tokens=200)
    for call in answer.choices[0].message.tool_calls:
        assert call.function.name == "get_weather"
        assert set(json.loads(call.function.arguments)) == {"city"}


@check("tools named")
def tools_named(server: Server) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    parts = list(ask(server, tools=[WEATHER_TOOL], tool_choice=choice, max_completion_tokens=200, stream=True))
    deltas = [call for part in parts for call in part.choices[0].delta.tool_calls or ()]
    assert {delta.index for delta in deltas} == {0}, "a named tool is called once"
    assert deltas[0].function.name == "get_weather"
    assert deltas[0].id
    assert set(json.loads("".join(delta.function.arguments or "" for delta in deltas))) == {"city"}


@check("json_schema")
def json_schema(server: Server) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": CITY_SCHEMA}}
    answer = ask(server, response_format=form, max_completion_tokens=200)
    assert_is_a_city(json.loads(answer.choices[0].message.content))
    form = {"type": "json_object"}
    json.loads(ask(server, response_format=form, max_completion_tokens=400).choices[0].message.content)


class City(BaseModel):
    name: str
    is_capital: bool


@check("parsed model")
def parsed(server: Server) -> None:
    """The SDK turns a pydantic class into a schema, and the answer into an object of the class."""
    answer = client_of(server).chat.completions.parse(
        model=server.model, messages=QUESTION, response_format=City, max_tokens=200, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, City)


@check("logprobs")
def logprobs(server: Server) -> None:
    answer = ask(server, logprobs=True, top_logprobs=3, max_completion_tokens=8)
    for entry in answer.choices[0].logprobs.content:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
    completion = client_of(server).completions.create(
        model=server.model, prompt=[504, 3575], echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    assert completion.choices[0].logprobs.token_logprobs[0] is None
    assert len(completion.choices[0].logprobs.tokens) == 3


@check("completions")
def completions(server: Server) -> None:
    create = client_of(server).completions.create
    assert create(model=server.model, prompt="1, 2, 3,", max_tokens=4).choices[0].text
    batch = create(model=server.model, prompt=["One", "Two"], max_tokens=2)
    assert [choice.index for choice in batch.choices] == [0, 1]
    assert len(create(model=server.model, prompt=[[504, 3575], [504]], max_tokens=2).choices) == 2


@check("responses")
def responses(server: Server) -> None:
    client = client_of(server)
    first = client.responses.create(model=server.model, input="Why is the sky blue?", max_output_tokens=16)
    assert first.output_text
    second = client.responses.create(
        model=server.model, input="And at night?", previous_response_id=first.id, max_output_tokens=16
    )
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens > first.usage.input_tokens
    with client.responses.stream(model=server.model, input="Hello", max_output_tokens=8) as events:
        kinds = [event.type for event in events]
    assert kinds[0] == "response.created"
    assert "response.output_text.delta" in kinds
    assert kinds[-1] in ("response.completed", "response.incomplete")


@check("responses, structured")
def responses_structured(server: Server) -> None:
    answer = client_of(server).responses.parse(
        model=server.model, input="Name a city.", text_format=City, max_output_tokens=200, temperature=0
    )
    assert isinstance(answer.output_parsed, City)


@check("embeddings")
def embeddings(server: Server) -> None:
    """The SDK asks for base64 by itself."""
    answer = client_of(server).embeddings.create(model=server.model, input=["The sky", "The sea", "The sky"])
    one, two, again = (item.embedding for item in answer.data)
    assert len(one) == len(two) > 100
    assert one != two
    assert max(abs(a - b) for a, b in zip(one, again, strict=True)) < 1e-3


@check("errors")
def errors(server: Server) -> None:
    assert refused(openai.NotFoundError, ask, server, model="no-such-model").code == "model_not_found"
    for wrong in ({"top_p": 2}, {"messages": []}, {"tool_choice": "required"}):
        error = refused(openai.BadRequestError, ask, server, **wrong)
        assert error.type == "invalid_request_error"
        assert next(iter(wrong)) in str(error), f"{wrong}: {error}"


@check("leaves mid-stream")
def leaves(server: Server) -> None:
    answer = ask(server, stream=True, max_completion_tokens=400)
    next(iter(answer))
    answer.close()
    assert ask(server).choices[0].message.content


check_page("openai-python")

if __name__ == "__main__":
    run_checks()
