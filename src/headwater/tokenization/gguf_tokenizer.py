"""Build a tokenizer from the metadata of a GGUF file.

A GGUF names how its text is split into words (`tokenizer.ggml.pre`) instead of describing it; the splits
below are those of the models behind the names, as their own `tokenizer.json` has them. An unknown name is an
error: a wrong split gives plausible text and wrong token ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from headwater.tokenization.gguf_metadata import read_gguf_metadata
from headwater.tokenization.tokenizer_parts import TokenizerParts, set_begin_and_end_tokens

# token types of tokenizer.ggml.token_type
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_SPM_SPACE = "\u2581"

_NAMED_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
_EOS_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


@dataclass(frozen=True, slots=True)
class _WordSplit:
    """How a byte-level vocabulary cuts text into words before merging."""

    regex: str | None = None  # None: GPT-2's, which the ByteLevel pre-tokenizer brings
    has_single_digits: bool = False  # each numeric character is a word; done before the regex
    is_nfc: bool = False  # text is brought into Unicode's composed form first
    ignores_merges: bool = False  # a word that is in the vocabulary is one token, whatever the merges
    adds_bos: bool = False  # where the file does not say


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

    ValueError if the file is damaged, has no tokenizer or one of another kind; OSError if it cannot be read.
    """
    metadata = read_gguf_metadata(path)
    try:
        return _build(metadata)
    except KeyError as error:
        raise ValueError(f"{path}: the GGUF metadata has no {error.args[0]!r}") from error
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path}: {error}") from error


def _build(metadata: Mapping[str, Any]) -> TokenizerParts:
    model = metadata["tokenizer.ggml.model"]
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    if model == "gpt2":
        split = _word_split(metadata)
        backend, adds_bos = _byte_level_bpe(metadata, split), split.adds_bos
    elif model == "llama":
        backend, adds_bos = _sentencepiece_bpe(metadata), True
    else:
        raise ValueError(f"tokenizer.ggml.model: {model!r} is not supported, only 'gpt2' and 'llama'")
    _add_tokens_matched_whole(backend, tokens, metadata.get("tokenizer.ggml.token_type", []))
    special_tokens = {name: tokens[metadata[key]] for name, key in _NAMED_TOKENS.items() if key in metadata}
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", adds_bos)
    adds_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    set_begin_and_end_tokens(
        backend,
        bos_token=special_tokens.get("bos_token") if adds_bos else None,
        eos_token=special_tokens.get("eos_token") if adds_eos else None,
    )
    return TokenizerParts(
        backend=backend,
        special_tokens=special_tokens,
        eos_token_ids=tuple(dict.fromkeys(metadata[key] for key in _EOS_KEYS if key in metadata)),
        chat_templates=_chat_templates(metadata),
    )


def _word_split(metadata: Mapping[str, Any]) -> _WordSplit:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _WORD_SPLITS:
        known = ", ".join(_WORD_SPLITS)
        raise ValueError(f"tokenizer.ggml.pre: {name!r} is not supported, only {known}")
    return _WORD_SPLITS[name]


def _byte_level_bpe(metadata: Mapping[str, Any], split: _WordSplit) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(_bpe(vocab=vocabulary, merges=merges, ignore_merges=split.ignores_merges))
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


def _sentencepiece_bpe(metadata: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece's BPE: the text is one word, a pair whose union scores highest is merged first."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown_id = metadata.get("tokenizer.ggml.unknown_token_id")
    backend = Tokenizer(
        _bpe(
            vocab=vocabulary,
            merges=_merges_from_scores(vocabulary, metadata["tokenizer.ggml.scores"]),
            unk_token=None if unknown_id is None else tokens[unknown_id],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    has_space_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces_to_marks = normalizers.Replace(" ", _SPM_SPACE)
    marks_to_text: list[Any] = [decoders.Replace(_SPM_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_space_prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPM_SPACE), spaces_to_marks])
        marks_to_text.append(decoders.Strip(content=" ", left=1, right=0))
    else:
        backend.normalizer = spaces_to_marks
    backend.decoder = decoders.Sequence(marks_to_text)
    return backend


def _merges_from_scores(vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """All pairs of tokens whose union is a token, the union with the highest score first."""
    ranked = sorted(vocabulary, key=lambda token: (-scores[vocabulary[token]], vocabulary[token]))
    return [
        (token[:cut], token[cut:])
        for token in ranked
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]


def _bpe(**parameters: Any) -> models.BPE:
    try:
        return models.BPE(**parameters)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"tokenizer.ggml.merges: {error}") from error


def _add_tokens_matched_whole(backend: Tokenizer, tokens: list[str], token_types: list[int]) -> None:
    """Control tokens are special; user-defined ones (`<think>`) are text, but never cut either."""
    special, plain = [], []
    for token, token_type in zip(tokens, token_types, strict=False):
        if token_type in (_CONTROL, _UNKNOWN):
            special.append(AddedToken(token, normalized=False, special=True))
        elif token_type == _USER_DEFINED:
            plain.append(AddedToken(token, normalized=False, special=False))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    templates = {"default": metadata[prefix]} if prefix in metadata else {}
    for key, value in metadata.items():
        if key.startswith(prefix + ".") and isinstance(value, str):
            templates[key.removeprefix(prefix + ".")] = value
    return templates
