"""Chat completions: a conversation through the chat template, answered by an assistant's message."""

from headwater.generation.answer_fields import Json, json_bytes
from headwater.generation.assistant_message import AssistantMessage, MessageDelta, ToolCallDelta
from headwater.generation.model_facts import ModelFacts
from headwater.generation.text_generation import TextChunk, TextGenerator
from headwater.http_api.openai.answer import Envelope, OpenAIAnswer
from headwater.http_api.openai.format import ChatLogprobs, TokenIds
from headwater.http_api.openai.replies import Reply, start_replies
from headwater.http_api.openai.schemas import ChatCompletionRequest
from headwater.messages.generation import Finish, TokenLogprob

_ROLE = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'


async def start_chat(request: ChatCompletionRequest, generator: TextGenerator, model: ModelFacts) -> OpenAIAnswer:
    """Check the request and send it. Raises ApiError (404 for an unknown model), EngineGone, RidInUse."""
    kind = "chat.completion.chunk" if request.stream else "chat.completion"
    envelope = Envelope(request, model, prefix="chatcmpl", object=kind)
    replies = await start_replies(request, envelope.id, generator, model)
    as_ids, with_ids = request.return_tokens_as_token_ids, request.return_token_ids
    logprobs = ChatLogprobs(generator.tokenizer, as_ids=as_ids) if request.logprobs else None
    choices = [
        ChatChoice(reply, logprobs, shows_reasoning=request.include_reasoning, with_ids=with_ids) for reply in replies
    ]
    prompt_ids = list(replies[0].generation.request.prompt_ids) if with_ids else None
    return OpenAIAnswer(request, envelope, choices, prompt_ids=prompt_ids)


class ChatChoice:
    """The assistant's message. Streamed, the role comes first, then pieces of the message, then the finish reason.

    `logprobs` are those of all generated tokens. Streamed, each piece has those of the tokens since the last piece.
    """

    def __init__(
        self, reply: Reply, logprobs: ChatLogprobs | None, *, shows_reasoning: bool, with_ids: bool = False
    ) -> None:
        self.generation = reply.generation
        self._token_ids = TokenIds(reply.generation, is_asked=with_ids)
        self._reply = reply
        self._logprobs = logprobs
        self._shows_reasoning = shows_reasoning
        self._has_begun = False
        self._held_back: list[TokenLogprob] = []  # of tokens whose text is held back

    @property
    def num_reasoning_tokens(self) -> int:
        return self._reply.num_reasoning_tokens

    def whole(self) -> Json:
        generation = self.generation
        assert generation.finish is not None, "it has run to its end"
        message = _message(self._reply.whole(), shows_reasoning=self._shows_reasoning)
        logprobs = self._logprobs.content(generation.logprobs) if self._logprobs else None
        fields = {"message": message, "logprobs": logprobs} | self._finish_fields(generation.finish)
        return fields | self._token_ids.whole()

    def pieces(self, chunk: TextChunk) -> list[bytes]:
        pieces = [] if self._has_begun else [_ROLE]
        self._has_begun = True
        if self._logprobs is not None:
            self._held_back.extend(chunk.logprobs)
        deltas = _deltas(self._reply.take(chunk), shows_reasoning=self._shows_reasoning)
        if not deltas and chunk.finish is not None and (self._held_back or self._token_ids.is_waiting):
            deltas = [b'{"content":""}']
        for delta in deltas:
            logprobs, ids = self._take_logprobs(), self._token_ids.take()
            pieces.append(b'"delta":%b,"logprobs":%b,"finish_reason":null%b' % (delta, logprobs, ids))
        return pieces

    def end(self, finish: Finish) -> bytes:
        return json_bytes({"delta": {}, "logprobs": None} | self._finish_fields(finish))[1:-1]

    def _finish_fields(self, finish: Finish) -> Json:
        return {"finish_reason": self._reply.reason(finish), "matched_stop": finish.matched}

    def _take_logprobs(self) -> bytes:
        if self._logprobs is None:
            return b"null"
        taken, self._held_back = self._held_back, []
        return json_bytes(self._logprobs.content(taken))


def _message(message: AssistantMessage, *, shows_reasoning: bool) -> Json:
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in message.tool_calls
    ]
    content, reasoning = message.content, message.reasoning
    fields = {
        "role": "assistant",
        "content": None if calls and not content else content,
        "refusal": None,
        "tool_calls": calls or None,
    }
    if reasoning and shows_reasoning:  # clients read one name or the other
        fields |= {"reasoning_content": reasoning, "reasoning": reasoning}
    return fields


def _deltas(delta: MessageDelta, *, shows_reasoning: bool) -> list[bytes]:
    """JSON of the deltas, one for each kind of text and one for each piece of a call."""
    deltas: list[bytes] = []
    if delta.reasoning and shows_reasoning:
        text = json_bytes(delta.reasoning)
        deltas.append(b'{"reasoning_content":%b,"reasoning":%b}' % (text, text))
    if delta.content:
        deltas.append(b'{"content":%b}' % json_bytes(delta.content))
    deltas.extend(json_bytes({"tool_calls": [_call_delta(call)]}) for call in delta.tool_calls)
    return deltas


def _call_delta(call: ToolCallDelta) -> Json:
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}
