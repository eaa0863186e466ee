"""Folders whose tokenizer is a SentencePiece `tokenizer.model` alone."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import sentencepiece_backend, sentencepiece_proto

from headwater.models.model_files import ModelFileError
from headwater.tokenization.hf_tokenizer import load_hf_tokenizer


def write(folder: Path, content: bytes, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(content)
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return load_hf_tokenizer(str(write(tmp_path_factory.mktemp("spm") / "model", sentencepiece_proto())))


@given(text=st.text(alphabet="helowrd \u2581äß日", max_size=40))
def test_it_encodes_as_the_same_vocabulary_in_tokenizer_json(parts, text):
    ids = parts.backend.encode(text, add_special_tokens=False).ids
    assert ids == sentencepiece_backend().encode(text, add_special_tokens=False).ids


def test_its_own_special_tokens_are_known(parts):
    """The model was trained with BOS; a folder of that age says it nowhere else."""
    assert parts.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert parts.eos_token_ids == (2,)
    assert parts.backend.encode("hello").ids[0] == 1


def test_the_config_beside_it_counts(tmp_path):
    added = {"274": {"content": "<|im_end|>", "special": True}}
    folder = write(tmp_path / "model", sentencepiece_proto(), added_tokens_decoder=added, add_bos_token=False,
                   chat_template="t")  # fmt: skip
    loaded = load_hf_tokenizer(str(folder))
    assert loaded.backend.encode("").ids == []
    assert loaded.backend.encode("<|im_end|>", add_special_tokens=False).ids == [274]
    assert set(loaded.eos_token_ids) == {2, 274} and loaded.chat_templates == {"default": "t"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (sentencepiece_proto(model_type=1), "is a SentencePiece model of type 'unigram', only 'bpe' is read"),
        (sentencepiece_proto(charsmap=b"rules"), "changes text by rules of its own"),
        (sentencepiece_proto(removes_extra_spaces=True), "changes text by rules of its own"),
        (b"IQ== 0\nIg== 1\n", "is no SentencePiece model"),  # tiktoken's format, under the same name
        (b"\x12\x00", "is no SentencePiece model: it holds no pieces"),
        (sentencepiece_proto()[:-3], "is no SentencePiece model, or is damaged"),
        (b"", "is empty"),
    ],
)
def test_what_is_not_read_is_named(tmp_path, content, reason):
    with pytest.raises(ModelFileError, match=rf"tokenizer\.model: {reason}"):
        load_hf_tokenizer(str(write(tmp_path / "model", content)))


def test_a_damaged_file_is_loaded_or_refused_and_nothing_else(tmp_path):
    whole = sentencepiece_proto()
    for seed in range(300):
        source, damaged = random.Random(seed), bytearray(whole)
        for _ in range(source.choice([1, 2, 5])):
            at = source.randrange(len(damaged))
            damaged[at : at + source.choice([0, 1, 8])] = source.randbytes(source.choice([0, 1, 8]))
        folder = write(tmp_path / "model", bytes(damaged))
        try:
            load_hf_tokenizer(str(folder))
        except ModelFileError as error:
            if str(folder) not in str(error):
                raise
