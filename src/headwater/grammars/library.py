"""What is used of llguidance: its compiled module, without the package around it.

The package also reads its own version, for which it imports a hundred modules. In the process that checks grammars
these would be 4 MB and a third of the start.
"""

import importlib
import sys
from importlib.machinery import PathFinder
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
else:

    def _compiled_module() -> ModuleType:
        """`llguidance._lib`, which a later import of the package finds loaded."""
        if "llguidance" in sys.modules or (spec := PathFinder.find_spec("llguidance")) is None:
            return importlib.import_module("llguidance._lib")
        package = ModuleType("llguidance")
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["llguidance"] = package
        try:
            return importlib.import_module("llguidance._lib")
        finally:
            del sys.modules["llguidance"]

    _lib = _compiled_module()
    LLExecutor = _lib.LLExecutor
    LLMatcher = _lib.LLMatcher
    LLParserLimits = _lib.LLParserLimits
    LLTokenizer = _lib.LLTokenizer
    regex_to_lark = _lib.regex_to_lark

__all__ = ["LLExecutor", "LLMatcher", "LLParserLimits", "LLTokenizer", "regex_to_lark"]
