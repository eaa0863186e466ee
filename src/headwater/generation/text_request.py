"""One prompt and how to continue it: what every API makes of its body."""

from dataclasses import dataclass

from headwater.messages.base import TokenArray
from headwater.messages.generation import Grammar, LogprobParams, Pooling, RequestOptions, SamplingParams

NO_OPTIONS = RequestOptions()


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How token ids become text. The engine knows no text, so these options stay in this process."""

    stop: tuple[str, ...] = ()
    stop_regex: tuple[str, ...] = ()
    keep_stop: bool = False  # show the stop string or token that ended the answer
    skip_special_tokens: bool = True

    @property
    def has_stop(self) -> bool:
        """Whether the text may end the answer."""
        return bool(self.stop or self.stop_regex)


@dataclass(frozen=True, slots=True)
class TextRequest:
    """Ranges have been checked; `rid` is unique among running requests.

    `sampling`, `logprobs`, `options` and `grammar` reach the engine as they are.
    """

    rid: str
    prompt_ids: TokenArray  # n >= 1
    sampling: SamplingParams
    logprobs: LogprobParams | None = None
    options: RequestOptions = NO_OPTIONS
    grammar: Grammar | None = None
    text: TextOptions = TextOptions()
    engine: int | None = None  # index of the engine that must run it; None: the client chooses
    pooling: Pooling | None = None  # wants an embedding of the prompt, and no text
    is_streaming: bool = True  # False: all tokens but the first may come at the end, which costs the engine less
