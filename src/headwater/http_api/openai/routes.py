"""Routes of the OpenAI API: chat completions, completions, models."""

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from headwater.generation.answer_fields import Json, json_bytes
from headwater.generation.errors import model_not_found
from headwater.generation.model_facts import ModelFacts
from headwater.http_api.json_body import JsonRoute
from headwater.http_api.openai.answer import OpenAIAnswer
from headwater.http_api.openai.chat import start_chat
from headwater.http_api.openai.completions import start_completion
from headwater.http_api.openai.schemas import ChatCompletionRequest, CompletionRequest
from headwater.http_api.services import InjectedServices
from headwater.http_api.sse import JSON, OPENAI_STREAM, STREAM_RESPONSES, EventStream, while_connected

router = APIRouter(route_class=JsonRoute, prefix="/v1", tags=["openai"])


@router.post("/chat/completions", summary="Answer a conversation", responses=STREAM_RESPONSES)
async def chat_completions(body: ChatCompletionRequest, request: Request, services: InjectedServices) -> Response:
    """OpenAI's chat completions, with `stream` as server-sent events. A client that disconnects aborts its request."""
    answer = await start_chat(body, services.generator, services.model)
    return await _answer(answer, request, is_stream=body.stream)


@router.post("/completions", summary="Continue prompts", responses=STREAM_RESPONSES)
async def completions(body: CompletionRequest, request: Request, services: InjectedServices) -> Response:
    """OpenAI's completions of one prompt or several, text or token ids. `echo` with `logprobs` scores prompts."""
    answer = await start_completion(body, services.generator, services.model, services.state.limits)
    return await _answer(answer, request, is_stream=body.stream)


@router.get("/models", summary="List the served models")
async def list_models(services: InjectedServices) -> Response:
    """The served model, then the LoRA adapters that are loaded, whose `parent` it is."""
    model, since_s = services.model, services.state.started_at_s
    adapters = [_adapter_card(name, path, model, since_s) for name, path in model.adapters().items()]
    return JSONResponse({"object": "list", "data": [_card(model, since_s), *adapters]})


@router.get("/models/{model_id:path}", summary="Show a model")
async def get_model(model_id: str, services: InjectedServices) -> Response:
    """The served model or a LoRA adapter by its name; 404 for any other."""
    model, since_s = services.model, services.state.started_at_s
    if model_id == model.served_name:
        return JSONResponse(_card(model, since_s))
    path = model.adapters().get(model_id)
    if path is None:
        raise model_not_found(model_id, model.served_name)
    return JSONResponse(_adapter_card(model_id, path, model, since_s))


async def _answer(answer: OpenAIAnswer, request: Request, *, is_stream: bool) -> Response:
    if is_stream:
        return EventStream(answer.events(), close=answer.close, form=OPENAI_STREAM)
    try:
        body = await while_connected(answer.collect(), request.receive)
    finally:
        answer.close()
    return Response(json_bytes(body), media_type=JSON)


def _card(model: ModelFacts, created_s: float) -> Json:
    return {
        "id": model.served_name,
        "object": "model",
        "created": int(created_s),
        "owned_by": "headwater",
        "root": model.served_name,
        "parent": None,
        "max_model_len": model.max_context,
    }


def _adapter_card(name: str, path: str, model: ModelFacts, created_s: float) -> Json:
    return _card(model, created_s) | {"id": name, "root": path, "parent": model.served_name}
