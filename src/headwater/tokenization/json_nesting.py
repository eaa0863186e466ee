"""The nesting depth of a JSON text, found without parsing it, since parsers and users of their result recurse."""

import re

MAX_NESTING = 100
# everything but brackets: strings with their escapes, and the characters in between
_NO_BRACKETS = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|$)|[^\[\]{}"]++', re.DOTALL)


def is_too_deep(text: bytes) -> bool:
    """Whether arrays and objects are nested deeper than MAX_NESTING. `text` is UTF-8 and need not be valid JSON."""
    if text.count(b"[") + text.count(b"{") <= MAX_NESTING:
        return False
    import numpy as np  # slow to import, and few bodies have so many brackets

    brackets = _NO_BRACKETS.sub(b"", text)
    codes = np.frombuffer(brackets, dtype=np.uint8)
    opens, closes = ((codes == ord(one)) | (codes == ord(other)) for one, other in ("[{", "]}"))
    return bool(len(codes)) and int(np.cumsum(opens.astype(np.int64) - closes).max()) > MAX_NESTING
