"""Run the commands of a load tool's page (docs/clients/NAME.md) as they stand, and read what they report.

The page shows a command for the default server. Its URL, its model and `TOKENIZER` (a folder with the model's
tokenizer) are replaced; nothing else is.
"""

import os
import subprocess
from pathlib import Path

from checks import Server, page_blocks

STAND_INS = str(Path(__file__).parents[1] / "stand_ins")


def run_block(page: str, number: int, server: Server, *, limit_s: float, python_path: str = "") -> str:
    """Run the page's shell block with this number; the first one installs and is number 0. Its output, both streams."""
    command = page_blocks(page, "sh", server)[number].replace("TOKENIZER", os.environ["HEADWATER_TOKENIZER"])
    environment = os.environ | {"PYTHONPATH": python_path, "PYTHONWARNINGS": "ignore", "COLUMNS": "200"}
    ran = subprocess.run(
        ["bash", "-ec", command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit_s,
    )
    if ran.returncode:
        print(ran.stdout[-3000:])
    assert ran.returncode == 0, f"ended with {ran.returncode}: {ran.stdout[-300:]}"
    return ran.stdout


def newest(pattern: str) -> Path:
    """The newest file that the tool wrote below the working folder."""
    found = sorted(Path().rglob(pattern), key=lambda path: path.stat().st_mtime)
    assert found, f"the tool wrote no {pattern}"
    return found[-1]
