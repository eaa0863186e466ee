"""Treats spelled-out control tokens in a request as text: `<|im_end|>` in a user's message does not end a turn.

A chat template writes control tokens and the user's text into one string. So before rendering, each spelled-out control
token in the user's text is replaced by a placeholder that cannot be guessed. The remaining control tokens in the
rendered string are those of the template. They get secret spellings, the placeholders become text again, and a second
tokenizer encodes the whole string. It recognizes only the secret spellings, so all other text has the usual tokens.
"""

import re
import secrets
import threading
from collections.abc import Mapping
from typing import Any

import tokenizers


class LiteralText:
    """Finds spelled-out control tokens in a request, and encodes them as text. Any thread may call it."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._control = {token.content: id for id, token in backend.get_added_tokens_decoder().items() if token.special}
        self._spellings = [spelling for spelling in self._control if spelling]
        longest_first = sorted(self._spellings, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._beginnings = {spelling[:end] for spelling in self._spellings for end in range(1, len(spelling))}
        self._max_beginning = max(map(len, self._beginnings), default=0)
        self._secret = secrets.token_hex(8)  # letters and digits, which no filter of a template changes
        self._placeholder = re.compile(f"{self._secret}(\\d*)x")
        self._lock = threading.Lock()
        self._second: tuple[tokenizers.Tokenizer, dict[str, str], dict[int, int]] | None = None

    def hide(self, value: Any) -> Any:
        """A copy of JSON with placeholders for control tokens; equal to `value` if it has none."""
        if isinstance(value, str):
            return self._hide_in_text(value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        return value

    def is_hidden_in(self, text: str) -> bool:
        return self._secret in text

    def must_prepare_for(self, value: Any) -> bool:
        """Whether this JSON needs the first `encode`, which once takes a third of a second or more."""
        return self._second is None and self.is_hidden_in(str(self.hide(value)))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text. Placeholders are encoded as the text they stand for; other control tokens are parsed."""
        backend, secret_of, id_of = self._second_tokenizer()
        text = self._pattern.sub(lambda match: secret_of[match[0]], text)
        text = self._placeholder.sub(lambda match: self._spellings[int(match[1])] if match[1] else "", text)
        ids = backend.encode(text, add_special_tokens=add_special_tokens).ids
        return [id_of.get(token_id, token_id) for token_id in ids]

    def _hide_in_text(self, text: str) -> str:
        text = self._pattern.sub(lambda match: f"{self._secret}{self._spellings.index(match[0])}x", text)
        # a partial token at the end might be completed by the template's next text
        ends = range(1, min(self._max_beginning, len(text)) + 1)
        return f"{text}{self._secret}x" if any(text[-end:] in self._beginnings for end in ends) else text

    def _second_tokenizer(self) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[int, int]]:
        """A copy that treats control tokens as text, its secret spellings for them, and the ids of these spellings."""
        with self._lock:
            if self._second is None:
                copy = tokenizers.Tokenizer.from_str(self._backend.to_str())
                copy.encode_special_tokens = True
                secret_of = {spelling: f"{self._secret}c{number}x" for number, spelling in enumerate(self._spellings)}
                known = self._backend.get_added_tokens_decoder()
                copy.add_tokens([_renamed(known[self._control[old]], new) for old, new in secret_of.items()])
                new_ids = {old: copy.token_to_id(new) for old, new in secret_of.items()}
                id_of = {new_id: self._control[old] for old, new_id in new_ids.items() if new_id is not None}
                self._second = copy, secret_of, id_of
            return self._second


def _renamed(token: tokenizers.AddedToken, content: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=False,
        special=False,
    )
