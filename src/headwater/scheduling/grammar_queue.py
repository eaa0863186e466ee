"""Requests whose grammars are being compiled, and the compiled grammars that are kept."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from headwater.cache.jobs import Job, JobRunner, ThreadJobRunner
from headwater.clock import Clock
from headwater.grammars.matcher import GrammarCompiler, Matcher
from headwater.messages.generation import Finish
from headwater.scheduling.answers import engine_failed, refuse_compilation, refuse_grammar
from headwater.scheduling.request import Phase, Request


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """Bounds on grammars, which clients choose."""

    max_bytes: int = 1 << 20  # of a grammar's text
    compile_timeout_s: float = 10.0
    max_cached: int = 256  # compiled grammars that are kept for later requests


@dataclass(slots=True)
class GrammarCounters:
    """Counts since the engine started, as the metrics show them."""

    grammars_compiled: int = 0
    grammars_failed: int = 0  # no grammars, or compiled for too long
    grammar_hits: int = 0  # requests whose grammar was compiled already

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(slots=True)
class _Compilation:
    """A grammar that is being compiled, and the requests that wait for it."""

    job: Job
    begun_s: float
    requests: list[Request] = field(default_factory=list)


class GrammarQueue:
    """Compiles grammars off the loop. The requests hold nothing meanwhile, and block no other request.

    A request arrives in phase WAITING and leaves in phase WAITING, with its own matcher. Requests of one grammar share
    its compilation. The newest compiled grammars are kept, by the hash of their text.
    """

    def __init__(
        self,
        compiler: GrammarCompiler | None,
        *,
        clock: Clock,
        jobs: JobRunner | None = None,
        limits: GrammarLimits | None = None,
    ) -> None:
        """Without a `compiler`, requests with grammars are refused."""
        self.compiler = compiler
        self.counters = GrammarCounters()
        self._jobs = jobs or ThreadJobRunner(name="grammar")
        self._limits = limits or GrammarLimits()
        self._clock = clock
        self._compilations: dict[bytes, _Compilation] = {}
        self._cached: OrderedDict[bytes, Matcher] = OrderedDict()  # at their starts; the newest use last

    def __len__(self) -> int:
        return sum(len(it.requests) for it in self._compilations.values())

    def __iter__(self) -> Iterator[Request]:
        return (request for it in self._compilations.values() for request in it.requests)

    @property
    def needs_polling(self) -> bool:
        """Whether a compilation may end, which sends no message."""
        return bool(self._compilations)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @staticmethod
    def key_of(text: str) -> bytes:
        """What a compiled grammar is kept under."""
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    def clear_cache(self) -> int:
        """Forget the compiled grammars; returns how many. Requests keep their matchers."""
        num_cached = len(self._cached)
        self._cached.clear()
        return num_cached

    def refusal(self, request: Request) -> Finish | None:
        """Why a request's grammar is not even compiled. None if it has no grammar."""
        if request.grammar is None:
            return None
        if self.compiler is None:
            return refuse_grammar("this engine computes without grammars")
        num_bytes = len(request.grammar.text.encode())
        if num_bytes > self._limits.max_bytes:
            return refuse_grammar(f"it has {num_bytes} bytes, more than --grammar-max-bytes ({self._limits.max_bytes})")
        return None

    def begin(self, request: Request) -> bool:
        """Give a new request its matcher, or have its grammar compiled first. Whether the request waits here."""
        if request.grammar is None or not request.grammar.text:
            return False
        key = self.key_of(request.grammar.text)
        cached = self._cached.get(key)
        if cached is not None:
            self._cached.move_to_end(key)
            self.counters.grammar_hits += 1
            request.grammar.begin(cached.copy())
            return False
        if key not in self._compilations:
            job = self._submit(request.grammar.text)
            self._compilations[key] = _Compilation(job, begun_s=self._clock.now())
        request.enter(Phase.GRAMMAR)
        self._compilations[key].requests.append(request)
        return True

    def take_done(self) -> list[tuple[Request, Finish | None]]:
        """Requests whose compilation has ended: in phase WAITING, or still in GRAMMAR with the `Finish` that is due."""
        if not self._compilations:
            return []
        taken: list[tuple[Request, Finish | None]] = []
        is_reading = self.compiler is not None and not self.compiler.is_ready
        for key, compilation in list(self._compilations.items()):
            is_done = compilation.job.is_done()
            if is_reading:  # the vocabulary, which is not the grammar's fault
                compilation.begun_s = self._clock.now()
            if not is_done and self._clock.now() - compilation.begun_s < self._limits.compile_timeout_s:
                continue
            del self._compilations[key]
            failure = self._failure(compilation.job, is_done=is_done)
            matcher = None if failure is not None else self._keep(key, compilation.job.result)
            for request in compilation.requests:
                if matcher is not None and request.grammar is not None:
                    request.enter(Phase.WAITING)
                    request.grammar.begin(matcher.copy())
                taken.append((request, failure))
        return taken

    def remove(self, request: Request) -> None:
        """Stop waiting. The compilation goes on, for later requests."""
        for compilation in self._compilations.values():
            if request in compilation.requests:
                compilation.requests.remove(request)

    def _submit(self, text: str) -> Job:
        assert self.compiler is not None, "a grammar without a compiler is refused"
        compile_grammar = self.compiler.compile
        job = self._jobs.submit(lambda _: compile_grammar(text))
        if job is not None:
            return job
        full = Job(_refuse_full)
        full.run()
        return full

    def _failure(self, job: Job, *, is_done: bool) -> Finish | None:
        """Why the compilation has failed; None if it has not."""
        if is_done and job.error is None:
            self.counters.grammars_compiled += 1
            return None
        self.counters.grammars_failed += 1
        if not is_done:
            job.abandon()
            return refuse_grammar(f"it takes longer than {self._limits.compile_timeout_s:g} s to compile")
        if isinstance(job.error, ValueError):
            return refuse_grammar(str(job.error))
        assert job.error is not None
        return refuse_compilation() if isinstance(job.error, _QueueFull) else engine_failed(job.error)

    def _keep(self, key: bytes, matcher: Matcher) -> Matcher:
        self._cached[key] = matcher
        while len(self._cached) > self._limits.max_cached:
            self._cached.popitem(last=False)
        return matcher


class _QueueFull(Exception):
    """More grammars wait to be compiled than the queue holds."""


def _refuse_full(_: Job) -> None:
    raise _QueueFull
