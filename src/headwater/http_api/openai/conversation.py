"""For the other APIs that hold conversations: their bodies become a chat completion with one reply."""

import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any, ClassVar

from pydantic import Field, ValidationError

from headwater.generation.answer_fields import Json
from headwater.generation.assistant_message import AssistantMessage, MessageDelta
from headwater.generation.body import Names
from headwater.generation.chat_prompts import encode_messages
from headwater.generation.errors import ApiError, aborted, from_validation
from headwater.generation.field_table import REFUSED
from headwater.generation.request_schemas import OptionFields, SamplingFields
from headwater.generation.text_generation import TextChunk
from headwater.generation.validation import Name, NumTokens, Seed
from headwater.http_api.openai.answer import check_model, start_generations
from headwater.http_api.openai.replies import Reply, start_replies
from headwater.http_api.openai.sampling import openai_sampling
from headwater.http_api.openai.schemas import ChatCompletionRequest, CompletionRequest
from headwater.http_api.services import Services
from headwater.messages.generation import Finish, LogprobParams

# What a chat completion calls a field, and its name in the API that was called. A name that begins with a dot is one of
# an inner field.
Renamed = Sequence[tuple[str, str]]


class ConversationRequest(SamplingFields, OptionFields):
    """The options that the other APIs share with chat completions. They are extensions there, except for a few."""

    names: ClassVar[Names] = Names(refused=REFUSED)
    model: str = Field(default="default", description="The served name, or `default`.")
    n: int = Field(default=1, ge=1, le=1, description="This API gives one answer.")
    seed: Seed | None = Field(default=None, description="Same seed, same noise at each position.")
    min_tokens: NumTokens = Field(default=0, description="No end of text and no stop token before this many.")
    rid: Name | None = Field(default=None, description="Name of the request for /abort_request; default: its `id`.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Further variables for the chat template, for example `enable_thinking`."
    )

    def shared_fields(self) -> Json:
        """The given fields that a chat completion has under the same name."""
        names = ConversationRequest.model_fields.keys() & self.model_fields_set
        return {name: getattr(self, name) for name in names - {"rid"}}


def chat_request(fields: Json, renamed: Renamed) -> ChatCompletionRequest:
    """The chat completion. Raises ApiError 400 in the words of the API that was called."""
    try:
        return ChatCompletionRequest.model_validate(fields)
    except ValidationError as error:
        raise in_words_of(from_validation(error.errors()), renamed) from None


async def start_reply(request: ChatCompletionRequest, rid: str, services: Services, renamed: Renamed) -> Reply:
    """Send the request. The caller owns the generation. Raises ApiError, EngineGone, RidInUse; then nothing runs."""
    try:
        (reply,) = await start_replies(request, rid, services.generator, services.model)
    except ApiError as error:
        raise in_words_of(error, renamed) from error
    return reply


async def start_raw_reply(fields: Json, rid: str, services: Services, renamed: Renamed) -> Reply:
    """The same for a completion: a prompt without the chat template, whose answer is all content."""
    generator, model = services.generator, services.model
    try:
        request = CompletionRequest.model_validate(fields)
        check_model(request.model, model)
        sampling = openai_sampling(request, model, max_new_tokens=request.max_tokens)
        asked = None if request.logprobs is None else LogprobParams(top=request.logprobs)
        prompt_ids = await generator.encode(str(request.prompt), param="prompt")
        (generation,) = start_generations(
            request, rid, generator, model, [prompt_ids], param="prompt", sampling=sampling, logprobs=asked
        )
    except ValidationError as error:
        raise in_words_of(from_validation(error.errors()), renamed) from None
    except ApiError as error:
        raise in_words_of(error, renamed) from error
    return Reply(generation, AssistantMessage())


async def count_prompt(request: ChatCompletionRequest, services: Services, renamed: Renamed) -> int:
    """The tokens of the request's prompt. Raises ApiError."""
    try:
        check_model(request.model, services.model)
        return len(await encode_messages(request, services.generator))
    except ApiError as error:
        raise in_words_of(error, renamed) from error


async def finished(reply: Reply) -> AssistantMessage:
    """Run to the end; the whole message. Raises EngineGone, ApiError."""
    await reply.generation.run()
    _raise_if_aborted(reply.generation.finish)
    return reply.whole()


async def deltas_of(reply: Reply) -> AsyncGenerator[tuple[MessageDelta, TextChunk]]:
    """What is new in the message, chunk by chunk. Raises EngineGone, ApiError."""
    async for chunk in reply.generation:
        yield reply.take(chunk), chunk
    _raise_if_aborted(reply.generation.finish)


def arguments_object(arguments: str) -> Json:
    """A call's arguments as an object. What is none, such as a call that a limit cut off, stays a text in one."""
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"unparsed_arguments": arguments}


def in_words_of(error: ApiError, renamed: Renamed) -> ApiError:
    """The error with the fields' names in the API that was called."""
    for theirs, here in renamed:
        error.message = _renamed(error.message, theirs, here)
        error.param = None if error.param is None else _renamed(error.param, theirs, here)
    return error


def _renamed(text: str, theirs: str, here: str) -> str:
    if theirs.startswith("."):
        return text.replace(theirs, here)
    return here + text.removeprefix(theirs) if text.startswith(theirs) else text


def _raise_if_aborted(finish: Finish | None) -> None:
    """An aborted answer is incomplete and must not look complete."""
    if finish is not None and finish.type == "abort":
        raise aborted(finish)
