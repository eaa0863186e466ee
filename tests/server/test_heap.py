"""Collections in a running server: what was loaded is not looked through, what becomes garbage still is collected."""

import gc
import weakref

from headwater.heap import freeze_heap, pause_collection


class _Ring:
    def __init__(self) -> None:
        self.me = self


def test_nothing_is_collected_during_a_start_and_new_garbage_is_after_it() -> None:
    try:
        pause_collection()
        assert not gc.isenabled()
        loaded = [[] for _ in range(1000)]
        freeze_heap()
        assert gc.isenabled()
        assert gc.get_freeze_count() >= len(loaded)
        new_garbage = weakref.ref(_Ring())
        gc.collect()
        assert new_garbage() is None
    finally:
        gc.enable()
        gc.unfreeze()
