"""Embeddings in Ollama's form: those of /v1/embeddings under other names."""

from fastapi import Request

from headwater.generation.text_generation import TextGeneration
from headwater.http_api.ollama.schemas import OllamaEmbeddingsRequest, OllamaEmbedRequest
from headwater.http_api.pooling.prompts import PromptRun, read_prompts
from headwater.http_api.pooling.schemas import EmbeddingRequest
from headwater.http_api.pooling.vectors import check_dimensions, pooling_of
from headwater.http_api.services import Services
from headwater.http_api.sse import while_connected
from headwater.messages.generation import SamplingParams

_NOTHING = SamplingParams(max_new_tokens=0)
_SHARED = ("rid", "cache_salt", "extra_key", "dimensions")


async def embed(
    texts: list[str], body: OllamaEmbedRequest | OllamaEmbeddingsRequest, request: Request, services: Services
) -> list[TextGeneration]:
    """The ended generations of the texts, with their embeddings. Raises ApiError, EngineGone, RidInUse."""
    given = {name: getattr(body, name) for name in _SHARED if name in body.model_fields_set}
    fields = EmbeddingRequest.model_validate(given | {"input": texts})
    check_dimensions(fields.dimensions, services.model)
    prompts = await read_prompts(texts, fields, services, param="input", is_prefill=True)
    run = PromptRun(prompts, fields, services, sampling=_NOTHING, pooling=pooling_of(services.model))
    try:
        return await while_connected(run.finish(), request.receive)
    finally:
        run.close()
