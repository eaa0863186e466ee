"""The bytes of each token, from which text is decoded.

Language models use two families of vocabularies, and both spell tokens in bytes. Byte-level BPE writes every byte as
one printable character (GPT-2's table). SentencePiece writes text with U+2581 for the space, and single bytes as
`<0xE2>`. With the bytes, a plain incremental UTF-8 decoder decodes text one token at a time.
"""

import json
import re
from typing import Any

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_table() -> dict[str, int]:
    """The table from characters to bytes of byte-level BPE (Radford et al. 2019).

    Printable Latin-1 characters stand for themselves; the other bytes use the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return table


_BYTE_OF_CHAR = _byte_level_table()


class TokenSpelling:
    """The bytes of a tokenizer's token ids, computed at their first use and cached.

    The constructor raises ValueError if the tokenizer's decoder does not work on bytes (WordPiece, CTC).
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        steps = _decoder_steps(backend)
        kinds = [step["type"] for step in steps]
        self._is_byte_level = "ByteLevel" in kinds
        self._has_byte_tokens = "ByteFallback" in kinds
        if not self._is_byte_level and "Metaspace" not in kinds and "Replace" not in kinds:
            raise ValueError(
                f"the tokenizer's decoder ({'+'.join(kinds) or 'none'}) is not supported: "
                "it must be ByteLevel, or SentencePiece with U+2581 for spaces"
            )
        self.num_leading_spaces_stripped = max((_leading_spaces(step) for step in steps), default=0)
        self.special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self._backend = backend
        self._bytes_of_id: dict[int, bytes] = {}
        self._text_of_id: dict[int, str | None] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """The token's bytes, which may be incomplete characters; empty for an id without a token.

        Models pad their vocabularies, so such ids can be sampled. ValueError for an id outside of 0..2**32-1.
        """
        found = self._bytes_of_id.get(token_id)
        if found is None:
            found = self._bytes_of_id[token_id] = self.spell(token_id)
        return found

    def text_of(self, token_id: int) -> str | None:
        """The token's text; None if its bytes are not whole characters. ValueError as in `bytes_of`."""
        if token_id not in self._text_of_id:
            try:
                text: str | None = self.bytes_of(token_id).decode()
            except UnicodeDecodeError:
                text = None
            self._text_of_id[token_id] = text
        return self._text_of_id[token_id]

    def spell(self, token_id: int) -> bytes:
        """As `bytes_of`, without the cache."""
        if not 0 <= token_id < 2**32:
            raise ValueError(f"token id {token_id} is out of range: it must be in 0..2**32-1")
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            if all(char in _BYTE_OF_CHAR for char in token):
                return bytes(_BYTE_OF_CHAR[char] for char in token)
            return token.encode()  # an added token, which is stored as text
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.replace("\u2581", " ").encode()


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The decoder's steps in order, as `tokenizer.json` describes them."""
    decoder: Any = backend.decoder
    if decoder is None:
        return []
    description = json.loads(decoder.__getstate__())
    return description["decoders"] if description["type"] == "Sequence" else [description]


def _leading_spaces(step: dict[str, Any]) -> int:
    """The number of spaces that this decoder step removes from the start of a text."""
    if step["type"] == "Strip" and step["content"] == " ":
        return step["start"]
    if step["type"] == "Metaspace" and step["prepend_scheme"] != "never":
        return 1
    return 0
