"""Request fields of SGLang, vLLM or OpenAI that this server does not honour: which are refused, which ignored.

A field that a body's schema declares is honoured, whatever this table says. To add one, declare it there and remove
its line here. Checked against SGLang 0.5.23 (`GenerateReqInput`, `SamplingParams`, `openai/protocol.py`) and vLLM 0.33
(`openai/*/protocol.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Refused:
    """A field that would change the answer. Null and the `neutral` values are accepted."""

    why: str
    neutral: tuple[Any, ...] = ()
    is_empty_neutral: bool = True  # false, "", [] and {} are accepted as well
    is_of_prompt: bool = False  # changes the prompt: also refused where prompts are only encoded or cached


def _each(names: str, refused: Refused) -> dict[str, Refused]:
    return dict.fromkeys(names.split(), refused)


_NOT_REPORTED = Refused("the answer cannot tell this", neutral=(0,))
_MEDIA = Refused("this server takes text only", is_of_prompt=True)
_DISAGGREGATED = Refused("prefill and decode run in one server here", neutral=({}, ""), is_empty_neutral=False)

REFUSED: Mapping[str, Refused] = {
    **_each("lora_path lora_id lora_name", Refused("name the adapter in model or lora_path", is_of_prompt=True)),
    **_each("image_data video_data audio_data mm_hashes mm_content_hashes", _MEDIA),
    **_each("input_embeds prompt_embeds positional_embed_overrides", Refused("prompts are tokens", is_of_prompt=True)),
    "audio": _MEDIA,
    "modalities": Refused(_MEDIA.why, neutral=(["text"],)),
    "session_params": Refused("sessions are not kept; send the whole prompt", is_of_prompt=True),
    "chat_template": Refused("the model's own template is used", is_of_prompt=True),
    "thinking": Refused("set the template's own switch in chat_template_kwargs", is_of_prompt=True),
    "task": Refused("the template has no tasks", is_of_prompt=True),
    "truncate_prompt_tokens": Refused("a prompt that is too long is refused, never cut", is_of_prompt=True),
    "web_search_options": Refused("nothing is searched"),
    "functions": Refused("this is the old name of tools", is_of_prompt=True),
    "function_call": Refused("this is the old name of tool_choice", neutral=("none", "auto")),
    # how tokens are chosen
    **_each(
        "json_schema guided_json",  # {} is a schema: any JSON
        Refused("/generate takes sampling_params.json_schema", neutral=("",), is_empty_neutral=False),
    ),
    "require_reasoning": Refused("a grammar of /generate begins with the first token"),
    **_each("custom_logit_processor logits_processors vllm_xargs", Refused("requests bring no code")),
    **_each("watermark watermarking", Refused("no text is marked")),
    **_each("allowed_token_ids bad_words", Refused("use logit_bias")),
    "use_beam_search": Refused("there is no beam search", neutral=(0,)),
    "beam_width": Refused("there is no beam search", neutral=(0, 1)),
    "best_of": Refused("use n", neutral=(0, 1)),
    "length_penalty": Refused("there is no beam search", neutral=(1.0,)),
    "repetition_detection": Refused("use max_tokens or stop"),
    **_each(
        "max_thinking_tokens max_reasoning_tokens thinking_token_budget",
        Refused("only chats separate thinking from the answer", neutral=(-1,), is_empty_neutral=False),
    ),
    "include_reasoning": Refused(
        "only chats separate thinking from the answer", neutral=(True,), is_empty_neutral=False
    ),
    "verbosity": Refused("say it in the prompt", neutral=("medium",)),
    # what the answer reports
    "echo": Refused("only /v1/completions repeats its prompt", neutral=(0,)),
    "suffix": Refused("text is continued, never inserted"),
    **_each("return_hidden_states return_routed_experts return_indexer_topk return_bytes", _NOT_REPORTED),
    **_each("return_entropy return_sampling_mask sampling_logprobs_mode return_flat_raw_top_logprobs", _NOT_REPORTED),
    **_each("return_flat_raw_output_top_logprobs return_meta_info", _NOT_REPORTED),
    **_each("return_token_ids return_prompt_token_ids return_tokens_as_token_ids", _NOT_REPORTED),
    **_each("return_input_ids_in_sglext return_output_ids_in_sglext return_weight_versions", _NOT_REPORTED),
    **_each("return_token_offsets return_prompt_text return_token_strs", _NOT_REPORTED),
    "prompt_logprobs": Refused("use echo with logprobs (/v1/completions), or logprob_start_len (/generate)",
                               is_empty_neutral=False),
    "logprob_token_ids": Refused("use token_ids_logprob of /generate"),
    "multi_item_delimiter_indices": Refused("items are scored one by one"),
    "token_indices_to_pool": Refused("nothing is pooled"),
    # where it is computed
    **_each("bootstrap_host bootstrap_port bootstrap_room bootstrap_pair_key", _DISAGGREGATED),
    **_each("disagg_prefill_dp_rank decode_tp_size kv_transfer_params ec_transfer_params", _DISAGGREGATED),
}  # fmt: skip


REFUSED_OF_PROMPTS = {name: refused for name, refused in REFUSED.items() if refused.is_of_prompt}


def _same(names: str, why: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), why)


# Name -> why an answer is the same without it.
IGNORED: Mapping[str, str] = {
    **_same("user safety_identifier metadata store service_tier", "for the provider's own books"),
    **_same("prompt_cache_key prompt_cache_retention", "prefixes are cached anyway; cache_salt keeps tenants apart"),
    **_same("log_metrics no_logs custom_labels external_trace_header received_time", "for logs and traces"),
    **_same("session_id conversation_id routing_key request_id", "names for routers; rid names a request here"),
    **_same("http_worker_ipc need_wait_for_mm_inputs num_items_assigned", "internal to SGLang"),
    **_same("stream_options", "usage is in meta_info"),
    **_same("background", "a request runs as long as its client listens"),
    **_same("kv_hints", "hints to the cache"),
    **_same("prediction", "a hint for speed"),
    **_same("stream_interval", "how a text is cut into chunks"),
    **_same("spaces_between_special_tokens", "no spaces are ever added there"),
    **_same("custom_params", "read by a custom_logit_processor only, which is refused"),
    **_same("guided_decoding_backend", "one library runs all grammars"),
    **_same("return_spec_tokens_details", "meta_info has the counts"),
    **_same("routed_experts_start_len routed_experts_prompt_start", "go with return_routed_experts"),
    **_same("return_flat_raw_top_logprobs_b64", "goes with return_flat_raw_output_top_logprobs"),
    **_same("truncation_side", "goes with truncate_prompt_tokens"),
    **_same("use_audio_in_video video_config images_config mm_processor_kwargs media_io_kwargs", "go with media"),
    **_same("max_dynamic_patch min_dynamic_patch image_max_dynamic_patch video_max_dynamic_patch", "go with media"),
    **_same("encoder_urls mm_payload return_mm_kwargs", "go with media"),
}

# Names of other routes and servers, and the name here.
_GRAMMARS = {
    "guided_regex": "regex",
    "guided_grammar": "ebnf",
    "guided_choice": "regex",
    "structured_outputs": "json_schema, regex, ebnf or structural_tag",
    "response_format": "json_schema",
    "guided_whitespace_pattern": "json_schema",
}
OTHER_NAMES_IN_SAMPLING_PARAMS = _GRAMMARS | {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
    "stop_sequences": "stop",
    "include_stop_str_in_output": "no_stop_trim",
}
OTHER_NAMES_IN_GENERATE = {name: f"sampling_params.{meant}" for name, meant in _GRAMMARS.items()} | {
    "prompt": "text",
    "messages": "text (messages are taken by /v1/chat/completions)",
    "parameters": "sampling_params",
    "tools": "text (tools are taken by /v1/chat/completions)",
    "seed": "sampling_params.sampling_seed",
    "max_tokens": "sampling_params.max_new_tokens",
    "logprobs": "return_logprob",
    "top_logprobs": "top_logprobs_num",
}
OTHER_NAMES_IN_OPENAI = {
    "sampling_params": "the parameter itself, at the top of the body",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "sampling_seed": "seed",
    "stop_sequences": "stop",
    "text": "prompt",
    "return_logprob": "logprobs",
}
OTHER_NAMES_IN_COMPLETIONS = OTHER_NAMES_IN_OPENAI | {
    "max_completion_tokens": "max_tokens",
    "messages": "prompt (messages are taken by /v1/chat/completions)",
    "tools": "prompt (tools are taken by /v1/chat/completions)",
    "top_logprobs": "logprobs",
}
OTHER_NAMES_IN_CHAT = OTHER_NAMES_IN_OPENAI | {
    "prompt": "messages",
    "text": "messages",
    "input_ids": "prompt of /v1/completions",
}
