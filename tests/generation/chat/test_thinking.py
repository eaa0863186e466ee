"""What waits for the end of the thinking, and what is refused where that end would not be noticed."""

import pytest

from headwater.generation.chat.thinking import Thinking
from headwater.generation.errors import InvalidRequest
from headwater.generation.reasoning import REASONING_FORMATS

FORMAT = REASONING_FORMATS["qwen3"]


@pytest.mark.parametrize(
    ("thinking", "markers"),
    [
        (Thinking(FORMAT, "open", ""), "needs </think> as"),
        (Thinking(FORMAT, "possible", "", None, 7), "needs <think> and </think> as"),
    ],
)
def test_markers_of_several_tokens_are_a_400_that_names_the_field(thinking: Thinking, markers: str) -> None:
    for text, budget, param in (("", 5, "max_reasoning_tokens"), ("start: /a/", None, "response_format")):
        with pytest.raises(InvalidRequest, match=markers) as error:
            thinking.before(text, budget=budget, param="response_format")
        assert error.value.param == param
    assert thinking.before("") is None


def test_only_the_marker_that_is_still_to_come_must_be_a_token() -> None:
    grammar = Thinking(FORMAT, "open", "", None, 7).before("", budget=5)
    assert grammar is not None
    assert (grammar.begins_after, grammar.opens_with, grammar.begins_within) == ((7,), None, 5)
