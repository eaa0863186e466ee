"""How the files of an embedding model say that hidden states become an embedding.

In folders this is sentence-transformers' format, in GGUF files a key of llama.cpp's.
"""

from pathlib import Path
from typing import Any, NamedTuple

from headwater.models.gguf_header import GGUFHeader, parts_of
from headwater.models.model_files import is_there, read_json_if_there

_GGUF_MODES = {1: "mean", 2: "cls", 3: "last", 4: "rank"}  # llama.cpp's enum llama_pooling_type
_MODES = {"pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean"}


class PoolingConfig(NamedTuple):
    """`mode` is "last", "mean", empty if nothing is said, or the name of a mode that is not supported."""

    mode: str = ""
    dimensions: tuple[int, ...] | None = None  # of a Matryoshka model (arXiv 2205.13147); empty: any; None: it is none


def read_pooling(folder: Path, *, gguf: Path | None = None) -> PoolingConfig:
    """From the metadata of a GGUF file, or 1_Pooling/config.json and config.json in the folder of a model."""
    if gguf is not None:
        metadata = GGUFHeader(parts_of(gguf)[0]).metadata
        number = metadata.get(f"{metadata.get('general.architecture')}.pooling_type")
        return PoolingConfig(_GGUF_MODES.get(number, "") if isinstance(number, int) else "")
    pooling = read_json_if_there(folder / "1_Pooling" / "config.json") if is_there(folder / "1_Pooling") else {}
    chosen = [name for name, value in pooling.items() if name.startswith("pooling_mode") and value is True]
    mode = _MODES.get(chosen[0], chosen[0]) if len(chosen) == 1 else "+".join(chosen)
    if isinstance(named := pooling.get("pooling_mode"), str):  # the newer form
        mode = {"lasttoken": "last"}.get(named, named)
    return PoolingConfig(mode, _dimensions(read_json_if_there(folder / "config.json")))


def _dimensions(config: dict[str, Any]) -> tuple[int, ...] | None:
    listed = config.get("matryoshka_dimensions")
    if isinstance(listed, list) and listed and all(isinstance(item, int) for item in listed):
        return tuple(sorted(listed))
    return () if config.get("is_matryoshka") is True else None
