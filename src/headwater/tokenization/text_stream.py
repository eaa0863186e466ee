"""The text of one answer, decoded while its token ids arrive."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from headwater.tokenization.incremental import IncrementalDecoder
from headwater.tokenization.stop_program import compile_stop
from headwater.tokenization.stop_regex import StopRegexMatcher
from headwater.tokenization.stop_strings import StopStringMatcher
from headwater.tokenization.tokenizer import Tokenizer

if TYPE_CHECKING:
    from headwater.messages.base import TokenIds  # it imports numpy, which a tokenizer does not need


class TextDelta(NamedTuple):
    """The result of feeding new tokens."""

    text: str  # new final text; `TextStream.text` grew by it
    num_tokens_used: int  # how many of the new tokens belong to the answer: those up to the matched stop
    matched_stop: str | None = None  # the stop string or pattern that ended the answer, only in the delta that found it


class TextStream:
    """The text of one answer: incremental decoding, then stop strings and patterns.

    Feed every output token in order. The caller leaves out a hidden stop token (with `skip_special_tokens`, EOS has no
    text anyway). A delta with `matched_stop` ends the answer: the caller aborts the request, and later tokens are
    dropped. Otherwise, `finish` ends the answer.

    Always pass the prompt's ids as `prompt_ids`, so that the text continues the prompt (see `IncrementalDecoder`). With
    `include_stop` (SGLang's `no_stop_trim`, vLLM's `include_stop_str_in_output`), the text includes the stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_ids: "Sequence[int] | TokenIds" = (),
        stop: Sequence[str] = (),
        stop_regex: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._decoder = IncrementalDecoder(
            tokenizer.spelling, skip_special_tokens=skip_special_tokens, prompt_ids=prompt_ids
        )
        self._matcher: StopStringMatcher | StopRegexMatcher | None = None
        if stop_regex:  # stop strings run beside the patterns, since the match that ends first counts
            program = compile_stop(tuple(stop), tuple(stop_regex))
            self._matcher = StopRegexMatcher(program, include_stop=include_stop)
        elif stop:
            self._matcher = StopStringMatcher(stop, include_stop=include_stop)
        self._pieces: list[str] = []
        self._num_tokens = 0

    @property
    def text(self) -> str:
        """The whole text returned so far."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    @property
    def num_tokens(self) -> int:
        """Number of the answer's tokens so far, including the token that completed a stop string."""
        return self._num_tokens

    @property
    def matched_stop(self) -> str | None:
        """The stop string or pattern that ended the answer, if any."""
        return None if self._matcher is None else self._matcher.matched

    def feed(self, token_ids: Sequence[int]) -> TextDelta:
        """Feed the next tokens. ValueError for an invalid id."""
        if self._matcher is None:
            return self._delta(self._decoder.feed(token_ids), num_tokens=len(token_ids))
        if self._matcher.matched is not None:
            return TextDelta(text="", num_tokens_used=0)
        # One token at a time, to find the token that completes a stop string.
        pieces: list[str] = []
        for num_tokens, token_id in enumerate(token_ids, start=1):
            pieces.append(self._matcher.feed(self._decoder.feed((token_id,))))
            if self._matcher.matched is not None:
                return self._delta("".join(pieces), num_tokens, self._matcher.matched)
        return self._delta("".join(pieces), len(token_ids))

    def finish(self) -> TextDelta:
        """End the answer; return the text held back, which may still complete a stop string."""
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
