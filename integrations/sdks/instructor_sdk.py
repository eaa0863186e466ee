"""`instructor`: answers as pydantic objects, by tools and by JSON schema, whole and streamed."""

import instructor
import openai
from pydantic import BaseModel, ConfigDict, Field

from checks import Server, check, check_page, refused, run_checks
from sdks.questions import QUESTION


class City(BaseModel):
    """A city; `forbid`, since a small model may otherwise add keys without end."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=24)
    population: int = Field(ge=0, le=40_000_000)
    is_capital: bool


def ask(server: Server, mode: instructor.Mode, **more):
    client = instructor.from_openai(openai.OpenAI(base_url=server.v1, api_key="unused", timeout=80), mode=mode)
    fields = {"response_model": City, "messages": QUESTION, "max_tokens": 200, "temperature": 0, "max_retries": 0}
    return client.chat.completions.create(model=server.model, **fields | more)


@check("tools named")
def by_tools(server: Server) -> None:
    """The mode that instructor takes by default: a tool that must be called, and its arguments as the answer."""
    assert isinstance(ask(server, instructor.Mode.TOOLS), City)


@check("json_schema")
def by_schema(server: Server) -> None:
    assert isinstance(ask(server, instructor.Mode.JSON_SCHEMA), City)


@check("chat")
def with_usage(server: Server) -> None:
    client = instructor.from_openai(
        openai.OpenAI(base_url=server.v1, api_key="unused", timeout=80), mode=instructor.Mode.JSON_SCHEMA
    )
    city, completion = client.chat.completions.create_with_completion(
        model=server.model, response_model=City, messages=QUESTION, max_tokens=200, max_retries=0
    )
    assert isinstance(city, City)
    assert completion.usage.completion_tokens > 0


@check("stream")
def streamed(server: Server) -> None:
    """Objects that grow while the answer arrives."""
    parts = list(ask(server, instructor.Mode.TOOLS, response_model=instructor.Partial[City], stream=True))
    assert len(parts) > 1
    assert parts[-1].name is not None
    assert parts[-1].is_capital is not None


@check("errors")
def errors(server: Server) -> None:
    error = refused(Exception, ask, server, instructor.Mode.TOOLS, top_p=2)  # the SDK's error, wrapped
    assert "top_p" in str(error), error


check_page("instructor")

if __name__ == "__main__":
    run_checks()
