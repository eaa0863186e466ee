"""The questions that all clients ask: one tool, one schema, and words for which the scripted engine has an answer."""

from typing import Any

QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]
WEATHER_QUESTION = "What is the weather in Paris?"  # the scripted engine calls `get_weather` with this city
WEATHER_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 24}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER_TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather in a city", "parameters": WEATHER_SCHEMA},
}
CITY_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "country": {"enum": ["France", "Italy", "Peru"]},
        "population": {"type": "integer", "minimum": 0, "maximum": 40000000},
        "is_capital": {"type": "boolean"},
    },
    "required": ["name", "country", "population", "is_capital"],
    "additionalProperties": False,
}


def assert_is_a_city(city: Any) -> None:
    """That the answer has the form of CITY_SCHEMA."""
    assert set(city) == set(CITY_SCHEMA["properties"]), city
    assert isinstance(city["name"], str)
    assert city["country"] in ("France", "Italy", "Peru")
    assert type(city["population"]) is int
    assert 0 <= city["population"] <= 40000000
    assert type(city["is_capital"]) is bool
