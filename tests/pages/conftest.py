"""The tests of the pages start servers as tests/e2e does, and ask the script of the reference pages for the routes."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "release"), str(ROOT / "tests" / "e2e")]
