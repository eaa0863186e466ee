"""The parts of a tokenizer, which every kind of tokenizer file provides."""

from collections.abc import Mapping
from dataclasses import dataclass

import tokenizers
from tokenizers import processors


@dataclass(frozen=True, slots=True)
class TokenizerParts:
    """A loaded tokenizer. `Tokenizer` wraps it and owns it then."""

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]  # by the names that chat templates use: "bos_token" -> "<s>"
    eos_token_ids: tuple[int, ...]  # the tokenizer's own first, then those of the generation config
    chat_templates: Mapping[str, str]  # Jinja sources: "default", and "tool_use" if the model has two


def set_begin_and_end_tokens(backend: tokenizers.Tokenizer, *, bos_token: str | None, eos_token: str | None) -> None:
    """Make `encode(add_special_tokens=True)` add these tokens before and after a text; None adds nothing."""
    before = [] if bos_token is None else [bos_token]
    after = [] if eos_token is None else [eos_token]
    ids = [(token, backend.token_to_id(token)) for token in dict.fromkeys(before + after)]
    assert all(token_id is not None for _, token_id in ids), f"{ids}: not in the vocabulary"
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after], pair=[*before, "$A", "$B", *after], special_tokens=ids
    )
