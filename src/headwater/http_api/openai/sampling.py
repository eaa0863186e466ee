"""From a checked OpenAI body to the engine's sampling parameters."""

from typing import Any

from headwater.generation.errors import bad_request, unsupported
from headwater.generation.model_facts import ModelFacts
from headwater.generation.sampling import engine_sampling
from headwater.http_api.openai.schemas import ChatCompletionRequest, CompletionRequest, OpenAIRequest
from headwater.messages.generation import SamplingParams


def openai_sampling(given: OpenAIRequest, model: ModelFacts) -> SamplingParams:
    """The engine's parameters for an OpenAI body. InvalidRequest names what is not supported yet."""
    _refuse_response_format(given.response_format)
    if isinstance(given, ChatCompletionRequest):
        asked = given.max_completion_tokens or given.max_tokens
        max_new_tokens = model.max_context if asked is None else asked
    else:
        assert isinstance(given, CompletionRequest)
        _refuse_best_of(given)
        max_new_tokens = given.max_tokens
    left_out = {name: value for name, value in model.sampling_defaults.items() if name not in given.model_fields_set}
    given = given.model_copy(update=left_out)
    return engine_sampling(
        given,
        model,
        max_new_tokens=max_new_tokens,
        min_new_tokens=given.min_tokens,
        seed=given.seed,
        min_tokens_name="min_tokens",
    )


def _refuse_response_format(response_format: dict[str, Any] | None) -> None:
    kind = "text" if response_format is None else response_format.get("type")
    if kind in ("json_object", "json_schema", "structural_tag"):
        raise unsupported("response_format", f"response_format: type {kind!r} is not supported yet; accepted: 'text'")
    if kind != "text":
        raise bad_request("response_format", f"response_format: type must be 'text', got {kind!r}")


def _refuse_best_of(given: CompletionRequest) -> None:
    if given.best_of not in (None, 1, given.n):
        raise bad_request("best_of", f"best_of: must be 1 or n ({given.n}), got {given.best_of}")
