"""A progress bar on stderr for the slow parts of a start."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def progress_bar(label: str, total: int, *, console: Console | None = None) -> Iterator[Callable[[], None]]:
    """Show how many of `total` items are done; yields a function to call after each. Silent if not on a terminal."""
    console = console or Console(stderr=True)
    if not console.is_terminal or not total:
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda: progress.advance(task)
