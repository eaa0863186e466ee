"""The `anthropic` SDK on /v1/messages: messages, streams, tools, count_tokens, errors."""

import anthropic

from checks import Server, check, check_page, refused, run_checks
from sdks.questions import QUESTION, WEATHER_QUESTION, WEATHER_SCHEMA

TOOL = {"name": "get_weather", "description": "The weather in a city", "input_schema": WEATHER_SCHEMA}


def client_of(server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0, timeout=80)


def fields_of(server: Server, messages=QUESTION, **more) -> dict:
    """This version of the SDK has no `temperature`, so it goes the way of parameters that the SDK does not know."""
    greedy = {"temperature": 0}
    return {"model": server.model, "messages": messages, "max_tokens": 24, "extra_body": greedy} | more


@check("chat")
def chat(server: Server) -> None:
    answer = client_of(server).messages.create(**fields_of(server), system="You are brief.")
    assert answer.content[0].type == "text"
    assert answer.content[0].text
    assert answer.stop_reason in ("max_tokens", "end_turn")
    assert 0 < answer.usage.output_tokens <= 24
    assert answer.usage.input_tokens > 0


@check("stream")
def stream(server: Server) -> None:
    plain = client_of(server).messages.create(**fields_of(server))
    with client_of(server).messages.stream(**fields_of(server)) as events:
        text = "".join(events.text_stream)
        final = events.get_final_message()
    assert text == plain.content[0].text == final.content[0].text
    assert final.usage.output_tokens == plain.usage.output_tokens
    assert final.stop_reason == plain.stop_reason


@check("tools auto", on="scripted")
def tools_auto(server: Server) -> None:
    messages = [{"role": "user", "content": WEATHER_QUESTION}]
    answer = client_of(server).messages.create(**fields_of(server, messages, tools=[TOOL], max_tokens=200))
    assert answer.stop_reason == "tool_use"
    (use,) = [block for block in answer.content if block.type == "tool_use"]
    assert (use.name, use.input) == ("get_weather", {"city": "Paris"})
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "21 degrees"}
    messages += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    last = client_of(server).messages.create(**fields_of(server, messages, tools=[TOOL], max_tokens=200))
    assert last.stop_reason == "end_turn"
    assert "21 degrees" in last.content[0].text


@check("tools auto, streamed", on="scripted")
def tools_auto_streamed(server: Server) -> None:
    messages = [{"role": "user", "content": WEATHER_QUESTION}]
    with client_of(server).messages.stream(**fields_of(server, messages, tools=[TOOL], max_tokens=200)) as events:
        kinds = [event.type for event in events]
        final = events.get_final_message()
    assert "input_json" in kinds
    assert final.content[-1].input == {"city": "Paris"}


@check("tools required")
def tools_required(server: Server) -> None:
    answer = client_of(server).messages.create(
        **fields_of(server, tools=[TOOL], tool_choice={"type": "any"}, max_tokens=200)
    )
    assert set(answer.content[-1].input) == {"city"}


@check("tools named")
def tools_named(server: Server) -> None:
    choice = {"type": "tool", "name": "get_weather"}
    asked = fields_of(server, tools=[TOOL], tool_choice=choice, max_tokens=200)
    with client_of(server).messages.stream(**asked) as events:
        final = events.get_final_message()
    assert final.content[-1].name == "get_weather"
    assert set(final.content[-1].input) == {"city"}


@check("count_tokens")
def count_tokens(server: Server) -> None:
    counted = client_of(server).messages.count_tokens(model=server.model, messages=QUESTION)
    usage = client_of(server).messages.create(**fields_of(server, max_tokens=1)).usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


@check("stop sequences")
def stop_sequences(server: Server) -> None:
    whole = client_of(server).messages.create(**fields_of(server)).content[0].text
    word = whole.split()[3]
    answer = client_of(server).messages.create(**fields_of(server, stop_sequences=[word]))
    assert answer.stop_reason == "stop_sequence"
    assert answer.stop_sequence == word
    assert word not in answer.content[0].text


@check("errors")
def errors(server: Server) -> None:
    for wrong, kind in (
        ({"model": "none"}, anthropic.NotFoundError),
        ({"max_tokens": -1}, anthropic.BadRequestError),
        ({"messages": []}, anthropic.BadRequestError),
    ):
        error = refused(kind, client_of(server).messages.create, **fields_of(server) | wrong)
        assert error.body["type"] == "error"
        assert error.body["error"]["message"]


check_page("anthropic")

if __name__ == "__main__":
    run_checks()
