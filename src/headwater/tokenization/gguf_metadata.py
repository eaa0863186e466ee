"""All metadata of a GGUF file, and nothing after it: what a tokenizer is built from."""

from pathlib import Path
from typing import Any

from headwater.models.gguf_header import GGUFHeader, parts_of


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """All metadata by key; arrays as lists, strings as str. Of a split file the first part's, which has it all.

    Takes tens of milliseconds, so the API process has its tokenizer before the engine has its weights.
    ModelFileError if the file is no GGUF, is damaged, or has a version or byte order that nobody writes any more.
    """
    header = GGUFHeader(parts_of(path)[0])
    return header.metadata | {key: header.array(key) for key in header.array_keys}
