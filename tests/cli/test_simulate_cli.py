"""`headwater simulate`: what it says when promises are kept, when one is broken, and when asked for nonsense."""

import pytest
from click.testing import CliRunner

from headwater.cli.main import app
from headwater.simulation.mutants.check import MUTANTS

runner = CliRunner()


def test_runs_that_keep_every_promise():
    done = runner.invoke(app, ["simulate", "--seed", "3", "--runs", "2", "--turns", "100"])
    assert done.exit_code == 0, done.output
    assert "seeds 3 to 4" in done.output and "2 runs" in done.output


def test_a_failure_is_written_down_and_can_be_played_again(tmp_path):
    file = tmp_path / "failure.json"
    arguments = ["simulate", "--seed", "0", "--runs", "1", "--turns", "1500", "--profile", "flush", "--save", str(file)]
    with MUTANTS["publish_limit_is_skipped"].in_force():
        failed = runner.invoke(app, arguments)
        again = runner.invoke(app, ["simulate", "--replay", str(file)])
    assert failed.exit_code == again.exit_code == 1, failed.output
    assert "seed 0, profile flush, turn" in failed.output and f"--replay {file}" in failed.output
    assert "FlushCache" in again.output
    healed = runner.invoke(app, ["simulate", "--replay", str(file)])
    assert healed.exit_code == 0 and "every promise was kept" in healed.output


@pytest.mark.parametrize("arguments", [["--profile", "nope"], ["--runs", "0"], ["--turns", "0"], ["--seed", "-1"]])
def test_wrong_arguments_are_refused(arguments):
    assert runner.invoke(app, ["simulate", *arguments]).exit_code == 2


def test_a_file_that_is_no_run_is_refused(tmp_path):
    file = tmp_path / "nothing.json"
    assert runner.invoke(app, ["simulate", "--replay", str(file)]).exit_code == 2
    file.write_text("{}")
    assert runner.invoke(app, ["simulate", "--replay", str(file)]).exit_code == 2
