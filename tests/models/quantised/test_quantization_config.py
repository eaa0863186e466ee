"""`quantization_config`: what is read, and that all else is refused by parameter and value."""

from typing import Any

import pytest
from quantised_checkpoints import CONFIG, CONFIGS, NAMES, compressed, group_weights

from headwater.models.config import parse_hf_config
from headwater.models.model_files import ModelFileError

LAYER = "model.layers.3.mlp.down_proj"
INT4: dict[str, Any] = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}


def parse(quantization: dict[str, Any]) -> Any:
    return parse_hf_config(CONFIG | {"quantization_config": quantization}, {}).quantisation


@pytest.mark.parametrize("name", NAMES)
def test_real_configs_are_read(name: str) -> None:
    found = parse(CONFIGS[name])
    scheme = found.scheme_of(LAYER)
    assert scheme.bits in (4, 8)
    assert hash(found) == hash(parse(CONFIGS[name])), "configs are compared and kept in sets"


def test_what_the_parameters_mean() -> None:
    scheme = parse(CONFIGS["gptq"]).scheme_of(LAYER)
    assert (scheme.layout, scheme.tile, scheme.zero_offset, scheme.has_order) == ("gptq", (1, 128), 1, False)
    assert parse(CONFIGS["gptq-v2"]).scheme_of(LAYER).zero_offset == 0
    assert parse(CONFIGS["gptq-act-order"]).scheme_of(LAYER).has_order
    assert parse(CONFIGS["gptq"] | {"group_size": -1}).scheme_of(LAYER).tile_of((8, 512)) == (1, 512)
    assert parse(CONFIGS["fp8"]).scheme_of(LAYER).tile == (128, 128)
    assert parse(CONFIGS["float8-tensor"]).scheme_of(LAYER).tile_of((8, 512)) == (8, 512)
    assert parse({}) is None


def test_modules_that_are_left_out() -> None:
    by_part = parse(CONFIGS["awq"] | {"modules_to_not_convert": ["lm_head", "mlp.gate"]})
    assert by_part.is_ignored("lm_head") and by_part.is_ignored("model.layers.0.mlp.gate")
    assert not by_part.is_ignored("model.layers.0.mlp.gate_proj"), "a part is a whole word"
    named = parse(CONFIGS["packed"] | {"ignore": ["lm_head", "re:.*self_attn.*"]})
    assert named.is_ignored("model.layers.0.self_attn.q_proj") and not named.is_ignored(LAYER)
    groups = group_weights({"targets": ["re:.*down_proj"]}, **INT4)
    some = parse(compressed("pack-quantized", groups))
    assert some.scheme_of(LAYER) is not None and some.scheme_of("model.layers.3.mlp.up_proj") is None


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "bitsandbytes"}, "quantization_config.quant_method 'bitsandbytes' is not supported, only awq"),
    ({"bits": 4}, "quantization_config lacks the string 'quant_method'"),
    (CONFIGS["gptq"] | {"bits": 3}, "quantization_config.bits 3 is not supported, only 4 or 8"),
    (CONFIGS["gptq"] | {"bits": True}, "bits True"),
    (CONFIGS["gptq"] | {"group_size": 20}, "group_size 20 is not supported, only -1 and multiples of 8"),
    (CONFIGS["gptq"] | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported, only 'gptq'"),
    (CONFIGS["gptq"] | {"dynamic": {"-:.*": {}}}, "dynamic .* is not supported"),
    (CONFIGS["gptq"] | {"rotation": "hadamard"}, "quantization_config.rotation 'hadamard' is not known"),
    (CONFIGS["awq"] | {"version": "gemv"}, "version 'gemv' is not supported, only 'gemm'"),
    (CONFIGS["awq"] | {"zero_point": False}, "zero_point False is not supported, only True"),
    (CONFIGS["fp8"] | {"fmt": "e5m2"}, "fmt 'e5m2' is not supported, only 'e4m3'"),
    (CONFIGS["fp8"] | {"weight_block_size": [128]}, "weight_block_size must be two sizes"),
    (CONFIGS["fp8"] | {"activation_scheme": "none"}, "activation_scheme 'none'"),
    (CONFIGS["packed"] | {"format": "marlin-24"}, "config_groups.group_0.weights.type 'int' in format 'marlin-24'"),
    (CONFIGS["packed"] | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config .* is not supported"),
    (CONFIGS["packed"] | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config .* is not supported"),
    (CONFIGS["packed"] | {"quantization_status": "frozen"}, "quantization_status 'frozen'"),
    (CONFIGS["packed"] | {"config_groups": {}}, "config_groups is empty"),
    (CONFIGS["packed"] | {"ignore": ["re:("]}, r"hold 're:\(', which is no regular expression"),
    (compressed("pack-quantized", group_weights({}, **INT4 | {"num_bits": 2})), "num_bits 2 is not supported"),
    (compressed("pack-quantized", group_weights({}, **INT4 | {"strategy": "tensor"})), "strategy 'tensor'"),
    (compressed("pack-quantized", group_weights({}, **INT4 | {"actorder": "random"})), "actorder 'random'"),
    (
        compressed("pack-quantized", group_weights({"output_activations": {"num_bits": 8}}, **INT4)),
        "output_activations",
    ),
    (compressed("nvfp4-pack-quantized", group_weights({}, num_bits=4, type="float")), "weights.type 'float' in format"),
]


@pytest.mark.parametrize(("quantization", "message"), WRONG)
def test_what_is_not_understood_is_refused(quantization: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message) as caught:
        parse(quantization)
    assert "config.json" in str(caught.value)
