"""The grammar library without the package around it, in an interpreter that has imported nothing yet."""

import subprocess
import sys

PROGRAM = """
import sys
import headwater.grammars.check_process
from headwater.grammars.library import LLMatcher
assert "importlib.metadata" not in sys.modules and "llguidance" not in sys.modules
import llguidance
assert llguidance.LLMatcher is LLMatcher and llguidance.__version__
"""


def test_the_checking_process_imports_no_package_and_a_later_import_finds_the_same_classes() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=60)
