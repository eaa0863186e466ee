"""Whether a text matches a grammar, asked of the library with one token for each byte."""

import functools
from typing import Any

import llguidance


@functools.cache
def _byte_tokenizer() -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer("byte")


class Language:
    """The texts of one grammar."""

    def __init__(self, grammar: str) -> None:
        self._start = llguidance.LLMatcher(_byte_tokenizer(), grammar, log_level=0)
        assert not self._start.is_error(), self._start.get_error()

    def __contains__(self, text: str) -> bool:
        matcher: Any = self._start.deep_copy()
        tokens = _byte_tokenizer().tokenize_bytes(text.encode())
        assert len(tokens) == len(text.encode())
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()
