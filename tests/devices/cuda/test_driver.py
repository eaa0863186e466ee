"""A GPU is looked for without PyTorch, whose import takes seconds, unless NVIDIA's driver is there."""

import logging
import sys
from types import SimpleNamespace

import pytest

from headwater.devices.cuda import driver


def _without_driver(name: str) -> None:
    raise OSError(f"{name}: cannot open shared object file")


def _torch(is_available: bool) -> SimpleNamespace:
    return SimpleNamespace(__spec__=object(), cuda=SimpleNamespace(is_available=lambda: is_available))


def test_without_a_driver_torch_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.ctypes, "CDLL", _without_driver)
    monkeypatch.setitem(sys.modules, "torch", _torch(True))
    assert not driver.has_gpu()


@pytest.mark.parametrize("is_available", [True, False])
def test_with_a_driver_torch_decides(monkeypatch: pytest.MonkeyPatch, is_available: bool) -> None:
    """The driver may be too old for it, or all GPUs hidden."""
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: None)
    monkeypatch.setitem(sys.modules, "torch", _torch(is_available))
    assert driver.has_gpu() == is_available


def test_a_driver_without_torch_is_a_cpu_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that silently left the GPU idle would be slow for a reason that no one sees."""
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: None)
    monkeypatch.setitem(sys.modules, "torch", None)
    with caplog.at_level(logging.WARNING):
        assert not driver.has_gpu()
    assert "PyTorch is not" in caplog.text
