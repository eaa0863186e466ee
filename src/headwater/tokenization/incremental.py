"""Decode token ids to text incrementally."""

import codecs
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from headwater.tokenization.token_bytes import TokenSpelling

if TYPE_CHECKING:
    from headwater.messages.base import TokenIds  # it imports numpy, which a tokenizer does not need

_LONGEST_CHARACTER_BYTES = 4

_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalDecoder:
    """Turns token ids into text; returned text never changes later.

    The pieces returned by `feed` and `finish` join to the text of all ids. A character with bytes in several tokens is
    returned with its last byte. Bytes that cannot become a character are returned as one U+FFFD for each maximal
    ill-formed part (Unicode 15, section 3.9), as in Rust and Python. The cost of a token does not depend on the number
    of earlier tokens.

    With `prompt_ids`, the text continues the prompt: a SentencePiece space at the start of the answer is a space and
    not the dummy prefix, and a character that the prompt's last tokens began is completed.
    """

    def __init__(
        self, spelling: TokenSpelling, *, skip_special_tokens: bool = True, prompt_ids: "Sequence[int] | TokenIds" = ()
    ) -> None:
        self._spelling = spelling
        self._skipped_ids = spelling.special_ids if skip_special_tokens else frozenset()
        self._utf8 = _new_utf8_decoder(errors="replace")
        self._is_inside_character = False  # whether the decoder holds bytes
        self._num_spaces_to_strip = spelling.num_leading_spaces_stripped
        self._continue_from(prompt_ids)

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that becomes final with these tokens; may be empty. ValueError for an invalid id."""
        if len(token_ids) == 1 and not self._is_inside_character and token_ids[0] not in self._skipped_ids:
            text = self._spelling.text_of(token_ids[0])  # most steps give one token of whole characters
            if text is not None:
                return self._strip(text) if self._num_spaces_to_strip else text
        text = self._decode(self._bytes_of(token_ids))
        return self._strip(text) if self._num_spaces_to_strip else text

    def finish(self) -> str:
        """The rest of the text: U+FFFD if the last character is incomplete, else nothing."""
        text = self._utf8.decode(b"", True)
        return self._strip(text) if self._num_spaces_to_strip else text

    def _decode(self, data: bytes) -> str:
        text = self._utf8.decode(data)
        self._is_inside_character = self._utf8.getstate()[0] != b""
        return text

    def _bytes_of(self, token_ids: Iterable[int]) -> bytes:
        bytes_of, skipped = self._spelling.bytes_of, self._skipped_ids
        return b"".join([bytes_of(token_id) for token_id in token_ids if token_id not in skipped])

    def _strip(self, text: str) -> str:
        """Remove as many spaces from the start of the text as the tokenizer's decoder does."""
        while text and self._num_spaces_to_strip:
            if not text.startswith(" "):
                self._num_spaces_to_strip = 0
                break
            text = text[1:]
            self._num_spaces_to_strip -= 1
        return text

    def _continue_from(self, prompt_ids: "Sequence[int] | TokenIds") -> None:
        """Adopt the state at the prompt's end, which depends only on the prompt's last bytes."""
        tail = b""
        for token_id in reversed(prompt_ids):
            tail = self._bytes_of([int(token_id)]) + tail
            if len(tail) >= _LONGEST_CHARACTER_BYTES:
                break
        if tail:
            self._num_spaces_to_strip = 0
            self._decode(tail)
