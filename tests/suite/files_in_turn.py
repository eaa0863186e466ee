"""A process of pytest-xdist imports a test file when the file's turn comes, and not all files of the run at its start.

xdist has every process collect every test, of which it runs a part: 20 s of CPU in each process. With `--dist loadfile`
it hands out whole files. So a process collects one item for each file here, and replaces this item by the tests of the
file when they are to run. Filters (`-m`, `-k`, `--deselect`) see the tests alone, as they do in one process. Files of
one group are handed to one process, as with xdist's own groups.
"""

import gc
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

WANTED = "files_in_turn"  # what the controller tells its processes
NAME = "all tests of the file"
# these choose or order tests by what other files hold
OVER_FILES = ("lf", "failedfirst", "newfirst", "stepwise", "stepwise_skip")


class WholeFile(pytest.Item):
    """Stands for the tests of a file until they run."""

    parent: "LaterFile"

    def runtest(self) -> None:
        raise AssertionError("the tests of the file run instead")


class LaterFile(pytest.File):
    """A test file that is not imported yet; all files of a group run in one process."""

    group: str | None = None

    def collect(self) -> list[pytest.Item]:
        # xdist keeps together what has the same name before the first ::
        nodeid = f"{self.group}::{self.nodeid}::{NAME}" if self.group else None
        whole = WholeFile.from_parent(self, name=NAME, nodeid=nodeid)
        whole.add_marker(pytest.mark.timeout(0))  # each test has its own
        return [whole]


class Progress:
    """The controller's count of tests, estimated from the files that have begun: nobody has collected all of them."""

    def __init__(self) -> None:
        self._num_files = 0
        self._files: set[str] = set()
        self._tests: set[str] = set()

    def files_are_known(self, ids: list[str]) -> None:
        self._num_files = len(ids) if all(name.endswith(NAME) for name in ids) else 0

    def test_is_reported(self, nodeid: str) -> int | None:
        """How many tests there seem to be, always one more than reported; None where the tests were collected."""
        self._files.add(nodeid.partition("::")[0])
        self._tests.add(nodeid)
        return len(self._tests) * self._num_files // len(self._files) + 1 if self._num_files else None


class Controller:
    """Decides whether files are imported in turn, and shows how far the run is."""

    def __init__(self) -> None:
        self._session: pytest.Session | None = None
        self._progress = Progress()

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        config = node.config
        by_file = config.getoption("dist", "no") == "loadfile" and not any("::" in name for name in config.args)
        node.workerinput[WANTED] = by_file and not any(config.getoption(name, False) for name in OVER_FILES)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self._progress.files_are_known(ids)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        count = self._progress.test_is_reported(report.nodeid)
        if count is not None and self._session is not None:
            self._session.testscollected = count


class Worker:
    """Collects files as items, and runs the tests of a file in its item's place; calls `imported` after each file."""

    def __init__(self, imported: Callable[[], None], group_of: Callable[[Path], str | None]) -> None:
        self._imported, self._group_of = imported, group_of

    def pytest_pycollect_makemodule(self, module_path: Path, parent: pytest.Collector) -> LaterFile:
        later = LaterFile.from_parent(parent, path=module_path)
        later.group = self._group_of(module_path)
        return later

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> Generator[None, None, None]:
        files = [item for item in items if isinstance(item, WholeFile)]
        items[:] = [item for item in items if not isinstance(item, WholeFile)]
        yield
        # groups first: one that begins late would be the last to end
        items.extend(sorted(files, key=lambda file: file.parent.group is None))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if not isinstance(item, WholeFile):
            return None
        session, hook = item.session, item.config.hook
        place = session.items.index(item)
        tests = tests_of(item)
        self._imported()
        for test, following in zip(tests, [*tests[1:], nextitem], strict=False):
            session.items[place] = test  # xdist compares reports with the item that it handed out
            hook.pytest_runtest_protocol(item=test, nextitem=following)
            if session.shouldfail or session.shouldstop:
                break
        session.items[place] = item
        if not tests:  # fixtures of folders and of the session end that the next file does not share
            hook.pytest_runtest_setup(item=item)
            hook.pytest_runtest_teardown(item=item, nextitem=nextitem)
        return True


def tests_of(item: WholeFile) -> list[pytest.Item]:
    """Import the file and return its chosen tests; the garbage collector never looks at what is alive then."""
    assert item.parent.parent is not None
    gc.collect()  # little: what earlier files brought is frozen
    gc.disable()
    module = pytest.Module.from_parent(item.parent.parent, path=item.path)
    tests = list(item.session.genitems(module))
    item.config.hook.pytest_collection_modifyitems(session=item.session, config=item.config, items=tests)
    gc.freeze()
    gc.enable()
    return tests


def register(
    config: pytest.Config, *, imported: Callable[[], None], group_of: Callable[[Path], str | None]
) -> None:
    """Call it when pytest is configured, in the controller and in its processes. Without xdist it does nothing.

    `group_of`: files of one group run in one process, one after the other, so that this one alone has what is dear.
    """
    workerinput = getattr(config, "workerinput", None)
    if workerinput is None:
        config.pluginmanager.register(Controller())
    elif workerinput.get(WANTED):
        config.pluginmanager.register(Worker(imported, group_of))
