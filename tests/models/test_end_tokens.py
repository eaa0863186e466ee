"""Which tokens end an answer, of the vocabularies in use."""

import json
from pathlib import Path
from typing import Any

import pytest

from headwater.models.end_tokens import folder_end_ids, gguf_end_ids, known_end_ids
from headwater.models.fields import Fields
from headwater.models.model_files import ModelFileError


@pytest.mark.parametrize(
    ("special", "ends"),
    [
        ("<|begin_of_text|> <|end_of_text|> <|eot_id|> <|eom_id|> <|start_header_id|> <|python_tag|>",
         "<|eot_id|> <|eom_id|> <|end_of_text|>"),
        ("<|endoftext|> <|im_start|> <|im_end|> <|fim_pad|> <|repo_name|>", "<|im_end|> <|endoftext|>"),
        ("<bos> <eos> <pad> <start_of_turn> <end_of_turn>", "<eos> <end_of_turn>"),
        ("<unk> <s> </s> [INST] [/INST]", "</s>"),
        ("<|endoftext|> <|system|> <|user|> <|assistant|> <|end|>", "<|endoftext|> <|end|>"),
        ("<|startoftext|> <|endoftext|> <|start|> <|channel|> <|message|> <|end|> <|return|> <|call|>",
         "<|endoftext|> <|return|> <|call|>"),
        ("[gMASK] <sop> <|endoftext|> <|system|> <|user|> <|assistant|> <|observation|>",
         "<|endoftext|> <|user|> <|observation|>"),
        ("<\uff5cbegin\u2581of\u2581sentence\uff5c> <\uff5cend\u2581of\u2581sentence\uff5c> <\uff5cUser\uff5c>",
         "<\uff5cend\u2581of\u2581sentence\uff5c>"),
        ("<BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        ("<|turn> <turn|> <eos>", "<turn|> <eos>"),
    ],
    ids=["llama3", "qwen", "gemma", "mistral", "phi", "gpt-oss", "glm4", "deepseek", "command-r", "gemma4"],
)  # fmt: skip
def test_the_ends_of_real_vocabularies_are_known(special: str, ends: str) -> None:
    """gpt-oss's <|end|> parts the messages of one answer, and Phi's <|user|> is no end: both must run on."""
    ids = {token: 100 + index for index, token in enumerate(special.split())}
    assert set(known_end_ids(ids)) == {ids[token] for token in ends.split()}


def _folder(folder: Path, **files: dict[str, Any]) -> Path:
    added = [
        {"id": 7, "content": "<|im_end|>", "special": True},
        {"id": 8, "content": "<|endoftext|>", "special": False},  # text to this vocabulary
        {"id": 9, "content": "<stop>", "special": False},
    ]
    tokenizer = {"added_tokens": added, "model": {"type": "BPE", "vocab": {"a": 0, "stop": 3}, "merges": []}}
    for name, content in {"tokenizer": tokenizer, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (7,)),
        ({"config": {"eos_token_id": 3}}, (3, 7)),
        ({"config": {"eos_token_id": 3}, "generation_config": {"eos_token_id": [4, None, 3]}}, (4, 3, 7)),
        ({"config": {"eos_token_id": "<stop>"}}, (9, 7)),
        ({"generation_config": {"eos_token_id": ["stop", 5]}}, (3, 5, 7)),
        ({"config": {"eos_token_id": None}, "tokenizer_config": {"eos_token": "<stop>"}}, (9, 7)),
        ({"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": {"content": "stop"}}}, (3, 7)),
        ({"tokenizer_config": {"added_tokens_decoder": {"12": {"content": "<|eot_id|>", "special": True}}}}, (12, 7)),
    ],
)
def test_a_folders_ends_are_the_union_of_all_that_its_files_name(
    tmp_path: Path, files: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert folder_end_ids(_folder(tmp_path, **files)) == expected


@pytest.mark.parametrize("value", ["<none>", -1, True, 1.5, [["a"]], {"id": 3}])
def test_an_eos_token_id_that_names_no_token_is_refused(tmp_path: Path, value: Any) -> None:
    """Left out without a word, the model would run past its end."""
    with pytest.raises(ModelFileError, match=r"generation_config\.json: eos_token_id"):
        folder_end_ids(_folder(tmp_path, generation_config={"eos_token_id": value}))


def _gguf(**more: Any) -> Fields:
    tokens = ["a", "<|eot_id|>", "<|im_end|>", "</s>", "b", "c"]
    metadata = {"tokens": tokens, "token_type": [1, 3, 4, 3, 1, 1], **more}
    return Fields({f"tokenizer.ggml.{key}": value for key, value in metadata.items()}, source="model.gguf")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, {1, 3}),  # <|im_end|> is text here: it is not marked as control
        ({"eos_token_id": 3, "eot_token_id": 4, "eom_token_id": 5}, {1, 3, 4, 5}),
        ({"eos_token_id": 0xFFFFFFFF, "token_type": [1] * 6}, set()),
        ({"eos_token_id": -1, "tokens": []}, set()),
    ],
)
def test_a_gguf_files_ends(more: dict[str, Any], expected: set[int]) -> None:
    assert set(gguf_end_ids(_gguf(**more), vocab_size=6)) == expected


def test_an_id_of_a_gguf_file_outside_of_the_vocabulary_is_refused_by_name() -> None:
    with pytest.raises(ModelFileError, match=r"model\.gguf: tokenizer\.ggml\.eot_token_id must be .* found 6"):
        gguf_end_ids(_gguf(eot_token_id=6), vocab_size=6)


def test_ends_that_the_model_has_no_row_for_are_left_out() -> None:
    """They cannot be sampled, and would be an index beyond the logits."""
    assert gguf_end_ids(_gguf(), vocab_size=2) == (1,)
