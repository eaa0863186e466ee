"""`ChatOpenAI` of `langchain-openai`: messages, streams, bound tools, structured output."""

import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

from checks import Server, check, check_page, refused, run_checks
from sdks.questions import CITY_SCHEMA, WEATHER_QUESTION, assert_is_a_city

SKY = "Why is the sky blue?"


def chat_of(server: Server, **more) -> ChatOpenAI:
    fields = {"temperature": 0, "max_tokens": 24} | more
    return ChatOpenAI(base_url=server.v1, api_key="unused", model=server.model, max_retries=0, timeout=80, **fields)


@tool
def get_weather(city: str = Field(max_length=24)) -> str:
    """The weather in a city."""
    return "21 degrees"


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=24)
    is_capital: bool


@check("chat")
def chat(server: Server) -> None:
    answer = chat_of(server).invoke(SKY)
    assert answer.content
    assert answer.usage_metadata["output_tokens"] == 24
    assert answer.response_metadata["finish_reason"] == "length"


@check("stream")
def stream(server: Server) -> None:
    parts = list(chat_of(server, stream_usage=True).stream(SKY))
    assert "".join(part.content for part in parts) == chat_of(server).invoke(SKY).content
    assert sum(part.usage_metadata["output_tokens"] for part in parts if part.usage_metadata) == 24


@check("tools auto", on="scripted")
def tools_auto(server: Server) -> None:
    model = chat_of(server, max_tokens=200).bind_tools([get_weather])
    messages = [HumanMessage(WEATHER_QUESTION)]
    answer = model.invoke(messages)
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    messages += [answer, ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])]
    assert "21 degrees" in model.invoke(messages).content


@check("tools required")
def tools_required(server: Server) -> None:
    answer = chat_of(server, max_tokens=200).bind_tools([get_weather], tool_choice="required").invoke(SKY)
    assert not answer.invalid_tool_calls
    assert set(answer.tool_calls[0]["args"]) == {"city"}


@check("tools named")
def tools_named(server: Server) -> None:
    model = chat_of(server, max_tokens=200).bind_tools([get_weather], tool_choice="get_weather")
    whole = None
    for part in model.stream(SKY):
        whole = part if whole is None else whole + part
    assert [call["name"] for call in whole.tool_calls] == ["get_weather"]
    assert set(whole.tool_calls[0]["args"]) == {"city"}


@check("json_schema")
def json_schema(server: Server) -> None:
    model = chat_of(server, max_tokens=200)
    city = model.with_structured_output(
        {"title": "city", **CITY_SCHEMA}, method="json_schema", strict=True
    ).invoke(SKY)
    assert_is_a_city(city)
    assert isinstance(model.with_structured_output(City, method="json_schema").invoke(SKY), City)


@check("structured by a function call")
def by_function(server: Server) -> None:
    model = chat_of(server, max_tokens=200).with_structured_output(City, method="function_calling")
    assert isinstance(model.invoke(SKY), City)


@check("logprobs")
def logprobs(server: Server) -> None:
    answer = chat_of(server, max_tokens=6).bind(logprobs=True, top_logprobs=2).invoke(SKY)
    assert len(answer.response_metadata["logprobs"]["content"]) == 6


@check("errors")
def errors(server: Server) -> None:
    assert "top_p" in str(refused(openai.BadRequestError, chat_of(server, top_p=2).invoke, SKY))


@check("embeddings")
def embeddings(server: Server) -> None:
    """Sends token ids of OpenAI's tokenizer by default, so `check_embedding_ctx_length` is off."""
    model = OpenAIEmbeddings(
        base_url=server.v1, api_key="unused", model=server.model, check_embedding_ctx_length=False
    )
    one, two = model.embed_documents(["The sky", "The sea"])
    assert len(one) == len(two) > 100


check_page("langchain-openai")

if __name__ == "__main__":
    run_checks()
