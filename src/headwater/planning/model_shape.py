"""The sizes of a model that determine the time of its steps. The command line reads this file alone."""

from dataclasses import dataclass

MXFP4_BYTES = 17 / 32  # 16 bytes and an exponent for 32 numbers


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder: features, heads, layers, experts, and bytes per weight and per KV element."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    ties_embeddings: bool
    max_context: int
    weight_bytes: float = 2.0
    kv_bytes: float = 2.0
    num_experts: int = 0  # of a layer; 0: all layers are dense
    experts_per_token: int = 0
    expert_size: int = 0  # inner features of one
    num_dense_layers: int = 0  # beside layers of experts
    expert_bytes: float | None = None  # per weight of an expert; None: weight_bytes

    def __post_init__(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of the model must be at least 1, found {getattr(self, name)}")

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    def weight_bytes_read(self, num_tokens: float) -> float:
        """Bytes of the weights of all layers that a step of so many tokens reads."""
        return self._bytes_of(round(self.num_weights_read(num_tokens)))

    def _bytes_of(self, num_layer_weights: float) -> float:
        """Those of layers' weights, of which what is beyond `_layer_weights` without experts is of experts."""
        plain = self._layer_weights(0)
        own = self.weight_bytes if self.expert_bytes is None else self.expert_bytes
        return plain * self.weight_bytes + (num_layer_weights - plain) * own

    @property
    def num_layer_weights(self) -> int:
        """Number of weights of all linear layers, without embeddings, head, norms and biases."""
        return self._layer_weights(self.num_experts)

    @property
    def num_token_weights(self) -> int:
        """Those of them that one token is multiplied by."""
        return self._layer_weights(self.experts_per_token)

    def num_weights_read(self, num_tokens: float) -> float:
        """Those that a step of so many tokens reads, if tokens choose their experts by chance."""
        if not self.num_experts:
            return self.num_layer_weights
        missed = (1 - self.experts_per_token / self.num_experts) ** num_tokens
        return self._layer_weights(self.num_experts * (1 - missed))

    def _layer_weights(self, experts: float) -> int:
        """With so many of the experts of each layer."""
        hidden = self.hidden_size
        attention = hidden * (2 * self.q_size + 2 * self.num_kv_heads * self.head_dim)
        num_dense = self.num_dense_layers if self.num_experts else self.num_layers
        routed = (self.num_layers - num_dense) * (3 * self.expert_size * experts + self.num_experts) * hidden
        return round(self.num_layers * attention + num_dense * 3 * hidden * self.intermediate_size + routed)

    @property
    def num_head_weights(self) -> int:
        return self.hidden_size * self.vocab_size

    @property
    def total_weight_bytes(self) -> float:
        """Memory of the weights."""
        num_copies = 1 if self.ties_embeddings else 2
        return self._bytes_of(self.num_layer_weights) + num_copies * self.num_head_weights * self.weight_bytes

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_bytes

    def rank_kv_bytes_per_token(self, tp_size: int) -> float:
        """Those that one rank holds. With more ranks than KV heads, several ranks hold the same head."""
        return self.kv_bytes_per_token * max(1, self.num_kv_heads // tp_size) / self.num_kv_heads


_SIZES = (
    "num_layers",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "max_context",
)
MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("smollm2-135m", 30, 576, 1536, 9, 3, 64, 49152, True, 8192),
        ModelShape("qwen3-0.6b", 28, 1024, 3072, 16, 8, 128, 151936, True, 40960),
        ModelShape("llama-3.1-8b", 32, 4096, 14336, 32, 8, 128, 128256, False, 131072),
        ModelShape("qwen3-32b", 64, 5120, 25600, 64, 8, 128, 151936, False, 40960),
        ModelShape(
            "qwen3-30b-a3b",
            48,
            2048,
            6144,
            32,
            4,
            128,
            151936,
            False,
            40960,
            num_experts=128,
            experts_per_token=8,
            expert_size=768,
        ),
        ModelShape(
            "gpt-oss-20b",
            24,
            2880,
            2880,
            64,
            8,
            64,
            201088,
            False,
            131072,
            num_experts=32,
            experts_per_token=4,
            expert_size=2880,
            expert_bytes=MXFP4_BYTES,
        ),
        ModelShape(
            "gpt-oss-120b",
            36,
            2880,
            2880,
            64,
            8,
            64,
            201088,
            False,
            131072,
            num_experts=128,
            experts_per_token=4,
            expert_size=2880,
            expert_bytes=MXFP4_BYTES,
        ),
    )
}


def check_ranks_of(model: ModelShape, tp_size: int) -> None:
    """ValueError if `tp_size` ranks cannot share the model: the rule of `headwater serve`."""
    if tp_size < 1 or model.num_heads % tp_size:
        raise ValueError(f"tp-size must divide the {model.num_heads} query heads of {model.name}, found {tp_size}")
    if model.num_kv_heads % tp_size and tp_size % model.num_kv_heads:
        raise ValueError(
            f"tp-size must divide the {model.num_kv_heads} KV heads of {model.name} or be a multiple, found {tp_size}"
        )
