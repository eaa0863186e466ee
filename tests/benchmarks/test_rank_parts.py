"""What run.py does on a host of several GPUs: issue-sized lists of parts, which nobody can try here as a whole."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

GPU = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(GPU))
    monkeypatch.syspath_prepend(str(GPU / "ranks"))
    yield
    for name in ("rank_parts", "run"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("num_cards", [2, 4, 8])
def test_all_sizes_and_layouts_are_there(num_cards: int) -> None:
    from rank_parts import layouts, rank_parts

    parts = rank_parts(num_cards)
    assert all((GPU / script).is_file() for script, *_ in parts.values())
    assert {(dp, tp) for dp, tp in layouts(num_cards) if dp * tp == num_cards} == set(layouts(num_cards))
    assert {f"dp{num_cards}_tp1", f"dp1_tp{num_cards}"} <= set(parts)
    for size in (size for size in (2, 4, 8) if size <= num_cards):
        assert {f"sums_{size}", f"tp{size}_llama", f"tp{size}_70b"} <= set(parts)
    assert {"equal", "tp1_llama", f"tp{num_cards}_check", f"tp{num_cards}_profile"} <= set(parts)
    assert all(0 < limit_s <= 300 for *_, limit_s in parts.values())


def test_the_efficiency_is_against_the_fewest_ranks() -> None:
    from rank_parts import conclusions

    def rates(*values: float) -> dict[str, float]:
        return {f"B1_output_tokens_per_s_run{i}": value for i, value in enumerate(values)}

    found = conclusions(
        {
            "tp2_70b": rates(900.0, 1000.0),
            "tp4_70b": rates(1700.0),
            "tp4_llama": rates(30.0),
            "dp2_tp2": {"texts": [[1, 2]]},
            "dp4_tp1": {"texts": [[1, 2]]},
            "dp1_tp4": {"texts": [[1, 3]]},
        }
    )
    assert found == {
        "70b_B1_efficiency_tp4_over_tp2": 0.85,
        "layouts_with_equal_texts": ["dp2_tp2", "dp4_tp1"],
        "layouts_compared": ["dp2_tp2", "dp4_tp1", "dp1_tp4"],
    }


def test_a_dry_run_prints_every_command() -> None:
    command = [sys.executable, str(GPU / "run.py"), "out", "--cards", "8", "--dry-run"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    assert any("engine_run.py llama3.1-70b out/tp8_70b.json" in line and "--tp-size 8" in line for line in lines)
    assert lines[-1].startswith(f"{len(lines) - 1} parts, at most ")


def test_a_part_is_ended_with_all_that_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next part finds the cards' memory taken by a server or by ranks of this one."""
    import run

    monkeypatch.setattr(run, "GRACE_S", 0.2)
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    part = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", part], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None and process.stdout.readline() == b"1\n"
        run.end_session(process)
        assert process.poll() is not None
        assert process.stdout.read() == b"", "the pipe ends when the child does"


def test_a_part_that_ended_leaves_nothing_to_wait_for() -> None:
    import run

    process = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    process.wait()
    run.end_session(process)
