"""Values that a model's files recommend are checked like those of a request."""

import pytest

from headwater.generation.sampling import usable_defaults


def test_a_recommendation_of_an_unknown_parameter_is_logged_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """A strange file beside the weights must not keep a server from starting."""
    assert usable_defaults({"typical_p": 0.9, "top_p": 0.8}) == {"top_p": 0.8}
    assert "default of typical_p is left out" in caplog.text
