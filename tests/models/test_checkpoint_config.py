"""A checkpoint for a served model: whether its own config asks for another computation."""

import json
from pathlib import Path
from typing import Any

import pytest

from headwater.models.checkpoint_config import read_checkpoint_config
from headwater.models.config import parse_hf_config
from headwater.models.loader import ModelFiles
from headwater.models.model_files import ModelFileError

pytestmark = pytest.mark.slow

SERVED: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "eos_token_id": 2,
}


def read(folder: Path, raw: dict[str, Any]) -> Any:
    (folder / "config.json").write_text(json.dumps(raw))
    files = ModelFiles(name="new", format="safetensors", folder=folder)
    return read_checkpoint_config(files, parse_hf_config(SERVED, {}))


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"rope_theta": 500000.0}, "the rotary embedding is default with theta 500000 and factor 1, and default with"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "the rotary embedding is linear"),
        ({"rope_scaling": {"type": "yarn", "factor": 1.0, "attention_factor": 2.0}}, "the rotary embedding"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06, and 1e-05 in the model that is served"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}, "num_heads is 8, and 4"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, and False"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"vocab_size": "many"}, "vocab_size must be an integer"),
    ],
)
def test_weights_of_another_computation_are_refused(tmp_path: Path, extra: dict[str, Any], reason: str) -> None:
    """Llama 3's weights fit Llama 3.1's shapes: taken, they would give wrong text without an error."""
    with pytest.raises(ModelFileError, match=rf"config\.json: {reason}"):
        read(tmp_path, {**SERVED, **extra})


def test_the_same_said_otherwise_is_the_same(tmp_path: Path) -> None:
    """A trainer's library writes newer names; context, EOS and a missing architecture change no computation."""
    other = {**SERVED, "rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    more = {"architectures": None, "max_position_embeddings": 512, "eos_token_id": [5, 2], "rms_norm_eps": 1.0000001e-5}
    assert read(tmp_path, {**other, **more}).eos_token_ids == (5, 2)


def test_weights_alone_need_no_config(tmp_path: Path) -> None:
    files = ModelFiles(name="new", format="safetensors", folder=tmp_path)
    assert read_checkpoint_config(files, parse_hf_config(SERVED, {})) is None
