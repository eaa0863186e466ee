"""The shapes of the main answers, for /openapi.json. The server builds answers as JSON; tests hold them to these.

A field with a default may be missing. Clients must accept fields that are not listed here.
"""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

FinishReason = Literal["stop", "length", "abort", "tool_calls", "content_filter"]


class Shape(Struct, forbid_unknown_fields=True):
    """The base; unknown fields are forbidden for the tests, not in the document."""


def says(text: str) -> Meta:
    return Meta(description=text)


class Error(Shape, forbid_unknown_fields=False):
    """What went wrong. Some errors have more fields, for example `blockers` or `engines`."""

    message: Annotated[str, says("In words, with the accepted range.")]
    type: Annotated[str, says("The kind of error, a word for each HTTP status.")]
    param: Annotated[str | None, says("The parameter at fault.")]
    code: Annotated[str | int | None, says("A word for programs, or the status.")]


class ErrorAnswer(Shape):
    """The body of every error."""

    error: Annotated[Error, says("The error.")]


class AnthropicErrorAnswer(Shape):
    """The body of an error of Anthropic's routes."""

    type: Annotated[Literal["error"], says("Always `error`.")]
    error: Annotated[Error, says("The error.")]


class OllamaErrorAnswer(Shape):
    """The body of an error of Ollama's routes."""

    error: Annotated[str, says("What went wrong, in words.")]


class CachedPromptTokens(Shape):
    """Where prompt tokens came from."""

    cached_tokens: Annotated[int, says("Prompt tokens found in the cache.")]


class GeneratedTokens(Shape):
    """What generated tokens were for."""

    reasoning_tokens: Annotated[int, says("Tokens of the thinking part.")]


class Usage(Shape):
    """Tokens of a request; a prompt of several choices counts once."""

    prompt_tokens: Annotated[int, says("Tokens of the prompts.")]
    completion_tokens: Annotated[int, says("Generated tokens, of all choices.")]
    total_tokens: Annotated[int, says("Their sum.")]
    prompt_tokens_details: Annotated[CachedPromptTokens, says("Of the prompt tokens, those found in the cache.")]
    completion_tokens_details: Annotated[GeneratedTokens, says("Of the generated tokens, those of the thinking part.")]
    reasoning_tokens: Annotated[int, says("The same.")]


class AnswerMetadata(Shape):
    """More about an answer."""

    weight_version: Annotated[str, says("The label of the weights that computed it.")]
    weights_versions: Annotated[
        list[tuple[str, int]] | UnsetType, says("If they changed on the way: each label and its first token.")
    ] = UNSET


class Extension(Shape):
    """SGLang's extension, on request."""

    cached_tokens_details: Annotated[dict[str, int], says("Cached prompt tokens by tier.")]


class LikelyToken(Shape):
    """A token and its log-probability."""

    token: Annotated[str, says("The token's text.")]
    bytes: Annotated[list[int], says("Its bytes.")]
    logprob: Annotated[float | None, says("Its log-probability.")]


class PositionLogprobs(LikelyToken):
    """A generated token, and the likeliest ones of its position."""

    top_logprobs: Annotated[list[LikelyToken], says("The likeliest tokens of this position.")]


class ChatLogprobs(Shape):
    """Log-probabilities of generated tokens."""

    content: Annotated[list[PositionLogprobs], says("One entry for each token.")]


class FunctionCall(Shape):
    """A function and its arguments."""

    name: Annotated[str | None, says("The function's name; in a stream with the call's first piece.")] = None
    arguments: Annotated[str, says("Its arguments as JSON; in a stream the next piece.")] = ""


class ToolCall(Shape):
    """A call of a tool by the model."""

    function: Annotated[FunctionCall, says("The function to call.")]
    id: Annotated[str | None, says("The call's id, for the message with its result.")] = None
    type: Annotated[str, says("Always `function`.")] = "function"
    index: Annotated[int | UnsetType, says("The number of the call, from 0.")] = UNSET


class AssistantAnswer(Shape):
    """The answer of the model to a conversation."""

    role: Annotated[Literal["assistant"], says("Always `assistant`.")]
    content: Annotated[str | None, says("The text.")]
    refusal: Annotated[str | None, says("Always null.")] = None
    tool_calls: Annotated[list[ToolCall] | None, says("Calls of tools; null without one.")] = None
    reasoning_content: Annotated[str | None, says("The thinking part, if it is separated.")] = None
    reasoning: Annotated[str | None, says("The same.")] = None


class CompletionHead(Shape):
    """What the answers of OpenAI's two completion APIs, and the events of their streams, begin with."""

    id: Annotated[str, says("The request's id, also for /abort_request.")]
    created: Annotated[int, says("Unix time.")]
    model: Annotated[str, says("The served model.")]


class ChatCompletionChoice(Shape):
    """One answer."""

    index: Annotated[int, says("The number of the choice, from 0.")]
    message: Annotated[AssistantAnswer, says("The model's message.")]
    logprobs: Annotated[ChatLogprobs | None, says("With `logprobs`.")]
    finish_reason: Annotated[FinishReason, says("Why the answer ended.")]
    matched_stop: Annotated[str | int | None, says("The stop string or token that ended it.")]
    token_ids: Annotated[list[int] | UnsetType, says("With `return_token_ids`: of the answer.")] = UNSET


class ChatCompletion(CompletionHead):
    """The answer of /v1/chat/completions."""

    object: Annotated[Literal["chat.completion"], says("Always `chat.completion`.")]
    choices: Annotated[list[ChatCompletionChoice], says("`n` answers.")]
    usage: Annotated[Usage, says("Tokens of the request.")]
    metadata: Annotated[AnswerMetadata, says("More about the answer.")]
    sglext: Annotated[Extension | UnsetType, says("With `return_cached_tokens_details`.")] = UNSET
    prompt_token_ids: Annotated[list[int] | UnsetType, says("With `return_token_ids`: of the prompt.")] = UNSET


class ChatDelta(Shape):
    """What is new in a message."""

    role: Annotated[Literal["assistant"] | UnsetType, says("In the first event of a choice.")] = UNSET
    content: Annotated[str | UnsetType | None, says("The next piece of text.")] = UNSET
    tool_calls: Annotated[list[ToolCall] | UnsetType | None, says("The next pieces of calls.")] = UNSET
    reasoning_content: Annotated[str | UnsetType | None, says("The next piece of the thinking part.")] = UNSET
    reasoning: Annotated[str | UnsetType | None, says("The same.")] = UNSET


class ChatChunkChoice(Shape):
    """The next piece of one answer."""

    index: Annotated[int, says("The number of the choice, from 0.")]
    delta: Annotated[ChatDelta, says("What is new.")]
    logprobs: Annotated[ChatLogprobs | None, says("Of the new tokens.")]
    finish_reason: Annotated[FinishReason | None, says("Why the answer ended; null before its end.")]
    matched_stop: Annotated[str | int | UnsetType | None, says("In the last event of a choice.")] = UNSET
    token_ids: Annotated[list[int] | UnsetType, says("With `return_token_ids`: of the new tokens.")] = UNSET


class ChatCompletionChunk(CompletionHead):
    """One event of a stream of /v1/chat/completions."""

    object: Annotated[Literal["chat.completion.chunk"], says("Always `chat.completion.chunk`.")]
    choices: Annotated[list[ChatChunkChoice], says("One choice; none in the event with the usage.")]
    usage: Annotated[Usage | UnsetType | None, says("With `stream_options.include_usage`, in the last event.")] = UNSET
    metadata: Annotated[AnswerMetadata | UnsetType, says("In the last event of a choice.")] = UNSET
    sglext: Annotated[Extension | UnsetType, says("With `return_cached_tokens_details`, in the last event.")] = UNSET
    prompt_token_ids: Annotated[list[int] | UnsetType, says("With `return_token_ids`, in the first event.")] = UNSET


class CompletionLogprobs(Shape):
    """Log-probabilities in columns; one item for each token."""

    tokens: Annotated[list[str], says("The texts of the tokens.")]
    token_logprobs: Annotated[list[float | None], says("Null for the first token of a prompt.")]
    top_logprobs: Annotated[list[dict[str, float] | None], says("The likeliest tokens of each position.")]
    text_offset: Annotated[list[int], says("Where each token begins, in characters.")]


class CompletionChoice(Shape):
    """One continuation; in a stream its next piece."""

    index: Annotated[int, says("The number of the choice, from 0.")]
    text: Annotated[str, says("The text.")]
    logprobs: Annotated[CompletionLogprobs | None, says("With `logprobs`.")]
    finish_reason: Annotated[FinishReason | None, says("Why the text ended; null before its end.")]
    matched_stop: Annotated[str | int | UnsetType | None, says("The stop string or token that ended it.")] = UNSET
    token_ids: Annotated[list[int] | UnsetType, says("With `return_token_ids`: those of the text.")] = UNSET
    prompt_token_ids: Annotated[list[int] | UnsetType, says("The same of the prompt; in a stream once.")] = UNSET


class Completion(CompletionHead):
    """The answer of /v1/completions, and one event of its stream."""

    object: Annotated[Literal["text_completion"], says("Always `text_completion`.")]
    choices: Annotated[list[CompletionChoice], says("`n` for each prompt; one in an event.")]
    usage: Annotated[Usage | UnsetType | None, says("Tokens of the request; in a stream in the last event.")] = UNSET
    metadata: Annotated[AnswerMetadata | UnsetType, says("More about the answer.")] = UNSET
    sglext: Annotated[Extension | UnsetType, says("With `return_cached_tokens_details`.")] = UNSET


class ModelCard(Shape):
    """A served model."""

    id: Annotated[str, says("Its name.")]
    object: Annotated[Literal["model"], says("Always `model`.")]
    created: Annotated[int, says("When the server started, Unix time.")]
    owned_by: Annotated[str, says("Always `headwater`.")]
    root: Annotated[str, says("Its name.")]
    parent: Annotated[str | None, says("Always null.")]
    max_model_len: Annotated[int, says("Most tokens of prompt and answer together.")]


class ModelList(Shape):
    """The served models."""

    object: Annotated[Literal["list"], says("Always `list`.")]
    data: Annotated[list[ModelCard], says("One model.")]


class Generated(Shape):
    """The answer of /generate to one prompt; in a stream each event repeats the text so far."""

    text: Annotated[str, says("The generated text.")]
    output_ids: Annotated[list[int], says("Its token ids.")]
    meta_info: Annotated[dict[str, Any], says("Counts, finish reason, log-probabilities, versions: docs/api.md.")]
    index: Annotated[int | UnsetType, says("The number of the answer, in streams of several.")] = UNSET


class Tokens(Shape):
    """Token ids of a text, or of each of several."""

    tokens: Annotated[list[int | list[int]], says("Token ids; lists of them for several texts.")]
    count: Annotated[int | list[int], says("Their number.")]
    max_model_len: Annotated[int, says("Most tokens of prompt and answer together.")]


class Text(Shape):
    """A decoded text, or several."""

    text: Annotated[str | list[str], says("The text of the token ids.")]


class PagesAndBytes(Shape):
    """An amount of KV cache."""

    pages: Annotated[int, says("Pages.")]
    bytes: Annotated[int, says("Their size.")]


class FlushAnswer(Shape):
    """How a flush ended. Fields beyond `success` and `blockers` are those of docs/flush.md."""

    success: Annotated[bool, says("Whether every engine flushed.")]
    message: Annotated[str, says("The same in words.")]
    mode: Annotated[str, says("The mode of the flush.")]
    waited_s: Annotated[float, says("The longest wait of an engine.")]
    blockers: Annotated[dict[str, int], says("Work that kept engines from being idle, by name.")]
    engines: Annotated[list[dict[str, Any]], says("The answer of each engine.")]
    generation: Annotated[int | UnsetType, says("Retirements so far.")] = UNSET
    drained: Annotated[bool | UnsetType, says("Whether every retired page is free.")] = UNSET
    freed: Annotated[dict[str, PagesAndBytes] | UnsetType, says("Freed pages by tier.")] = UNSET
    retired: Annotated[dict[str, PagesAndBytes] | UnsetType, says("Pages still in use, by tier.")] = UNSET
    side_caches: Annotated[dict[str, int] | UnsetType, says("Entries dropped of caches without KV, by name.")] = UNSET
    still_warm: Annotated[list[str] | UnsetType, says("Tiers that were not flushed.")] = UNSET
    pending: Annotated[list[str] | UnsetType, says("Tiers that have not acknowledged.")] = UNSET
    dry_run: Annotated[bool | UnsetType, says("True if nothing was changed.")] = UNSET


class KvEventSource(Shape):
    """Where an engine publishes the events of its cache."""

    data_parallel_rank: Annotated[int, says("The engine's number.")]
    endpoint: Annotated[str, says("The zmq address of the events.")]
    replay_endpoint: Annotated[str | None, says("The zmq address for missed events.")]
    topic: Annotated[str, says("The first frame of each message.")]
