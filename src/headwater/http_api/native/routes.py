"""Routes of the native API (SGLang's): generate, tokenize, detokenize."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from headwater.generation.answer_fields import json_bytes
from headwater.generation.chat_prompts import check_no_chat_fields, encode_messages
from headwater.generation.errors import bad_request
from headwater.generation.native_schemas import DetokenizeRequest, GenerateRequest
from headwater.generation.prompt_schemas import TokenizeRequest
from headwater.generation.token_arrays import first_outside
from headwater.http_api.json_body import JsonRoute
from headwater.http_api.services import InjectedServices
from headwater.http_api.sse import JSON, STREAM_RESPONSES, EventStream, while_connected

router = APIRouter(route_class=JsonRoute, tags=["native"])


@router.post("/generate", summary="Continue prompts", operation_id="generate", responses=STREAM_RESPONSES)
@router.put("/generate", summary="Continue prompts", operation_id="generate_put", responses=STREAM_RESPONSES)
async def generate(body: GenerateRequest, request: Request, services: InjectedServices) -> Response:
    """Continue one prompt or a batch, text or token ids. Each event of a stream repeats the text so far.

    A client that disconnects aborts its request.
    """
    batch = await services.native_api.start(body)
    if body.stream:
        return EventStream(batch.events(), close=batch.close)
    try:
        answer = await while_connected(batch.collect(), request.receive)
    finally:
        batch.close()
    return Response(json_bytes(answer), media_type=JSON)


@router.post("/tokenize", summary="Encode text")
@router.post("/v1/tokenize", include_in_schema=False)
async def tokenize(body: TokenizeRequest, services: InjectedServices) -> Response:
    """The token ids that a request with this `prompt`, list of prompts or chat `messages` would run with."""
    generator, model = services.generator, services.model
    prompt = body.prompt if body.prompt is not None else body.text
    if (prompt is None) == (body.messages is None) or (body.prompt is not None and body.text is not None):
        raise bad_request("prompt", "prompt: exactly one of prompt (or text) and messages is needed")
    if prompt is None:
        tokens: Any = await encode_messages(body, generator)
    else:
        check_no_chat_fields(body, param="prompt")
        tokens = [
            await generator.encode(
                text,
                param="prompt",
                add_special_tokens=body.add_special_tokens is not False,
                parse_special_tokens=body.parse_special_tokens,
            )
            for text in (prompt if isinstance(prompt, list) else [prompt])
        ]
        tokens = tokens if isinstance(prompt, list) else tokens[0]
    count = [len(ids) for ids in tokens] if isinstance(prompt, list) else len(tokens)
    answer = {"tokens": tokens, "count": count, "max_model_len": model.max_context}
    return Response(json_bytes(answer), media_type=JSON)


@router.post("/detokenize", summary="Decode token ids")
@router.post("/v1/detokenize", include_in_schema=False)
async def detokenize(body: DetokenizeRequest, services: InjectedServices) -> Response:
    """The text of `tokens`, or of each of several lists."""
    tokenizer, model = services.generator.tokenizer, services.model
    lists = body.tokens if body.tokens and isinstance(body.tokens[0], list) else [body.tokens]
    texts: list[str] = []
    for ids in lists:
        if (outside := first_outside(ids, model.vocab_size)) is not None:  # type: ignore[arg-type]
            message = f"tokens: token ids must be from 0 to {model.vocab_size - 1}, got {outside}"
            raise bad_request("tokens", message)
        texts.append(tokenizer.decode(ids, skip_special_tokens=body.skip_special_tokens))  # type: ignore[arg-type]
    is_many = lists is body.tokens
    return Response(json_bytes({"text": texts if is_many else texts[0]}), media_type=JSON)
