"""What can go wrong between an API process and an engine."""

from headwater.messages import Failed


class EngineGone(Exception):
    """The engine ended, or this server is ending; whatever ran there is lost. HTTP 503."""

    def __init__(self, engine: int, reason: str) -> None:
        super().__init__(f"engine {engine} is gone: {reason}")
        self.engine = engine
        self.reason = reason


class ShuttingDown(EngineGone):
    """The server ends by intent. HTTP 503."""


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
