"""Takes the snapshot of a whole server: asks every engine once, and remembers what a page wants to look back on."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping

from headwater.client.change_call import by_engine
from headwater.client.engine_client import new_call_id
from headwater.generation.answer_fields import Json
from headwater.generation.errors import as_api_error
from headwater.http_api.dashboard.broadcast import Broadcast
from headwater.http_api.dashboard.facts import engine_facts, map_facts, operations_facts, sample_of
from headwater.http_api.dashboard.happenings import Happening, happenings
from headwater.http_api.dashboard.history import History
from headwater.http_api.monitoring.metrics import Buckets
from headwater.http_api.state import ApiState
from headwater.messages.snapshot import GetSnapshot, PrefixMap, Snapshot
from headwater.version import version

ANSWER_S = 2.0  # an engine that is silent longer shows as silent
NUM_TEXT_IDS = 24
MAX_NODES = 300  # on the maps of all engines together
MAX_TEXT_CHARS = 80
MAX_LOGGED = 100


class Watching:
    """One per app. `stream` is what pages get, `take` a snapshot for programs."""

    def __init__(self, state: ApiState, latency: Callable[[], Mapping[str, Buckets]]) -> None:
        """`latency`: the histograms of the API process, by name."""
        self._state = state
        self._latency = latency
        self._before: dict[int, Snapshot | None] = {}
        self._maps: dict[int, tuple[PrefixMap, Json]] = {}
        self._log: deque[tuple[str, Json]] = deque(maxlen=MAX_LOGGED)
        self._log_numbers = itertools.count(1)
        self._history = History()
        self.broadcast = Broadcast(self._tick, more=self._looking_back, has_ended=lambda: state.is_shutting_down)

    async def take(self) -> Json:
        """A snapshot of now, which leaves the history and the log of the pages as they are."""
        return self._facts(await self._ask())

    async def _tick(self) -> Json:
        answers = await self._ask()
        self._note(answers)
        facts = self._facts(answers)
        self._history.add(facts["sample"])
        return facts

    def _looking_back(self) -> Json:
        return {"history": self._history.columns()}

    async def _ask(self) -> dict[int, Snapshot | Exception]:
        client = self._state.client
        message = GetSnapshot(
            call_id=new_call_id(),
            max_nodes=max(20, MAX_NODES // max(1, client.num_engines)),
            num_first_ids=NUM_TEXT_IDS if self._shows_text else 0,
        )
        try:
            return dict(by_engine(await client.call_all(message, timeout_s=ANSWER_S)))
        except Exception as error:
            if as_api_error(error) is None:
                raise
            return {}  # of a fleet without replicas

    @property
    def _shows_text(self) -> bool:
        settings = self._state.dashboard
        return settings is not None and settings.shows_text and self._state.tokenizer is not None

    def _facts(self, answers: Mapping[int, Snapshot | Exception]) -> Json:
        there = {rank: answer for rank, answer in answers.items() if isinstance(answer, Snapshot)}
        latency = self._latency()
        now_ms = int(1000 * time.time())
        return {
            "server": self._server(),
            "engines": {str(rank): self._engine(rank, answer) for rank, answer in answers.items()},
            "operations": operations_facts(there),
            "latency": {name: list(buckets.bounds_s[:-1]) for name, buckets in latency.items()},
            "sample": sample_of(list(there.values()), latency, now_ms=now_ms),
            "log": dict(self._log),
        }

    def _server(self) -> Json:
        model = self._state.model
        facts: Json = {
            "version": version(),
            "serving": self._state.is_serving,
            "shows_text": self._shows_text,
            "max_timeout_s": self._state.limits.max_control_timeout_s,
        }
        if model is not None:
            facts |= {"model": model.served_name, "device": model.device, "dtype": model.dtype}
        return facts

    def _engine(self, rank: int, answer: Snapshot | Exception) -> Json:
        if not isinstance(answer, Snapshot):
            self._maps.pop(rank, None)
            return {"up": False, "message": _reason(answer)}
        out = self._state.client.engines_out.get(rank)
        fenced = {} if out is None else {"message": out}
        return engine_facts(answer) | fenced | {"map": self._map(rank, answer)}

    def _map(self, rank: int, answer: Snapshot) -> Json:
        found = answer.map
        known = self._maps.get(rank)
        if known is None or known[0] != found:
            known = self._maps[rank] = (found, map_facts(found, self._decode if self._shows_text else None))
        return known[1]

    def _decode(self, ids: tuple[int, ...]) -> str:
        tokenizer = self._state.tokenizer
        assert tokenizer is not None
        return tokenizer.decode(list(ids))[:MAX_TEXT_CHARS]

    def _note(self, answers: Mapping[int, Snapshot | Exception]) -> None:
        """Write down what has changed since the last tick, which may be long ago."""
        for rank in self._before.keys() - answers.keys():  # a replica of a fleet
            del self._before[rank]
            self._maps.pop(rank, None)
            self._write(rank, ("info", "has left the fleet"))
        for rank, answer in answers.items():
            now = answer if isinstance(answer, Snapshot) else None
            if rank in self._before:
                why_out = "" if isinstance(answer, Snapshot) else _reason(answer)
                for found in happenings(self._before[rank], now, why_out=why_out):
                    self._write(rank, found)
            self._before[rank] = now

    def _write(self, rank: int, found: Happening) -> None:
        level, text = found
        entry: Json = {"t": int(1000 * time.time()), "rank": rank, "level": level, "text": text}
        self._log.append((str(next(self._log_numbers)), entry))


def _reason(error: Exception) -> str:
    described = as_api_error(error)
    return "an internal error; the server's log has it" if described is None else described.message
