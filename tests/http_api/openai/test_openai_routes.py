"""Chat completions and completions as OpenAI's clients read them."""

from dataclasses import replace
from typing import Any

import pytest
from api_under_test import EOS, MODEL, TOKENIZER, api, events, saying, until

from headwater.messages.base import unpack_ids
from headwater.messages.generation import Abort, Generate, LogprobParams, OutputMeta, SamplingParams
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
USER = [{"role": "user", "content": "hi"}]


def prompt_text(engine: ScriptedEngine) -> str:
    newest = engine.of_type(Generate)[-1]
    return TOKENIZER.decode(unpack_ids(newest.prompt_ids).tolist(), skip_special_tokens=False)


async def test_chat_answers_with_message_usage_and_ids(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("hello")
    engine.script.meta = OutputMeta(prompt_tokens=4, cached_device=3, weight_version="v7")
    async with api(engine) as server:
        answer = (await server.post(CHAT, {"model": MODEL, "messages": USER})).json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == MODEL
    assert answer["id"] == engine.of_type(Generate)[0].rid, "a client can abort by the id it was told"
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == "hello"
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (4, 6, 10)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3}
    assert answer["metadata"] == {"weight_version": "v7"}
    assert "sglext" not in answer
    assert prompt_text(engine) == "<|user|>hi<|assistant|>"


async def test_what_a_request_leaves_out_is_what_the_model_recommends(engine: ScriptedEngine) -> None:
    recommended = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}
    given = {"temperature": 0.0, "top_p": 1.0, "top_k": 5, "min_p": 0.0, "repetition_penalty": 1.0}
    async with api(engine) as server:
        server.state.model = replace(server.state.model, sampling_defaults=recommended)
        for body in (
            {"messages": USER, "max_tokens": 1},
            {"messages": USER, "max_tokens": 1} | dict.fromkeys(given),  # null is not given
            {"messages": USER, "max_tokens": 1, "top_k": 5},
            {"messages": USER, "max_tokens": 1} | given,
        ):
            assert (await server.post(CHAT, body)).status_code == 200
        assert (await server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1})).status_code == 200
        assert (await server.post("/generate", {"text": "a"})).status_code == 200
        info = (await server.http.get("/model_info")).json()
    found = [{name: getattr(it.sampling, name) for name in given} for it in engine.of_type(Generate)]
    plain = {name: getattr(SamplingParams(), name) for name in given}
    assert found == [recommended, recommended, recommended | {"top_k": 5}, given, recommended, plain]
    assert info["default_sampling_params"] == recommended


async def test_chat_accepts_what_clients_and_gateways_send(engine: ScriptedEngine) -> None:
    body: dict[str, Any] = {
        "model": "default",
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "be kind"}]},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function",
                "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "42", "tool_call_id": "1"},
        ],
        "max_completion_tokens": 3,
        "max_tokens": None,
        "stop": None,
        "stream_options": None,
        "tools": [{"type": "function", "function": {"name": "lookup", "parameters": {}}}],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "no_stop_trim": False,
        "continue_final_message": False,
        "skip_special_tokens": True,
        "separate_reasoning": True,
        "stream_reasoning": True,
        "user": "me",
        "service_tier": "auto",
        "ignore_eos": True,
        "best_of": 1,
        "parallel_tool_calls": True,
    }  # fmt: skip
    async with api(engine) as server:
        response = await server.post(CHAT, body)
        assert response.status_code == 200, response.text
        assert response.json()["usage"]["completion_tokens"] == 3
        called = '[{"name": "f", "arguments": {}}]'  # a template without tool calls shows them so
        assert prompt_text(engine) == f"<|user|>be kind<|user|>{called}<|user|>42lookup<|assistant|>"
        await server.post(CHAT, body | {"tool_choice": "none"})
        assert "lookup" not in prompt_text(engine), "tool_choice none hides the tools"


async def test_chat_without_max_tokens_may_fill_the_context(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        answer = (await server.post(CHAT, {"messages": USER, "ignore_eos": True})).json()
    assert answer["usage"]["total_tokens"] == 256
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_continue_final_message_opens_no_new_turn(engine: ScriptedEngine) -> None:
    messages = [*USER, {"role": "assistant", "content": "so"}]
    async with api(engine) as server:
        body = {"messages": messages, "continue_final_message": True, "max_tokens": 1}
        assert (await server.post(CHAT, body)).status_code == 200
    assert prompt_text(engine).endswith("so")


async def test_chat_stream_begins_with_the_role_and_ends_with_the_reason(engine: ScriptedEngine) -> None:
    engine.script.reply = saying('say "hé"\n')
    engine.script.step_s = 0.002
    async with api(engine) as server:
        chunks = events(await server.post(CHAT, {"messages": USER, "stream": True}))
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(len(chunk["choices"]) == 1 and "usage" not in chunk for chunk in chunks), "no usage unasked"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == 'say "hé"\n'
    assert deltas[-1] == {}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[-1] == "stop"
    assert set(reasons[:-1]) == {None}


async def test_stream_usage_comes_when_asked(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("hello")
    for path, body in ((CHAT, {"messages": USER}), (COMPLETIONS, {"prompt": "ab"})):
        async with api(engine) as server:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            *chunks, last = events(await server.post(path, body))
            assert last["choices"] == []
            assert last["usage"]["completion_tokens"] == 6
            assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
            body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
            *chunks, last = events(await server.post(path, body))
            counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
            assert counts == sorted(counts)
            assert counts[-1] == last["usage"]["completion_tokens"] == 6


async def test_n_choices_stream_and_whole(engine: ScriptedEngine) -> None:
    body = {"messages": USER, "n": 2, "seed": 5, "max_tokens": 3, "ignore_eos": True}
    async with api(engine) as server:
        answer = (await server.post(CHAT, body)).json()
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        assert answer["usage"]["prompt_tokens"] == 4, "the prompt counts once"
        assert answer["usage"]["completion_tokens"] == 6
        assert sorted(message.sampling.seed for message in engine.of_type(Generate)) == [5, 6]
        chunks = events(await server.post(CHAT, body | {"stream": True}))
    text = {0: "", 1: ""}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        text[choice["index"]] += choice["delta"].get("content", "")
    assert text == {0: "hi", 1: "hi"}, "the first of three tokens, <|user|>, is special and shows no text"


async def test_chat_logprobs(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("hé")
    body = {"messages": USER, "logprobs": True, "top_logprobs": 2}
    async with api(engine) as server:
        answer = (await server.post(CHAT, body)).json()
        chunks = events(await server.post(CHAT, body | {"stream": True}))
    content = answer["choices"][0]["logprobs"]["content"]
    (h,) = TOKENIZER.encode("h")
    assert content[0]["token"] == "h"
    assert content[0]["bytes"] == [ord("h")]
    assert content[0]["logprob"] == -h / 100
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.01, -0.02]
    assert bytes(byte for entry in content[1:3] for byte in entry["bytes"]).decode() == "é"
    assert [entry["token"] for entry in content][-1] == EOS
    streamed: list[Any] = []
    for chunk in chunks:
        streamed += (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    assert streamed == content, "a stream tells every token's logprob, also where text was held back"


async def test_stop_strings_are_cut_and_told(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("one STOP two")
    for path, body in ((CHAT, {"messages": USER}), (COMPLETIONS, {"prompt": "ab", "max_tokens": 50})):
        async with api(engine) as server:
            (choice,) = (await server.post(path, body | {"stop": "STOP"})).json()["choices"]
            assert (choice.get("text") or choice["message"]["content"]) == "one "
            assert (choice["finish_reason"], choice["matched_stop"]) == ("stop", "STOP")
            kept = await server.post(path, body | {"stop": ["STOP"], "include_stop_str_in_output": True})
            (choice,) = kept.json()["choices"]
            assert (choice.get("text") or choice["message"]["content"]) == "one STOP"
            await until(lambda: server.state.client.num_running == 0)
    assert len(engine.of_type(Abort)) <= 4


async def test_cached_tokens_details_when_asked(engine: ScriptedEngine) -> None:
    engine.script.meta = OutputMeta(prompt_tokens=4, cached_device=2, cached_host=1)
    body = {"messages": USER, "max_tokens": 2, "return_cached_tokens_details": True}
    expected = {"cached_tokens_details": {"device": 2, "host": 1, "storage": 0}}
    async with api(engine) as server:
        assert (await server.post(CHAT, body)).json()["sglext"] == expected
        chunks = events(await server.post(CHAT, body | {"stream": True}))
        assert [chunk["sglext"] for chunk in chunks if "sglext" in chunk] == [expected]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "cc"]),
        ([65, 66], [None]),
        ([[65, 66], [67]], [None, None]),
    ],
)
async def test_completion_prompts_of_all_four_shapes(engine: ScriptedEngine, prompt: Any, texts: list) -> None:
    async with api(engine) as server:
        answer = (await server.post(COMPLETIONS, {"prompt": prompt, "max_tokens": 2})).json()
    assert answer["object"] == "text_completion"
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(texts)))
    for choice, text in zip(answer["choices"], texts, strict=True):
        assert text is None or choice["text"] == text


async def test_token_ids_on_request_whole_and_streamed(engine: ScriptedEngine) -> None:
    """As trainers read them: a token that shows no text (the end, a part of a character) is reported all the same."""
    text = "ok \u00e9"
    engine.script.reply = saying(text)
    ids = [*TOKENIZER.encode(text), TOKENIZER.eos_token_ids[0]]
    asks = {"return_token_ids": True, "return_tokens_as_token_ids": True, "max_tokens": 20}
    bodies = {
        COMPLETIONS: {"prompt": [97, 98], "logprobs": 1} | asks,
        CHAT: {"messages": USER, "logprobs": True, "top_logprobs": 1} | asks,
    }
    names = [f"token_id:{token_id}" for token_id in ids]
    async with api(engine) as server:
        for path, body in bodies.items():
            answer = (await server.post(path, body)).json()
            (choice,) = answer["choices"]
            assert choice["token_ids"] == ids
            prompt_ids = unpack_ids(engine.of_type(Generate)[-1].prompt_ids).tolist()
            assert (answer if path == CHAT else choice)["prompt_token_ids"] == prompt_ids
            chunks = events(await server.post(path, body | {"stream": True}))
            streamed = [chunk["choices"][0] for chunk in chunks]
            assert [token_id for part in streamed for token_id in part.get("token_ids", ())] == ids
            told = [it["prompt_token_ids"] for it in (chunks if path == CHAT else streamed) if "prompt_token_ids" in it]
            assert told == [prompt_ids], "once"
            if path == CHAT:
                content = choice["logprobs"]["content"]
                assert [entry["token"] for entry in content] == names
                assert all(top["token"].startswith("token_id:") for entry in content for top in entry["top_logprobs"])
            else:
                assert choice["logprobs"]["tokens"] == names
                assert choice["logprobs"]["text_offset"][:4] == [0, 1, 2, 3], "characters of the text, not of names"
                assert all(name.startswith("token_id:") for top in choice["logprobs"]["top_logprobs"] for name in top)
            plain = (await server.post(path, body | dict.fromkeys(asks))).json()
            assert "token_ids" not in plain["choices"][0] and "prompt_token_ids" not in plain


async def test_echo_with_logprobs_scores_the_prompt(engine: ScriptedEngine) -> None:
    """What lm-eval sends: token ids, echo, logprobs 1, one new token; the first entry is null."""
    a, b, c = TOKENIZER.encode("abc")
    body = {
        "prompt": [[a, b, c]],
        "echo": True,
        "logprobs": 1,
        "max_tokens": 1,
        "temperature": 0,
        "seed": 1234,
    }
    async with api(engine) as server:
        (choice,) = (await server.post(COMPLETIONS, body)).json()["choices"]
        streamed = events(await server.post(COMPLETIONS, body | {"stream": True}))
    assert choice["text"] == "abca"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c", "a"]
    assert logprobs["token_logprobs"] == [None, -b / 100, -c / 100, -a / 100]
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][1] == {TOKENIZER.token_text(1): -0.01, "b": -b / 100}
    assert streamed[0]["choices"][0]["logprobs"] == logprobs
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == "abca"
    assert engine.of_type(Generate)[0].logprobs == LogprobParams(top=1, prompt_start=0)


async def test_echo_alone_repeats_the_prompt(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        body = {"prompt": ["ab", "c"], "echo": True, "max_tokens": 1, "n": 2}
        choices = (await server.post(COMPLETIONS, body)).json()["choices"]
        assert [choice["text"] for choice in choices] == ["aba", "aba", "cc", "cc"]
        only = (await server.post(COMPLETIONS, {"prompt": "ab", "echo": True, "max_tokens": 0})).json()
        assert only["choices"][0]["text"] == "ab"


async def test_models(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        listed = (await server.http.get("/v1/models")).json()
        assert listed["object"] == "list"
        (card,) = listed["data"]
        assert {"id": MODEL, "object": "model", "root": MODEL, "max_model_len": 256}.items() <= card.items()
        assert isinstance(card["created"], int)
        assert (await server.http.get(f"/v1/models/{MODEL}")).json() == card, "names may hold a slash"
