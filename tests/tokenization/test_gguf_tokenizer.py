"""Tokenizers built from GGUF metadata."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import (
    byte_level_backend,
    byte_level_metadata,
    sentencepiece_backend,
    sentencepiece_metadata,
    write_gguf,
)
from tokenizers import pre_tokenizers

from headwater.tokenization.gguf_tokenizer import load_gguf_tokenizer


@pytest.fixture
def load(tmp_path):
    """Write metadata to a file and load it: the whole way a model takes."""
    return lambda metadata: load_gguf_tokenizer(write_gguf(tmp_path / "tiny.gguf", metadata))


def pieces(parts, text: str) -> list[str]:
    return parts.backend.encode(text, add_special_tokens=False).tokens


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("12345", ["1", "2", "3", "4", "5"]),
        ("1,234.5", ["1", ",", "2", "3", "4", ".", "5"]),
        ("3.14159", ["3", ".", "1", "4", "1", "5", "9"]),
        (" 42", ["Ġ", "4", "2"]),
        ("a1b22", ["a", "1", "b", "2", "2"]),
        ("x2 y10", ["x", "2", "Ġy", "1", "0"]),
        ("٣٤", ["Ù£", "Ù¤"]),
        ("½Ⅷ²", ["Â½", "âħ§", "Â²"]),
        ("it's 9am", ["it", "'s", "Ġ", "9", "am"]),
    ],
)
def test_smollm_splits_numbers_into_single_digits(load, text, words):
    """Without the split `12345` becomes tokens the model has hardly seen: its arithmetic is noise."""
    parts = load(byte_level_metadata())
    assert [word for word, _ in parts.backend.pre_tokenizer.pre_tokenize_str(text)] == words


def test_gpt2_keeps_numbers_together(load):
    """The digit split belongs to the models that were trained with it, not to all."""
    parts = load(byte_level_metadata(pre="gpt-2"))
    assert [word for word, _ in parts.backend.pre_tokenizer.pre_tokenize_str("a 12345")] == ["a", "Ġ12345"]


@pytest.fixture(scope="module")
def byte_level_pair(tmp_path_factory):
    """The tokenizer out of a file, and the one the file was made from."""
    path = tmp_path_factory.mktemp("gguf") / "byte_level.gguf"
    write_gguf(path, byte_level_metadata(pre="gpt-2"))
    return load_gguf_tokenizer(path).backend, byte_level_backend()


@pytest.fixture(scope="module")
def sentencepiece_pair(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "sentencepiece.gguf"
    return load_gguf_tokenizer(write_gguf(path, sentencepiece_metadata())).backend, sentencepiece_backend()


@given(text=st.text(max_size=60))
def test_byte_level_encodes_as_the_tokenizer_the_file_was_made_from(byte_level_pair, text):
    loaded, original = byte_level_pair
    assert loaded.encode(text).ids == original.encode(text).ids


def test_an_unknown_split_is_an_error_that_names_it(load):
    """Falling back to some split would serve wrong token ids and nobody would know."""
    with pytest.raises(ValueError, match=r"tiny\.gguf: tokenizer\.ggml\.pre: 'novel' is not supported"):
        load(byte_level_metadata(pre="novel"))


def test_an_unknown_kind_of_vocabulary_is_an_error_that_names_it(load):
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.model: 'bert' is not supported"):
        load(byte_level_metadata(model="bert"))


@pytest.mark.parametrize("key", ["model", "tokens", "merges"])
def test_missing_metadata_is_an_error_that_names_the_key(load, key):
    with pytest.raises(ValueError, match=rf"tiny\.gguf: .*(lacks|has no).*'tokenizer\.ggml\.{key}'"):
        load(byte_level_metadata(**{key: None}))


@pytest.mark.parametrize(
    "more", [{"remove_extra_whitespaces": True}, {"precompiled_charsmap": [1, 2, 3]}, {"add_sep_token": True}]
)
def test_rules_that_change_the_cut_and_are_not_known_are_refused_by_name(load, more):
    """Passed over, the prompt would be other tokens than those the model was trained with."""
    with pytest.raises(ValueError, match=rf"tiny\.gguf: tokenizer\.ggml\.{next(iter(more))} changes how text is cut"):
        load(sentencepiece_metadata(**more))


def test_no_bos_by_name_of_no_token(load):
    """2**32 - 1 is GGUF's way to write that there is none; it is no index."""
    assert "bos_token" not in load(sentencepiece_metadata(bos_token_id=0xFFFFFFFF)).special_tokens


def test_a_special_token_id_outside_of_the_vocabulary_is_an_error(load):
    with pytest.raises(ValueError, match=r"tiny\.gguf"):
        load(byte_level_metadata(eos_token_id=70_000))


def test_merges_that_do_not_fit_the_vocabulary_are_an_error(load):
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.merges"):
        load(byte_level_metadata(merges=["Q Qq"]))


def test_control_tokens_are_parsed_in_text_and_special(load):
    parts = load(byte_level_metadata())
    assert pieces(parts, "dog<|end|>")[-1] == "<|end|>"
    assert parts.backend.decode(parts.backend.encode("dog<|end|>").ids) == "dog"


def test_user_defined_tokens_are_whole_but_not_special(load):
    """`<think>` must be one token and must stay visible."""
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<think>"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 4]
    parts = load(metadata)
    ids = parts.backend.encode("<think>dog").ids
    assert ids[0] == len(metadata["tokenizer.ggml.tokens"]) - 1
    assert parts.backend.decode(ids) == "<think>dog"


@pytest.mark.parametrize(
    ("pre", "flag", "has_bos"),
    [
        ("smollm", None, False),
        ("smollm", True, True),
        ("qwen2", None, False),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
    ],
)
def test_bos_goes_before_a_text_where_the_model_wants_it(load, pre, flag, has_bos):
    parts = load(byte_level_metadata(pre=pre, add_bos_token=flag))
    ids = parts.backend.encode("dog").ids
    assert (ids[0] == 1) == has_bos
    assert ids[-1] != 0
    assert 1 not in parts.backend.encode("dog", add_special_tokens=False).ids


def test_eos_goes_after_a_text_only_if_the_file_says_so(load):
    assert load(byte_level_metadata(add_eos_token=True)).backend.encode("dog").ids[-1] == 0


def test_all_ends_of_turn_are_eos(load):
    """Llama 3 ends a turn with another token than a text; missing one, a chat never ends."""
    assert load(byte_level_metadata(eos_token_id=0, eot_token_id=2)).eos_token_ids == (0, 2)


def test_named_tokens_and_templates_are_found(load):
    metadata = byte_level_metadata()
    metadata["tokenizer.chat_template"] = "plain"
    metadata["tokenizer.chat_template.tool_use"] = "with tools"
    metadata["tokenizer.chat_templates"] = ["tool_use"]
    parts = load(metadata)
    assert parts.special_tokens == {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    assert parts.chat_templates == {"default": "plain", "tool_use": "with tools"}


def test_llama3_takes_a_word_that_is_a_token_whatever_the_merges(load):
    """Its `tokenizer.json` ignores the merges for such words; the token ids differ otherwise."""
    tokens = [*byte_level_metadata()["tokenizer.ggml.tokens"], "zzz"]
    llama3, gpt2 = (
        load(byte_level_metadata(pre=pre, tokens=tokens, token_type=[1] * len(tokens)))
        for pre in ("llama-bpe", "gpt-2")
    )
    assert pieces(llama3, "zzz") == ["zzz"]
    assert pieces(gpt2, "zzz") == list("zzz")


def test_llama3_splits_numbers_into_groups_of_three(load):
    parts = load(byte_level_metadata(pre="llama-bpe"))
    words = [word for word, _ in parts.backend.pre_tokenizer.pre_tokenize_str("12345 dogs")]
    assert words == ["123", "45", "Ġdogs"]


def test_qwen_composes_characters_first(load):
    """Qwen's text is NFC: a decomposed `é` from a Mac must give the ids of the composed one."""
    parts = load(byte_level_metadata(pre="qwen2"))
    assert parts.backend.encode("cafe\u0301").ids == parts.backend.encode("caf\u00e9").ids


@given(text=st.text(alphabet="hello wrd\u2581é😀\n<s>", max_size=30))
def test_sentencepiece_encodes_as_the_same_vocabulary_with_its_merges(sentencepiece_pair, text):
    """Merges are recovered from the scores; the reference has them written out by hand."""
    loaded, reference = sentencepiece_pair
    expected = reference.encode(text, add_special_tokens=False).ids
    assert loaded.encode(text, add_special_tokens=False).ids == expected
    assert loaded.decode(expected) == reference.decode(expected)


def test_sentencepiece_adds_bos_unless_told_not_to(load):
    assert load(sentencepiece_metadata()).backend.encode("hello").ids[0] == 1
    assert load(sentencepiece_metadata(add_bos_token=False)).backend.encode("hello").ids[0] != 1


def test_sentencepiece_without_the_space_prefix(load):
    """Such a model sees `hello` and not ` hello` at the start, and its first space is a real one."""
    parts = load(sentencepiece_metadata(add_space_prefix=False))
    assert pieces(parts, "hello") == ["hello"]
    assert parts.backend.decode(parts.backend.encode(" hello").ids) == " hello"


def test_the_word_splits_are_valid_expressions(load):
    """A typing error in one of them would show only with a model nobody has at hand."""
    for pre in ("llama-bpe", "qwen2", "tekken", "gpt-2", "smollm", "default"):
        parts = load(byte_level_metadata(pre=pre))
        assert isinstance(parts.backend.pre_tokenizer, pre_tokenizers.Sequence)
        text = "Hello, wörld's 123 things!\n\n  x"
        assert parts.backend.decode(parts.backend.encode(text).ids) == text
