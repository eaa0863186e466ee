"""The text side of a tokenizer: encodes text, and knows the bytes of each token. It renders no chats."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from headwater.models.model_files import ModelFileError
from headwater.tokenization.gguf_tokenizer import load_gguf_tokenizer
from headwater.tokenization.hf_tokenizer import load_hf_tokenizer
from headwater.tokenization.literal_text import LiteralText
from headwater.tokenization.token_bytes import TokenSpelling
from headwater.tokenization.tokenizer_parts import TokenizerParts

_NO_UNICODE = "text: must be strings of valid Unicode, without lone surrogates"


class TextEncoder:
    """Encodes text. Its methods may be called from several threads."""

    def __init__(self, parts: TokenizerParts) -> None:
        self._backend = parts.backend
        self._literal = LiteralText(parts.backend)
        self.spelling = TokenSpelling(parts.backend)  # for incremental decoding

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The tokenizer of a `.gguf` file, a Hugging Face folder or a hub id.

        ValueError if there is none, ModelFileError that names the file if it cannot be read or is not supported.
        """
        is_gguf = str(path).endswith(".gguf")
        parts = load_gguf_tokenizer(Path(path).expanduser()) if is_gguf else load_hf_tokenizer(str(path))
        try:
            return cls(parts)
        except ValueError as error:
            raise ModelFileError(path, str(error)) from None

    def encode(self, text: str, *, add_special_tokens: bool = True, parses_special: bool = True) -> list[int]:
        """Token ids of a text. Spelled-out special tokens are parsed; without `parses_special` they stay text.

        With `add_special_tokens`, BOS (and EOS) are added if the model wants them. Encoding a long text takes a while
        and releases the interpreter lock, so call it in a thread. ValueError if the text is not valid Unicode.
        """
        if not parses_special:
            hidden = self._literal.hide(text)
            if self._literal.is_hidden_in(hidden):
                return self._encode_literal(hidden, add_special_tokens=add_special_tokens)
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` for several texts, on all cores."""
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise ValueError(_NO_UNICODE) from error
        return [encoding.ids for encoding in encodings]

    def token_id(self, text: str) -> int | None:
        """The token that spells this text in the vocabulary, such as `<think>`; None if there is none."""
        return self._backend.token_to_id(text)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of a token, which may be incomplete characters. Empty for an id without a token."""
        return self.spelling.bytes_of(token_id)

    def _encode_literal(self, hidden: str, *, add_special_tokens: bool) -> list[int]:
        try:
            return self._literal.encode(hidden, add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise ValueError(_NO_UNICODE) from error
