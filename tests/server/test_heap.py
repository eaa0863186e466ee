"""Collections in a running server: what was loaded is not looked through, what becomes garbage still is collected."""

import gc
import weakref

from headwater.server.heap import freeze_heap


class _Ring:
    def __init__(self) -> None:
        self.me = self


def test_what_was_loaded_is_left_out_and_new_garbage_is_not() -> None:
    loaded, old_garbage = [[] for _ in range(1000)], weakref.ref(_Ring())
    try:
        freeze_heap()
        assert old_garbage() is None
        assert gc.get_freeze_count() >= len(loaded)
        new_garbage = weakref.ref(_Ring())
        gc.collect()
        assert new_garbage() is None
    finally:
        gc.unfreeze()
