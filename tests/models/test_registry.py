"""Which architectures are served, and the refusals."""

import pytest

from headwater.models.registry import FAMILIES, family_of, family_of_gguf


def test_an_unknown_architecture_is_named_with_what_is_known() -> None:
    """The user must read from the message alone what went wrong and what would work."""
    with pytest.raises(ValueError, match=r"'GPT2LMHeadModel'.*LlamaForCausalLM.*Qwen3ForCausalLM"):
        family_of("GPT2LMHeadModel")
    with pytest.raises(ValueError, match=r"'gpt2'.*llama.*qwen2"):
        family_of_gguf("gpt2")


def test_no_architecture_belongs_to_two_families() -> None:
    names = [name for family in FAMILIES for name in family.architectures]
    gguf_names = [name for family in FAMILIES for name in family.gguf_architectures]
    assert len(names) == len(set(names))
    assert len(gguf_names) == len(set(gguf_names))


@pytest.mark.parametrize(
    ("architecture", "raw", "is_refused"),
    [
        ("MistralForCausalLM", {"sliding_window": 4096}, True),
        ("MistralForCausalLM", {"sliding_window": None}, False),
        ("MistralForCausalLM", {"sliding_window": 8192}, False),  # never shorter than the context
        ("Qwen2ForCausalLM", {"sliding_window": 4096, "use_sliding_window": False}, False),
        ("Qwen2ForCausalLM", {"sliding_window": 4096, "use_sliding_window": True}, True),
        ("Qwen2ForCausalLM", {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 4}, False),
        (
            "Qwen3ForCausalLM",
            {"sliding_window": 4096, "use_sliding_window": True, "layer_types": ["full_attention"] * 4},
            False,
        ),
        ("LlamaForCausalLM", {"sliding_window": 4096}, False),  # Llama has no such option
    ],
)
def test_a_sliding_window_is_refused_only_where_it_acts(
    architecture: str, raw: dict[str, object], is_refused: bool
) -> None:
    """Ignoring an active window would give wrong text; refusing an idle one would lock out Qwen2.5."""
    raw = {"num_hidden_layers": 4, **raw}
    family = family_of(architecture)
    if is_refused:
        with pytest.raises(ValueError, match="sliding_window of 4096"):
            family.reject_sliding_window(raw, 8192)
    else:
        family.reject_sliding_window(raw, 8192)
