"""The openai SDK, unchanged, against a real server with the real default model."""

import math

import openai
import pytest
from running_server import RunningServer

pytestmark = pytest.mark.slow

QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="not-needed", max_retries=0, timeout=120)


@pytest.fixture
def model(client: openai.OpenAI) -> str:
    (only,) = client.models.list().data
    assert client.models.retrieve(only.id).id == only.id
    return only.id


def test_chat_answers_the_question(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=48)
    assert "Rayleigh" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streamed_text_equals_plain_text(client: openai.OpenAI, model: str) -> None:
    plain = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=24)
    stream = client.chat.completions.create(
        model=model,
        messages=QUESTION,
        temperature=0,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == plain.choices[0].message.content
    assert chunks[-1].usage is not None
    assert plain.usage is not None
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == plain.choices[0].finish_reason


def test_completions_continue_text_and_token_ids(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt="1, 2, 3, 4,", temperature=0, max_tokens=6)
    assert "5" in answer.choices[0].text
    batch = client.completions.create(model=model, prompt=["One", "Two"], temperature=0, max_tokens=2)
    assert [choice.index for choice in batch.choices] == [0, 1]
    from_ids = client.completions.create(model=model, prompt=[504, 3575, 282], temperature=0, max_tokens=2)
    assert from_ids.usage is not None
    assert from_ids.usage.prompt_tokens == 3


def test_n_gives_different_answers_and_a_seed_gives_the_same(client: openai.OpenAI, model: str) -> None:
    def ask() -> list[str | None]:
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Write a story about a cat."}],
            n=2,
            seed=11,
            temperature=1.0,
            max_tokens=16,
        )
        return [choice.message.content for choice in answer.choices]

    first, second = ask()
    assert first != second
    assert ask() == [first, second]


def test_logprobs_belong_to_the_tokens_shown(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert "".join(entry.token for entry in content).startswith((choice.message.content or "")[:5])
    for entry in content:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        best = max(entry.top_logprobs, key=lambda top: top.logprob)
        assert math.isclose(best.logprob, entry.logprob, abs_tol=1e-3), "greedy takes the likeliest token"


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt="1, 2, 3, 4,", temperature=0, max_tokens=40, stop=[" 7", "\n"]
    )
    assert "7" not in answer.choices[0].text
    assert answer.choices[0].finish_reason == "stop"


def test_an_unknown_model_is_a_404_that_names_it(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="no-such-model", messages=QUESTION)
    assert caught.value.code == "model_not_found"
    assert "no-such-model" in str(caught.value)


def test_a_wrong_parameter_is_a_400_that_names_it(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError, match="top_p"):
        client.chat.completions.create(model=model, messages=QUESTION, top_p=2)
