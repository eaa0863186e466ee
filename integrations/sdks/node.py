"""Run a script of node that makes its own checks: it prints a line of JSON for each, and these are handed on."""

import json
import os
import shutil
import subprocess
from pathlib import Path

from checks import REPORT_VARIABLE, URL_VARIABLES, page_blocks, server_at

LIMIT_S = 280.0


def run_node(script: str, *, page: str) -> None:
    """Run a script of this folder in the client's npm folder, from where it finds its packages.

    The script finds the code of docs/clients/PAGE.md beside it, as page.mjs.
    """
    folder = Path(os.environ["HEADWATER_CLIENT_FOLDER"])
    (code,) = page_blocks(page, "js", server_at(os.environ[URL_VARIABLES["model"]]))
    (folder / "page.mjs").write_text(code)
    for name in (script, "node_checks.mjs"):
        shutil.copy(Path(__file__).parent / name, folder / name)
    ran = subprocess.run(["node", folder / script], capture_output=True, text=True, timeout=LIMIT_S, cwd=folder)
    print(ran.stderr, end="")
    with open(os.environ.get(REPORT_VARIABLE, os.devnull), "a") as report:
        for line in ran.stdout.splitlines():
            outcome = json.loads(line)
            print(line, file=report)
            print(f"  {outcome['result']:7} {outcome['check']} {outcome['reason']}".rstrip())
    if ran.returncode:
        raise SystemExit(ran.returncode)
