"""The fleet of this machine as `headwater fleet` finds it, which may end at any moment."""

import subprocess
import sys
from pathlib import Path

import pytest

from headwater.fleet.local_fleet import LocalFleet, running_fleet


def test_a_fleet_that_ends_just_before_it_is_told_to_has_ended(tmp_path: Path) -> None:
    """As between `headwater fleet down`'s look at the process and its signal."""
    command = [sys.executable, "-S", "-c", "print(flush=True); input()", "fleet"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        LocalFleet(process.pid, "http://127.0.0.1:1").write(tmp_path / "fleet.json")
        found = running_fleet(tmp_path / "fleet.json")
        assert found.is_alive
        process.kill()
    found.end()
    with pytest.raises(ValueError, match="is not there any more"):
        running_fleet(tmp_path / "fleet.json")


def test_a_fleet_is_told_to_end_and_waited_for(tmp_path: Path) -> None:
    command = [sys.executable, "-S", "-c", "print(flush=True); input()", "fleet"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        LocalFleet(process.pid, "http://127.0.0.1:1").end()
        assert not LocalFleet(process.pid, "http://127.0.0.1:1").is_alive


def test_without_a_fleet_the_message_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`headwater fleet up` starts one"):
        running_fleet(tmp_path / "none.json")
