"""What trainers need of a rollout from a real model: many samples over one prefill, and scores to the bit."""

from collections.abc import Iterator
from typing import Any

import pytest
from running_server import RunningServer

pytestmark = pytest.mark.slow
PROMPT = [3 + place * 31 % 200 for place in range(100)]
CACHED = 96  # whole pages of it
NUM_SAMPLES = 128


@pytest.fixture(scope="module")
def server(tiny_model: str) -> Iterator[RunningServer]:
    arguments = ("--dtype", "float32", "--max-running-requests", str(NUM_SAMPLES), "--max-total-tokens", "32768")
    with RunningServer("--model", tiny_model, *arguments) as running:
        yield running.wait_healthy()


def generate(server: RunningServer, ids: list[int], num_tokens: int, **more: Any) -> Any:
    sampling = {"temperature": 1.0, "max_new_tokens": num_tokens, "ignore_eos": True, "n": more.pop("n", 1)}
    body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True} | more
    answer = server.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_128_samples_compute_their_prompt_once_and_are_scored_again_to_the_bit(server: RunningServer) -> None:
    answers = generate(server, PROMPT, 8, n=NUM_SAMPLES)
    assert sorted(answer["meta_info"]["cached_tokens"] for answer in answers) == [0] + [CACHED] * (NUM_SAMPLES - 1)
    assert len({tuple(answer["output_ids"]) for answer in answers}) == NUM_SAMPLES, "each has its own noise"
    for answer in answers[:4]:
        ids = [*PROMPT, *answer["output_ids"]]
        scored = generate(server, ids, 0, logprob_start_len=0)
        meta = scored["meta_info"]
        assert (scored["output_ids"], meta["completion_tokens"]) == ([], 0)
        assert [entry[1] for entry in meta["input_token_logprobs"]] == ids
        assert meta["input_token_logprobs"][0][0] is None, "nothing predicts the first token"
        again = [entry[0] for entry in meta["input_token_logprobs"][len(PROMPT) :]]
        sampled = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
        assert again == pytest.approx(sampled, abs=1e-5)
