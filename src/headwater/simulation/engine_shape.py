"""The sizes and policies of a simulated engine, in the forms that the engine's parts take."""

from dataclasses import dataclass
from typing import Literal

from headwater.cache.host_tier import WritePolicy
from headwater.cache.prefix_cache import MIN_PART_TOKENS
from headwater.cache.storage.tier import PrefetchPolicy
from headwater.messages.state import EngineReady
from headwater.scheduling.limits import SchedulerLimits
from headwater.scheduling.waiting_queue import SchedulePolicy
from headwater.storage.page_key import Fingerprint

VOCAB_SIZE = 1000


@dataclass(frozen=True, slots=True)
class EngineShape:
    """Sizes and policies of one simulated engine, and the behaviour of its copies."""

    num_pages: int = 64
    page_size: int = 4
    max_running: int = 8
    max_step_tokens: int = 64
    prefill_chunk_tokens: int = 32
    max_queued: int = 1000
    max_queued_tokens: int | None = None
    max_queue_share: float = 1.0
    queue_timeout_s: float | None = None
    request_timeout_s: float | None = None
    max_context: int = 4096
    is_async: bool = False  # a step is never done in the turn that launched it, as on a GPU
    policy: SchedulePolicy = "fcfs"
    eos_token_ids: tuple[int, ...] = ()
    is_cache_enabled: bool = True
    min_part_tokens: int = MIN_PART_TOKENS  # of a page that a hit may end in
    num_host_pages: int = 0
    write_policy: WritePolicy = WritePolicy.WRITE_THROUGH
    max_copy_polls: int = 0  # most turns of a copy
    copy_failure_rate: float = 0.0
    prefetch_policy: PrefetchPolicy = PrefetchPolicy.TIMEOUT
    weights_id: str = "w0"
    num_ranks: int = 1  # more: the others carry out the plan stream late, as far as steps let them
    drafts: Literal["none", "fake", "ngram", "tree"] = "none"  # fake: a share of the drafted tokens is right
    seed: int = 0
    has_events: bool = False  # the cache's events are recorded and compared with the cache

    def limits(self) -> SchedulerLimits:
        return SchedulerLimits(
            max_running=self.max_running,
            max_step_tokens=self.max_step_tokens,
            prefill_chunk_tokens=self.prefill_chunk_tokens,
            max_queued=self.max_queued,
            max_context=self.max_context,
            max_queued_tokens=self.max_queued_tokens,
            max_queue_share=self.max_queue_share,
            queue_timeout_s=self.queue_timeout_s,
            request_timeout_s=self.request_timeout_s,
        )

    def ready(self) -> EngineReady:
        return EngineReady(
            call_id="",
            model_name="fake",
            architecture="Fake",
            dtype="uint64",
            vocab_size=VOCAB_SIZE,
            max_context=self.max_context,
            eos_token_ids=self.eos_token_ids,
            page_size=self.page_size,
            num_pages=self.num_pages,
            page_bytes=8 * self.page_size,
            max_running=self.max_running,
            weights_id=self.weights_id,
            weight_version="default",
            load_s=0.0,
            device="fake",
        )

    def fingerprint(self) -> Fingerprint:
        return Fingerprint(
            weights_id="",  # the namespace of a page's name has it
            model_config_hash="fake",
            kv_dtype="uint64",
            page_size=self.page_size,
            num_layers=1,
            num_kv_heads=1,
            head_dim=1,
        )
