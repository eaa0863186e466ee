"""Prompts of random runs: a seed that failed once is a test for as long as it draws the same."""

import random

from headwater.simulation.engine_shape import VOCAB_SIZE
from headwater.simulation.random_runs.profiles import find_profile
from headwater.simulation.random_runs.prompts import Prompts


def test_tokens_are_those_that_randrange_draws():
    source, other = random.Random(7), random.Random()
    prompts = Prompts(source, find_profile("mixed"))
    other.setstate(source.getstate())
    assert prompts.tokens(500) == [other.randrange(VOCAB_SIZE) for _ in range(500)]
    assert source.getstate() == other.getstate()
