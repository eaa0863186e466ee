"""Layers of experts in a config: how many, which layers, and the names of their parameters."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from headwater.devices.device import SWIGLU_LIMIT, SWIGLU_SLOPE, Activation
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
    has_bias: bool = False  # router and experts
    activation: Activation = "silu"
    is_stacked: bool = False  # a checkpoint has one tensor for a matrix of all experts (stacked.py)
    only_values: tuple[tuple[str, float], ...] = ()  # numbers of the config that are served with this value alone


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
GPT_OSS_EXPERTS = ExpertFamily(
    ExpertNames("mlp.router", "mlp.experts", "gate_proj", "up_proj", "down_proj"),
    size_key="intermediate_size",
    renormalise_key=None,
    has_bias=True,
    activation="clamped_swiglu",
    is_stacked=True,
    only_values=(("swiglu_limit", SWIGLU_LIMIT), ("swiglu_alpha", SWIGLU_SLOPE)),
)


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """The layers of experts of a model: in each, a token goes through `per_token` of `num_experts` gated MLPs.

    `dense_layers` have one MLP for all tokens instead. The last fields follow from the architecture, and are not in the
    `repr`, which is part of `weights_id`.
    """

    num_experts: int
    per_token: int
    intermediate_size: int  # inner features of one expert
    renormalises: bool  # whether the weights of a token's experts add up to 1
    names: ExpertNames
    dense_layers: tuple[int, ...] = ()
    has_bias: bool = field(default=False, repr=False)  # of the router and of all matrices
    activation: Activation = field(default="silu", repr=False)
    is_stacked: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.num_experts:
            raise ValueError(f"num_experts_per_tok must be from 1 to {self.num_experts}, found {self.per_token}")

    @property
    def active_share(self) -> float:
        """The part of the experts' weights that one token is multiplied by."""
        return self.per_token / self.num_experts

    def router(self, layer: int) -> str:
        """The router's linear layer."""
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
        yield from self._linear(self.router(layer), (self.num_experts, hidden_size))
        wide, narrow = (self.intermediate_size, hidden_size), (hidden_size, self.intermediate_size)
        for matrices in self.matrices(layer):
            for name, shape in zip(matrices, (wide, wide, narrow), strict=True):
                yield from self._linear(name, shape)

    def _linear(self, name: str, shape: tuple[int, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield name + ".weight", shape
        if self.has_bias:
            yield name + ".bias", shape[:1]

    def place_of(self, name: str) -> tuple[int, int] | None:
        """The expert and which of its matrices (gate, up, down: 0, 1, 2) a parameter is of; None: the router's."""
        parts, names = name.split("."), self.names
        if ".".join(parts[3:-3]) != names.experts or not parts[-3].isdigit():
            return None
        return int(parts[-3]), (names.gate, names.up, names.down).index(parts[-2])


def read_experts(fields: Fields, family: ExpertFamily, *, num_layers: int) -> ExpertsConfig | None:
    """The experts of a config.json; None if no layer has any. ModelFileError for a damaged config."""
    key = "num_experts" if "num_experts" in fields else "num_local_experts"  # of one family, transformers writes both
    num_experts = fields.integer(key, low=0, high=MOST_EXPERTS)
    for name, value in family.only_values:
        if fields.number(name, value) != value:
            raise fields.refuse(f"{name} {fields.raw(name)!r} is not supported, only {value}")
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
        has_bias=family.has_bias,
        activation=family.activation,
        is_stacked=family.is_stacked,
    )
