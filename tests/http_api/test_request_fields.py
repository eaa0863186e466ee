"""No field that changes an answer is ignored: each that other servers know is honoured, refused, or harmless."""

from typing import Any

import pytest
from api_under_test import api, error_of

from headwater.generation.field_table import IGNORED, REFUSED, REFUSED_OF_PROMPTS
from headwater.generation.native_schemas import GenerateRequest, SamplingInput
from headwater.generation.prompt_schemas import TokenizeRequest
from headwater.http_api.openai.schemas import ChatCompletionRequest, CompletionRequest
from headwater.messages.generation import Generate
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]

# names of request fields, read from the released packages
SGLANG_GENERATE = """rid session_id text input_ids input_embeds image_data video_data audio_data
    mm_hashes mm_content_hashes use_audio_in_video video_config sampling_params watermark
    return_logprob logprob_start_len top_logprobs_num token_ids_logprob return_sampling_mask
    sampling_logprobs_mode return_text_in_logprobs return_flat_raw_top_logprobs
    return_flat_raw_output_top_logprobs return_flat_raw_top_logprobs_b64 stream log_metrics
    return_hidden_states return_routed_experts routed_experts_start_len return_indexer_topk
    modalities session_params lora_path lora_id custom_logit_processor positional_embed_overrides
    bootstrap_host bootstrap_port bootstrap_room bootstrap_pair_key decode_tp_size routed_dp_rank
    data_parallel_rank disagg_prefill_dp_rank routing_key conversation_id http_worker_ipc background
    require_reasoning max_thinking_tokens priority extra_key no_logs custom_labels return_bytes
    return_entropy return_prompt_token_ids external_trace_header received_time
    need_wait_for_mm_inputs num_items_assigned encoder_urls max_dynamic_patch min_dynamic_patch
    image_max_dynamic_patch video_max_dynamic_patch images_config mm_processor_kwargs
    multi_item_delimiter_indices token_indices_to_pool cache_salt kv_hints""".split()
SGLANG_SAMPLING = """max_new_tokens stop stop_token_ids stop_regex temperature top_p top_k min_p
    frequency_penalty presence_penalty repetition_penalty min_new_tokens n beam_width json_schema
    regex ebnf structural_tag ignore_eos skip_special_tokens spaces_between_special_tokens
    no_stop_trim stream_interval logit_bias sampling_seed custom_params watermark""".split()
SGLANG_OPENAI = """model frequency_penalty logit_bias logprobs n presence_penalty seed stop stream
    stream_options temperature top_p user return_hidden_states return_routed_experts
    routed_experts_start_len return_cached_tokens_details return_spec_tokens_details
    return_token_ids top_k min_p min_tokens regex ebnf repetition_penalty stop_token_ids stop_regex
    no_stop_trim ignore_eos skip_special_tokens lora_path session_id session_params response_format
    custom_params custom_logit_processor watermark images_config mm_processor_kwargs
    data_parallel_rank rid extra_key cache_salt priority bootstrap_host bootstrap_port
    bootstrap_room routed_dp_rank disagg_prefill_dp_rank""".split()
SGLANG_COMPLETION = "prompt best_of echo max_tokens suffix json_schema custom_labels".split()
SGLANG_CHAT = """messages top_logprobs max_tokens max_completion_tokens tools tool_choice
    parallel_tool_calls return_prompt_token_ids return_meta_info return_input_ids_in_sglext
    return_output_ids_in_sglext return_sampling_mask sampling_logprobs_mode
    return_flat_raw_output_top_logprobs return_flat_raw_top_logprobs_b64 reasoning_effort thinking
    task continue_final_message separate_reasoning stream_reasoning chat_template_kwargs
    max_dynamic_patch min_dynamic_patch use_audio_in_video video_config""".split()
VLLM_OPENAI = """model frequency_penalty logit_bias logprobs n presence_penalty response_format
    seed stop stream stream_options temperature top_p thinking_token_budget user use_beam_search
    top_k min_p repetition_penalty watermarking length_penalty stop_token_ids
    include_stop_str_in_output ignore_eos min_tokens skip_special_tokens
    spaces_between_special_tokens truncate_prompt_tokens truncation_side prompt_logprobs
    logprob_token_ids allowed_token_ids bad_words echo add_special_tokens structured_outputs
    priority request_id session_id return_tokens_as_token_ids return_token_ids
    return_weight_versions routed_experts_prompt_start return_token_offsets mm_payload
    return_mm_kwargs cache_salt kv_transfer_params ec_transfer_params vllm_xargs
    repetition_detection stream_interval guided_json guided_regex guided_choice guided_grammar
    guided_decoding_backend guided_whitespace_pattern logits_processors""".split()
VLLM_COMPLETION = "prompt max_tokens suffix prompt_embeds best_of".split()
VLLM_CHAT = """messages top_logprobs max_tokens max_completion_tokens tools tool_choice
    reasoning_effort include_reasoning parallel_tool_calls add_generation_prompt
    continue_final_message documents chat_template chat_template_kwargs media_io_kwargs
    mm_processor_kwargs return_prompt_text""".split()
OPENAI_CHAT = """audio function_call functions metadata modalities prediction prompt_cache_key
    prompt_cache_retention safety_identifier service_tier store verbosity web_search_options""".split()
TOKENIZE = """model prompt messages tools tool_choice reasoning_effort continue_final_message
    chat_template_kwargs add_special_tokens add_generation_prompt return_token_strs chat_template
    media_io_kwargs mm_processor_kwargs""".split()


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (GenerateRequest, SGLANG_GENERATE),
        (SamplingInput, SGLANG_SAMPLING),
        (CompletionRequest, SGLANG_OPENAI + SGLANG_COMPLETION + VLLM_OPENAI + VLLM_COMPLETION),
        (ChatCompletionRequest, SGLANG_OPENAI + SGLANG_CHAT + VLLM_OPENAI + VLLM_CHAT + OPENAI_CHAT),
        (TokenizeRequest, TOKENIZE),
    ],
)
async def test_every_field_of_the_others_is_decided(body: Any, names: list[str]) -> None:
    known = set(body.model_fields) | REFUSED.keys() | IGNORED.keys()
    assert [name for name in names if name not in known] == []


async def test_the_tables_do_not_contradict_each_other() -> None:
    assert not REFUSED.keys() & IGNORED.keys()
    for body in (GenerateRequest, SamplingInput, CompletionRequest, ChatCompletionRequest, TokenizeRequest):
        assert not set(body.model_fields) & IGNORED.keys() - {"stream_options"}
        assert not set(body.model_fields) & body.names.other_names.keys()


ASKS = {
    "image_data": "http://127.0.0.1/x.png", "input_embeds": [[0.1]],
    "session_params": {"id": "1"}, "custom_logit_processor": "{}", "return_hidden_states": True,
    "return_routed_experts": True, "bootstrap_room": 0, "disagg_prefill_dp_rank": 0, "max_thinking_tokens": 0,
    "prompt_logprobs": 0, "require_reasoning": True, "lora_id": [None, "a"], "length_penalty": 0.5,
    "use_beam_search": True, "beam_width": 2, "include_reasoning": False,
    "return_prompt_text": True, "modalities": ["text", "audio"],
    "allowed_token_ids": [1], "bad_words": ["x"], "truncate_prompt_tokens": 5, "chat_template": "{{ 1 }}",
}  # fmt: skip
ASKS_FOR_NOTHING: dict[str, list[Any]] = {
    "lora_path": [None, ""], "image_data": [None, [], [[]]], "return_hidden_states": [False, None, 0],
    "guided_json": [None, ""], "regex": [None, ""], "structured_outputs": [None, {}], "length_penalty": [None, 1.0],
    "use_beam_search": [False], "beam_width": [None, 1], "max_thinking_tokens": [None, -1],
    "include_reasoning": [True, None], "modalities": [["text"], None, []], "session_params": [None, {}],
    "bootstrap_host": [None, ""], "routed_experts_start_len": [0, None], "spaces_between_special_tokens": [False, True],
}  # fmt: skip


async def test_an_adapter_that_is_not_loaded_is_a_404(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        for path, body in (
            ("/generate", {"text": "a", "lora_path": "policy-v7"}),
            ("/generate", {"text": ["a", "b"], "lora_path": [None, "policy-v7"]}),
            (CHAT, {"messages": USER, "lora_path": "policy-v7"}),
            ("/v1/completions", {"prompt": "a", "lora_path": "policy-v7"}),
        ):
            response = await server.post(path, body)
            error = error_of(response)
            assert (response.status_code, error["param"], error["code"]) == (404, "lora_path", "model_not_found"), body
        response = await server.post("/generate", {"text": "a", "lora_path": ["one"]})
        assert (response.status_code, error_of(response)["param"]) == (400, "lora_path")


async def test_what_changes_the_answer_and_is_not_honoured_is_a_400_that_names_it(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        for name, value in ASKS.items():
            for path, body, param in (
                ("/generate", {"text": "a", name: value}, name),
                ("/generate", {"text": "a", "sampling_params": {name: value}}, f"sampling_params.{name}"),
                (CHAT, {"messages": USER, name: value}, name),
                ("/v1/completions", {"prompt": "a", name: value}, name),
            ):
                if path == CHAT and name in ChatCompletionRequest.model_fields:
                    continue  # honoured there
                response = await server.post(path, body)
                assert response.status_code == 400, (path, body)
                error = error_of(response)
                assert (error["param"], error["code"]) == (param, "unsupported_parameter"), body
                assert error["message"].startswith(f"{param}: not supported"), body
    assert engine.of_type(Generate) == []


async def test_fields_that_ask_for_nothing_pass(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        for name, values in ASKS_FOR_NOTHING.items():
            for value in values:
                for path, body in (
                    ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 1}, name: value}),
                    (CHAT, {"messages": USER, "max_tokens": 1, name: value}),
                    ("/v1/completions", {"prompt": "a", "max_tokens": 1, name: value}),
                ):
                    response = await server.post(path, body)
                    assert response.status_code == 200, (body, response.text)


async def test_routes_that_encode_refuse_what_changes_the_prompt_and_pass_the_rest(engine: ScriptedEngine) -> None:
    """So the body of a chat can be sent to /tokenize, /cache/warm and /cache/pin as it is."""
    async with api(engine) as server:
        for name, value in ASKS.items():
            response = await server.post("/tokenize", {"messages": USER, name: value, "temperature": 0})
            assert response.status_code == (400 if name in REFUSED_OF_PROMPTS else 200), name
            response = await server.post("/cache/warm", {"messages": USER, name: value, "temperature": 0})
            assert response.status_code == (400 if name in REFUSED_OF_PROMPTS else 200), name


async def test_unknown_names_pass_at_the_top_unless_they_look_misspelt(engine: ScriptedEngine) -> None:
    body = {"messages": USER, "max_tokens": 1}
    async with api(engine) as server:
        many = {f"x_gateway_{number}": number for number in range(500)}
        assert (await server.post(CHAT, body | many | {"x" * 10_000: 1})).status_code == 200
        for name in ("max_token", "temprature", "cache_sal", "logprob", "stop_token_id"):
            response = await server.post(CHAT, body | {name: 1})
            assert response.status_code == 400
            assert error_of(response)["param"] == name
            assert "did you mean" in error_of(response)["message"]
        response = await server.post("/pause_generation", {"mod": "in_place"})
        assert response.status_code == 400, "a pause in the default mode would abort everybody"
