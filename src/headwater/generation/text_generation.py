"""From token ids to text, for both HTTP APIs and the Python API.

A `TextGeneration` is one prompt and one answer; `merge` runs several of them (n, batches) side by side.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Literal, NamedTuple, Protocol

from headwater.client.engine_client import EngineClient
from headwater.client.generation import Generation
from headwater.generation.chat.formats import ChatFormats
from headwater.generation.concurrency import Account, Permit
from headwater.generation.errors import from_finish, from_value_error
from headwater.generation.grammar.texts import GrammarTexts
from headwater.generation.text_request import TextRequest
from headwater.messages.base import pack_ids
from headwater.messages.generation import Finish, Generate, Output, OutputMeta, TokenLogprob
from headwater.tokenization.text_stream import TextStream
from headwater.tokenization.tokenizer import Tokenizer

SpecialTokenPolicy = Literal["never", "prompts", "always"]  # texts in which special tokens are parsed
WHOLE_ANSWER = 1 << 30  # as an output interval: longer than any answer
ENCODE_IN_THREAD_CHARS = 4096  # longer texts would block the event loop for a millisecond or more


class TextChunk(NamedTuple):
    """What is new since the last chunk. Tokens may lack text while a character or stop string is incomplete."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]  # one per token if asked for, else empty
    finish: Finish | None  # in the last chunk


class Stages(NamedTuple):
    """The stages of one request, in their order. Together they last from its start to its newest token."""

    queue_s: float  # waiting for a place in the batch
    load_s: float  # waiting for pages from the host or from storage
    prefill_s: float  # computing what was not cached, with the way of the first token to this process
    decode_s: float  # from the first token to the last


class GenerationObserver(Protocol):
    """Observes every request, for the metrics. Durations are in seconds."""

    def first_token(self, waited_s: float) -> None: ...

    def next_tokens(self, interval_s: float, num_tokens: int) -> None: ...

    def ended(self, generation: "TextGeneration") -> None:
        """Called once per request. `generation.finish` is None if its client left or it failed."""
        ...


class TextGenerator:
    """Starts generations. Shared by all requests of a process."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        *,
        observer: GenerationObserver | None = None,
        special_tokens: SpecialTokenPolicy = "prompts",
        formats: ChatFormats = ChatFormats(),
        grammars: GrammarTexts | None = None,
        permit: Permit | None = None,
    ) -> None:
        """`permit`: the place of the HTTP request that the generations belong to."""
        self._permit = permit or Permit(Account())
        self.tokenizer = tokenizer
        self.formats = formats
        self.grammars = grammars or GrammarTexts()
        self._special_tokens = special_tokens
        self._client = client
        self._observer = observer

    async def encode(
        self, text: str, *, param: str, add_special_tokens: bool = True, parse_special_tokens: bool | None = None
    ) -> list[int]:
        """Token ids of a text; long ones in a thread. InvalidRequest, naming `param`, if it is no Unicode."""
        parses_special = self.parses_special(parse_special_tokens, is_chat=False)
        encode = partial(
            self.tokenizer.encode, text, add_special_tokens=add_special_tokens, parses_special=parses_special
        )
        is_quick = len(text) <= ENCODE_IN_THREAD_CHARS
        is_quick = is_quick and not self.tokenizer.is_slow_for(text, parses_special=parses_special)
        try:
            return encode() if is_quick else await asyncio.to_thread(encode)
        except ValueError as error:
            message = str(error).removeprefix("text: ")
            raise from_value_error(ValueError(f"{param}: {message}")) from error

    def parses_special(self, given: bool | None, *, is_chat: bool) -> bool:
        """Whether special tokens spelled out in a request's text become control tokens."""
        if given is not None:
            return given
        return self._special_tokens == "always" or (self._special_tokens == "prompts" and not is_chat)

    def together(self) -> AbstractContextManager[None]:
        """Requests that start inside reach the engine together. No `await` may be inside."""
        return self._client.together()

    def start(self, request: TextRequest) -> "TextGeneration":
        """Send the request to an engine. The caller owns the generation: it must reach its end or be closed.

        Raises ApiError 429 if the client's key runs too many requests, EngineGone, NoSuchEngine, RidInUse.
        """
        message = Generate(
            rid=request.rid,
            prompt_ids=pack_ids(request.prompt_ids),
            sampling=request.sampling,
            logprobs=request.logprobs,
            options=request.options,
            grammar=request.grammar,
            # stop strings are found in this process, so every token is needed at once
            output_interval=1 if request.is_streaming or request.text.has_stop else WHOLE_ANSWER,
            pooling=request.pooling,
            account=self._permit.account.number,
        )
        self._permit.open()
        try:
            generation = self._client.generate(message, engine=request.engine)
        except BaseException:
            self._permit.close()
            raise
        return TextGeneration(generation, request, self.tokenizer, observer=self._observer, on_close=self._permit.close)


class TextGeneration:
    """An asynchronous iterator of `TextChunk` that also keeps everything so far.

    Raises while iterating: EngineGone, and ApiError if the engine refuses the request (429 for a full queue). An
    aborted request ends like any other, with `finish.type == "abort"`.
    """

    def __init__(
        self,
        generation: Generation,
        request: TextRequest,
        tokenizer: Tokenizer,
        *,
        observer: GenerationObserver | None = None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_close = on_close
        self.request = request
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] = []
        self.meta: OutputMeta | None = None  # known from the first chunk on
        self.embedding: bytes | None = None  # float32, if the request has `pooling`
        self.finish: Finish | None = None
        self.started_s = time.monotonic()
        self.first_s: float | None = None  # when tokens came first
        self.newest_s: float | None = None  # when tokens came last
        self._generation = generation
        self._observer = observer
        self._is_open = True
        self._stream = TextStream(
            tokenizer,
            prompt_ids=request.prompt_ids,
            stop=request.text.stop,
            stop_regex=request.text.stop_regex,
            include_stop=request.text.keep_stop,
            skip_special_tokens=request.text.skip_special_tokens,
        )

    @property
    def text(self) -> str:
        """The text of all chunks."""
        return self._stream.text

    @property
    def engine(self) -> int:
        """Index of the engine that runs it."""
        return self._generation.engine

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def elapsed_s(self) -> float:
        """From the start to the newest tokens."""
        return (self.newest_s or time.monotonic()) - self.started_s

    def stages(self) -> Stages:
        """The time of each stage so far. Zeros before the first output."""
        if self.meta is None:
            return Stages(0.0, 0.0, 0.0, 0.0)
        newest_s = self.newest_s or time.monotonic()
        first_s = self.first_s or newest_s
        load_s = min(self.meta.load_time_s, self.meta.queue_time_s)
        return Stages(
            queue_s=self.meta.queue_time_s - load_s,
            load_s=load_s,
            prefill_s=max(0.0, first_s - self.started_s - self.meta.queue_time_s),
            decode_s=newest_s - first_s,
        )

    def __aiter__(self) -> "TextGeneration":
        return self

    async def __anext__(self) -> TextChunk:
        if not self._is_open:
            raise StopAsyncIteration
        try:
            chunk = self._absorb(await self._generation.take())
            if chunk.finish is not None and (error := from_finish(chunk.finish)):
                raise error
        except Exception:
            self.close()
            raise
        if chunk.finish is not None:
            self.close()
        return chunk

    async def run(self) -> "TextGeneration":
        """Iterate to the end; returns self."""
        async for _ in self:
            pass
        return self

    def close(self) -> None:
        """Stop. The engine aborts the request unless it has ended. Harmless when repeated."""
        if self._is_open:
            self._is_open = False
            self._generation.close()
            self._on_close()
            if self._observer is not None:
                self._observer.ended(self)

    def _absorb(self, outputs: list[Output]) -> TextChunk:
        num_tokens, num_logprobs = len(self.token_ids), len(self.logprobs)
        pieces: list[str] = []
        for output in outputs:
            pieces.append(self._absorb_one(output))
            if self.finish is not None:
                break
        token_ids = tuple(self.token_ids[num_tokens:])
        self._observe(len(token_ids))
        return TextChunk("".join(pieces), token_ids, tuple(self.logprobs[num_logprobs:]), self.finish)

    def _absorb_one(self, output: Output) -> str:
        """Add the output of one step; returns its text."""
        if output.meta is not None:
            self.meta = output.meta
        if output.prompt_logprobs is not None:
            self.prompt_logprobs.extend(output.prompt_logprobs)
        if output.embedding is not None:
            self.embedding = output.embedding
        token_ids, finish = output.token_ids, output.finish
        hides_last = (
            finish is not None
            and not self.request.text.keep_stop
            and bool(token_ids)
            and finish.type == "stop"
            and finish.matched == token_ids[-1]
        )
        delta = self._stream.feed(token_ids[:-1] if hides_last else token_ids)
        text = delta.text
        num_kept = delta.num_tokens_used if delta.matched_stop is not None else len(token_ids)
        if finish is not None and delta.matched_stop is None:
            delta = self._stream.finish()
            text += delta.text
        if delta.matched_stop is not None:
            finish = Finish(type="stop", matched=delta.matched_stop)
        self.token_ids.extend(token_ids[:num_kept])
        if output.logprobs is not None:
            self.logprobs.extend(output.logprobs[:num_kept])
        self.finish = finish
        return text

    def _observe(self, num_tokens: int) -> None:
        if num_tokens == 0:
            return
        now_s = time.monotonic()
        if self.first_s is None:
            self.first_s = now_s
        if self._observer is not None:
            if self.newest_s is None:
                self._observer.first_token(now_s - self.started_s)
            else:
                self._observer.next_tokens(now_s - self.newest_s, num_tokens)
        self.newest_s = now_s


async def merge(generations: Sequence[TextGeneration]) -> AsyncGenerator[list[tuple[int, TextChunk]]]:
    """New chunks of several generations as (index, chunk), at most one of each generation at a time.

    The chunks agree with the state of their generations only until the next iteration: use them before any await. All
    generations are closed at the end. Raises the first error of any generation.
    """
    if len(generations) == 1:  # without a task, which would cost as much as the rest of a chunk
        try:
            async for chunk in generations[0]:
                yield [(0, chunk)]
        finally:
            generations[0].close()
        return
    arrived: dict[int, TextChunk] = {}
    errors: list[Exception] = []
    news = asyncio.Event()

    async def pump(index: int, generation: TextGeneration) -> None:
        try:
            async for chunk in generation:
                arrived[index] = _joined(arrived[index], chunk) if index in arrived else chunk
                news.set()
        except Exception as error:  # noqa: BLE001 - raised again below, in the iterating task
            errors.append(error)
            news.set()

    pumps = [asyncio.ensure_future(pump(index, g)) for index, g in enumerate(generations)]
    try:
        num_open = len(generations)
        while num_open:
            await news.wait()
            news.clear()
            if errors:
                raise errors[0]
            taken = list(arrived.items())
            arrived.clear()
            num_open -= sum(chunk.finish is not None for _, chunk in taken)
            yield taken
    finally:
        for task in pumps:
            task.cancel()
        for generation in generations:
            generation.close()


def _joined(first: TextChunk, second: TextChunk) -> TextChunk:
    return TextChunk(
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        finish=second.finish,
    )


async def run_all(generations: Sequence[TextGeneration]) -> None:
    """Run generations side by side to their ends. If one fails, or this is cancelled, all are closed."""
    try:
        await asyncio.gather(*(generation.run() for generation in generations))
    finally:
        for generation in generations:
            generation.close()
