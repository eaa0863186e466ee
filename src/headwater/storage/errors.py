"""What can go wrong between a worker and a store, as one tree.

A page that is missing or damaged is no error but a status of that page: see `backend.ReadStatus`.
"""


class StorageError(Exception):
    """A store could not do what it was asked; nothing of the call may be relied on."""

    cause = "error"  # names the failure in metrics and in the circuit breaker


class StorageTimeout(StorageError):
    """The store did not answer, or a lock was not free, within its own time limit."""

    cause = "timeout"


class StorageUnavailable(StorageError):
    """The store cannot be reached, refuses us, or fails below us."""

    cause = "unavailable"


class StorageFull(StorageError):
    """No room even for a generation. Pages that find no room are a status, not an error."""

    cause = "full"


class StorageClosed(StorageError):
    """The backend was closed (detached) meanwhile."""

    cause = "closed"
