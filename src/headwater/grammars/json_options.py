"""How JSON under a grammar is written. This module imports no grammar library: the API process needs none."""

from dataclasses import dataclass

# one line end with the indentation behind it, or spaces: models repeat unlimited whitespace until their tokens run out
WHITESPACE = r"[ \t]{1,40}|\r?\n[ \t]{0,80}"


@dataclass(frozen=True, slots=True)
class JsonOptions:
    """How JSON is written. `whitespace` is a regular expression for the space between tokens; "" forbids it."""

    whitespace: str = WHITESPACE
    closes_objects: bool = False  # objects that list properties allow no others unless they say so
