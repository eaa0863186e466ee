"""As sitecustomize.py in PYTHONPATH: a rank hangs in its next step while the file HEADWATER_TEST_HANG exists."""

import os
import sys
import threading

if "headwater.launch.ranks.process" in sys.orig_argv:
    from headwater.ranks.plan_stream import Record
    from headwater.ranks.worker import RankWorker

    step = RankWorker._step

    def hang(self: RankWorker, record: Record) -> None:
        if os.path.exists(os.environ["HEADWATER_TEST_HANG"]):
            threading.Event().wait()
        step(self, record)

    RankWorker._step = hang  # type: ignore[method-assign]
