"""The promise of the other metrics: the scheduler's counters are the sums of what clients have received."""

from collections import Counter
from collections.abc import Callable

from headwater.messages.generation import Output
from headwater.scheduling.scheduler import Scheduler
from headwater.simulation.checks.violation import demand

_TOLERANCE_S = 1e-6  # of sums of times
_ABORTED = 0  # the status of an answer that an abort has ended
_FAILED = "the engine failed while it computed"


class Sums:
    """Adds up the outputs of one engine. Compared while no request is open: a counter runs ahead of the last output.

    Counts that no output has are not compared, such as the prompt tokens of refused requests.
    """

    def __init__(self, scheduler: Scheduler, *, has_requests: Callable[[], bool]) -> None:
        self._scheduler = scheduler
        self._has_requests = has_requests
        self._told: Counter[str] = Counter()
        self._queued_s = 0.0
        self._has_news = False

    def received(self, output: Output) -> None:
        """A client has received `output`."""
        self._has_news = True
        self._told["generated_tokens"] += len(output.token_ids)
        finish, meta = output.finish, output.meta
        if finish is None or meta is None:
            return
        tiers = {"device": meta.cached_device, "host": meta.cached_host, "storage": meta.cached_storage}
        demand(min(tiers.values()) >= 0, "sums_agree", f"{output.rid} found {tiers} tokens in the cache")
        demand(meta.load_time_s <= meta.queue_time_s + _TOLERANCE_S or not meta.queue_time_s, "sums_agree", meta)
        self._told.update({f"cached_tokens_{tier}": count for tier, count in tiers.items()})
        self._told["num_retractions"] += meta.num_retractions
        self._told["spec_verify_steps"] += meta.num_draft_steps
        self._told["spec_draft_tokens"] += meta.num_drafted
        self._told["spec_accepted_tokens"] += meta.num_accepted
        self._queued_s += meta.queue_time_s
        if finish.type == "abort":
            self._told["num_aborted"] += finish.status == _ABORTED
            self._told["num_failed"] += finish.message.startswith(_FAILED)
            self._told["limited_queue_timeout"] += finish.code == "queue_timeout"
            self._told["limited_request_timeout"] += finish.code == "request_timeout"
            self._told["queue_full"] += finish.code == "queue_full"

    def check(self) -> None:
        """At the end of a turn."""
        if not self._has_news or self._has_requests():
            return
        self._has_news = False
        counted = self._scheduler.counters.as_dict()
        limited = ("limited_queued_requests", "limited_queued_tokens", "limited_queue_share")
        counted["queue_full"] = sum(counted[name] for name in limited)
        differing = {name: (counted[name], told) for name, told in self._told.items() if counted[name] != told}
        demand(not differing, "sums_agree", f"counted, and told to clients: {differing}")
        is_right = abs(counted["queue_time_seconds"] - self._queued_s) < _TOLERANCE_S * (1 + self._queued_s)
        demand(is_right, "sums_agree", f"{counted['queue_time_seconds']} s in the queue, told are {self._queued_s} s")
