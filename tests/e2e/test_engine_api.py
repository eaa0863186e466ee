"""`from headwater import Engine` with the real default model: batches, streams, asyncio, clean ends."""

import asyncio
import itertools
import re
import threading
from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.slow

GREEDY = {"temperature": 0, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def engine() -> Iterator["object"]:
    from headwater import Engine

    with Engine(log_level="warning") as running:
        yield running


def test_text_ids_and_batches_agree(engine) -> None:
    prompts = ["The capital of France is", "1, 2, 3,"]
    single = [engine.generate(prompt, GREEDY) for prompt in prompts]
    assert "Paris" in single[0]["text"]
    batch = engine.generate(prompts, [GREEDY, GREEDY])
    by_ids = engine.generate(input_ids=[engine.encode(prompt) for prompt in prompts], sampling_params=GREEDY)
    for results in (batch, by_ids):
        assert [r["output_ids"] for r in results] == [r["output_ids"] for r in single]
    assert engine.decode(single[0]["output_ids"]) == single[0]["text"]
    assert single[0]["meta_info"]["completion_tokens"] == 8


def test_streams_are_cumulative_and_end_as_the_plain_answer(engine) -> None:
    plain = engine.generate("Once upon a time", GREEDY)
    texts = [chunk["text"] for chunk in engine.generate("Once upon a time", GREEDY, stream=True)]
    assert len(texts) > 1
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert texts[-1] == plain["text"]


def test_a_stream_that_is_left_frees_its_request(engine) -> None:
    stream = engine.generate("Once upon a time", {"max_new_tokens": 2000, "ignore_eos": True}, stream=True)
    next(stream)
    assert engine.get_state().num_running == 1
    stream.close()
    assert engine.flush_cache(timeout=10).success, "the request still runs"


def test_asyncio_callers_run_side_by_side(engine) -> None:
    async def run() -> list[str]:
        async def streamed() -> str:
            text = ""
            async for chunk in await engine.async_generate("1, 2, 3,", GREEDY, stream=True):
                text = chunk["text"]
            return text

        plain = engine.async_generate("1, 2, 3,", GREEDY)
        a, b = await asyncio.gather(plain, streamed())
        return [a["text"], b]

    first, second = asyncio.run(run())
    assert first == second


def test_log_probabilities_are_those_of_the_output(engine) -> None:
    answer = engine.generate("1, 2, 3,", GREEDY, return_logprob=True, top_logprobs_num=2)
    logprobs = answer["meta_info"]["output_token_logprobs"]
    assert [entry[1] for entry in logprobs] == answer["output_ids"]
    assert all(entry[0] <= 0 for entry in logprobs)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prompt": "x", "sampling_params": {"temperature": -1}}, "temperature"),
        ({"prompt": ""}, "text"),
        ({}, "text"),
        ({"input_ids": [10**6]}, "input_ids"),
    ],
)
def test_a_wrong_argument_is_a_value_error_that_names_it(engine, arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        engine.generate(**arguments)


def test_an_unknown_argument_is_a_type_error(engine) -> None:
    with pytest.raises(TypeError, match="tempreature"):
        engine.generate("x", tempreature=0)
    with pytest.raises(ValueError, match="timeout"):
        engine.flush_cache(timeout=-1)


def test_a_flush_empties_the_cache(engine) -> None:
    long = "A sentence to remember. " * 20
    engine.generate(long, GREEDY)
    assert engine.generate(long, GREEDY)["meta_info"]["cached_tokens"] > 0
    assert engine.flush_cache(timeout=5).success
    assert engine.generate(long, GREEDY)["meta_info"]["cached_tokens"] == 0


def test_a_flush_from_python_knows_the_whole_contract(engine) -> None:
    long = "Another sentence to remember. " * 20
    for salt in ("a", "b"):
        engine.generate(long, GREEDY, cache_salt=salt)
    would = engine.flush_cache(cache_salt="a", dry_run=True)
    assert would.dry_run and would.freed["device"].pages > 0
    assert engine.flush_cache(cache_salt="a", mode="now").freed == would.freed
    cached = [engine.generate(long, GREEDY, cache_salt=s)["meta_info"]["cached_tokens"] for s in ("a", "b")]
    assert cached[0] == 0 < cached[1]
    prefix_ids = engine.encode(long)[:64]
    assert engine.flush_cache(prefix_ids=prefix_ids, timeout=5).freed["device"].pages > 0
    assert engine.generate(long, GREEDY, cache_salt="b")["meta_info"]["cached_tokens"] < 64
    for wrong in ({"mode": "later"}, {"tiers": ["host"]}, {"prefix_ids": []}):
        with pytest.raises(ValueError, match=next(iter(wrong)).rstrip("s")):
            engine.flush_cache(**wrong)


def test_grammars_are_those_of_the_server(engine) -> None:
    params = {"max_new_tokens": 40, "regex": "[a-c]{5}"}
    answer = engine.generate("The letters are", params)
    assert re.fullmatch("[a-c]{5}", answer["text"])
    free, bound = engine.generate(["x", "x"], [{"max_new_tokens": 2}, {"max_new_tokens": 9, "json_schema": "{}"}])
    assert free["output_ids"] and bound["output_ids"]
    with pytest.raises(ValueError, match=r"sampling_params\.regex"):
        engine.generate("x", {"regex": "("})


def test_shutdown_leaves_no_thread_and_no_socket() -> None:
    from headwater import Engine

    before = set(threading.enumerate())
    engine = Engine(log_level="warning", kv_cache_memory_mb=32)
    directory = engine.directory
    assert list(directory.iterdir())
    engine.generate("x", {"max_new_tokens": 2, "regex": "ab"})
    engine.shutdown()
    engine.shutdown()
    left = {thread for thread in threading.enumerate() if thread.name.startswith(("engine", "grammars"))} - before
    assert not left
    assert not directory.exists()


def test_a_model_that_does_not_exist_is_refused_by_name() -> None:
    from headwater import Engine

    with pytest.raises((ValueError, OSError), match="no-such-folder"):
        Engine("/no-such-folder/no-such-model")
