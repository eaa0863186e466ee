"""Fleets: times are those of the cost model, hits are those of the real cache, requests go where the API sends them."""

from dataclasses import replace

import pytest

from headwater.client.engine_choice import MAX_EXTRA_REQUESTS
from headwater.planning.comparison import FleetSizes, all_sizes, label_each
from headwater.planning.cost_model import CostModel
from headwater.planning.fleet import PlannedFleet
from headwater.planning.fleet_result import percentile
from headwater.planning.hardware import HARDWARE
from headwater.planning.model_shape import MODELS
from headwater.planning.planned_engine import EnginePlan
from headwater.planning.synthetic import SyntheticWorkload
from headwater.planning.trace import PlannedRequest, PromptPiece

LLAMA = EnginePlan(model=MODELS["llama-3.1-8b"], hardware=HARDWARE["h100"], device_bytes=20e9)
SMOL = EnginePlan(
    model=MODELS["smollm2-135m"], hardware=HARDWARE["cpu"], device_bytes=1e9, max_running=64, prefill_chunk_tokens=512
)


def request(arrival_s=0.0, new=1000, out=10, **fields):
    return PlannedRequest(arrival_s=arrival_s, num_output_tokens=out, new_tokens=new, **fields)


def play(plan, *requests, num_engines=1):
    return PlannedFleet(plan, num_engines=num_engines).play(requests)


@pytest.mark.parametrize("plan", [LLAMA, SMOL], ids=["asynchronous", "synchronous"])
def test_one_request_alone_takes_what_its_steps_cost(plan):
    (alone,) = play(plan, request(1.0, new=500, out=3)).requests
    costs = CostModel(plan.model, plan.hardware)
    scores = 500 * 501 / 2
    prefill_s = costs.seconds(num_tokens=500, num_rows=1, num_samples=1, num_read=500, num_scores=scores)
    decode_s = sum(
        costs.seconds(num_tokens=1, num_rows=1, num_samples=1, num_read=length, num_scores=length)
        for length in (501, 502)
    )
    assert alone.sent_s == 1.0
    assert alone.ttft_s == pytest.approx(prefill_s)
    assert alone.ended_s - alone.first_token_s == pytest.approx(decode_s)
    assert (alone.num_prompt_tokens, alone.num_output_tokens) == (500, 3)


def test_a_conversation_finds_all_turns_before_it_and_waits_for_their_answers():
    first, second = play(
        LLAMA, request(session="s", new=1000, out=100), request(session="s", new=50, think_s=5.0)
    ).requests
    assert second.sent_s == pytest.approx(first.ended_s + 5.0)
    assert second.num_prompt_tokens == 1150
    assert second.cached["device"] == 1088  # whole pages of 1,099: the KV of the last token was never computed


def test_a_hit_ends_inside_a_page_as_in_a_real_engine():
    """1,000 tokens are shared: 62 whole pages, and 8 tokens of a page of the first request."""
    shared = PromptPiece("p", 1000)
    first, second = play(
        LLAMA, request(0.0, new=100, out=1, pieces=(shared,)), request(9.0, new=100, out=1, pieces=(shared,))
    ).requests
    assert (first.cached["device"], second.cached["device"]) == (0, 1000)


def test_a_long_prompt_leaves_a_stream_its_tokens():
    """On the planned CPU, a chunk of 512 takes half a second and more."""
    stream, prompt = request(0.0, new=16, out=60), request(0.1, new=2000, out=1)
    whole, paced = (play(replace(SMOL, max_gap_s=gap), stream, prompt).requests for gap in (None, 0.1))
    assert paced[0].itl_s < whole[0].itl_s
    assert paced[1].ttft_s < 1.5 * whole[1].ttft_s


def test_what_does_not_fit_the_device_is_found_on_the_host_and_then_in_the_store():
    rounds = [request(10.0 * place, new=1, out=1, pieces=(PromptPiece(f"p{place % 6}", 2000),)) for place in range(24)]
    small = replace(LLAMA, device_bytes=5000 * 131072.0)
    nothing = play(small, *rounds)
    assert nothing.hit_rate("device") == nothing.hit_rate("host") == 0
    host = play(replace(small, host_bytes=20_000 * 131072.0), *rounds)
    assert host.hit_rate("host") == pytest.approx(18 / 24, abs=0.02)
    stored = play(replace(small, host_bytes=5000 * 131072.0, storage_bytes=1e12), *rounds)
    assert stored.hit_rate("storage") == pytest.approx(18 / 24, abs=0.02)
    num_bytes, hardware = 2000 * 131072, small.hardware
    restored_s = num_bytes / hardware.host_bytes_per_s
    assert host.requests[-1].ttft_s == pytest.approx(restored_s + 0.007, abs=0.003)  # and a step that reads weights
    read_s = num_bytes / hardware.storage_bytes_per_s
    assert stored.requests[-1].ttft_s == pytest.approx(read_s + restored_s + 0.01, abs=0.006)
    assert nothing.requests[-1].ttft_s == pytest.approx(0.0485, rel=0.02)
    assert stored.moved_pages["prefetch"] > 0 and host.moved_pages["restore"] > 0


def test_a_store_is_shared_by_the_engines():
    """The second engine has never seen the prefix: it comes out of the store that the first one filled."""
    plan = replace(LLAMA, host_bytes=5e9, storage_bytes=1e12)
    prefix = (PromptPiece("shared", 2000),)
    busy = [request(5.0 + place / 1000, new=10, out=2000, pieces=prefix) for place in range(MAX_EXTRA_REQUESTS + 2)]
    result = play(plan, request(0.0, pieces=prefix, out=1), *busy, num_engines=2)
    other = [each for each in result.requests if each.engine != result.requests[0].engine]
    assert other and other[0].cached["storage"] >= 1984


def test_requests_go_to_the_engine_that_knows_their_beginning_unless_it_has_more_to_do():
    alternating = [request(5.0 * place, pieces=(PromptPiece(f"p{place % 2}", 1000),)) for place in range(10)]
    engines = [each.engine for each in play(LLAMA, *alternating, num_engines=2).requests]
    assert engines == [engines[0]] * 10  # an idle engine that knows nothing is no better
    burst = [request(0.001 * place, out=500, pieces=(PromptPiece("p", 1000),)) for place in range(40)]
    engines = [each.engine for each in play(LLAMA, *burst, num_engines=2).requests]
    assert abs(engines.count(0) - engines.count(1)) <= MAX_EXTRA_REQUESTS + 1


def test_nothing_happens_before_its_time_and_nothing_is_lost():
    workload = SyntheticWorkload(num_requests=90, requests_per_s=20.0, prefix_tokens=500, output_tokens=40, seed=5)
    trace = workload.requests()
    result = play(replace(LLAMA, host_bytes=10e9), *trace, num_engines=3)
    for planned, served in zip(trace, result.requests, strict=True):
        assert planned.arrival_s <= served.sent_s < served.first_token_s <= served.ended_s
        assert served.num_output_tokens == planned.num_output_tokens
    assert {served.engine for served in result.requests} == {0, 1, 2}
    again = play(replace(LLAMA, host_bytes=10e9), *trace, num_engines=3)
    assert again == result  # a plan repeats exactly


def test_a_prompt_that_is_too_long_is_refused_and_its_session_goes_on():
    result = play(LLAMA, request(new=200_000, session="s"), request(new=10, session="s2"))
    assert result.num_refused == 1 and len(result.served) == 1
    assert result.summary()["num_requests"] == 1


def test_twice_the_engines_take_less_time_under_load():
    trace = SyntheticWorkload(num_requests=100, requests_per_s=60.0, turns_per_session=1, seed=1).requests()
    one, two = (play(LLAMA, *trace, num_engines=count) for count in (1, 2))
    assert two.duration_s < one.duration_s
    assert percentile(two.ttft_s, 50) <= percentile(one.ttft_s, 50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_size": 0}, "page_size"),
        ({"max_running": 0}, "max_running"),
        ({"host_bytes": -1.0}, "host_bytes"),
        ({"storage_bytes": 1e9}, "storage needs a host tier"),
        ({"device_bytes": 1e6}, "at least 2 are needed"),
        ({"model": MODELS["qwen3-32b"], "hardware": HARDWARE["cpu"], "device_bytes": None}, "room for 0 pages"),
    ],
)
def test_engines_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(LLAMA, **change)


def test_fleets_are_named_by_what_sets_them_apart():
    sizes = all_sizes([2], [None], [0.0, 10.0], [0.0, 50.0])
    assert label_each(sizes) == ["no host, no store", "host 10 GB, no store", "host 10 GB, store 50 GB"]
    assert label_each([FleetSizes(1, None, 0.0, 0.0)]) == ["1 engine"]
    assert label_each(all_sizes([1], [None], [0.0], [0.0], [1, 2])) == ["TP 1", "TP 2"]
    with pytest.raises(ValueError, match="needs host memory"):
        all_sizes([1], [None], [0.0], [5.0])


def test_percentiles_are_values_that_occurred():
    assert [percentile([1.0, 2.0, 3.0, 4.0], percent) for percent in (0, 50, 75, 99, 100)] == [1, 2, 3, 4, 4]
    assert percentile([], 50) == 0
