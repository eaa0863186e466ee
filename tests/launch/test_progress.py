"""The bar of the start: seen at a terminal, silent in a log."""

import io

import pytest
from rich.console import Console

from headwater.launch.progress import progress_bar


@pytest.mark.parametrize(("is_terminal", "total"), [(True, 3), (False, 3), (True, 0)])
def test_a_bar_is_shown_at_a_terminal_only(is_terminal: bool, total: int) -> None:
    written = io.StringIO()
    with progress_bar("capturing", total, console=Console(file=written, force_terminal=is_terminal)) as done:
        for _ in range(total):
            done()
    assert ("capturing" in written.getvalue()) == (is_terminal and total > 0)
    if written.getvalue():
        assert "3/3" in written.getvalue()
