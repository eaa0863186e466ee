"""Embeddings as the engine gives them (float32 bytes, of length 1), cut and encoded for an answer."""

import base64
import math
from array import array
from typing import Any

from headwater.generation.errors import bad_request
from headwater.generation.model_facts import ModelFacts
from headwater.messages.generation import Pooling


def pooling_of(model: ModelFacts) -> Pooling:
    """How the served model pools. InvalidRequest if its files name a mode that is not supported."""
    if model.pooling == "last" or model.pooling == "mean":
        return model.pooling
    message = f"model: its files ask for the pooling {model.pooling!r}; supported are last and mean (--pooling)"
    raise bad_request("model", message)


def check_dimensions(dimensions: int | None, model: ModelFacts) -> None:
    """InvalidRequest unless embeddings of the model may be cut to `dimensions` numbers."""
    if dimensions in (None, model.hidden_size):
        return
    allowed, size = model.embedding_dimensions, model.hidden_size
    if allowed is None:
        message = f"dimensions: this is no Matryoshka model; its embeddings always have {size} numbers"
        raise bad_request("dimensions", message, code="unsupported_value")
    if dimensions > size or (allowed and dimensions not in allowed):
        listed = ", ".join(map(str, allowed)) if allowed else f"1 to {size}"
        raise bad_request("dimensions", f"dimensions: must be one of {listed}, got {dimensions}")


def vector_of(embedding: bytes | None, *, dimensions: int | None) -> "array[float]":
    """The numbers of an embedding, cut to `dimensions` and brought to length 1 again."""
    assert embedding is not None, "the request has run to its end"
    numbers = array("f", embedding)
    if dimensions is None or dimensions == len(numbers):
        return numbers
    numbers = numbers[:dimensions]
    length = max(math.sqrt(math.fsum(number * number for number in numbers)), 1e-12)
    return array("f", [number / length for number in numbers])


def encoded(numbers: "array[float]", encoding_format: str) -> Any:
    """For JSON: a list, or base64 of float32."""
    return numbers.tolist() if encoding_format == "float" else base64.b64encode(numbers.tobytes()).decode()
