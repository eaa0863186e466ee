"""The vocabularies of all kinds of tokenizer files, as grammars see them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_tokenizers import (
    byte_level_metadata,
    sentencepiece_metadata,
    sentencepiece_proto,
    write_gguf,
    write_hf_folder,
)

from headwater.grammars.compiler import GuidanceCompiler
from headwater.tokenization.grammar_vocabulary import grammar_vocabulary
from headwater.tokenization.tokenizer import Tokenizer

NUM_PADDED = 7  # ids of the model behind the tokenizer's


def _sentencepiece_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(sentencepiece_proto())
    return folder


KINDS: dict[str, Callable[[Path], Path]] = {
    "tokenizer.json": lambda folder: write_hf_folder(folder / "model"),
    "tokenizer.model": lambda folder: _sentencepiece_folder(folder / "model"),
    "gguf, byte level": lambda folder: write_gguf(folder / "model.gguf", byte_level_metadata()),
    "gguf, SentencePiece": lambda folder: write_gguf(folder / "model.gguf", sentencepiece_metadata()),
}


@pytest.fixture(params=KINDS, ids=str)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return Tokenizer.load(KINDS[request.param](tmp_path))


def test_the_tokens_of_a_text_spell_it_and_a_grammar_takes_them(tokenizer: Tokenizer) -> None:
    """From the tokenizer's file to the mask: every token of the text is allowed in its turn, and then the end."""
    vocab_size = tokenizer.vocab_size + NUM_PADDED
    vocabulary = grammar_vocabulary(tokenizer, vocab_size=vocab_size, end_ids=tokenizer.eos_token_ids)
    assert len(vocabulary.tokens) == vocab_size and vocabulary.tokens[-NUM_PADDED:] == [b""] * NUM_PADDED
    compiler = GuidanceCompiler(lambda: vocabulary, vocab_size=vocab_size, num_threads=1)
    text = 'hello 日本 {"a": 1}'
    ids = vocabulary.encode(text)
    assert b"".join(vocabulary.tokens[token_id] for token_id in ids).decode() == text
    matcher = compiler.compile(f'start: {_quoted(text)} "!"*')
    masks = np.zeros((1, compiler.num_words), dtype=np.uint32)
    for token_id in ids:
        assert not compiler.fill([matcher], masks)[0]
        assert masks[0, token_id // 32] >> np.uint32(token_id % 32) & 1, vocabulary.tokens[token_id]
        assert matcher.accept(token_id)
    assert compiler.fill([matcher], masks)[0]
    bits = np.unpackbits(masks.view(np.uint8), bitorder="little")
    assert not bits[[*tokenizer.eos_token_ids, *range(vocab_size - NUM_PADDED, len(bits))]].any()


def test_a_text_that_the_tokenizer_normalises_can_still_be_forced(tokenizer: Tokenizer) -> None:
    """Else a schema with such a key would allow tokens of another text, and fail at the next one."""
    vocabulary = grammar_vocabulary(tokenizer, vocab_size=tokenizer.vocab_size, end_ids=(2,))
    other = replace(vocabulary, encode=lambda text: vocabulary.encode(text.replace("o", "0")))
    compiler = GuidanceCompiler(lambda: other, vocab_size=tokenizer.vocab_size, num_threads=1)
    matcher, taken = compiler.compile('start: "hello world"'), b""
    masks = np.zeros((1, compiler.num_words), dtype=np.uint32)
    while not matcher.is_complete:
        compiler.fill([matcher], masks)
        token_id = int(np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little"))[0])
        assert matcher.accept(token_id)
        taken += vocabulary.tokens[token_id]
    assert taken == b"hello world"


def test_a_tokenizer_may_hold_more_tokens_than_the_model(tokenizer: Tokenizer) -> None:
    vocabulary = grammar_vocabulary(tokenizer, vocab_size=200, end_ids=(2, 250))
    assert len(vocabulary.tokens) == 200 and vocabulary.end_id == 2
    assert max(vocabulary.special_ids) < 200


def test_end_tokens_are_special_even_if_the_tokenizer_does_not_say_so(tokenizer: Tokenizer) -> None:
    """Else a string of an answer could hold one, and would end there."""
    plain = tokenizer.encode("h", add_special_tokens=False)[-1]
    assert plain in grammar_vocabulary(tokenizer, vocab_size=400, end_ids=(2, plain)).special_ids


def test_a_model_without_an_end_cannot_end_by_a_grammar(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no end token"):
        grammar_vocabulary(tokenizer, vocab_size=400, end_ids=(1000,))


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
