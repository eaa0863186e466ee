"""The callers of random runs: their clients, engines and recent messages."""

import random
from collections import deque
from collections.abc import Callable, Iterator

from headwater.messages.wire import ToEngine
from headwater.simulation.random_runs.events import Deliver, Event

_CLIENTS = ("one", "two")


class Callers:
    """Makes deliveries of messages, and keeps the latest ones so that they can be aborted and cancelled."""

    def __init__(self, source: random.Random) -> None:
        self._source = source
        self._num_sent = 0
        self._due: list[tuple[int, Event]] = []  # with the number of events before them
        self.num_engines = 1
        self.rids: deque[str] = deque(maxlen=12)
        self.calls: deque[tuple[int, str, str]] = deque(maxlen=8)  # engine, client, call id

    def call(self, make: Callable[[str], ToEngine], engine: int | None = None) -> Deliver:
        """A call with a fresh id, to `engine` or to a random one."""
        call_id = self.call_id()
        client = self.client()
        engine = self.engine() if engine is None else engine
        self.calls.append((engine, client, call_id))
        return Deliver(make(call_id), client, engine)

    def call_id(self) -> str:
        self._num_sent += 1
        return f"c{self._num_sent}"

    def rid(self) -> str:
        self._num_sent += 1
        self.rids.append(f"r{self._num_sent}")
        return self.rids[-1]

    def engine(self) -> int:
        return self._source.randrange(self.num_engines)

    def client(self) -> str:
        return self._source.choice(_CLIENTS)

    def later(self, event: Event) -> None:
        """Schedule `event` a few events from now, such as the end of a pause or a release."""
        self._due.append((self._source.randrange(1, 12), event))

    def take_due(self) -> Iterator[Event]:
        self._due = [(count - 1, event) for count, event in self._due]
        yield from [event for count, event in self._due if count <= 0]
        self._due = [(count, event) for count, event in self._due if count > 0]
