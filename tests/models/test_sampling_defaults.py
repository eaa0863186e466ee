"""What a model's files recommend for sampling."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from headwater.models.sampling_defaults import read_sampling_defaults


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1, 2]},
            {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        ),
        ({"repetition_penalty": 1.05, "min_p": 0.1}, {"repetition_penalty": 1.05, "min_p": 0.1}),
        ({"temperature": None, "top_p": True, "top_k": "20"}, {}),
        (None, {}),
    ],
)
def test_of_a_folder(tmp_path: Path, config: dict[str, Any] | None, expected: dict[str, float]) -> None:
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    found = read_sampling_defaults(tmp_path, gguf=None)
    assert found == expected
    assert all(type(value) is type(expected[name]) for name, value in found.items()), "top_k stays an integer"


def test_of_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "file.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_float32("general.sampling.temp", 0.25)
    writer.add_int32("general.sampling.top_k", 40)
    writer.add_string("general.sampling.sequence", "top_k;temperature")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_sampling_defaults(tmp_path, gguf=path) == {"temperature": 0.25, "top_k": 40}
