"""Hand-made pickles are those of tests/transports."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3] / "transports"))
