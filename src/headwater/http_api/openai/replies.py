"""From the body of a chat completion to its replies: each a running generation and the message that is read from it.

Other APIs that hold conversations build a `ChatCompletionRequest`, start its replies here, and write them in their own
form.
"""

from dataclasses import dataclass

from headwater.generation.assistant_message import AssistantMessage, MessageDelta
from headwater.generation.chat.answer_form import AnswerForm
from headwater.generation.chat.thinking import NO_THINKING, Thinking, thinking_after
from headwater.generation.chat.tool_choice import read_tool_choice
from headwater.generation.chat_prompts import encode_messages
from headwater.generation.errors import bad_request
from headwater.generation.model_facts import ModelFacts
from headwater.generation.text_generation import TextChunk, TextGeneration, TextGenerator
from headwater.http_api.openai.answer import check_model, start_generations
from headwater.http_api.openai.sampling import openai_sampling
from headwater.http_api.openai.schemas import ChatCompletionRequest
from headwater.messages.generation import Finish, LogprobParams


@dataclass(slots=True)
class Reply:
    """One of a request's `n` replies. It is read chunk by chunk (`take`) or at its end (`whole`), never both."""

    generation: TextGeneration
    message: AssistantMessage
    thinking: Thinking = NO_THINKING

    def take(self, chunk: TextChunk) -> MessageDelta:
        """What a chunk of the generation adds to the message. Every chunk must be taken, in order."""
        return self.message.feed(chunk.text, is_last=chunk.finish is not None)

    def whole(self) -> AssistantMessage:
        """The message of a generation that has run to its end."""
        self.message.feed(self.generation.text, is_last=True)
        return self.message

    def reason(self, finish: Finish) -> str:
        """OpenAI's `finish_reason`: `stop`, `length`, `tool_calls`, or `abort`."""
        return "tool_calls" if finish.type == "stop" and self.message.tool_calls else finish.type

    @property
    def num_reasoning_tokens(self) -> int:
        """Generated tokens that belong to the thinking."""
        return self.thinking.num_tokens(self.generation.token_ids)


async def start_replies(
    request: ChatCompletionRequest, rid: str, generator: TextGenerator, model: ModelFacts
) -> list[Reply]:
    """Check the request and send it: `request.n` replies. The caller owns their generations.

    Raises ApiError (404 for an unknown model), EngineGone, RidInUse; then nothing runs.
    """
    check_model(request.model, model)
    sampling = openai_sampling(request, model, max_new_tokens=_max_tokens(request, model))
    if request.top_logprobs and not request.logprobs:
        raise bad_request("top_logprobs", "top_logprobs: needs logprobs to be true")
    answer = await generator.grammars.of(request)
    prompt_ids = await encode_messages(request, generator)
    form = _form(request, prompt_ids, generator)
    generations = start_generations(
        request,
        rid,
        generator,
        model,
        [prompt_ids],
        param="messages",
        sampling=sampling,
        logprobs=LogprobParams(top=request.top_logprobs) if request.logprobs else None,
        text=form.text_options(request.text_options()),
        grammar=await form.grammar(answer, generator.grammars, budget=request.reasoning_budget),
    )
    return [Reply(generation, form.message(), form.thinking) for generation in generations]


def _form(request: ChatCompletionRequest, prompt_ids: list[int], generator: TextGenerator) -> AnswerForm:
    formats, tokenizer = generator.formats, generator.tokenizer
    return AnswerForm(
        choice=read_tool_choice(request.tools, request.tool_choice),
        tool_format=formats.tools,
        thinking=thinking_after(prompt_ids, tokenizer, formats.reasoning, continued=_continued(request)),
        tokenizer=tokenizer,
        is_parallel=request.parallel_tool_calls,
        separates_reasoning=request.separate_reasoning,
        streams_reasoning=request.stream_reasoning,
        holds_calls=request.whole_tool_calls,
    )


def _continued(request: ChatCompletionRequest) -> str:
    """The text of the message that the answer continues."""
    content = request.messages[-1].get("content") if request.continue_final_message else ""
    return content if isinstance(content, str) else ""


def _max_tokens(request: ChatCompletionRequest, model: ModelFacts) -> int:
    return request.max_completion_tokens or request.max_tokens or model.max_context
