"""What bytes a token id stands for."""

import pytest
from tiny_tokenizers import byte_level_backend, sentencepiece_backend
from tokenizers import Tokenizer, decoders, models

from headwater.tokenization.token_bytes import TokenSpelling


def test_byte_level_tokens_of_a_text_spell_its_bytes():
    """A wrong entry of the byte table would garble one character in 256 kinds."""
    backend = byte_level_backend()
    spelling = TokenSpelling(backend)
    text = "".join(map(chr, range(0x250))) + "日本😀"
    ids = backend.encode(text).ids
    assert b"".join(map(spelling.bytes_of, ids)) == text.encode()


def test_all_256_bytes_have_a_token_of_their_own():
    spelling = TokenSpelling(byte_level_backend())
    assert {bytes([byte]) for byte in range(256)} <= {spelling.bytes_of(token_id) for token_id in range(300)}


def test_sentencepiece_spaces_and_byte_tokens():
    backend = sentencepiece_backend()
    spelling = TokenSpelling(backend)
    assert spelling.bytes_of(backend.token_to_id("\u2581hello")) == b" hello"
    assert spelling.bytes_of(backend.token_to_id("<0xE2>")) == b"\xe2"
    assert spelling.bytes_of(backend.token_to_id("<s>")) == b"<s>"
    assert spelling.num_leading_spaces_stripped == 1


def test_special_tokens_are_known_by_id():
    assert TokenSpelling(byte_level_backend()).special_ids == {0, 1, 2}


def test_an_added_token_outside_of_the_byte_alphabet_is_text():
    """DeepSeek's control tokens hold characters that no byte-level piece can: they are spelled as is."""
    backend = byte_level_backend()
    backend.add_tokens(["<\uff5cend of line\uff5c>"])
    token_id = backend.token_to_id("<\uff5cend of line\uff5c>")
    assert TokenSpelling(backend).bytes_of(token_id) == "<\uff5cend of line\uff5c>".encode()


def test_an_id_of_the_padded_vocabulary_has_no_text():
    """Models pad their output layer; sampling such an id must not end the request with an error."""
    assert TokenSpelling(byte_level_backend()).bytes_of(100_000) == b""


@pytest.mark.parametrize("token_id", [-1, 2**32])
def test_an_impossible_id_is_a_value_error(token_id):
    with pytest.raises(ValueError, match=f"token id {token_id} is out of range"):
        TokenSpelling(byte_level_backend()).bytes_of(token_id)


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece()], ids=["none", "word pieces"])
def test_a_decoder_that_is_not_made_of_bytes_is_refused_at_load(decoder):
    """Guessing would stream other text than the tokenizer decodes."""
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    if decoder is not None:
        backend.decoder = decoder
    with pytest.raises(ValueError, match=r"decoder .* is not supported"):
        TokenSpelling(backend)
