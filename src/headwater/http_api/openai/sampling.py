"""From a checked OpenAI body to the engine's sampling parameters."""

from headwater.generation.model_facts import ModelFacts
from headwater.generation.sampling import engine_sampling
from headwater.http_api.openai.schemas import OpenAIRequest
from headwater.messages.generation import SamplingParams


def openai_sampling(given: OpenAIRequest, model: ModelFacts, *, max_new_tokens: int) -> SamplingParams:
    """The engine's parameters for an OpenAI body. InvalidRequest."""
    left_out = {name: value for name, value in model.sampling_defaults.items() if name not in given.model_fields_set}
    return engine_sampling(
        given.model_copy(update=left_out),
        model,
        max_new_tokens=max_new_tokens,
        min_new_tokens=given.min_tokens,
        seed=given.seed,
        min_tokens_name="min_tokens",
    )
