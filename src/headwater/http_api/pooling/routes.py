"""Routes that read texts and write none: embeddings, scores."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from headwater.generation.answer_fields import Json, cached_tokens, json_bytes
from headwater.generation.errors import bad_request, unsupported
from headwater.generation.text_generation import TextGeneration
from headwater.http_api.json_body import JsonRoute
from headwater.http_api.pooling.prompts import PromptRun, as_list, check_model, read_prompts
from headwater.http_api.pooling.schemas import (
    EmbeddingRequest,
    EncodeRequest,
    PoolingFields,
    RerankRequest,
    ScoreRequest,
)
from headwater.http_api.pooling.scores import check_labels, prompts_of, scores_of
from headwater.http_api.pooling.vectors import check_dimensions, encoded, pooling_of, vector_of
from headwater.http_api.services import InjectedServices, Services
from headwater.http_api.sse import JSON, STREAM_RESPONSES, while_connected
from headwater.messages.base import TokenArray
from headwater.messages.generation import LogprobParams, SamplingParams

router = APIRouter(route_class=JsonRoute, tags=["pooling"])
_RESPONSES = {status: text for status, text in STREAM_RESPONSES.items() if status != 200}
_NOTHING = SamplingParams(max_new_tokens=0)
_ONE_TOKEN = SamplingParams(max_new_tokens=1, temperature=0.0)


@router.post("/v1/embeddings", summary="Embed texts", responses=_RESPONSES)
async def embeddings(body: EmbeddingRequest, request: Request, services: InjectedServices) -> Response:
    """OpenAI's embeddings: a vector of length 1 for each text. KV of the texts is not kept, unless `no_store` is false.
    """
    check_model(body.model, services.model)
    check_dimensions(body.dimensions, services.model)
    items, _ = as_list(body.input)
    prompts = await read_prompts(items, body, services, param="input", is_prefill=True)
    generations = await _embed(prompts, body, request, services)
    data: list[Json] = []
    for index, generation in enumerate(generations):
        numbers = vector_of(generation.embedding, dimensions=body.dimensions)
        data.append({"object": "embedding", "index": index, "embedding": encoded(numbers, body.encoding_format)})
    answer = {"object": "list", "data": data, "model": services.model.served_name, "usage": _usage(generations)}
    return Response(json_bytes(answer), media_type=JSON)


@router.post("/encode", summary="Embed texts, SGLang's form", responses=_RESPONSES)
async def encode(body: EncodeRequest, request: Request, services: InjectedServices) -> Response:
    """The same as /v1/embeddings, with SGLang's names."""
    check_dimensions(body.dimensions, services.model)
    given, param = (body.text, "text") if body.text is not None else (body.input_ids, "input_ids")
    if (body.text is None) == (body.input_ids is None):
        raise bad_request("text", "text: exactly one of text and input_ids is needed")
    items, is_many = as_list(given)
    prompts = await read_prompts(items, body, services, param=param, is_prefill=True)
    answers: list[Json] = []
    for generation in await _embed(prompts, body, request, services):
        numbers = vector_of(generation.embedding, dimensions=body.dimensions)
        answers.append({"embedding": numbers.tolist(), "meta_info": _meta_info(generation)})
    return Response(json_bytes(answers if is_many else answers[0]), media_type=JSON)


@router.post("/v1/score", summary="Score items", responses=_RESPONSES)
async def score(body: ScoreRequest, request: Request, services: InjectedServices) -> Response:
    """SGLang's scores: for each item, the probability of each label token right behind query and item."""
    check_model(body.model, services.model)
    labels = check_labels(body, services.model)
    prompts = await read_prompts(prompts_of(body), body, services, param="items", is_prefill=False)
    run = PromptRun(prompts, body, services, sampling=_ONE_TOKEN, logprobs=LogprobParams(token_ids=labels))
    generations = await _finish(run, request)
    scores = [scores_of(generation, applies_softmax=body.apply_softmax) for generation in generations]
    answer = {
        "object": "scoring",
        "scores": scores,
        "model": services.model.served_name,
        "usage": _usage(generations),
    }
    return Response(json_bytes(answer), media_type=JSON)


@router.post("/v1/rerank", summary="Sort documents (not supported)", responses=_RESPONSES)
@router.post("/rerank", include_in_schema=False)
async def rerank(_: RerankRequest, services: InjectedServices) -> Response:
    """Always a 400: rerankers have a head of their own, and no such model is served. /v1/score works with any model."""
    message = f"model: {services.model.served_name!r} is no reranker; score the documents with /v1/score"
    raise unsupported("model", message)


async def _embed(
    prompts: list[TokenArray], body: PoolingFields, request: Request, services: Services
) -> list[TextGeneration]:
    pooling = pooling_of(services.model)
    return await _finish(PromptRun(prompts, body, services, sampling=_NOTHING, pooling=pooling), request)


async def _finish(run: PromptRun, request: Request) -> list[TextGeneration]:
    try:
        return await while_connected(run.finish(), request.receive)
    finally:
        run.close()


def _usage(generations: list[TextGeneration]) -> Json:
    num_tokens = sum(generation.num_prompt_tokens for generation in generations)
    return {
        "prompt_tokens": num_tokens,
        "completion_tokens": 0,
        "total_tokens": num_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(cached_tokens(it.meta) for it in generations)},
    }


def _meta_info(generation: TextGeneration) -> Json:
    return {
        "id": generation.request.rid,
        "finish_reason": {"type": "length", "length": 0},
        "prompt_tokens": generation.num_prompt_tokens,
        "completion_tokens": 0,
        "cached_tokens": cached_tokens(generation.meta),
        "e2e_latency": generation.elapsed_s,
        "weight_version": "" if generation.meta is None else generation.meta.weight_version,
    }
