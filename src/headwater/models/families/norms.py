"""Where the norms of a layer are, by their names in checkpoints."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Norms:
    """The names of a layer's norms; None: there is none. One behind a block norms what it adds to the residual."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None

    @property
    def blocks(self) -> tuple[str, ...]:
        """The parts of a layer in the order of the forward pass: norms, `self_attn` and `mlp`."""
        around = (self.before_attention, "self_attn", self.after_attention, self.before_mlp, "mlp", self.after_mlp)
        return tuple(name for name in around if name is not None)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self.blocks if name not in ("self_attn", "mlp"))


LLAMA_NORMS = Norms()
OLMO2_NORMS = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
GEMMA_NORMS = Norms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
GLM4_NORMS = Norms(
    "input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"
)
