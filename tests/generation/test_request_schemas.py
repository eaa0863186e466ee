"""An option is declared once, and no option is lost between the body and the engine."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

import headwater
from headwater.generation.native_schemas import GenerateRequest, SamplingInput
from headwater.generation.request_schemas import OptionFields, SamplingFields
from headwater.generation.text_request import TextOptions
from headwater.http_api.openai.schemas import ChatCompletionRequest, CompletionRequest
from headwater.messages.generation import RequestOptions, SamplingParams

SOURCE = Path(headwater.__file__).parent
NAMED_BY_EACH_API = {"max_new_tokens", "min_new_tokens", "seed"}
CHOSEN_BY_MODEL = {"lora_name"}  # no field of its own: `model` or `lora_path` names an adapter, or the base
BODIES: list[Any] = [
    lambda **given: GenerateRequest(text="a", **given),
    lambda **given: CompletionRequest(prompt="a", **given),
    lambda **given: ChatCompletionRequest(messages=[{"role": "user", "content": "a"}], **given),
]
OTHER_VALUES: dict[type, Any] = {bool: True, int: 7, float: 0.5, str: "x"}


def defaults(struct: type[msgspec.Struct]) -> dict[str, Any]:
    return {field.name: field.default for field in msgspec.structs.fields(struct)}


def option_defaults() -> dict[str, Any]:
    return {name: value for name, value in defaults(RequestOptions).items() if name not in CHOSEN_BY_MODEL}


def test_every_sampling_option_of_the_engine_is_one_of_the_bodies_with_the_same_default() -> None:
    expected = {name: value for name, value in defaults(SamplingParams).items() if name not in NAMED_BY_EACH_API}
    given = {name: field.default for name, field in SamplingFields.model_fields.items() if name in expected}
    assert msgspec.convert(given, SamplingParams) == SamplingParams() and given.keys() == expected.keys()


def test_every_request_option_of_the_engine_is_one_of_the_bodies_with_the_same_default() -> None:
    expected = option_defaults()
    given = {name: field.default for name, field in OptionFields.model_fields.items() if name in expected}
    assert given == expected


def test_no_field_is_declared_twice() -> None:
    shared = SamplingFields.model_fields.keys() | OptionFields.model_fields.keys()
    for body in (GenerateRequest, SamplingInput, CompletionRequest, ChatCompletionRequest):
        assert not shared & body.__annotations__.keys(), body


@pytest.mark.parametrize("body", BODIES)
def test_every_request_option_leaves_the_body_as_it_was_given(body: Any) -> None:
    for name, default in option_defaults().items():
        value = OTHER_VALUES[type(default)]
        assert body(**{name: value}).engine_options() == msgspec.structs.replace(RequestOptions(), **{name: value})


def test_text_options_leave_the_body_under_both_names_of_openai() -> None:
    given = {"stop": ["a", "b"], "skip_special_tokens": False}
    plain = TextOptions(stop=("a", "b"), skip_special_tokens=False)
    trimless = TextOptions(stop=("a", "b"), skip_special_tokens=False, keep_stop=True)
    assert SamplingInput(**given).text_options() == plain
    assert SamplingInput(**given, no_stop_trim=True).text_options() == trimless
    for name in ("no_stop_trim", "include_stop_str_in_output"):
        assert CompletionRequest(prompt="", **given, **{name: True}).text_options() == trimless


def test_openai_bodies_say_which_defaults_come_from_the_model() -> None:
    fields = ChatCompletionRequest.model_json_schema()["properties"]
    assert "recommend" in fields["temperature"]["description"]
    assert "recommend" not in fields["frequency_penalty"]["description"]


def test_no_code_between_schema_and_use_names_an_option() -> None:
    """An option that is retyped on its way gets lost wherever one of the retypings is forgotten."""
    converted = {"top_k", "logit_bias"}  # 0 and {} mean none
    names = [*option_defaults(), *(defaults(SamplingParams).keys() - NAMED_BY_EACH_API - converted)]
    retyped = re.compile(rf"\b({'|'.join(names)})=|\"({'|'.join(names)})\":")
    way = [
        *("generation/native.py", "generation/sampling.py", "generation/text_generation.py"),
        *(f"http_api/openai/{name}.py" for name in ("answer", "chat", "completions", "sampling")),
        "scheduling/request.py",
    ]
    found = {name: retyped.findall((SOURCE / name).read_text()) for name in way}
    assert {name: hits for name, hits in found.items() if hits} == {}
