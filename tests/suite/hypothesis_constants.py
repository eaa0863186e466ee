"""Hypothesis draws from the constants of our sources: several processes read a share each, and keep them for all."""

import importlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType


def keep_constants(paths: Iterable[Path]) -> int:
    """Have Hypothesis read these sources and keep their constants in its folder; return of how many files it did.

    Otherwise each process reads all of them at the same time in the first run: 5 s of CPU. Hypothesis has no public
    way, so a version without this function finds the constants by itself, later.
    """
    try:
        constants_from_module = importlib.import_module("hypothesis.internal.constants_ast").constants_from_module
    except (ImportError, AttributeError):
        return 0
    num_kept = 0
    for path in paths:
        module = ModuleType(path.stem)
        module.__file__ = str(path)
        try:
            constants_from_module(module)
        except Exception:
            break
        num_kept += 1
    return num_kept
