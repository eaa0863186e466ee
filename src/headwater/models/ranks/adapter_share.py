"""What a rank holds of LoRA adapters: its part of B where outputs are cut, its part of A where inputs are cut.

The product of an adapter then falls into the same parts as the product beside it, so no further sum over ranks is
needed (S-LoRA, arXiv 2311.03285, section 6).
"""

from headwater.devices.adapters import SITES, Adapter, AdapterMatrices, AdapterShape
from headwater.devices.host_tensor import HostTensor
from headwater.models.config import ModelConfig
from headwater.models.ranks.share import WHOLE, ModelShare

_CUTS_INPUTS = ("o", "down")


def adapter_shape(config: ModelConfig, *, num_slots: int, max_rank: int, share: ModelShare = WHOLE) -> AdapterShape:
    """What a rank's memory for adapters is sized by."""
    hidden, inner = config.hidden_size, len(share.mlp_columns(config))
    q, kv = (len(heads) * config.head_dim for heads in (share.heads(config), share.kv_heads(config)))
    sites = {"qkv": (hidden, (q, kv, kv)), "o": (q, (hidden,))}
    if config.experts is None or config.experts.dense_layers:  # experts have no adapters
        sites |= {"gate_up": (hidden, (inner, inner)), "down": (inner, (hidden,))}
    return AdapterShape(config.num_layers, num_slots, max_rank, sites)


def cut_adapter(adapter: Adapter, config: ModelConfig, share: ModelShare) -> Adapter:
    """A rank's part of an adapter, under the same id."""
    if share.size == 1:
        return adapter
    matrices = {}
    for (layer, projection), each in adapter.matrices.items():
        assert any(projection in names for names in SITES.values()), projection
        name = f"{projection}_proj.weight"
        a, b = (
            (share.cut(name, each.a, config), each.b)
            if projection in _CUTS_INPUTS
            else (each.a, share.cut(name, each.b, config))
        )
        assert isinstance(a, HostTensor) and isinstance(b, HostTensor)
        matrices[layer, projection] = AdapterMatrices(a, b, each.scale)
    return Adapter(adapter.adapter_id, matrices)
