"""A fleet on Ray Serve: `serve run headwater.ray:app model=FOLDER replicas=2`. Needs the extra `ray`."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Lazy, so that what needs no Ray can be imported without it."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from headwater.ray.application import app

    return app
