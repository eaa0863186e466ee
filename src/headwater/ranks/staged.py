"""What all ranks have read, as one answer: it can be used if every rank has read the same."""

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar


class StagedReport(Protocol):
    """What a rank reports when it has read something."""

    @property
    def error(self) -> str | None: ...


Report = TypeVar("Report", bound=StagedReport)


def error_of_ranks(
    own: str | None, reports: Mapping[int, Report], *, is_same: Callable[[Report], bool], what: str
) -> str | None:
    """The first reason, by rank, why it cannot be used. `own` is rank 0's; `is_same` compares a report with rank 0."""
    if own is not None:
        return own
    for rank, report in sorted(reports.items()):
        if report.error is not None:
            return f"rank {rank}: {report.error}"
        if not is_same(report):
            return f"rank {rank} has read {what} than rank 0: the files changed meanwhile"
    return None
