"""/generate and its neighbours, as SGLang's clients use them."""

import asyncio
import itertools

import pytest
from api_under_test import EOS_ID, TOKENIZER, api, error_of, events, saying, until

from headwater.generation.native_schemas import GenerateRequest
from headwater.http_api.services import Services
from headwater.messages.base import unpack_ids
from headwater.messages.generation import Abort, Finish, Generate, LogprobParams, OutputMeta, RequestOptions
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio


async def test_text_in_text_out_with_the_facts_clients_read(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("hello")
    engine.script.meta = OutputMeta(
        prompt_tokens=2,
        cached_device=1,
        cached_host=1,
        num_retractions=2,
        weight_version="v7",
        cache_generation=3,
    )
    async with api(engine) as server:
        response = await server.post("/generate", {"text": "ab", "rid": "mine"})
    answer = response.json()
    assert answer["text"] == "hello"
    assert answer["output_ids"] == [*TOKENIZER.encode("hello"), EOS_ID]
    meta = answer["meta_info"]
    assert meta.pop("e2e_latency") > 0
    assert meta == {
        "id": "mine",
        "finish_reason": {"type": "stop", "matched": EOS_ID},
        "prompt_tokens": 2,
        "completion_tokens": 6,
        "reasoning_tokens": 0,
        "cached_tokens": 2,
        "cached_tokens_details": {"device": 1, "host": 1, "storage": 0},
        "weight_version": "v7",
        "num_retractions": 2,
        "cache_generation": 3,
        "dp_rank": 0,
        "queue_time": 0.0,
    }


async def test_facts_of_speculation_have_sglangs_names(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("hello")
    engine.script.meta = OutputMeta(prompt_tokens=2, num_draft_steps=2, num_drafted=8, num_accepted=3)
    async with api(engine) as server:
        meta = (await server.post("/generate", {"text": "ab"})).json()["meta_info"]
    assert {name: value for name, value in meta.items() if name.startswith("spec_")} == {
        "spec_verify_ct": 2,
        "spec_draft_token_num": 8,
        "spec_accept_token_num": 3,
        "spec_accept_rate": 0.375,
        "spec_accept_length": 2.5,
    }


async def test_put_and_input_ids_and_a_body_as_gateways_rewrite_it(engine: ScriptedEngine) -> None:
    body = {
        "input_ids": [70, 71],
        "sampling_params": {"max_new_tokens": 3, "temperature": None, "custom_params": {}, "stop": None},
        "model": None,
        "lora_path": None,
        "return_routed_experts": False,
        "logprob_start_len": -1,
        "log_metrics": True,
        "return_hidden_states": False,
        "background": False,
        "no_logs": False,
        "return_bytes": None,
        "return_entropy": None,
    }
    async with api(engine) as server:
        answer = (await server.http.put("/generate", json=body)).json()
    assert answer["output_ids"] == [70, 71, 70]
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 3}


async def test_sampling_parameters_reach_the_engine(engine: ScriptedEngine) -> None:
    given = {
        "max_new_tokens": 5,
        "min_new_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": 0.1,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.3,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": -1.5},
        "sampling_seed": 42,
        "stop_token_ids": [9],
        "ignore_eos": True,
    }
    body = {
        "text": "ab",
        "sampling_params": given,
        "priority": 3,
        "cache_salt": "s",
        "extra_key": "k",
        "return_logprob": True,
        "top_logprobs_num": 2,
        "token_ids_logprob": [4, 5],
        "logprob_start_len": 1,
    }
    async with api(engine) as server:
        await server.post("/generate", body)
    (message,) = engine.of_type(Generate)
    sampling = message.sampling
    assert (sampling.max_new_tokens, sampling.min_new_tokens, sampling.temperature) == (5, 2, 0.5)
    assert (sampling.top_p, sampling.top_k, sampling.min_p) == (0.9, -1, 0.1)
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) == (
        0.2,
        0.3,
        1.1,
    )
    assert (sampling.logit_bias, sampling.seed, sampling.stop_token_ids) == ({5: -1.5}, 42, (9,))
    assert sampling.ignore_eos
    assert message.options == RequestOptions(priority=3, cache_salt="s", extra_key="k")
    assert message.logprobs == LogprobParams(top=2, token_ids=(4, 5), prompt_start=1)


async def test_requests_without_seed_get_different_ones(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        for _ in range(2):
            await server.post("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 1}})
    first, second = engine.of_type(Generate)
    assert first.sampling.seed != second.sampling.seed


async def test_stream_chunks_repeat_the_text_so_far(engine: ScriptedEngine) -> None:
    engine.script.reply = saying('he "said" ünï\n')
    async with api(engine) as server:
        chunks = events(await server.post("/generate", {"text": "ab", "stream": True}))
    texts = [chunk["text"] for chunk in chunks]
    assert texts[-1] == 'he "said" ünï\n'
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    counts = [chunk["meta_info"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert [len(chunk["output_ids"]) for chunk in chunks] == counts
    assert all(chunk["meta_info"]["finish_reason"] is None for chunk in chunks[:-1])
    assert chunks[-1]["meta_info"]["finish_reason"]["type"] == "stop"
    assert chunks[-1]["meta_info"]["e2e_latency"] > 0


async def test_stream_equals_the_whole_answer_with_logprobs(engine: ScriptedEngine) -> None:
    """The stream is encoded piece by piece; the last chunk must be what the other way gives."""
    engine.script.step_s = 0.002
    body = {
        "text": "abc",
        "rid": "r",
        "sampling_params": {"max_new_tokens": 7},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
        "token_ids_logprob": [4],
        "return_text_in_logprobs": True,
        "return_prompt_token_ids": True,
    }
    async with api(engine) as server:
        whole = (await server.post("/generate", body)).json()
        last = events(await server.post("/generate", body | {"stream": True}))[-1]
    for answer in (whole, last):
        del answer["meta_info"]["e2e_latency"]
    assert whole == last
    a, b, c = TOKENIZER.encode("abc")
    meta = whole["meta_info"]
    assert meta["prompt_token_ids"] == [a, b, c]
    assert meta["input_token_logprobs"] == [[None, a, "a"], [-b / 100, b, "b"], [-c / 100, c, "c"]]
    assert meta["input_top_logprobs"][0] is None
    assert len(meta["input_top_logprobs"][1]) == 2
    assert meta["output_token_logprobs"][0] == [-a / 100, a, "a"]
    assert len(meta["output_token_logprobs"]) == len(meta["output_top_logprobs"]) == 7
    assert meta["output_token_ids_logprobs"] == [[[-0.04, 4, TOKENIZER.token_text(4)]]] * 7


async def test_logprobs_without_text_have_null_in_its_place(engine: ScriptedEngine) -> None:
    """RL clients read `output_token_logprobs[i][1]`."""
    body = {"input_ids": [70, 71], "sampling_params": {"max_new_tokens": 2}, "return_logprob": True}
    async with api(engine) as server:
        meta = (await server.post("/generate", body)).json()["meta_info"]
    assert meta["output_token_logprobs"] == [[-0.7, 70, None], [-0.71, 71, None]]
    assert meta["input_token_logprobs"] == []
    assert "output_top_logprobs" not in meta


async def test_a_stop_string_ends_the_answer_and_the_request(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("one two STOP three" * 50)
    engine.script.step_s = 0.002
    body = {"text": "a", "sampling_params": {"stop": ["STOP", "zzz"], "max_new_tokens": 200}}
    async with api(engine) as server:
        answer = (await server.post("/generate", body)).json()
        streamed = events(await server.post("/generate", body | {"stream": True}))
        await until(lambda: len(engine.of_type(Abort)) == 2 and server.state.client.num_running == 0)
    for one in (answer, streamed[-1]):
        assert one["text"] == "one two "
        assert one["meta_info"]["finish_reason"] == {"type": "stop", "matched": "STOP"}
        assert one["meta_info"]["completion_tokens"] == len("one two STOP") == len(one["output_ids"])
    assert all("S" not in chunk["text"] for chunk in streamed), "text that may become a stop string is held back"


async def test_no_stop_trim_leaves_stop_strings_and_tokens_in_the_text(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("one two STOP three")
    (t,) = TOKENIZER.encode("t")
    async with api(engine) as server:
        for stop, trimmed, kept in (
            ({"stop": "STOP"}, "one two ", "one two STOP"),
            ({"stop_token_ids": [t]}, "one ", "one t"),
            ({"skip_special_tokens": False}, "one two STOP three", "one two STOP three<|end|>"),
        ):
            for is_kept, text in ((False, trimmed), (True, kept)):
                body = {"text": "a", "sampling_params": stop | {"no_stop_trim": is_kept}}
                assert (await server.post("/generate", body)).json()["text"] == text


async def test_a_batch_is_a_list_in_order_with_parameters_for_each(engine: ScriptedEngine) -> None:
    body = {
        "text": ["a", "bb", "ccc"],
        "rid": "job",
        "sampling_params": [{"max_new_tokens": count} for count in (1, 2, 3)],
    }
    async with api(engine) as server:
        answers = (await server.post("/generate", body)).json()
        chunks = events(await server.post("/generate", body | {"stream": True}))
    assert [answer["text"] for answer in answers] == ["a", "bb", "ccc"]
    assert [answer["meta_info"]["id"] for answer in answers] == ["job_0", "job_1", "job_2"]
    assert {chunk["index"] for chunk in chunks} == {0, 1, 2}
    last = {chunk["index"]: chunk["text"] for chunk in chunks if chunk["meta_info"]["finish_reason"]}
    assert last == {0: "a", 1: "bb", 2: "ccc"}


async def test_a_batch_arrives_in_one_message(engine: ScriptedEngine) -> None:
    """Else a step begins with whichever came first, and the others wait for it."""
    body = {"text": ["a", "b", "c"], "rid": "job", "sampling_params": {"max_new_tokens": 1, "n": 2}}
    async with api(engine) as server:
        assert len((await server.post("/generate", body)).json()) == 6
    assert engine.batch_sizes == [6]


@pytest.mark.parametrize(
    ("input_ids", "sent"),
    [
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        ([5.0, 6], [[5, 6]]),
        (["5", 6], [[5, 6]]),
        ([[5], ["6"]], [[5], [6]]),
    ],
)
async def test_token_ids_reach_the_engine_however_they_are_read(engine: ScriptedEngine, input_ids, sent) -> None:
    """Plain integers are read as arrays, the rest by pydantic; both must come to the same."""
    async with api(engine) as server:
        body = {"input_ids": input_ids, "sampling_params": {"max_new_tokens": 1}, "return_prompt_token_ids": True}
        answers = (await server.post("/generate", body)).json()
    assert [unpack_ids(message.prompt_ids).tolist() for message in engine.of_type(Generate)] == sent
    told = answers if isinstance(answers, list) else [answers]
    assert [answer["meta_info"]["prompt_token_ids"] for answer in told] == sent


@pytest.mark.parametrize(
    "input_ids",
    [
        *([], [[]], [[5], []], [5.5], [5, None], ["a"], [[5], 6], [5, [6]], [[[5]]], {}),
        *([1 << 31], [1 << 63], [1 << 70], [-1]),
    ],
)
async def test_token_ids_that_are_none_are_refused_by_name(engine: ScriptedEngine, input_ids) -> None:
    async with api(engine) as server:
        answer = await server.post("/generate", {"input_ids": input_ids})
    assert answer.status_code == 400
    assert "input_ids" in answer.json()["error"]["message"]
    assert engine.of_type(Generate) == []


async def test_a_batch_of_one_is_still_a_list(engine: ScriptedEngine) -> None:
    body = {"input_ids": [[70, 71]], "sampling_params": {"max_new_tokens": 1}}
    async with api(engine) as server:
        assert [a["output_ids"] for a in (await server.post("/generate", body)).json()] == [[70]]


async def test_n_answers_have_seeds_of_their_own(engine: ScriptedEngine) -> None:
    body = {"text": "a", "sampling_params": {"n": 3, "sampling_seed": 10, "max_new_tokens": 1}}
    async with api(engine) as server:
        assert len((await server.post("/generate", body)).json()) == 3
    assert sorted(message.sampling.seed for message in engine.of_type(Generate)) == [10, 11, 12]


async def test_max_new_tokens_zero_is_prefill_only_and_too_many_are_cut(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        body = {"text": "abc", "sampling_params": {"max_new_tokens": 0}}
        answer = (await server.post("/generate", body)).json()
        assert (answer["text"], answer["output_ids"]) == ("", [])
        assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
        body = {"text": "abc", "sampling_params": {"max_new_tokens": 10**30}}
        answer = (await server.post("/generate", body)).json()
        assert answer["meta_info"]["completion_tokens"] == 256 - 3


async def test_a_prompt_of_100_000_ids_passes_the_body_limit(engine: ScriptedEngine) -> None:
    """It must be refused for its length, not for its bytes."""
    async with api(engine) as server:
        response = await server.post("/generate", {"input_ids": [200] * 100_000})
    assert response.status_code == 400
    assert error_of(response)["code"] == "context_length_exceeded"


async def test_abort_by_request_ends_a_stream_with_what_it_had(engine: ScriptedEngine) -> None:
    engine.script.step_s = 0.005
    async with api(engine) as server:
        body = {"text": "ab", "rid": "job-1", "sampling_params": {"max_new_tokens": 200, "ignore_eos": True}}
        running = asyncio.ensure_future(server.post("/generate", body))
        await until(lambda: engine.num_running)
        response = await server.post("/abort_request", {"rid": "job", "abort_message": "enough"})
        assert (response.status_code, response.content) == (200, b"")
        answer = await running
    assert answer.status_code == 200
    reason = answer.json()["meta_info"]["finish_reason"]
    assert (reason["type"], reason["message"]) == ("abort", "enough")


@pytest.mark.parametrize("body", [{}, {"rid": ""}, {"rid": "nobody"}, {"abort_all": True}, {"rid": None}])
async def test_abort_of_nothing_is_no_error(engine: ScriptedEngine, body: dict) -> None:
    async with api(engine) as server:
        assert (await server.post("/abort_request", body)).status_code == 200
        assert (await server.http.post("/abort_request")).status_code == 200


async def test_a_full_queue_is_429_with_retry_after_also_for_a_stream(engine: ScriptedEngine) -> None:
    engine.script.refusal = Finish(
        type="abort",
        status=429,
        message="the queue is full (1024 requests wait)",
        err_type="rate_limit_error",
    )
    async with api(engine) as server:
        for is_stream in (False, True):
            response = await server.post("/generate", {"text": "a", "stream": is_stream})
            assert response.status_code == 429
            assert int(response.headers["retry-after"]) >= 1
            assert error_of(response)["type"] == "rate_limit_error"


async def test_a_rid_in_use_is_a_400(engine: ScriptedEngine) -> None:
    engine.script.is_stalled = True
    async with api(engine) as server:
        running = asyncio.ensure_future(server.post("/generate", {"text": "a", "rid": "x"}))
        await until(lambda: engine.of_type(Generate))
        response = await server.post("/generate", {"text": "a", "rid": "x"})
        assert response.status_code == 400
        assert error_of(response)["param"] == "rid"
        running.cancel()


async def test_tokenize_and_detokenize_are_inverse(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        ids = (await server.post("/tokenize", {"prompt": "añ b", "model": "x"})).json()
        assert ids["tokens"] == TOKENIZER.encode("añ b")
        assert (ids["count"], ids["max_model_len"]) == (5, 256)
        assert (await server.post("/detokenize", {"tokens": ids["tokens"]})).json() == {"text": "añ b"}
        many = (await server.post("/v1/tokenize", {"prompt": ["a", "bc"]})).json()
        assert many["count"] == [1, 2]
        texts = (await server.post("/v1/detokenize", {"tokens": many["tokens"]})).json()
        assert texts == {"text": ["a", "bc"]}
        chat = await server.post("/tokenize", {"messages": [{"role": "user", "content": "a"}]})
        assert chat.json()["tokens"] == TOKENIZER.encode("<|user|>a<|assistant|>")
        assert (await server.post("/tokenize", {})).status_code == 400
        assert error_of(await server.post("/detokenize", {"tokens": [99999]}))["param"] == "tokens"


async def test_the_prompt_of_a_batch_reaches_the_engine_unchanged(engine: ScriptedEngine) -> None:
    body = {"input_ids": [[70, 71], [72]], "sampling_params": {"max_new_tokens": 1}}
    async with api(engine) as server:
        await server.post("/generate", body)
    prompts = [unpack_ids(message.prompt_ids).tolist() for message in engine.of_type(Generate)]
    assert prompts == [[70, 71], [72]]


async def test_a_batch_whose_client_is_slow_tells_each_end_once(engine: ScriptedEngine) -> None:
    """Steps that come while nobody reads are joined; no chunk may show a later state than its own."""
    async with api(engine) as server:
        body = {"text": ["a", "b"], "sampling_params": {"max_new_tokens": 30}}
        batch = await Services(server.state).native_api.start(GenerateRequest.model_validate(body))
        chunks = batch.stream()
        seen = [await anext(chunks)]
        await until(lambda: server.state.client.num_running == 0)
        seen += [chunk async for chunk in chunks]
    for index in (0, 1):
        own = [chunk for chunk in seen if chunk["index"] == index]
        reasons = [chunk["meta_info"]["finish_reason"] for chunk in own]
        assert [reason is None for reason in reasons] == [True] * (len(own) - 1) + [False]
        assert all(len(chunk["output_ids"]) == chunk["meta_info"]["completion_tokens"] for chunk in own)
        assert own[-1]["text"] == "ab"[index] * 30
