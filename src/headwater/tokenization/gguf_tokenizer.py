"""Build a tokenizer from the metadata of a GGUF file.

A GGUF file does not describe how text is split into words; it only has the split's name (`tokenizer.ggml.pre`). The
splits below come from the `tokenizer.json` of the models behind the names. An unknown name is an error, since a wrong
split gives plausible text and wrong token ids.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers

from headwater.models.end_tokens import NO_TOKEN, gguf_end_ids
from headwater.models.fields import Fields
from headwater.models.gguf_header import GGUFHeader, parts_of
from headwater.models.model_files import ModelFileError
from headwater.tokenization.sentencepiece_bpe import bpe, sentencepiece_bpe
from headwater.tokenization.tokenizer_parts import TokenizerParts, set_begin_and_end_tokens

# token types of tokenizer.ggml.token_type
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_NAMED_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
# Keys that change the tokenization, and the values with which they do not.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "tokenizer.ggml.remove_extra_whitespaces": (False,),
    "tokenizer.ggml.precompiled_charsmap": ([],),
    "tokenizer.ggml.add_sep_token": (False,),
}
_LONGEST_TOKEN = 1 << 12  # in characters; the ways to cut a token grow with its square


@dataclass(frozen=True, slots=True)
class _WordSplit:
    """The rules by which a byte-level vocabulary splits text into words before it merges."""

    regex: str | None = None  # None: that of GPT-2, which is built into the ByteLevel pre-tokenizer
    has_single_digits: bool = False  # each numeric character is a word, before the regex applies
    is_nfc: bool = False  # text is first normalized to Unicode's composed form
    ignores_merges: bool = False  # a word in the vocabulary is one token, regardless of merges
    adds_bos: bool = False  # if the file does not say


_LLAMA3 = _WordSplit(
    regex=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ignores_merges=True,
    adds_bos=True,
)
_QWEN2 = _WordSplit(
    regex=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    is_nfc=True,
)
_TEKKEN = _WordSplit(
    regex=r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ignores_merges=True,
    adds_bos=True,
)
_GPT2 = _WordSplit()
_GPT2_SINGLE_DIGITS = _WordSplit(has_single_digits=True)

_WORD_SPLITS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _GPT2_SINGLE_DIGITS,
    "starcoder": _GPT2_SINGLE_DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "tekken": _TEKKEN,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def load_gguf_tokenizer(path: Path) -> TokenizerParts:
    """The tokenizer of a `.gguf` file: byte-level BPE (`gpt2`) or SentencePiece BPE (`llama`).

    ModelFileError if the file cannot be read, is damaged, has no tokenizer or one of another kind.
    """
    metadata = Fields(read_gguf_metadata(path), source=str(path))
    try:
        return _build(metadata)
    except ModelFileError:
        raise
    except ValueError as error:
        raise metadata.refuse(str(error)) from None


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """All metadata of a `.gguf` file by key; of a split file, the first part has all of it.

    Reading takes tens of milliseconds, so the API process has its tokenizer before the engine has its weights.
    ModelFileError if the file is not GGUF, is damaged, or has an obsolete version or byte order.
    """
    return GGUFHeader(parts_of(path)[0], with_arrays=True).metadata


def _build(metadata: Fields) -> TokenizerParts:
    for key, values in _NEUTRAL_VALUES.items():
        if key in metadata and metadata.raw(key) not in values:
            raise metadata.refuse(f"{key} changes how text is cut, which is not supported")
    model = metadata.text("tokenizer.ggml.model")
    tokens = _tokens(metadata)
    if model == "gpt2":
        split = _word_split(metadata)
        backend, adds_bos = _byte_level_bpe(metadata, tokens, split), split.adds_bos
    elif model == "llama":
        backend, adds_bos = _sentencepiece_bpe(metadata, tokens), True
    else:
        raise metadata.refuse(f"tokenizer.ggml.model: {model!r} is not supported, only 'gpt2' and 'llama'")
    _add_tokens_matched_whole(backend, tokens, _integers(metadata, "tokenizer.ggml.token_type"))
    ids = {name: _token_id(metadata, key, tokens) for name, key in _NAMED_TOKENS.items()}
    special_tokens = {name: tokens[token_id] for name, token_id in ids.items() if token_id is not None}
    adds_bos = metadata.flag("tokenizer.ggml.add_bos_token", adds_bos)
    adds_eos = metadata.flag("tokenizer.ggml.add_eos_token", False)
    set_begin_and_end_tokens(
        backend,
        bos_token=special_tokens.get("bos_token") if adds_bos else None,
        eos_token=special_tokens.get("eos_token") if adds_eos else None,
    )
    return TokenizerParts(
        backend=backend,
        special_tokens=special_tokens,
        eos_token_ids=gguf_end_ids(metadata, vocab_size=len(tokens)),
        chat_templates=_chat_templates(metadata),
    )


def _tokens(metadata: Fields) -> list[str]:
    tokens = metadata.texts("tokenizer.ggml.tokens")
    if not tokens:
        raise metadata.refuse("the GGUF metadata has no 'tokenizer.ggml.tokens'")
    longest = max(map(len, tokens))
    if longest > _LONGEST_TOKEN:
        raise metadata.refuse(f"tokenizer.ggml.tokens holds a token of {longest} characters, at most {_LONGEST_TOKEN}")
    return tokens


def _integers(metadata: Fields, key: str) -> list[int]:
    values = metadata.raw(key) or []
    if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
        raise metadata.refuse(f"{key} must be an array of integers")
    return values


def _token_id(metadata: Fields, key: str, tokens: list[str]) -> int | None:
    if metadata.raw(key) in (None, NO_TOKEN, -1):
        return None
    return metadata.integer(key, low=0, high=len(tokens) - 1)


def _word_split(metadata: Fields) -> _WordSplit:
    name = metadata.text("tokenizer.ggml.pre", "default")
    if name not in _WORD_SPLITS:
        known = ", ".join(_WORD_SPLITS)
        raise metadata.refuse(f"tokenizer.ggml.pre: {name!r} is not supported, only {known}")
    return _WORD_SPLITS[name]


def _byte_level_bpe(metadata: Fields, tokens: list[str], split: _WordSplit) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if "tokenizer.ggml.merges" not in metadata:
        raise metadata.refuse("the GGUF metadata has no 'tokenizer.ggml.merges'")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.texts("tokenizer.ggml.merges")]
    backend = Tokenizer(bpe(vocab=vocabulary, merges=merges, ignore_merges=split.ignores_merges))
    if split.is_nfc:
        backend.normalizer = normalizers.NFC()
    steps: list[Any] = []
    if split.has_single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split.regex is not None:
        steps.append(pre_tokenizers.Split(Regex(split.regex), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.regex is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(metadata: Fields, tokens: list[str]) -> Tokenizer:
    scores = metadata.raw("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise metadata.refuse(f"tokenizer.ggml.scores must be an array of {len(tokens)} numbers, one for each token")
    return sentencepiece_bpe(
        tokens,
        scores,
        unknown_id=_token_id(metadata, "tokenizer.ggml.unknown_token_id", tokens),
        has_space_prefix=metadata.flag("tokenizer.ggml.add_space_prefix", True),
    )


def _add_tokens_matched_whole(backend: Tokenizer, tokens: list[str], token_types: list[int]) -> None:
    """Add control tokens, which are special, and user-defined ones (`<think>`), which are text but stay whole."""
    special, plain = [], []
    for token, token_type in zip(tokens, token_types, strict=False):
        if token_type in (_CONTROL, _UNKNOWN):
            special.append(AddedToken(token, normalized=False, special=True))
        elif token_type == _USER_DEFINED:
            plain.append(AddedToken(token, normalized=False, special=False))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)


def _chat_templates(metadata: Fields) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    templates = {"default": metadata.text(prefix)} if prefix in metadata else {}
    for key in metadata:
        if key.startswith(prefix + "."):
            templates[key.removeprefix(prefix + ".")] = metadata.text(key)
    return templates
