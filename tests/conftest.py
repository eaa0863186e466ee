"""What all tests share: warnings that are not ours, and nothing that reaches out of this machine."""

import os
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("NO_COLOR", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded: other processes need the cores, too
if not Path("/dev/nvidiactl").exists():  # no GPU: the Triton kernels are interpreted, which must be said before import
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    if "triton.runtime.interpreter" in sys.modules:
        from interpreted_triton import hasten

        hasten()
