"""The nesting depth of a JSON text, found without parsing it, since parsers and users of their result recurse."""

import re

import numpy as np

MAX_NESTING = 100
# everything but brackets: strings with their escapes, and the characters in between
_NO_BRACKETS = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|$)|[^\[\]{}"]++', re.DOTALL)
_STEPS = np.zeros(256, dtype=np.int8)
_STEPS[[ord("["), ord("{")]] = 1
_STEPS[[ord("]"), ord("}")]] = -1


def is_too_deep(text: bytes) -> bool:
    """Whether arrays and objects are nested deeper than MAX_NESTING. `text` is UTF-8 and need not be valid JSON."""
    if text.count(b"[") + text.count(b"{") <= MAX_NESTING:
        return False
    brackets = _NO_BRACKETS.sub(b"", text)
    steps = _STEPS[np.frombuffer(brackets, dtype=np.uint8)]
    return bool(len(steps)) and int(np.cumsum(steps, dtype=np.int64).max()) > MAX_NESTING
