"""The tokens of one request: grows at the end, read as numpy views."""

import numpy as np

from headwater.messages.base import TokenIds


class TokenSequence:
    """Prompt and generated tokens. Views stay valid for what they show: tokens are only ever appended."""

    __slots__ = ("_buffer", "length")

    def __init__(self, token_ids: TokenIds) -> None:
        self.length = len(token_ids)
        self._buffer = np.array(token_ids, dtype=np.int32)

    def __len__(self) -> int:
        return self.length

    def append(self, token_id: int) -> None:
        if self.length == len(self._buffer):
            grown = np.empty(max(64, self.length * 3 // 2), dtype=np.int32)
            grown[: self.length] = self._buffer
            self._buffer = grown
        self._buffer[self.length] = token_id
        self.length += 1

    def view(self, start: int = 0, stop: int | None = None) -> TokenIds:
        """Tokens [start, stop) without a copy. int32[stop - start]."""
        return self._buffer[start : self.length if stop is None else min(stop, self.length)]
