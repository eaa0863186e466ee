"""Headwater: an LLM inference server whose KV cache can be operated while it serves.

`from headwater import Engine` is the Python API; the import itself loads neither torch nor a web framework.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwater.launch.config import ServerArgs
    from headwater.launch.engine_api import Engine

__all__ = ["Engine", "ServerArgs"]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from headwater.launch.engine_api import Engine

        return Engine
    if name == "ServerArgs":
        from headwater.launch.config import ServerArgs

        return ServerArgs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
