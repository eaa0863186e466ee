"""`openai-agents`: a run with tools, a handoff, structured output, through /v1/chat/completions and /v1/responses."""

import asyncio

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool
from agents import set_tracing_disabled as set_is_untraced
from openai import AsyncOpenAI, BadRequestError
from pydantic import BaseModel, Field

from checks import Server, check, check_page, refused, run_checks

SKY = "Why is the sky blue?"
set_is_untraced(True)


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=24)
    is_capital: bool


@function_tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"21 degrees in {city}"


def agent_of(server: Server, *, kind=OpenAIChatCompletionsModel, max_tokens: int = 24, top_p=None, **more) -> Agent:
    client = AsyncOpenAI(base_url=server.v1, api_key="unused", max_retries=0, timeout=80)
    settings = ModelSettings(max_tokens=max_tokens, temperature=0, top_p=top_p)
    return Agent(name="agent", model=kind(server.model, client), model_settings=settings, **more)


def run(agent: Agent, question: str = SKY):
    return asyncio.run(Runner.run(agent, question, max_turns=4))


@check("chat")
def chat(server: Server) -> None:
    assert run(agent_of(server)).final_output


@check("stream")
def stream(server: Server) -> None:
    async def deltas() -> str:
        result = Runner.run_streamed(agent_of(server), SKY)
        events = [event async for event in result.stream_events() if event.type == "raw_response_event"]
        return "".join(e.data.delta for e in events if e.data.type == "response.output_text.delta")

    assert asyncio.run(deltas()) == run(agent_of(server)).final_output


@check("tools auto", on="scripted")
def tools_auto(server: Server) -> None:
    result = run(agent_of(server, max_tokens=200, tools=[get_weather]), "What is the weather in Paris?")
    assert "21 degrees in Paris" in result.final_output


@check("tools auto, responses", on="scripted")
def tools_auto_responses(server: Server) -> None:
    agent = agent_of(server, kind=OpenAIResponsesModel, max_tokens=200, tools=[get_weather])
    assert "21 degrees in Paris" in run(agent, "What is the weather in Paris?").final_output


@check("json_schema")
def json_schema(server: Server) -> None:
    assert isinstance(run(agent_of(server, max_tokens=200, output_type=City)).final_output, City)


@check("json_schema, responses")
def json_schema_responses(server: Server) -> None:
    agent = agent_of(server, kind=OpenAIResponsesModel, max_tokens=200, output_type=City)
    assert isinstance(run(agent).final_output, City)


@check("errors")
def errors(server: Server) -> None:
    assert "top_p" in str(refused(BadRequestError, run, agent_of(server, top_p=2)))


check_page("openai-agents")

if __name__ == "__main__":
    run_checks()
