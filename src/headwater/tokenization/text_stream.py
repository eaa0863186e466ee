"""The text of one answer, from its token ids, while they come."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from headwater.tokenization.incremental import IncrementalDecoder
from headwater.tokenization.stop_strings import StopStringMatcher
from headwater.tokenization.tokenizer import Tokenizer

if TYPE_CHECKING:
    from headwater.messages.base import TokenIds  # needs numpy, which a tokenizer does without


class TextDelta(NamedTuple):
    """What new tokens brought."""

    text: str  # new final text; `TextStream.text` grew by it
    num_tokens_used: int  # how many of the tokens just fed belong to the answer: those up to the matched stop
    matched_stop: str | None = None  # the stop string that ended the answer, in the delta that found it only


class TextStream:
    """Text of one request: incremental decoding, then stop strings.

    Feed it every output token in order; a stop token that is not to be shown is left out by the caller (with
    `skip_special_tokens` EOS shows nothing anyway). After a delta with `matched_stop` the answer is over:
    tell the engine to abort the request; tokens fed later are dropped. Otherwise end with `finish`.

    `prompt_ids` makes the text continue the prompt (see `IncrementalDecoder`); pass the prompt's ids always.
    With `include_stop` (SGLang's `no_stop_trim`, vLLM's `include_stop_str_in_output`) the stop string is
    shown.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_ids: "Sequence[int] | TokenIds" = (),
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._decoder = IncrementalDecoder(
            tokenizer.spelling, skip_special_tokens=skip_special_tokens, prompt_ids=prompt_ids
        )
        self._matcher = StopStringMatcher(stop, include_stop=include_stop) if stop else None
        self._pieces: list[str] = []
        self._num_tokens = 0

    @property
    def text(self) -> str:
        """Everything given out so far."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer so far, the one that completed a stop string included."""
        return self._num_tokens

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the answer."""
        return None if self._matcher is None else self._matcher.matched

    def feed(self, token_ids: Sequence[int]) -> TextDelta:
        """Take the next tokens. ValueError for an id that cannot be one."""
        if self._matcher is None:
            return self._delta(self._decoder.feed(token_ids), num_tokens=len(token_ids))
        if self._matcher.matched is not None:
            return TextDelta(text="", num_tokens_used=0)
        # One token at a time, to know which of them completed the stop string.
        pieces: list[str] = []
        for num_tokens, token_id in enumerate(token_ids, start=1):
            pieces.append(self._matcher.feed(self._decoder.feed((token_id,))))
            if self._matcher.matched is not None:
                return self._delta("".join(pieces), num_tokens, self._matcher.matched)
        return self._delta("".join(pieces), len(token_ids))

    def finish(self) -> TextDelta:
        """The end of the answer: gives out what was held back, in which a stop string may still be found."""
        if self._matcher is None:
            return self._delta(self._decoder.finish(), num_tokens=0)
        if self._matcher.matched is not None:
            return TextDelta(text="", num_tokens_used=0)
        text = self._matcher.feed(self._decoder.finish())
        return self._delta(text + self._matcher.finish(), num_tokens=0, matched_stop=self._matcher.matched)

    def _delta(self, text: str, num_tokens: int, matched_stop: str | None = None) -> TextDelta:
        if text:
            self._pieces.append(text)
        self._num_tokens += num_tokens
        return TextDelta(text=text, num_tokens_used=num_tokens, matched_stop=matched_stop)
