"""Files that are imported in turn: every outcome of one process, each file imported once, fixtures that end in time."""

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from suite.files_in_turn import Progress

pytestmark = pytest.mark.slow

CONFTEST = """
import os, pytest
from suite import files_in_turn
def pytest_configure(config):
    files_in_turn.register(config, imported=list, group_of=group_of)
def group_of(path):
    return "of three" if path.stem in ("test_c", "test_f", "test_g") else None
@pytest.fixture(scope="session", autouse=True)
def session_end():
    yield
    print_to("end of a session")
def print_to(line):
    with open(os.environ["RECORD"], "a") as lines:
        print(os.environ["PYTEST_XDIST_WORKER"], line, file=lines)
"""
CONFTEST_OF_FOLDER = """
import pytest
from conftest import print_to
@pytest.fixture(scope="package")
def of_folder():
    yield
    print_to("end of a folder")
"""
PLAIN = """
import pytest
from conftest import print_to
print_to(f"import {__name__}")
@pytest.fixture(scope="module")
def of_module():
    yield
    print_to("end of a module")
@pytest.mark.parametrize("number", [1, 2, 3])
def test_numbers(number, of_module, of_folder):
    assert number < 3
@pytest.mark.slow
def test_left_out():
    pass
@pytest.mark.skip(reason="not here")
def test_skipped():
    pass
class TestClass:
    def test_in_a_class(self):
        pass
"""
FILES = {
    "conftest.py": CONFTEST,
    "pytest.ini": "[pytest]\nmarkers = slow\naddopts = -p no:cacheprovider -p no:hypothesispytest -p no:anyio\n",
    "one/__init__.py": "",
    "one/conftest.py": CONFTEST_OF_FOLDER,
    "one/test_a.py": PLAIN,
    "one/test_b.py": "import pytest\n@pytest.mark.slow\ndef test_left_out_too(): pass\n",
    "two/__init__.py": "",
    "two/conftest.py": CONFTEST_OF_FOLDER,
    "two/test_c.py": PLAIN,
    "two/test_d.py": "import there_is_no_such_module\n",
    "test_e.py": "import pytest\npytest.skip('no such thing', allow_module_level=True)\n",
    "test_f.py": "from conftest import print_to\ndef test_one_of_three(): print_to('one of three')\n",
    "test_g.py": "from conftest import print_to\ndef test_the_last(): print_to('last of three')\n",
}


def test_files_in_turn_have_every_outcome_and_are_imported_once(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    lines = tmp_path / "lines"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "HEADWATER"))}
    command = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "-m", "not slow", "-rA", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *command],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[1]), "RECORD": str(lines)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1, done.stdout
    outcomes = sorted(re.findall(r"^(PASSED|FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE))
    assert outcomes == sorted(
        [
            *(("PASSED", f"{file}::test_numbers[{n}]") for file in ("one/test_a.py", "two/test_c.py") for n in (1, 2)),
            *(("FAILED", f"{file}::test_numbers[3]") for file in ("one/test_a.py", "two/test_c.py")),
            *(("PASSED", f"{file}::TestClass::test_in_a_class") for file in ("one/test_a.py", "two/test_c.py")),
            ("PASSED", "test_f.py::test_one_of_three"),
            ("PASSED", "test_g.py::test_the_last"),
            ("ERROR", "two/test_d.py"),
        ]
    )
    assert re.search(r"2 failed, 8 passed, 3 skipped, 1 error in", done.stdout), done.stdout
    by_process = defaultdict(list)
    for line in lines.read_text().splitlines():
        by_process[line.partition(" ")[0]].append(line.partition(" ")[2])
    ends = ["end of a module", "end of a folder"]  # before the process imports the next file, or ends
    expected = [["import one.test_a", *ends], ["import two.test_c", *ends]]
    happened = [[line for line in found if "import" in line or line in ends] for found in by_process.values()]
    assert sorted(line for lines in happened for line in lines) == sorted([*expected[0], *expected[1]])
    assert all(lines in ([], *expected, expected[0] + expected[1]) for lines in happened), happened
    group = ["import two.test_c", "last of three", "one of three"]
    (of_group,) = [found for found in by_process.values() if set(found) & set(group)]  # in one process, either one
    assert set(of_group) >= set(group)
    assert of_group[0] in group, "before other files"
    assert all(found.count("end of a session") == 1 and "session" in found[-1] for found in by_process.values())


def test_the_number_of_tests_is_estimated_from_the_files_that_have_begun() -> None:
    progress = Progress()
    assert progress.test_is_reported("a.py::test_one") is None  # collected by everybody: the count is known
    progress.files_are_known([f"{name}.py::all tests of the file" for name in "abcd"])
    assert progress.test_is_reported("a.py::test_one") == 5
    assert progress.test_is_reported("a.py::test_two") == 9
    assert progress.test_is_reported("b.py::test_one") == 7
    progress.files_are_known(["a.py::test_one", "b.py::test_one"])
    assert progress.test_is_reported("b.py::test_one") is None
