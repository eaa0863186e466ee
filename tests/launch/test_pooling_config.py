"""What the files of embedding models say about pooling."""

import json
from pathlib import Path

import gguf
import pytest

from headwater.launch.pooling_config import PoolingConfig, read_pooling


def folder_with(tmp_path: Path, *, pooling: dict | None = None, config: dict | None = None) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config or {"hidden_size": 8}))
    if pooling is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return tmp_path


@pytest.mark.parametrize(
    ("pooling", "mode"),
    [
        (None, ""),
        ({"word_embedding_dimension": 8, "pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True}, "pooling_mode_cls_token"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
         "pooling_mode_cls_token+pooling_mode_mean_tokens"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
    ],
)  # fmt: skip
def test_the_mode_is_read_and_an_unsupported_one_keeps_its_name(tmp_path, pooling, mode):
    assert read_pooling(folder_with(tmp_path, pooling=pooling)) == PoolingConfig(mode, None)


@pytest.mark.parametrize(
    ("config", "dimensions"),
    [
        ({}, None),
        ({"is_matryoshka": True}, ()),
        ({"is_matryoshka": False}, None),
        ({"matryoshka_dimensions": [64, 32]}, (32, 64)),
        ({"matryoshka_dimensions": "all"}, None),
    ],
)
def test_dimensions_of_a_matryoshka_model(tmp_path, config, dimensions):
    assert read_pooling(folder_with(tmp_path, config={"hidden_size": 8} | config)).dimensions == dimensions


def test_a_folder_without_a_config_says_nothing(tmp_path):
    assert read_pooling(tmp_path) == PoolingConfig()


@pytest.mark.parametrize(("number", "mode"), [(None, ""), (0, ""), (1, "mean"), (3, "last"), (4, "rank"), (77, "")])
def test_the_mode_of_a_gguf_file(tmp_path, number, mode):
    path = tmp_path / "file.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    if number is not None:
        writer.add_uint32("qwen3.pooling_type", number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert read_pooling(tmp_path, gguf=path) == PoolingConfig(mode)
