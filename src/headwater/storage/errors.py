"""The errors of stores, as one tree.

A missing or damaged page is not an error but a status of that page: see `backend.ReadStatus`.
"""


class StorageError(Exception):
    """A call to a store failed, and none of its results may be used."""

    cause = "error"  # names the failure in metrics and in the circuit breaker


class StorageTimeout(StorageError):
    """The store did not answer, or a lock did not become free, within the backend's time limit."""

    cause = "timeout"


class StorageUnavailable(StorageError):
    """The store cannot be reached, rejects the connection, or its medium fails."""

    cause = "unavailable"


class StorageFull(StorageError):
    """The store has no room even for a generation. For pages, a lack of room is a status, not an error."""

    cause = "full"


class StorageClosed(StorageError):
    """The backend was closed (detached) during the call."""

    cause = "closed"
