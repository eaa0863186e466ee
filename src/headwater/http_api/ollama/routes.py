"""Routes of Ollama's API: chat, generate, and reports of the model."""

import time
import uuid
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from headwater.generation.answer_fields import Json, json_bytes
from headwater.generation.errors import model_not_found
from headwater.generation.model_facts import ModelFacts
from headwater.http_api.json_body import JsonRoute
from headwater.http_api.ollama.answer import OLLAMA_STREAM, OllamaAnswer, loaded, ns
from headwater.http_api.ollama.conversion import RENAMED, chat_fields, generate_fields, plain_name, raw_fields
from headwater.http_api.ollama.embeddings import embed
from headwater.http_api.ollama.model_report import list_entry, running_entry, shown
from headwater.http_api.ollama.schemas import (
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaRequest,
    OllamaShowRequest,
)
from headwater.http_api.openai.answer import check_model
from headwater.http_api.openai.conversation import chat_request, start_raw_reply, start_reply
from headwater.http_api.openai.format import ChatLogprobs
from headwater.http_api.openai.replies import Reply
from headwater.http_api.pooling.vectors import vector_of
from headwater.http_api.services import InjectedServices, Services
from headwater.http_api.sse import JSON, EventStream, while_connected
from headwater.version import version

# The version whose routes these are. Clients refuse versions that are too old for them, and ours begin at 0.1.
API_VERSION = "0.13.0"
_JSON_HEADER = (b"content-type", b"application/json")
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "A parameter is invalid; `error` names it."},
    404: {"description": "Another model is served."},
    429: {"description": "The queue is full."},
    503: {"description": "The model is loading, the server is shutting down, or the engine is gone."},
}
_ANSWERS = _ERRORS | {
    200: {"description": "The answer, or lines of JSON.", "content": {JSON: {}, "application/x-ndjson": {}}}
}


class OllamaRoute(JsonRoute):
    """A route whose body is JSON whatever its content type is: curl sends another, and Ollama does not look at it."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def handle_any(request: Request) -> Response:
            others = [header for header in request.scope["headers"] if header[0] != b"content-type"]
            scope = dict(request.scope) | {"headers": [*others, _JSON_HEADER]}
            return await handle(Request(scope, request.receive, request._send))

        return handle_any


router = APIRouter(route_class=OllamaRoute, prefix="/api", tags=["ollama"])


@router.post("/chat", summary="Answer a conversation (Ollama)", responses=_ANSWERS)
async def chat(body: OllamaChatRequest, request: Request, services: InjectedServices) -> Response:
    """Ollama's chat, in lines of JSON unless `stream` is false. A client that disconnects aborts its request."""
    arrived_s, model = time.monotonic(), services.model
    _check_name(body.model, model)
    if not body.messages:
        return JSONResponse(loaded(body.model, is_chat=True))
    reply = await start_reply(chat_request(chat_fields(body, model), RENAMED), _rid(body), services, RENAMED)
    return await _answer(body, reply, request, services, is_chat=True, arrived_s=arrived_s)


@router.post("/generate", summary="Answer a prompt (Ollama)", responses=_ANSWERS)
async def generate(body: OllamaGenerateRequest, request: Request, services: InjectedServices) -> Response:
    """Ollama's generate: a prompt through the chat template, or with `raw` as it is."""
    arrived_s, model = time.monotonic(), services.model
    _check_name(body.model, model)
    if not body.prompt:
        return JSONResponse(loaded(body.model, is_chat=False))
    if body.raw:
        reply = await start_raw_reply(raw_fields(body, model), _rid(body), services, RENAMED)
    else:
        fields = generate_fields(body, model)
        reply = await start_reply(chat_request(fields, RENAMED), _rid(body), services, RENAMED)
    return await _answer(body, reply, request, services, is_chat=False, arrived_s=arrived_s)


@router.post("/embed", summary="Embed texts (Ollama)", responses=_ERRORS)
async def embed_texts(body: OllamaEmbedRequest, request: Request, services: InjectedServices) -> Response:
    """A vector of length 1 for each text. A text that is too long is refused, never cut."""
    arrived_s = time.monotonic()
    _check_name(body.model, services.model)
    texts = [body.input] if isinstance(body.input, str) else body.input
    generations = await embed(texts, body, request, services)
    answer = {
        "model": body.model,
        "embeddings": [vector_of(it.embedding, dimensions=body.dimensions).tolist() for it in generations],
        "total_duration": ns(time.monotonic() - arrived_s),
        "load_duration": 0,
        "prompt_eval_count": sum(it.num_prompt_tokens for it in generations),
    }
    return Response(json_bytes(answer), media_type=JSON)


@router.post("/embeddings", summary="Embed a text (Ollama, older form)", responses=_ERRORS)
async def embed_prompt(body: OllamaEmbeddingsRequest, request: Request, services: InjectedServices) -> Response:
    """The vector of one text."""
    _check_name(body.model, services.model)
    (generation,) = await embed([body.prompt], body, request, services)
    vector = vector_of(generation.embedding, dimensions=None)
    return Response(json_bytes({"embedding": vector.tolist()}), media_type=JSON)


@router.get("/tags", summary="List the served model (Ollama)")
async def tags(services: InjectedServices) -> Response:
    """The list has one item, the served model."""
    return JSONResponse({"models": [await list_entry(services)]})


@router.get("/ps", summary="List the running model (Ollama)")
async def running(services: InjectedServices) -> Response:
    """The served model, which stays loaded."""
    return JSONResponse({"models": [await running_entry(services)]})


@router.post("/show", summary="Show the model (Ollama)", responses={404: _ERRORS[404]})
async def show(body: OllamaShowRequest, services: InjectedServices) -> Response:
    """Details, chat template, context length and capabilities of the served model."""
    model = services.model
    _check_name(body.model or body.name, model)
    return JSONResponse(shown(model, services.generator.tokenizer, services.state.formats))


@router.get("/version", summary="Show the version (Ollama)")
async def show_version() -> Response:
    """The version of Ollama whose routes these are, and this server's own."""
    return JSONResponse({"version": API_VERSION, "server": f"headwater {version()}"})


async def _answer(
    body: OllamaRequest, reply: Reply, request: Request, services: Services, *, is_chat: bool, arrived_s: float
) -> Response:
    logprobs = ChatLogprobs(services.generator.tokenizer) if body.logprobs else None
    answer = OllamaAnswer(body.model, reply, is_chat=is_chat, arrived_s=arrived_s, logprobs=logprobs)
    if body.stream:
        return EventStream(answer.lines(), close=answer.close, form=OLLAMA_STREAM)
    try:
        whole: Json = await while_connected(answer.collect(), request.receive)
    finally:
        answer.close()
    return Response(json_bytes(whole), media_type=JSON)


def _check_name(name: str, model: ModelFacts) -> None:
    if not name:
        raise model_not_found(name, model.served_name)
    if name != model.served_name:
        check_model(plain_name(name), model)


def _rid(body: OllamaRequest) -> str:
    return body.rid or f"ollama-{uuid.uuid4().hex}"
