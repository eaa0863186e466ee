"""The exception of all checks."""


class Violation(AssertionError):
    """The engine broke a promise. `promise` is its short name, one for each kind of failure."""

    def __init__(self, promise: str, details: str) -> None:
        super().__init__(f"{promise}: {details}")
        self.promise = promise


def demand(condition: object, promise: str, details: object = "") -> None:
    """Raise `Violation` unless `condition`."""
    if not condition:
        raise Violation(promise, str(details))
