"""What a parser makes of an answer's text: reasoning, content and calls, in the order in which they were written."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What the model thought before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of this function begins. The parts up to `CallEnd` are arguments."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of the call's arguments. All pieces together are the JSON text of one object."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call is complete. A call that the answer's end cut off has no `CallEnd`."""


ParsedPart = Content | Reasoning | CallStart | CallArguments | CallEnd
