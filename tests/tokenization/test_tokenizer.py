"""The tokenizer as the rest of the server uses it."""

import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import (
    CHAT_TEMPLATE,
    byte_level_metadata,
    sentencepiece_metadata,
    write_gguf,
    write_hf_folder,
)

from headwater.tokenization.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("hf") / "model"
    return Tokenizer.load(write_hf_folder(folder, chat_template=CHAT_TEMPLATE, add_bos_token=True))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(write_gguf(tmp_path_factory.mktemp("gguf") / "s.gguf", sentencepiece_metadata()))


def test_a_path_ending_in_gguf_is_read_as_one_and_a_folder_as_hugging_faces(tmp_path, tokenizer):
    from_gguf = Tokenizer.load(str(write_gguf(tmp_path / "m.gguf", byte_level_metadata(pre="gpt-2"))))
    assert from_gguf.encode("dog") == tokenizer.encode("dog")[1:]
    assert from_gguf.vocab_size == tokenizer.vocab_size
    assert (from_gguf.bos_token_id, from_gguf.eos_token_ids) == (1, (0,))


@given(text=st.text(max_size=60))
def test_text_survives_encoding_and_decoding(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_special_tokens_go_around_a_text_and_are_parsed_within(tokenizer):
    assert tokenizer.encode("<|end|>") == [1, 0]
    assert tokenizer.encode("<|end|>", add_special_tokens=False) == [0]
    assert tokenizer.encode("") == [1]


def test_a_batch_is_encoded_as_its_texts_one_by_one(tokenizer):
    texts = ["a", "", "the quick brown fox"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize("text", ["half \ud83d", "\udc00", 7, None])
def test_text_that_is_no_unicode_is_a_value_error(tokenizer, text):
    """JSON can carry lone surrogates; the client gets a 400, not a 500."""
    with pytest.raises(ValueError, match="text: must be strings of valid Unicode"):
        tokenizer.encode(text)


def test_tokens_as_text_and_bytes(tokenizer):
    (token_id, *_) = tokenizer.encode("é", add_special_tokens=False)
    assert tokenizer.token_text(0) == "<|end|>"
    assert tokenizer.token_bytes(token_id).decode(errors="replace") == tokenizer.token_text(token_id)
    first_byte = next(i for i in range(300) if tokenizer.token_bytes(i) == b"\xe2")
    assert tokenizer.token_text(first_byte) == "\ufffd"


def test_decoding_drops_special_tokens_unless_asked(tokenizer):
    ids = tokenizer.encode("dog<|end|>")
    assert tokenizer.decode(ids) == "dog"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|begin|>dog<|end|>"
    assert tokenizer.decode(iter(ids)) == "dog"


def test_decoding_an_impossible_id_is_a_value_error(tokenizer):
    with pytest.raises(ValueError, match="token id -1 is out of range"):
        tokenizer.decode([-1])


def test_sentencepiece_round_trip_has_no_extra_space(sentencepiece):
    assert sentencepiece.decode(sentencepiece.encode("hello world")) == "hello world"
    assert sentencepiece.decode(sentencepiece.encode(" hello")) == " hello"


def test_a_chat_has_one_bos_at_most(tmp_path):
    """The template writes BOS, the tokenizer would add another: two of them shift every position."""
    folder = write_hf_folder(tmp_path, chat_template="{{ bos_token }}" + CHAT_TEMPLATE, add_bos_token=True)
    ids = Tokenizer.load(folder).encode_chat([{"role": "user", "content": "Hi"}])
    assert ids.count(1) == 1
    assert ids[0] == 1


def test_a_chat_is_its_rendered_text_encoded(tokenizer):
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.render_chat(messages)
    assert text == "<|user|>user\nHi<|end|>\n<|user|>assistant\n"
    assert tokenizer.encode_chat(messages) == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.has_chat_template


def test_tools_choose_the_template_for_tools(tmp_path):
    sources = {"default": "plain", "tool_use": "{{ tools[0].type }}"}
    templates = [{"name": name, "template": source} for name, source in sources.items()]
    tokenizer = Tokenizer.load(write_hf_folder(tmp_path, chat_template=templates))
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.render_chat(messages) == "plain"
    assert tokenizer.render_chat(messages, tools=[{"type": "function"}]) == "function"


def test_a_model_without_a_chat_template_says_so(sentencepiece):
    assert not sentencepiece.has_chat_template
    with pytest.raises(ValueError, match="this model has no chat template"):
        sentencepiece.encode_chat([{"role": "user", "content": "Hi"}])


def test_threads_may_share_a_tokenizer(tokenizer):
    """The API encodes long prompts in threads, beside the event loop that decodes."""
    text = "the quick brown fox jumps over 12345 lazy dogs 😀 " * 50
    expected = tokenizer.encode(text)
    wrong: list[str] = []

    def work() -> None:
        for _ in range(5):
            if tokenizer.decode(tokenizer.encode(text)) != text or tokenizer.encode(text) != expected:
                wrong.append("differs")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not wrong


def test_loading_and_using_a_tokenizer_imports_neither_torch_nor_transformers(tmp_path):
    """They cost an API process seconds of start-up and hundreds of megabytes."""
    folder = write_hf_folder(tmp_path / "model", chat_template=CHAT_TEMPLATE)
    file = write_gguf(tmp_path / "model.gguf", byte_level_metadata())
    script = f"""
import sys
from headwater.tokenization.text_stream import TextStream
from headwater.tokenization.tokenizer import Tokenizer
for path in {[str(folder), str(file)]!r}:
    tokenizer = Tokenizer.load(path)
    ids = tokenizer.encode("hello")
    TextStream(tokenizer, prompt_ids=ids, stop=["x"]).feed(ids)
tokenizer = Tokenizer.load({str(folder)!r})
tokenizer.encode_chat([{{"role": "user", "content": "Hi"}}])
heavy = sorted({{"torch", "transformers", "fastapi", "gguf"}} & set(sys.modules))
print("imported:", *heavy)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "imported:\n"
