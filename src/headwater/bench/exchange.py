"""One request from its first byte to the end of its answer, as its client sees it."""

import time
from array import array
from dataclasses import dataclass, field

from headwater.bench.apis import AnswerReader, Api, Told, refusal
from headwater.bench.connection import ConnectionBroke, HttpClient
from headwater.bench.event_stream import EventSplitter
from headwater.bench.percentile import percentile


@dataclass(frozen=True, slots=True)
class Exchange:
    """Times are moments of `time.perf_counter`, in seconds."""

    due_s: float  # when it was to be sent; its latencies count from here
    sent_s: float
    ended_s: float
    first_s: float = 0.0  # of its tokens; 0 without any
    last_s: float = 0.0
    gaps_s: array = field(default_factory=lambda: array("d"))  # between events with tokens
    num_events: int = 0  # with tokens
    told: Told = field(default_factory=Told)
    error: str = ""

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.due_s

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.due_s

    @property
    def tpot_s(self) -> float:
        """Mean time of a token after the first; 0 for an answer of one."""
        return (self.last_s - self.first_s) / max(1, self.told.num_output_tokens - 1)

    @property
    def itl_p99_s(self) -> float:
        return percentile(sorted(self.gaps_s), 99) if self.gaps_s else 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.told.num_output_tokens / max(self.e2e_s, 1e-9)


class Watched:
    """What a round sees while it runs."""

    def __init__(self) -> None:
        self.num_running = self.num_done = self.num_failed = self.num_tokens = 0
        self.last_error = ""


class _Listener:
    """Takes the pieces of one answer. Runs once for each event of each stream: nothing here may be slow."""

    def __init__(self, reader: AnswerReader, watched: Watched) -> None:
        self._reader = reader
        self._watched = watched
        self._splitter = EventSplitter()
        self.first_s = self.last_s = 0.0
        self.gaps_s = array("d")
        self.num_events = 0

    def take(self, piece: bytes, now_s: float) -> None:
        for event in self._splitter.feed(piece):
            num_tokens = self._reader.take(event)
            if num_tokens <= 0:
                continue
            self._watched.num_tokens += num_tokens
            self.num_events += 1
            if self.first_s:
                self.gaps_s.append(now_s - self.last_s)  # 0 for events that came together
            else:
                self.first_s = now_s
            self.last_s = now_s


async def exchange(
    http: HttpClient, api: Api, body: bytes, *, due_s: float, timeout_s: float, watched: Watched
) -> Exchange:
    """Send a request and read its answer. What goes wrong is in the result's `error`."""
    reader = api.reader()
    listener = _Listener(reader, watched)
    told, error = Told(), ""
    watched.num_running += 1
    sent_s = time.perf_counter()
    try:
        answer = await http.request("POST", api.path, body, on_body=listener.take, timeout_s=timeout_s)
        if answer.status == 200:
            told = reader.told()
            error = told.error
        else:
            error = refusal(answer.status, answer.text)
    except ConnectionBroke as broke:
        error = str(broke)
    ended_s = time.perf_counter()
    watched.num_running -= 1
    watched.num_done += 1
    if error:
        watched.num_failed += 1
        watched.last_error = error
    return Exchange(
        due_s=due_s,
        sent_s=sent_s,
        ended_s=ended_s,
        first_s=listener.first_s,
        last_s=listener.last_s,
        gaps_s=listener.gaps_s,
        num_events=listener.num_events,
        told=told,
        error=error,
    )
