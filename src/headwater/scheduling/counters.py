"""Monotonic counts of the scheduler, as the metrics show them."""

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Counters:
    """Tokens, requests and seconds since the engine started."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens_device: int = 0
    cached_tokens_host: int = 0
    cached_tokens_storage: int = 0
    copied_tokens: int = 0  # of those found on the device: in a page that began like the prompt's
    num_refused: int = 0
    num_aborted: int = 0
    num_failed: int = 0  # requests that ended because their step or their arrival raised
    num_failed_steps: int = 0
    num_finished: int = 0
    num_retractions: int = 0
    num_parked: int = 0  # retractions whose pages were kept on the host
    limited_queued_requests: int = 0  # refused: the queue had no place
    limited_queued_tokens: int = 0  # refused: the queue held too many tokens
    limited_queue_share: int = 0  # refused: their key had its share of the queue
    limited_queue_timeout: int = 0  # ended before they started
    limited_request_timeout: int = 0  # ended before they were complete
    spec_verify_steps: int = 0  # steps of requests that had a draft; a step of two such requests counts twice
    spec_draft_tokens: int = 0
    spec_accepted_tokens: int = 0  # of those drafted
    queue_time_seconds: float = 0.0

    def as_dict(self) -> dict[str, float]:
        return asdict(self)
