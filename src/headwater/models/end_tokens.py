"""The tokens that end an answer: those that a model's files name, and the control tokens known to end a turn.

Files often name only some: Llama 3's first configs leave out `<|eot_id|>`, Qwen's base configs `<|im_end|>`, and a
chat without a known end token talks to itself up to the token limit.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from headwater.models.fields import Fields
from headwater.models.model_files import ModelFileError, read_json_if_there
from headwater.models.vocabulary import Vocabulary, gguf_special_tokens, read_folder_vocabulary

NO_TOKEN = 0xFFFFFFFF  # GGUF's way to write "none"
_GGUF_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


class _EndToken(NamedTuple):
    """A control token that ends a turn or a text, in vocabularies that hold `beside` and not `unless`."""

    text: str
    beside: str | None = None
    unless: str | None = None


_END_TOKENS = (
    _EndToken("<|eot_id|>"),  # Llama 3
    _EndToken("<|eom_id|>"),
    _EndToken("<|end_of_text|>"),  # and Granite
    _EndToken("<|eot|>"),  # Llama 4
    _EndToken("<|eom|>"),
    _EndToken("<|im_end|>"),  # ChatML: Qwen, SmolLM2, Yi, InternLM, MiniCPM, LFM2, Kimi
    _EndToken("<|endoftext|>"),  # GPT-2 and its many heirs
    _EndToken("</s>"),  # Llama 2, Mistral
    _EndToken("<eos>"),  # Gemma
    _EndToken("<end_of_turn>"),
    _EndToken("<turn|>", beside="<|turn>"),  # Gemma 4
    _EndToken("<|end|>", unless="<|return|>"),  # Phi; in gpt-oss it ends one message of several in an answer
    _EndToken("<|return|>"),  # gpt-oss
    _EndToken("<|call|>", beside="<|return|>"),
    _EndToken("<\uff5cend\u2581of\u2581sentence\uff5c>"),  # DeepSeek
    _EndToken("<|EOT|>"),
    _EndToken("<|user|>", beside="<|observation|>"),  # GLM-4 ends its turn with the next speaker's token
    _EndToken("<|observation|>", beside="<|user|>"),
    _EndToken("<|END_OF_TURN_TOKEN|>"),  # Command-R
    _EndToken("[|endofturn|]"),  # EXAONE
    _EndToken("<|end_of_turn|>"),  # OpenChat
    _EndToken("<end_of_utterance>"),  # SmolVLM
    _EndToken("<|assistant_end|>"),  # Apertus
    _EndToken("<|role_end|>"),  # Ling
    _EndToken("<|endofresponse|>"),  # dots
    _EndToken("<seed:eos>"),  # Seed-OSS
    _EndToken("[EOS]"),  # Kimi
)


def known_end_ids(special: Mapping[str, int]) -> tuple[int, ...]:
    """Ids of the tokens known to end a turn, of those that are special in this vocabulary."""
    return tuple(
        special[token.text]
        for token in _END_TOKENS
        if token.text in special
        and (token.beside is None or token.beside in special)
        and (token.unless is None or token.unless not in special)
    )


def named_end_ids(fields: Fields, vocabulary: Vocabulary, *, vocab_size: int | None) -> tuple[int, ...]:
    """The ids that a config's `eos_token_id` names: an id, a token's text, or a list of them.

    ModelFileError for a text that no token has, and for an id outside of the vocabulary.
    """
    value = fields.raw("eos_token_id")
    listed = value if isinstance(value, list) else [value]
    return tuple(_named_id(each, fields, vocabulary, vocab_size=vocab_size) for each in listed if each is not None)


def vocabulary_end_ids(vocabulary: Vocabulary) -> tuple[int, ...]:
    """The tokenizer's own EOS, and the known ends among its special tokens."""
    own = None if vocabulary.eos_token is None else vocabulary.id_of(vocabulary.eos_token)
    return tuple(dict.fromkeys((*(() if own is None else (own,)), *known_end_ids(vocabulary.special))))


def folder_end_ids(folder: Path) -> tuple[int, ...]:
    """All end tokens of a Hugging Face folder: of generation config, config and tokenizer, and known control tokens."""
    vocabulary = read_folder_vocabulary(folder)
    named = [
        named_end_ids(Fields(read_json_if_there(folder / name), source=str(folder / name)), vocabulary, vocab_size=None)
        for name in ("generation_config.json", "config.json")
    ]
    return union(*named, vocabulary_end_ids(vocabulary))


def gguf_end_ids(metadata: Fields, *, vocab_size: int) -> tuple[int, ...]:
    """All end tokens in a GGUF's whole metadata: end of text, of turn and of message, known control tokens."""
    given = [key for key in _GGUF_KEYS if metadata.raw(key) not in (None, NO_TOKEN, -1)]
    named = [metadata.integer(key, low=0, high=vocab_size - 1) for key in given]
    return union(named, within(known_end_ids(gguf_special_tokens(metadata)), vocab_size=vocab_size))


def union(*sources: Iterable[int]) -> tuple[int, ...]:
    """Every id once, in the order of the sources."""
    return tuple(dict.fromkeys(token_id for source in sources for token_id in source))


def within(ids: Iterable[int], *, vocab_size: int | None) -> tuple[int, ...]:
    """The ids that the model can produce: a tokenizer may hold more tokens than the model has rows."""
    return tuple(token_id for token_id in ids if vocab_size is None or token_id < vocab_size)


def _named_id(value: Any, fields: Fields, vocabulary: Vocabulary, *, vocab_size: int | None) -> int:
    if isinstance(value, str):
        found = vocabulary.id_of(value)
        if found is None:
            raise ModelFileError(fields.source, f"eos_token_id {value!r} is the text of no token of the tokenizer")
        value = found
    is_id = isinstance(value, int) and not isinstance(value, bool)
    if not is_id or value < 0 or (vocab_size is not None and value >= vocab_size):
        last = "" if vocab_size is None else f" from 0 to {vocab_size - 1}"
        raise ModelFileError(fields.source, f"eos_token_id must name token ids{last}, found {value!r}")
    return value
