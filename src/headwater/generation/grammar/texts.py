"""Grammars of requests, made beside this process and kept for requests that repeat them."""

import asyncio
import contextlib
import hashlib
import queue
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from headwater.generation.errors import ApiError
from headwater.generation.grammar.fields import GrammarFields, GrammarSource, grammar_source, invalid_grammar
from headwater.grammars.checker import GrammarChecker, question
from headwater.grammars.errors import GrammarError
from headwater.grammars.json_options import JsonOptions
from headwater.messages.generation import Grammar

MAX_KEPT_CHARS = 8_000_000  # of all texts together
MAX_SECONDS = 5.0
_NUM_CHECKERS = 2  # grammars made to be slow take these, and nothing else waits for them


class GrammarTexts:
    """Makes grammars for requests. Shared by all requests of a process.

    Its own processes start with the first grammar, or when it is prepared.
    """

    def __init__(self, *, max_kept_chars: int = MAX_KEPT_CHARS, max_seconds: float = MAX_SECONDS) -> None:
        self._max_kept_chars = max_kept_chars
        self._max_seconds = max_seconds
        self._kept: OrderedDict[bytes, str] = OrderedDict()
        self._num_kept_chars = 0
        self._threads: ThreadPoolExecutor | None = None
        self._checkers: queue.LifoQueue[GrammarChecker] = queue.LifoQueue()  # the one used last is started already
        for _ in range(_NUM_CHECKERS):
            self._checkers.put(GrammarChecker())

    async def prepare(self) -> None:
        """Start a process, so that the first grammar need not wait for it. Reports no error: the first grammar does."""
        with contextlib.suppress(ApiError):
            await self._make(GrammarSource("", question("json_object", None, JsonOptions())))

    async def of(self, body: GrammarFields, *, prefix: str = "") -> Grammar | None:
        """The grammar that a body asks for; None: free text. InvalidRequest names the field; 503 while others run."""
        source = grammar_source(body, prefix=prefix)
        if source is None:
            return None
        return Grammar(text=await self._text(source))

    async def written(self, write: Callable[[], str], *, asked: str, param: str) -> str:
        """A grammar that `write` makes, in a thread, of what a client sent in `param`; "" stays "". Errors as above.

        `asked` is equal for equal grammars.
        """

        async def make() -> str:
            text = await asyncio.to_thread(write)
            return await self._make(GrammarSource(param, question("made", text, JsonOptions()))) if text else ""

        return await self._kept_or_made(f"written: {asked}", make)

    def close(self) -> None:
        """End the threads and processes, once what they check has ended. A later grammar starts them again."""
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None
        for _ in range(_NUM_CHECKERS):
            checker = self._checkers.get()
            checker.close()
            self._checkers.put(checker)

    async def _text(self, source: GrammarSource) -> str:
        return await self._kept_or_made(source.asked, partial(self._make, source))

    async def _kept_or_made(self, asked: str, make: Callable[[], Awaitable[str]]) -> str:
        key = hashlib.blake2b(asked.encode(), digest_size=32).digest()
        if (text := self._kept.get(key)) is None:
            text = await make()
            self._keep(key, text)
        else:
            self._kept.move_to_end(key)
        return text

    async def _make(self, source: GrammarSource) -> str:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_NUM_CHECKERS, thread_name_prefix="grammars")
        made = self._threads.submit(partial(self._ask, source.asked))
        try:
            # what has begun ends by itself in this time; what has not is refused
            return await asyncio.wait_for(asyncio.wrap_future(made), 2 * self._max_seconds)
        except GrammarError as error:
            raise invalid_grammar(source.param, error) from None
        except (TimeoutError, OSError):
            message = f"{source.param}: other grammars are being checked; try again"
            raise ApiError(503, message, param=source.param, code="grammars_busy") from None

    def _ask(self, asked: str) -> str:
        checker = self._checkers.get()
        try:
            return checker.ask(asked, timeout_s=self._max_seconds)
        finally:
            self._checkers.put(checker)

    def _keep(self, key: bytes, text: str) -> None:
        if key not in self._kept:
            self._num_kept_chars += len(text)
        self._kept[key] = text
        while self._num_kept_chars > self._max_kept_chars:
            _, dropped = self._kept.popitem(last=False)
            self._num_kept_chars -= len(dropped)
