"""Scripted runs: a script is a generator, and each `yield` is one turn of the real loop.

    def flush_between_two_chunks(s: Script) -> Turns:
        answer = s.start("a", prompt)
        yield from s.to_chunk("a", 2)
        call = s.flush(mode="now")
        yield
        assert s.reply(call).status == 200
        yield from s.end_of(answer)

    run_script(flush_between_two_chunks, EngineShape(prefill_chunk_tokens=8))

Everything that random runs check is checked after each of these turns, too.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from headwater.messages.control import ContinueGeneration, FlushCache, PauseGeneration
from headwater.messages.generation import Abort
from headwater.messages.weights import ReleaseMemory, ResumeMemory, UpdateWeights
from headwater.messages.wire import ToClient
from headwater.simulation.checks.violation import demand
from headwater.simulation.driver import CLIENT, Driver, GeneratedAnswer
from headwater.simulation.engine_shape import EngineShape
from headwater.storage.backend import StorageBackend

Turns = Iterator[None]
_PATIENCE_TURNS = 2000


class Script:
    """What a script can do between two turns. Calls return the id under which their answer comes."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._ids = itertools.count(1)

    # --- what clients do ----------------------------------------------------------------------------

    def start(self, rid: str, prompt: list[int], num_tokens: int = 8, **fields: Any) -> GeneratedAnswer:
        """Send a request; its answer fills as turns go by."""
        return self.driver.generate(rid, prompt, num_tokens, **fields)

    def abort(self, rid: str) -> str:
        return self._call(Abort, rid=rid)

    def flush(self, **fields: Any) -> str:
        return self._call(FlushCache, **fields)

    def pause(self, mode: str = "in_place") -> str:
        return self._call(PauseGeneration, mode=mode)

    def resume(self) -> str:
        return self._call(ContinueGeneration)

    def update_weights(self, path: str, **fields: Any) -> str:
        return self._call(UpdateWeights, path=path, **fields)

    def release_memory(self, **fields: Any) -> str:
        return self._call(ReleaseMemory, **fields)

    def resume_memory(self, **fields: Any) -> str:
        return self._call(ResumeMemory, **fields)

    def reply(self, call_id: str) -> Any:
        """The answer of a call; None if there is none yet."""
        found: ToClient | None = self.driver.replies.get(call_id)
        return found

    # --- letting turns go by ------------------------------------------------------------------------

    def until(self, is_reached: Callable[[], bool], what: str = "what the script waits for") -> Turns:
        """Turns until `is_reached`."""
        for _ in range(_PATIENCE_TURNS):
            if is_reached():
                return
            yield
        demand(False, "progress", f"{what} has not come in {_PATIENCE_TURNS} turns")

    def to_chunk(self, rid: str, number: int) -> Turns:
        """Turns until `number` chunks of a prompt have been launched (from 1), not counting what was cached."""
        chunk = self.driver.shape.prefill_chunk_tokens
        model = self.driver.oracle.active[CLIENT, rid]
        return self.until(lambda: model.num_kv >= min(chunk * number, len(model.prompt)), f"chunk {number} of {rid}")

    def to_token(self, answer: GeneratedAnswer, number: int) -> Turns:
        """Turns until an answer has `number` tokens."""
        return self.until(lambda: len(answer.tokens) >= number, f"token {number}")

    def end_of(self, *answers: GeneratedAnswer) -> Turns:
        """Turns until these answers have ended."""
        return self.until(lambda: all(answer.finish for answer in answers), "the end of an answer")

    def answer_of(self, call_id: str) -> Turns:
        """Turns until a call is answered."""
        return self.until(lambda: call_id in self.driver.replies, f"the answer of {call_id}")

    def quiet(self) -> Turns:
        """Turns until nothing is in flight."""
        return self.until(lambda: not self.driver.parts.blockers(), "idle")

    def _call(self, kind: Callable[..., Any], **fields: Any) -> str:
        call_id = f"{kind.__name__}-{next(self._ids)}"
        self.driver.send(kind(call_id=call_id, **fields))
        return call_id


def run_script(
    script: Callable[[Script], Turns], shape: EngineShape | None = None, *, backend: StorageBackend | None = None
) -> Driver:
    """Play `script` to its end, let everything end, and see that all pages come back. Raises `Violation`."""
    driver = Driver(shape, backend=backend)
    for _ in script(Script(driver)):
        driver.turn()
    driver.finish()
    driver.settle()
    driver.check_all_pages_back()
    return driver
