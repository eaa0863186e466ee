"""Options of /generate that the text layer or a batch's bodies decide."""

import pytest
from api_under_test import api, error_of, events, saying, until

from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio


async def test_a_stop_expression_ends_the_answer_and_the_request_on_both_apis(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("id 17: done id 4711: never")
    pattern = r"\d{3,}:"
    given = {"stop_regex": [r"x\d", pattern], "max_new_tokens": 200}
    async with api(engine) as server:
        one = (await server.post("/generate", {"text": "a", "sampling_params": given})).json()
        streamed = events(await server.post("/generate", {"text": "a", "sampling_params": given, "stream": True}))
        kept = {"text": "a", "sampling_params": {"stop_regex": pattern, "no_stop_trim": True}}
        assert (await server.post("/generate", kept)).json()["text"] == "id 17: done id 4711:"
        body = {"prompt": "a", "stop_regex": pattern, "max_tokens": 200}
        choice = (await server.post("/v1/completions", body)).json()["choices"][0]
        refused = await server.post("/v1/completions", body | {"stop_regex": r"(a)\1"})
        await until(lambda: engine.num_running == 0)
    assert one["text"] == streamed[-1]["text"] == choice["text"] == "id 17: done id "
    assert one["meta_info"]["finish_reason"] == {"type": "stop", "matched": pattern}
    assert (choice["finish_reason"], choice["matched_stop"]) == ("stop", pattern)
    assert all("4" not in chunk["text"] for chunk in streamed), "text that may become a match is held back"
    assert (refused.status_code, error_of(refused)["param"]) == (400, "stop_regex")


async def test_ids_whose_logprobs_are_asked_for_may_differ_in_a_batch(engine: ScriptedEngine) -> None:
    body = {"text": ["ab", "cd"], "sampling_params": {"max_new_tokens": 1, "n": 2}, "return_logprob": True}
    async with api(engine) as server:
        answers = (await server.post("/generate", body | {"token_ids_logprob": [[4], [5, 6]]})).json()
        same = (await server.post("/generate", body | {"token_ids_logprob": [7]})).json()
        for wrong in ([[4]], [[4], [99999]], [[4], 5]):
            refused = await server.post("/generate", body | {"token_ids_logprob": wrong})
            assert refused.status_code == 400
    asked = [[entry[1] for entry in it["meta_info"]["output_token_ids_logprobs"][0]] for it in answers]
    assert asked == [[4], [4], [5, 6], [5, 6]]
    assert [it["meta_info"]["output_token_ids_logprobs"][0][0][1] for it in same] == [7] * 4
