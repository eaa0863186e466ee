"""`litellm` with the provider `openai/`, as its proxy and many applications use it."""

import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # asks no other host for prices

import litellm

from checks import Server, check, check_page, refused, run_checks
from sdks.questions import CITY_SCHEMA, QUESTION, WEATHER_QUESTION, WEATHER_TOOL, assert_is_a_city

litellm.telemetry = False


def ask(server: Server, messages=QUESTION, **more):
    fields = {"model": f"openai/{server.model}", "messages": messages, "temperature": 0, "max_tokens": 24}
    return litellm.completion(
        **fields | more, api_base=server.v1, api_key="unused", num_retries=0, max_retries=0, timeout=80
    )


@check("chat")
def chat(server: Server) -> None:
    answer = ask(server)
    assert answer.choices[0].message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@check("stream")
def stream(server: Server) -> None:
    chunks = list(ask(server, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ask(server).choices[0].message.content
    assert litellm.stream_chunk_builder(chunks).usage.completion_tokens == 24


@check("tools auto", on="scripted")
def tools_auto(server: Server) -> None:
    messages = [{"role": "user", "content": WEATHER_QUESTION}]
    answer = ask(server, messages, tools=[WEATHER_TOOL], tool_choice="auto", max_tokens=200)
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    messages.append(answer.choices[0].message.model_dump())
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "21 degrees"})
    assert "21 degrees" in ask(server, messages, tools=[WEATHER_TOOL], max_tokens=200).choices[0].message.content


@check("tools required")
def tools_required(server: Server) -> None:
    answer = ask(server, tools=[WEATHER_TOOL], tool_choice="required", max_tokens=200)
    assert set(json.loads(answer.choices[0].message.tool_calls[0].function.arguments)) == {"city"}


@check("tools named")
def tools_named(server: Server) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    chunks = list(ask(server, tools=[WEATHER_TOOL], tool_choice=choice, max_tokens=200, stream=True))
    (call,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"city"}


@check("json_schema")
def json_schema(server: Server) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": CITY_SCHEMA}}
    assert_is_a_city(json.loads(ask(server, response_format=form, max_tokens=200).choices[0].message.content))


@check("logprobs")
def logprobs(server: Server) -> None:
    content = ask(server, logprobs=True, top_logprobs=2, max_tokens=6).choices[0].logprobs.content
    assert len(content) == 6
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in content)


@check("errors")
def errors(server: Server) -> None:
    refused(litellm.NotFoundError, ask, server, model="openai/none")
    assert "top_p" in str(refused(litellm.BadRequestError, ask, server, top_p=2))


@check("text completion")
def text_completion(server: Server) -> None:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{server.model}",
        prompt="1, 2, 3,",
        max_tokens=4,
        api_base=server.v1,
        api_key="unused",
    )
    assert answer.choices[0].text


check_page("litellm")

if __name__ == "__main__":
    run_checks()
