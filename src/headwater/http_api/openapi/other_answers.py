"""The shapes of the answers of OpenAI's responses, Anthropic's messages and Ollama's routes, for /openapi.json."""

from typing import Annotated, Any, Literal

from msgspec import UNSET, UnsetType

from headwater.http_api.openapi.answers import PositionLogprobs, Shape, says


class ThinkingTokens(Shape):
    """Of the generated tokens, some are thinking."""

    thinking_tokens: Annotated[int, says("Tokens of the thinking part.")]


class MessageUsage(Shape):
    """Tokens of a message. The prompt has `input_tokens` and `cache_read_input_tokens` together."""

    input_tokens: Annotated[int, says("Prompt tokens that were computed.")]
    cache_creation_input_tokens: Annotated[int, says("Always 0.")]
    cache_read_input_tokens: Annotated[int, says("Prompt tokens found in the cache.")]
    output_tokens: Annotated[int, says("Generated tokens.")]
    output_tokens_details: Annotated[ThinkingTokens, says("Of these.")]


class Message(Shape):
    """The answer of /v1/messages."""

    id: Annotated[str, says("The request's id, also for /abort_request.")]
    type: Annotated[Literal["message"], says("Always `message`.")]
    role: Annotated[Literal["assistant"], says("Always `assistant`.")]
    model: Annotated[str, says("The served model.")]
    content: Annotated[list[dict[str, Any]], says("Blocks of the types thinking, text and tool_use.")]
    usage: Annotated[MessageUsage, says("Tokens of the request.")]
    stop_reason: Annotated[
        Literal["end_turn", "stop_sequence", "tool_use", "max_tokens", "model_context_window_exceeded"],
        says("Why the answer ended."),
    ]
    stop_sequence: Annotated[str | None, says("The stop sequence that ended it.")]


class CountedTokens(Shape):
    """The answer of /v1/messages/count_tokens."""

    input_tokens: Annotated[int, says("Tokens of the prompt.")]


class ResponseObject(Shape, forbid_unknown_fields=False):
    """The answer of /v1/responses. It also repeats the fields of its request."""

    id: Annotated[str, says("The response's id, for previous_response_id and, without a rid, for /abort_request.")]
    object: Annotated[Literal["response"], says("Always `response`.")]
    created_at: Annotated[int, says("Unix time.")]
    model: Annotated[str, says("The served model.")]
    status: Annotated[Literal["completed", "incomplete", "failed", "in_progress"], says("Whether it is whole.")]
    output: Annotated[list[dict[str, Any]], says("Items of the types reasoning, message and function_call.")]
    usage: Annotated[dict[str, Any] | None, says("Tokens of the request; null before the end.")]
    error: Annotated[dict[str, Any] | None, says("Of a failed response: code and message.")]
    incomplete_details: Annotated[dict[str, Any] | None, says("Of an incomplete response: the reason.")]


class CountedInput(Shape):
    """The answer of /v1/responses/input_tokens."""

    object: Annotated[Literal["response.input_tokens"], says("Always `response.input_tokens`.")]
    input_tokens: Annotated[int, says("Tokens of the prompt.")]


class ItemPage(Shape):
    """A page of the items of a response's input."""

    object: Annotated[Literal["list"], says("Always `list`.")]
    data: Annotated[list[dict[str, Any]], says("The items.")]
    first_id: Annotated[str | None, says("The first item's id.")]
    last_id: Annotated[str | None, says("The last item's id, for `after`.")]
    has_more: Annotated[bool, says("Whether items follow.")]


class DeletedResponse(Shape):
    """A response that was forgotten."""

    id: Annotated[str, says("Its id.")]
    object: Annotated[Literal["response"], says("Always `response`.")]
    deleted: Annotated[Literal[True], says("Always true.")]


class OllamaAnswer(Shape, kw_only=True):
    """One line of Ollama's answers, or the whole. The durations (in ns) and counts come with the end."""

    model: Annotated[str, says("The model, as the request names it.")]
    created_at: Annotated[str, says("The time, in ISO 8601.")]
    done: Annotated[bool, says("Whether this is the end.")]
    logprobs: Annotated[list[PositionLogprobs] | UnsetType, says("Of the new tokens, with `logprobs`.")] = UNSET
    done_reason: Annotated[Literal["stop", "length", "load"] | UnsetType, says("Why it ended.")] = UNSET
    total_duration: Annotated[int | UnsetType, says("From the arrival of the request.")] = UNSET
    load_duration: Annotated[int | UnsetType, says("Always 0.")] = UNSET
    prompt_eval_count: Annotated[int | UnsetType, says("Tokens of the prompt.")] = UNSET
    prompt_eval_duration: Annotated[int | UnsetType, says("To the first token, with the time in the queue.")] = UNSET
    eval_count: Annotated[int | UnsetType, says("Generated tokens.")] = UNSET
    eval_duration: Annotated[int | UnsetType, says("From the first token to the last.")] = UNSET


class OllamaChatAnswer(OllamaAnswer, kw_only=True):
    """A line of /api/chat, or the whole answer."""

    message: Annotated[dict[str, Any], says("`role`, `content`, and `thinking` and `tool_calls` if there are any.")]


class OllamaGenerateAnswer(OllamaAnswer, kw_only=True):
    """A line of /api/generate, or the whole answer."""

    response: Annotated[str, says("The text, or its next piece.")]
    thinking: Annotated[str | UnsetType, says("The thinking part, or its next piece.")] = UNSET


class OllamaEmbeddings(Shape):
    """The answer of /api/embed."""

    model: Annotated[str, says("The model, as the request names it.")]
    embeddings: Annotated[list[list[float]], says("One vector for each text, in their order.")]
    total_duration: Annotated[int, says("From the arrival of the request, in ns.")]
    load_duration: Annotated[int, says("Always 0.")]
    prompt_eval_count: Annotated[int, says("Tokens of the texts.")]


class OllamaEmbedding(Shape):
    """The answer of /api/embeddings."""

    embedding: Annotated[list[float], says("The vector.")]


class OllamaModels(Shape):
    """The served model in a list, as Ollama's clients expect it."""

    models: Annotated[list[dict[str, Any]], says("One model: name, size, digest, details.")]


class OllamaModel(Shape, forbid_unknown_fields=False):
    """Details of the served model."""

    template: Annotated[str, says("The chat template, in Jinja.")]
    details: Annotated[dict[str, Any], says("Format, family and quantization.")]
    model_info: Annotated[dict[str, Any], says("Architecture, context length, vocabulary.")]
    capabilities: Annotated[list[str], says("completion, tools, thinking.")]


class OllamaVersion(Shape):
    """Versions."""

    version: Annotated[str, says("Of Ollama: the routes are those of this version.")]
    server: Annotated[str, says("This server's own.")]
