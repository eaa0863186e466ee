"""Completions: prompts as text or token ids, continued or, with `echo`, scored."""

from typing import Any

from headwater.generation.answer_fields import Json, json_bytes
from headwater.generation.errors import bad_request
from headwater.generation.model_facts import ModelFacts, RequestLimits
from headwater.generation.sampling import check_prompt
from headwater.generation.text_generation import TextChunk, TextGeneration, TextGenerator
from headwater.http_api.openai.answer import Envelope, OpenAIAnswer, check_model, start_generations
from headwater.http_api.openai.format import CompletionLogprobs, TokenIds, finish_fields
from headwater.http_api.openai.sampling import openai_sampling
from headwater.http_api.openai.schemas import CompletionRequest
from headwater.messages.base import TokenArray
from headwater.messages.generation import Finish, LogprobParams, TokenLogprob


async def start_completion(
    request: CompletionRequest, generator: TextGenerator, model: ModelFacts, limits: RequestLimits
) -> OpenAIAnswer:
    """Check the request and send it. Raises ApiError (404 for an unknown model), EngineGone, RidInUse."""
    check_model(request.model, model)
    sampling = openai_sampling(request, model, max_new_tokens=request.max_tokens)
    _refuse_best_of(request)
    grammar = await generator.grammars.of(request)
    prompts, texts = await _prompts(request, generator, model, limits)
    asked = None
    if request.logprobs is not None:
        asked = LogprobParams(top=request.logprobs, prompt_start=0 if request.echo else -1)
    envelope = Envelope(request, model, prefix="cmpl", object="text_completion")
    generations = start_generations(
        request,
        envelope.id,
        generator,
        model,
        prompts,
        param="prompt",
        sampling=sampling,
        logprobs=asked,
        grammar=grammar,
    )
    choices = []
    for number, generation in enumerate(generations):
        echo = texts[number // request.n] if request.echo else ""
        logprobs = None
        if asked is not None:
            logprobs = CompletionLogprobs(generator.tokenizer, as_ids=request.return_tokens_as_token_ids)
        with_ids = request.return_token_ids
        choices.append(CompletionChoice(generation, echo=echo, logprobs=logprobs, with_ids=with_ids))
    return OpenAIAnswer(request, envelope, choices)


class CompletionChoice:
    """A text that continues the prompt, or with `echo` begins with it."""

    def __init__(
        self, generation: TextGeneration, *, echo: str, logprobs: CompletionLogprobs | None, with_ids: bool = False
    ) -> None:
        self.generation = generation
        self._token_ids = TokenIds(generation, is_asked=with_ids)
        self._prompt_ids = {"prompt_token_ids": list(generation.request.prompt_ids)} if with_ids else {}
        self._echo = echo
        self._logprobs = logprobs
        self._has_begun = False
        self.num_reasoning_tokens = 0  # thinking is not separated here
        self._held_back: list[TokenLogprob] = []  # of tokens whose text is held back

    def whole(self) -> Json:
        generation = self.generation
        assert generation.finish is not None, "it has run to its end"
        logprobs = None
        if self._logprobs is not None:
            logprobs = self._logprobs.columns([*generation.prompt_logprobs, *generation.logprobs])
        fields = {"text": self._echo + generation.text, "logprobs": logprobs} | finish_fields(generation.finish)
        return fields | self._token_ids.whole() | self._prompt_ids

    def pieces(self, chunk: TextChunk) -> list[bytes]:
        text, ids = chunk.text, b""
        if not self._has_begun:
            self._has_begun = True
            ids = b"," + json_bytes(self._prompt_ids)[1:-1] if self._prompt_ids else b""
            text = self._echo + text
            if self._logprobs is not None:
                self._held_back.extend(self.generation.prompt_logprobs)
        if self._logprobs is not None:
            self._held_back.extend(chunk.logprobs)
        is_waiting = bool(self._held_back) or self._token_ids.is_waiting
        if not text and not ids and not (chunk.finish is not None and is_waiting):
            return []
        ids += self._token_ids.take()
        return [b'"text":%b,"logprobs":%b,"finish_reason":null%b' % (json_bytes(text), self._take_logprobs(), ids)]

    def end(self, finish: Finish) -> bytes:
        return json_bytes({"text": "", "logprobs": None} | finish_fields(finish))[1:-1]

    def _take_logprobs(self) -> bytes:
        if self._logprobs is None:
            return b"null"
        taken, self._held_back = self._held_back, []
        return json_bytes(self._logprobs.columns(taken))


async def _prompts(
    request: CompletionRequest, generator: TextGenerator, model: ModelFacts, limits: RequestLimits
) -> tuple[list[TokenArray], list[str]]:
    """Checked token ids and text of each prompt. Token ids are decoded only if they are echoed."""
    given: Any = request.prompt
    is_one = isinstance(given, str) or not given or isinstance(given[0], int)
    items = [given] if is_one else given
    if not 1 <= len(items) <= limits.max_batch:
        raise bad_request("prompt", f"prompt: must hold 1 to {limits.max_batch} prompts, got {len(items)}")
    prompts: list[TokenArray] = []
    texts: list[str] = []
    for item in items:
        if isinstance(item, str):
            ids = await generator.encode(
                item,
                param="prompt",
                add_special_tokens=request.add_special_tokens,
                parse_special_tokens=request.parse_special_tokens,
            )
        else:
            ids = item
        prompts.append(check_prompt(ids, model, param="prompt", is_prefill=request.max_tokens == 0))
        if isinstance(item, str):
            texts.append(item)
        else:
            skips = request.skip_special_tokens
            texts.append(generator.tokenizer.decode(item, skip_special_tokens=skips) if request.echo else "")
    return prompts, texts


def _refuse_best_of(request: CompletionRequest) -> None:
    if request.best_of not in (None, 1, request.n):
        raise bad_request("best_of", f"best_of: must be 1 or n ({request.n}), got {request.best_of}")
