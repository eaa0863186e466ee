"""Decode token ids to text as they come, one step at a time."""

import codecs
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from headwater.tokenization.token_bytes import TokenSpelling

if TYPE_CHECKING:
    from headwater.messages.base import TokenIds  # needs numpy, which a tokenizer does without

_LONGEST_CHARACTER_BYTES = 4

_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalDecoder:
    """Turns token ids into text that never changes once given out.

    The pieces returned by `feed` and `finish`, joined, are the text of all ids. A character whose bytes are
    spread over several tokens comes with its last byte; bytes that can no longer become a character come as
    one U+FFFD for each maximal ill-formed part (Unicode 15, section 3.9), as Rust and Python decode. The cost
    of a token does not depend on how many came before.

    With `prompt_ids` the text continues the prompt: a SentencePiece space at the start of the answer is a
    space and not the dummy prefix, and a character begun by the prompt's last tokens is completed.
    """

    def __init__(
        self, spelling: TokenSpelling, *, skip_special_tokens: bool = True, prompt_ids: "Sequence[int] | TokenIds" = ()
    ) -> None:
        self._spelling = spelling
        self._skipped_ids = spelling.special_ids if skip_special_tokens else frozenset()
        self._utf8 = _new_utf8_decoder(errors="replace")
        self._num_spaces_to_strip = spelling.num_leading_spaces_stripped
        self._continue_from(prompt_ids)

    def feed(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens make final; may be empty. ValueError for an id that cannot be one."""
        text = self._utf8.decode(self._bytes_of(token_ids))
        return self._strip(text) if self._num_spaces_to_strip else text

    def finish(self) -> str:
        """What is left at the end: U+FFFD if the last character is incomplete, else nothing."""
        text = self._utf8.decode(b"", True)
        return self._strip(text) if self._num_spaces_to_strip else text

    def _bytes_of(self, token_ids: Iterable[int]) -> bytes:
        bytes_of, skipped = self._spelling.bytes_of, self._skipped_ids
        return b"".join([bytes_of(token_id) for token_id in token_ids if token_id not in skipped])

    def _strip(self, text: str) -> str:
        """Remove spaces at the very start of the text, as many as the tokenizer's decoder does."""
        while text and self._num_spaces_to_strip:
            if not text.startswith(" "):
                self._num_spaces_to_strip = 0
                break
            text = text[1:]
            self._num_spaces_to_strip -= 1
        return text

    def _continue_from(self, prompt_ids: "Sequence[int] | TokenIds") -> None:
        """Take over the state at the prompt's end, which the last bytes of the prompt decide alone."""
        tail = b""
        for token_id in reversed(prompt_ids):
            tail = self._bytes_of([int(token_id)]) + tail
            if len(tail) >= _LONGEST_CHARACTER_BYTES:
                break
        if tail:
            self._num_spaces_to_strip = 0
            self._utf8.decode(tail)
