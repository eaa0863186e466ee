"""The Python client `ollama` on /api: chat, generate, streams, tools, formats, the model's description."""

import json

import ollama

from checks import Server, check, check_page, refused, run_checks
from sdks.questions import CITY_SCHEMA, QUESTION, WEATHER_QUESTION, WEATHER_TOOL, assert_is_a_city

OPTIONS = {"temperature": 0, "num_predict": 24}


def client_of(server: Server) -> ollama.Client:
    return ollama.Client(host=server.url, timeout=80)


@check("models")
def models(server: Server) -> None:
    (only,) = client_of(server).list().models
    shown = client_of(server).show(only.model)
    assert "completion" in shown.capabilities
    assert shown.details.family


@check("chat")
def chat(server: Server) -> None:
    answer = client_of(server).chat(server.model, QUESTION, options=OPTIONS)
    assert answer.message.content
    assert answer.done
    assert answer.done_reason == "length"
    assert answer.eval_count == 24
    assert answer.prompt_eval_count > 0


@check("stream")
def stream(server: Server) -> None:
    parts = list(client_of(server).chat(server.model, QUESTION, options=OPTIONS, stream=True))
    plain = client_of(server).chat(server.model, QUESTION, options=OPTIONS)
    assert "".join(part.message.content for part in parts) == plain.message.content
    assert [part.done for part in parts].count(True) == 1
    assert parts[-1].eval_count == 24


@check("generate")
def generate(server: Server) -> None:
    answer = client_of(server).generate(server.model, "Why is the sky blue?", options=OPTIONS)
    assert answer.response
    parts = list(client_of(server).generate(server.model, "Why is the sky blue?", options=OPTIONS, stream=True))
    assert "".join(part.response for part in parts) == answer.response


@check("tools auto", on="scripted")
def tools_auto(server: Server) -> None:
    messages = [{"role": "user", "content": WEATHER_QUESTION}]
    answer = client_of(server).chat(server.model, messages, tools=[WEATHER_TOOL])
    (call,) = answer.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", {"city": "Paris"})
    messages += [answer.message, {"role": "tool", "tool_name": "get_weather", "content": "21 degrees"}]
    assert "21 degrees" in client_of(server).chat(server.model, messages, tools=[WEATHER_TOOL]).message.content


@check("json_schema")
def json_schema(server: Server) -> None:
    options = OPTIONS | {"num_predict": 200}
    answer = client_of(server).chat(server.model, QUESTION, format=CITY_SCHEMA, options=options)
    assert_is_a_city(json.loads(answer.message.content))


@check("errors")
def errors(server: Server) -> None:
    error = refused(ollama.ResponseError, client_of(server).chat, "none", QUESTION)
    assert error.status_code == 404
    assert "none" in error.error


check_page("ollama")

if __name__ == "__main__":
    run_checks()
