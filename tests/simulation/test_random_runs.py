"""Random runs keep every promise: fixed seeds, a fresh seed every time, and the machinery around them."""

import os
import time
from dataclasses import replace

import pytest

from headwater.messages.base import pack_ids
from headwater.messages.generation import Generate, SamplingParams
from headwater.simulation.random_runs.campaign import Campaign, run_campaign
from headwater.simulation.random_runs.events import Deliver, Trace, decode_trace, describe, encode_trace
from headwater.simulation.random_runs.profiles import PROFILES
from headwater.simulation.random_runs.run import RandomRun, random_run, replay
from headwater.simulation.random_runs.workload import Workload

FRESH_S = float(os.environ.get("HEADWATER_SIMULATION_S", "4"))
TURNS = 600

# Each broke a promise once; test_found.py has the shortest form of what they found. The workload has had new kinds of
# events since, so these are other runs now, and need not be as long.
REGRESSIONS = [
    (13, "training"),  # a deadline was slept over
    (22, "flush"),  # two flushes that take effect in one turn
    (53, "training"),  # pages taken over before a flush, told to the runner after it
    (56, "calm"),  # a flush of the device alone, drained while the host gives pages back
    (119, "tiers"),  # a store that acknowledges late
    (135, "mixed"),  # a store detached while its flush waited
    (175, "mixed"),  # copies that begin when everything has ended
    (283, "training"),  # memory released under a step
    (295, "mixed"),
    (298, "training"),
    (1002, "mixed"),  # pages that a later flush covered, too
    (20030, "rough"),  # a rid that is sent again in the turn of its end
    (1796074451, "grammars"),  # a page computed again, while the copy of an older one is on its way to the host
    (8700227, "grammars"),  # a compilation that is given up exactly at its time: the checks rounded it otherwise
]
RETAINED_TURNS = 400


@pytest.mark.parametrize(("seed", "profile"), REGRESSIONS, ids=lambda value: str(value))
def test_seeds_that_failed_once(seed, profile):
    result = random_run(seed, profile=PROFILES[profile], num_turns=RETAINED_TURNS)
    assert result.failure is None, result.failure.message


@pytest.mark.parametrize("profile", PROFILES)
def test_each_profile(profile):
    result = random_run(3, profile=PROFILES[profile], num_turns=TURNS)
    assert result.failure is None, result.failure.message
    assert result.num_pages_reused > 50  # else nothing was checked


@pytest.mark.parametrize("num_ranks", [4, 8])
def test_engines_of_more_ranks(num_ranks):
    """Every turn compares each rank's tables, pages and adapters with rank 0's."""
    profile = replace(PROFILES["ranks"], num_ranks=(num_ranks, num_ranks))
    result = random_run(5, profile=profile, num_turns=RETAINED_TURNS)
    assert result.failure is None, result.failure.message
    assert result.num_pages_reused > 50


@pytest.mark.random
def test_a_fresh_seed_every_time(capsys):
    """HEADWATER_SIMULATION_S says for how long, HEADWATER_SIMULATION_SEED from which; else it is printed first."""
    first_seed = int(os.environ.get("HEADWATER_SIMULATION_SEED") or time.time_ns() % 10**9)
    until_s = time.monotonic() + FRESH_S
    campaign = Campaign(first_seed, num_runs=10**6, turns_per_run=TURNS)
    with capsys.disabled():
        print(f"\nheadwater simulate --seed {first_seed} --turns {TURNS}")
    for result in run_campaign(campaign):
        failure = result.failure
        assert failure is None, f"--seed {result.seed} --turns {TURNS} --profile {failure.trace.profile}: {failure}"
        if time.monotonic() > until_s:
            break


def test_a_run_repeats_exactly():
    """A seed that fails must fail again: nothing depends on addresses, threads or the wall clock."""
    texts = []
    for _ in range(2):
        workload = Workload(7, PROFILES["tiers"])
        run = RandomRun(_trace_of(7, "tiers", workload))
        for _, event in zip(range(300), workload.events(), strict=False):
            run.play(event)
        run.finish()
        texts.append([engine.answers for engine in run.engines] + [run.num_turns])
    assert texts[0] == texts[1]


def test_a_trace_survives_the_way_through_a_file_and_tells_what_happens():
    workload = Workload(11, PROFILES["mixed"])
    events = tuple(event for _, event in zip(range(200), workload.events(), strict=False))
    trace = decode_trace(encode_trace(_trace_of(11, "mixed", workload, events)))
    assert trace.events == events and trace.shapes == workload.shapes
    assert replay(trace).failure is None
    assert all(describe(event) for event in events)


def test_a_rid_that_a_full_queue_refuses_is_free_at_once():
    """Another request under the rid, read in the same turn, is one of its own: not refused for the rid."""
    shape = replace(Workload(1, PROFILES["calm"]).shapes[0], max_queued=1)
    prompt = pack_ids([1, 2, 3])
    sent = [Generate(rid, prompt, SamplingParams(max_new_tokens=2)) for rid in ("first", "again", "again", "again")]
    trace = Trace(1, "calm", (shape,), 0, tuple(Deliver(message, "one") for message in sent))
    assert replay(trace).failure is None


def test_runs_are_the_same_on_one_core_and_on_two():
    campaigns = [Campaign(40, num_runs=3, turns_per_run=100, num_jobs=num_jobs) for num_jobs in (1, 2)]
    results = [sorted(run_campaign(campaign), key=lambda result: result.seed) for campaign in campaigns]
    assert results[0] == results[1]


@pytest.mark.parametrize("wrong", [{"num_runs": 0}, {"turns_per_run": 0}, {"num_jobs": 0}, {"profile": "nope"}])
def test_a_campaign_that_cannot_be_is_refused_by_name(wrong):
    fields = {"first_seed": 0, "num_runs": 1, "turns_per_run": 1} | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Campaign(**fields)


def _trace_of(seed, profile, workload, events=()):
    return Trace(seed, profile, workload.shapes, workload.store_bytes, events)
