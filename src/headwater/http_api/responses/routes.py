"""Routes of OpenAI's responses: create, show, list the input, delete."""

import uuid
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from headwater.generation.answer_fields import Json, json_bytes
from headwater.generation.errors import bad_request, unsupported
from headwater.http_api.json_body import JsonRoute
from headwater.http_api.openai.conversation import chat_request, count_prompt, start_reply
from headwater.http_api.openai.format import ChatLogprobs
from headwater.http_api.response_store import Namespace
from headwater.http_api.responses.answer import RESPONSES_STREAM, ResponseAnswer, echoed, encoded
from headwater.http_api.responses.conversion import RENAMED, has_logprobs, request_fields
from headwater.http_api.responses.input_items import chat_messages, listed_items
from headwater.http_api.responses.schemas import ResponsesRequest
from headwater.http_api.services import InjectedServices, Services
from headwater.http_api.sse import JSON, STREAM_RESPONSES, EventStream, while_connected

router = APIRouter(route_class=JsonRoute, prefix="/v1/responses", tags=["openai"])
NOT_STORED: dict[int | str, dict[str, Any]] = {404: {"description": "The response is not stored any more."}}


@router.post("", summary="Answer an input", responses=STREAM_RESPONSES | NOT_STORED)
async def create_response(body: ResponsesRequest, request: Request, services: InjectedServices) -> Response:
    """OpenAI's responses, with `stream` as numbered server-sent events. A client that disconnects aborts its request.

    `previous_response_id` goes on from a response that this server's memory still holds.
    """
    id = f"resp_{uuid.uuid4().hex}"
    answer = await _start(id, body, services)
    if body.stream:
        return EventStream(answer.events(), close=answer.close, form=RESPONSES_STREAM)
    try:
        response = await while_connected(answer.collect(), request.receive)
    finally:
        answer.close()
    return Response(json_bytes(response), media_type=JSON)


@router.post("/input_tokens", summary="Count the tokens of an input", responses=NOT_STORED)
async def count_input_tokens(body: ResponsesRequest, services: InjectedServices) -> Response:
    """The tokens that a response with these fields would have as its prompt. Takes the body of a response."""
    chat = chat_request(request_fields(body, _messages(body, services)), RENAMED)
    counted = await count_prompt(chat, services, RENAMED)
    return Response(json_bytes({"object": "response.input_tokens", "input_tokens": counted}), media_type=JSON)


@router.get("/{response_id}", summary="Show a stored response", responses=NOT_STORED)
async def get_response(
    response_id: str,
    services: InjectedServices,
    stream: Annotated[bool, Query(description="Not supported: a stream cannot be read again.")] = False,
) -> Response:
    """The response as it was answered."""
    if stream:
        raise unsupported("stream", "stream: not supported here: a stream cannot be read again")
    return Response(services.responses.get(response_id, account=services.account).response, media_type=JSON)


@router.get("/{response_id}/input_items", summary="List the input of a stored response", responses=NOT_STORED)
async def list_input_items(
    response_id: str,
    services: InjectedServices,
    limit: Annotated[int, Query(ge=1, le=100, description="Most items in the answer.")] = 20,
    order: Annotated[Literal["asc", "desc"], Query(description="Oldest or newest first.")] = "desc",
    after: Annotated[str | None, Query(description="Id of the item after which the list begins.")] = None,
) -> Response:
    """The items of the request itself, without those of earlier responses."""
    items = msgspec.json.decode(services.responses.get(response_id, account=services.account).input_items)
    if order == "desc":
        items.reverse()
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise bad_request("after", f"after: the list has no item {after!r}")
        items = items[ids.index(after) + 1 :]
    shown = items[:limit]
    page = {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(items) > limit,
    }
    return Response(json_bytes(page), media_type=JSON)


@router.delete("/{response_id}", summary="Forget a stored response", responses=NOT_STORED)
async def delete_response(response_id: str, services: InjectedServices) -> Response:
    """Later responses that went on from it keep their own copy of the conversation."""
    services.responses.delete(response_id, account=services.account)
    return Response(json_bytes({"id": response_id, "object": "response", "deleted": True}), media_type=JSON)


async def _start(id: str, body: ResponsesRequest, services: Services) -> ResponseAnswer:
    messages = _messages(body, services)
    echo, input_items = echoed(body, services.model), encoded("input", listed_items(body.input))
    chat = chat_request(request_fields(body, messages), RENAMED)
    reply = await start_reply(chat, body.rid or id, services, RENAMED)
    return ResponseAnswer(
        id,
        reply,
        echo=echo,
        input_items=input_items,
        conversation=messages,
        logprobs=ChatLogprobs(services.generator.tokenizer) if has_logprobs(body) else None,
        namespace=_namespace(body, services),
        store=services.responses if body.store else None,
    )


def _messages(body: ResponsesRequest, services: Services) -> list[Json]:
    """The conversation up to this response, without instructions."""
    namespace, store = _namespace(body, services), services.responses
    earlier = [] if body.previous_response_id is None else store.conversation(body.previous_response_id, namespace)
    return [*earlier, *chat_messages(body.input, find_item=lambda item_id: store.item(item_id, namespace))]


def _namespace(body: ResponsesRequest, services: Services) -> Namespace:
    return services.account, body.cache_salt, body.extra_key
