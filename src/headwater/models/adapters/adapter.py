"""An adapter in host memory: pairs of matrices, and the identity that its KV is kept under."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from headwater.devices.adapters import SITES, Adapter, AdapterMatrices
from headwater.devices.host_tensor import HostTensor
from headwater.models.adapters.adapter_config import BLOCK_OF, AdapterConfig, read_adapter_config
from headwater.models.adapters.names import CONFIG_NAME, WEIGHTS_NAME
from headwater.models.config import ModelConfig
from headwater.models.loader import hub_folder
from headwater.models.model_files import ModelFileError, is_there
from headwater.models.weights_safetensors import SafetensorsWeights

_FILES = (CONFIG_NAME, WEIGHTS_NAME)
_PREFIX = "base_model.model."
_PROJECTIONS = {f"{name}_proj" for names in SITES.values() for name in names}
_UNSUPPORTED = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_A": "an adapted embedding",
    "lora_embedding_B": "an adapted embedding",
    "modules_to_save": "whole modules (modules_to_save)",
    "base_layer": "weights of the model itself",
}

Pairs = Mapping[tuple[int, str], tuple[HostTensor, HostTensor]]


def find_adapter(path: str, *, hub_refusal: str | None) -> Path:
    """The folder of an adapter: a folder of this machine, or a hub id, which is downloaded.

    `hub_refusal`: why a hub id is refused; None if it is not. ValueError if there is no such adapter.
    """
    try:
        folder = Path(path).expanduser()
        exists = is_there(folder)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"lora_path {path!r} cannot be opened ({error})") from None
    if exists:
        if not folder.is_dir():
            raise ValueError(f"lora_path {path!r} is no folder; an adapter is a folder with {' and '.join(_FILES)}")
        return folder
    if hub_refusal is not None:
        raise ValueError(f"lora_path {path!r} is no folder of this machine; {hub_refusal}")
    return hub_folder(path, patterns=_FILES)


def read_adapter(folder: Path, config: ModelConfig, *, max_rank: int, form: str) -> Adapter:
    """Read and check the adapter of a folder for a model of `config`; its numbers are served as `form`.

    ModelFileError that names what does not fit or is not supported. Nothing that is larger than `max_rank` allows is
    read.
    """
    settings = read_adapter_config(folder)
    if not is_there(folder / WEIGHTS_NAME):
        others = sorted(path.name for path in folder.glob("adapter_model.*"))
        found = f", only {others[0]}, a format that can run code" if others else ""
        raise ModelFileError(folder, f"has no {WEIGHTS_NAME}{found}")
    weights = SafetensorsWeights([folder / WEIGHTS_NAME])
    modules = _modules(weights)
    _check_targets(settings, modules, weights)
    shapes, matrices, digest = config.parameter_shapes(), {}, hashlib.blake2b(digest_size=16)
    for module, stem in sorted(modules.items()):
        if ".experts." in module:
            raise ModelFileError(weights.place, f"adapts {module!r}: adapters of experts are not supported")
        shape = shapes.get(f"{module}.weight")
        if shape is None or module.rpartition(".")[2] not in BLOCK_OF:
            raise ModelFileError(weights.place, f"adapts {module!r}, which this model lacks or is not supported")
        rank, scale = settings.rank_of(module), settings.scale_of(module)
        if rank > max_rank:
            raise ModelFileError(folder, f"{module} has rank {rank}; --max-lora-rank is {max_rank}")
        expected = {"A": (rank, shape[1]), "B": (shape[0], rank)}
        for letter, wanted in expected.items():
            name = f"{stem}.lora_{letter}.weight"
            found = weights.shapes().get(name)
            if found != wanted:
                what = "is missing" if found is None else f"has shape {list(found)}"
                raise ModelFileError(weights.place, f"tensor {name!r} {what}, expected shape {list(wanted)}")
        a, b = (weights.load(f"{stem}.lora_{letter}.weight").astype(form) for letter in "AB")
        for part in (f"{module} {form} {a.shape} {b.shape} {scale!r}".encode(), a.data, b.data):
            digest.update(len(part).to_bytes(8, "little") if isinstance(part, bytes) else b"")
            digest.update(part if isinstance(part, bytes) else part.reshape(-1).view("u1").data)
        parts, first = module.split("."), 0
        for projection, size in _projections(parts[4].removesuffix("_proj"), config, num_rows=shape[0]):
            matrices[int(parts[2]), projection] = AdapterMatrices(a, b.rows(first, first + size), scale)
            first += size
    return Adapter(digest.hexdigest(), matrices)


def _projections(name: str, config: ModelConfig, *, num_rows: int) -> tuple[tuple[str, int], ...]:
    """The projections of a module, and how many rows of its B each has: several of one that is fused."""
    if name == "qkv":
        return ("q", config.q_size), ("k", config.kv_size), ("v", config.kv_size)
    if name == "gate_up":
        return ("gate", num_rows // 2), ("up", num_rows // 2)
    return ((name, num_rows),)


def _modules(weights: SafetensorsWeights) -> dict[str, str]:
    """The adapted modules by their names in the model, and the names of their tensors without `.lora_A.weight`."""
    found: dict[str, str] = {}
    for name in weights.shapes():
        for part, what in _UNSUPPORTED.items():
            if part in name:
                raise ModelFileError(weights.place, f"tensor {name!r}: {what} is not supported")
        stem, _, rest = name.rpartition(".lora_")
        if rest not in ("A.weight", "B.weight") or not name.startswith(_PREFIX):
            raise ModelFileError(weights.place, f"tensor {name!r} is no matrix of a LoRA adapter")
        found[stem.removeprefix(_PREFIX)] = stem
    if not found:
        raise ModelFileError(weights.place, "holds no matrix of a LoRA adapter")
    return found


def _check_targets(settings: AdapterConfig, modules: Mapping[str, str], weights: SafetensorsWeights) -> None:
    """Raise ModelFileError if a module that the config names has no tensors: the file would not be whole."""
    for target in settings.targets:
        if not any(module == target or module.endswith(f".{target}") for module in modules):
            raise ModelFileError(weights.place, f"has no tensors of {target!r}, which target_modules names")
