"""Chat completions: a conversation through the chat template, answered by an assistant's message."""

from headwater.generation.answer_fields import Json, json_bytes
from headwater.generation.chat_prompts import encode_messages
from headwater.generation.errors import bad_request
from headwater.generation.model_facts import ModelFacts
from headwater.generation.text_generation import TextChunk, TextGeneration, TextGenerator
from headwater.http_api.openai.answer import Envelope, OpenAIAnswer, check_model, start_generations
from headwater.http_api.openai.format import ChatLogprobs, finish_fields
from headwater.http_api.openai.sampling import openai_sampling
from headwater.http_api.openai.schemas import ChatCompletionRequest
from headwater.messages.generation import Finish, LogprobParams, TokenLogprob

_ROLE = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'


async def start_chat(request: ChatCompletionRequest, generator: TextGenerator, model: ModelFacts) -> OpenAIAnswer:
    """Check the request and send it. Raises ApiError (404 for an unknown model), EngineGone, RidInUse."""
    check_model(request.model, model)
    sampling = openai_sampling(request, model, max_new_tokens=_max_tokens(request, model))
    if request.top_logprobs and not request.logprobs:
        raise bad_request("top_logprobs", "top_logprobs: needs logprobs to be true")
    prompt_ids = await encode_messages(request, generator)
    kind = "chat.completion.chunk" if request.stream else "chat.completion"
    envelope = Envelope(request, model, prefix="chatcmpl", object=kind)
    asked = LogprobParams(top=request.top_logprobs) if request.logprobs else None
    generations = start_generations(
        request, envelope.id, generator, model, [prompt_ids], param="messages", sampling=sampling, logprobs=asked
    )
    logprobs = ChatLogprobs(generator.tokenizer) if request.logprobs else None
    return OpenAIAnswer(request, envelope, [ChatChoice(generation, logprobs) for generation in generations])


class ChatChoice:
    """The assistant's message. Streamed, the role comes first, then pieces of content, then the finish reason."""

    def __init__(self, generation: TextGeneration, logprobs: ChatLogprobs | None) -> None:
        self.generation = generation
        self._logprobs = logprobs
        self._has_begun = False
        self._held_back: list[TokenLogprob] = []  # of tokens whose text is held back

    def whole(self) -> Json:
        generation = self.generation
        assert generation.finish is not None, "it has run to its end"
        message = {"role": "assistant", "content": generation.text, "refusal": None, "tool_calls": None}
        logprobs = self._logprobs.content(generation.logprobs) if self._logprobs else None
        return {"message": message, "logprobs": logprobs} | finish_fields(generation.finish)

    def pieces(self, chunk: TextChunk) -> list[bytes]:
        pieces = [] if self._has_begun else [_ROLE]
        self._has_begun = True
        if self._logprobs is not None:
            self._held_back.extend(chunk.logprobs)
        if chunk.text or (chunk.finish is not None and self._held_back):
            content, logprobs = json_bytes(chunk.text), self._take_logprobs()
            pieces.append(b'"delta":{"content":%b},"logprobs":%b,"finish_reason":null' % (content, logprobs))
        return pieces

    def end(self, finish: Finish) -> bytes:
        return json_bytes({"delta": {}, "logprobs": None} | finish_fields(finish))[1:-1]

    def _take_logprobs(self) -> bytes:
        if self._logprobs is None:
            return b"null"
        taken, self._held_back = self._held_back, []
        return json_bytes(self._logprobs.content(taken))


def _max_tokens(request: ChatCompletionRequest, model: ModelFacts) -> int:
    return request.max_completion_tokens or request.max_tokens or model.max_context
