"""Computes prefixes ahead of the requests that begin with them, for warming and pinning."""

import uuid
from dataclasses import dataclass
from typing import Any

from headwater.generation.answer_fields import Json, cached_tokens, cached_tokens_details
from headwater.generation.chat_prompts import check_no_chat_fields, encode_messages
from headwater.generation.errors import adapter_not_found, bad_request
from headwater.generation.sampling import check_prompt
from headwater.generation.text_generation import TextGeneration, run_all
from headwater.generation.text_request import TextRequest
from headwater.http_api.control.schemas_cache import Prefixes
from headwater.http_api.services import Services
from headwater.messages.base import TokenArray
from headwater.messages.generation import RequestOptions, SamplingParams

_PREFILL_ONLY = SamplingParams(max_new_tokens=0, temperature=0.0)


@dataclass(frozen=True, slots=True)
class EncodedPrefixes:
    """Checked token ids of each prefix, and whether they came as a list."""

    prompts: list[TokenArray]
    is_batch: bool


async def encode_prefixes(body: Prefixes, services: Services) -> EncodedPrefixes:
    """Token ids of the prefixes in the body. InvalidRequest names the parameter."""
    named = [name for name in ("text", "messages", "input_ids") if getattr(body, name) is not None]
    if len(named) != 1:
        raise bad_request("text", "text: exactly one of text, messages and input_ids is needed")
    (param,) = named
    if body.lora_path and body.lora_path not in services.model.adapters():
        raise adapter_not_found(body.lora_path)
    if param != "messages":
        check_no_chat_fields(body, param=param)
    prompts, is_batch = await _prompts(body, param, services)
    most = services.state.limits.max_batch
    if not 1 <= len(prompts) <= most:
        raise bad_request(param, f"{param}: a batch must hold 1 to {most} prefixes, got {len(prompts)}")
    checked = [check_prompt(prompt, services.model, param=param, is_prefill=True) for prompt in prompts]
    return EncodedPrefixes(checked, is_batch)


async def compute(
    prompts: list[TokenArray], body: Prefixes, services: Services, *, engine: int | None, priority: int
) -> list[Json]:
    """Bring each prefix into the cache of one engine. Returns per prefix how much was cached and how much computed.

    Each prefix is a request without a token to generate: it matches, restores, prefetches and computes as usual.
    """
    generations: list[TextGeneration] = []
    try:
        with services.generator.together():
            for prompt in prompts:
                request = TextRequest(
                    rid=f"prefix-{uuid.uuid4().hex}",
                    prompt_ids=prompt,
                    sampling=_PREFILL_ONLY,
                    options=RequestOptions(
                        priority=priority,
                        cache_salt=body.cache_salt,
                        extra_key=body.extra_key,
                        lora_name=body.lora_path or "",
                    ),
                    engine=engine,
                )
                generations.append(services.generator.start(request))
        await run_all(generations)
        return [_facts(generation) for generation in generations]
    finally:
        for generation in generations:
            generation.close()


def target_engines(body: Prefixes, services: Services) -> list[int]:
    """Indices of the engines that the body names. InvalidRequest for an engine that does not exist."""
    num_engines = services.state.client.num_engines
    if body.routed_dp_rank is None:
        return list(range(num_engines))
    if not 0 <= body.routed_dp_rank < num_engines:
        message = f"routed_dp_rank: must be from 0 to {num_engines - 1}, got {body.routed_dp_rank}"
        raise bad_request("routed_dp_rank", message)
    return [body.routed_dp_rank]


async def _prompts(body: Prefixes, param: str, services: Services) -> tuple[list[list[int]], bool]:
    if param == "input_ids":
        ids = body.input_ids or []
        is_batch = bool(ids) and isinstance(ids[0], list)
        return (ids, True) if is_batch else ([ids], False)  # type: ignore[return-value]
    if param == "messages":
        return [await encode_messages(body, services.generator)], False
    is_batch = isinstance(body.text, list)
    texts: Any = body.text if is_batch else [body.text]
    prompts = [
        await services.generator.encode(
            text,
            param="text",
            add_special_tokens=body.add_special_tokens is not False,
            parse_special_tokens=body.parse_special_tokens,
        )
        for text in texts
    ]
    return prompts, is_batch


def _facts(generation: TextGeneration) -> Json:
    num_prompt, num_cached = generation.num_prompt_tokens, cached_tokens(generation.meta)
    return {
        "prompt_tokens": num_prompt,
        "cached_tokens": num_cached,
        "cached_tokens_details": cached_tokens_details(generation.meta),
        "computed_tokens": num_prompt - num_cached,
        "dp_rank": generation.engine,
    }
