"""A reply of the chat pipeline by script: deltas of a message, with tool calls and thinking, as no small model says."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from headwater.generation.assistant_message import MessageDelta, ToolCallDelta
from headwater.generation.text_generation import TextChunk
from headwater.messages.generation import Finish, OutputMeta, SamplingParams

STOP = Finish(type="stop")


def call(index: int, name: str, *arguments: str) -> list[ToolCallDelta]:
    """The deltas of one call."""
    first = ToolCallDelta(index, f"call_{index}", name, "")
    return [first, *(ToolCallDelta(index, None, None, piece) for piece in arguments)]


@dataclass
class ScriptedGeneration:
    """What answers read of a generation; it ends with the last delta of its reply."""

    deltas: Sequence[MessageDelta]
    end: Finish
    max_new_tokens: int = 100
    finish: Finish | None = None
    is_closed: bool = False
    meta: OutputMeta | None = None
    token_ids: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 10
    started_s: float = 1.0
    newest_s: float | None = None
    logprobs: Sequence[Any] = ()

    @property
    def request(self) -> Any:
        return SimpleNamespace(sampling=SamplingParams(max_new_tokens=self.max_new_tokens))

    @property
    def elapsed_s(self) -> float:
        return (self.newest_s or self.started_s) - self.started_s

    async def __aiter__(self) -> AsyncIterator[TextChunk]:
        self.meta = OutputMeta(prompt_tokens=10, cached_device=3, cached_host=1)
        for number, _ in enumerate(self.deltas, start=1):
            self.token_ids.append(number)
            self.newest_s = 1.0 + number
            if number == len(self.deltas):
                self.finish = self.end
            yield TextChunk("", (number,), (), self.finish)

    async def run(self) -> None:
        async for _ in self:
            pass

    def close(self) -> None:
        self.is_closed = True


class ScriptedReply:
    """Stands for `Reply`."""

    def __init__(self, *deltas: MessageDelta, end: Finish = STOP, max_new_tokens: int = 100) -> None:
        self.generation: Any = ScriptedGeneration(deltas, end, max_new_tokens)
        self._next = iter(deltas)
        self._deltas = deltas

    def take(self, _: TextChunk) -> MessageDelta:
        return next(self._next)

    def whole(self) -> Any:
        calls: list[Any] = []
        for piece in [piece for delta in self._deltas for piece in delta.tool_calls]:
            if piece.name is not None:
                calls.append(SimpleNamespace(id=piece.id, name=piece.name, arguments=""))
            calls[piece.index].arguments += piece.arguments
        return SimpleNamespace(
            content="".join(delta.content for delta in self._deltas),
            reasoning="".join(delta.reasoning for delta in self._deltas),
            tool_calls=calls,
        )

    @property
    def num_reasoning_tokens(self) -> int:
        return sum(bool(delta.reasoning) for delta in self._deltas)

    def reason(self, finish: Finish) -> str:
        return "tool_calls" if finish.type == "stop" and self.whole().tool_calls else finish.type
