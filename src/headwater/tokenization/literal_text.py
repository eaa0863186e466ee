"""Keep control tokens that somebody spells out as text: `<|im_end|>` in a user's message ends no turn.

A chat template writes control tokens and a user's words into one text. So before it is rendered, each control token
spelled in the words is replaced by a placeholder that nobody can guess. In the rendered text the control tokens that
are left are the template's: they get secret spellings, the placeholders become text again, and a second tokenizer
encodes all at once. It knows the secret spellings only, so everything else is cut into tokens exactly as before.
"""

import re
import secrets
import threading
from collections.abc import Mapping
from typing import Any

import tokenizers


class LiteralText:
    """Finds control tokens in what a request says, and encodes texts in which they are text. Any thread may call it."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._control = {token.content: id for id, token in backend.get_added_tokens_decoder().items() if token.special}
        self._spellings = [spelling for spelling in self._control if spelling]
        longest_first = sorted(self._spellings, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._beginnings = {spelling[:end] for spelling in self._spellings for end in range(1, len(spelling))}
        self._max_beginning = max(map(len, self._beginnings), default=0)
        self._secret = secrets.token_hex(8)  # plain letters and digits, which no filter of a template changes
        self._placeholder = re.compile(f"{self._secret}(\\d*)x")
        self._lock = threading.Lock()
        self._second: tuple[tokenizers.Tokenizer, dict[str, str], dict[int, int]] | None = None

    def hide(self, value: Any) -> Any:
        """A copy of JSON with placeholders for control tokens; equal to `value` if there are none."""
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
        """Whether the first `encode` is due for this JSON: it takes a third of a second and more, once."""
        return self._second is None and self.is_hidden_in(str(self.hide(value)))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text: placeholders are what they stand for, as text; all other control tokens are parsed."""
        backend, secret_of, id_of = self._second_tokenizer()
        text = self._pattern.sub(lambda match: secret_of[match[0]], text)
        text = self._placeholder.sub(lambda match: self._spellings[int(match[1])] if match[1] else "", text)
        ids = backend.encode(text, add_special_tokens=add_special_tokens).ids
        return [id_of.get(token_id, token_id) for token_id in ids]

    def _hide_in_text(self, text: str) -> str:
        text = self._pattern.sub(lambda match: f"{self._secret}{self._spellings.index(match[0])}x", text)
        # the beginning of one at the end might be completed by what the template writes next
        ends = range(1, min(self._max_beginning, len(text)) + 1)
        return f"{text}{self._secret}x" if any(text[-end:] in self._beginnings for end in ends) else text

    def _second_tokenizer(self) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[int, int]]:
        """A copy that takes control tokens for text, the secret spellings it knows instead, and the ids these mean."""
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
