"""Every row of the flush contract (docs/design.md, section 6), through HTTP against the real engine loop."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_under_test import TOKENIZER, Api, api, error_of, served, until
from loop_engines import PAGE_SIZE, LoopEngine, expected, loop_engines, prompt_of

from headwater.http_api.state import FlushDefaults
from processes import Stalls

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("patience")]
JSON = {"accept": "application/json"}
NUM_LONG = 300  # tokens: six seconds and more of slow steps
LATE_S = 1.0  # what a loaded machine may add to a deadline; the engine itself is late by a step and 5 ms


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LoopEngine]:
    with loop_engines(tmp_path) as (engine,):
        yield engine


async def generate(server: Api, prompt: list[int], num_tokens: int = 4, **more: Any) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": num_tokens}
    response = await server.post("/generate", {"input_ids": prompt, "sampling_params": sampling} | more)
    assert response.status_code == 200, response.text
    return response.json()


async def cached(server: Api, prompt: list[int], **more: Any) -> int:
    """Prompt tokens that a request with this prompt finds in the cache; also checks its text."""
    answer = await generate(server, prompt, **more)
    return answer["meta_info"]["cached_tokens"]


async def flush(server: Api, status: int = 200, **parameters: Any) -> dict[str, Any]:
    response = await server.http.post("/flush_cache", json=parameters, headers=JSON)
    assert response.status_code == status, response.text
    return response.json()


def start_long(
    server: Api, name: int = 1, *, num_tokens: int = NUM_LONG, **more: Any
) -> "asyncio.Future[dict[str, Any]]":
    """A request that runs for as long as its engine's steps are slow."""
    return asyncio.ensure_future(generate(server, prompt_of(name), num_tokens=num_tokens, **more))


async def busy(
    server: Api, engine: LoopEngine, count: int = 1, *, num_tokens: int = NUM_LONG
) -> list["asyncio.Future[dict[str, Any]]"]:
    """Requests that have started and keep the engine from being idle until `engine.step_s = 0`."""
    engine.step_s = 0.02
    running = [start_long(server, name, num_tokens=num_tokens) for name in range(1, count + 1)]
    await until(lambda: len(engine.parts.scheduler.running) == count)
    return running


# --- idle ------------------------------------------------------------------------------------------------


async def test_an_idle_engine_flushes_at_once_and_says_what_it_freed(engine: LoopEngine) -> None:
    async with api(engine) as server:
        await generate(server, prompt_of(1))
        assert await cached(server, prompt_of(1)) == 36
        with Stalls() as stalls:
            answer = await flush(server)
        assert (answer["success"], answer["message"], answer["mode"]) == (True, "Cache flushed.", "idle")
        assert answer["freed"]["device"]["pages"] >= 10
        assert answer["freed"]["device"]["bytes"] == answer["freed"]["device"]["pages"] * engine.parts.cache.page_bytes
        assert answer["retired"] == {"device": {"pages": 0, "bytes": 0}}
        assert (answer["generation"], answer["still_warm"], answer["blockers"]) == (1, [], {})
        assert answer["waited_s"] < LATE_S + stalls.lost_s
        (one,) = answer["engines"]
        assert (one["dp_rank"], one["success"], one["freed"]) == (0, True, answer["freed"])
        assert await cached(server, prompt_of(1)) == 0


async def test_a_flush_right_after_the_last_answer_is_never_refused(engine: LoopEngine) -> None:
    """Without a timeout, twice in a row, many times: nothing that the client cannot see may be in the way."""
    async with api(engine) as server:
        for name in range(60):
            await generate(server, prompt_of(name), num_tokens=2)
            for _ in range(2):
                response = await server.http.get("/flush_cache")
                assert (response.status_code, response.text[:14]) == (200, "Cache flushed.")


async def test_busy_without_timeout_is_refused_at_once_with_blockers_and_nothing_is_flushed(engine) -> None:
    async with api(engine) as server:
        await generate(server, prompt_of(9))
        running = await busy(server, engine, 2)
        answer = await flush(server, 400)
        assert (answer["success"], answer["message"]) == (False, "Flush cache failed.")
        assert answer["blockers"] == {"running": 2}
        assert "freed" not in answer
        text = (await server.http.get("/flush_cache")).text
        assert "Not idle: 2 running requests." in text
        engine.step_s = 0.0
        await asyncio.gather(*running)
        assert await cached(server, prompt_of(9)) == 36, "a refused flush flushes nothing"


async def test_busy_then_idle_answers_at_the_idle_moment(engine: LoopEngine) -> None:
    async with api(engine) as server:
        running = await busy(server, engine)
        pending = asyncio.ensure_future(flush(server, timeout=30))
        await until(lambda: engine.parts.control.num_pending)
        assert not pending.done()
        engine.step_s = 0.0
        answer = await asyncio.wait_for(pending, 20)
        assert 0 < answer["waited_s"] < 20
        assert running[0].done() or (await running[0])["output_ids"]
        assert await cached(server, prompt_of(1)) == 0


async def test_a_flush_without_parameters_means_what_the_operator_has_set(engine: LoopEngine) -> None:
    """As routers send it: neither refused at once nor without an end. What a client sends goes before it."""
    async with api(engine, flush_defaults=FlushDefaults(timeout_s=30.0)) as server:
        running = await busy(server, engine)
        pending = asyncio.ensure_future(server.http.post("/flush_cache", headers=JSON))
        assert (await flush(server, 400, timeout=0))["blockers"] and not pending.done()
        engine.step_s = 0.0
        assert (await pending).json()["success"]
        await asyncio.gather(*running)
    async with api(engine, flush_defaults=FlushDefaults(mode="now")) as server:
        running = await busy(server, engine)
        answer = (await server.http.post("/flush_cache", headers=JSON)).json()
        assert answer["success"] and answer["mode"] == "now"
        await flush(server, 400, mode="idle")
        engine.step_s = 0.0
        await asyncio.gather(*running)


@pytest.mark.parametrize("timeout", [1e-9, 0.001, 0.3])
async def test_a_deadline_that_passes_is_a_400_with_blockers_in_time(engine: LoopEngine, timeout: float) -> None:
    async with api(engine) as server:
        running = await busy(server, engine)
        started_s = time.monotonic()
        with Stalls() as stalls:
            answer = await flush(server, 400, timeout=timeout)
            took_s = time.monotonic() - started_s
        assert timeout <= took_s < timeout + LATE_S + stalls.lost_s
        assert answer["message"] == "Timed out waiting for idle state."
        assert answer["blockers"] == {"running": 1}
        assert timeout - 0.1 <= answer["waited_s"] <= timeout + 0.1 + stalls.lost_s
        running[0].cancel()


async def test_the_deadline_wakes_a_loop_that_sleeps(engine: LoopEngine) -> None:
    """Frozen requests keep it from being idle, no step and no message comes: only the deadline can wake it."""
    async with api(engine) as server:
        await busy(server, engine)
        await server.post("/pause_generation", {"mode": "in_place"})
        started_s = time.monotonic()
        with Stalls() as stalls:
            answer = await flush(server, 400, timeout=0.2)
            took_s = time.monotonic() - started_s
        assert 0.2 <= took_s < 0.2 + LATE_S + stalls.lost_s
        assert answer["blockers"] == {"running": 1}
        await server.post("/continue_generation")
        engine.step_s = 0.0


async def test_several_flushes_wait_with_deadlines_of_their_own(engine: LoopEngine) -> None:
    """The short one expires, the long ones survive it; one idle moment answers all that are left."""
    async with api(engine) as server:
        running = await busy(server, engine)
        short = asyncio.ensure_future(flush(server, 400, timeout=0.2))
        long = [asyncio.ensure_future(flush(server, timeout=timeout)) for timeout in (20, 10, 30)]
        await until(lambda: engine.parts.control.num_pending == 4)
        expired = await short
        assert expired["message"] == "Timed out waiting for idle state."
        assert not any(pending.done() for pending in long)
        engine.step_s = 0.0
        answers = await asyncio.gather(*long)
        assert {answer["generation"] for answer in answers} == {1}, "an empty scope is no new retirement"
        await asyncio.gather(*running)


async def test_pending_flushes_are_listed_with_what_blocks_them_and_can_be_cancelled(engine: LoopEngine) -> None:
    async with api(engine) as server:
        await busy(server, engine)
        pending = [asyncio.ensure_future(flush(server, 400, timeout=t)) for t in (20, 30)]
        await until(lambda: engine.parts.control.num_pending == 2)
        operations = (await server.http.get("/control/operations")).json()["operations"]
        assert [op["kind"] for op in operations] == ["flush_cache"] * 2
        assert all(op["phase"] == "waiting_for_idle" and op["blockers"] == {"running": 1} for op in operations)
        remaining = sorted(op["waited_s"] + op["remaining_s"] for op in operations)
        assert remaining == pytest.approx([20, 30], abs=0.5)
        (first,) = [op for op in operations if op["remaining_s"] < 21]
        assert (await server.http.delete(f"/control/operations/{first['operation_id']}")).status_code == 200
        answer = await pending[0]
        assert (answer["success"], answer["message"]) == (
            False,
            "cancelled before the engine was idle; nothing was flushed.",
        )
        assert not pending[1].done(), "only the one that was named"
        response = await server.http.delete(f"/control/operations/{first['operation_id']}")
        assert response.status_code == 404
        engine.step_s = 0.0
        pending[1].cancel()


async def test_hold_makes_new_requests_wait_and_refuses_none(engine: LoopEngine) -> None:
    async with api(engine) as server:
        running = await busy(server, engine)
        pending = asyncio.ensure_future(flush(server, timeout=30, hold=True))
        await until(lambda: engine.parts.control.num_pending)
        late = start_long(server, 5)
        await until(lambda: len(engine.parts.scheduler.waiting) == 1)
        engine.step_s = 0.0
        assert (await pending)["success"]
        answers = [await task for task in (*running, late)]
        assert answers[0]["output_ids"] == expected(prompt_of(1), NUM_LONG)
        assert answers[1]["output_ids"] == expected(prompt_of(5), NUM_LONG)


async def test_hold_ends_with_its_deadline(engine: LoopEngine) -> None:
    """A hold that stayed would keep requests queued for ever."""
    async with api(engine) as server:
        running = await busy(server, engine)
        pending = asyncio.ensure_future(flush(server, 400, timeout=0.3, hold=True))
        await until(lambda: engine.parts.control.num_pending)
        late = start_long(server, 5)
        await pending
        await until(lambda: len(engine.parts.scheduler.running) == 2)
        engine.step_s = 0.0
        await asyncio.gather(*running, late)


# --- pause -----------------------------------------------------------------------------------------------


async def test_a_paused_backlog_is_no_blocker(engine: LoopEngine) -> None:
    """Queued requests hold nothing: with and without a timeout the flush succeeds at once."""
    async with api(engine) as server:
        await server.post("/pause_generation", {"mode": "retract"})
        held = [start_long(server, name) for name in (1, 2, 3)]
        await until(lambda: len(engine.parts.scheduler.waiting) == 3)
        for timeout in (0, 30):
            started_s = time.monotonic()
            with Stalls() as stalls:
                assert (await flush(server, timeout=timeout))["success"]
                took_s = time.monotonic() - started_s
            assert took_s < LATE_S + stalls.lost_s
        await server.post("/continue_generation")
        answers = await asyncio.gather(*held)
        assert [a["output_ids"] for a in answers] == [expected(prompt_of(name), NUM_LONG) for name in (1, 2, 3)]


@pytest.mark.parametrize(("mode", "status"), [("abort", 200), ("retract", 200), ("in_place", 400)])
async def test_pause_while_a_flush_is_pending(engine: LoopEngine, mode: str, status: int) -> None:
    """Pausing takes running requests away, or freezes them: then only the deadline ends the flush."""
    async with api(engine) as server:
        running = await busy(server, engine, 2)
        with Stalls() as stalls:
            asked_s = time.monotonic()
            pending = asyncio.ensure_future(flush(server, status, timeout=20 if status == 200 else 2))
            await until(lambda: engine.parts.control.num_pending)
            response = await server.post("/pause_generation", {"mode": mode})
            assert response.json()["num_requests"] == 2
            answer = await asyncio.wait_for(pending, 20)
        assert answer["success"] == (status == 200)
        if status == 200:
            assert answer["waited_s"] < LATE_S + stalls.lost_s, "a loop must not sleep through an idle moment"
        else:
            assert time.monotonic() - asked_s >= 2  # `waited_s` is less, by the way to the engine
        engine.step_s = 0.0
        await server.post("/continue_generation", {})
        ends = [(await task)["meta_info"]["finish_reason"]["type"] for task in running]
        assert ends == ["abort" if mode == "abort" else "length"] * 2


# --- now and drain ---------------------------------------------------------------------------------------


async def test_now_retires_under_load_and_requests_run_on(engine: LoopEngine) -> None:
    async with api(engine) as server:
        await generate(server, prompt_of(9))
        running = await busy(server, engine, 2)
        with Stalls() as stalls:
            answer = await flush(server, mode="now")
        assert answer["waited_s"] < 0.2 + stalls.lost_s
        assert answer["freed"]["device"]["pages"] >= 10, "what nobody uses comes back at once"
        assert answer["retired"]["device"]["pages"] > 0, "what running requests use comes back with them"
        assert answer["drained"] is False
        assert await cached(server, prompt_of(9)) == 0
        assert await cached(server, prompt_of(1)) == 0, "also what a running request holds cannot be matched"
        engine.step_s = 0.0
        for name, task in enumerate(running, start=1):
            assert (await task)["output_ids"] == expected(prompt_of(name), NUM_LONG), "no flush changes a text"


async def test_drain_answers_when_the_last_old_page_is_back(engine: LoopEngine) -> None:
    async with api(engine) as server:
        running = await busy(server, engine, num_tokens=100)
        pending = asyncio.ensure_future(flush(server, timeout=30, mode="drain"))
        await until(lambda: engine.parts.control.num_pending)
        new = start_long(server, 5)  # steady load: drain must not wait for those that came later
        await until(lambda: len(engine.parts.scheduler.running) == 2)
        assert not pending.done()
        await asyncio.wait_for(running[0], 20)
        answer = await asyncio.wait_for(pending, 20)
        assert not new.done()
        assert (answer["drained"], answer["mode"]) == (True, "drain")
        engine.step_s = 0.0
        await new


async def test_drain_past_its_deadline_is_a_202_that_has_flushed(engine: LoopEngine) -> None:
    async with api(engine) as server:
        await generate(server, prompt_of(9))
        running = await busy(server, engine)
        answer = await flush(server, 202, timeout=0.1, mode="drain")
        assert (answer["success"], answer["drained"], answer["pending"]) == (True, False, [])
        assert answer["retired"]["device"]["pages"] > 0
        text = await server.http.get("/flush_cache?mode=drain")
        assert text.status_code in (200, 202)
        assert text.text.count("Cache flushed.") == 1
        assert text.status_code == 200 or "Held by: 1 request that still holds old pages" in text.text
        assert await cached(server, prompt_of(9)) == 0
        engine.step_s = 0.0
        await running[0]


# --- scope -----------------------------------------------------------------------------------------------


async def test_salt_and_key_flush_their_namespace_alone(engine: LoopEngine) -> None:
    scopes = [{}, {"cache_salt": "a"}, {"cache_salt": "b"}, {"cache_salt": "a", "extra_key": "k"}]
    async with api(engine) as server:
        for scope in scopes:
            await generate(server, prompt_of(1), **scope)
        await flush(server, cache_salt="a")
        assert [await cached(server, prompt_of(1), **scope) for scope in scopes] == [36, 0, 36, 0]
        await flush(server, extra_key="k")
        assert [await cached(server, prompt_of(1), **scope) for scope in scopes] == [36, 36, 36, 0]
        await flush(server, cache_salt="")
        assert [await cached(server, prompt_of(1), **scope) for scope in scopes] == [0, 36, 36, 36]


async def test_an_adapter_is_flushed_warmed_pinned_and_shown_alone(engine: LoopEngine) -> None:
    scopes = [{}, {"lora_path": "one"}, {"lora_path": "two"}]
    async with api(engine) as server:
        for name in ("one", "two"):
            body = {"lora_name": name, "lora_path": f"content of {name}"}
            assert (await server.post("/v1/load_lora_adapter", body)).status_code == 200
        for scope in scopes:
            await server.post("/cache/warm", {"input_ids": prompt_of(1)} | scope)
        assert [await cached(server, prompt_of(1), **scope) for scope in scopes] == [36, 36, 36]
        await flush(server, lora_path="one")
        assert [await cached(server, prompt_of(1), **scope) for scope in scopes] == [36, 0, 36]
        await flush(server, lora_path="")
        assert [await cached(server, prompt_of(1), **scope) for scope in scopes] == [0, 36, 36]
        pinned = await server.post("/cache/pin", {"input_ids": prompt_of(1), "lora_path": "two"})
        assert pinned.json()["pins"][0]["adapter_id"] == "content of two"
        tree = (await server.http.get("/cache/tree?lora_path=two")).json()["engines"][0]
        assert [root["adapter_id"] for root in tree["roots"]] == ["content of two"]
        for answer in (
            await server.http.post("/flush_cache", json={"lora_path": "three"}, headers=JSON),
            await server.post("/cache/warm", {"input_ids": prompt_of(1), "lora_path": "three"}),
            await server.post("/cache/pin", {"input_ids": prompt_of(1), "lora_path": "three"}),
            await server.http.get("/cache/tree?lora_path=three"),
        ):
            assert (answer.status_code, error_of(answer)["param"]) == (404, "lora_path"), answer.text


async def test_a_prefix_is_retired_from_the_page_of_its_last_token_on(engine: LoopEngine) -> None:
    first, other = prompt_of(1), prompt_of(1)[:20] + prompt_of(2, 20)
    async with api(engine) as server:
        for prompt in (first, other):
            await generate(server, prompt)
        await flush(server, prefix_ids=first[:22])  # its last token lies in page 5, tokens 20 to 23
        assert await cached(server, first) == 20, "pages above the prefix are shared and stay"
        assert await cached(server, other) == 36, "another branch stays"
        await flush(server, prefix_ids=first[:10])
        assert await cached(server, other) == 8


@pytest.mark.parametrize("name", ["lora_name", "adapter_id"])
async def test_another_name_for_an_adapter_is_not_ignored(engine: LoopEngine, name: str) -> None:
    """An ignored scope would flush everything."""
    async with api(engine) as server:
        answer = await server.http.post("/flush_cache", json={name: "one"}, headers=JSON)
        assert (answer.status_code, error_of(answer)["param"]) == (400, name)
        wide = {"lora_path": "one", "tiers": ["device", "storage"]}
        answer = await server.http.post("/flush_cache", json=wide, headers=JSON)
        assert (answer.status_code, error_of(answer)["param"]) == (400, "lora_path")


async def test_a_prefix_of_text_loses_its_last_token(engine: LoopEngine) -> None:
    """Followed by more text, the last token may be another one: the page before it is the last sure one."""
    text = "abcdefghijklmnopqrstuvwxyz"
    ids = TOKENIZER.encode(text)
    async with api(engine) as server:
        await generate(server, ids)
        await flush(server, prefix=text[:13])  # 12 sure tokens: pages 0 to 2 hold them
        assert await cached(server, ids) == 2 * PAGE_SIZE
        await flush(server, prefix=text[:14])  # 13 sure tokens: the last lies in page 3
        assert await cached(server, ids) == 3 * PAGE_SIZE


async def test_requests_outside_a_prefix_go_on_publishing(engine: LoopEngine) -> None:
    async with api(engine) as server:
        running = await busy(server, engine, 2)
        await flush(server, mode="now", prefix_ids=prompt_of(1)[:8])
        engine.step_s = 0.0
        outputs = [(await task)["output_ids"] for task in running]
        whole = prompt_of(2) + outputs[1]
        assert await cached(server, whole) >= len(whole) - 2 * PAGE_SIZE, "outside the scope"
        assert await cached(server, prompt_of(1)) == PAGE_SIZE, "inside: up to the page of the prefix's last token"


async def test_dry_run_changes_nothing_and_tells_what_the_real_one_frees(engine: LoopEngine) -> None:
    async with api(engine) as server:
        await generate(server, prompt_of(1))
        await generate(server, prompt_of(2), cache_salt="a")
        running = await busy(server, engine)
        for scope in ({"mode": "now"}, {"cache_salt": "a", "mode": "now"}):
            preview = await flush(server, dry_run=True, **scope)
            assert (preview["dry_run"], preview["blockers"]) == (True, {"running": 1})
            assert preview["message"] == "Dry run: nothing was changed."
        text = (await server.http.get("/flush_cache?dry_run=true&mode=now")).text
        assert text.startswith("Dry run: nothing was changed. Would free on device:")
        engine.step_s = 0.0
        await running[0]
        assert await cached(server, prompt_of(2), cache_salt="a") == 36
        preview = await flush(server, dry_run=True)
        done = await flush(server)
        assert preview["freed"] == done["freed"]
        assert preview["freed"]["device"]["pages"] > 20


async def test_tiers_that_do_not_exist_are_refused_and_the_default_takes_what_there_is(engine: LoopEngine) -> None:
    async with api(engine) as server:
        for tiers in ("host", "storage", "device,storage"):
            response = await server.http.post("/flush_cache", json={"tiers": tiers})
            assert (response.status_code, error_of(response)["param"]) == (400, "tiers"), tiers
            assert "enabled: device" in error_of(response)["message"]
        assert (await flush(server, tiers="device"))["success"]
        response = await server.http.post("/flush_cache", json={"tiers": ["storage"], "prefix_ids": [1, 2]})
        assert response.status_code == 400


# --- parameters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", ["0", "1e-9", "3600", "0.0", "  5 "])
async def test_timeouts_in_range_are_taken(engine: LoopEngine, timeout: str) -> None:
    async with api(engine) as server:
        for response in (
            await server.http.get("/flush_cache", params={"timeout": timeout}),
            await server.http.post("/flush_cache", json={"timeout": float(timeout)}),
        ):
            assert response.status_code == 200, response.text


@pytest.mark.parametrize("timeout", ["3601", "-1", "-0.0001", "NaN", "nan", "inf", "-inf", "abc", "", "1s", "1 2"])
async def test_timeouts_out_of_range_name_the_parameter_and_the_range(engine: LoopEngine, timeout: str) -> None:
    async with api(engine) as server:
        await generate(server, prompt_of(1))
        for response in (
            await server.http.get("/flush_cache", params={"timeout": timeout}),
            await server.http.post("/flush_cache", json={"timeout": timeout}),
        ):
            error = error_of(response)
            assert (response.status_code, error["param"]) == (400, "timeout")
            assert "from 0 to 3600" in error["message"]
        assert await cached(server, prompt_of(1)) == 36, "nothing was flushed"


@pytest.mark.parametrize("name", ["timeout", "mode", "cache_salt", "prefix_ids", "hold", "dry_run", "tiers"])
async def test_a_parameter_given_twice_is_refused(engine: LoopEngine, name: str) -> None:
    """Whichever value won, it would surprise one of the two who wrote them."""
    value = {"timeout": "1", "mode": "now", "prefix_ids": "5,6", "tiers": "device"}.get(name, "true")
    async with api(engine) as server:
        for response in (
            await server.http.get(f"/flush_cache?{name}={value}&{name}={value}"),
            await server.http.post(f"/flush_cache?{name}={value}", json={name: value}),
        ):
            assert (response.status_code, error_of(response)["param"]) == (400, name)


@pytest.mark.parametrize("name", ["cach_salt", "cache_sal", "extrakey", "prefx", "prefix_id", "timeot", "dryrun"])
async def test_a_misspelt_parameter_is_refused_and_flushes_nothing(engine: LoopEngine, name: str) -> None:
    """A flush whose scope is not read would flush every tenant."""
    async with api(engine) as server:
        await generate(server, list(range(60, 100)))
        for response in (
            await server.http.get(f"/flush_cache?{name}=1"),
            await server.http.post("/flush_cache", json={name: 1}),
        ):
            assert (response.status_code, error_of(response)["param"]) == (400, name)
            assert "did you mean" in error_of(response)["message"]
        assert (await generate(server, list(range(60, 100))))["meta_info"]["cached_tokens"] > 0
        assert (await server.http.post("/flush_cache?trace=1", json={"caller": "me"})).status_code == 200


async def test_keys(engine: LoopEngine) -> None:
    async with api(engine, api_key="user", admin_api_key="admin") as server:
        for key, status in ((None, 401), ("wrong", 401), ("user", 403), ("admin", 200)):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            assert (await server.http.post("/flush_cache", headers=headers)).status_code == status
    async with api(engine, api_key="user") as server:
        for key, status in ((None, 401), ("user", 200)):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            assert (await server.http.get("/flush_cache", headers=headers)).status_code == status


# --- callers and engines that go -------------------------------------------------------------------------


async def test_many_callers_at_once_all_get_their_own_answer(engine: LoopEngine) -> None:
    async with api(engine) as server:
        running = await busy(server, engine)
        calls = [asyncio.ensure_future(flush(server, timeout=20 + n)) for n in range(20)]
        calls += [asyncio.ensure_future(flush(server, mode="now")) for _ in range(20)]
        await asyncio.sleep(0.05)
        engine.step_s = 0.0
        answers = await asyncio.gather(*calls)
        assert len(answers) == 40
        await asyncio.gather(*running)
        assert engine.parts.control.num_pending == 0


def test_a_caller_who_leaves_cancels_its_flush_and_no_other(engine: LoopEngine) -> None:
    """With `hold` a forgotten flush would keep everybody waiting until its deadline."""
    with served(engine) as (url, _), httpx.Client(base_url=url, timeout=20) as http:
        engine.step_s = 0.02
        body = {"input_ids": prompt_of(1), "sampling_params": {"max_new_tokens": 300}, "stream": True}
        with http.stream("POST", "/generate", json=body) as stream:
            lines = stream.iter_lines()  # kept: closing it would end the request
            next(lines)
            for timeout in (30, 40):
                with pytest.raises(httpx.ReadTimeout):
                    http.post(f"/flush_cache?timeout={timeout}&hold=true", timeout=0.3)
            deadline_s = time.monotonic() + 20
            while engine.parts.control.num_pending:
                assert time.monotonic() < deadline_s, "the flushes of callers who left are still pending"
                time.sleep(0.01)
            assert http.get("/control/operations").json() == {"operations": []}
        engine.step_s = 0.0


async def test_an_engine_that_goes_while_a_flush_is_pending_is_a_503_that_says_which_and_since_when(engine) -> None:
    async with api(engine) as server:
        running = await busy(server, engine)
        pending = asyncio.ensure_future(server.http.get("/flush_cache?timeout=60"))
        await until(lambda: engine.parts.control.num_pending)
        server.state.client.engine_gone(0, "the engine process was killed by SIGKILL")
        response = await asyncio.wait_for(pending, 20)
        error = error_of(response)
        assert (response.status_code, error["code"], error["engine"]) == (503, "engine_gone", 0)
        assert error["since"].endswith("+00:00")
        assert error["since"] in error["message"]
        assert "SIGKILL" in error["message"]
        assert (await server.http.get("/flush_cache")).status_code == 503
        await asyncio.gather(*running, return_exceptions=True)
