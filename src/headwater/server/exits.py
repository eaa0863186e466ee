"""Exit codes of `headwater serve`, and its error message before it ends."""

from rich.console import Console
from rich.markup import escape

EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130


def print_error(message: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error:[/] {escape(message)}")
