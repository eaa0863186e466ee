"""Which architectures are served, and the refusals."""

import pytest

from headwater.models.fields import Fields
from headwater.models.model_files import ModelFileError
from headwater.models.registry import FAMILIES, family_of, family_of_gguf


def test_an_unknown_architecture_is_named_with_what_is_known() -> None:
    """The user must read from the message alone what went wrong and what would work."""
    with pytest.raises(ValueError, match=r"'GPT2LMHeadModel'.*LlamaForCausalLM.*Qwen3ForCausalLM"):
        family_of("GPT2LMHeadModel")
    with pytest.raises(ValueError, match=r"'gpt2'.*llama.*qwen2"):
        family_of_gguf("gpt2")


def test_no_architecture_belongs_to_two_families() -> None:
    names = [name for family in FAMILIES for name in family.architectures]
    # llama.cpp's "llama" is Mixtral where a file has experts
    gguf_names = [(name, family.experts is None) for family in FAMILIES for name in family.gguf_architectures]
    assert len(names) == len(set(names))
    assert len(gguf_names) == len(set(gguf_names))


@pytest.mark.parametrize(
    ("architecture", "raw", "window"),
    [
        ("MistralForCausalLM", {"sliding_window": 4096}, 4096),
        ("MistralForCausalLM", {}, None),
        ("MistralForCausalLM", {"sliding_window": 8192}, None),  # never shorter than the context
        ("Qwen2ForCausalLM", {"sliding_window": 4096, "use_sliding_window": False}, None),
        ("Qwen2ForCausalLM", {"sliding_window": 4096, "use_sliding_window": True}, 4096),
        ("Qwen2ForCausalLM", {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 4}, None),
        (
            "Qwen3ForCausalLM",
            {"sliding_window": 4096, "use_sliding_window": True, "layer_types": ["full_attention"] * 4},
            None,
        ),
        (
            "Qwen3ForCausalLM",
            {"sliding_window": 64, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
            64,
        ),
        ("LlamaForCausalLM", {"sliding_window": 4096}, None),  # Llama has no such option
    ],
)
def test_a_sliding_window_is_told_only_where_it_acts(
    architecture: str, raw: dict[str, object], window: int | None
) -> None:
    """Ignoring an active window would give wrong text; obeying an idle one would lock out Qwen2.5."""
    fields = Fields({"num_hidden_layers": 4, **raw}, source="config.json")
    assert family_of(architecture).window_of(fields, 8192) == window


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"layer_types": ["linear_attention"]}, r"config\.json: layer_types holds 'linear_attention'"),
        ({"sliding_window": "wide"}, r"config\.json: sliding_window must be an integer from 1 .*found 'wide'"),
    ],
)
def test_layers_of_an_unknown_kind_are_refused_by_name(raw: dict[str, object], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        family_of("MistralForCausalLM").window_of(Fields({"num_hidden_layers": 4, **raw}, source="config.json"), 8192)
