"""One generation, from its arrival to its last token."""

import itertools
from enum import Enum

from headwater.cache.lease import Lease, TokenSequence
from headwater.cache.namespace import Namespace
from headwater.cache.prefetch import Prefetch
from headwater.cache.transfer import Load
from headwater.messages.base import unpack_ids
from headwater.messages.generation import Generate, TokenLogprob
from headwater.scheduling.plan import PageUpdate

_arrivals = itertools.count()


class Phase(Enum):
    """Where a request is. `_NEXT` below says which changes exist."""

    WAITING = "waiting"  # holds nothing
    LOADING = "loading"  # its pages are being copied up; not in the batch
    PREFILLING = "prefilling"  # in a slot, prompt tokens left to launch
    DECODING = "decoding"  # in a slot, its prompt is launched
    FINISHED = "finished"


_NEXT = {
    Phase.WAITING: {Phase.LOADING, Phase.PREFILLING, Phase.FINISHED},
    Phase.LOADING: {Phase.WAITING, Phase.FINISHED},
    Phase.PREFILLING: {Phase.DECODING, Phase.WAITING, Phase.FINISHED},
    Phase.DECODING: {Phase.WAITING, Phase.FINISHED},
    Phase.FINISHED: set(),
}


class Request:
    """One generation. Changed by the scheduler only.

    `num_computed` counts tokens whose KV launched steps have written or will write, `num_written` those whose
    step has been collected. They differ only while a step is in flight.
    """

    def __init__(self, message: Generate, *, client: bytes, arrived_s: float) -> None:
        self.rid = message.rid
        self.client = client  # who gets the outputs
        self.sampling = message.sampling
        self.logprobs = message.logprobs
        self.options = message.options
        scope = message.options.cache_salt, message.options.extra_key
        self._namespace = Namespace(*scope, "", "")  # of the weights asked for last
        self.tokens = TokenSequence(unpack_ids(message.prompt_ids))
        self.num_prompt_tokens = len(self.tokens)
        self.max_new_tokens = message.sampling.max_new_tokens  # the scheduler cuts it to what fits
        self.stop_token_ids: frozenset[int] = frozenset()  # EOS included, set by the scheduler
        self.arrival = next(_arrivals)
        self.arrived_s = arrived_s
        self.started_s: float | None = None  # first admitted
        self.phase = Phase.WAITING
        self.lease: Lease | None = None
        self.slot = -1
        self.num_computed = 0
        self.num_written = 0
        self.num_launched_samples = 0  # tokens sampled by launched steps, collected or not
        self.last_step_id = -1  # last launched step that uses its pages
        self.page_updates: list[PageUpdate] = []  # for the next plan its slot is in
        self.prompt_logprobs: list[TokenLogprob] = []
        self.num_retractions = 0
        self.num_cached_tokens = 0  # prompt tokens found in the cache when it first started
        self.load: Load | None = None  # what it waits for while loading
        self.prefetch: Prefetch | None = None  # on its way from storage for it
        self.may_load = True  # False after one load: nothing can make it load for ever
        self.num_loaded_tokens = 0  # brought up from the host for it
        self.num_host_tokens = 0  # of its prompt, found on the host
        self.num_storage_tokens = 0  # of its prompt, found in storage
        self.num_matched = 0  # tokens that the device had when the queue (lpm) looked last
        self.matched_at: object = None  # state of cache and request at that time: in the same one it is the same
        self.weights_versions: list[tuple[str, int]] = []  # (label, first output computed with them)
        self.has_sent_meta = False
        self.output_interval = message.output_interval
        self.unsent_token_ids: list[int] = []
        self.unsent_logprobs: list[TokenLogprob] = []

    @property
    def num_outputs(self) -> int:
        """Generated tokens known so far."""
        return self.tokens.length - self.num_prompt_tokens

    def has_ids_below(self, vocab_size: int) -> bool:
        """Whether every token is one of a vocabulary of this size."""
        ids = self.tokens.view()
        return int(ids.min()) >= 0 and int(ids.max()) < vocab_size

    @property
    def is_running(self) -> bool:
        return self.phase in (Phase.PREFILLING, Phase.DECODING)

    @property
    def queue_key(self) -> tuple[int, int]:
        """Order of service: higher priority first, then who came first, retracted or not."""
        return (-self.options.priority, self.arrival)

    def namespace(self, weights_id: str) -> Namespace:
        if self._namespace.weights_id != weights_id:
            self._namespace = self._namespace._replace(weights_id=weights_id)
        return self._namespace

    def enter(self, phase: Phase) -> None:
        assert phase in _NEXT[self.phase], f"{self.rid}: {self.phase.value} -> {phase.value}"
        self.phase = phase

    def is_stop_token(self, token_id: int) -> bool:
        """Whether generation ends with `token_id`, the newest token."""
        return token_id in self.stop_token_ids and self.num_outputs > self.sampling.min_new_tokens
