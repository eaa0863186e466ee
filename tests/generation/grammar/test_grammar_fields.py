"""Which grammar a body asks for, on every route's names; and that checks of grammars are bounded."""

import asyncio
import json
import subprocess
import time
from typing import Any

import pytest

from headwater.generation.errors import ApiError, InvalidRequest
from headwater.generation.grammar.fields import GrammarFields, OpenAIGrammarFields, grammar_source
from headwater.generation.grammar.texts import GrammarTexts
from headwater.grammars.checker import GrammarChecker, question
from headwater.grammars.errors import GrammarError
from headwater.grammars.json_options import JsonOptions
from headwater.grammars.sources import from_choice, from_ebnf, from_json_schema, from_regex, json_object
from headwater.grammars.structural_tags import from_structural_tag

pytestmark = pytest.mark.anyio
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
EBNF = 'root ::= "a"+'
TAG = {"type": "structural_tag", "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f"]}
NAMED = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def texts() -> GrammarTexts:
    return GrammarTexts()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"json_schema": SCHEMA}, from_json_schema(SCHEMA)),
        ({"json_schema": json.dumps(SCHEMA)}, from_json_schema(SCHEMA)),
        ({"json_schema": "$$ANY$$"}, json_object()),
        ({"guided_json": SCHEMA}, from_json_schema(SCHEMA)),
        ({"guided_json": {}}, from_json_schema({})),
        ({"regex": "a+"}, from_regex("a+")),
        ({"guided_regex": "a+"}, from_regex("a+")),
        ({"ebnf": EBNF}, from_ebnf(EBNF)),
        ({"guided_grammar": EBNF}, from_ebnf(EBNF)),
        ({"guided_choice": ["a", "b"]}, from_choice(["a", "b"])),
        ({"structural_tag": json.dumps(TAG)}, from_structural_tag(TAG)),
        ({"response_format": {"type": "json_object"}}, json_object()),
        ({"response_format": NAMED}, from_json_schema(SCHEMA)),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, from_json_schema(SCHEMA)),
        ({"response_format": TAG}, from_structural_tag(TAG)),
        ({"structured_outputs": {"json": SCHEMA, "backend": "xgrammar"}}, from_json_schema(SCHEMA)),
        ({"structured_outputs": {"json_object": True}}, json_object()),
        ({"structured_outputs": {"choice": ["x"], "regex": None, "json_object": False}}, from_choice(["x"])),
        ({"structured_outputs": {"grammar": EBNF}}, from_ebnf(EBNF)),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
            from_json_schema(SCHEMA, options=JsonOptions(whitespace="")),
        ),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_additional_properties": True}},
            from_json_schema(SCHEMA, options=JsonOptions(closes_objects=True)),
        ),
        (
            {"guided_json": SCHEMA, "guided_whitespace_pattern": "[ ]?"},
            from_json_schema(SCHEMA, options=JsonOptions(whitespace="[ ]?")),
        ),
        ({"regex": "", "json_schema": "", "guided_choice": [], "response_format": {"type": "text"}}, None),
        ({"structured_outputs": {}}, None),
        ({}, None),
    ],
)
async def test_every_name_of_a_grammar(texts: GrammarTexts, body: dict[str, Any], expected: str | None) -> None:
    grammar = await texts.of(OpenAIGrammarFields.model_validate(body))
    assert (None if grammar is None else grammar.text) == expected


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"regex": "a", "json_schema": "{}"}, ("regex", "json_schema")),
        ({"response_format": NAMED, "guided_choice": ["a"]}, ("response_format", "guided_choice")),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, ("outputs.regex", "outputs.choice")),
        ({"structured_outputs": {"json": SCHEMA}, "ebnf": EBNF}, ("structured_outputs.json", "ebnf")),
    ],
)
def test_two_grammars_are_an_error_that_names_both(body: dict[str, Any], named: tuple[str, str]) -> None:
    with pytest.raises(InvalidRequest) as error:
        grammar_source(OpenAIGrammarFields.model_validate(body))
    assert all(name in error.value.message for name in named)


@pytest.mark.parametrize(
    ("body", "param", "reason"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "is needed"),
        ({"response_format": {}}, "response_format", "type must be"),
        ({"response_format": NAMED | {"json_schema": {"schema": {"not": {}}}}}, "response_format", "#: not: "),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json", "wrong type"),
        ({"structured_outputs": {"choices": ["a"]}}, "structured_outputs.choices", "not known"),
        ({"structured_outputs": {"choice": ["a", 5]}}, "structured_outputs.choice", "texts"),
        ({"structural_tag": "no"}, "structural_tag", "not valid JSON"),
        ({"json_schema": "[" * 5000}, "json_schema", "nested"),
        ({"json_schema": "\ud800"}, "json_schema", ""),
        ({"json_schema": {"enum": ["\ud800"]}}, "json_schema", "Unicode"),
        ({"regex": "a\ud800"}, "regex", "Unicode: a lone surrogate at character 1"),
        ({"structural_tag": {"format": {"type": "regex", "pattern": "\ud800"}}}, "structural_tag", "Unicode"),
        ({"guided_json": {}, "guided_whitespace_pattern": "("}, "guided_json", ""),
    ],
)
async def test_a_malformed_grammar_is_an_error_that_names_its_field(
    texts: GrammarTexts, body: dict[str, Any], param: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest) as error:
        await texts.of(OpenAIGrammarFields.model_validate(body))
    assert (error.value.status, error.value.param) == (400, param)
    assert reason in error.value.message
    assert error.value.message.startswith(param)


async def test_the_routes_place_of_a_field_is_named(texts: GrammarTexts) -> None:
    with pytest.raises(InvalidRequest) as error:
        await texts.of(GrammarFields(regex="("), prefix="sampling_params[1].")
    assert error.value.param == "sampling_params[1].regex"


async def test_a_repeated_grammar_is_made_once_and_little_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def ask(self: GrammarChecker, asked: str, *, timeout_s: float) -> str:
        made.append(json.loads(asked)[1])
        return f"start: /{made[-1]}/"

    monkeypatch.setattr(GrammarChecker, "ask", ask)
    texts = GrammarTexts(max_kept_chars=2 * len("start: /a/"))
    for pattern in "aabab":
        assert (await texts.of(GrammarFields(regex=pattern))) is not None
    assert made == ["a", "b"]
    await texts.of(GrammarFields(regex="c"))  # the oldest makes room
    await texts.of(GrammarFields(regex="b"))
    await texts.of(GrammarFields(regex="a"))
    assert made == ["a", "b", "c", "a"]


async def test_a_prepared_process_answers_the_first_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[GrammarChecker] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **named: started.append(args) or popen(*args, **named))
    texts = GrammarTexts()
    await texts.prepare()
    assert len(started) == 1
    assert (await texts.of(GrammarFields(regex="a+"))) is not None
    assert len(started) == 1
    texts.close()


async def test_a_process_that_cannot_be_started_fails_the_first_grammar_and_not_the_preparation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: GrammarChecker, asked: str, *, timeout_s: float) -> str:
        raise OSError("no more processes")

    monkeypatch.setattr(GrammarChecker, "ask", refuse)
    texts = GrammarTexts()
    await texts.prepare()
    with pytest.raises(ApiError) as error:
        await texts.of(GrammarFields(regex="a+"))
    assert error.value.status == 503


def test_an_error_of_the_process_itself_is_an_answer_at_once() -> None:
    checker = GrammarChecker()
    with pytest.raises(GrammarError, match="too complex"):
        checker.ask(question("regex", 5, JsonOptions()), timeout_s=60)
    assert checker.ask(question("regex", "a", JsonOptions()), timeout_s=60)
    checker.close()


CRASHES = "root ::= r0\n" + "".join(f'r{n} ::= r{n + 1} "x"\n' for n in range(4000)) + 'r4000 ::= "y"'
HANGS = {"type": "string", "allOf": [{"pattern": f"a{n}"} for n in range(200)]}


async def test_a_grammar_that_breaks_the_library_is_a_400_and_the_next_one_is_served() -> None:
    texts = GrammarTexts(max_seconds=1.5)
    for body, reason in (
        (GrammarFields(ebnf=CRASHES), "too complex"),
        (GrammarFields(json_schema=HANGS), "longer than"),
    ):
        with pytest.raises(InvalidRequest) as error:
            await texts.of(body)
        assert reason in error.value.message
        assert (await texts.of(GrammarFields(regex="a+"))) is not None


async def test_slow_grammars_end_in_time_and_what_waits_too_long_behind_them_is_a_503() -> None:
    texts = GrammarTexts(max_seconds=0.6)
    slow = [GrammarFields(json_schema=HANGS | {"title": str(n)}) for n in range(12)]
    outcomes = await asyncio.gather(*(texts.of(body) for body in slow), return_exceptions=True)
    assert {error.status for error in outcomes if isinstance(error, ApiError)} == {400, 503}
    assert len(outcomes) == 12


HOSTILE: list[dict[str, Any]] = [
    {"regex": "(a{100}){100}" * 50},
    {"regex": "((((a*)*)*)*)*" * 500},
    {"regex": ".*" * 5000},
    {"regex": "(" * 8000 + "a" + ")" * 8000},
    {"regex": "a{1,100000}{1,100000}"},
    {"regex": "|".join(f"{n}.*{n}" for n in range(2000))},
    {"ebnf": "root ::= " + "(" * 60 + '"a"*' + ")*" * 60},
    {"ebnf": "root ::= r0\n" + "\n".join(f'r{n} ::= r{n + 1} r{n + 1} | "x"' for n in range(2000)) + '\nr2000 ::= "y"'},
    {"ebnf": "root ::= " + '"a"{9999}' * 500},
    {"ebnf": "root ::= root root | root"},
    {"json_schema": {"allOf": [{"anyOf": [{"minimum": n + 10 * m} for n in range(8)]} for m in range(8)]}},
    {"json_schema": {"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$", "maxLength": 10_000}},
    {"json_schema": {"patternProperties": {f"a.*{n}.*b": {} for n in range(32)}}},
    {"json_schema": {"items": {"items": {"items": {"maxItems": 2000}, "maxItems": 2000}, "maxItems": 2000}}},
    {"json_schema": {"properties": {f"p{n}": {"type": "string"} for n in range(5000)}}},
    {"json_schema": {"oneOf": [{"properties": {"a": {"const": n}}, "required": ["a"]} for n in range(400)]}},
    {"json_schema": {"$ref": "#/$defs/d0", "$defs": {"d40": {}} | {
        f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)}}},
    {"structural_tag": {"format": {"type": "triggered_tags", "triggers": [f"<{n}>" for n in range(150)], "tags": [
        {"begin": f"<{n}>", "content": {"type": "any_text"}, "end": f"</{n}>"} for n in range(150)]}}},
    {"guided_choice": ["a" * n for n in range(1, 500)]},
]  # fmt: skip


@pytest.mark.parametrize("body", HOSTILE, ids=str)
async def test_a_hostile_grammar_takes_bounded_time(texts: GrammarTexts, body: dict[str, Any]) -> None:
    """Accepted or refused, but in seconds and not with a 500; the event loop goes on meanwhile."""
    making = asyncio.ensure_future(texts.of(OpenAIGrammarFields.model_validate(body)))
    longest_s = 0.0
    while not making.done():
        before_s = time.monotonic()
        await asyncio.sleep(0.005)
        longest_s = max(longest_s, time.monotonic() - before_s)
    (outcome,) = await asyncio.gather(making, return_exceptions=True)
    assert outcome is not None
    assert isinstance(outcome, InvalidRequest) or not isinstance(outcome, BaseException)
    assert longest_s < 2, "the loop was held up"
