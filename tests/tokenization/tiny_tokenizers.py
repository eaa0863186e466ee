"""Tokenizers small enough to build in a test: both kinds of vocabularies, as objects and as files."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog, twice; and then the other dog jumps over the fox.",
    "def fox(jumps: int) -> str:\n    return 'quick' * jumps\n",
    "Ünïcödé wörds, 日本語のテキスト, русский текст, 😀😃😄 and numbers 12345 67890 3.14159.",
]
SPECIAL_TOKENS = ["<|end|>", "<|begin|>", "<|user|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|user|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)
# SentencePiece: pieces with scores; a pair is merged if its union is a piece, the higher score first
PIECES = "\u2581 h e l o w r d he ll hell hello \u2581hello \u2581w or".split()


def byte_level_backend() -> Tokenizer:
    """Byte-level BPE of at most 500 tokens, the first three of them special."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def sentencepiece_tokens() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and GGUF token types of a vocabulary with every byte and the characters of `PIECES`."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(PIECES))]
    types = [2, 3, 3] + [6] * 256 + [1] * len(PIECES)
    return tokens, scores, types


def sentencepiece_backend() -> Tokenizer:
    """The same vocabulary as a tokenizer, put together the way Llama 2's `tokenizer.json` is."""
    tokens, _, _ = sentencepiece_tokens()
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")]
    merges += [("\u2581", "hello"), ("\u2581", "w"), ("o", "r")]
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return backend


def write_hf_folder(folder: Path, *, files: Mapping[str, Any] | None = None, **config: Any) -> Path:
    """A Hugging Face folder with the byte-level tokenizer; `config` and `files` add to what it holds."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_level_backend().save(str(folder / "tokenizer.json"))
    tokenizer_config = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}, **config}
    for name, content in {"tokenizer_config.json": tokenizer_config, **(files or {})}.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def write_gguf(path: Path, metadata: Mapping[str, Any]) -> Path:
    """A GGUF file with this metadata, one small tensor of zeros, and the keys every file has."""
    writer = gguf.GGUFWriter(path, arch="llama")
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.add_tensor("zeros", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_metadata(**more: Any) -> dict[str, Any]:
    """GGUF metadata of the byte-level tokenizer, split `smollm`; `more` as `tokenizer.ggml.*`."""
    model = json.loads(byte_level_backend().to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    metadata = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [3 if token in SPECIAL_TOKENS else 1 for token in tokens],
        "merges": [" ".join(merge) for merge in model["merges"]],
        "eos_token_id": 0,
        "bos_token_id": 1,
    }
    return _under_tokenizer({**metadata, **more})


def sentencepiece_metadata(**more: Any) -> dict[str, Any]:
    """GGUF metadata of the SentencePiece vocabulary."""
    tokens, scores, types = sentencepiece_tokens()
    metadata = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types}
    ids = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return _under_tokenizer({**metadata, **ids, **more})


def _under_tokenizer(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


def sentencepiece_proto(
    *, model_type: int = 2, charsmap: bytes = b"", has_space_prefix: bool = True, removes_extra_spaces: bool = False
) -> bytes:
    """The SentencePiece vocabulary as a `tokenizer.model`: the protocol buffer, written by hand."""
    pieces = b"".join(
        _proto(1, _proto(1, token.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind]))
        for token, score, kind in zip(*sentencepiece_tokens(), strict=True)
    )
    trainer = _proto(2, b"\x18" + bytes([model_type]) + b"\x98\x02\x01")  # field 3; field 35: byte fallback
    flags = b"\x18" + bytes([has_space_prefix]) + b"\x20" + bytes([removes_extra_spaces])
    return pieces + trainer + _proto(3, _proto(2, charsmap) + flags)


def _proto(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    length = len(content)
    size = bytes([length]) if length < 128 else bytes([length & 127 | 128, length >> 7])
    return bytes([number << 3 | 2]) + size + content
