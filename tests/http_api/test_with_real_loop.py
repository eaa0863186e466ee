"""HTTP down to the real loop, scheduler, cache and control plane; only the model is a fake with canary KV."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_under_test import TOKENIZER, api, error_of, events, until
from loop_engines import LoopEngine, loop_engines
from prometheus_client.parser import text_string_to_metric_families

from headwater.simulation.fakes.canary import expected_tokens

pytestmark = pytest.mark.anyio
NUM_PAGES = 64
PROMPT = list(range(100, 122))
GREEDY = {"temperature": 0, "max_new_tokens": 8}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LoopEngine]:
    with loop_engines(tmp_path, num_pages=NUM_PAGES, max_queued=4, max_context=200) as (engine,):
        yield engine


def page_counts(page: str) -> dict[str, float]:
    families = {family.name: family for family in text_string_to_metric_families(page)}
    return {sample.labels["owner"]: sample.value for sample in families["headwater_pages"].samples}


async def test_tokens_are_the_oracles_and_a_second_prompt_is_cached_until_flushed(engine) -> None:
    body = {"input_ids": PROMPT, "sampling_params": GREEDY}
    async with api(engine) as server:
        for cached in (0, 20):
            answer = (await server.post("/generate", body)).json()
            assert answer["output_ids"] == expected_tokens(PROMPT, 8, TOKENIZER.vocab_size)
            assert answer["meta_info"]["cached_tokens"] == cached
            assert answer["meta_info"]["cached_tokens_details"]["device"] == cached
        flushed = await server.http.post("/flush_cache", headers={"accept": "application/json"})
        assert flushed.status_code == 200
        assert flushed.json()["freed"]["device"]["pages"] > 0
        answer = (await server.post("/generate", body)).json()
        assert answer["meta_info"]["cached_tokens"] == 0
        assert answer["meta_info"]["cache_generation"] == 1


async def test_both_apis_and_streams_say_the_same(engine) -> None:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 8}
    async with api(engine) as server:
        native = (await server.post("/generate", {"input_ids": PROMPT, "sampling_params": GREEDY})).json()
        chunks = events(
            await server.post("/generate", {"input_ids": PROMPT, "sampling_params": GREEDY, "stream": True})
        )
        completion = (await server.post("/v1/completions", body)).json()["choices"][0]
        streamed = events(await server.post("/v1/completions", body | {"stream": True}))
    assert native["text"] == chunks[-1]["text"] == completion["text"]
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == native["text"]


async def test_prompt_logprobs_cover_the_prompt_cached_or_not(engine) -> None:
    body = {"prompt": PROMPT, "echo": True, "logprobs": 0, "max_tokens": 1}
    async with api(engine) as server:
        for _ in range(2):
            logprobs = (await server.post("/v1/completions", body)).json()["choices"][0]["logprobs"]
            assert len(logprobs["token_logprobs"]) == len(PROMPT) + 1
            assert logprobs["token_logprobs"][0] is None
            assert None not in logprobs["token_logprobs"][1:]


async def test_namespaces_do_not_share_cached_tokens(engine) -> None:
    body = {"input_ids": PROMPT, "sampling_params": GREEDY}
    async with api(engine) as server:
        await server.post("/generate", body)
        for other in ({"cache_salt": "a"}, {"extra_key": "a"}):
            answer = (await server.post("/generate", body | other)).json()
            assert answer["meta_info"]["cached_tokens"] == 0


async def test_pause_holds_requests_flush_says_so_and_continue_lets_them_run(engine) -> None:
    async with api(engine) as server:
        assert (await server.post("/pause_generation", {"mode": "retract"})).status_code == 200
        body = {"input_ids": PROMPT, "sampling_params": GREEDY}
        held = asyncio.ensure_future(server.post("/generate", body))
        await until(lambda: server.state.client.num_running == 1)
        assert (await server.http.get("/health_generate")).status_code == 200
        response = await server.http.get("/flush_cache?timeout=5")
        assert response.status_code == 200, "a backlog held by a pause is no blocker"
        assert not held.done()
        assert (await server.post("/continue_generation", {})).status_code == 200
        assert (await held).json()["output_ids"] == expected_tokens(PROMPT, 8, TOKENIZER.vocab_size)


async def test_a_flush_that_meets_a_running_request(engine) -> None:
    long = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 10**6}, "rid": "long"}
    async with api(engine) as server:
        assert (await server.post("/pause_generation", {"mode": "in_place"})).status_code == 200
        await server.post("/continue_generation", {})
        running = asyncio.ensure_future(server.post("/generate", long | {"n": 1}))
        await until(lambda: server.state.client.num_running == 1)
        pending = asyncio.ensure_future(server.http.get("/flush_cache?timeout=30"))
        response = await asyncio.wait_for(pending, 20)
        assert response.status_code == 200, "answered when the request has ended"
        assert (await running).status_code == 200


async def test_a_full_queue_is_429_and_what_was_taken_is_answered(engine) -> None:
    async with api(engine) as server:
        await server.post("/pause_generation", {"mode": "retract"})
        body = {"input_ids": PROMPT, "sampling_params": GREEDY}
        waiting = [asyncio.ensure_future(server.post("/generate", body)) for _ in range(4)]
        await until(lambda: server.state.client.num_running == 4)
        response = await server.post("/generate", body)
        assert response.status_code == 429
        assert "retry-after" in response.headers
        assert error_of(response)["type"] == "rate_limit_error"
        await server.post("/continue_generation", {})
        assert {answer.status_code for answer in await asyncio.gather(*waiting)} == {200}


async def test_pages_come_back_after_aborts_and_add_up(engine) -> None:
    async with api(engine) as server:
        long = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 10**6}}
        tasks = [asyncio.ensure_future(server.post("/generate", long | {"rid": f"r{n}"})) for n in range(4)]
        await until(lambda: server.state.client.num_running == 4)
        await server.post("/abort_request", {"rid": "r"})
        for answer in await asyncio.gather(*tasks):
            assert answer.status_code == 200
            assert answer.json()["meta_info"]["finish_reason"]["type"] in ("abort", "length")
        counts = page_counts((await server.http.get("/metrics")).text)
        assert counts["private"] == counts["transfer"] == counts["retired"] == 0
        assert sum(counts.values()) == NUM_PAGES


async def test_scoped_flushes_reach_the_cache(engine) -> None:
    body = {"input_ids": PROMPT, "sampling_params": GREEDY}
    async with api(engine) as server:
        for salt in ("a", "b"):
            await server.post("/generate", body | {"cache_salt": salt})
        assert (await server.http.get("/flush_cache?mode=now&cache_salt=a")).status_code == 200
        left = {}
        for salt in ("a", "b"):
            answer = (await server.post("/generate", body | {"cache_salt": salt})).json()
            left[salt] = answer["meta_info"]["cached_tokens"]
        assert left == {"a": 0, "b": 20}
        response = await server.http.get("/flush_cache?tiers=storage")
        assert (response.status_code, error_of(response)["param"]) == (400, "tiers")
