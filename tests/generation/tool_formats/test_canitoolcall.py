"""Outputs that canitoolcall recorded of nine families of models, its own checks over our parse of each.

Each output is parsed whole, and in pieces: cut at random, at every character, and around the family's markers. Both are
done as a request with `whole_tool_calls` has it, and as it is by default.
"""

import random
import re
from functools import cache

import pytest
from canitoolcall.checks import case_status, run_checks
from canitoolcall.fixtures import Family, Fixture, load_families, load_fixtures
from canitoolcall.results import Observation, ParsedToolCall, ParseResult, Status

from headwater.generation.answer_parser import AnswerParser
from headwater.generation.reasoning import REASONING_FORMATS
from headwater.generation.tool_formats.formats import TOOL_FORMATS
from headwater.generation.tool_formats.parts import CallArguments, CallStart, Content, Reasoning
from headwater.generation.tool_formats.tool_format import Tool

# what the models' templates choose; the first whose name is in the model's name
FORMATS = {
    "Qwen3-Coder": ("qwen3-xml", None),
    "Qwen3.": ("qwen3-xml", "qwen3"),
    "Qwen3": ("hermes", "qwen3"),
    "DeepSeek-V3-": ("deepseek-v3", None),
    "DeepSeek-V3.1": ("deepseek-v3.1", "deepseek-v3"),
    "DeepSeek": ("deepseek-v3.2", "deepseek-v3"),
    "gemma-4": ("gemma4", "gemma4"),
    "GLM": ("glm", "glm"),
    "gpt-oss": ("gpt-oss", "gpt-oss"),
    "Kimi-K2": ("kimi-k2", "qwen3"),
    "Kimi-K3": ("kimi-k3", "kimi-k3"),
    "Llama-3": ("llama3", None),
    "Llama-4": ("pythonic", None),
    "Mistral-7B": ("mistral-v3", "mistral"),
    "tral": ("mistral", "mistral"),
}
NUM_FIXTURES = {"deepseek": 85, "gemma4": 48, "glm": 51, "gpt-oss": 51, "kimi": 49, "llama": 34, "mistral": 47}
NUM_FIXTURES |= {"qwen3-hermes": 50, "qwen3-xml": 54}
# Cut off inside a call that has more than 32 characters of arguments, or inside a list whose first call is complete:
# they have been given out and cannot be taken back. canitoolcall wants no call.
GIVEN_OUT = {
    "gemma4/truncated-second-parallel-call",
    "glm/glm47-truncated-before-close-call",
    "llama/l4-truncated-missing-close-bracket",
    "llama/l3-truncated-inside-parameters",
    "mistral/v13think-truncated-in-arguments",
    "qwen3-xml/q38-truncated-in-parameter",
}
# two fixtures of one format disagree on the space before a call; the other one is followed, since it keeps the text
SPACE_ONLY = {"gemma4/vllm-text-before-call"}


@cache
def families() -> dict[str, Family]:
    return load_families()


def parse(fixture: Fixture, pieces: list[str], *, holds_calls: bool) -> ParseResult:
    model = fixture.reference_model.split("/")[1]
    tool_format, reasoning = next(formats for name, formats in FORMATS.items() if name in model)
    reference = families()[fixture.family].reference_for(fixture.reference_model)
    prompt = fixture.generation_prompt
    if prompt is None:
        prompt = (reference and reference.default_generation_prompt) or ""
    functions = [tool["function"] for tool in fixture.tools]
    parser = AnswerParser(
        TOOL_FORMATS[tool_format],
        REASONING_FORMATS[reasoning] if reasoning else None,
        tools=[Tool(function["name"], function.get("parameters") or {}) for function in functions],
        prompt=prompt,
        holds_calls=holds_calls,
    )
    texts: dict[type, str] = {Content: "", Reasoning: ""}
    calls: list[ParsedToolCall] = []
    for part in [part for piece in pieces for part in parser.feed(piece)] + parser.finish():
        match part:
            case Content(text) | Reasoning(text):
                texts[type(part)] += text
            case CallStart(name):
                calls.append(ParsedToolCall(name, ""))
            case CallArguments(text):
                calls[-1] = ParsedToolCall(calls[-1].name, (calls[-1].arguments_raw or "") + text)
    return ParseResult(texts[Content] or None, texts[Reasoning] or None, tuple(calls), None)


def cuts(fixture: Fixture) -> dict[str, list[str]]:
    markers = "|".join(map(re.escape, families()[fixture.family].markers))
    found = {"one": [fixture.raw_output], "every": list(fixture.raw_output)}
    found["markers"] = re.split(f"({markers})", fixture.raw_output)
    for seed in range(1, 4):
        numbers, rest, found[f"random {seed}"] = random.Random(seed), fixture.raw_output, []
        while rest:
            num = numbers.randint(1, 8 * seed)
            found[f"random {seed}"].append(rest[:num])
            rest = rest[num:]
    return found


def status(fixture: Fixture, *, holds_calls: bool) -> Status:
    seen = Observation(
        nonstream=parse(fixture, [fixture.raw_output], holds_calls=holds_calls),
        streams={name: parse(fixture, pieces, holds_calls=holds_calls) for name, pieces in cuts(fixture).items()},
    )
    return case_status(run_checks(fixture, families()[fixture.family], seen))


@pytest.mark.parametrize("holds_calls", [True, False])
@pytest.mark.parametrize("family", NUM_FIXTURES)
def test_every_family_passes(family: str, holds_calls: bool) -> None:
    found = {each.id: status(each, holds_calls=holds_calls) for each in load_fixtures(families=[family])}
    assert len(found) == NUM_FIXTURES[family]
    of_status = {case: {each for each in found if found[each] is case} for case in Status}
    assert of_status[Status.FAIL] == (set() if holds_calls else GIVEN_OUT & set(found))
    assert of_status[Status.SOFT_PASS] == SPACE_ONLY & set(found)
