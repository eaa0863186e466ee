"""Tokenizers from folders in Hugging Face's layout."""

import json
import sys

import pytest
from tiny_tokenizers import CHAT_TEMPLATE, byte_level_backend, write_hf_folder

from headwater.models.model_files import ModelFileError
from headwater.tokenization.hf_tokenizer import load_hf_tokenizer


@pytest.fixture
def load(tmp_path):
    return lambda **options: load_hf_tokenizer(str(write_hf_folder(tmp_path / "model", **options)))


def test_a_folder_gives_its_tokens_and_names(load):
    parts = load()
    assert parts.backend.encode("dog").ids == byte_level_backend().encode("dog").ids
    assert parts.special_tokens == {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    assert parts.eos_token_ids == (0,)
    assert parts.chat_templates == {}


def test_a_tokenizer_saved_with_truncation_and_padding_does_neither_here(load, tmp_path):
    """Left on, a long prompt would silently lose its end, and a batch would be padded with a real token."""
    backend = byte_level_backend()
    backend.enable_truncation(2)
    backend.enable_padding(length=16, pad_id=0, pad_token="<|end|>")
    parts = load(files={"tokenizer.json": backend.to_str()})
    text = "the quick brown fox"
    assert parts.backend.encode(text).ids == byte_level_backend().encode(text).ids


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [2, 0]}}, (2, 0)),
        ({"generation_config.json": {"eos_token_id": 2}}, (2, 0)),
        ({"config.json": {"eos_token_id": 2}}, (2, 0)),
        ({"generation_config.json": {"eos_token_id": 1}, "config.json": {"eos_token_id": 2}}, (1, 2, 0)),
        ({"generation_config.json": {"eos_token_id": None}}, (0,)),
        ({"generation_config.json": {"eos_token_id": ["<|user|>", None]}}, (2, 0)),
    ],
)
def test_eos_is_what_any_of_the_files_names(load, files, expected):
    """Chat models end with one of several tokens; missing one, they run into max_tokens every time."""
    assert load(files=files).eos_token_ids == expected


@pytest.mark.parametrize(
    ("config", "around"),
    [
        ({}, []),
        ({"add_bos_token": True}, [1]),
        ({"add_bos_token": True, "add_eos_token": True}, [1, 0]),
        ({"add_eos_token": True}, [0]),
        ({"add_bos_token": True, "bos_token": None}, []),
        ({"add_bos_token": None}, []),
    ],
)
def test_the_config_says_what_goes_around_a_text(load, config, around):
    assert load(**config).backend.encode("").ids == around


def test_what_tokenizer_json_puts_around_a_text_stays_if_the_config_is_silent(load):
    """Llama 3's BOS is in `tokenizer.json` alone."""
    from tokenizers import processors

    backend = byte_level_backend()
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 1)]
    )
    files = {"tokenizer.json": backend.to_str()}
    assert load(files=files).backend.encode("").ids == [1]
    assert load(files=files, add_bos_token=None).backend.encode("").ids == [1], "null is not false"
    assert load(files=files, add_bos_token=False).backend.encode("").ids == []


def test_tokens_that_only_the_config_knows_are_added(load):
    """Cut into pieces, a control token of a chat template would be text to the model."""
    backend = byte_level_backend()
    first = backend.get_vocab_size()
    added = {
        str(first + 1): {"content": "<|tool|>", "special": True},
        str(first): {"content": "<think>", "special": False},
    }
    parts = load(added_tokens_decoder=added, pad_token="<|pad|>")
    assert parts.backend.encode("<think><|tool|><|pad|>").ids == [first, first + 1, first + 2]
    assert parts.backend.decode([first, first + 1]) == "<think>"


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        ({"chat_template": "a"}, {}, {"default": "a"}),
        ({}, {"chat_template.jinja": CHAT_TEMPLATE}, {"default": CHAT_TEMPLATE}),
        ({"chat_template": "a"}, {"chat_template.jinja": "b"}, {"default": "b"}),
        ({}, {"chat_template.json": {"chat_template": "c"}}, {"default": "c"}),
        (
            {"chat_template": [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "t"}]},
            {},
            {"default": "a", "tool_use": "t"},
        ),
    ],
)
def test_chat_templates_are_found_wherever_they_are_kept(load, config, files, expected):
    assert load(files=files, **config).chat_templates == expected


def test_additional_templates_have_their_files_names(tmp_path):
    folder = write_hf_folder(tmp_path / "model", chat_template="a")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("t")
    assert load_hf_tokenizer(str(folder)).chat_templates == {"default": "a", "tool_use": "t"}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_broken_file_is_named(load, name):
    with pytest.raises(ValueError, match=name):
        load(files={name: "{"})


def test_a_file_that_holds_no_object_is_named(load):
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: must hold a JSON object"):
        load(files={"tokenizer_config.json": "[]"})


@pytest.mark.parametrize("source", ["no/such-repository", "/no/such/folder", "not a name"])
def test_what_is_neither_folder_nor_repository_is_a_clear_error(source):
    """Not a traceback out of an HTTP library."""
    with pytest.raises(ValueError, match=r"is no local folder, no \.gguf file, and not to be had"):
        load_hf_tokenizer(source)


@pytest.mark.parametrize("make", [lambda path: path.write_text("x"), lambda path: path.symlink_to(path)])
def test_what_is_here_and_no_folder_is_not_looked_for_elsewhere(tmp_path, make):
    make(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="tokenizer: is no folder with a tokenizer"):
        load_hf_tokenizer(str(tmp_path / "tokenizer"))


def test_a_repository_in_the_hubs_cache_is_loaded_without_a_network(tmp_path, monkeypatch):
    """A model that was downloaded once must start on a train."""
    commit = "0" * 40
    repository = tmp_path / "models--someone--tiny"
    write_hf_folder(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_hf_tokenizer("someone/tiny").eos_token_ids == (0,)


def test_where_transformers_is_needed_the_error_names_its_extra(tmp_path, monkeypatch):
    """It is no longer installed with the server."""
    folder = write_hf_folder(tmp_path / "model", files={"vocab.json": {"a": 0}, "merges.txt": ""})
    (folder / "tokenizer.json").unlink()
    monkeypatch.setitem(sys.modules, "transformers", None)
    remedy = r"pip install 'headwater\[transformers\]' .*EXTRAS=transformers make setup"
    with pytest.raises(ModelFileError, match=remedy):
        load_hf_tokenizer(str(folder))


@pytest.mark.slow
def test_a_folder_without_tokenizer_json_is_converted_by_transformers(tmp_path):
    """GPT-2's older layout: vocabulary and merges in two files."""
    model = json.loads(byte_level_backend().to_str())["model"]
    files = {
        "vocab.json": model["vocab"],
        "merges.txt": "#version: 0.2\n" + "\n".join(" ".join(merge) for merge in model["merges"]),
    }
    config = {"eos_token": "<|end|>", "tokenizer_class": "GPT2Tokenizer"}
    folder = write_hf_folder(tmp_path / "model", files=files, **config)
    (folder / "tokenizer.json").unlink()
    (folder / "config.json").write_text('{"model_type": "gpt2", "eos_token_id": 0}')
    parts = load_hf_tokenizer(str(folder))
    text = "the quick brown fox, 12345"
    assert parts.backend.encode(text).ids == byte_level_backend().encode(text).ids
    assert parts.special_tokens["eos_token"] == "<|end|>"
    assert parts.eos_token_ids == (0,)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "config"),
    [
        ({"vocab.json": "{", "merges.txt": "#version: 0.2\n"}, {}),
        ({"vocab.json": "[1, 2]", "merges.txt": "#version: 0.2\n"}, {}),
        ({"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\nx y\n"}, {}),
        ({"vocab.json": '{"a": 0}'}, {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}, "tokenizer_class": "X"}),
    ],
)
def test_older_files_that_are_damaged_or_want_code_are_refused(tmp_path, files, config):
    """Whatever the library raises; and it must not ask at the terminal whether to run what came with a model."""
    folder = write_hf_folder(tmp_path / "model", files=files, **{"tokenizer_class": "GPT2Tokenizer", **config})
    (folder / "tokenizer.json").unlink()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"model: has no tokenizer that can be loaded|vocab\.json"):
        load_hf_tokenizer(str(folder))


@pytest.mark.slow
def test_a_folder_with_nothing_in_it_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="has no tokenizer that can be loaded"):
        load_hf_tokenizer(str(tmp_path))


def test_an_added_token_whose_id_is_taken_is_refused(load):
    """Put at the next free id instead, the model would be shown another token than it was trained with."""
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: added_tokens_decoder gives '<x>' the id 5"):
        load(added_tokens_decoder={"5": {"content": "<x>", "special": True}})


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"add_bos_token": "yes"}, "add_bos_token must be true or false, found 'yes'"),
        ({"added_tokens_decoder": []}, "added_tokens_decoder must be an object"),
        ({"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder holds 'x', which is no token"),
        ({"chat_template": [{"name": "default"}]}, "chat_template holds an entry without a name and a template"),
        ({"chat_template": 5}, "chat_template must be a string or a list"),
    ],
)
def test_what_the_config_says_in_another_form_is_refused_by_name(load, config, reason):
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {reason}"):
        load(**config)
