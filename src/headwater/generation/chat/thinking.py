"""The thinking with which an answer begins: whether the prompt has opened it, and what has to wait for its end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from headwater.generation.errors import unsupported
from headwater.generation.reasoning import ReasoningFormat
from headwater.messages.generation import Grammar
from headwater.tokenization.tokenizer import Tokenizer

_TAIL_TOKENS = 16  # of a prompt; the template writes its markers last
State = Literal["none", "possible", "open"]


@dataclass(frozen=True, slots=True)
class Thinking:
    """The thinking of one request's answers. `none`: the prompt has closed it, or the model does not think."""

    format: ReasoningFormat | None
    state: State
    prompt_end: str  # the text that the answer continues, as far as it matters
    start_id: int | None = None  # the token of the marker, if it is one
    end_id: int | None = None

    def before(self, text: str, *, budget: int | None = None, param: str = "") -> Grammar | None:
        """A grammar for what follows the thinking; "" for none. `param` is the field that asks for the grammar.

        InvalidRequest if the markers are not tokens of the vocabulary.
        """
        if self.format is None and budget is not None:
            message = "this server does not separate the thinking of this model (see --reasoning-parser)"
            raise unsupported("max_reasoning_tokens", f"max_reasoning_tokens: {message}")
        if self.format is None or self.state == "none":
            return Grammar(text) if text else None
        if not text and budget is None:
            return None
        if self.end_id is None or (self.state == "possible" and self.start_id is None):
            param = "max_reasoning_tokens" if budget is not None else param
            needed = self.format.end if self.state == "open" else f"{self.format.start} and {self.format.end}"
            what = "a limit of the thinking" if budget is not None else "what the answer must match behind the thinking"
            message = f"{what} needs {needed} as single tokens, and this model spells them in several"
            raise unsupported(param, f"{param}: {message}")
        opener = None if self.state == "open" else self.start_id
        return Grammar(text, begins_after=(self.end_id,), opens_with=opener, begins_within=budget)

    def num_tokens(self, token_ids: Sequence[int]) -> int:
        """Tokens of the thinking in an answer, its markers included; 0 if the markers are not tokens."""
        is_open = self.state == "open" or (self.state == "possible" and self.start_id in token_ids[:2])
        if self.end_id is None or not is_open:
            return 0
        return token_ids.index(self.end_id) + 1 if self.end_id in token_ids else len(token_ids)


NO_THINKING = Thinking(None, "none", "")


def thinking_after(
    prompt_ids: Sequence[int], tokenizer: Tokenizer, format: ReasoningFormat | None, *, continued: str = ""
) -> Thinking:
    """The thinking of answers to this prompt. `continued`: the content of the message that they continue, if any."""
    tail = tokenizer.decode(list(prompt_ids[-_TAIL_TOKENS:]), skip_special_tokens=False)
    if format is None:
        return Thinking(None, "none", tail)
    if continued:  # it has begun already
        is_open = continued.rfind(format.start) > continued.rfind(format.end)
        opened = format.start if is_open else format.start + format.end
        tail = opened
    else:
        opened = format.opened_by(tail)
    state: State = "possible" if not opened else "none" if format.end in opened else "open"
    start_id, end_id = (tokenizer.token_id(marker) for marker in (format.start, format.end))
    return Thinking(format, state, tail, start_id, end_id)
