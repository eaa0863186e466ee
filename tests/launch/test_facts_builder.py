"""The facts of the served model that come from the arguments and from its files."""

import pytest
from msgspec import structs

from headwater.launch.config import ServerArgs
from headwater.launch.default_model import DEFAULT_MODEL, model_path
from headwater.launch.facts_builder import build_model_facts
from scripted_engine import READY


@pytest.mark.parametrize(
    ("args", "recommended", "expected"),
    [
        (ServerArgs(model="some/folder"), {}, {}),
        (ServerArgs(model="some/folder"), {"temperature": 0.6, "top_k": 20}, {"temperature": 0.6, "top_k": 20}),
        (ServerArgs(model="some/folder", sampling_defaults="openai"), {"temperature": 0.6}, {}),
        (ServerArgs(model=str(model_path(DEFAULT_MODEL))), {}, {"temperature": 0.2, "top_p": 0.9}),
        (ServerArgs(model=str(model_path(DEFAULT_MODEL)), sampling_defaults="openai"), {}, {}),
    ],
)
def test_sampling_defaults(args: ServerArgs, recommended: dict[str, float], expected: dict[str, float]) -> None:
    facts = build_model_facts(args, structs.replace(READY, sampling_defaults=recommended))
    assert facts.sampling_defaults == expected


def test_a_recommendation_that_no_request_could_make_is_left_out_and_told(caplog: pytest.LogCaptureFixture) -> None:
    """A model is not refused for a strange file beside its weights."""
    ready = structs.replace(READY, sampling_defaults={"temperature": -1.0, "top_p": float("nan"), "min_p": 0.1})
    assert build_model_facts(ServerArgs(model="some/folder"), ready).sampling_defaults == {"min_p": 0.1}
    assert "default of temperature is left out" in caplog.text
    assert "from 0 to 100, got -1.0" in caplog.text
