"""The sampling parameters that a model's files recommend, for requests that leave them out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headwater.models.gguf_header import GGUFHeader, parts_of
from headwater.models.model_files import read_json_if_there

# our name (and that of generation_config.json) -> GGUF's
_GGUF_KEYS = {
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "top_k": "general.sampling.top_k",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


def read_sampling_defaults(folder: Path, *, gguf: Path | None) -> dict[str, float]:
    """Sampling parameters and their recommended values, from a GGUF's metadata or generation_config.json.

    Empty if nothing is recommended. Ranges are not checked.
    """
    if gguf is not None:
        metadata = GGUFHeader(parts_of(gguf)[0]).metadata
        return _numbers({name: metadata.get(key) for name, key in _GGUF_KEYS.items()})
    config = read_json_if_there(folder / "generation_config.json")
    return _numbers({name: config.get(name) for name in _GGUF_KEYS})


def _numbers(given: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value for name, value in given.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }
