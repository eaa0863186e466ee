"""The reference pages of the site are made by a script beside the build of the wheels."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "release"))
