"""Tensors that threads read ahead: each once, errors where they are asked for, no more in memory than the window."""

import threading
import time
from collections.abc import Mapping

import numpy as np
import pytest

from headwater.devices.host_tensor import HostTensor
from headwater.models.reading import read_ahead
from headwater.models.reading.read_ahead import ReadAhead

NAMES = [f"t{number}" for number in range(40)]


class Source:
    place = "here"

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.broken: set[str] = set()
        self.hold = threading.Event()
        self.hold.set()

    def place_of(self, name: str) -> str:
        return self.place

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return dict.fromkeys(NAMES, (1,)) | {"large": (50,)}

    def load(self, name: str) -> HostTensor:
        self.loaded.append(name)
        assert self.hold.wait(30)
        if name in self.broken:
            raise ValueError(f"{name} is torn")
        return HostTensor.of(np.full(1, int(name[1:]), dtype=np.float32))


def value(found: object) -> int:
    assert isinstance(found, HostTensor)
    return int(found.data[0])


@pytest.mark.parametrize("order", [NAMES, NAMES[::-1], [*NAMES[20:], *NAMES[:20]]], ids=["same", "reversed", "turned"])
def test_each_tensor_is_read_once_in_any_order(order: list[str]) -> None:
    source = Source()
    with ReadAhead(source, NAMES) as ahead:
        assert [value(ahead.load(name)) for name in order] == [int(name[1:]) for name in order]
    assert sorted(source.loaded) == sorted(NAMES)


def test_no_more_than_the_window_is_read_before_it_is_used() -> None:
    source = Source()
    with ReadAhead(source, NAMES) as ahead:
        deadline_s = time.monotonic() + 20
        while len(ahead._read) < read_ahead._WINDOW:
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        assert len(source.loaded) == read_ahead._WINDOW


def test_no_more_numbers_than_allowed_are_read_before_they_are_used() -> None:
    """A tensor that is larger by itself is read when it is used, and the others are not held up by it."""
    source, used = Source(), []
    names = [*NAMES[:20], "large", *NAMES[20:]]
    with ReadAhead(source, names, most_numbers=5, on_use=used.append) as ahead:
        deadline_s = time.monotonic() + 20
        while len(ahead._read) < 5:
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        time.sleep(0.02)
        assert sorted(source.loaded) == NAMES[:5]
        for name in names:
            assert ahead._ahead <= 5
            if name == "large":
                assert name not in source.loaded
            else:
                assert value(ahead.load(name)) == int(name[1:])
    assert used == [1] * 40


def test_an_error_is_raised_where_the_tensor_is_asked_for() -> None:
    source = Source()
    source.broken = {"t3"}
    with ReadAhead(source, NAMES) as ahead:
        assert [value(ahead.load(name)) for name in NAMES[:3]] == [0, 1, 2]
        with pytest.raises(ValueError, match="t3 is torn"):
            ahead.load("t3")
        assert value(ahead.load("t4")) == 4


def test_threads_end_with_the_block_and_keep_nothing() -> None:
    source = Source()
    source.hold.clear()
    with ReadAhead(source, NAMES) as ahead:
        pass
    source.hold.set()
    deadline_s = time.monotonic() + 20
    while any(thread.name == "read-ahead" for thread in threading.enumerate()):
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    assert not ahead._read
    assert len(source.loaded) <= read_ahead._NUM_THREADS


def test_other_tensors_are_loaded_as_they_are_asked_for() -> None:
    source = Source()
    with ReadAhead(source, NAMES[:2]) as ahead:
        assert value(ahead.load("t7")) == 7
