"""What a tokenizer is made of, whatever kind of file it came from."""

from collections.abc import Mapping
from dataclasses import dataclass

import tokenizers
from tokenizers import processors


@dataclass(frozen=True, slots=True)
class TokenizerParts:
    """A loaded tokenizer, before it is wrapped in `Tokenizer`, which owns it from then on."""

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]  # named ones as chat templates know them: "bos_token" -> "<s>"
    eos_token_ids: tuple[int, ...]  # the tokenizer's own first, then those of the generation config
    chat_templates: Mapping[str, str]  # Jinja sources; "default", and "tool_use" where a model has two


def set_begin_and_end_tokens(
    backend: tokenizers.Tokenizer, *, bos_token: str | None, eos_token: str | None
) -> None:
    """Make `encode(add_special_tokens=True)` put these around a text; None: nothing there."""
    before = [] if bos_token is None else [bos_token]
    after = [] if eos_token is None else [eos_token]
    ids = [(token, backend.token_to_id(token)) for token in dict.fromkeys(before + after)]
    assert all(token_id is not None for _, token_id in ids), f"{ids}: not in the vocabulary"
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after], pair=[*before, "$A", "$B", *after], special_tokens=ids
    )
