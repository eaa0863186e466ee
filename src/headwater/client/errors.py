"""What can go wrong between an API process and an engine."""

import time
from datetime import UTC, datetime

from headwater.messages.control import Failed


class EngineGone(Exception):
    """The engine ended, or this server is ending; whatever ran there is lost. HTTP 503."""

    def __init__(self, engine: int, reason: str, *, since_s: float | None = None) -> None:
        """`since_s`: Unix time at which it went; now by default."""
        super().__init__(f"engine {engine} is gone: {reason}")
        self.engine = engine
        self.reason = reason
        self.since_s = time.time() if since_s is None else since_s

    @property
    def since(self) -> str:
        """When it went, as people and programs read it (ISO 8601, UTC)."""
        return datetime.fromtimestamp(self.since_s, UTC).isoformat(timespec="milliseconds")


class ShuttingDown(EngineGone):
    """The server ends by intent. HTTP 503."""


class EngineLoading(Exception):
    """The engine has not loaded its model yet. HTTP 503."""

    def __init__(self, engine: int) -> None:
        super().__init__(f"engine {engine} is still loading its model")
        self.engine = engine


class EngineOut(EngineLoading):
    """The engine is not in the desired state, and takes no requests until it is. HTTP 503."""

    def __init__(self, engine: int, reason: str) -> None:
        Exception.__init__(self, f"engine {engine} takes no requests: {reason}")
        self.engine = engine
        self.reason = reason


class NotTheSame(Exception):
    """Two engines have read different weights where they should have read the same. HTTP 409."""

    def __init__(self, engine: int, weights_id: str, others_weights_id: str) -> None:
        found = f"{weights_id}, not {others_weights_id}"
        super().__init__(f"engine {engine} read other weights than the others did: {found}; nothing was changed")
        self.engine = engine


class CallFailed(Exception):
    """The engine refused a call; `failed` is its answer."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.message)
        self.failed = failed


class RidInUse(ValueError):
    """A running request already has this rid."""

    def __init__(self, rid: str) -> None:
        super().__init__(f"rid {rid!r} is already in use by a running request; rid must be unique")
        self.rid = rid


class NoSuchEngine(ValueError):
    """A request asked for an engine that this server does not have."""

    def __init__(self, engine: int, num_engines: int) -> None:
        super().__init__(f"routed_dp_rank must be from 0 to {num_engines - 1}, got {engine}")
