"""Rounds on scripted servers: pace, prompts, flushes and turns of two servers."""

import asyncio
import itertools
import time
from array import array
from typing import Any

import pytest
from scripted_streams import StreamScript, scripted_streams

from headwater.bench.apis import APIS, Settings, Told
from headwater.bench.arrivals import sessions_of
from headwater.bench.connection import HttpClient
from headwater.bench.conversation import PromptWriter
from headwater.bench.exchange import Exchange, Watched
from headwater.bench.flushing import Cold, cold_of, flush, parse_tiers
from headwater.bench.load import Pace, Target, play
from headwater.bench.preparing import first_model, words_per_token
from headwater.bench.statistics import figures_of
from headwater.bench.turns import Plan, Round, play_rounds, ratios
from headwater.planning.trace import PlannedRequest, PromptPiece


def target_of(script: StreamScript, api: str = "chat", name: str = "a") -> Target:
    return Target(name, HttpClient(script.url), HttpClient(script.url), APIS[api], Settings("scripted"))


def requests(count: int, **more: Any) -> list[PlannedRequest]:
    return [PlannedRequest(**{"arrival_s": 0.0, "num_output_tokens": 3, "new_tokens": 4} | more) for _ in range(count)]


def played(
    script: StreamScript, trace: list[PlannedRequest], pace: Pace, *, api: str = "chat", vocab_size: int | None = None
) -> list[Exchange]:
    async def run() -> list[Exchange]:
        target = target_of(script, api)
        writer = PromptWriter(APIS[api], vocab_size=vocab_size)
        try:
            return await play(target, sessions_of(trace), writer=writer, pace=pace, watched=Watched())
        finally:
            target.http.close()

    return asyncio.run(run())


def test_a_closed_loop_keeps_its_number_of_requests_running() -> None:
    with scripted_streams(token_s=0.005) as script:
        done = played(script, requests(12), Pace(is_open=False, num_at_once=3))
        assert script.most_at_once <= 3
        assert script.num_connections == 3, "all three began before the first had ended"
    assert len(done) == 12
    assert not any(each.error for each in done)


def test_an_open_loop_sends_at_its_times_whatever_the_server_does() -> None:
    """A slow server must not slow the load down."""
    trace = [PlannedRequest(arrival_s=0.05 * index, num_output_tokens=2, new_tokens=2) for index in range(6)]
    with scripted_streams(first_s=3.0) as script:
        done = sorted(played(script, trace, Pace(is_open=True)), key=lambda each: each.due_s)
        assert script.most_at_once == 6
    gaps = [after.due_s - before.due_s for before, after in itertools.pairwise(done)]
    assert gaps == pytest.approx([0.05] * 5, abs=1e-6)
    assert all(each.sent_s >= each.due_s for each in done)


def test_waiting_for_a_limit_of_an_open_loop_is_latency() -> None:
    with scripted_streams(first_s=0.1) as script:
        done = played(script, requests(3), Pace(is_open=True, num_at_once=1))
        assert script.most_at_once == 1
    assert max(each.ttft_s for each in done) >= 0.3


@pytest.mark.parametrize("api", APIS)
def test_turns_contain_what_was_said_before(api: str) -> None:
    trace = requests(3, session="s", pieces=())
    with scripted_streams() as script:
        played(script, trace, Pace(is_open=False, num_at_once=4), api=api)
        first, second, third = script.bodies(APIS[api].path)
        assert script.most_at_once == 1, "one after the other"
    if api == "chat":
        roles = [message["role"] for message in third["messages"]]
        assert roles == ["user", "assistant", "user", "assistant", "user"]
        assert second["messages"][:1] == first["messages"]
        assert second["messages"][1]["content"] == " a a a"
    else:
        name = "prompt" if api == "completions" else "text"
        assert second[name].startswith(first[name] + " a a a ")
        assert third[name].startswith(second[name])


def test_turns_of_ids_contain_the_ids_of_the_answers() -> None:
    with scripted_streams() as script:
        played(script, requests(2, session="s"), Pace(is_open=False), api="generate", vocab_size=500)
        first, second = script.bodies("/generate")
    assert len(first["input_ids"]) == 4
    assert second["input_ids"][:7] == [*first["input_ids"], 7, 7, 7]
    assert all(100 <= token < 500 for token in second["input_ids"][7:])


def test_a_session_ends_with_its_first_error() -> None:
    with scripted_streams(refuses=500) as script:
        assert len(played(script, requests(3, session="s"), Pace(is_open=False))) == 1


def test_shared_pieces_are_the_same_text_and_new_tokens_are_not() -> None:
    writer = PromptWriter(APIS["completions"], salt="0")
    first, second = requests(2, pieces=(PromptPiece("system", 6),))
    assert writer.shared(first) == writer.shared(second)
    assert len(writer.shared(first).split()) == 6
    assert writer.own(first, 0) != writer.own(second, 1)
    assert writer.shared(first) != writer.of(APIS["chat"], salt="1").shared(first), "another round, another text"
    longer = requests(1, pieces=(PromptPiece("system", 9),))[0]
    assert writer.shared(longer).startswith(writer.shared(first))


@pytest.mark.parametrize(
    ("api", "vocab_size", "trace", "says"),
    [
        ("chat", 500, requests(1), "prompts of token ids need --api completions or generate"),
        ("chat", None, requests(1, prompt_ids=(1, 2), new_tokens=0), "prompts of token ids need"),
        ("completions", 500, requests(2, session="s"), "turns of token ids need --api generate"),
    ],
)
def test_a_workload_that_an_api_cannot_carry_is_refused(
    api: str, vocab_size: int | None, trace: list[PlannedRequest], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        PromptWriter(APIS[api], vocab_size=vocab_size).check(trace)


@pytest.mark.parametrize(
    ("status", "text", "is_flushed", "words"),
    [
        (200, '{"success": true, "still_warm": ["storage"], "freed": {}}', True, "cold: device; still warm: storage"),
        (202, '{"success": true, "pending": ["storage"]}', True, "cold: device; still warm: storage"),
        (200, "Cache flushed.\nPlease check backend logs", True, "flushed; its answer names no tiers: Cache flushed."),
        (404, "", False, "cannot be flushed: it answers /flush_cache with 404"),
        (400, '{"success": false, "message": "2 running requests"}', False, "not flushed: 2 running requests"),
        (403, '{"error": {"message": "needs the admin key"}}', False, "not flushed: 403: needs the admin key"),
    ],
)
def test_what_was_cold_is_what_the_server_says(status: int, text: str, is_flushed: bool, words: str) -> None:
    found = cold_of(status, text, ["device", "storage"])
    assert found.is_flushed is is_flushed
    assert found.words.startswith(words)


def test_a_flush_names_the_tiers_that_a_server_has() -> None:
    async def run(script: StreamScript, tiers: tuple[str, ...]) -> Cold:
        http = HttpClient(script.url)
        try:
            return await flush(http, tiers, timeout_s=5.0)
        finally:
            http.close()

    with scripted_streams() as script:
        assert asyncio.run(run(script, ("device", "storage"))).words == "cold: device, storage"
        assert script.bodies("/flush_cache") == [{"timeout": 5.0, "tiers": ["device", "storage"]}]
        assert asyncio.run(run(script, ())).words == "not flushed, as asked"
        assert len(script.bodies("/flush_cache")) == 1
    with scripted_streams(has_tiers=False) as script:
        asyncio.run(run(script, ("device",)))
        assert script.bodies("/flush_cache") == [{"timeout": 5.0}], "SGLang has no tiers to name"
    assert parse_tiers("device, host") == ("device", "host")
    with pytest.raises(ValueError, match="'disk' is not one of"):
        parse_tiers("disk")


def test_two_servers_take_turns_with_the_same_prompts() -> None:
    """A B A B."""

    async def run(fast: StreamScript, slow: StreamScript) -> list[Any]:
        targets = [target_of(fast, name="fast"), target_of(slow, name="slow")]
        plan = Plan(
            sessions=sessions_of(requests(4)),
            pace=Pace(is_open=False, num_at_once=2),
            num_rounds=2,
            flush_tiers=("device",),
            flush_timeout_s=1.0,
        )
        writer = PromptWriter(APIS["chat"])
        try:
            return await play_rounds(
                targets,
                plan,
                lambda target, number: writer.of(target.api, salt=str(number)),
                on_start=lambda target, number, watched: None,
                on_end=lambda each: None,
            )
        finally:
            for target in targets:
                target.http.close()
                target.control.close()

    with scripted_streams() as fast, scripted_streams() as slow:
        rounds = asyncio.run(run(fast, slow))
        assert [each.server for each in rounds] == ["fast", "slow", "fast", "slow"]
        sent = [sorted(str(body) for body in each.bodies("/v1/chat/completions")) for each in (fast, slow)]
        assert sent[0] == sent[1]
        assert len(set(sent[0])) == 8, "the rounds differ"
        assert len(fast.bodies("/flush_cache")) == 2
    assert all(each.cold.words == "cold: device" for each in rounds)


def test_a_ratio_above_1_means_that_the_first_server_is_better() -> None:
    """Whether more or less is better of a figure; compared round by round, as neighbours saw the same machine."""

    def round_of(server: str, number: int, second_s: float) -> Round:
        gaps = array("d", [0.1 * second_s] * 4)
        told = Told(num_prompt_tokens=10, num_output_tokens=5)
        at_s = 0.5 * second_s
        ended_s = at_s + sum(gaps)
        done = Exchange(0.0, 0.0, ended_s, first_s=at_s, last_s=ended_s, gaps_s=gaps, num_events=5, told=told)
        return Round(number, server, Cold(True, ""), [done], figures_of([done]), 0.0, None)

    rounds = [round_of("fast", 0, 1), round_of("slow", 0, 2), round_of("fast", 1, 10), round_of("slow", 1, 30)]
    found = {each.name: each for each in ratios(rounds)}
    for name in ("output tokens/s", "requests/s", "TTFT p50", "ITL p99", "end to end p50"):
        assert (found[name].least, found[name].most) == pytest.approx((2.0, 3.0)), name
    assert ratios(rounds[::2]) == []


def test_the_model_and_the_length_of_words_come_from_the_server() -> None:
    async def run(script: StreamScript) -> tuple[str, float]:
        target = target_of(script)
        try:
            return await first_model(target.http), await words_per_token(target)
        finally:
            target.http.close()

    with scripted_streams() as script:
        model, words = asyncio.run(run(script))
    assert model == "scripted"
    assert words == pytest.approx(1.0), "the script counts words"


def test_time_passes() -> None:
    """`due_s` of a closed loop is the moment of sending."""
    before_s = time.perf_counter()
    with scripted_streams() as script:
        (done,) = played(script, requests(1), Pace(is_open=False))
    assert before_s < done.due_s <= done.sent_s
