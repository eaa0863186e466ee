"""Checks that a checkpoint for a served model needs the same computation."""

import math

import numpy as np

from headwater.models.config import ModelConfig, read_hf_config
from headwater.models.loader import ModelFiles, read_config
from headwater.models.model_files import ModelFileError, is_there
from headwater.models.rope import RopeConfig

_COMPARED = (
    "num_heads", "num_kv_heads", "head_dim", "tie_word_embeddings", "qkv_bias", "o_bias", "mlp_bias", "experts",
    "embedding_scale", "residual_scale", "score_scale", "logits_divisor", "unrotated_layers",
    "window", "local_layers", "is_interleaved", "norms", "norm_offset", "qk_norm_whole", "activation", "fused",
    "has_sinks",
)  # fmt: skip
_EQUAL = 1e-4  # relative: GGUF files hold float32, and llama3's frequencies as factors


def read_checkpoint_config(files: ModelFiles, served: ModelConfig) -> ModelConfig | None:
    """The config that comes with a checkpoint; None if it holds weights alone, as many of a training run do.

    ModelFileError if it is damaged, or if it asks for another computation than `served`: the shapes of the weights
    would fit, but the text would be wrong.
    """
    if files.gguf is None and not is_there(files.folder / "config.json"):
        return None
    found = read_config(files) if files.gguf else read_hf_config(files.folder, architecture=served.architecture)
    if served.rope.is_short:
        found = found.for_context(found.rope.original_context)
    place = files.gguf or files.folder / "config.json"
    for name in _COMPARED:
        if getattr(found, name) != getattr(served, name):
            raise _differs(place, name, getattr(found, name), getattr(served, name))
    if not math.isclose(found.norm_eps, served.norm_eps, rel_tol=_EQUAL):
        raise _differs(place, "rms_norm_eps", found.norm_eps, served.norm_eps)
    for ours, theirs in ((served.rope, found.rope), (served.local_rope or served.rope, found.local_rope or found.rope)):
        frequencies = (rope.inv_freq(served.head_dim) for rope in (ours, theirs))
        is_same = np.allclose(*frequencies, rtol=_EQUAL, atol=0.0)
        if not is_same or not math.isclose(theirs.attention_factor, ours.attention_factor, rel_tol=_EQUAL):
            raise _differs(place, "the rotary embedding", _rope_words(theirs), _rope_words(ours))
    return found


def _rope_words(rope: RopeConfig) -> str:
    return f"{rope.kind} with theta {rope.theta:g} and factor {rope.factor:g}"


def _differs(place: object, name: str, found: object, served: object) -> ModelFileError:
    return ModelFileError(str(place), f"{name} is {found}, and {served} in the model that is served; restart with it")
