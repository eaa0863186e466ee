"""`headwater simulate --plan`: what it prints and writes, and what it refuses."""

import builtins
import json
import xml.etree.ElementTree as ElementTree

import pytest
from click.testing import CliRunner

from headwater.cli.main import app

runner = CliRunner()
SMALL = ["simulate", "--plan", *"--requests 40 --rate 20 --output-tokens 20 --seed 1".split()]


def test_fleets_are_compared_and_the_figures_written(tmp_path):
    page, figures = tmp_path / "plan.html", tmp_path / "plan.json"
    sizes = ["--engines", "1,2", "--device-gb", "1", "--host-gb", "0,20"]
    done = runner.invoke(app, [*SMALL, *sizes, "--html", str(page), "--json", str(figures)])
    assert done.exit_code == 0, done.output
    assert "found on device" in done.output and "llama-3.1-8b on h100: 40 requests" in done.output
    fleets = json.loads(figures.read_text())["fleets"]
    assert [(each["num_engines"], each["host_gb"]) for each in fleets] == [(1, 0), (1, 20), (2, 0), (2, 20)]
    assert all(each["num_requests"] == 40 and each["ttft_p50_s"] > 0 for each in fleets)
    text = page.read_text()
    drawings = [part.split("</svg>")[0] for part in text.split("<svg")[1:]]
    assert len(drawings) == 3
    for drawing in drawings:
        assert len(ElementTree.fromstring(f"<svg{drawing}</svg>")) > 4
    assert text.count("2 engines, host 20 GB") >= 4  # in the table, at the bars and in the legend


def test_engines_of_several_devices_are_faster(tmp_path):
    figures = tmp_path / "plan.json"
    done = runner.invoke(app, [*SMALL, "--tp-size", "1,2", "--json", str(figures)])
    assert done.exit_code == 0, done.output
    assert "TP 1" in done.output and "TP 2" in done.output
    alone, shared = json.loads(figures.read_text())["fleets"]
    assert (alone["tp_size"], shared["tp_size"]) == (1, 2)
    assert shared["itl_p50_s"] < alone["itl_p50_s"] and shared["ttft_p50_s"] < alone["ttft_p50_s"]


def test_drawings_as_png(tmp_path):
    file = tmp_path / "plan.png"
    done = runner.invoke(app, [*SMALL, "--png", str(file)])
    assert done.exit_code == 0, done.output
    assert file.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_png_is_refused_before_anything_is_played(tmp_path, monkeypatch):
    right = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return right(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    done = runner.invoke(app, [*SMALL, "--png", str(tmp_path / "plan.png")])
    assert done.exit_code == 2 and "headwater[plot]" in done.output


def test_a_trace_is_played(tmp_path):
    trace = tmp_path / "trace.jsonl"
    lines = [{"arrival_s": place, "output_tokens": 4, "pieces": [["system", 640]]} for place in range(4)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    figures = tmp_path / "plan.json"
    arguments = ["--trace", str(trace), "--model", "smollm2-135m", "--hardware", "cpu", "--json", str(figures)]
    done = runner.invoke(app, ["simulate", "--plan", *arguments])
    assert done.exit_code == 0, done.output
    (fleet,) = json.loads(figures.read_text())["fleets"]
    # the first of four equal prompts finds nothing; each later one finds all but its last token, which is computed
    assert fleet["hit_rate_device"] == pytest.approx(3 * (640 - 1) / (4 * 640))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engines", "1.5"], "engines must be whole numbers"),
        (["--tp-size", "3"], "tp-size must divide"),
        (["--host-gb", "x"], "host-gb must be numbers"),
        (["--storage-gb", "5"], "needs host memory"),
        (["--rate", "0"], "requests_per_s must be above 0"),
        (["--model", "nope"], "model must be"),
        (["--trace", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--json", "no/such/folder/x.json"], "is no folder"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, message):
    done = runner.invoke(app, ["simulate", "--plan", *arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_flushes_of_a_fleet_are_played_and_tabulated(tmp_path):
    figures = tmp_path / "flushes.json"
    sizes = ["--fleet-flush", "12", "--flushes", "2", "--flush-streams", "8", "--flush-timeout", "1", "--faults", "0"]
    done = runner.invoke(app, ["simulate", "--plan", *sizes, "--json", str(figures)], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    assert "12 replicas, llama-3.1-8b on h100" in done.output and "200 / 202" in done.output
    without, with_loss = json.loads(figures.read_text())["flushes"]
    assert (without["loss"], with_loss["loss"]) == (0, 0.01)
    assert without["statuses"] == {"200": 2} and without["num_stale"] == with_loss["num_stale"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "0.5"], "loss needs --fleet-flush"),
        (["--fleet-flush", "2", "--loss", "1"], "loss and faults must be from 0 to below 1"),
        (["--fleet-flush", "-2"], "replicas and flushes must be at least 1"),
        (["--fleet-flush", "2", "--flush-streams", "0"], "flush-streams must be whole numbers"),
    ],
)
def test_wrong_arguments_of_flushes_are_refused(arguments, message):
    done = runner.invoke(app, ["simulate", "--plan", *arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_options_of_plans_need_plan():
    done = runner.invoke(app, ["simulate", "--host-gb", "5"])
    assert done.exit_code == 2 and "--host-gb needs --plan" in done.output
