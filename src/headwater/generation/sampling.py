"""From checked request bodies to the engine's sampling parameters; checks of prompts."""

import contextlib
import logging
import secrets
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import msgspec
from pydantic import ValidationError

from headwater.generation.body import Names
from headwater.generation.errors import bad_request
from headwater.generation.model_facts import ModelFacts
from headwater.generation.request_schemas import SamplingFields
from headwater.generation.token_arrays import first_outside, int32_array
from headwater.messages.base import TokenArray
from headwater.messages.generation import Grammar, SamplingParams

PromptTokens = Sequence[int] | TokenArray  # not checked yet

SEED_MASK = (1 << 63) - 1
_SHARED_NAMES = tuple(name for name in SamplingFields.model_fields if name in SamplingParams.__struct_fields__)

_log = logging.getLogger(__name__)


class _Recommended(SamplingFields):
    names: ClassVar[Names] = Names(refuses_unknown=True)


def usable_defaults(recommended: Mapping[str, float]) -> dict[str, float]:
    """The values that a model's files recommend. Values that a request could not ask for are logged and left out."""
    usable: dict[str, float] = {}
    for name, value in recommended.items():
        try:
            checked = _Recommended.model_validate({name: value})
        except ValidationError as error:
            _log.warning("the model's default of %s is left out: %s", name, error.errors()[0]["msg"])
        else:
            usable[name] = getattr(checked, name)
    return usable


def check_prompt(prompt_ids: PromptTokens, model: ModelFacts, *, param: str, is_prefill: bool) -> TokenArray:
    """The prompt as an array. InvalidRequest if it is empty, has ids outside the vocabulary or exceeds the context."""
    if not len(prompt_ids):
        raise bad_request(param, f"{param}: must not be empty; at least one token is needed")
    ids: PromptTokens = prompt_ids
    with contextlib.suppress(OverflowError):  # an id outside any vocabulary is found below
        ids = _as_array(prompt_ids)
    if (outside := first_outside(ids, model.vocab_size)) is not None:
        message = f"{param}: token ids must be from 0 to {model.vocab_size - 1}, got {outside} (out-of-vocabulary)"
        raise bad_request(param, message)
    longest = model.max_context if is_prefill else model.max_context - 1
    if len(prompt_ids) > longest:
        message = (
            f"{param}: The input ({len(prompt_ids)} tokens) is longer than the model's context length "
            f"({model.max_context} tokens); a prompt may have at most {longest} tokens here"
        )
        raise bad_request(param, message, code="context_length_exceeded")
    return _as_array(ids)


def _as_array(token_ids: PromptTokens) -> TokenArray:
    return token_ids if isinstance(token_ids, array) else int32_array(list(token_ids))


def fit(sampling: SamplingParams, num_prompt_tokens: int, model: ModelFacts) -> SamplingParams:
    """`sampling` with `max_new_tokens` reduced to the room that the prompt leaves in the context."""
    left = model.max_context - num_prompt_tokens
    return sampling if sampling.max_new_tokens <= left else msgspec.structs.replace(sampling, max_new_tokens=left)


def check_no_minimum(min_new_tokens: int, grammar: Grammar | None, *, name: str) -> None:
    """InvalidRequest for a least number of tokens beside a grammar, which alone says where the answer may end."""
    if grammar is not None and grammar.text and min_new_tokens:
        raise bad_request(name, f"{name}: must be 0 beside a grammar, which says where the answer may end")


def for_sample(sampling: SamplingParams, index: int) -> SamplingParams:
    """The parameters of the `index`-th answer to one prompt: only the noise differs."""
    return sampling if index == 0 else msgspec.structs.replace(sampling, seed=(sampling.seed + index) & SEED_MASK)


def engine_sampling(
    given: SamplingFields,
    model: ModelFacts,
    *,
    max_new_tokens: int,
    min_new_tokens: int,
    seed: int | None,
    min_tokens_name: str,
) -> SamplingParams:
    """The engine's parameters: fields that both APIs name alike are copied by name. InvalidRequest.

    `min_tokens_name` is the API's name of `min_new_tokens`, for the error.
    """
    _check_ids(given.logit_bias or (), model, param="logit_bias")
    _check_ids(given.stop_token_ids, model, param="stop_token_ids")
    if min_new_tokens > max_new_tokens:
        message = f"{min_tokens_name}: must be from 0 to the most tokens asked for ({max_new_tokens})"
        raise bad_request(min_tokens_name, message)
    shared = {name: getattr(given, name) for name in _SHARED_NAMES}
    converted = {
        "max_new_tokens": min(max_new_tokens, model.max_context),
        "min_new_tokens": min(min_new_tokens, model.max_context),
        "top_k": given.top_k or -1,
        "logit_bias": given.logit_bias or None,
        "seed": (secrets.randbits(63) if seed is None else seed) & SEED_MASK,
    }
    return msgspec.convert(shared | converted, SamplingParams)


def _check_ids(token_ids: Iterable[int], model: ModelFacts, *, param: str) -> None:
    if (outside := first_outside(list(token_ids), model.vocab_size)) is not None:
        raise bad_request(param, f"{param}: token ids must be from 0 to {model.vocab_size - 1}, got {outside}")
