"""Scores: the probabilities of some tokens behind each prompt."""

import math
from collections.abc import Sequence
from typing import Any

from headwater.generation.errors import bad_request
from headwater.generation.model_facts import ModelFacts
from headwater.generation.text_generation import TextGeneration
from headwater.generation.token_arrays import first_outside
from headwater.http_api.pooling.prompts import as_list
from headwater.http_api.pooling.schemas import ScoreRequest


def prompts_of(body: ScoreRequest) -> list[Any]:
    """The query joined with each item: texts before they are encoded, so that words may merge at the border."""
    if isinstance(body.items, list) and not body.items:
        raise bad_request("items", "items: must hold at least one text")
    items, _ = as_list(body.items)
    is_text = isinstance(body.query, str)
    if any(isinstance(item, str) != is_text for item in items):
        raise bad_request("items", "items: must be texts if the query is a text, and token ids if it is token ids")
    query: Any = body.query
    return [item + query if body.item_first else query + item for item in items]


def check_labels(body: ScoreRequest, model: ModelFacts) -> tuple[int, ...]:
    """The label tokens. InvalidRequest."""
    labels: Any = body.label_token_ids
    if not labels or isinstance(labels[0], list):
        raise bad_request("label_token_ids", "label_token_ids: must hold at least one token id, and no lists")
    if (outside := first_outside(labels, model.vocab_size)) is not None:
        message = f"label_token_ids: token ids must be from 0 to {model.vocab_size - 1}, got {outside}"
        raise bad_request("label_token_ids", message)
    return tuple(labels)


def scores_of(generation: TextGeneration, *, applies_softmax: bool) -> list[float]:
    """One score for each label token."""
    logprobs = generation.logprobs[0].ids_logprobs
    return _softmax(logprobs) if applies_softmax else [math.exp(logprob) for logprob in logprobs]


def _softmax(logprobs: Sequence[float]) -> list[float]:
    top = max(logprobs)
    exponentials = [math.exp(logprob - top) for logprob in logprobs]
    total = sum(exponentials)
    return [exponential / total for exponential in exponentials]
