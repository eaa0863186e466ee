"""Layers of experts in a config: how many, which layers, and the names of their parameters."""

from collections.abc import Iterator
from dataclasses import dataclass

from headwater.models.fields import Fields

# far beyond any model
MOST_EXPERTS, MOST_FEATURES = 1 << 14, 1 << 20


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """The modules of a layer of experts in a checkpoint, below `model.layers.N`."""

    router: str
    experts: str  # an expert is "<experts>.<number>.<matrix>"
    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class ExpertFamily:
    """How a family's config describes its experts. Keys are those of config.json."""

    names: ExpertNames
    size_key: str  # inner features of an expert
    renormalise_key: str | None  # None: weights always add up to 1


QWEN3_EXPERTS = ExpertFamily(
    ExpertNames("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj"),
    size_key="moe_intermediate_size",
    renormalise_key="norm_topk_prob",
)
MIXTRAL_EXPERTS = ExpertFamily(
    ExpertNames("block_sparse_moe.gate", "block_sparse_moe.experts", "w1", "w3", "w2"),
    size_key="intermediate_size",
    renormalise_key=None,
)


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """The layers of experts of a model: in each, a token goes through `per_token` of `num_experts` gated MLPs.

    `dense_layers` have one MLP for all tokens instead.
    """

    num_experts: int
    per_token: int
    intermediate_size: int  # inner features of one expert
    renormalises: bool  # whether the weights of a token's experts add up to 1
    names: ExpertNames
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.num_experts:
            raise ValueError(f"num_experts_per_tok must be from 1 to {self.num_experts}, found {self.per_token}")

    @property
    def active_share(self) -> float:
        """The part of the experts' weights that one token is multiplied by."""
        return self.per_token / self.num_experts

    def router(self, layer: int) -> str:
        """The router's matrix, without ".weight"."""
        return f"model.layers.{layer}.{self.names.router}"

    def matrices(self, layer: int) -> list[tuple[str, str, str]]:
        """Gate, up and down of each expert, without ".weight"."""
        names, stem = self.names, f"model.layers.{layer}.{self.names.experts}"
        return [
            (f"{stem}.{expert}.{names.gate}", f"{stem}.{expert}.{names.up}", f"{stem}.{expert}.{names.down}")
            for expert in range(self.num_experts)
        ]

    def shapes(self, layer: int, hidden_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The parameters of a layer of experts."""
        yield self.router(layer) + ".weight", (self.num_experts, hidden_size)
        wide, narrow = (self.intermediate_size, hidden_size), (hidden_size, self.intermediate_size)
        for matrices in self.matrices(layer):
            yield from zip((f"{name}.weight" for name in matrices), (wide, wide, narrow), strict=True)

    def place_of(self, name: str) -> tuple[int, int] | None:
        """The expert and which of its matrices (gate, up, down: 0, 1, 2) a parameter is; None for other parameters."""
        parts, names = name.split("."), self.names
        if ".".join(parts[3:-3]) != names.experts or not parts[-3].isdigit():
            return None
        return int(parts[-3]), (names.gate, names.up, names.down).index(parts[-2])


def read_experts(fields: Fields, family: ExpertFamily, *, num_layers: int) -> ExpertsConfig | None:
    """The experts of a config.json; None if no layer has any. ModelFileError for a damaged config."""
    key = "num_experts" if "num_experts" in fields else "num_local_experts"  # of one family, transformers writes both
    num_experts = fields.integer(key, low=0, high=MOST_EXPERTS)
    step = fields.integer("decoder_sparse_step", 1)
    named = fields.integers("mlp_only_layers")
    dense = tuple(layer for layer in range(num_layers) if layer in named or (layer + 1) % step)
    if num_experts == 0 or len(dense) == num_layers:
        return None
    renormalise_key = family.renormalise_key
    return ExpertsConfig(
        num_experts=num_experts,
        per_token=fields.integer("num_experts_per_tok", high=num_experts),
        intermediate_size=fields.integer(family.size_key, high=MOST_FEATURES),
        renormalises=renormalise_key is None or fields.flag(renormalise_key, False),
        names=family.names,
        dense_layers=dense,
    )
