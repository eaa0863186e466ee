"""The shapes of embeddings and scores, for /openapi.json."""

from typing import Annotated, Any, Literal

from headwater.http_api.openapi.answers import CachedPromptTokens, Shape, says


class PromptUsage(Shape):
    """Tokens of a request that generates none."""

    prompt_tokens: Annotated[int, says("Tokens of the texts.")]
    completion_tokens: Annotated[int, says("Always 0.")]
    total_tokens: Annotated[int, says("The same as prompt_tokens.")]
    prompt_tokens_details: Annotated[CachedPromptTokens, says("Of these tokens, those found in the cache.")]


class Embedding(Shape):
    """The vector of one text."""

    object: Annotated[Literal["embedding"], says("Always `embedding`.")]
    index: Annotated[int, says("The number of the text, from 0.")]
    embedding: Annotated[list[float] | str, says("Numbers, or base64 of them as float32, little-endian.")]


class EmbeddingList(Shape):
    """The answer of /v1/embeddings."""

    object: Annotated[Literal["list"], says("Always `list`.")]
    data: Annotated[list[Embedding], says("One vector for each text, in the order of the texts.")]
    model: Annotated[str, says("The served model.")]
    usage: Annotated[PromptUsage, says("Tokens of the request.")]


class Encoded(Shape):
    """The answer of /encode to one text."""

    embedding: Annotated[list[float], says("The vector.")]
    meta_info: Annotated[dict[str, Any], says("Counts and versions.")]


class Scores(Shape):
    """The answer of /v1/score."""

    object: Annotated[Literal["scoring"], says("Always `scoring`.")]
    scores: Annotated[list[list[float]], says("For each item, a number for each label.")]
    model: Annotated[str, says("The served model.")]
    usage: Annotated[PromptUsage, says("Tokens of the request.")]
