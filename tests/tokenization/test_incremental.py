"""Decoding one token at a time gives the text that decoding all at once gives."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import byte_level_backend, sentencepiece_backend
from tokenizers import Tokenizer

from headwater.tokenization.incremental import IncrementalDecoder
from headwater.tokenization.token_bytes import TokenSpelling

byte_level = cache(byte_level_backend)
sentencepiece = cache(sentencepiece_backend)


@cache
def spelling_of(backend_name: str) -> TokenSpelling:
    return TokenSpelling({"byte_level": byte_level, "sentencepiece": sentencepiece}[backend_name]())


def stream(spelling: TokenSpelling, token_ids, chunk: int = 1, **options) -> list[str]:
    decoder = IncrementalDecoder(spelling, **options)
    pieces = [decoder.feed(token_ids[start : start + chunk]) for start in range(0, len(token_ids), chunk)]
    return [*pieces, decoder.finish()]


ANY_TEXT = st.text(max_size=60)
BYTE_LEVEL_IDS = st.lists(st.integers(0, 600), max_size=40)  # some name no token
PIECE_IDS = st.lists(st.sampled_from([0, 1, 2, *range(259, 274)]), max_size=30)  # without single bytes


@given(token_ids=BYTE_LEVEL_IDS, chunk=st.integers(1, 7), skip=st.booleans())
def test_byte_level_streaming_equals_the_tokenizers_own_decode_for_any_ids(token_ids, chunk, skip):
    """Ill-formed bytes included: the number of U+FFFD must be the same, whatever the chunks."""
    pieces = stream(spelling_of("byte_level"), token_ids, chunk, skip_special_tokens=skip)
    assert "".join(pieces) == byte_level().decode(token_ids, skip_special_tokens=skip)


@given(text=ANY_TEXT, chunk=st.integers(1, 7))
def test_byte_level_streaming_gives_back_any_text(text, chunk):
    token_ids = byte_level().encode(text).ids
    assert "".join(stream(spelling_of("byte_level"), token_ids, chunk, skip_special_tokens=False)) == text


@given(text=st.text(max_size=60), chunk=st.integers(1, 7))
def test_no_replacement_character_is_given_out_for_well_formed_text(text, chunk):
    """Half a character must wait for its other half, not be shown as U+FFFD and corrected."""
    text = text.replace("\ufffd", "")
    token_ids = byte_level().encode(text).ids
    assert all("\ufffd" not in piece for piece in stream(spelling_of("byte_level"), token_ids, chunk))


@given(text=ANY_TEXT, chunk=st.integers(1, 7))
def test_sentencepiece_streaming_equals_the_tokenizers_own_decode_of_any_text(text, chunk):
    token_ids = sentencepiece().encode(text).ids
    pieces = stream(spelling_of("sentencepiece"), token_ids, chunk)
    assert "".join(pieces) == sentencepiece().decode(token_ids)


@given(token_ids=PIECE_IDS, chunk=st.integers(1, 7), skip=st.booleans())
def test_sentencepiece_streaming_equals_the_tokenizers_own_decode_for_any_pieces(token_ids, chunk, skip):
    """The one leading space is dropped also when special tokens, shown or not, come first."""
    pieces = stream(spelling_of("sentencepiece"), token_ids, chunk, skip_special_tokens=skip)
    assert "".join(pieces) == sentencepiece().decode(token_ids, skip_special_tokens=skip)


@given(
    backend_name=st.sampled_from(["byte_level", "sentencepiece"]),
    prompt=st.text(max_size=20),
    answer=st.text(max_size=20),
)
def test_an_answer_continues_its_prompt(backend_name, prompt, answer):
    """The answer's text is what the whole has more than the prompt: its leading space is not eaten."""
    backend = {"byte_level": byte_level, "sentencepiece": sentencepiece}[backend_name]()
    prompt_ids = backend.encode(prompt).ids
    token_ids = backend.encode(answer).ids
    pieces = stream(spelling_of(backend_name), token_ids, prompt_ids=prompt_ids)
    expected = backend.decode(prompt_ids + token_ids)[len(backend.decode(prompt_ids)) :]
    assert "".join(pieces) == expected


def test_a_sentencepiece_answer_keeps_the_space_before_its_first_word():
    backend = sentencepiece()
    prompt_ids, token_ids = backend.encode("hello").ids, [backend.token_to_id("\u2581hello")]
    assert "".join(stream(spelling_of("sentencepiece"), token_ids, prompt_ids=prompt_ids)) == " hello"
    assert "".join(stream(spelling_of("sentencepiece"), token_ids)) == "hello"


@pytest.mark.parametrize("num_prompt_tokens", range(5))
def test_a_character_begun_by_the_prompt_is_completed_by_the_answer(num_prompt_tokens):
    """A client that continues from token ids cuts where it likes, also within a character."""
    backend: Tokenizer = sentencepiece()
    token_ids = [backend.token_to_id(f"<0x{byte:02X}>") for byte in "\u2581😀".encode()][3:]
    prompt_ids = [5, *token_ids[:num_prompt_tokens]]
    pieces = stream(spelling_of("sentencepiece"), token_ids[num_prompt_tokens:], prompt_ids=prompt_ids)
    assert "".join(pieces) == ("😀" if num_prompt_tokens < 4 else "")


def test_an_incomplete_character_at_the_end_is_one_replacement_character():
    backend = sentencepiece()
    token_ids = [backend.token_to_id(f"<0x{byte:02X}>") for byte in "😀".encode()[:3]]
    assert stream(spelling_of("sentencepiece"), token_ids) == ["", "", "", "\ufffd"]


def test_a_stray_byte_does_not_take_back_the_characters_before_it():
    """The tokenizers library turns a whole run of byte tokens into U+FFFD; what was shown cannot change."""
    backend = sentencepiece()
    token_ids = [backend.token_to_id(f"<0x{byte:02X}>") for byte in "é".encode() + b"\xff"]
    assert stream(spelling_of("sentencepiece"), token_ids) == ["", "é", "\ufffd", ""]
