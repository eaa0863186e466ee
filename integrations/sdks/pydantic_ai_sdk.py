"""`pydantic-ai`: agents with tools, with structured output by tool and by schema, streamed."""

import asyncio

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

from checks import Server, check, check_page, refused, run_checks

SKY = "Why is the sky blue?"


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=24)
    is_capital: bool


def agent_of(server: Server, *, max_tokens: int = 24, **more) -> Agent:
    model = OpenAIChatModel(server.model, provider=OpenAIProvider(base_url=server.v1, api_key="unused"))
    return Agent(model, model_settings=ModelSettings(max_tokens=max_tokens, temperature=0), retries=0, **more)


@check("chat")
def chat(server: Server) -> None:
    result = agent_of(server).run_sync(SKY)
    assert result.output
    assert result.usage.output_tokens == 24


@check("stream")
def stream(server: Server) -> None:
    async def run() -> str:
        async with agent_of(server).run_stream(SKY) as result:
            return "".join([part async for part in result.stream_text(delta=True)])

    assert asyncio.run(run()) == agent_of(server).run_sync(SKY).output


@check("tools auto", on="scripted")
def tools_auto(server: Server) -> None:
    """The agent calls the function, sends its result, and ends with the model's answer."""
    agent = agent_of(server, max_tokens=200)
    cities = []

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """The weather in a city."""
        cities.append(city)
        return f"21 degrees in {city}"

    result = agent.run_sync("What is the weather in Paris and the weather in Rome?")
    assert sorted(cities) == ["Paris", "Rome"]
    assert "21 degrees in Paris" in result.output
    assert "21 degrees in Rome" in result.output


@check("tools required")
def tools_required(server: Server) -> None:
    """Without text as an output, the agent sends `tool_choice: required`."""
    result = agent_of(server, max_tokens=200, output_type=ToolOutput(City)).run_sync(SKY)
    assert isinstance(result.output, City)


@check("json_schema")
def json_schema(server: Server) -> None:
    result = agent_of(server, max_tokens=200, output_type=NativeOutput(City)).run_sync(SKY)
    assert isinstance(result.output, City)


@check("errors")
def errors(server: Server) -> None:
    error = refused(ModelHTTPError, agent_of(server).run_sync, SKY, model_settings=ModelSettings(top_p=2))
    assert error.status_code == 400
    assert "top_p" in str(error.body)


check_page("pydantic-ai")

if __name__ == "__main__":
    run_checks()
