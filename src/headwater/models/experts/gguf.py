"""Experts in a GGUF file: keys of its metadata, and tensors that hold one matrix of all experts of a layer."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from headwater.models.experts.config import MOST_EXPERTS, MOST_FEATURES, ExpertFamily, ExpertsConfig
from headwater.models.fields import Fields
from headwater.models.gguf_file import GGUFTensor

EXPERT_KEYS = {"expert_count", "expert_used_count", "expert_feed_forward_length"}
EXPERT_NEUTRAL_VALUES = {
    "expert_shared_count": (0,),
    "expert_gating_func": (1, 3),  # softmax, before or behind the choice: the same where weights add up to 1
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "leading_dense_block_count": (0,),
}
_ROUTER = "blk.{}.ffn_gate_inp.weight"
_MATRICES = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.(weight|bias)")
_WHICH = ("gate", "up", "down")


def read_gguf_experts(
    model: Fields, tensors: Mapping[str, GGUFTensor], family: ExpertFamily, *, num_layers: int, architecture: str
) -> ExpertsConfig | None:
    """The experts of a file; None if it has none. Layers without a router are dense.

    llama.cpp renormalises the weights of the architectures that are read here.
    """
    num_experts = model.integer("expert_count", 0, low=0, high=MOST_EXPERTS)
    dense = tuple(layer for layer in range(num_layers) if _ROUTER.format(layer) not in tensors)
    if num_experts == 0:
        return None
    if len(dense) == num_layers:
        raise model.refuse(f"{architecture}.expert_count {num_experts} is not supported where no layer has a router")
    size = model.integer("feed_forward_length", high=MOST_FEATURES)
    return ExpertsConfig(
        num_experts=num_experts,
        per_token=model.integer("expert_used_count", high=num_experts),
        intermediate_size=model.integer("expert_feed_forward_length", size, high=MOST_FEATURES),
        renormalises=True,
        names=family.names,
        dense_layers=dense,
        has_bias=family.has_bias,
        activation=family.activation,
        is_stacked=family.is_stacked,
    )


def expert_tensors(tensors: Mapping[str, GGUFTensor], experts: ExpertsConfig) -> Iterator[tuple[str, str, GGUFTensor]]:
    """Each router and each matrix of an expert: its Hugging Face name, the name in the file, and where it lies."""
    for name, tensor in tensors.items():
        found = _MATRICES.fullmatch(name)
        layer = name.split(".")[1] if name.startswith("blk.") else ""
        kind = name.rpartition(".")[2]
        if layer and name == f"blk.{layer}.ffn_gate_inp.{kind}":
            yield f"{experts.router(int(layer))}.{kind}", name, tensor
        elif (
            found is not None
            and len(tensor.shape) == (3 if kind == "weight" else 2)
            and tensor.shape[0] == experts.num_experts
        ):
            num_bytes = tensor.num_bytes // experts.num_experts  # rows are whole blocks
            for expert, names in enumerate(experts.matrices(int(found[1]))):
                one = replace(
                    tensor, shape=tensor.shape[1:], offset=tensor.offset + expert * num_bytes, num_bytes=num_bytes
                )
                yield f"{names[_WHICH.index(found[2])]}.{kind}", name, one
