"""One generation, from its arrival to its last token."""

import itertools
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt
from msgspec import structs

from headwater.cache.lease import Lease, TokenSequence
from headwater.cache.namespace import Namespace
from headwater.cache.prefetch import Prefetch
from headwater.cache.transfer import Restore
from headwater.messages.base import unpack_ids
from headwater.messages.generation import Generate, Pooling, TokenLogprob
from headwater.scheduling.adapters import AdapterContent
from headwater.scheduling.grammar_state import GrammarState
from headwater.scheduling.plan import PageUpdate
from headwater.scheduling.speculation.drafting import Drafting

_arrivals = itertools.count()


class Phase(Enum):
    """Where a request is. `_NEXT` below says which changes exist."""

    WAITING = "waiting"  # holds nothing
    GRAMMAR = "grammar"  # its grammar is being compiled; holds nothing
    LOADING = "loading"  # its pages are being copied up; not in the batch
    PREFILLING = "prefilling"  # in a slot, prompt tokens left to launch
    DECODING = "decoding"  # in a slot, its prompt is launched
    FINISHED = "finished"


_NEXT = {
    Phase.WAITING: {Phase.GRAMMAR, Phase.LOADING, Phase.PREFILLING, Phase.FINISHED},
    Phase.GRAMMAR: {Phase.WAITING, Phase.FINISHED},
    Phase.LOADING: {Phase.WAITING, Phase.FINISHED},
    Phase.PREFILLING: {Phase.DECODING, Phase.WAITING, Phase.FINISHED},
    Phase.DECODING: {Phase.WAITING, Phase.FINISHED},
    Phase.FINISHED: set(),
}


@dataclass(slots=True)
class Progress:
    """How far steps have computed a request that is in a slot. Written by `RunningRequests`.

    `num_computed` counts tokens whose KV launched steps have written or will write, `num_written` those whose step has
    been collected. They differ only while a step is in flight.
    """

    num_computed: int = 0
    num_written: int = 0
    num_launched_samples: int = 0  # tokens sampled by launched steps, collected or not
    last_step_id: int = -1  # last launched step that uses its pages
    page_updates: list[PageUpdate] = field(default_factory=list)  # for the next plan its slot is in


@dataclass(slots=True)
class Loading:
    """Pages on their way to the device for a request, and where its prompt was found. Written by `LoadingRequests`."""

    restore: Restore | None = None  # what it waits for while loading
    prefetch: Prefetch | None = None  # on its way from storage for it
    since_s: float = 0.0  # when it began to wait
    seconds: float = 0.0  # that it has waited before it started
    may_restore: bool = True  # False after one restore, so that a request cannot be loading forever
    num_restored_tokens: int = 0  # copied from the host to the device for it
    num_cached_tokens: int = 0  # of its prompt, found in the cache when it first started
    num_host_tokens: int = 0  # of these, found on the host
    num_storage_tokens: int = 0  # of these, found in storage


@dataclass(slots=True)
class Unsent:
    """What a request has produced and its client has not received. Written by `OutputBuffer`."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    pooled: npt.NDArray[np.float64] | None = None  # the sum of hidden states so far


class Request:
    """One generation: who asked for what, and its phase. Each part of its state is written by the part's owner."""

    def __init__(self, message: Generate, *, client: bytes, arrived_s: float) -> None:
        self.rid = message.rid
        self.client = client  # who gets the outputs
        self.sampling = message.sampling
        self.logprobs = message.logprobs
        self.options = message.options
        self.account = message.account
        self.pooling: Pooling | None = message.pooling
        scope = message.options.cache_salt, message.options.extra_key
        self._namespace = Namespace(*scope, "", "")  # of the weights asked for last
        self.adapter: AdapterContent | None = None  # that computes it; written by `use_adapter`
        self.tokens = TokenSequence(unpack_ids(message.prompt_ids))
        self.num_prompt_tokens = len(self.tokens)
        self.max_new_tokens = message.sampling.max_new_tokens  # the scheduler cuts it to what fits
        self.stop_token_ids: frozenset[int] = frozenset()  # EOS included, set by the scheduler
        grammar = message.grammar if self.max_new_tokens > 0 else None
        self.grammar = None if grammar is None else GrammarState(grammar)  # advanced by the scheduler
        self.output_interval = message.output_interval
        self.queue_key = (-message.options.priority, next(_arrivals))  # higher priority first, then earlier arrival
        self.arrived_s = arrived_s
        self.started_s: float | None = None  # first admitted
        self.phase = Phase.WAITING
        self.slot = -1  # written by `Slots`
        self.lease: Lease | None = None  # written by `RunningRequests`
        self.progress = Progress()
        self.loading = Loading()
        self.unsent = Unsent()
        self.drafting: Drafting | None = None  # written by `Speculation`; None: never drafted
        self.num_retractions = 0
        self.weights_versions: list[tuple[str, int]] = []  # (label, first output computed with them)
        self.num_matched = 0  # tokens that the device had when the queue (lpm) looked last
        self.matched_at: object = None  # state of cache and request at that time: in the same one it is the same

    @classmethod
    def unreadable(cls, message: Generate, *, client: bytes, arrived_s: float) -> "Request":
        """Stands for a request that cannot be read, so that it can be answered; it has no prompt."""
        return cls(structs.replace(message, prompt_ids=b"", grammar=None), client=client, arrived_s=arrived_s)

    @property
    def needs_mask(self) -> bool:
        """Whether a grammar, or the end of free text, may limit the next tokens."""
        return self.grammar is not None and self.grammar.needs_mask

    @property
    def num_outputs(self) -> int:
        """Generated tokens known so far."""
        return self.tokens.length - self.num_prompt_tokens

    @property
    def num_matchable(self) -> int:
        """How many tokens' KV may come from the cache. One token is always computed, as are those with logprobs.

        The mean needs the hidden states of all tokens, and the cache has none.
        """
        if self.pooling == "mean":
            return 0
        limit = len(self.tokens) - 1
        if self.logprobs is not None and self.logprobs.prompt_start >= 0 and not self.num_outputs:
            limit = min(limit, max(0, self.logprobs.prompt_start - 1))
        return limit

    def has_ids_below(self, vocab_size: int) -> bool:
        """Whether every token is one of a vocabulary of this size."""
        ids = self.tokens.view().view(np.uint32)  # negative ones are above all others
        return int(ids.max()) < vocab_size

    @property
    def is_running(self) -> bool:
        return self.phase in (Phase.PREFILLING, Phase.DECODING)

    def namespace(self, weights_id: str) -> Namespace:
        if self._namespace.weights_id != weights_id:
            self._namespace = self._namespace._replace(weights_id=weights_id)
        return self._namespace

    @property
    def has_begun(self) -> bool:
        """Whether it has ever run. From then on its adapter stays the same."""
        return self.started_s is not None

    def use_adapter(self, content: AdapterContent) -> None:
        """Be computed with this adapter, and match its KV alone."""
        assert not self.has_begun, "a request keeps the adapter it began with"
        self.adapter = content
        self._namespace = self._namespace._replace(adapter=content.adapter_id)
        self.matched_at = None

    def enter(self, phase: Phase) -> None:
        assert phase in _NEXT[self.phase], f"{self.rid}: {self.phase.value} -> {phase.value}"
        self.phase = phase

    def is_stop_token(self, token_id: int) -> bool:
        """Whether generation ends with `token_id`, the newest token."""
        return token_id in self.stop_token_ids and self.num_outputs > self.sampling.min_new_tokens
