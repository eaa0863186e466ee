"""What a format's grammar lets a model write, the format's parser reads as calls that satisfy the tools' schemas.

A model that draws allowed bytes at random writes the answers. It likes brackets, quotes and the format's own markers.
"""

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from headwater.generation.answer_parser import AnswerParser
from headwater.generation.tool_formats.formats import TOOL_FORMATS
from headwater.generation.tool_formats.parts import CallArguments, CallEnd, CallStart, ParsedPart
from headwater.generation.tool_formats.tool_format import Tool
from headwater.grammars.errors import GrammarError

POINT = {
    "type": "object",
    "properties": {"x": {"type": "number"}, "y": {"type": "number"}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
TOOLS = [
    Tool(
        "get_weather",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "unit": {"type": "string", "enum": ["c", "f"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city"],
        },
    ),
    Tool("noop"),
    Tool(
        "complex",
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1, "maxLength": 5},
                "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
                "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
                "flag": {"type": "boolean"},
                "note": {"type": ["string", "null"]},
                "at": {"$ref": "#/$defs/Point"},
                "mix": {"anyOf": [{"type": "integer"}, POINT]},
                "seven": {"const": 7},
            },
            "required": ["zip", "at", "flag"],
            "$defs": {"Point": POINT},
        },
    ),
    Tool(
        "formats",
        {
            "type": "object",
            "properties": {
                name.replace("-", "_"): {"type": "string", "format": name}
                for name in ("date", "ipv4", "uuid", "email", "date-time")
            },
            "required": ["date", "ipv4"],
        },
    ),
]
# the markers that are special tokens in the models' vocabularies
MARKERS: dict[str, Sequence[str]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "qwen3-xml": ("<tool_call>", "</tool_call>"),
    "llama3": ("<|python_tag|>",),
    "glm": ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    "deepseek-v3": (
        *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
        "<｜tool▁sep｜>",
    ),
    "deepseek-v3.2": (),
    "gemma4": ("<|tool_call>", "<tool_call|>", '<|"|>'),
    "kimi-k2": (
        *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>"),
        "<|tool_call_argument_begin|>",
    ),
    "kimi-k3": ("<|open|>", "<|close|>", "<|sep|>"),
    "mistral": ("[TOOL_CALLS]", "[ARGS]"),
    "mistral-v3": ("[TOOL_CALLS]",),
    "pythonic": (),
    "lfm2": ("<|tool_call_start|>", "<|tool_call_end|>"),
    "gpt-oss": ("<|channel|>", "<|message|>", "<|constrain|>"),
}
MARKERS["deepseek-v3.1"] = MARKERS["deepseek-v3"]
# texts that the model likes, which end raw text, or nearly do
TEXTS = {
    "qwen3-xml": ("\n</parameter>", "</parameter>", "\n<parameter=city>", "</function>", "</tool_call>"),
    "glm": ("</arg_value>", "<arg_key>", "</tool_call>"),
    "deepseek-v3.2": ("</｜DSML｜parameter>", "<｜DSML｜invoke", "</｜DSML｜invoke>"),
    "gemma4": ('<|"|>', "<tool_call|>", "}"),
    "kimi-k3": ("<|close|>argument<|sep|>", "<|close|>", "<|open|>"),
}
PROMPTS = {"kimi-k3": "<|open|>response<|sep|>"}
FORMATS = jsonschema.FormatChecker(["ipv4", "uuid", "email"])  # not dates: the library takes 29 February of any year
END = 256
NUM_SEEDS = 10


class ByteVocabulary:
    """A token for each byte, the end, and the special tokens."""

    bos_token_id = None
    eos_token_id = END

    def __init__(self, special_tokens: Sequence[str]) -> None:
        self.tokens = [bytes([i]) for i in range(END)] + [text.encode() for text in ("<end>", *special_tokens)]
        self.special_token_ids = range(END, len(self.tokens))
        self.ids = {text: END + 1 + i for i, text in enumerate(special_tokens)}

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def random_answer(vocabulary: ByteVocabulary, grammar: str, texts: Sequence[str], draws: random.Random) -> str | None:
    """None: the model has not come to an end."""
    matcher = LLMatcher(LLTokenizer(TokenizerWrapper(vocabulary)), grammar)  # pyright: ignore[reportArgumentType]
    ids: list[int] = []
    while len(ids) < 900:
        allowed = [token for token, bias in enumerate(matcher.compute_logit_bias()) if bias]
        assert not matcher.is_error(), f"{matcher.get_error()}\n{grammar}"
        ends = END in allowed or not allowed
        allowed = [token for token in allowed if token != END]
        if ends and (not allowed or draws.random() < 0.4):
            break
        chosen = _next(matcher, allowed, texts, draws, is_tired=len(ids) > 120)
        assert matcher.consume_tokens(chosen)
        ids += chosen
    else:
        return None
    return b"".join(vocabulary.tokens[token] for token in ids).decode()


def _next(
    matcher: LLMatcher, allowed: list[int], texts: Sequence[str], draws: random.Random, *, is_tired: bool
) -> list[int]:
    if texts and draws.random() < (0.6 if is_tired else 0.15):
        text = list((texts[0] if is_tired else draws.choice(texts)).encode())
        if matcher.validate_tokens(text) == len(text):
            return text
    special = [token for token in allowed if token > END]
    closing = [token for token in allowed if token < END and chr(token) in "\"']})>"]
    if is_tired and (special or closing) and draws.random() < 0.8:
        return [draws.choice(special or closing)]
    liked = special + [token for token in allowed if token < END and chr(token) in "\"'<>[]{}(),:|\n/"]
    return [draws.choice(liked if liked and draws.random() < 0.5 else allowed)]


def calls_of(parts: list[ParsedPart]) -> list[tuple[str, str]]:
    """Name and arguments of each call. There is nothing but complete calls."""
    calls: list[tuple[str, str]] = []
    num_ends = 0
    for part in parts:
        match part:
            case CallStart(name):
                calls.append((name, ""))
            case CallArguments(text):
                calls[-1] = (calls[-1][0], calls[-1][1] + text)
            case CallEnd():
                num_ends += 1
            case _:
                pytest.fail(f"{part}")
    assert len(calls) == num_ends
    return calls


def check(arguments: str, schema: Mapping[str, Any]) -> None:
    value = json.loads(arguments)
    assert isinstance(value, dict)
    jsonschema.validate(value, schema, format_checker=FORMATS)


@pytest.mark.parametrize("has_special_tokens", [False, True])
@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_every_random_answer_is_valid_calls(name: str, has_special_tokens: bool) -> None:
    tool_format = TOOL_FORMATS[name]
    vocabulary = ByteVocabulary(MARKERS[name] if has_special_tokens else ())
    num_finished = num_calls = 0
    for seed in range(NUM_SEEDS):
        draws = random.Random(seed)
        grammar = tool_format.grammar(TOOLS, parallel=seed % 2 == 0, special_tokens=vocabulary.ids)
        answer = random_answer(vocabulary, grammar, TEXTS.get(name, ()), draws)
        if answer is None:
            continue
        parser = AnswerParser(tool_format, None, tools=TOOLS, holds_calls=True, prompt=PROMPTS.get(name, ""))
        calls = calls_of(parser.feed(answer) + parser.finish())
        assert calls, answer
        assert len(calls) == 1 or seed % 2 == 0, answer
        for function, arguments in calls:
            check(arguments, next(tool.parameters for tool in TOOLS if tool.name == function))
        num_finished += 1
        num_calls += len(calls)
    assert num_finished > NUM_SEEDS / 2


def test_a_schema_that_a_format_cannot_write_is_an_error() -> None:
    either = Tool("f", {"type": "object", "anyOf": [{"required": ["a"]}, {"required": ["b"]}]})
    for name in ("qwen3-xml", "glm", "gemma4", "pythonic"):
        with pytest.raises(GrammarError, match="anyOf"):
            TOOL_FORMATS[name].grammar([either])
    with pytest.raises(GrammarError, match="name of this parameter"):
        TOOL_FORMATS["pythonic"].grammar([Tool("f", {"properties": {"a b": {"type": "string"}}})])
    with pytest.raises(GrammarError, match="name of this parameter"):
        TOOL_FORMATS["qwen3-xml"].grammar([Tool("f", {"properties": {"a>b": {"type": "string"}}})])
    with pytest.raises(GrammarError, match="the name 'f g'"):
        TOOL_FORMATS["glm"].grammar([Tool("f g")])
    with pytest.raises(GrammarError):
        TOOL_FORMATS["hermes"].grammar([Tool("\ud800")])
    with pytest.raises(GrammarError, match="uniqueItems"):
        TOOL_FORMATS["gemma4"].grammar([Tool("f", {"properties": {"a": {"type": "array", "uniqueItems": True}}})])


def test_a_reference_to_itself_ends() -> None:
    tree = {"type": "object", "properties": {"below": {"type": "array", "items": {"$ref": "#/$defs/Tree"}}}}
    tool = Tool("f", {"properties": {"tree": {"$ref": "#/$defs/Tree"}}, "$defs": {"Tree": tree}})
    for name, tool_format in TOOL_FORMATS.items():
        LLMatcher.validate_grammar(tool_format.grammar([tool]), None)
        assert not LLMatcher(
            LLTokenizer(TokenizerWrapper(ByteVocabulary(()))), tool_format.grammar([tool])
        ).is_error(), name
