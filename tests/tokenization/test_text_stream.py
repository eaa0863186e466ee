"""Text and stop strings of one request, as the HTTP layer uses them."""

from functools import cache

from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import byte_level_backend

from headwater.tokenization.text_stream import TextDelta, TextStream
from headwater.tokenization.tokenizer import Tokenizer
from headwater.tokenization.tokenizer_parts import TokenizerParts


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(
        TokenizerParts(backend=byte_level_backend(), special_tokens={}, eos_token_ids=(0,), chat_templates={})
    )


def char_ids(text: str) -> list[int]:
    """One token for each byte, so that a test knows where tokens end."""
    return [token_id for char in text for token_id in tokenizer().encode(char)]


def test_deltas_add_up_to_the_text():
    stream = TextStream(tokenizer())
    deltas = [stream.feed([token_id]) for token_id in char_ids("héllo 😀")] + [stream.finish()]
    assert "".join(delta.text for delta in deltas) == stream.text == "héllo 😀"
    assert sum(delta.num_tokens_used for delta in deltas) == stream.num_tokens == len(char_ids("héllo 😀"))


def test_a_stop_string_across_tokens_ends_the_answer_and_says_how_many_tokens_count():
    stream = TextStream(tokenizer(), stop=["END"])
    assert stream.feed(char_ids("one E")) == TextDelta(text="one ", num_tokens_used=5)
    assert stream.feed(char_ids("ND two")) == TextDelta(text="", num_tokens_used=2, matched_stop="END")
    assert stream.feed(char_ids("three")) == TextDelta(text="", num_tokens_used=0)
    assert stream.finish() == TextDelta(text="", num_tokens_used=0)
    assert (stream.text, stream.num_tokens, stream.matched_stop) == ("one ", 7, "END")


def test_a_pattern_across_tokens_ends_the_answer_and_says_how_many_tokens_count():
    stream = TextStream(tokenizer(), stop=["unused"], stop_regex=[r"E\w+D"])
    assert stream.feed(char_ids("one E")).text == "one "
    assert stream.feed(char_ids("nD two")) == TextDelta(text="", num_tokens_used=2, matched_stop=r"E\w+D")
    assert stream.feed(char_ids("x")) == TextDelta(text="", num_tokens_used=0)


def test_include_stop_shows_the_stop_string():
    stream = TextStream(tokenizer(), stop=["END"], include_stop=True)
    stream.feed(char_ids("one END two"))
    assert stream.text == "one END"


def test_a_stop_string_may_be_found_in_what_the_end_flushes():
    """An incomplete character becomes U+FFFD only at the end; a stop string may name it."""
    stream = TextStream(tokenizer(), stop=["a\ufffd"])
    assert stream.feed(char_ids("a") + char_ids("é")[:1]).text == ""
    assert stream.finish() == TextDelta(text="", num_tokens_used=0, matched_stop="a\ufffd")


def test_special_tokens_are_hidden_unless_asked_for():
    ids = [*char_ids("a"), 0]
    hidden, shown = TextStream(tokenizer()), TextStream(tokenizer(), skip_special_tokens=False)
    hidden.feed(ids)
    shown.feed(ids)
    assert (hidden.text, shown.text) == ("a", "a<|end|>")


@given(
    text=st.text(alphabet="ab é😀", max_size=30),
    stop=st.lists(st.text(alphabet="ab é😀", min_size=1, max_size=3), max_size=3),
    chunk=st.integers(1, 9),
)
def test_steps_of_any_size_give_the_same_answer(text, stop, chunk):
    """How many tokens an engine message carries must not decide where an answer ends."""
    ids = char_ids(text)
    one_by_one, chunked = TextStream(tokenizer(), stop=stop), TextStream(tokenizer(), stop=stop)
    for token_id in ids:
        one_by_one.feed([token_id])
    for start in range(0, len(ids), chunk):
        chunked.feed(ids[start : start + chunk])
    one_by_one.finish()
    chunked.finish()
    assert (one_by_one.text, one_by_one.num_tokens, one_by_one.matched_stop) == (
        chunked.text,
        chunked.num_tokens,
        chunked.matched_stop,
    )
    if one_by_one.matched_stop is None:
        assert one_by_one.text == text
    else:
        assert text.startswith(one_by_one.text + one_by_one.matched_stop)
