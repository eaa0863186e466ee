"""Routes of Anthropic's API: messages, and the number of tokens in their prompts."""

import uuid

from fastapi import APIRouter, Request
from starlette.responses import Response

from headwater.generation.answer_fields import json_bytes
from headwater.http_api.anthropic.answer import ANTHROPIC_STREAM, MessagesAnswer
from headwater.http_api.anthropic.conversion import RENAMED, hides_thinking, prompt_fields, request_fields
from headwater.http_api.anthropic.schemas import CountTokensRequest, MessagesRequest
from headwater.http_api.json_body import JsonRoute
from headwater.http_api.openai.conversation import chat_request, count_prompt, start_reply
from headwater.http_api.services import InjectedServices
from headwater.http_api.sse import JSON, STREAM_RESPONSES, EventStream, while_connected

router = APIRouter(route_class=JsonRoute, prefix="/v1", tags=["anthropic"])


@router.post("/messages", summary="Answer a conversation (Anthropic)", responses=STREAM_RESPONSES)
async def create_message(body: MessagesRequest, request: Request, services: InjectedServices) -> Response:
    """Anthropic's messages, with `stream` as server-sent events. A client that disconnects aborts its request."""
    id = body.rid or f"msg_{uuid.uuid4().hex}"
    fields = request_fields(body, thinks=services.generator.formats.reasoning is not None)
    reply = await start_reply(chat_request(fields, RENAMED), id, services, RENAMED)
    answer = MessagesAnswer(
        id,
        services.model.served_name,
        reply,
        max_tokens=body.max_tokens,
        hides_thinking=hides_thinking(body),
    )
    if body.stream:
        return EventStream(answer.events(), close=answer.close, form=ANTHROPIC_STREAM)
    try:
        message = await while_connected(answer.collect(), request.receive)
    finally:
        answer.close()
    return Response(json_bytes(message), media_type=JSON)


@router.post("/messages/count_tokens", summary="Count the tokens of a prompt (Anthropic)")
async def count_tokens(body: CountTokensRequest, services: InjectedServices) -> Response:
    """The tokens that a message with these fields would have as its prompt, `tools` and `system` included."""
    chat = chat_request(prompt_fields(body) | {"model": body.model, "max_reasoning_tokens": None}, RENAMED)
    counted = await count_prompt(chat, services, RENAMED)
    return Response(json_bytes({"input_tokens": counted}), media_type=JSON)
